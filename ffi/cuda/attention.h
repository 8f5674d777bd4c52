// The attention of one decode step on NVIDIA GPUs: rotary angles, the append to the cache, and the
// softmax over the cache, in one kernel.
//
// Plain CUDA, no XLA: attention_handlers.cc checks buffers and calls this. Nothing here waits for
// the device, allocates, or keeps anything between calls.
#ifndef ESPARSE_FFI_CUDA_ATTENTION_H_
#define ESPARSE_FFI_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "cuda/decode.h"

namespace esparse::cuda {

constexpr int kAttentionMajor = 9;  // clusters of blocks: from compute capability 9.0 on

// Of every row: a query of `heads * features`, then a key and a value of `kv_heads * features`.
// Query heads that share a key lie next to each other.
struct Attention {
  const void* projected;  // [batch][(heads + 2 kv_heads) * features]
  void* keys;             // [batch * kv_heads][slots][features], rotated; written at the next slot
  void* values;           // the same
  const float* cosines;   // [batch or 1][features / 2], of the next position
  const float* sines;
  const int32_t* length;  // how many slots are filled, of all rows
  const int32_t* start;   // [batch], the first slot of each row; null: 0
  const int32_t* places;  // [heads * features], where each feature of a row goes, each of them
                          // once; null: to its own
  void* attended;         // [batch][heads * features]
  int64_t batch, heads, kv_heads, features, slots, angle_rows;
  Dtype dtype;
};

// Whether there is a kernel: 64 or 128 features, 1, 2, 4 or 8 query heads to a key.
bool AttentionFits(int64_t heads, int64_t kv_heads, int64_t features);

// Whether the current device has clusters, and this build machine code or PTX that uses them.
bool AttentionRuns();

constexpr int kAttentionArgsBytes = 32;

// The kernel of an attention, for those who queue it in another way.
struct AttentionLaunch {
  const char* name;      // in the cubin of attention.cu
  const void* function;  // for the CUDA runtime
  int grid, threads;
  std::array<const void*, 9> pointers;         // the first parameters
  std::array<char, kAttentionArgsBytes> args;  // the last one
};
cudaError_t Prepare(const Attention& attention, Start start, AttentionLaunch* launch);

// Queues it, where AttentionRuns(). kPrefetch here: the filled slots of the cache were complete
// before the kernel before began.
cudaError_t Launch(const Attention& attention, Start start, cudaStream_t stream);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_ATTENTION_H_
