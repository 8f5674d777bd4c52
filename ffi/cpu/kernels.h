// The 2:4 product on the CPU: what a kernel is given, and the table of one instruction-set level.
//
// y[row, out] = x[row, channel] * W[out, channel]^T, with W as in esparse_jax/sparse/compress.py:
//
//   channels   c0 c1 c2 c3 | c4 c5 c6 c7        index byte   7  6   5  4   3  2   1  0
//   kept          v0 v1    |    v2 v3                        [ v3 ] [ v2 ] [ v1 ] [ v0 ]
//
// Kept value j of a row has its 2-bit position at bits 2j and 2j+1 of the row's index bytes (little
// endian) and stands at channel 4 * (j / 2) + position. Every kernel rests on that.
//
// Each level is a source file of its own, compiled for that level only and reached through its
// table. Those files use no templates of the standard library: an inline function compiled there
// for AVX-512 could be the copy the linker keeps for the whole program.
#ifndef ESPARSE_FFI_CPU_KERNELS_H_
#define ESPARSE_FFI_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace esparse::cpu {

// The storage of 16-bit floats; the kernels widen them to float.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// One product. All matrices are row-major and dense.
template <typename T>
struct Product {
  const T* x;              // [rows, channels]
  const T* values;         // [outs, channels / 2]
  const uint8_t* indices;  // [outs, ceil(channels / 8)]
  T* y;                    // [rows, outs]
  int64_t rows;
  int64_t outs;
  int64_t channels;  // a multiple of 4

  int64_t kept() const { return channels / 2; }
  int64_t index_bytes() const { return (channels + 7) / 8; }
};

// How one level computes one dtype: `prepare` brings x into the order the kernels read, then `run`
// computes a range of outputs. Both may be called from several threads at once, on ranges that do
// not overlap.
template <typename T>
struct Method {
  // Bytes of scratch that hold the prepared x; 0 where x is read as it is, and nothing prepared.
  size_t (*scratch_bytes)(int64_t rows, int64_t channels);
  // Prepares the channels [begin, end); begin is a multiple of kChannelBlock. False if they hold
  // what `run` cannot multiply: then the product is for another method.
  bool (*prepare)(const Product<T>& product, float* scratch, int64_t begin, int64_t end);
  // Computes all rows of the outputs [begin, end).
  void (*run)(const Product<T>& product, const float* scratch, int64_t begin, int64_t end);
};

constexpr int64_t kChannelBlock = 64;  // what `prepare` is divided by
constexpr int64_t kOutBlock = 32;      // what `run` is best divided by
constexpr size_t kAlignment = 64;      // of the scratch

struct Level {
  const char* name;
  Method<float> float32;
  Method<Bfloat16> bfloat16;
  Method<Float16> float16;
};

extern const Level kPortable;
#if defined(ESPARSE_X86)
extern const Level kAvx2;
extern const Level kAvx512;
extern const Method<Bfloat16> kDotBfloat16;   // AVX-512 BF16 and VBMI
extern const Method<Bfloat16> kTileBfloat16;  // AMX, and AVX-512 BF16 and VBMI2
#endif

}  // namespace esparse::cpu

#endif  // ESPARSE_FFI_CPU_KERNELS_H_
