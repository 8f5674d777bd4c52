// The product with AVX2, FMA and F16C.
#include <immintrin.h>

#define ESPARSE_LANES 8
#include "cpu/lanes.h"

namespace esparse::cpu {
namespace {

// A row of x at a time. vpermilps picks one of the four floats of a 128-bit lane by the low two
// bits of a control word and ignores the others: a lane is a group, the shifted index bits are the
// control, and no mask or group offset is needed. Sixteen kept values, 32 channels, at a time; two
// vectors of x hold the groups whose values share one vector of kept values:
//
//   kept     v0 v1 v2 v3 | v4 v5 v6 v7      groups  0 0 1 1 | 2 2 3 3
//   even     groups 0 and 2                 odd     groups 1 and 3
inline __m256 Pick(__m256 even, __m256 odd, __m256i control) {
  return _mm256_blend_ps(_mm256_permutevar_ps(even, control), _mm256_permutevar_ps(odd, control),
                         0b11001100);
}

inline void LoadKept(const float* values, __m256* low, __m256* high) {
  *low = _mm256_loadu_ps(values);
  *high = _mm256_loadu_ps(values + 8);
}

inline void LoadKept(const Bfloat16* values, __m256* low, __m256* high) {
  const __m256i* from = reinterpret_cast<const __m256i*>(values);
  const __m256i sixteen = _mm256_loadu_si256(from);
  const __m256i wide_low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sixteen));
  const __m256i wide_high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sixteen, 1));
  *low = _mm256_castsi256_ps(_mm256_slli_epi32(wide_low, 16));
  *high = _mm256_castsi256_ps(_mm256_slli_epi32(wide_high, 16));
}

inline void LoadKept(const Float16* values, __m256* low, __m256* high) {
  const __m128i* from = reinterpret_cast<const __m128i*>(values);
  *low = _mm256_cvtph_ps(_mm_loadu_si128(from));
  *high = _mm256_cvtph_ps(_mm_loadu_si128(from + 1));
}

template <int kOuts, typename T>
inline void OneRowOuts(const Product<T>& p, const float* x, int64_t row, int64_t out) {
  const __m256i low_shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i high_shift = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
  const int64_t covered = p.channels / 32 * 32;
  const T* values = p.values + out * p.kept();
  const uint8_t* indices = p.indices + out * p.index_bytes();
  x += row * p.channels;
  __m256 sum[kOuts];
  for (int o = 0; o < kOuts; ++o) sum[o] = _mm256_setzero_ps();
  for (int64_t channel = 0; channel < covered; channel += 32) {
    const __m256 x01 = _mm256_loadu_ps(x + channel);
    const __m256 x23 = _mm256_loadu_ps(x + channel + 8);
    const __m256 x45 = _mm256_loadu_ps(x + channel + 16);
    const __m256 x67 = _mm256_loadu_ps(x + channel + 24);
    const __m256 x02 = _mm256_permute2f128_ps(x01, x23, 0x20);
    const __m256 x13 = _mm256_permute2f128_ps(x01, x23, 0x31);
    const __m256 x46 = _mm256_permute2f128_ps(x45, x67, 0x20);
    const __m256 x57 = _mm256_permute2f128_ps(x45, x67, 0x31);
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {
      int32_t word;
      std::memcpy(&word, indices + o * p.index_bytes() + channel / 8, sizeof(word));
      const __m256i bits = _mm256_set1_epi32(word);
      __m256 low, high;
      LoadKept(values + o * p.kept() + channel / 2, &low, &high);
      sum[o] = _mm256_fmadd_ps(Pick(x02, x13, _mm256_srlv_epi32(bits, low_shift)), low, sum[o]);
      sum[o] = _mm256_fmadd_ps(Pick(x46, x57, _mm256_srlv_epi32(bits, high_shift)), high, sum[o]);
    }
  }
  for (int o = 0; o < kOuts; ++o) {
    __m128 total = _mm_add_ps(_mm256_castps256_ps128(sum[o]), _mm256_extractf128_ps(sum[o], 1));
    total = _mm_add_ps(total, _mm_movehl_ps(total, total));
    total = _mm_add_ss(total, _mm_movehdup_ps(total));
    const float tail =
        DotRange(x, values + o * p.kept(), indices + o * p.index_bytes(), covered / 2, p.kept());
    Narrow(_mm_cvtss_f32(total) + tail, p.y + row * p.outs + out + o);
  }
}

// x as float: itself, or its widened copy.
inline const float* WideX(const Product<float>& p, const float*) { return p.x; }
template <typename T>
inline const float* WideX(const Product<T>&, const float* scratch) {
  return scratch;
}

constexpr int64_t kFewRows = 3;  // one after the other, while their rows of W are in the cache

template <typename T>
size_t ScratchBytes(int64_t rows, int64_t channels) {
  if (rows > kFewRows) return LanesScratchBytes(rows, channels);
  return sizeof(T) == sizeof(float) ? 0 : rows * channels * sizeof(float);
}

template <typename T>
bool Prepare(const Product<T>& p, float* scratch, int64_t begin, int64_t end) {
  if (p.rows > kFewRows) return LanesPrepare(p, scratch, begin, end);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t from = row * p.channels + begin;
    WidenMany(p.x + from, scratch + from, end - begin);
  }
  return true;
}

template <typename T>
void Run(const Product<T>& p, const float* scratch, int64_t begin, int64_t end) {
  if (p.rows > kFewRows) return LanesRun(p, scratch, begin, end);
  const float* x = WideX(p, scratch);
  int64_t out = begin;
  for (; out + 4 <= end; out += 4) {
    for (int64_t row = 0; row < p.rows; ++row) OneRowOuts<4>(p, x, row, out);
  }
  for (; out < end; ++out) {
    for (int64_t row = 0; row < p.rows; ++row) OneRowOuts<1>(p, x, row, out);
  }
}

template <typename T>
constexpr Method<T> kMethod = {ScratchBytes<T>, Prepare<T>, Run<T>};

}  // namespace

const Level kAvx2 = {"avx2", kMethod<float>, kMethod<Bfloat16>, kMethod<Float16>};

}  // namespace esparse::cpu
