// The product for any processor: vectors of four floats in the compiler's own notation (SSE2,
// NEON).
#define ESPARSE_LANES 4
#include "cpu/lanes.h"

namespace esparse::cpu {
namespace {

// One row of x: the lanes are four neighbouring groups. xs[position][group] holds x by its position
// in the group, so a kept value is chosen by two of the four bits of its group's nibble. Sorted
// positions need few choices: the first is 0, 1 or 2, the second 1, 2 or 3.
typedef uint32_t Word __attribute__((vector_size(16)));

inline size_t OneRowScratchBytes(int64_t channels) { return channels * sizeof(float); }

template <typename T>
bool OneRowPrepare(const Product<T>& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t groups = p.channels / 4;
  for (int64_t g = begin / 4; g < end / 4; ++g) {
    for (int64_t position = 0; position < 4; ++position) {
      scratch[position * groups + g] = Widen(p.x[4 * g + position]);
    }
  }
  return true;
}

inline Vector LoadVector(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Eight kept values of four groups, as those in first and those in second place.
inline void LoadKept(const float* values, Vector* first, Vector* second) {
  const Vector low = LoadVector(values);
  const Vector high = LoadVector(values + 4);
  *first = __builtin_shufflevector(low, high, 0, 2, 4, 6);
  *second = __builtin_shufflevector(low, high, 1, 3, 5, 7);
}

inline void LoadKept(const Bfloat16* values, Vector* first, Vector* second) {
  Word pairs;
  std::memcpy(&pairs, values, sizeof(pairs));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "the index bits and pairs of kept values are read as little-endian words"
#endif
  *first = reinterpret_cast<Vector>(pairs << 16);
  *second = reinterpret_cast<Vector>(pairs & 0xffff0000u);
}

inline void LoadKept(const Float16* values, Vector* first, Vector* second) {
  float wide[8];
  for (int i = 0; i < 8; ++i) wide[i] = Widen(values[i]);
  LoadKept(wide, first, second);
}

inline Vector Choose(Word mask, Vector yes, Vector no) {
  return reinterpret_cast<Vector>((mask & reinterpret_cast<Word>(yes)) |
                                  (~mask & reinterpret_cast<Word>(no)));
}

inline Word AllBits(Word value, Word bit) { return reinterpret_cast<Word>((value & bit) == bit); }

template <int kOuts, typename T>
inline void OneRowOuts(const Product<T>& p, const float* xs, int64_t out) {
  constexpr Word kBit0 = {1, 1u << 4, 1u << 8, 1u << 12};
  const int64_t groups = p.channels / 4;
  const int64_t covered = p.channels / 16 * 16;
  Vector sum[kOuts] = {};
  for (int64_t channel = 0; channel < covered; channel += 16) {
    const float* x = xs + channel / 4;
    const Vector x0 = LoadVector(x);
    const Vector x1 = LoadVector(x + groups);
    const Vector x2 = LoadVector(x + 2 * groups);
    const Vector x3 = LoadVector(x + 3 * groups);
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {
      uint16_t nibbles;
      std::memcpy(&nibbles, p.indices + (out + o) * p.index_bytes() + channel / 8, 2);
      const Word bits = Word{} + nibbles;
      Vector first, second;
      LoadKept(p.values + (out + o) * p.kept() + channel / 2, &first, &second);
      const Vector chosen_first =
          Choose(AllBits(bits, kBit0 << 1), x2, Choose(AllBits(bits, kBit0), x1, x0));
      const Vector chosen_second =
          Choose(AllBits(bits, kBit0 << 3), Choose(AllBits(bits, kBit0 << 2), x3, x2), x1);
      sum[o] += chosen_first * first;
      sum[o] += chosen_second * second;
    }
  }
  for (int o = 0; o < kOuts; ++o) {
    const float tail = DotRange(p.x, p.values + (out + o) * p.kept(),
                                p.indices + (out + o) * p.index_bytes(), covered / 2, p.kept());
    Narrow(sum[o][0] + sum[o][1] + sum[o][2] + sum[o][3] + tail, p.y + out + o);
  }
}

template <typename T>
size_t ScratchBytes(int64_t rows, int64_t channels) {
  return rows == 1 ? OneRowScratchBytes(channels) : LanesScratchBytes(rows, channels);
}

template <typename T>
bool Prepare(const Product<T>& p, float* scratch, int64_t begin, int64_t end) {
  return p.rows == 1 ? OneRowPrepare(p, scratch, begin, end) : LanesPrepare(p, scratch, begin, end);
}

template <typename T>
void Run(const Product<T>& p, const float* scratch, int64_t begin, int64_t end) {
  if (p.rows > 1) return LanesRun(p, scratch, begin, end);
  int64_t out = begin;
  for (; out + 4 <= end; out += 4) OneRowOuts<4>(p, scratch, out);
  for (; out < end; ++out) OneRowOuts<1>(p, scratch, out);
}

template <typename T>
constexpr Method<T> kMethod = {ScratchBytes<T>, Prepare<T>, Run<T>};

}  // namespace

const Level kPortable = {"portable", kMethod<float>, kMethod<Bfloat16>, kMethod<Float16>};

}  // namespace esparse::cpu
