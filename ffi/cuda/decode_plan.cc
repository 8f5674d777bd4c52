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
  cut->teams = plan.teams;
  cut->split = plan.split;
  cut->form = plan.teams > 1    ? kShared
              : plan.split == 1 ? kPlain
              : plan.split == 2 ? kSplit2
                                : kSplit4;
  cut->warps = plan.warps;
  cut->blocks = plan.blocks;
  const int all_tiles = args.out / kTileRows;
  int clusters = std::min(device.count * plan.blocks / plan.split, all_tiles);
  if (plan.split > 1) clusters = std::min(clusters, device.clusters);
  cut->grid = clusters * plan.split;
  args.cluster_tiles = all_tiles / clusters;
  args.cluster_tiles_extra = all_tiles % clusters;
  const int groups = plan.warps / plan.teams;
  args.group_bits = 0;
  while (1 << args.group_bits < groups) ++args.group_bits;
  args.units = CeilDiv(args.channels, kUnitChannels);
  args.group_units = args.units / (plan.split * groups);
  args.group_units_extra = args.units % (plan.split * groups);

  const int most_units = CeilDiv(args.units, plan.split * groups);
  const int passes = CeilDiv(CeilDiv(all_tiles, clusters), plan.tiles * plan.teams);
  const int x_piece = args.rows * kUnitRowBytes;
  // Of the ring, for each piece that is under way; one team has x in it, teams that share x have a
  // ring of x of their own with one place more.
  const bool passes_by = !args.resident, shares = plan.teams > 1;
  const int depth_bytes = plan.warps * plan.tiles * kUnitBytes + (passes_by ? groups * x_piece : 0);
  const int x_bytes = groups * x_piece * (passes_by ? shares : most_units);
  const int sums = plan.warps * plan.tiles * cut->columns * 32 * 16;
  const int squares = groups * cut->columns * 8 * 4;
  const int capacity = device.Capacity(plan.blocks);
  for (const bool two_sums : {true, false}) {
    // Two buffers for the sums save a barrier after each pass; not at the price of a short ring.
    args.sums_toggle = two_sums && passes > 1 ? sums : 0;
    const int fixed = sums + args.sums_toggle + squares + x_bytes;
    const int fit = (capacity - fixed) / depth_bytes;
    int depth = std::min({fit, kMaxDepth, most_units * passes});
    if (plan.depth > 0) depth = std::min(depth, plan.depth);
    if (two_sums && passes > 1 && depth < 3) continue;
    if (depth < 1) return false;
    args.depth = depth;
    cut->shared = fixed + depth * depth_bytes;
    return true;
  }
  return false;
}

// A plan and what it is for: at most so many rows of x and tiles for each multiprocessor, at least
// so many channels.
struct Rule {
  int rows, tiles, channels;
  Plan plan;  // tiles, warps, blocks, interleave, depth (as many as fit), resident; one team, no
              // split
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
  plan.teams = std::max(given.teams, 1);
  plan.split = device.clusters > 0 ? std::max(given.split, 1) : 1;
  if (given.warps == 0) plan.warps = std::max(plan.warps, kMinGroups * plan.teams);
  // What was not asked for gives way: more warps than that do not run at once.
  if (given.blocks == 0 && plan.warps * plan.blocks > kMaxWarps) plan.blocks = 1;
  if (given.warps == 0) plan.warps = std::min(plan.warps, kMaxWarps / plan.blocks);
  plan.teams = std::min(plan.teams, plan.warps / kMinGroups);
  return plan;
}

}  // namespace

int Multiprocessors::Capacity(int blocks) const {
  return std::min(shared_per_block, shared_per_multiprocessor / blocks - reserved_per_block);
}

bool FitCut(const Product& product, const Plan& given, const Multiprocessors& device, Cut* cut) {
  Plan plan = Choose(product, given, device);
  while (plan.split > device.count * plan.blocks) plan.split /= 2;
  while (!MakeCut(product, plan, device, cut)) {
    if (plan.resident == 1) {
      plan.resident = 2;
    } else if (plan.warps > kMinGroups) {
      plan.warps /= 2;
      plan.teams = std::min(plan.teams, plan.warps / kMinGroups);
    } else if (plan.tiles > 1) {
      --plan.tiles;
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace esparse::cuda
