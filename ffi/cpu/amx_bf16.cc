// bfloat16 with AMX: W is expanded tile by tile and multiplied by tiles of x.
//
// yt[out][row] = W[out][channel] * xt[channel][row], by tdpbf16ps:
//
//   W    16 outputs x 32 channels          each row expanded from its 16 kept values (vpexpandw)
//   xt   16 pairs of channels x 16 rows    the two channels of a pair side by side; prepared once
//   yt   16 outputs x 16 rows              float, in the tile registers over all channels
//
// The multiply-adds are those of the dense product; what is saved is reading W. On Sapphire Rapids
// the 576 bytes of a tile of W take 38 ns to come from memory (15 GB/s on one core), expanding it
// takes 13 ns and multiplying it 4.5 ns per 16 rows, and twice that where x comes from the
// second-level cache. Expanding and multiplying use different units of the core and are mixed
// finely: while a panel, kPanel channels of a tile of outputs, is multiplied, the next one is
// expanded row by row. Both panels stay in the first-level cache.
//
// Tried, and no faster for any number of rows up to 512: blocks of channels whose x stays in the
// first-level cache, for which the sums have to leave the registers; two tiles of W by two of x in
// the registers, with a panel of all channels expanded once for 256 rows.
//
// The hardware takes subnormal numbers as zero, in x, in W and in y, as it does in vdpbf16ps and in
// XLA's own dot on such a processor. An expanded zero times Inf or NaN would be NaN in outputs that
// do not keep that channel: Prepare looks for them and leaves such an x to another method.
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/scalar.h"

namespace esparse::cpu {
namespace {

constexpr int64_t kTile = 16;                     // outputs, rows, and pairs of channels
constexpr int64_t kStep = 2 * kTile;              // channels
constexpr int64_t kTileValues = kTile * kStep;    // in a tile of W or x: 1 KB
constexpr int64_t kLine = 64;                     // bytes of a tile's row, and of a cache line
constexpr int64_t kSteps = 8;                     // of a panel
constexpr int64_t kPanel = kSteps * kStep;        // channels
constexpr int64_t kRowsPerStep = kTile / kSteps;  // of the next panel, expanded during a step
constexpr int kPanelsAhead = 3;                   // of the next panel, the one to fetch
constexpr int64_t kRowGroup = 4 * kTile;          // rows multiplied by a tile of W at once
constexpr int64_t kOutGroup = 20 * kTile;         // outputs that meet all row groups in turn

struct Panel {
  alignas(kLine) Bfloat16 tiles[kSteps][kTile][kStep];
};

struct Sums {
  alignas(kLine) float tile[kTile][kTile];  // [out][row]
};

inline int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The compiler does not know that tiles, and their configuration, are loaded from memory: this says
// that what was stored there is needed.
inline void UsedByTiles(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// The tile registers of this thread, all of 16 rows of 64 bytes. They are given back at the end:
// XLA's own kernels use them on the same threads.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = kLine;
      config.rows[i] = kTile;
    }
    UsedByTiles(&config);
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// ---- x: [row group][step][row tile][pair of channels][row][2], rows and channels filled up with 0

size_t ScratchBytes(int64_t rows, int64_t channels) {
  return RoundUp(rows, kTile) * RoundUp(channels, kStep) * sizeof(Bfloat16);
}

// to[c][r] = from[r][c] for 16 rows of 16 words.
inline void Transpose16(const __m512i (&from)[16], __m512i (&to)[16]) {
  __m512i twos[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // 128-bit lane l of fours[i + c]: column 4 l + c
    fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i low02 = _mm512_shuffle_i32x4(fours[c], fours[c + 4], 0x88);
    const __m512i low13 = _mm512_shuffle_i32x4(fours[c], fours[c + 4], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(fours[c + 8], fours[c + 12], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(fours[c + 8], fours[c + 12], 0xdd);
    to[c] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    to[c + 4] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    to[c + 8] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
    to[c + 12] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
}

bool Prepare(const Product<Bfloat16>& p, float* scratch, int64_t begin, int64_t end) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t group = 0; group < p.rows; group += kRowGroup) {
    const int64_t group_rows = Min(kRowGroup, p.rows - group);
    const int64_t tiles = (group_rows + kTile - 1) / kTile;
    Bfloat16* xt = reinterpret_cast<Bfloat16*>(scratch) + group * RoundUp(p.channels, kStep);
    for (int64_t channel = begin; channel < end; channel += kStep) {
      const __mmask32 has = static_cast<__mmask32>((1ull << Min(kStep, end - channel)) - 1);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t rows = Min(kTile, group_rows - tile * kTile);
        const Bfloat16* x = p.x + (group + tile * kTile) * p.channels + channel;
        __m512i row[16], pair[16];
        for (int64_t r = 0; r < kTile; ++r) {
          row[r] =
              r < rows ? _mm512_maskz_loadu_epi16(has, x + r * p.channels) : _mm512_setzero_si512();
          largest = _mm512_max_epu16(largest, _mm512_and_si512(row[r], magnitude));
        }
        Transpose16(row, pair);
        Bfloat16* to = xt + (channel / kStep * tiles + tile) * kTileValues;
        for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + i * kStep, pair[i]);
      }
    }
  }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
}

// ---- W

// Index bytes of 256 channels -> one bit a channel, set where it is kept.
inline __m256i KeptBits(__m256i indices) {
  // By the nibble second << 2 | first; 0, which fills up what lies behind the end, keeps nothing.
  const __m256i low = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, 0, 0, 0b0011, 0, 0, 0, 0b0101, 0b0110, 0, 0, 0b1001, 0b1010, 0b1100, 0));
  const __m256i high = _mm256_slli_epi16(low, 4);
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  return _mm256_or_si256(
      _mm256_shuffle_epi8(low, _mm256_and_si256(indices, nibble)),
      _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(indices, 4), nibble)));
}

