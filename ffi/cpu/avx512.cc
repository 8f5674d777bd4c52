// The product with AVX-512 (F, BW, DQ, VL): a few rows by permuting x, more by lanes.
#define ESPARSE_LANES 16
#include "cpu/avx512.h"

#include "cpu/lanes.h"

namespace esparse::cpu {
namespace {

constexpr int64_t kFewRows = 16;

// x as float: itself, or its widened copy.
inline const float* WideX(const Product<float>& p, const float*) { return p.x; }
template <typename T>
inline const float* WideX(const Product<T>&, const float* scratch) {
  return scratch;
}

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
  PermuteRun<WideStep<T>, kFewRows>(p, WideX(p, scratch), begin, end);
}

template <typename T>
constexpr Method<T> kMethod = {ScratchBytes<T>, Prepare<T>, Run<T>};

}  // namespace

const Level kAvx512 = {"avx512", kMethod<float>, kMethod<Bfloat16>, kMethod<Float16>};

}  // namespace esparse::cpu
