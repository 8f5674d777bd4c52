#include "cuda/decode_plan.h"

#include <algorithm>

namespace esparse::cuda {
namespace {

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// Fills in everything of `cut` that follows from the plan; false where it does not fit.
bool MakeCut(const Product& product, const Plan& plan, const Multiprocessors& device, Cut* cut) {
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
  cut->blocks = plan.blocks;
  const int all_tiles = args.out / kTileRows;
  cut->grid = std::min(device.count * plan.blocks, all_tiles);
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

// The first rule that fits is taken. Read off a sweep on an H200 over 20 shapes from 4096x4096 to
// 57344x8192 and 8192x28672 (benchmarks/decode_plans.py; benchmarks/results/decode_plans_h200.csv:
// fp16, CUDA graphs over 300 MB of weights, W fetched early), where it is within 0.5 % of the best
// plan in the geometric mean, and within 4 % everywhere. One rule is against the sweep: of 16
// rows and 5 or 6 tiles of fewer channels than kLongRow, two blocks are better by 1 us of 18 inside
// a decode step of LLaMA-7B, and worse by 0.3 us alone.
constexpr Rule kRules[] = {
    {4, 2, kLongRow, {2, 16, 1, 2, 0, 2}},
    {4, 2, 0, {2, 8, 2, 2, 0, 2}},
    {8, 2, kLongRow, {2, 16, 1, 2, 0, 2}},
    {8, 2, 0, {1, 8, 2, 2, 0, 1}},
    {8, 3, kLongRow, {3, 8, 1, 2, 0, 2}},
    {8, 3, 0, {2, 8, 2, 2, 0, 2}},
    {4, 4, 0, {2, 4, 2, 1, 0, 2}},
    {8, 4, 0, {4, 8, 1, 1, 0, 2}},
    {4, 8, kLongRow, {1, 16, 1, 1, 0, 1}},
    {8, 6, kLongRow, {3, 8, 1, 2, 0, 2}},
    {8, 8, kLongRow, {4, 8, 1, 2, 0, 2}},
    {8, 6, 0, {3, 4, 2, 2, 0, 2}},
    {8, 8, 0, {4, 8, 2, 2, 0, 2}},
    {4, kAny, kLongRow, {1, 8, 1, 1, 0, 1}},
    {8, kAny, kLongRow, {2, 4, 2, 1, 0, 2}},
    {8, kAny, 0, {2, 8, 1, 1, 0, 1}},
    {16, 2, 0, {2, 8, 1, 2, 0, 2}},
    {16, 3, 0, {3, 8, 1, 2, 0, 2}},
    {16, 4, 0, {2, 4, 2, 1, 0, 2}},
    {16, 6, kLongRow, {3, 8, 1, 1, 0, 2}},
    {16, kAny, kLongRow, {2, 4, 2, 1, 0, 2}},
    {16, 6, 0, {3, 8, 2, 2, 0, 2}},
    {16, 8, 0, {2, 4, 2, 2, 0, 1}},
    {16, 12, 0, {3, 8, 2, 2, 0, 2}},
    {16, kAny, 0, {3, 8, 1, 2, 0, 2}},
};

// The plan with its zeros filled in.
Plan Choose(const Product& product, const Plan& given, const Multiprocessors& device) {
  const int all_tiles = static_cast<int>(product.out) / kTileRows;
  const int tiles = CeilDiv(all_tiles, device.count);
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
  // What was not asked for gives way: more warps than that do not run at once.
  if (given.blocks == 0 && plan.warps * plan.blocks > kMaxWarps) plan.blocks = 1;
  if (given.warps == 0) plan.warps = std::min(plan.warps, kMaxWarps / plan.blocks);
  return plan;
}

}  // namespace

int Multiprocessors::Capacity(int blocks) const {
  return std::min(shared_per_block, shared_per_multiprocessor / blocks - reserved_per_block);
}

bool FitCut(const Product& product, const Plan& given, const Multiprocessors& device, Cut* cut) {
  Plan plan = Choose(product, given, device);
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

}  // namespace esparse::cuda