// At most kPanel channels of one output, 32 of them into each tile of a panel; `to` is its row in
// the first one.
inline void ExpandRow(const Bfloat16* values, const uint8_t* indices, int64_t channels,
                      Bfloat16* to) {
  alignas(32) __mmask32 kept[kSteps];
  if (channels == kPanel) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
    _mm256_store_si256(reinterpret_cast<__m256i*>(kept), KeptBits(bytes));
#pragma GCC unroll 8
    for (int64_t s = 0; s < kSteps; ++s) {
      const __m256i* from = reinterpret_cast<const __m256i*>(values + s * kTile);
      const __m512i sixteen = _mm512_castsi256_si512(_mm256_loadu_si256(from));
      _mm512_store_si512(to + s * kTileValues, _mm512_maskz_expand_epi16(kept[s], sixteen));
    }
    return;
  }
  const __mmask32 has_bytes = static_cast<__mmask32>((1ull << (channels + 7) / 8) - 1);
  const __m256i bytes = _mm256_maskz_loadu_epi8(has_bytes, indices);
  _mm256_store_si256(reinterpret_cast<__m256i*>(kept), KeptBits(bytes));
  for (int64_t s = 0; s * kStep < channels; ++s) {
    const __mmask16 has = static_cast<__mmask16>((1u << Min(kTile, channels / 2 - s * kTile)) - 1);
    const __m512i sixteen =
        _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(has, values + s * kTile));
    _mm512_store_si512(to + s * kTileValues, _mm512_maskz_expand_epi16(kept[s], sixteen));
  }
}

// Asks for kPanel channels of one output. The hardware runs ahead by itself, but not across the
// ends of rows: this is worth 1.1x with few rows of x, where W is all that counts. These are hints:
// they may point behind the arrays.
inline void FetchRow(const Bfloat16* values, const uint8_t* indices) {
  for (int64_t i = 0; i < kPanel / 2; i += kLine / 2) {
    _mm_prefetch(reinterpret_cast<const char*>(values + i), _MM_HINT_T0);
  }
  _mm_prefetch(reinterpret_cast<const char*>(indices), _MM_HINT_T0);
}

// ---- tile registers 0 to 3: the sums of one tile of outputs with kTiles tiles of rows

template <int kTiles>
inline void ClearSums() {
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  if constexpr (kTiles > 3) _tile_zero(3);
}

template <int kTiles>
inline void StoreSums(Sums* sums) {
  _tile_stored(0, &sums[0], kLine);
  if constexpr (kTiles > 1) _tile_stored(1, &sums[1], kLine);
  if constexpr (kTiles > 2) _tile_stored(2, &sums[2], kLine);
  if constexpr (kTiles > 3) _tile_stored(3, &sums[3], kLine);
}

