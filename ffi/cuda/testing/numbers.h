// What the host lacks of a GPU's numbers: the other 16-bit format, and its way to pick bytes.
#ifndef ESPARSE_FFI_CUDA_TESTING_NUMBERS_H_
#define ESPARSE_FFI_CUDA_TESTING_NUMBERS_H_

#include <cstdint>
#include <cstring>

namespace esparse::cuda {

// Rounds to the nearest, ties to even; NaN is not asked for.
struct Bfloat16 {
  uint16_t bits;

  Bfloat16() = default;
  explicit Bfloat16(float x) {
    uint32_t all;
    std::memcpy(&all, &x, sizeof(all));
    bits = static_cast<uint16_t>((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t all = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &all, sizeof(x));
    return x;
  }
};

// Byte i of the result is the one of `high` and `low` that hexadecimal digit i of `which` counts
// from the lowest on (__byte_perm).
inline uint32_t PickBytes(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = uint64_t{high} << 32 | low;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    bytes |= static_cast<uint32_t>(both >> ((which >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  }
  return bytes;
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_TESTING_NUMBERS_H_
