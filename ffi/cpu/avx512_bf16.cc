// bfloat16 with AVX-512 BF16 and VBMI, where vdpbf16ps runs at the rate of other multiply-adds.
//
// As in avx512.h x is permuted, but in pairs of 16-bit floats: vpermt2w takes what 32 kept values
// need from 64 channels, and vdpbf16ps multiplies and adds them in float with nothing to widen. On
// AMD (Zen 4) this is the fastest way for any number of rows. On Intel (Sapphire Rapids) vdpbf16ps
// runs at a quarter of the rate of vfmadd and vpermt2w at half that of vpermt2ps, so there the
// plain AVX-512 level is the better one: see product.cc.
#include "cpu/avx512.h"

namespace esparse::cpu {
namespace {

struct DotStep {
  using X = Bfloat16;
  using Value = Bfloat16;
  static constexpr int64_t kChannels = 64;

  // The 16-bit words (bits >> 2 j & 3) | 4 (j / 2) for 32 values j. Each byte that vpmultishiftqb
  // makes is eight bits of the word, from the bit that kShift names on; what lies above the two
  // bits of interest, and all of every second byte, is masked away.
  static __m512i Lanes(const uint8_t* indices) {
    alignas(64) static constexpr uint8_t kShift[64] = {
        0,  0, 2,  0, 4,  0, 6,  0, 8,  0, 10, 0, 12, 0, 14, 0, 16, 0, 18, 0, 20, 0,
        22, 0, 24, 0, 26, 0, 28, 0, 30, 0, 32, 0, 34, 0, 36, 0, 38, 0, 40, 0, 42, 0,
        44, 0, 46, 0, 48, 0, 50, 0, 52, 0, 54, 0, 56, 0, 58, 0, 60, 0, 62, 0};
    alignas(64) static constexpr uint16_t kGroup[32] = {0,  0,  4,  4,  8,  8,  12, 12, 16, 16, 20,
                                                        20, 24, 24, 28, 28, 32, 32, 36, 36, 40, 40,
                                                        44, 44, 48, 48, 52, 52, 56, 56, 60, 60};
    int64_t word;
    std::memcpy(&word, indices, sizeof(word));
    const __m512i bits =
        _mm512_multishift_epi64_epi8(_mm512_load_si512(kShift), _mm512_set1_epi64(word));
    return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi16(3), _mm512_load_si512(kGroup), 0xEA);
  }

  static __m512i Weight(const Bfloat16* values) { return _mm512_loadu_si512(values); }

  static __m512 MultiplyAdd(const Bfloat16* x, __m512i lanes, __m512i weight, __m512 sum) {
    const __m512i low = _mm512_loadu_si512(x);
    const __m512i high = _mm512_loadu_si512(x + 32);
    const __m512i chosen = _mm512_permutex2var_epi16(low, lanes, high);
    return _mm512_dpbf16_ps(sum, (__m512bh)chosen, (__m512bh)weight);
  }
};

constexpr int64_t kRowsTogether = 8;

size_t ScratchBytes(int64_t, int64_t) { return 0; }

bool Prepare(const Product<Bfloat16>&, float*, int64_t, int64_t) { return true; }

void Run(const Product<Bfloat16>& p, const float*, int64_t begin, int64_t end) {
  PermuteRun<DotStep, kRowsTogether>(p, p.x, begin, end);
}

}  // namespace

const Method<Bfloat16> kDotBfloat16 = {ScratchBytes, Prepare, Run};

}  // namespace esparse::cpu
