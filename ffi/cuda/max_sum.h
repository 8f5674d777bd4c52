// The product that the channel shuffle is made of, on NVIDIA GPUs: sums over rows of the greater of
// two scores, doubled (pruning/max_sum.py).
#ifndef ESPARSE_FFI_CUDA_MAX_SUM_H_
#define ESPARSE_FFI_CUDA_MAX_SUM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace esparse::cuda {

constexpr int kMaxSumUnit = 4;  // divides lefts and rights: 16 bytes are copied at a time

// out[b][i][j] = 2 sum_r max(left[b][r][i], right[b][r][j]), modulo 2^32.
struct MaxSum {
  const int32_t* left;   // [blocks][rows][lefts]
  const int32_t* right;  // [blocks][rows][rights]
  int32_t* out;          // [blocks][lefts][rights]
  int64_t blocks, rows, lefts, rights;
};

cudaError_t LaunchMaxSum(const MaxSum& product, cudaStream_t stream);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_MAX_SUM_H_
