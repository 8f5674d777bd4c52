#include <cstdint>

#include "cuda/decode.h"
#include "cuda/decode_args.h"
#include "cuda/return_if_error.h"

namespace esparse::cuda {
namespace {

struct Device {
  Multiprocessors multiprocessors;
  int major;

  static cudaError_t Current(Device* device) {
    int ordinal;
    ESPARSE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&ordinal));
    const auto get = [&](int* value, cudaDeviceAttr attribute) {
      return cudaDeviceGetAttribute(value, attribute, ordinal);
    };
    Multiprocessors* all = &device->multiprocessors;
    ESPARSE_CUDA_RETURN_IF_ERROR(get(&all->count, cudaDevAttrMultiProcessorCount));
    ESPARSE_CUDA_RETURN_IF_ERROR(
        get(&all->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));
    ESPARSE_CUDA_RETURN_IF_ERROR(
        get(&all->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
    ESPARSE_CUDA_RETURN_IF_ERROR(
        get(&all->reserved_per_block, cudaDevAttrReservedSharedMemoryPerBlock));
    return get(&device->major, cudaDevAttrComputeCapabilityMajor);
  }
};

// to[m][c] = x[m][permutation[c]], for values of 16 bits.
__global__ void Gather(const uint16_t* x, const int32_t* permutation, uint16_t* to, int rows,
                       int channels) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const int from = permutation[c];
  // Never reads outside x: a channel whose index names no channel counts as zero.
  const bool inside = from >= 0 && from < channels;
#pragma unroll 4
  for (int m = 0; m < rows; ++m) {
    to[static_cast<size_t>(m) * channels + c] =
        inside ? x[static_cast<size_t>(m) * channels + from] : uint16_t{0};
  }
}

cudaError_t LaunchGather(const Product& product, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const int channels = static_cast<int>(product.channels);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((channels + kThreads - 1) / kThreads);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, Gather, static_cast<const uint16_t*>(product.x),
                            product.permutation, static_cast<uint16_t*>(product.scratch),
                            static_cast<int>(product.rows), channels);
}

cudaError_t PrepareOn(const Device& device, const Product& product, const Plan& given, Start start,
                      KernelLaunch* launch) {
  Cut cut;
  if (!FitCut(product, given, device.multiprocessors, &cut)) {
    return cudaErrorInvalidConfiguration;
  }
  cut.args.prefetch = start == Start::kPrefetch;
  const DecodeKernel kernel = product.dtype == Dtype::kFloat16
                                  ? FindFloat16(cut.columns, cut.tiles)
                                  : FindBfloat16(cut.columns, cut.tiles);
  launch->name = kernel.name;
  launch->function = reinterpret_cast<const void*>(kernel.function);
  launch->grid = cut.grid;
  launch->threads = cut.warps * 32;
  launch->shared = cut.shared;
  launch->blob = product.blob;
  launch->x = product.x;
  launch->residual = product.residual;
  launch->places = product.places;
  launch->y = product.y;
  launch->scattered = product.scattered;
  launch->args = cut.args;
  return cudaSuccess;
}

}  // namespace

cudaError_t CutOf(const Product& product, const Plan& plan, Cut* cut) {
  Device device;
  ESPARSE_CUDA_RETURN_IF_ERROR(Device::Current(&device));
  return FitCut(product, plan, device.multiprocessors, cut) ? cudaSuccess
                                                            : cudaErrorInvalidConfiguration;
}

cudaError_t Prepare(const Product& product, const Plan& plan, Start start, KernelLaunch* launch) {
  if (product.fusion & kPermute) return cudaErrorNotSupported;
  Device device;
  ESPARSE_CUDA_RETURN_IF_ERROR(Device::Current(&device));
  if (device.major < 9) start = Start::kAlone;
  return PrepareOn(device, product, plan, start, launch);
}

cudaError_t Launch(const Product& given, const Plan& plan, Start start, cudaStream_t stream) {
  Device device;
  ESPARSE_CUDA_RETURN_IF_ERROR(Device::Current(&device));
  Product product = given;
  if (product.fusion & kPermute) {
    // The gather waits for all earlier work and lets the product start at once.
    ESPARSE_CUDA_RETURN_IF_ERROR(LaunchGather(product, stream));
    start = Start::kPrefetch;
    product.x = product.scratch;
  }
  if (device.major < 9) start = Start::kAlone;
  KernelLaunch launch;
  ESPARSE_CUDA_RETURN_IF_ERROR(PrepareOn(device, product, plan, start, &launch));
  // Set at every launch: the attribute belongs to a device, and a record of devices that have it
  // would be a global. It costs a fraction of a microsecond, and nothing in a replayed graph.
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(launch.function,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    device.multiprocessors.shared_per_block));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.grid);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = start == Start::kAlone ? 0 : 1;
  void* parameters[] = {&launch.blob, &launch.x,         &launch.residual, &launch.places,
                        &launch.y,    &launch.scattered, &launch.args};
  return cudaLaunchKernelExC(&config, launch.function, parameters);
}

}  // namespace esparse::cuda
