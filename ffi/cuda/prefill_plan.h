// How the 2:4 prefill product is cut: shapes -> plan -> what the blocks of one launch or two do.
//
// Plain C++, no CUDA: the numbers of the device are given.
#ifndef ESPARSE_FFI_CUDA_PREFILL_PLAN_H_
#define ESPARSE_FFI_CUDA_PREFILL_PLAN_H_

#include <cstdint>
#include <functional>

#include "cuda/decode_plan.h"
#include "cuda/prefill_args.h"

namespace esparse::cuda {

// How the work is cut. Zero chooses by the shape and the device.
struct PrefillPlan {
  int32_t rows = 0;     // of x that a block multiplies at a time: 16, 64, 128 or 256
  int32_t outputs = 0;  // that it computes of them: 128, or with 128 rows and more 192
  int32_t cluster = 0;  // 1, or of 256 rows 2 blocks, of neighbouring outputs, share what they load
  int32_t group = 0;    // 1..64 tiles of rows that are walked together, for the second-level cache
  int32_t split = 0;    // 1, or if cluster is 1 up to 8 blocks multiply a part of the channels each
  int32_t tail = 0;  // if split is 1, as many for the last tiles, those that do not fill the device
};

// As it is handed over: its fields in their order.
constexpr int kPrefillPlanFields = 6;
inline PrefillPlan PrefillPlanOf(const int32_t* fields) {
  static_assert(sizeof(PrefillPlan) == kPrefillPlanFields * sizeof(int32_t));
  return {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
}
constexpr int kMostGroup = 64, kLeastOutputs = 128, kFewestRows = 16;

// Whether a plan, its zeros among it, is one.
bool IsPlan(const PrefillPlan& plan);

// Blocks of so many rows that a multiprocessor has room for.
constexpr int PrefillResident(int rows) { return rows <= 64 ? 2 : 1; }

// What runs at once on a device.
struct PrefillRoom {
  int multiprocessors;
  // How many clusters of `blocks` blocks of so many rows and outputs. Groups of multiprocessors
  // hold whole clusters, and differ in size, so this is less than their quotient.
  std::function<int(int rows, int outputs, int blocks)> clusters;
};

// The plan with its zeros filled in.
PrefillPlan CompletePlan(const Product& product, const PrefillPlan& given, const PrefillRoom& room);

// How many blocks run at once by a complete plan, or clusters of those that share x.
int TeamsAtOnce(const PrefillPlan& plan, const PrefillRoom& room);

// Launches of one product. A team is the cluster of blocks that shares x or splits the channels.
struct PrefillCut {
  PrefillArgs args;
  int teams;
  PrefillArgs tail;
  int tail_teams;  // 0: there is no second launch
};

// The cut by a complete plan, on a device that runs so many teams of the first launch at once.
PrefillCut CutPrefill(const Product& product, const PrefillPlan& plan, int teams_at_once);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_PLAN_H_
