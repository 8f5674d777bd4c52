// Many rows of x: the lanes of a vector are rows.
//
// x is turned once into xt[channel][row], in blocks of rows. A kept value is then one broadcast and
// one multiply-add per vector of rows, whose memory operand the position addresses:
//
//   yt[out][row...] += value * xt[4 * group + position][row...]
//
// Nothing is permuted, and half of the dense product's multiply-adds are left: with four vectors of
// rows five loads feed four of them, so a processor with two loads and two multiply-adds a cycle
// runs at 4/5 of its peak on half the work. Channels are cut into blocks whose part of xt stays in
// the first-level cache, outputs into tiles whose part of W stays in the second.
//
// Included by each level's source after it has defined ESPARSE_LANES, the floats in a vector;
// everything has internal linkage (see kernels.h).
#ifndef ESPARSE_FFI_CPU_LANES_H_
#define ESPARSE_FFI_CPU_LANES_H_

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/scalar.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace esparse::cpu {
namespace {

constexpr int64_t kLanes = ESPARSE_LANES;
constexpr int64_t kVectors = 4;                       // at most, in a block of rows
constexpr int64_t kRowBlock = kLanes * kVectors;      // rows in a full block
constexpr int64_t kOutTile = 32;                      // outputs whose sums wait for more channels
constexpr int64_t kXtFloats = 6144;                   // xt's part in the first-level cache: 24 KB
constexpr int64_t kMaxChannels = kXtFloats / kLanes;  // in a block of channels
constexpr int kPanelOuts = 4;                         // outputs multiplied together

typedef float Vector __attribute__((vector_size(4 * ESPARSE_LANES), may_alias));

inline int64_t RoundUpToLanes(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

inline void WidenMany(const float* from, float* to, int64_t count) {
  std::memcpy(to, from, count * sizeof(float));
}

inline void WidenMany(const Bfloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Widen(from[i]);
}

inline void WidenMany(const Float16* from, float* to, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < count; ++i) to[i] = Widen(from[i]);
}

// Every block of rows but the last is full; the last has as many vectors as it needs.
inline size_t LanesScratchBytes(int64_t rows, int64_t channels) {
  return static_cast<size_t>(RoundUpToLanes(rows)) * channels * sizeof(float);
}

typedef float Quad __attribute__((vector_size(16), may_alias));

// to[c][r] = from[r][c] for four rows of four; rows are `from_stride` and `to_stride` floats apart.
inline void Transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Quad row[4];
  for (int r = 0; r < 4; ++r) std::memcpy(&row[r], from + r * from_stride, sizeof(Quad));
  const Quad low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Quad low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Quad high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Quad column[4] = {
      __builtin_shufflevector(low01, low23, 0, 1, 4, 5),
      __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
      __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
      __builtin_shufflevector(high01, high23, 2, 3, 6, 7),
  };
  for (int c = 0; c < 4; ++c) std::memcpy(to + c * to_stride, &column[c], sizeof(Quad));
}

template <typename T>
inline bool LanesPrepare(const Product<T>& p, float* scratch, int64_t begin, int64_t end) {
  constexpr int64_t kStrip = 64;  // channels read from a row at a time
  for (int64_t row = 0; row < p.rows; row += kRowBlock) {
    const int64_t rows = Min(kRowBlock, p.rows - row);
    const int64_t width = RoundUpToLanes(rows);
    float* xt = scratch + row * p.channels;
    for (int64_t strip = begin; strip < end; strip += kStrip) {
      const int64_t count = Min(kStrip, end - strip);  // a multiple of 4, as channels are
      for (int64_t r = 0; r < width; r += 4) {
        float wide[4][kStrip] = {};  // rows that do not exist are zero
        for (int64_t i = 0; i < Min(4, rows - r); ++i) {
          WidenMany(p.x + (row + r + i) * p.channels + strip, wide[i], count);
        }
        for (int64_t c = 0; c < count; c += 4) {
          Transpose4(wide[0] + c, kStrip, xt + (strip + c) * width + r, width);
        }
      }
    }
  }
  return true;
}

// A block of channels of kOuts rows of W, widened and laid side by side.
template <int kOuts>
struct Panel {
  alignas(64) float values[kOuts][kMaxChannels / 2];
  uint8_t indices[kOuts][kMaxChannels / 8];
};

// yt[kOuts][kV vectors] += the panel times `channels` channels of xt.
template <int kV, int kOuts>
inline void MultiplyPanel(const Panel<kOuts>& panel, const float* xt, int64_t channels, float* yt) {
  constexpr int64_t kWidth = kV * kLanes;
  Vector sum[kOuts][kV];
  for (int o = 0; o < kOuts; ++o) {
    for (int v = 0; v < kV; ++v) {
      sum[o][v] = *reinterpret_cast<const Vector*>(yt + o * kWidth + v * kLanes);
    }
  }
  const int64_t bytes = channels / 8;
  for (int64_t i = 0; i < bytes; ++i) {
    const float* two_groups = xt + i * 8 * kWidth;
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {  // unrolled, so that the sums are registers
      const uint32_t byte = panel.indices[o][i];
      const float* channel[4] = {
          two_groups + (byte & 3) * kWidth,
          two_groups + (byte >> 2 & 3) * kWidth,
          two_groups + (4 + (byte >> 4 & 3)) * kWidth,
          two_groups + (4 + (byte >> 6)) * kWidth,
      };
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const float value = panel.values[o][4 * i + j];
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) {
          sum[o][v] += *reinterpret_cast<const Vector*>(channel[j] + v * kLanes) * value;
        }
      }
    }
  }
  if (channels % 8 != 0) {  // the row ends in the low nibble of its last byte
    for (int o = 0; o < kOuts; ++o) {
      for (int64_t j = 4 * bytes; j < 4 * bytes + 2; ++j) {
        const float* channel = xt + ChannelOf(panel.indices[o], j) * kWidth;
        for (int v = 0; v < kV; ++v) {
          sum[o][v] += *reinterpret_cast<const Vector*>(channel + v * kLanes) * panel.values[o][j];
        }
      }
    }
  }
  for (int o = 0; o < kOuts; ++o) {
    for (int v = 0; v < kV; ++v) {
      *reinterpret_cast<Vector*>(yt + o * kWidth + v * kLanes) = sum[o][v];
    }
  }
}

