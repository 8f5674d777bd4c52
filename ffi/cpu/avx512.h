// A few rows of x with AVX-512: x is permuted, the lanes are kept values.
//
// A permutation from two vectors of x (vpermt2ps, vpermt2w) puts under each kept value the x it is
// multiplied by: its lane is the 2-bit position of the value plus four times its group. The lanes
// of kOuts rows of W are unpacked once for kRows rows of x. Channels are cut into blocks whose x
// stays in the first-level cache; while one group of outputs is computed, the next one is fetched.
//
// Included by the sources of the AVX-512 levels; internal linkage (see kernels.h).
#ifndef ESPARSE_FFI_CPU_AVX512_H_
#define ESPARSE_FFI_CPU_AVX512_H_

#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/scalar.h"

namespace esparse::cpu {
namespace {

constexpr int64_t kPermuteRows = 4;   // rows of x and of W computed together: their sums fill
constexpr int64_t kPermuteOuts = 4;   // half of the registers
constexpr int64_t kPermuteTile = 64;  // outputs whose sums wait for the next block of channels
constexpr int64_t kPermuteBytes = 24 << 10;  // of x in the first-level cache
constexpr int64_t kCacheLine = 64;
constexpr int64_t kAhead = 256;  // values

// Sixteen kept values of 32 channels.
inline __m512 LoadKept(const float* values) { return _mm512_loadu_ps(values); }

inline __m512 LoadKept(const Bfloat16* values) {
  const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16));
}

inline __m512 LoadKept(const Float16* values) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

// The step of a level: how many channels it takes, and how it multiplies. This one reads x as float
// and the weight as T.
template <typename T>
struct WideStep {
  using X = float;
  using Value = T;
  static constexpr int64_t kChannels = 32;

  // (bits >> 2 j & 3) | 4 (j / 2) for sixteen values j: one shift and one logic step.
  static __m512i Lanes(const uint8_t* indices) {
    const __m512i shift =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i group =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    int32_t word;
    std::memcpy(&word, indices, sizeof(word));
    const __m512i bits = _mm512_srlv_epi32(_mm512_set1_epi32(word), shift);
    return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(3), group, 0xEA);  // (a & b) | c
  }

  static __m512 Weight(const T* values) { return LoadKept(values); }

  static __m512 MultiplyAdd(const float* x, __m512i lanes, __m512 weight, __m512 sum) {
    const __m512 low = _mm512_loadu_ps(x);
    const __m512 high = _mm512_loadu_ps(x + 16);
    return _mm512_fmadd_ps(_mm512_permutex2var_ps(low, lanes, high), weight, sum);
  }
};

// The sums of four vectors.
inline __m128 SumFour(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d ab2 = _mm512_castps_pd(ab);
  const __m512d cd2 = _mm512_castps_pd(cd);
  const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// sums[o][r] += the sum of lanes[o][r]; rows of sums are kPermuteRows apart.
template <int kOuts, int kRows>
inline void AddSums(const __m512 (&lanes)[kOuts][kRows], float* sums) {
  alignas(16) float total[4];
  const __m512 zero = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int o = 0; o < kOuts; ++o) {
    const __m512* of = lanes[o];
    _mm_store_ps(total, SumFour(of[0], kRows > 1 ? of[kRows > 1] : zero,
                                kRows > 2 ? of[2 * (kRows > 2)] : zero,
                                kRows > 3 ? of[3 * (kRows > 3)] : zero));
    for (int r = 0; r < kRows; ++r) sums[o * kPermuteRows + r] += total[r];
  }
}

// A block of channels of W and x.
template <typename Step>
struct Block {
  const typename Step::X* x;  // its first row
  int64_t x_stride;
  const typename Step::Value* values;  // its first output
  int64_t values_stride;
  const uint8_t* indices;
  int64_t indices_stride;
  int64_t channels;
  int64_t ahead;  // of the values in use, those to fetch
};

