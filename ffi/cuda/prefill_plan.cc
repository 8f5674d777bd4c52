#include "cuda/prefill_plan.h"

#include <algorithm>

namespace esparse::cuda {
namespace {

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int Steps(const Product& product) { return static_cast<int>(product.channels / kStageChannels); }

int Tiles(const Product& product, int rows, int wide) {
  return CeilDiv(product.out, wide * kBlockOutputs) * CeilDiv(product.rows, rows);
}

// Into how many parts the channels are split: as many as all run at once. More than four, or parts
// of less than eight stages, gained nothing (measured on an H200).
int BestSplit(int tiles, int steps, int rows, const PrefillRoom& room) {
  for (int split = std::min(4, steps / 8); split > 1; --split) {
    if (tiles * split <= room.multiprocessors * PrefillResident(rows) &&
        tiles <= room.clusters(rows, split)) {
      return split;
    }
  }
  return 1;
}

// The same for the tiles that are left when all multiprocessors had as many as each other. What
// that saves has to be more than a second launch and the sums through shared memory cost.
int BestTail(const Product& product, const PrefillPlan& plan, const PrefillRoom& room) {
  constexpr int kLeastSaved = 16 * 256;  // stages times rows
  const int steps = Steps(product), tiles = Tiles(product, plan.rows, plan.cluster);
  const int at_once = TeamsAtOnce(plan, room);
  if (plan.split > 1 || tiles <= at_once || at_once < 1) return 1;
  const int left = tiles % at_once * plan.cluster;
  const int split = left == 0 ? 1 : BestSplit(left, steps, plan.rows, room);
  return (steps - CeilDiv(steps, split)) * plan.rows < kLeastSaved ? 1 : split;
}

PrefillArgs ArgsOf(const Product& product, int rows, int cluster, int group, int split) {
  PrefillArgs args = {};
  args.rows = static_cast<int>(product.rows);
  args.out = static_cast<int>(product.out);
  args.channels = static_cast<int>(product.channels);
  args.wide = cluster;
  args.out_tiles = CeilDiv(product.out, cluster * kBlockOutputs);
  args.row_tiles = CeilDiv(product.rows, rows);
  args.group = group;
  // Rows outside of x take a copy as long as others, so it asks for none if it can.
  args.x_rows =
      static_cast<int>(cluster > 1 ? rows / cluster : std::min<int64_t>(rows, product.rows));
  args.split = split;
  args.end = args.out_tiles * args.row_tiles;
  args.y = static_cast<uint16_t*>(product.y);
  return args;
}

}  // namespace

bool IsPlan(const PrefillPlan& plan) {
  const bool rows = plan.rows == 0 || plan.rows == 64 || plan.rows == 128 || plan.rows == 256;
  const bool wide = plan.rows == 0 || plan.rows == 256;
  const bool cluster = plan.cluster == 0 || plan.cluster == 1 || (plan.cluster == 2 && wide);
  const bool split = plan.split >= 0 && plan.split <= (plan.cluster == 2 ? 1 : kMostSplit);
  const bool tail = plan.tail >= 0 && plan.tail <= (plan.split > 1 ? 1 : kMostSplit);
  return rows && cluster && split && tail && plan.group >= 0 && plan.group <= kMostGroup;
}

PrefillPlan CompletePlan(const Product& product, const PrefillPlan& given,
                         const PrefillRoom& room) {
  PrefillPlan plan = given;
  const int steps = Steps(product);
  if (plan.rows == 0) {
    plan.rows = plan.cluster == 2                                    ? 256
                : product.rows <= 64                                 ? 64
                : product.rows <= 128                                ? 128
                : 2 * Tiles(product, 128, 1) <= room.multiprocessors ? 128
                                                                     : 256;
  }
  if (plan.split == 0) {
    const bool whole = plan.cluster == 2 || plan.tail > 1;
    plan.split = whole ? 1 : BestSplit(Tiles(product, plan.rows, 1), steps, plan.rows, room);
  }
  plan.split = std::min(plan.split, steps);
  if (plan.cluster == 0) {
    const bool many = product.rows >= 1024 && product.out >= 2 * kBlockOutputs;
    plan.cluster = plan.rows == 256 && plan.split == 1 && many ? 2 : 1;
  }
  if (plan.group == 0) plan.group = 8;
  if (plan.tail == 0) plan.tail = BestTail(product, plan, room);
  plan.tail = std::min(plan.tail, steps);
  return plan;
}

int TeamsAtOnce(const PrefillPlan& plan, const PrefillRoom& room) {
  return plan.cluster > 1 ? room.clusters(plan.rows, plan.cluster)
                          : room.multiprocessors * PrefillResident(plan.rows);
}

PrefillCut CutPrefill(const Product& product, const PrefillPlan& plan, int teams_at_once) {
  PrefillCut cut = {};
  cut.args = ArgsOf(product, plan.rows, plan.cluster, plan.group, plan.split);
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