// Fetches a stretch of memory into the second-level cache, a little at a time. Within a tile W is
// read in runs of a few hundred bytes per output, which neither the hardware's prefetching nor the
// memory likes; a tile as a whole is contiguous, so it is fetched straight through while the one
// before it is computed. Only hints are given: the stretch may end outside of the array.
class Fetcher {
 public:
  Fetcher(const void* begin, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(begin)),
        end_(next_ + bytes),
        step_((bytes / steps + 63) / 64 * 64) {}

  void Step() {
    const char* stop = end_ - next_ < step_ ? end_ : next_ + step_;
    for (; next_ < stop; next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char* next_;
  const char* end_;
  int64_t step_;
};

template <int kV, int kOuts, typename T>
inline void PackAndMultiply(const Product<T>& p, const float* xt, int64_t out, int64_t channel,
                            int64_t channels, float* yt) {
  Panel<kOuts> panel;
  for (int o = 0; o < kOuts; ++o) {
    WidenMany(p.values + (out + o) * p.kept() + channel / 2, panel.values[o], channels / 2);
    std::memcpy(panel.indices[o], p.indices + (out + o) * p.index_bytes() + channel / 8,
                (channels + 7) / 8);
  }
  MultiplyPanel<kV, kOuts>(panel, xt, channels, yt);
}

// A tile of at most kOutTile outputs with one block of rows, kV vectors wide.
template <int kV, typename T>
void LanesTile(const Product<T>& p, const float* xt, int64_t row, int64_t rows, int64_t begin,
               int64_t end) {
  constexpr int64_t kWidth = kV * kLanes;
  constexpr int64_t kChannels = kXtFloats / kWidth / 8 * 8;
  alignas(64) float yt[kOutTile * kWidth];
  std::memset(yt, 0, (end - begin) * kWidth * sizeof(float));
  const int64_t steps = (kOutTile / kPanelOuts) * ((p.channels + kChannels - 1) / kChannels);
  Fetcher values(p.values + end * p.kept(), kOutTile * p.kept() * sizeof(T), steps);
  Fetcher indices(p.indices + end * p.index_bytes(), kOutTile * p.index_bytes(), steps);
  for (int64_t channel = 0; channel < p.channels; channel += kChannels) {
    const int64_t channels = Min(kChannels, p.channels - channel);
    const float* block = xt + channel * kWidth;
    int64_t out = begin;
    for (; out + kPanelOuts <= end; out += kPanelOuts) {
      values.Step();
      indices.Step();
      PackAndMultiply<kV, kPanelOuts>(p, block, out, channel, channels,
                                      yt + (out - begin) * kWidth);
    }
    for (; out < end; ++out) {
      PackAndMultiply<kV, 1>(p, block, out, channel, channels, yt + (out - begin) * kWidth);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* y = p.y + (row + r) * p.outs;
    for (int64_t out = begin; out < end; ++out) Narrow(yt[(out - begin) * kWidth + r], y + out);
  }
}

template <int kV, typename T>
void LanesRowBlock(const Product<T>& p, const float* xt, int64_t row, int64_t rows, int64_t begin,
                   int64_t end) {
  for (int64_t out = begin; out < end; out += kOutTile) {
    LanesTile<kV>(p, xt, row, rows, out, Min(out + kOutTile, end));
  }
}

// All rows with the outputs [begin, end). A block of rows stays in the second-level cache while all
// of these outputs pass by.
template <typename T>
inline void LanesRun(const Product<T>& p, const float* scratch, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.rows; row += kRowBlock) {
    const int64_t rows = Min(kRowBlock, p.rows - row);
    const float* xt = scratch + row * p.channels;
    switch (RoundUpToLanes(rows) / kLanes) {
      case 1:
        LanesRowBlock<1>(p, xt, row, rows, begin, end);
        break;
      case 2:
        LanesRowBlock<2>(p, xt, row, rows, begin, end);
        break;
      case 3:
        LanesRowBlock<3>(p, xt, row, rows, begin, end);
        break;
      default:
        LanesRowBlock<4>(p, xt, row, rows, begin, end);
    }
  }
}

}  // namespace
}  // namespace esparse::cpu

#endif  // ESPARSE_FFI_CPU_LANES_H_
