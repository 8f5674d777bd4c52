// Plain scalar pieces of the kernels: 16-bit floats, and the ends of rows no vector covers.
// Included by each level's source; everything has internal linkage (see kernels.h).
#ifndef ESPARSE_FFI_CPU_SCALAR_H_
#define ESPARSE_FFI_CPU_SCALAR_H_

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace esparse::cpu {
namespace {

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float Widen(float value) { return value; }

inline float Widen(Bfloat16 value) { return FloatOf(static_cast<uint32_t>(value.bits) << 16); }

inline float Widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t rest = value.bits & 0x7fff;
  if (rest < 0x0400) return FloatOf(sign | BitsOf(static_cast<float>(rest) * 0x1p-24f));
  if (rest >= 0x7c00) return FloatOf(sign | 0x7f800000 | rest << 13);
  return FloatOf(sign | ((rest << 13) + (112u << 23)));
}

// To the nearest, ties to even.
inline void Narrow(float value, float* to) { *to = value; }

inline void Narrow(float value, Bfloat16* to) {
  const uint32_t bits = BitsOf(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits =
      static_cast<uint16_t>(nan ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void Narrow(float value, Float16* to) {
  const uint32_t sign = BitsOf(value) >> 16 & 0x8000;
  uint32_t bits = BitsOf(value) & 0x7fffffff;
  if (bits > 0x7f800000) {
    bits = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520, half way between the largest half and 65536
    bits = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14 a half is a multiple of 2^-24, like a float at 0.5
    bits = BitsOf(FloatOf(bits) + 0.5f) - BitsOf(0.5f);
  } else {
    bits = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | bits);
}

// The channel of kept value j, from the index bytes of its row.
inline int64_t ChannelOf(const uint8_t* indices, int64_t j) {
  return j / 2 * 4 + (indices[j / 4] >> (j % 4 * 2) & 3);
}

// One row of x with the kept values [begin, end) of one row of W.
template <typename T, typename X>
inline float DotRange(const X* x, const T* values, const uint8_t* indices, int64_t begin,
                      int64_t end) {
  float sum = 0;
  for (int64_t j = begin; j < end; ++j) {
    sum += Widen(values[j]) * Widen(x[ChannelOf(indices, j)]);
  }
  return sum;
}

}  // namespace
}  // namespace esparse::cpu

#endif  // ESPARSE_FFI_CPU_SCALAR_H_
