#include <algorithm>
#include <cstdint>

#include "cuda/prefill.h"
#include "cuda/prefill_gpu.h"
#include "cuda/return_if_error.h"

namespace esparse::cuda {
namespace {

// Blocks that a multiprocessor has room for.
template <int kRows>
constexpr int kResident = kRows == 64 ? 2 : 1;

template <typename T, int kRows, int kStages, int kCluster>
__global__ void __launch_bounds__(kPrefillThreads, kResident<kRows>)
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

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

template <typename T, int kRows, int kStages, int kCluster>
cudaError_t LaunchAs(const Product& product, const PrefillPlan& plan, int multiprocessors,
                     cudaStream_t stream) {
  // The layout begins at a multiple of 1024.
  constexpr int kShared = PrefillLayout<kRows, kStages>::kBytes + 1024;
  // Rows outside of x take a copy as long as others, so it asks for none if it can.
  const int64_t x_rows = kCluster > 1 ? kRows / kCluster : std::min<int64_t>(kRows, product.rows);
  const int64_t steps = product.channels / kStageChannels;
  CUtensorMap values, x, indices, y;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      DescribeMatrix(product, product.blob, product.out, product.channels / 2, kBlockOutputs,
                     kStageChannels / 2, CU_TENSOR_MAP_SWIZZLE_64B, &values));
  ESPARSE_CUDA_RETURN_IF_ERROR(DescribeMatrix(product, product.x, product.rows, product.channels,
                                              static_cast<uint32_t>(x_rows), kStageChannels,
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
  PrefillArgs args = {};
  args.rows = static_cast<int>(product.rows);
  args.out = static_cast<int>(product.out);
  args.channels = static_cast<int>(product.channels);
  args.out_tiles = CeilDiv(product.out, kCluster * kBlockOutputs);
  args.row_tiles = CeilDiv(product.rows, kRows);
  args.group = plan.group;
  args.x_rows = static_cast<int>(x_rows);
  args.split = plan.split;
  args.y = static_cast<uint16_t*>(product.y);

  const auto kernel = PrefillKernel<T, kRows, kStages, kCluster>;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const int team = kCluster * plan.split;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(team), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(multiprocessors / team * team);
  config.blockDim = dim3(kPrefillThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = args.out_tiles * args.row_tiles;
  if (plan.split == 1) {  // as many as run at once, since each stays for all its tiles
    int most = multiprocessors * kResident<kRows>;
    if (kCluster > 1) {
      ESPARSE_CUDA_RETURN_IF_ERROR(cudaOccupancyMaxActiveClusters(&most, kernel, &config));
    }
    clusters = std::min(clusters, most);
  }
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  config.gridDim = dim3(clusters * team);
  return cudaLaunchKernelEx(&config, kernel, values, x, indices, y, args);
}

template <typename T>
cudaError_t LaunchFor(const Product& product, const PrefillPlan& plan, int multiprocessors,
                      cudaStream_t stream) {
  if (plan.rows == 64 && plan.cluster == 1) {
    return LaunchAs<T, 64, 5, 1>(product, plan, multiprocessors, stream);
  }
  if (plan.rows == 128 && plan.cluster == 1) {
    return LaunchAs<T, 128, 8, 1>(product, plan, multiprocessors, stream);
  }
  if (plan.rows == 256 && plan.cluster == 1) {
    return LaunchAs<T, 256, 5, 1>(product, plan, multiprocessors, stream);
  }
  if (plan.rows == 256 && plan.cluster == 2) {
    return LaunchAs<T, 256, 5, 2>(product, plan, multiprocessors, stream);
  }
  return cudaErrorInvalidConfiguration;
}

// Into how many parts the channels are split: as many as all run at once. More than four, or parts
// of less than eight stages, gained nothing (measured on an H200).
int BestSplit(int tiles, int steps, int multiprocessors, int resident) {
  for (int split = std::min(4, steps / 8); split > 1; --split) {
    // Groups of multiprocessors hold whole clusters, so that of larger ones some find no place.
    const int blocks = multiprocessors * resident, clusters = blocks / split;
    if (tiles <= (split > 2 ? clusters * 15 / 16 : clusters)) return split;
  }
  return 1;
}

}  // namespace

cudaError_t LaunchPrefill(const Product& product, const PrefillPlan& given, cudaStream_t stream) {
  int device, multiprocessors;
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int steps = static_cast<int>(product.channels / kStageChannels);
  const auto tiles = [&](int rows) {
    return CeilDiv(product.out, kBlockOutputs) * CeilDiv(product.rows, rows);
  };
  PrefillPlan plan = given;
  if (plan.rows == 0) {
    plan.rows = plan.cluster == 2                   ? 256
                : product.rows <= 64                ? 64
                : product.rows <= 128               ? 128
                : 2 * tiles(128) <= multiprocessors ? 128
                                                    : 256;
  }
  if (plan.split == 0) {
    plan.split = plan.cluster == 2 ? 1
                                   : BestSplit(tiles(plan.rows), steps, multiprocessors,
                                               plan.rows == 64 ? kResident<64> : 1);
  }
  plan.split = std::min(plan.split, steps);
  if (plan.cluster == 0) {
    const bool many = product.rows >= 1024 && product.out >= 2 * kBlockOutputs;
    plan.cluster = plan.rows == 256 && plan.split == 1 && many ? 2 : 1;
  }
  if (plan.group == 0) plan.group = 8;
  if (plan.cluster > 1 && plan.split > 1) return cudaErrorInvalidConfiguration;
  return product.dtype == Dtype::kFloat16
             ? LaunchFor<__half>(product, plan, multiprocessors, stream)
             : LaunchFor<__nv_bfloat16>(product, plan, multiprocessors, stream);
}

}  // namespace esparse::cuda