// x is read with the hint that it passes by: the panels are to stay in the first-level cache.
template <int kTiles>
inline void Multiply(const Bfloat16 (&w)[kTile][kStep], const Bfloat16* x) {
  _tile_loadd(4, w, kLine);
  _tile_stream_loadd(5, x, kLine);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (kTiles > 1) {
    _tile_stream_loadd(6, x + kTileValues, kLine);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (kTiles > 2) {
    _tile_stream_loadd(7, x + 2 * kTileValues, kLine);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (kTiles > 3) {
    _tile_stream_loadd(5, x + 3 * kTileValues, kLine);
    _tile_dpbf16ps(3, 4, 5);
  }
}

// y[row][out] of one tile of sums.
inline void WriteTile(const Sums& sums, Bfloat16* y, int64_t stride, int64_t rows, int64_t outs) {
  // Two outputs side by side in each word; then a transposition of 8 words by 16 rows.
  alignas(kLine) static constexpr uint16_t kInTurn[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i pair[8], twos[8], fours[8];
  for (int i = 0; i < 8; ++i) {
    const __m512bh both =
        _mm512_cvtne2ps_pbh(_mm512_load_ps(sums.tile[2 * i + 1]), _mm512_load_ps(sums.tile[2 * i]));
    pair[i] = _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), (__m512i)both);
  }
  for (int i = 0; i < 8; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(pair[i], pair[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(pair[i], pair[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // 128-bit lane l of fours[i + r]: row 4 l + r
    fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
  }
  alignas(kLine) Bfloat16 turned[4][4][2][8];  // [r][l][half of the outputs]
  for (int r = 0; r < 4; ++r) {
    // Lanes of the two halves in turn: 0 0 1 1 and 2 2 3 3.
    const __m512i front = _mm512_shuffle_i32x4(fours[r], fours[r + 4], 0x44);
    const __m512i back = _mm512_shuffle_i32x4(fours[r], fours[r + 4], 0xee);
    _mm512_store_si512(turned[r][0], _mm512_shuffle_i32x4(front, front, 0xd8));
    _mm512_store_si512(turned[r][2], _mm512_shuffle_i32x4(back, back, 0xd8));
  }
  const __mmask16 has = static_cast<__mmask16>((1u << outs) - 1);
  for (int64_t row = 0; row < rows; ++row) {
    const __m256i sixteen =
        _mm256_load_si256(reinterpret_cast<const __m256i*>(turned[row % 4][row / 4]));
    _mm256_mask_storeu_epi16(y + row * stride, has, sixteen);
  }
}

// A panel's place in W: the first of its outputs and channels.
struct Place {
  int64_t out;
  int64_t channel;

  Place Next(int64_t channels) const {
    return channel + kPanel < channels ? Place{out, channel + kPanel} : Place{out + kTile, 0};
  }
};

// At most kTiles tiles of rows from `group` on, whose x is xt, with the outputs [begin, end).
template <int kTiles>
void MultiplyRows(const Product<Bfloat16>& p, const Bfloat16* xt, int64_t group, int64_t begin,
                  int64_t end) {
  Panel panels[2];
  Sums sums[kTiles];
  const auto values = [&](Place at, int64_t row) {
    return p.values + (at.out + row) * p.kept() + at.channel / 2;
  };
  const auto indices = [&](Place at, int64_t row) {
    return p.indices + (at.out + row) * p.index_bytes() + at.channel / 8;
  };
  // Rows that do not exist are left as they are: each row of a tile makes its own row of sums.
  const auto expand = [&](Place at, int64_t row, Panel& panel) {
    if (at.out + row >= end) return;
    ExpandRow(values(at, row), indices(at, row), Min(kPanel, p.channels - at.channel),
              panel.tiles[0][row]);
  };
  Place at{begin, 0};
  for (int64_t row = 0; row < kTile; ++row) expand(at, row, panels[0]);
  Place next = at.Next(p.channels);
  Place fetched = next;
  for (int i = 0; i < kPanelsAhead; ++i) fetched = fetched.Next(p.channels);
  for (int now = 0; at.out < end; now ^= 1) {
    if (at.channel == 0) ClearSums<kTiles>();
    const int64_t steps = (Min(kPanel, p.channels - at.channel) + kStep - 1) / kStep;
    const Bfloat16* x = xt + at.channel / kStep * kTiles * kTileValues;
    for (int64_t s = 0; s < kSteps; ++s) {
#pragma GCC unroll 2
      for (int64_t row = s * kRowsPerStep; row < (s + 1) * kRowsPerStep; ++row) {
        expand(next, row, panels[now ^ 1]);
        FetchRow(values(fetched, row), indices(fetched, row));
      }
      UsedByTiles(panels);
      if (s < steps) Multiply<kTiles>(panels[now].tiles[s], x + s * kTiles * kTileValues);
    }
    if (next.channel == 0) {
      StoreSums<kTiles>(sums);
      for (int64_t tile = 0; tile < kTiles; ++tile) {
        const int64_t row = group + tile * kTile;
        WriteTile(sums[tile], p.y + row * p.outs + at.out, p.outs, Min(kTile, p.rows - row),
                  Min(kTile, end - at.out));
      }
    }
    at = next;
    next = next.Next(p.channels);
    fetched = fetched.Next(p.channels);
  }
}

void Run(const Product<Bfloat16>& p, const float* scratch, int64_t begin, int64_t end) {
  const TileRegisters registers;
  // With many rows, outputs stay in the second-level cache while all groups of rows pass by.
  const int64_t groups = (end - begin + kOutGroup - 1) / kOutGroup;
  const int64_t outs = RoundUp((end - begin + groups - 1) / groups, kTile);
  for (int64_t out = begin; out < end; out += outs) {
    const int64_t stop = Min(out + outs, end);
    for (int64_t group = 0; group < p.rows; group += kRowGroup) {
      const Bfloat16* xt =
          reinterpret_cast<const Bfloat16*>(scratch) + group * RoundUp(p.channels, kStep);
      switch (RoundUp(Min(kRowGroup, p.rows - group), kTile) / kTile) {
        case 1:
          MultiplyRows<1>(p, xt, group, out, stop);
          break;
        case 2:
          MultiplyRows<2>(p, xt, group, out, stop);
          break;
        case 3:
          MultiplyRows<3>(p, xt, group, out, stop);
          break;
        default:
          MultiplyRows<4>(p, xt, group, out, stop);
      }
    }
  }
}

}  // namespace

const Method<Bfloat16> kTileBfloat16 = {ScratchBytes, Prepare, Run};

}  // namespace esparse::cpu
