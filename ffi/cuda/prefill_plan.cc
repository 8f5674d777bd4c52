#include "cuda/prefill_plan.h"

#include <algorithm>
#include <iterator>
#include <limits>

namespace esparse::cuda {
namespace {

// The blocks that there are: rows x outputs, how many share x, and what a stage takes, in those of
// 128 outputs and as many rows (measured on an H200).
struct Tile {
  int rows, outputs, cluster;
  double stage;
};
constexpr Tile kTiles[] = {{16, 128, 1, 1},     {64, 128, 1, 1},    {128, 128, 1, 1},
                           {128, 192, 1, 1.6},  {256, 128, 1, 1},   {256, 128, 2, 1},
                           {256, 192, 1, 1.48}, {256, 192, 2, 1.48}};

bool IsOf(const PrefillPlan& plan, const Tile& tile) {
  return (plan.rows == 0 || plan.rows == tile.rows) &&
         (plan.outputs == 0 || plan.outputs == tile.outputs) &&
         (plan.cluster == 0 || plan.cluster == tile.cluster);
}

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int Steps(const Product& product) { return static_cast<int>(product.channels / kStageChannels); }

// Of so many rows, each of as many outputs as `wide` blocks have.
int Tiles(const Product& product, int rows, int outputs, int wide) {
  return CeilDiv(product.out, wide * outputs) * CeilDiv(product.rows, rows);
}

// Into how many parts the channels are split: as many as all run at once. Parts of less than eight
// stages gained nothing, nor did more than four of them, or than six where a multiprocessor has
// room for two blocks. With 16 rows a multiprocessor takes as long as its part of W takes to come,
// so it is the fewest parts that leave the busiest one the least (all of it measured on an H200).
int BestSplit(int tiles, int steps, const PrefillPlan& plan, const PrefillRoom& room) {
  const int most = PrefillResident(plan.rows) > 1 ? 6 : 4;
  int best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (int split = std::max(1, std::min(most, steps / 8)); split > 0; --split) {
    if (split > 1 && (tiles * split > room.multiprocessors * PrefillResident(plan.rows) ||
                      tiles > room.clusters(plan.rows, plan.outputs, split))) {
      continue;
    }
    if (plan.rows != kFewestRows) return split;
    const double busiest =
        static_cast<double>(CeilDiv(tiles * split, room.multiprocessors)) / split;
    if (busiest > least) continue;
    least = busiest;
    best = split;
  }
  return best;
}

// What a second launch costs: stages times rows; and sums through shared memory: stages (measured
// as well, these before blocks sent each other their sums). A stage of fewer rows than 64 takes as
// long, since it is W that it waits for.
constexpr int kLaunchCost = 16 * 256, kSumsCost = 12;

int CostlyRows(const PrefillPlan& plan) { return std::max(64, plan.rows); }

// The same for the tiles that are left when all multiprocessors had as many as each other, if it
// saves more than it costs.
int BestTail(const Product& product, const PrefillPlan& plan, const PrefillRoom& room) {
  const int steps = Steps(product);
  const int tiles = Tiles(product, plan.rows, plan.outputs, plan.cluster);
  const int at_once = TeamsAtOnce(plan, room);
  if (plan.split > 1 || tiles <= at_once || at_once < 1) return 1;
  const int left = tiles % at_once * plan.cluster;
  const int split = left == 0 ? 1 : BestSplit(left, steps, plan, room);
  return (steps - CeilDiv(steps, split)) * CostlyRows(plan) < kLaunchCost ? 1 : split;
}

// How many stages by a complete plan take until the last multiprocessor has ended.
double Stages(const Product& product, const PrefillPlan& plan, const PrefillRoom& room) {
  const int steps = Steps(product);
  const int tiles = Tiles(product, plan.rows, plan.outputs, plan.cluster);
  const int at_once = std::max(1, TeamsAtOnce(plan, room));
  if (plan.split > 1) return CeilDiv(steps, plan.split) + kSumsCost;
  if (plan.tail > 1 && tiles > at_once && tiles % at_once != 0) {
    const int tail = CeilDiv(steps, plan.tail) + kLaunchCost / CostlyRows(plan);
    return static_cast<double>(tiles / at_once) * steps + tail;
  }
  return static_cast<double>(CeilDiv(tiles, at_once)) * steps;
}

PrefillArgs ArgsOf(const Product& product, const PrefillPlan& plan) {
  PrefillArgs args = {};
  args.rows = static_cast<int>(product.rows);
  args.out = static_cast<int>(product.out);
  args.channels = static_cast<int>(product.channels);
  args.wide = plan.cluster;
  args.out_tiles = CeilDiv(product.out, plan.cluster * plan.outputs);
  args.row_tiles = CeilDiv(product.rows, plan.rows);
  args.group = plan.group;
  // Rows outside of x take a copy as long as others, so it asks for none if it can.
  args.x_rows = static_cast<int>(plan.cluster > 1 ? plan.rows / plan.cluster
                                                  : std::min<int64_t>(plan.rows, product.rows));
  args.split = plan.split;
  args.end = args.out_tiles * args.row_tiles;
  args.y = static_cast<uint16_t*>(product.y);
  return args;
}

// With all zeros filled in but `outputs`, which is given.
PrefillPlan CompleteFor(const Product& product, const PrefillPlan& given, const PrefillRoom& room) {
  PrefillPlan plan = given;
  const int steps = Steps(product);
  if (plan.split == 0) {
    const bool whole = plan.cluster == 2 || plan.tail > 1;
    const int tiles = Tiles(product, plan.rows, plan.outputs, 1);
    plan.split = whole ? 1 : BestSplit(tiles, steps, plan, room);
  }
  plan.split = std::min(plan.split, steps);
  if (plan.cluster == 0) {
    const bool many = product.rows >= 1024 && product.out >= 2 * plan.outputs;
    plan.cluster = plan.rows == 256 && plan.split == 1 && many ? 2 : 1;
  }
  if (plan.group == 0) plan.group = 8;
  if (plan.tail == 0) plan.tail = BestTail(product, plan, room);
  plan.tail = std::min(plan.tail, steps);
  return plan;
}

int BestRows(const Product& product, const PrefillPlan& given, const PrefillRoom& room) {
  const auto can = [&](int rows) {
    PrefillPlan plan = given;
    plan.rows = rows;
    return IsPlan(plan);
  };
  for (const int rows : {kFewestRows, 64}) {
    if (product.rows <= rows && can(rows)) return rows;
  }
  const bool few =
      product.rows <= 128 || 2 * Tiles(product, 128, kLeastOutputs, 1) <= room.multiprocessors;
  return (few && can(128)) || !can(256) ? 128 : 256;
}

}  // namespace

bool IsPlan(const PrefillPlan& plan) {
  const bool tile = std::any_of(std::begin(kTiles), std::end(kTiles),
                                [&](const Tile& one) { return IsOf(plan, one); });
  const bool split = plan.split >= 0 && plan.split <= (plan.cluster == 2 ? 1 : kMostSplit);
  const bool tail = plan.tail >= 0 && plan.tail <= (plan.split > 1 ? 1 : kMostSplit);
  return tile && split && tail && plan.group >= 0 && plan.group <= kMostGroup;
}

PrefillPlan CompletePlan(const Product& product, const PrefillPlan& given,
                         const PrefillRoom& room) {
  PrefillPlan plan = given;
  if (plan.rows == 0) plan.rows = BestRows(product, given, room);
  PrefillPlan best = {};
  double least = 0;
  for (const Tile& tile : kTiles) {
    if (!IsOf(plan, tile) || best.outputs == tile.outputs) continue;
    PrefillPlan one = plan;
    one.outputs = tile.outputs;
    one = CompleteFor(product, one, room);
    const double cost = tile.stage * Stages(product, one, room);
    if (best.outputs != 0 && cost >= least) continue;
    best = one;
    least = cost;
  }
  return best;
}

int TeamsAtOnce(const PrefillPlan& plan, const PrefillRoom& room) {
  return plan.cluster > 1 ? room.clusters(plan.rows, plan.outputs, plan.cluster)
                          : room.multiprocessors * PrefillResident(plan.rows);
}

PrefillCut CutPrefill(const Product& product, const PrefillPlan& plan, int teams_at_once) {
  PrefillCut cut = {};
  cut.args = ArgsOf(product, plan);
  const int tiles = cut.args.end;
  if (plan.split > 1) {  // each team has one tile
    cut.teams = tiles;
    return cut;
  }
  cut.teams = std::min(tiles, teams_at_once);  // each stays for all its tiles
  const int left = tiles % teams_at_once;
  if (plan.tail == 1 || tiles <= teams_at_once || left == 0) return cut;
  cut.args.end = tiles - left;
  cut.args.followed = true;
  // Blocks of the rest share nothing, but walk the tiles in the same order.
  cut.tail = cut.args;
  cut.tail.x_rows = static_cast<int>(std::min<int64_t>(plan.rows, product.rows));
  cut.tail.split = plan.tail;
  cut.tail.first = cut.args.end * plan.cluster;
  cut.tail.end = tiles * plan.cluster;
  cut.tail.followed = false;
  cut.tail_teams = cut.tail.end - cut.tail.first;
  return cut;
}

}  // namespace esparse::cuda
