// What the host hands to the decode kernel, and where it finds the kernel's instances.
#ifndef ESPARSE_FFI_CUDA_DECODE_ARGS_H_
#define ESPARSE_FFI_CUDA_DECODE_ARGS_H_

#include <cstdint>

namespace esparse::cuda {

constexpr int kTileRows = 16;
constexpr int kUnitChannels = 128;
constexpr int kUnitValueBytes = kTileRows * kUnitChannels;  // 64 values of 2 bytes a row
constexpr int kUnitIndexBytes = kUnitValueBytes / 8;
constexpr int kUnitBytes = kUnitValueBytes + kUnitIndexBytes;
constexpr int kUnitRowBytes = kUnitChannels * 2;  // of one row of x
constexpr int kMaxDepth = 8;
constexpr int kMinWarps = 4;
constexpr int kMaxWarps = 16;
constexpr int kMaxTiles = 4;

// What happens around the product; the numbers are part of the handlers' interface.
enum Fusion : int32_t {
  kNorm = 1,      // y is scaled by rsqrt(mean(x^2) + epsilon), row by row: RMSNorm, its gain in W
  kSwiglu = 2,    // rows of W: 8 of gate, 8 of up, ...; y = silu(gate) * up has out / 2 columns
  kResidual = 4,  // y += residual
  kPermute = 8,   // column c of x is read from x[:, permutation[c]]
  kScatter = 16,  // y is written once more with column c at places[c]; not with kSwiglu
};
constexpr int32_t kAllFusions = kNorm | kSwiglu | kResidual | kPermute | kScatter;

struct KernelArgs {
  int out, channels, rows;
  int units;                           // the last one may be a half
  int block_tiles, block_tiles_extra;  // tiles of a block; the first blocks take one more
  int warp_units, warp_units_extra;    // units of a warp; the first warps take one more
  int interleave;                      // a warp takes every warps-th unit instead of a run
  int depth;                           // of the ring
  int resident;                        // x has a place of its own and is loaded once
  int sums_toggle;  // bytes between two buffers for partial sums; 0: there is one
  int fusion;       // Fusion
  int prefetch;     // W is requested before the kernel before has ended
  float epsilon;
};

// Pointers that a fusion does not ask for may be anything.
using DecodeFunction = void (*)(const uint8_t* blob, const void* x, const void* residual,
                                const int32_t* places, void* y, void* scattered, KernelArgs args);

struct DecodeKernel {
  DecodeFunction function;
  const char* name;
};

// The kernel for a number of 8-row columns of x (1, 2) and of tiles (1 to kMaxTiles).
DecodeKernel FindFloat16(int columns, int tiles);
DecodeKernel FindBfloat16(int columns, int tiles);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_DECODE_ARGS_H_
