// A block takes a few rows through shared memory, where the values of one channel lie side by side:
// one read of it at a random place, and one look at the permutation, then serve all these rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/row_norm.h"

namespace esparse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSharedBytes = 48 << 10, kSumsBytes = 512;

__device__ __forceinline__ float ToFloat(__half value) { return __half2float(value); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T>
__device__ __forceinline__ T Round(float value);
template <>
__device__ __forceinline__ __half Round<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 Round<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// 16 bytes of a row.
template <typename T>
struct alignas(16) Vector {
  T at[kNormUnit];
};

// The values of one channel in the rows of a block.
template <typename T, int kRows>
struct alignas(sizeof(T) * kRows) Channel {
  T of[kRows];
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads) NormRows(const __grid_constant__ RowNorm p) {
  using Vec = Vector<T>;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float partial[kWarps][kRows];
  auto* held = reinterpret_cast<Channel<T, kRows>*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int here = static_cast<int>(min(static_cast<int64_t>(kRows), p.rows - first));
  const int vectors = p.channels / kNormUnit;
  const auto* x = static_cast<const Vec*>(p.x);
  const auto* residual = static_cast<const Vec*>(p.residual);
  auto* sum = static_cast<Vec*>(p.sum);
  auto* normed = static_cast<Vec*>(p.normed);
  const auto at = [&](int r, int v) { return (first + r) * vectors + v; };

  float squares[kRows] = {};
  for (int v = threadIdx.x; v < vectors; v += kThreads) {
    Vec values[kRows] = {}, added[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= here) continue;
      values[r] = x[at(r, v)];
      if (p.residual != nullptr) added[r] = residual[at(r, v)];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= here) continue;
#pragma unroll
      for (int j = 0; j < kNormUnit; ++j) {
        float value = ToFloat(values[r].at[j]);
        if (p.residual != nullptr) {
          values[r].at[j] = Round<T>(value + ToFloat(added[r].at[j]));
          value = ToFloat(values[r].at[j]);
        }
        squares[r] += value * value;
      }
      if (p.sum != nullptr) sum[at(r, v)] = values[r];
    }
#pragma unroll
    for (int j = 0; j < kNormUnit; ++j) {
      Channel<T, kRows> channel;
#pragma unroll
      for (int r = 0; r < kRows; ++r) channel.of[r] = values[r].at[j];
      held[v * kNormUnit + j] = channel;
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int away = 16; away > 0; away /= 2) {
      squares[r] += __shfl_xor_sync(0xffffffff, squares[r], away);
    }
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][r] = squares[r];
  }
  __syncthreads();
  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += partial[warp][r];
    scale[r] = rsqrtf(total / p.channels + p.epsilon);
  }

  for (int v = threadIdx.x; v < vectors; v += kThreads) {
    int from[kNormUnit];
#pragma unroll
    for (int j = 0; j < kNormUnit; ++j) from[j] = v * kNormUnit + j;
    if (p.permutation != nullptr) {
      const auto* places = reinterpret_cast<const int4*>(p.permutation) + v * 2;
      const int4 low = __ldg(places), high = __ldg(places + 1);
      from[0] = low.x, from[1] = low.y, from[2] = low.z, from[3] = low.w;
      from[4] = high.x, from[5] = high.y, from[6] = high.z, from[7] = high.w;
    }
    Vec results[kRows];
#pragma unroll
    for (int j = 0; j < kNormUnit; ++j) {
      const Channel<T, kRows> channel = held[from[j]];
      const float gain =
          p.gain == nullptr ? 1.0f : ToFloat(__ldg(static_cast<const T*>(p.gain) + from[j]));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        results[r].at[j] = Round<T>(ToFloat(channel.of[r]) * (scale[r] * gain));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < here) normed[at(r, v)] = results[r];
    }
  }
}

template <typename T, int kRows>
cudaError_t LaunchRows(const RowNorm& norm, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((norm.rows + kRows - 1) / kRows);
  const size_t bytes = sizeof(T) * kRows * norm.channels;
  NormRows<T, kRows><<<blocks, kThreads, bytes, stream>>>(norm);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchOf(const RowNorm& norm, cudaStream_t stream) {
  constexpr int kBytes = sizeof(T);
  static_assert(kBytes * kMostNormChannels <= kSharedBytes - kSumsBytes);
  static_assert(sizeof(float) * kWarps * 4 <= kSumsBytes);
  const int fit = (kSharedBytes - kSumsBytes) / (kBytes * norm.channels);
  if (fit >= 4) return LaunchRows<T, 4>(norm, stream);
  if (fit >= 2) return LaunchRows<T, 2>(norm, stream);
  return LaunchRows<T, 1>(norm, stream);
}

}  // namespace

cudaError_t LaunchRowNorm(const RowNorm& norm, cudaStream_t stream) {
  if (norm.rows == 0) return cudaSuccess;
  if (norm.dtype == Dtype::kFloat16) return LaunchOf<__half>(norm, stream);
  return LaunchOf<__nv_bfloat16>(norm, stream);
}

}  // namespace esparse::cuda
