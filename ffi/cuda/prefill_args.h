// What the prefill kernel is told of a launch.
#ifndef ESPARSE_FFI_CUDA_PREFILL_ARGS_H_
#define ESPARSE_FFI_CUDA_PREFILL_ARGS_H_

#include <cstdint>

namespace esparse::cuda {

constexpr int kBlockOutputs = 128;
constexpr int kStageChannels = 64;  // divides the channels, as kShapeUnit does

// The output is cut into tiles of a block, which are numbered in the order they are walked in.
// Those of a cluster that shares x are neighbours, and follow each other.
struct PrefillArgs {
  int rows, out, channels;
  int wide;       // tiles of neighbouring outputs that follow each other: the cluster that shares x
  int out_tiles;  // of wide * kBlockOutputs outputs
  int row_tiles;
  int group;       // row tiles that are walked together
  int x_rows;      // that a copy of x brings
  int split;       // blocks of a cluster that each multiply a part of the channels
  int first, end;  // the tiles of this launch, counted by clusters where blocks share x
  bool followed;   // by the launch of the rest, which may start before this one has ended
  uint16_t* y;
};

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_ARGS_H_
