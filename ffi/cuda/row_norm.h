// What stands before a product of many rows: a residual is added, rows are normalised, and their
// channels are put into the order that the weight was compressed in. One pass over the memory.
#ifndef ESPARSE_FFI_CUDA_ROW_NORM_H_
#define ESPARSE_FFI_CUDA_ROW_NORM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/decode.h"

namespace esparse::cuda {

constexpr int kNormUnit = 8;  // divides the channels: 16 bytes are read at a time
// Of 16 bits, in the shared memory that a block may have without asking for more.
constexpr int kMostNormChannels = 24320;

// sum = x + residual, rounded; normed[r][c] = sum[r][p[c]] * gain[p[c]] / sqrt(mean(sum[r]^2) +
// epsilon), computed in float32 and rounded. Every address is a multiple of 16 bytes.
struct RowNorm {
  const void* x;               // [rows][channels]
  const void* residual;        // the same; null: nothing is added
  const void* gain;            // [channels]; null: ones
  const int32_t* permutation;  // [channels], each once, unchecked; null: the natural order
  void* sum;                   // [rows][channels]; null: not written. May be x or residual.
  void* normed;                // [rows][channels]
  int64_t rows;
  int32_t channels;
  float epsilon;
  Dtype dtype;
};

cudaError_t LaunchRowNorm(const RowNorm& norm, cudaStream_t stream);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_ROW_NORM_H_
