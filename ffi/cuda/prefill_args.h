// What the prefill kernel is told of a launch.
#ifndef ESPARSE_FFI_CUDA_PREFILL_ARGS_H_
#define ESPARSE_FFI_CUDA_PREFILL_ARGS_H_

#include <cstdint>

namespace esparse::cuda {

constexpr int kGroupOutputs = 64;  // of a warpgroup
constexpr int kGroupThreads = 128;
constexpr int kMostSplit = 8;       // blocks that the channels are split among
constexpr int kStageChannels = 64;  // divides the channels, as kShapeUnit does

// Whether a warp of its own loads. A quarter of a multiprocessor has 512 registers for each lane of
// its warps, one of every warpgroup that multiplies and this one; where that leaves too few for the
// sums of `rows` rows, one of those that multiply loads as well.
constexpr bool HasLoader(int rows, int outputs) {
  return rows / 2 + 40 <= 512 / (outputs / kGroupOutputs + 1) / 8 * 8;
}
// Of a block.
constexpr int PrefillThreads(int rows, int outputs) {
  return outputs / kGroupOutputs * kGroupThreads + (HasLoader(rows, outputs) ? 32 : 0);
}

// The output is cut into tiles of a block, which are numbered in the order they are walked in.
// Those of a cluster that shares x are neighbours, and follow each other.
struct PrefillArgs {
  int rows, out, channels;
  int wide;       // tiles of neighbouring outputs that follow each other: the cluster that shares x
  int out_tiles;  // of the outputs of `wide` blocks
  int row_tiles;
  int group;       // row tiles that are walked together
  int x_rows;      // that a copy of x brings
  int split;       // blocks of a cluster that each multiply a part of the channels
  int first, end;  // the tiles of this launch, counted by clusters where blocks share x
  bool followed;   // by the launch of the rest, which may start before this one has ended
  bool prefetch;   // W was complete before the kernel before began
  uint16_t* y;
};

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_ARGS_H_
