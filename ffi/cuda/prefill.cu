#include <algorithm>
#include <cstdint>

#include "cuda/prefill.h"
#include "cuda/prefill_gpu.h"
#include "cuda/return_if_error.h"

namespace esparse::cuda {
namespace {

template <typename T, int kRows, int kStages, int kCluster>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    PrefillKernel(const __grid_constant__ CUtensorMap values, const __grid_constant__ CUtensorMap x,
                  const __grid_constant__ CUtensorMap y, const uint8_t* indices,
                  const PrefillArgs p) {
  extern __shared__ uint8_t shared[];
  PrefillGpu device(shared, &values, &x, &y);
  Prefill<T, kRows, kStages, kCluster>(device, indices, p);
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

template <typename T, int kRows, int kStages, int kCluster>
cudaError_t LaunchAs(const Product& product, int group, cudaStream_t stream) {
  // The layout begins at a multiple of 1024.
  constexpr int kShared = PrefillLayout<kRows, kStages>::kBytes + 1024;
  CUtensorMap values, x, y;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      DescribeMatrix(product, product.blob, product.out, product.channels / 2, kBlockOutputs,
                     kStageChannels / 2, CU_TENSOR_MAP_SWIZZLE_64B, &values));
  ESPARSE_CUDA_RETURN_IF_ERROR(DescribeMatrix(product, product.x, product.rows, product.channels,
                                              kRows / kCluster, kStageChannels,
                                              CU_TENSOR_MAP_SWIZZLE_128B, &x));
  ESPARSE_CUDA_RETURN_IF_ERROR(DescribeMatrix(product, product.y, product.rows, product.out,
                                              kStoreRows, kGroupOutputs, CU_TENSOR_MAP_SWIZZLE_128B,
                                              &y));
  const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  PrefillArgs args = {};
  args.out = static_cast<int>(product.out);
  args.channels = static_cast<int>(product.channels);
  args.out_tiles = ceil_div(product.out, kCluster * kBlockOutputs);
  args.row_tiles = ceil_div(product.rows, kRows);
  args.group = group;

  const auto kernel = PrefillKernel<T, kRows, kStages, kCluster>;
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  int device, multiprocessors;
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  ESPARSE_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(multiprocessors / kCluster * kCluster);
  config.blockDim = dim3(kPrefillThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // As many as run at once, since each stays for all its tiles.
  int clusters = multiprocessors;
  if (kCluster > 1) {
    ESPARSE_CUDA_RETURN_IF_ERROR(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  }
  clusters = std::min(clusters, args.out_tiles * args.row_tiles);
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  config.gridDim = dim3(clusters * kCluster);
  const uint8_t* indices =
      static_cast<const uint8_t*>(product.blob) + product.out * product.channels;
  return cudaLaunchKernelEx(&config, kernel, values, x, y, indices, args);
}

template <typename T>
cudaError_t LaunchFor(const Product& product, const PrefillPlan& plan, cudaStream_t stream) {
  if (plan.rows == 256) {
    switch (plan.cluster) {
      case 1:
        return LaunchAs<T, 256, 5, 1>(product, plan.group, stream);
      case 2:
        return LaunchAs<T, 256, 5, 2>(product, plan.group, stream);
      case 4:
        return LaunchAs<T, 256, 5, 4>(product, plan.group, stream);
    }
  } else if (plan.rows == 128) {
    switch (plan.cluster) {
      case 1:
        return LaunchAs<T, 128, 8, 1>(product, plan.group, stream);
      case 2:
        return LaunchAs<T, 128, 8, 2>(product, plan.group, stream);
      case 4:
        return LaunchAs<T, 128, 8, 4>(product, plan.group, stream);
    }
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace

cudaError_t LaunchPrefill(const Product& product, const PrefillPlan& given, cudaStream_t stream) {
  PrefillPlan plan = given;
  if (plan.rows == 0) plan.rows = product.rows <= 128 ? 128 : 256;
  if (plan.cluster == 0) plan.cluster = product.out >= 512 ? 4 : product.out >= 256 ? 2 : 1;
  if (plan.group == 0) plan.group = 8;
  return product.dtype == Dtype::kFloat16 ? LaunchFor<__half>(product, plan, stream)
                                          : LaunchFor<__nv_bfloat16>(product, plan, stream);
}

}  // namespace esparse::cuda
