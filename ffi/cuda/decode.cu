#include <algorithm>
#include <cstdint>

#include "cuda/decode.h"
#include "cuda/decode_args.h"

namespace esparse::cuda {
namespace {

#define ESPARSE_CUDA_RETURN_IF_ERROR(call)                    \
  do {                                                        \
    const cudaError_t esparse_status = (call);                \
    if (esparse_status != cudaSuccess) return esparse_status; \
  } while (false)

struct Device {
  int multiprocessors, shared_per_block, shared_per_multiprocessor, reserved_per_block, major;

  static cudaError_t Current(Device* device) {
    int ordinal;
    ESPARSE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&ordinal));
    const auto get = [&](int* value, cudaDeviceAttr attribute) {
      return cudaDeviceGetAttribute(value, attribute, ordinal);
    };
    ESPARSE_CUDA_RETURN_IF_ERROR(get(&device->multiprocessors, cudaDevAttrMultiProcessorCount));
    ESPARSE_CUDA_RETURN_IF_ERROR(
        get(&device->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));
    ESPARSE_CUDA_RETURN_IF_ERROR(
        get(&device->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
    ESPARSE_CUDA_RETURN_IF_ERROR(
        get(&device->reserved_per_block, cudaDevAttrReservedSharedMemoryPerBlock));
    return get(&device->major, cudaDevAttrComputeCapabilityMajor);
  }

  // Shared memory of a block when `blocks` of them share a multiprocessor.
  int Capacity(int blocks) const {
    return std::min(shared_per_block, shared_per_multiprocessor / blocks - reserved_per_block);
  }
};

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// The kernel's cut of one product, and the shared memory it takes.
struct Cut {
  KernelArgs args;
  int columns, tiles, warps, grid, shared;
};

// Fills in everything of `cut` that follows from the plan; false where it does not fit.
bool MakeCut(const Product& product, const Plan& plan, const Device& device, Cut* cut) {
  KernelArgs& args = cut->args;
  args.blob = static_cast<const uint8_t*>(product.blob);
  args.x = product.fusion & kPermute ? product.scratch : product.x;
  args.residual = product.residual;
  args.y = product.y;
  args.out = static_cast<int>(product.out);
  args.channels = static_cast<int>(product.channels);
  args.rows = static_cast<int>(product.rows);
  args.fusion = product.fusion;
  args.epsilon = product.epsilon;
  args.interleave = plan.interleave == 1;
  args.resident = plan.resident == 1;

  cut->columns = args.rows <= 8 ? 1 : 2;
  cut->tiles = plan.tiles;
  cut->warps = plan.warps;
  const int all_tiles = args.out / kTileRows;
  cut->grid = std::min(device.multiprocessors * plan.blocks, all_tiles);
  args.block_tiles = all_tiles / cut->grid;
  args.block_tiles_extra = all_tiles % cut->grid;
  args.units = CeilDiv(args.channels, kUnitChannels);
  args.warp_units = args.units / plan.warps;
  args.warp_units_extra = args.units % plan.warps;

  const int most_units = CeilDiv(args.units, plan.warps);
  const int passes = CeilDiv(CeilDiv(all_tiles, cut->grid), plan.tiles);
  const int x_piece = args.rows * kUnitRowBytes;
  const int slot = plan.tiles * kUnitBytes + (args.resident ? 0 : x_piece);
  const int x_bytes = args.resident ? most_units * x_piece : 0;
  const int sums = plan.warps * plan.tiles * cut->columns * 32 * 16;
  const int squares = plan.warps * cut->columns * 8 * 4;
  const int capacity = device.Capacity(plan.blocks);
  for (const bool two_sums : {true, false}) {
    // Two buffers for the sums save a barrier after each pass; not at the price of a short ring.
    args.sums_toggle = two_sums && passes > 1 ? sums : 0;
    const int fixed = sums + args.sums_toggle + squares + plan.warps * x_bytes;
    const int fit = (capacity - fixed) / (plan.warps * slot);
    int depth = std::min({fit, kMaxDepth, most_units * passes});
    if (plan.depth > 0) depth = std::min(depth, plan.depth);
    if (two_sums && passes > 1 && depth < 3) continue;
    if (depth < 1) return false;
    args.depth = depth;
    cut->shared = fixed + plan.warps * depth * slot;
    return true;
  }
  return false;
}

// Fills the zeros of a plan. The rule was read off a sweep on an H200 over 16 shapes from 4096x4096
// to 28672x4096 and 8192x28672 (benchmarks/results/decode_plans_h200.csv: fp16, CUDA graphs of at
// least 24 launches over 700 MB of weights), where it is within 1 % of the best plan (geometric
// mean; 3.3 % at most). Elsewhere the plan shrinks until it fits.
Plan Choose(const Product& product, const Plan& given, const Device& device) {
  const int rows = static_cast<int>(product.rows);
  const int channels = static_cast<int>(product.channels);
  const int all_tiles = static_cast<int>(product.out) / kTileRows;
  const int tiles_of_one = CeilDiv(all_tiles, device.multiprocessors);  // with one block each
  const int tiles_of_two = CeilDiv(all_tiles, 2 * device.multiprocessors);
  constexpr int kLongRow = 7168;  // channels from which on a row is long

  // Two blocks a multiprocessor, so that one computes while the other reduces, and as few passes
  // over x as there can be.
  Plan plan;
  plan.tiles = CeilDiv(tiles_of_two, CeilDiv(tiles_of_two, kMaxTiles));
  plan.warps = 8;
  plan.blocks = 2;
  plan.resident = 2;
  if (rows <= 8) {
    if (tiles_of_one <= 2 && channels >= kLongRow) {
      plan.tiles = tiles_of_one;
      plan.warps = 16;
      plan.blocks = 1;
    } else if (rows > 4 && tiles_of_two == kMaxTiles) {
      plan.warps = 4;
    }
  } else if (tiles_of_one <= 3) {  // more rows leave less room for W: better one block's than two's
    plan.tiles = tiles_of_one;
    plan.blocks = 1;
  } else if (plan.tiles == kMaxTiles || tiles_of_two == 2) {
    if (tiles_of_one > 10) {
      plan.tiles = 3;
      plan.blocks = 1;
    } else {
      plan.tiles = 2;
      plan.warps = 4;
      plan.resident = rows * channels * 2 <= 60 << 10 ? 1 : 2;
    }
  }
  const bool one_pass = CeilDiv(all_tiles, plan.blocks * device.multiprocessors) <= plan.tiles;
  plan.interleave = channels < kLongRow && one_pass ? 2 : 1;

  const auto prefer = [](int32_t wanted, int32_t* field) {
    if (wanted != 0) *field = wanted;
  };
  prefer(given.tiles, &plan.tiles);
  prefer(given.warps, &plan.warps);
  prefer(given.blocks, &plan.blocks);
  prefer(given.interleave, &plan.interleave);
  prefer(given.depth, &plan.depth);
  prefer(given.resident, &plan.resident);
  return plan;
}

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
  config.gridDim = dim3(CeilDiv(channels, kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, Gather, static_cast<const uint16_t*>(product.x),
                            product.permutation, static_cast<uint16_t*>(product.scratch),
                            static_cast<int>(product.rows), channels);
}

}  // namespace

cudaError_t Launch(const Product& product, const Plan& given, bool overlap, cudaStream_t stream) {
  Device device;
  ESPARSE_CUDA_RETURN_IF_ERROR(Device::Current(&device));
  Plan plan = Choose(product, given, device);
  Cut cut;
  bool fits = MakeCut(product, plan, device, &cut);
  // Devices with less shared memory, or many rows: fewer warps, then fewer tiles, then x in
  // passing.
  while (!fits) {
    if (plan.resident == 1) {
      plan.resident = 2;
    } else if (plan.warps > kMinWarps) {
      plan.warps /= 2;
    } else if (plan.tiles > 1) {
      --plan.tiles;
    } else {
      return cudaErrorInvalidConfiguration;
    }
    fits = MakeCut(product, plan, device, &cut);
  }

  if (product.fusion & kPermute) {
    ESPARSE_CUDA_RETURN_IF_ERROR(LaunchGather(product, stream));
    overlap = true;
  }
  overlap = overlap && device.major >= 9;
  cut.args.overlap = overlap;

  const DecodeFunction function = product.dtype == Dtype::kFloat16
                                      ? FindFloat16(cut.columns, cut.tiles)
                                      : FindBfloat16(cut.columns, cut.tiles);
  if (function == nullptr) return cudaErrorInvalidConfiguration;
  // Set at every launch: the attribute belongs to a device, and a record of devices that have it
  // would be a global. It costs a fraction of a microsecond, and nothing in a replayed graph.
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(reinterpret_cast<const void*>(function),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    device.shared_per_block));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cut.grid);
  config.blockDim = dim3(cut.warps * 32);
  config.dynamicSmemBytes = cut.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, function, cut.args);
}

}  // namespace esparse::cuda
