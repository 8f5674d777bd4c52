// The 2:4 product for a few rows of x (decoding) on NVIDIA GPUs: shapes -> plan -> launch.
//
// Plain CUDA, no XLA: handlers.cc checks buffers and calls this. Nothing here waits for the device,
// allocates, or keeps anything between calls, so every call may be captured in a CUDA graph.
#ifndef ESPARSE_FFI_CUDA_DECODE_H_
#define ESPARSE_FFI_CUDA_DECODE_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace esparse::cuda {

constexpr int kMaxRows = 16;
constexpr int kAlignment = 16;  // bytes, of every buffer: the kernels move 16 at a time
constexpr int kShapeUnit = 64;  // divides out and channels: the blob's tile

enum class Dtype { kFloat16, kBfloat16 };

// What happens around the product; the numbers are part of the handlers' interface.
enum Fusion : int32_t {
  kNorm = 1,      // y is scaled by rsqrt(mean(x^2) + epsilon), row by row: RMSNorm, its gain in W
  kSwiglu = 2,    // rows of W: 8 of gate, 8 of up, ...; y = silu(gate) * up has out / 2 columns
  kResidual = 4,  // y += residual
  kPermute = 8,   // column c of x is read from x[:, permutation[c]]
  kScatter = 16,  // y is written once more with column c at places[c]; not with kSwiglu
};
constexpr int32_t kAllFusions = kNorm | kSwiglu | kResidual | kPermute | kScatter;

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
  int32_t warps = 0;       // 4, 8 or 16: they share the channels of a tile
  int32_t blocks = 0;      // per multiprocessor, 1 or 2
  int32_t interleave = 0;  // 1: a warp's channels are strewn, 2: they are a run
  int32_t depth = 0;       // 1..8 pieces of W a warp has under way, at most
  int32_t resident = 0;    // 1: x stays in shared memory for all tiles, 2: it passes with W
};

constexpr int kPlanFields = 6;

// How a kernel stands to the one before it, from sm_90 on (programmatic dependent launch). Whatever
// is chosen, x and residual are read and y is written only when all earlier work has ended.
enum class Start : int32_t {
  kAlone,     // it begins when the kernel before has ended
  kEarly,     // it is set up before that, and then waits
  kPrefetch,  // it also requests W meanwhile: the caller knows that W was complete before the
              // kernel before began
};

// Queues the product.
cudaError_t Launch(const Product& product, const Plan& plan, Start start, cudaStream_t stream);

constexpr int kKernelArgsBytes = 60;

// The kernel of a product, for those who queue it in another way. kPermute is refused: it takes
// two.
struct KernelLaunch {
  const char* name;           // in the cubin of its dtype and architecture
  const void* function;       // for the CUDA runtime
  int grid, threads, shared;  // blocks, threads in each, bytes of dynamic shared memory
  const void* blob;
  const void* x;
  const void* residual;
  const void* places;
  void* y;
  void* scattered;
  std::array<char, kKernelArgsBytes> args;  // the kernel's last parameter, KernelArgs
};
cudaError_t Prepare(const Product& product, const Plan& plan, Start start, KernelLaunch* launch);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_DECODE_H_
