// Compiles where ffi/cusparselt/abi.h declares what NVIDIA's header does.
#include <cusparseLt.h>

#include <type_traits>

#include "cusparselt/abi.h"

namespace ours = esparse::cusparselt;

// The same to a caller: pointers for pointers, and numbers of one size.
template <typename A, typename B>
constexpr bool kSameWord =
    std::is_pointer_v<A> == std::is_pointer_v<B> && sizeof(A) == sizeof(B) &&
    (std::is_pointer_v<A> || (!std::is_floating_point_v<A> && !std::is_floating_point_v<B>));

template <typename Theirs, typename Ours>
struct SameCall : std::false_type {};
template <typename R, typename... A, typename S, typename... B>
struct SameCall<R (*)(A...), S (*)(B...)> {
  static constexpr bool Check() {
    if constexpr (sizeof...(A) == sizeof...(B)) {
      return kSameWord<R, S> && (kSameWord<A, B> && ...);
    }
    return false;
  }
};

#define SAME_CALL(result, name, parameters) \
  static_assert(SameCall<decltype(&cusparseLt##name), decltype(ours::Functions::name)>::Check());
ESPARSE_CUSPARSELT_FUNCTIONS(SAME_CALL)

#define SAME_OBJECT(theirs, our) \
  static_assert(sizeof(theirs) == sizeof(ours::our) && alignof(theirs) == alignof(ours::our))
SAME_OBJECT(cusparseLtHandle_t, HandleData);
SAME_OBJECT(cusparseLtMatDescriptor_t, MatrixData);
SAME_OBJECT(cusparseLtMatmulDescriptor_t, MatmulData);
SAME_OBJECT(cusparseLtMatmulAlgSelection_t, SelectionData);
SAME_OBJECT(cusparseLtMatmulPlan_t, PlanData);

#define SAME_VALUE(theirs, our) static_assert(static_cast<int>(theirs) == ours::our)
SAME_VALUE(CUSPARSE_STATUS_SUCCESS, kSuccess);
SAME_VALUE(MAJOR_VERSION, kMajorVersion);
SAME_VALUE(MINOR_VERSION, kMinorVersion);
SAME_VALUE(PATCH_LEVEL, kPatchLevel);
SAME_VALUE(CUDA_R_16F, kTypeFloat16);
SAME_VALUE(CUDA_R_16BF, kTypeBfloat16);
SAME_VALUE(CUSPARSE_ORDER_COL, kOrderColumn);
SAME_VALUE(CUSPARSE_ORDER_ROW, kOrderRow);
SAME_VALUE(CUSPARSE_OPERATION_NON_TRANSPOSE, kNonTranspose);
SAME_VALUE(CUSPARSE_OPERATION_TRANSPOSE, kTranspose);
SAME_VALUE(CUSPARSE_COMPUTE_32F, kCompute32F);
SAME_VALUE(CUSPARSELT_SPARSITY_50_PERCENT, kHalfSparse);
SAME_VALUE(CUSPARSELT_MATMUL_ALG_DEFAULT, kDefaultSelection);
SAME_VALUE(CUSPARSELT_MATMUL_ALG_CONFIG_ID, kConfigId);
SAME_VALUE(CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID, kConfigMaxId);
SAME_VALUE(CUSPARSELT_MATMUL_SEARCH_ITERATIONS, kSearchIterations);
SAME_VALUE(CUSPARSELT_MATMUL_SPLIT_K, kSplitK);
SAME_VALUE(CUSPARSELT_MATMUL_SPLIT_K_MODE, kSplitKMode);
SAME_VALUE(CUSPARSELT_MATMUL_SPLIT_K_BUFFERS, kSplitKBuffers);
SAME_VALUE(CUSPARSELT_INVALID_MODE, kInvalidMode);
SAME_VALUE(CUSPARSELT_SPLIT_K_MODE_ONE_KERNEL, kOneKernel);
SAME_VALUE(CUSPARSELT_SPLIT_K_MODE_TWO_KERNELS, kTwoKernels);
SAME_VALUE(CUSPARSELT_HEURISTIC, kHeuristic);
SAME_VALUE(CUSPARSELT_DATAPARALLEL, kDataParallel);
SAME_VALUE(CUSPARSELT_SPLITK, kSplitKSlices);
SAME_VALUE(CUSPARSELT_STREAMK, kStreamK);
static_assert(std::is_same_v<std::underlying_type_t<cusparseLtSplitKMode_t>, unsigned> &&
              sizeof(cusparseLtSplitKMode_t) == sizeof(int));
static_assert(CUSPARSELT_VERSION >= ours::kOldest && CUSPARSELT_VERSION < ours::kTooNew);
