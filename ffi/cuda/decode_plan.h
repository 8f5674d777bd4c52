// How the 2:4 decode product is cut: shapes -> plan -> what every block and warp of the kernel
// does.
//
// Plain C++, no CUDA: the numbers of the device are given.
#ifndef ESPARSE_FFI_CUDA_DECODE_PLAN_H_
#define ESPARSE_FFI_CUDA_DECODE_PLAN_H_

#include <cstdint>

#include "cuda/decode_args.h"

namespace esparse::cuda {

constexpr int kMaxRows = 16;
constexpr int kAlignment = 16;  // bytes, of every buffer: the kernels move 16 at a time
constexpr int kShapeUnit = 64;  // divides out and channels: the blob's tile

enum class Dtype { kFloat16, kBfloat16 };

// y[rows][out] = x[rows][channels] * W[out][channels]^T
struct Product {
  const void* blob;  // W as sparse/blob.py writes it
  const void* x;
  const void* residual;        // kResidual: [rows][out], may be y itself
  const int32_t* permutation;  // kPermute: [channels]
  void* scratch;               // kPermute: as large as x
  const int32_t* places;       // kScatter: [out], each of 0..out-1 once
  void* scattered;             // kScatter: as large as y
  void* y;
  int64_t rows, out, channels;
  Dtype dtype;
  int32_t fusion;
  float epsilon;
};

// How the work is cut. Zero chooses by the shape and the device.
struct Plan {
  int32_t tiles = 0;       // 1..4 tiles of 16 outputs that a warp computes at a time
  int32_t warps = 0;       // 4, 8 or 16 of a block: they share the channels of a tile
  int32_t blocks = 0;      // per multiprocessor, 1 or 2
  int32_t interleave = 0;  // 1: a warp's channels are strewn, 2: they are a run
  int32_t depth = 0;       // 1..8 pieces of W a warp has under way, at most
  int32_t resident = 0;    // 1: x stays in shared memory for all tiles, 2: it passes with W
};

// As it is handed over: its fields in their order.
constexpr int kPlanFields = 6;
inline Plan PlanOf(const int32_t* fields) {
  static_assert(sizeof(Plan) == kPlanFields * sizeof(int32_t));
  return {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
}

// What a plan has to fit on.
struct Multiprocessors {
  int count;
  int shared_per_block, shared_per_multiprocessor, reserved_per_block;  // bytes

  // Shared memory of a block when `blocks` of them share a multiprocessor.
  int Capacity(int blocks) const;
};

// The kernel's cut of one product, and the shared memory it takes.
struct Cut {
  KernelArgs args;
  int columns, tiles, warps, blocks, grid, shared;
};

// The cut of a product by a plan, its zeros filled in. Where shared memory does not suffice, on
// devices that have less of it or with many rows, by a plan with fewer warps, tiles and resident x;
// false where none is small enough.
bool FitCut(const Product& product, const Plan& given, const Multiprocessors& device, Cut* cut);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_DECODE_PLAN_H_
