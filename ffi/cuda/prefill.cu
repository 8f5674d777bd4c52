#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <type_traits>

#include "cuda/prefill.h"
#include "cuda/prefill_gpu.h"
#include "cuda/return_if_error.h"

namespace esparse::cuda {
namespace {

// All tiles that there are: rows x outputs, stages, blocks that share x. Stages, and what is to be
// stored, fill the shared memory of a multiprocessor.
#define ESPARSE_PREFILL_TILES(DO, NAME, T)     \
  DO(NAME##_16x128, T, 16, 128, 9, 1)          \
  DO(NAME##_64x128, T, 64, 128, 5, 1)          \
  DO(NAME##_128x128, T, 128, 128, 8, 1)        \
  DO(NAME##_128x192, T, 128, 192, 6, 1)        \
  DO(NAME##_256x128, T, 256, 128, 5, 1)        \
  DO(NAME##_256x128_shared, T, 256, 128, 5, 2) \
  DO(NAME##_256x192, T, 256, 192, 4, 1)        \
  DO(NAME##_256x192_shared, T, 256, 192, 4, 2)

// A name in C, so that a cubin has it as well.
#define ESPARSE_PREFILL(NAME, T, ROWS, OUTPUTS, STAGES, CLUSTER)                              \
  extern "C" __global__ void __launch_bounds__(PrefillThreads(ROWS, OUTPUTS),                 \
                                               PrefillResident(ROWS))                         \
      NAME(const __grid_constant__ CUtensorMap values, const __grid_constant__ CUtensorMap x, \
           const __grid_constant__ CUtensorMap indices, const PrefillArgs p) {                \
    extern __shared__ uint8_t shared[];                                                       \
    PrefillGpu device(shared, &values, &x, &indices);                                         \
    Prefill<T, PrefillTile<ROWS, OUTPUTS / kGroupOutputs, STAGES, CLUSTER>>(device, p);       \
  }
ESPARSE_PREFILL_TILES(ESPARSE_PREFILL, esparse_prefill_float16, __half)
ESPARSE_PREFILL_TILES(ESPARSE_PREFILL, esparse_prefill_bfloat16, __nv_bfloat16)

struct Instance {
  Dtype dtype;
  int rows, outputs, cluster;
  const char* name;
  const void* function;
  int shared;  // bytes; the layout begins at a multiple of 1024
};

template <typename T>
constexpr Dtype kDtypeOf = std::is_same_v<T, __half> ? Dtype::kFloat16 : Dtype::kBfloat16;

#define ESPARSE_PREFILL_INSTANCE(NAME, T, ROWS, OUTPUTS, STAGES, CLUSTER) \
  {kDtypeOf<T>,                                                           \
   ROWS,                                                                  \
   OUTPUTS,                                                               \
   CLUSTER,                                                               \
   #NAME,                                                                 \
   reinterpret_cast<const void*>(&NAME),                                  \
   PrefillTile<ROWS, OUTPUTS / kGroupOutputs, STAGES, CLUSTER>::kBytes + 1024},

// That of a plan, which has one.
const Instance& FindInstance(Dtype dtype, int rows, int outputs, int cluster) {
  static const Instance all[] = {
      ESPARSE_PREFILL_TILES(ESPARSE_PREFILL_INSTANCE, esparse_prefill_float16, __half)
          ESPARSE_PREFILL_TILES(ESPARSE_PREFILL_INSTANCE, esparse_prefill_bfloat16, __nv_bfloat16)};
  return *std::find_if(std::begin(all), std::end(all), [&](const Instance& one) {
    return one.dtype == dtype && one.rows == rows && one.outputs == outputs &&
           one.cluster == cluster;
  });
}

// The driver's function that describes a matrix for tensor copies; the runtime finds it, so that
// nothing is linked to the driver.
cudaError_t FindEncoder(decltype(&cuTensorMapEncodeTiled)* encode) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result));
#else
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  *encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  return cudaSuccess;
}

// A row-major matrix of 16-bit numbers [rows][columns], copied in boxes; what is outside is zero.
cudaError_t DescribeMatrix(const Product& product, const void* data, int64_t rows, int64_t columns,
                           uint32_t box_rows, uint32_t box_columns, CUtensorMapSwizzle swizzle,
                           CUtensorMap* map) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  ESPARSE_CUDA_RETURN_IF_ERROR(FindEncoder(&encode));
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
  const CUresult status =
      encode(map,
             product.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The tiles of `args` by so many teams.
cudaError_t PrepareTiles(const Product& product, const PrefillPlan& plan, const PrefillArgs& args,
                         int teams, bool shares_x, PrefillLaunch* launch) {
  constexpr int kIndexNumbers = kGroupOutputs * kStageChannels / 8 / 2;
  const Instance& instance =
      FindInstance(product.dtype, plan.rows, plan.outputs, shares_x ? plan.cluster : 1);
  launch->name = instance.name;
  launch->function = instance.function;
  launch->teams = teams;
  launch->threads = PrefillThreads(plan.rows, plan.outputs);
  launch->team = shares_x ? plan.cluster : args.split;
  launch->shared = instance.shared;
  launch->args = args;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      DescribeMatrix(product, product.blob, product.out, product.channels / 2, plan.outputs,
                     kStageChannels / 2, CU_TENSOR_MAP_SWIZZLE_64B, &launch->values));
  ESPARSE_CUDA_RETURN_IF_ERROR(DescribeMatrix(product, product.x, product.rows, product.channels,
                                              static_cast<uint32_t>(args.x_rows), kStageChannels,
                                              CU_TENSOR_MAP_SWIZZLE_128B, &launch->x));
  const uint8_t* indices =
      static_cast<const uint8_t*>(product.blob) + product.out * product.channels;
  return DescribeMatrix(product, indices, product.out / kGroupOutputs,
                        product.channels / kStageChannels * kIndexNumbers,
                        plan.outputs / kGroupOutputs, kIndexNumbers, CU_TENSOR_MAP_SWIZZLE_NONE,
                        &launch->indices);
}

// What a launch asks of the runtime.
struct Config {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Config(int teams, int team, int threads, int shared, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(team), 1, 1};
    config.gridDim = dim3(teams * team);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 1;
  }
  void StartEarly() {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
};

cudaError_t Launch(PrefillLaunch& launch, bool early, cudaStream_t stream) {
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared));
  Config config(launch.teams, launch.team, launch.threads, launch.shared, stream);
  if (early) config.StartEarly();
  void* parameters[] = {&launch.values, &launch.x, &launch.indices, &launch.args};
  return cudaLaunchKernelExC(&config.config, launch.function, parameters);
}

// How many clusters of `blocks` blocks of such tiles run at once, asked for once for each device;
// 0 where not one does. What a block takes of a multiprocessor is the same in both dtypes, and
// whether it shares x or not.
cudaError_t ClustersAtOnce(int device, int multiprocessors, int rows, int outputs, int blocks,
                           int* clusters) {
  static std::mutex mutex;
  static std::map<std::array<int, 4>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, rows, outputs, blocks});
  if (found != known.end()) {
    *clusters = found->second;
    return cudaSuccess;
  }
  const Instance& instance = FindInstance(Dtype::kFloat16, rows, outputs, 1);
  const Config full(multiprocessors / blocks, blocks, PrefillThreads(rows, outputs),
                    instance.shared, nullptr);
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      instance.function, cudaFuncAttributeMaxDynamicSharedMemorySize, instance.shared));
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaOccupancyMaxActiveClusters(clusters, instance.function, &full.config));
  known[{device, rows, outputs, blocks}] = *clusters;
  return cudaSuccess;
}

}  // namespace

