// The part of cuSPARSELt's C interface that is used here, declared anew: the library is opened when
// it is needed (library.h), so neither its header nor a CUDA toolkit takes part in the build.
//
// Source: cusparseLt.h of the wheels nvidia-cusparselt-cu13 0.8.0, 0.8.1, 0.9.0, 0.9.1 and 0.10.0,
// which agree in all that stands below. Before 0.8.0 they do not: the objects of 0.7.1 have 1024
// bytes, those of 0.6.2 13072, and neither has AlgSelectionDestroy.
#ifndef ESPARSE_FFI_CUSPARSELT_ABI_H_
#define ESPARSE_FFI_CUSPARSELT_ABI_H_

#include <cstddef>
#include <cstdint>

namespace esparse::cusparselt {

using Status = int;               // cusparseStatus_t
using Stream = void*;             // cudaStream_t, which only the library looks into
constexpr Status kSuccess = 0;    // CUSPARSE_STATUS_SUCCESS
constexpr int kOldest = 800;      // 0.8.0, in the encoding of Library::version
constexpr int kTooNew = 1000000;  // 1.0.0

// Objects that the library fills in; their contents are its own affair.
template <int kind>
struct alignas(16) Opaque {
  uint8_t bytes[512];
};
using HandleData = Opaque<0>;     // cusparseLtHandle_t
using MatrixData = Opaque<1>;     // cusparseLtMatDescriptor_t
using MatmulData = Opaque<2>;     // cusparseLtMatmulDescriptor_t
using SelectionData = Opaque<3>;  // cusparseLtMatmulAlgSelection_t
using PlanData = Opaque<4>;       // cusparseLtMatmulPlan_t

// Of library_types.h, CUDA 13.0.
constexpr int kMajorVersion = 0;   // MAJOR_VERSION of libraryPropertyType
constexpr int kMinorVersion = 1;   // MINOR_VERSION
constexpr int kPatchLevel = 2;     // PATCH_LEVEL
constexpr int kTypeFloat16 = 2;    // CUDA_R_16F of cudaDataType
constexpr int kTypeBfloat16 = 14;  // CUDA_R_16BF

// Of cusparse.h, as cusparseLt_cusparse_stub.h of 0.10.0 repeats it.
constexpr int kOrderColumn = 1;   // CUSPARSE_ORDER_COL
constexpr int kOrderRow = 2;      // CUSPARSE_ORDER_ROW
constexpr int kNonTranspose = 0;  // CUSPARSE_OPERATION_NON_TRANSPOSE
constexpr int kTranspose = 1;     // CUSPARSE_OPERATION_TRANSPOSE

// Of cusparseLt.h.
constexpr int kCompute32F = 2;        // CUSPARSE_COMPUTE_32F
constexpr int kHalfSparse = 0;        // CUSPARSELT_SPARSITY_50_PERCENT, 2:4 for 16-bit types
constexpr int kDefaultSelection = 0;  // CUSPARSELT_MATMUL_ALG_DEFAULT
enum AlgorithmAttribute : int {       // cusparseLtMatmulAlgAttribute_t; each is an int
  kConfigId = 0,
  kConfigMaxId = 1,
  kSearchIterations = 2,
  kSplitK = 3,
  kSplitKMode = 4,  // cusparseLtSplitKMode_t
  kSplitKBuffers = 5,
};
enum SplitKMode : int {
  kInvalidMode = 0,
  kOneKernel = 1,
  kTwoKernels = 2,
  kHeuristic = 3,
  kDataParallel = 4,
  kSplitKSlices = 5,
  kStreamK = 6,
};

// What every function pointer below is called on: F(result, name without cusparseLt, parameters).
// GetProperty comes first, because the version decides whether the others may be expected.
#define ESPARSE_CUSPARSELT_FUNCTIONS(F)                                                            \
  F(Status, GetProperty, (int property, int* value))                                               \
  F(const char*, GetErrorName, (Status status))                                                    \
  F(const char*, GetErrorString, (Status status))                                                  \
  F(Status, Init, (HandleData * handle))                                                           \
  F(Status, Destroy, (const HandleData* handle))                                                   \
  F(Status, DenseDescriptorInit,                                                                   \
    (const HandleData* handle, MatrixData* matrix, int64_t rows, int64_t columns, int64_t ld,      \
     uint32_t alignment, int type, int order))                                                     \
  F(Status, StructuredDescriptorInit,                                                              \
    (const HandleData* handle, MatrixData* matrix, int64_t rows, int64_t columns, int64_t ld,      \
     uint32_t alignment, int type, int order, int sparsity))                                       \
  F(Status, MatDescriptorDestroy, (const MatrixData* matrix))                                      \
  F(Status, MatmulDescriptorInit,                                                                  \
    (const HandleData* handle, MatmulData* matmul, int operation_a, int operation_b,               \
     const MatrixData* a, const MatrixData* b, const MatrixData* c, const MatrixData* d,           \
     int compute_type))                                                                            \
  F(Status, MatmulAlgSelectionInit,                                                                \
    (const HandleData* handle, SelectionData* selection, const MatmulData* matmul, int algorithm)) \
  F(Status, MatmulAlgSelectionDestroy, (const SelectionData* selection))                           \
  F(Status, MatmulAlgSetAttribute,                                                                 \
    (const HandleData* handle, SelectionData* selection, int attribute, const void* data,          \
     size_t bytes))                                                                                \
  F(Status, MatmulAlgGetAttribute,                                                                 \
    (const HandleData* handle, const SelectionData* selection, int attribute, void* data,          \
     size_t bytes))                                                                                \
  F(Status, MatmulPlanInit,                                                                        \
    (const HandleData* handle, PlanData* plan, const MatmulData* matmul,                           \
     const SelectionData* selection))                                                              \
  F(Status, MatmulPlanDestroy, (const PlanData* plan))                                             \
  F(Status, MatmulGetWorkspace, (const HandleData* handle, const PlanData* plan, size_t* bytes))   \
  F(Status, Matmul,                                                                                \
    (const HandleData* handle, const PlanData* plan, const void* alpha, const void* a,             \
     const void* b, const void* beta, const void* c, void* d, void* workspace, Stream* streams,    \
     int32_t num_streams))                                                                         \
  F(Status, SpMMACompressedSize2,                                                                  \
    (const HandleData* handle, const MatrixData* matrix, size_t* bytes, size_t* buffer_bytes))     \
  F(Status, SpMMACompress2,                                                                        \
    (const HandleData* handle, const MatrixData* matrix, int is_sparse_a, int operation,           \
     const void* dense, void* compressed, void* buffer, Stream stream))

// The library's functions, under their names without cusparseLt.
struct Functions {
#define ESPARSE_CUSPARSELT_MEMBER(result, name, parameters) result(*name) parameters = nullptr;
  ESPARSE_CUSPARSELT_FUNCTIONS(ESPARSE_CUSPARSELT_MEMBER)
#undef ESPARSE_CUSPARSELT_MEMBER
};

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_ABI_H_
