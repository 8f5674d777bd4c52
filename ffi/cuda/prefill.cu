#include <array>
#include <cstdint>
#include <map>
#include <mutex>

#include "cuda/prefill.h"
#include "cuda/prefill_gpu.h"
#include "cuda/return_if_error.h"

namespace esparse::cuda {
namespace {

template <typename T, int kRows, int kStages, int kCluster>
__global__ void __launch_bounds__(kPrefillThreads, PrefillResident(kRows))
    PrefillKernel(const __grid_constant__ CUtensorMap values, const __grid_constant__ CUtensorMap x,
                  const __grid_constant__ CUtensorMap indices,
                  const __grid_constant__ CUtensorMap y, const PrefillArgs p) {
  extern __shared__ uint8_t shared[];
  PrefillGpu device(shared, &values, &x, &indices, &y);
  Prefill<T, kRows, kStages, kCluster>(device, p);
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

// A row-major matrix of 16-bit numbers [rows][columns], copied in boxes; what is outside is zero
// when it is read, and is not written.
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

// Of shared memory; the layout begins at a multiple of 1024.
template <int kRows, int kStages>
constexpr int kSharedBytes = PrefillLayout<kRows, kStages>::kBytes + 1024;

// A kernel's launch by clusters, without what is asked for beside.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Launch(int teams, int team, int shared, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(team), 1, 1};
    config.gridDim = dim3(teams * team);
    config.blockDim = dim3(kPrefillThreads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 1;
  }
};

// The tiles of `args` by so many teams; `early`: it may start before the kernel before has ended.
template <typename T, int kRows, int kStages, int kCluster>
cudaError_t LaunchTiles(const Product& product, const PrefillArgs& args, int teams, bool early,
                        cudaStream_t stream) {
  const int64_t steps = product.channels / kStageChannels;
  CUtensorMap values, x, indices, y;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      DescribeMatrix(product, product.blob, product.out, product.channels / 2, kBlockOutputs,
                     kStageChannels / 2, CU_TENSOR_MAP_SWIZZLE_64B, &values));
  ESPARSE_CUDA_RETURN_IF_ERROR(DescribeMatrix(product, product.x, product.rows, product.channels,
                                              static_cast<uint32_t>(args.x_rows), kStageChannels,
                                              CU_TENSOR_MAP_SWIZZLE_128B, &x));
  const uint8_t* all_indices =
      static_cast<const uint8_t*>(product.blob) + product.out * product.channels;
  constexpr int kIndexNumbers = PrefillLayout<kRows, kStages>::kIndexBytes / 2;
  ESPARSE_CUDA_RETURN_IF_ERROR(DescribeMatrix(product, all_indices, product.out / kGroupOutputs,
                                              steps * kIndexNumbers, kBlockOutputs / kGroupOutputs,
                                              kIndexNumbers, CU_TENSOR_MAP_SWIZZLE_NONE, &indices));
  ESPARSE_CUDA_RETURN_IF_ERROR(DescribeMatrix(product, product.y, product.rows, product.out,
                                              kStoreRows, kGroupOutputs, CU_TENSOR_MAP_SWIZZLE_128B,
                                              &y));
  const auto kernel = PrefillKernel<T, kRows, kStages, kCluster>;
  constexpr int kShared = kSharedBytes<kRows, kStages>;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  Launch launch(teams, kCluster * args.split, kShared, stream);
  if (early) {
    cudaLaunchAttribute& attribute = launch.attributes[launch.config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&launch.config, kernel, values, x, indices, y, args);
}

// How many clusters of `blocks` blocks run at once; 0 where not one does. What a block takes of a
// multiprocessor is the same in both dtypes, and whether it shares x or not.
template <int kRows, int kStages>
cudaError_t AskClusters(int blocks, int multiprocessors, int* clusters) {
  const auto kernel = PrefillKernel<__half, kRows, kStages, 1>;
  constexpr int kShared = kSharedBytes<kRows, kStages>;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const Launch full(multiprocessors / blocks, blocks, kShared, nullptr);
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &full.config);
}

// The same for blocks of so many rows, asked for once for each device.
cudaError_t ClustersAtOnce(int device, int multiprocessors, int rows, int blocks, int* clusters) {
  static std::mutex mutex;
  static std::map<std::array<int, 3>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, rows, blocks});
  if (found != known.end()) {
    *clusters = found->second;
    return cudaSuccess;
  }
  const auto ask = rows == 64    ? AskClusters<64, 5>
                   : rows == 128 ? AskClusters<128, 8>
                                 : AskClusters<256, 5>;
  ESPARSE_CUDA_RETURN_IF_ERROR(ask(blocks, multiprocessors, clusters));
  known[{device, rows, blocks}] = *clusters;
  return cudaSuccess;
}

template <typename T, int kRows, int kStages, int kCluster>
cudaError_t LaunchCut(const Product& product, const PrefillCut& cut, cudaStream_t stream) {
  ESPARSE_CUDA_RETURN_IF_ERROR((LaunchTiles<T, kRows, kStages, kCluster>(
      product, cut.args, cut.teams, /*early=*/false, stream)));
  if (cut.tail_teams == 0) return cudaSuccess;
  return LaunchTiles<T, kRows, kStages, 1>(product, cut.tail, cut.tail_teams, /*early=*/true,
                                           stream);
}

template <typename T>
cudaError_t LaunchFor(const Product& product, const PrefillPlan& plan, const PrefillCut& cut,
                      cudaStream_t stream) {
  if (plan.cluster == 2) return LaunchCut<T, 256, 5, 2>(product, cut, stream);
  if (plan.rows == 64) return LaunchCut<T, 64, 5, 1>(product, cut, stream);
  if (plan.rows == 128) return LaunchCut<T, 128, 8, 1>(product, cut, stream);
  return LaunchCut<T, 256, 5, 1>(product, cut, stream);
}

}  // namespace

cudaError_t LaunchPrefill(const Product& product, const PrefillPlan& given, cudaStream_t stream) {
  int device, multiprocessors;
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  cudaError_t asked = cudaSuccess;
  const PrefillRoom room = {multiprocessors, [&](int rows, int blocks) {
                              int clusters = 0;
                              const cudaError_t status =
                                  ClustersAtOnce(device, multiprocessors, rows, blocks, &clusters);
                              if (status != cudaSuccess) asked = status;
                              return clusters;
                            }};
  if (!IsPlan(given)) return cudaErrorInvalidConfiguration;
  const PrefillPlan plan = CompletePlan(product, given, room);
  const int at_once = TeamsAtOnce(plan, room);
  ESPARSE_CUDA_RETURN_IF_ERROR(asked);
  if (at_once < 1) return cudaErrorInvalidConfiguration;
  const PrefillCut cut = CutPrefill(product, plan, at_once);
  return product.dtype == Dtype::kFloat16 ? LaunchFor<__half>(product, plan, cut, stream)
                                          : LaunchFor<__nv_bfloat16>(product, plan, cut, stream);
}

}  // namespace esparse::cuda