// sums[out][row] += kRows rows of x with kOuts outputs. With kFetch values `ahead` of the ones in
// use are asked for on the way, and the indices of the next kOuts outputs.
template <typename Step, int kRows, int kOuts, bool kFetch>
inline void PermuteBlock(const Block<Step>& block, float* sums) {
  __m512 sum[kOuts][kRows];
#pragma GCC unroll 4
  for (int o = 0; o < kOuts; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[o][r] = _mm512_setzero_ps();
  }
  if (kFetch) {
    for (int o = 0; o < kOuts; ++o) {
      const uint8_t* next = block.indices + (o + kOuts) * block.indices_stride;
      for (int64_t i = 0; i < block.channels / 8; i += kCacheLine) {
        _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T0);
      }
    }
  }
  const int64_t covered = block.channels / Step::kChannels * Step::kChannels;
  for (int64_t channel = 0; channel < covered; channel += Step::kChannels) {
    __m512i lanes[kOuts];
    decltype(Step::Weight(block.values)) weight[kOuts];
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {
      const auto* values = block.values + o * block.values_stride + channel / 2;
      lanes[o] = Step::Lanes(block.indices + o * block.indices_stride + channel / 8);
      weight[o] = Step::Weight(values);
      if (kFetch) {
        _mm_prefetch(reinterpret_cast<const char*>(values + block.ahead), _MM_HINT_T0);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int o = 0; o < kOuts; ++o) {
        sum[o][r] = Step::MultiplyAdd(block.x + r * block.x_stride + channel, lanes[o], weight[o],
                                      sum[o][r]);
      }
    }
  }
  AddSums(sum, sums);
  if (covered < block.channels) {
    for (int o = 0; o < kOuts; ++o) {
      for (int r = 0; r < kRows; ++r) {
        sums[o * kPermuteRows + r] +=
            DotRange(block.x + r * block.x_stride, block.values + o * block.values_stride,
                     block.indices + o * block.indices_stride, covered / 2, block.channels / 2);
      }
    }
  }
}

template <typename Step, int kOuts, bool kFetch>
inline void PermuteRowGroup(const Block<Step>& block, int64_t rows, float* sums) {
  switch (rows) {
    case 1:
      return PermuteBlock<Step, 1, kOuts, kFetch>(block, sums);
    case 2:
      return PermuteBlock<Step, 2, kOuts, kFetch>(block, sums);
    case 3:
      return PermuteBlock<Step, 3, kOuts, kFetch>(block, sums);
    default:
      return PermuteBlock<Step, 4, kOuts, kFetch>(block, sums);
  }
}

// At most kMaxRows rows of x with the outputs [begin, end).
template <typename Step, int64_t kMaxRows>
void PermuteTile(const Product<typename Step::Value>& p, const typename Step::X* x, int64_t row,
                 int64_t rows, int64_t begin, int64_t end) {
  constexpr int64_t kGroups = kMaxRows / kPermuteRows;
  const int64_t groups = (rows + kPermuteRows - 1) / kPermuteRows;
  const int64_t fit = kPermuteBytes / static_cast<int64_t>(sizeof(typename Step::X)) / rows;
  const int64_t block_channels = fit / Step::kChannels * Step::kChannels;
  alignas(64) float sums[kGroups][kPermuteTile * kPermuteRows];
  std::memset(sums, 0, groups * sizeof(sums[0]));
  for (int64_t channel = 0; channel < p.channels; channel += block_channels) {
    Block<Step> block;
    block.x_stride = p.channels;
    block.values_stride = p.kept();
    block.indices_stride = p.index_bytes();
    block.channels = Min(block_channels, p.channels - channel);
    // One row streams W as fast as memory gives it, and a little ahead helps the hardware across
    // the ends of pages (1.1x). Several rows take longer over a block, whose runs are short: there
    // the next block is fetched while this one is computed (1.3x).
    block.ahead = rows == 1 ? kAhead : kPermuteOuts * p.kept();
    for (int64_t out = begin; out < end;) {
      const bool whole = out + kPermuteOuts <= end;
      block.values = p.values + out * p.kept() + channel / 2;
      block.indices = p.indices + out * p.index_bytes() + channel / 8;
      for (int64_t g = 0; g < groups; ++g) {
        block.x = x + (row + g * kPermuteRows) * p.channels + channel;
        const int64_t count = Min(kPermuteRows, rows - g * kPermuteRows);
        float* to = sums[g] + (out - begin) * kPermuteRows;
        if (!whole) {
          PermuteRowGroup<Step, 1, false>(block, count, to);
        } else if (g == 0) {
          PermuteRowGroup<Step, kPermuteOuts, true>(block, count, to);
        } else {
          PermuteRowGroup<Step, kPermuteOuts, false>(block, count, to);
        }
      }
      out += whole ? kPermuteOuts : 1;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t out = begin; out < end; ++out) {
      const float sum = sums[r / kPermuteRows][(out - begin) * kPermuteRows + r % kPermuteRows];
      Narrow(sum, p.y + (row + r) * p.outs + out);
    }
  }
}

// All rows of x, kMaxRows at a time, with the outputs [begin, end).
template <typename Step, int64_t kMaxRows>
void PermuteRun(const Product<typename Step::Value>& p, const typename Step::X* x, int64_t begin,
                int64_t end) {
  for (int64_t out = begin; out < end; out += kPermuteTile) {
    for (int64_t row = 0; row < p.rows; row += kMaxRows) {
      PermuteTile<Step, kMaxRows>(p, x, row, Min(kMaxRows, p.rows - row), out,
                                  Min(out + kPermuteTile, end));
    }
  }
}

}  // namespace
}  // namespace esparse::cpu

#endif  // ESPARSE_FFI_CPU_AVX512_H_