cudaError_t PreparePrefill(const Product& product, const PrefillPlan& given, bool prefetch,
                           PrefillLaunches* launches) {
  int device, multiprocessors;
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  cudaError_t asked = cudaSuccess;
  const PrefillRoom room = {multiprocessors, [&](int rows, int outputs, int blocks) {
                              int clusters = 0;
                              const cudaError_t status = ClustersAtOnce(
                                  device, multiprocessors, rows, outputs, blocks, &clusters);
                              if (status != cudaSuccess) asked = status;
                              return clusters;
                            }};
  if (!IsPlan(given)) return cudaErrorInvalidConfiguration;
  const PrefillPlan plan = CompletePlan(product, given, room);
  const int at_once = TeamsAtOnce(plan, room);
  ESPARSE_CUDA_RETURN_IF_ERROR(asked);
  if (at_once < 1) return cudaErrorInvalidConfiguration;
  PrefillCut cut = CutPrefill(product, plan, at_once);
  cut.args.prefetch = prefetch;
  launches->count = cut.tail_teams > 0 ? 2 : 1;
  ESPARSE_CUDA_RETURN_IF_ERROR(PrepareTiles(product, plan, cut.args, cut.teams,
                                            /*shares_x=*/plan.cluster > 1, &launches->all[0]));
  if (launches->count == 1) return cudaSuccess;
  return PrepareTiles(product, plan, cut.tail, cut.tail_teams, /*shares_x=*/false,
                      &launches->all[1]);
}

cudaError_t LaunchPrefill(const Product& product, const PrefillPlan& plan, cudaStream_t stream) {
  PrefillLaunches launches;
  ESPARSE_CUDA_RETURN_IF_ERROR(PreparePrefill(product, plan, /*prefetch=*/false, &launches));
  ESPARSE_CUDA_RETURN_IF_ERROR(Launch(launches.all[0], /*early=*/false, stream));
  return launches.count == 1 ? cudaSuccess : Launch(launches.all[1], /*early=*/true, stream);
}

}  // namespace esparse::cuda
