#include <algorithm>
#include <cstdint>
#include <cstring>

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

// A plan and what it is for: at most so many rows of x and tiles for each multiprocessor, at least
// so many channels.
struct Rule {
  int rows, tiles, channels;
  Plan plan;  // tiles, warps, blocks, interleave, depth (as many as fit), resident
};
constexpr int kAny = 1 << 30;
constexpr int kLongRow = 7168;

// The first rule that fits is taken. Read off a sweep on an H200 over 16 shapes from 4096x4096 to
// 28672x4096 and 8192x28672 (benchmarks/decode_plans.py; benchmarks/results/decode_plans_h200.csv:
// fp16, CUDA graphs over 300 MB of weights, W fetched early), where it is within 1 % of the best
// plan in the geometric mean, and within 7 % everywhere. One rule is against the sweep: of 16
// rows and 5 or 6 tiles, two blocks are better by 1 us of 18 inside a decode step of LLaMA-7B, and
// worse by 0.3 us alone.
constexpr Rule kRules[] = {
    {4, 2, kLongRow, {2, 16, 1, 2, 0, 2}}, {4, 2, 0, {2, 8, 2, 2, 0, 2}},
    {8, 2, kLongRow, {2, 16, 1, 2, 0, 2}}, {8, 2, 0, {1, 8, 2, 2, 0, 1}},
    {8, 3, kLongRow, {3, 8, 1, 2, 0, 2}},  {8, 3, 0, {2, 8, 2, 2, 0, 2}},
    {4, 4, 0, {2, 4, 2, 1, 0, 2}},         {8, 4, 0, {4, 8, 1, 1, 0, 2}},
    {4, 8, kLongRow, {1, 16, 1, 1, 0, 1}}, {8, 8, kLongRow, {4, 8, 1, 2, 0, 2}},
    {8, 6, 0, {3, 4, 2, 2, 0, 2}},         {8, 8, 0, {4, 8, 2, 2, 0, 2}},
    {8, kAny, 0, {2, 8, 1, 1, 0, 1}},      {16, 2, 0, {2, 8, 1, 2, 0, 2}},
    {16, 3, 0, {3, 8, 1, 2, 0, 2}},        {16, 4, 0, {2, 4, 2, 1, 0, 2}},
    {16, 8, kLongRow, {2, 4, 2, 1, 0, 2}}, {16, 6, 0, {3, 8, 2, 2, 0, 2}},
    {16, 8, 0, {2, 4, 2, 2, 0, 1}},        {16, 12, 0, {3, 8, 2, 2, 0, 2}},
    {16, kAny, 0, {3, 8, 1, 2, 0, 2}},
};

// Fills the zeros of a plan. Where shared memory does not suffice, FitCut shrinks it.
Plan Choose(const Product& product, const Plan& given, const Device& device) {
  const int all_tiles = static_cast<int>(product.out) / kTileRows;
  const int tiles = CeilDiv(all_tiles, device.multiprocessors);
  Plan plan;
  for (const Rule& rule : kRules) {
    if (product.rows <= rule.rows && tiles <= rule.tiles && product.channels >= rule.channels) {
      plan = rule.plan;
      break;
    }
  }
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

// The cut of a product by the plan, or by one with fewer warps, tiles and resident x where shared
// memory does not suffice: on devices that have less of it, or with many rows.
bool FitCut(const Product& product, Plan plan, const Device& device, Cut* cut) {
  while (!MakeCut(product, plan, device, cut)) {
    if (plan.resident == 1) {
      plan.resident = 2;
    } else if (plan.warps > kMinWarps) {
      plan.warps /= 2;
    } else if (plan.tiles > 1) {
      --plan.tiles;
    } else {
      return false;
    }
  }
  return true;
}

cudaError_t PrepareOn(const Device& device, const Product& product, const Plan& given, Start start,
                      KernelLaunch* launch) {
  Cut cut;
  if (!FitCut(product, Choose(product, given, device), device, &cut)) {
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
  static_assert(sizeof(KernelArgs) == kKernelArgsBytes);
  std::memcpy(launch->args.data(), &cut.args, sizeof(cut.args));
  return cudaSuccess;
}

}  // namespace

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
  ESPARSE_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block));
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
  void* parameters[] = {&launch.blob, &launch.x,         &launch.residual,  &launch.places,
                        &launch.y,    &launch.scattered, launch.args.data()};
  return cudaLaunchKernelExC(&config, launch.function, parameters);
}

}  // namespace esparse::cuda
