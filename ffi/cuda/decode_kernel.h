// The decode kernel. Its body is plain C++ over a few primitives of the device: decode_gpu.h has
// those of a GPU, testing/decode_on_host.cc those of a test without one. Each also sees to `min`
// and `fmaf`. Addresses of shared memory are numbers.
//
// The blob (cuSPARSELt's own device format of a 2:4 weight [out, channel] on sm_90; see
// sparse/blob.py):
//
//   byte 0              kept values, row-major [out][channel / 2], 16 bits each
//   byte out * channel  index nibbles: 16 rows x 32 channels are 64 bytes together,
//                       8 bytes for each pair of rows (r, r + 8), the two rows nibble by nibble
//
// A tile is 16 outputs, a unit 128 channels of it: four steps of mma.sp.m16n8k32, 2048 bytes of
// values and 256 of indices. A unit is eight chunks of 16 channels. Lane t of a quad holds the
// indices of the chunks 2t and 2t + 1, so that step j multiplies the chunk pair
//
//   step     0      1      2      3
//   chunks  0, 2   1, 3   4, 6   5, 7        indices from lanes 0, 1 of each quad (steps 0, 1)
//                                                        or lanes 2, 3             (steps 2, 3)
//
// which costs nothing: one ldmatrix.x4 reads the values of 16 rows of any two chunks, another one
// the same channels of 8 rows of x, from a plain row-major copy. x is never packed, W never
// rewritten. Where channels is an odd multiple of 64, the last unit is a half; the rest of it is
// filled with zeros (and with indices of the first half, which are valid ones), so that the loop
// knows nothing of it.
//
// The warps of a block share the channels of its tiles. Each keeps a ring of pieces of its own in
// shared memory (a piece: one unit of kTiles tiles, with x), filled with cp.async, and waits for
// nobody until the partial sums meet at the end of the tiles:
//
//   warp 0: depth x (W, x) | warp 1: depth x (W, x) | ... | sums of every warp | squares of x
//
// Where x is resident its pieces have places of their own, behind the warp's ring, filled during
// the first pass over the tiles.
#ifndef ESPARSE_FFI_CUDA_DECODE_KERNEL_H_
#define ESPARSE_FFI_CUDA_DECODE_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "cuda/decode_args.h"

namespace esparse::cuda {

// A lane's part of four 8x8 matrices of 16-bit numbers: two numbers of each.
struct Fragments {
  uint32_t x, y, z, w;
};

// kTiles tiles at a time, kColumns * 8 >= rows. The sums are [warp][tile][column][lane][4], the
// squares [warp][row].
template <typename Device, typename T, int kColumns, int kTiles>
ESPARSE_DEVICE void Decode(Device& device, const uint8_t* blob, const T* from_x, const T* residual,
                           const int32_t* places, T* y, T* scattered, const KernelArgs& p) {
  const int thread = device.Thread(), threads = device.Threads();
  const int warp = device.Thread() / 32, lane = device.Thread() % 32;
  const int warps = device.Threads() / 32;
  const int block = device.Block(), channels = p.channels, rows = p.rows, depth = p.depth;
  const bool resident = p.resident != 0;

  const int first_tile = block * p.block_tiles + min(block, p.block_tiles_extra);
  const int last_tile = first_tile + p.block_tiles + (block < p.block_tiles_extra);
  const int my_units = p.warp_units + (warp < p.warp_units_extra);
  const int first_unit = p.interleave ? warp : warp * p.warp_units + min(warp, p.warp_units_extra);
  const int unit_stride = p.interleave ? warps : 1;

  const uint32_t x_piece = rows * kUnitRowBytes;
  const uint32_t slot_bytes = kTiles * kUnitBytes + (resident ? 0 : x_piece);
  const uint32_t warp_bytes =
      depth * slot_bytes + (resident ? (p.warp_units + (p.warp_units_extra > 0)) * x_piece : 0);
  const uint32_t ring = device.Shared() + warp * warp_bytes;
  const uint32_t x_place = ring + depth * slot_bytes;  // of the resident x
  constexpr uint32_t kSumsBytes = kTiles * kColumns * 32 * 16;
  uint32_t sums = device.Shared() + warps * warp_bytes;
  const uint32_t squares = sums + warps * kSumsBytes + p.sums_toggle;

  // A lane copies 16 bytes: of the values chunk lane % 8 of every fourth row, of the indices
  // sixteen bytes of the 32 channels lane / 4 % 4, of x sixteen bytes of every second row.
  const uint32_t width = channels;  // offsets in W have 32 bits: the handlers see to it
  const uint8_t* values_from = blob + static_cast<size_t>((lane >> 3) * width + (lane & 7) * 16);
  const uint8_t* indices_from =
      blob + static_cast<size_t>(p.out) * channels + ((lane >> 2) & 3) * 256 + (lane & 3) * 16;
  const uint8_t* x_from = reinterpret_cast<const uint8_t*>(from_x) +
                          static_cast<size_t>(lane >> 4) * channels * 2 + (lane & 15) * 16;
  const int half_unit = channels & (kUnitChannels / 2) ? p.units - 1 : -1;

  auto copy_weight = [&](uint32_t to, int tile, int unit) {
    const int count = min(kTiles, last_tile - tile);
    const bool half = unit == half_unit;
    const int size = half && (lane & 4) ? 0 : 16;
    const uint32_t swizzle = (lane >> 3) * 128 + (((lane & 7) ^ (lane >> 3)) << 4);
    ESPARSE_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      if (r >= count) continue;
      const uint8_t* from =
          values_from + static_cast<size_t>((tile + r) * kTileRows * width + unit * kUnitChannels);
      ESPARSE_UNROLL
      for (int q = 0; q < 4; ++q) {  // rows 4 q + lane / 8; a chunk is strewn by its row % 8
        device.CopyReadOnce((to + r * kUnitValueBytes + q * 512 + swizzle) ^ ((q & 1) << 6), from,
                            size);
        from += 4 * width;
      }
    }
    const int part = (lane >> 2) & 3;
    const int indices_at = unit * 1024 - (half && part >= 2 ? 512 : 0);
    ESPARSE_UNROLL
    for (int r = 0; r < kTiles; r += 2) {  // two tiles at once, sixteen lanes each
      const int tile_of = r + (lane >> 4), at = tile + tile_of;
      if (tile_of < count && tile_of < kTiles) {
        device.CopyReadOnce(to + kTiles * kUnitValueBytes + tile_of * kUnitIndexBytes + part * 64 +
                                (((lane & 3) ^ (part & 2)) << 4),
                            indices_from + ((at >> 2) * 8 * channels + (at & 3) * 64 + indices_at),
                            16);
      }
    }
  };
  auto copy_x = [&](uint32_t to, int unit) {
    const int chunk = lane & 15;
    const int size = unit == half_unit && chunk >= 8 ? 0 : 16;
    const uint8_t* from = x_from + unit * kUnitRowBytes;
    for (int m = lane >> 4; m < rows; m += 2) {
      device.CopyKept(to + (chunk >> 3) * (rows * 128) + m * 128 + (((chunk & 7) ^ (m & 7)) << 4),
                      from, size);
      from += static_cast<size_t>(4) * channels;
    }
  };

  // What to load next: unit `next` of this warp, for the tiles from `next_tile`.
  int next_tile = my_units > 0 ? first_tile : last_tile, next = 0;
  auto advance = [&] {
    if (++next == my_units) {
      next = 0;
      next_tile += kTiles;
    }
  };
  auto load_weight = [&](uint32_t slot) {
    copy_weight(slot, next_tile, first_unit + next * unit_stride);
  };
  auto load_x = [&](uint32_t slot) {
    if (resident) {
      if (next_tile == first_tile) {
        copy_x(x_place + next * x_piece, first_unit + next * unit_stride);
      }
    } else {
      copy_x(slot + kTiles * kUnitBytes, first_unit + next * unit_stride);
    }
  };

  if (!p.prefetch) device.WaitForPrevious();
  device.LetNextStart();
  for (int d = 0; d < depth; ++d) {
    if (next_tile < last_tile) {
      load_weight(ring + d * slot_bytes);
      if (!p.prefetch) load_x(ring + d * slot_bytes);
      advance();
    }
    if (!p.prefetch) device.CommitCopies();
  }
  if (p.prefetch) {
    device.WaitForPrevious();
    next_tile = my_units > 0 ? first_tile : last_tile;
    next = 0;
    for (int d = 0; d < depth; ++d) {
      if (next_tile < last_tile) {
        load_x(ring + d * slot_bytes);
        advance();
      }
      device.CommitCopies();
    }
  }

  // Where this lane's row of ldmatrix starts; 16-byte chunks are strewn (xor with the row), so that
  // eight rows of a chunk lie in different banks.
  const int matrix = lane >> 3, line8 = lane & 7;
  const uint32_t weight_line =
      (line8 + 8 * (matrix & 1)) * 128 + (((2 * (matrix >> 1)) ^ line8) << 4);
  uint32_t x_line[kColumns];
  ESPARSE_UNROLL
  for (int n = 0; n < kColumns; ++n) {
    const int m = min(n * 8 + line8, rows - 1);  // rows that are not there repeat the last one
    x_line[n] = m * 128 + ((((matrix & 1) + 4 * (matrix >> 1)) ^ (m & 7)) << 4);
  }
  const uint32_t indices_line =
      kTiles * kUnitValueBytes + (lane & 3) * 64 + (((lane >> 2) * 8) ^ ((lane & 2) << 4));

  auto add_four = [&](uint32_t at, uint32_t stride) {  // kMinWarps floats, `stride` bytes apart
    float part[kMinWarps];
    ESPARSE_UNROLL
    for (int k = 0; k < kMinWarps; ++k) part[k] = device.LoadShared(at + k * stride);
    return (part[0] + part[1]) + (part[2] + part[3]);
  };

  const bool norm = p.fusion & kNorm, swiglu = p.fusion & kSwiglu, add = p.fusion & kResidual;
  const bool scatter = p.fusion & kScatter;
  int slot = 0;
  for (int tile = first_tile; tile < last_tile; tile += kTiles) {
    const int count = min(kTiles, last_tile - tile);
    const bool square = norm && tile == first_tile;
    float sum[kTiles][kColumns][4] = {}, sum_of_squares[kColumns] = {};

    // This thread writes outputs thread, + threads, ... of [tile][row of x, padded][16]. The
    // loop that does it is kept small: unrolled it was four fifths of the kernel's instructions,
    // all of which are fetched anew at every launch.
    const int outputs = count * kColumns * 8 * kTileRows;
    auto load_residual = [&](int i) {
      const int m = (i >> 4) % (8 * kColumns), r = (i >> 4) / (8 * kColumns);
      return add && i < outputs && m < rows
                 ? residual[static_cast<size_t>(m) * p.out + (tile + r) * kTileRows + (i & 15)]
                 : T(0.0f);
    };
    T next_residual = load_residual(thread);

    for (int i = 0; i < my_units; ++i) {
      device.WaitCopies(depth - 1);
      device.SyncWarp();
      const uint32_t piece = ring + slot * slot_bytes;
      const uint32_t x_at = resident ? x_place + i * x_piece : piece + kTiles * kUnitBytes;

      uint32_t indices[kTiles][2];
      ESPARSE_UNROLL
      for (int r = 0; r < kTiles; ++r) {
        uint32_t a, b;
        device.LoadShared(piece + r * kUnitIndexBytes + indices_line, &a, &b);
        // The two rows, nibble by nibble, become row g in the low half and row g + 8 in the high
        // one.
        const uint32_t low = device.Bytes(a, b, 0x5410), high = device.Bytes(a, b, 0x7632);
        const uint32_t even = (low & 0x0f0f0f0fu) | ((high << 4) & 0xf0f0f0f0u);
        const uint32_t odd = ((low >> 4) & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u);
        indices[r][0] = device.Bytes(even, odd, 0x6420);  // the even chunk of this lane
        indices[r][1] = device.Bytes(even, odd, 0x7531);
      }
      Fragments x[4][kColumns];
      ESPARSE_UNROLL
      for (int j = 0; j < 4; ++j) {
        ESPARSE_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          x[j][n] =
              device.LoadMatrices(((x_at + x_line[n]) ^ ((j & 1) << 5)) + (j >> 1) * (rows * 128));
        }
      }
      if (square) {
        ESPARSE_UNROLL
        for (int j = 0; j < 4; ++j) {
          ESPARSE_UNROLL
          for (int n = 0; n < kColumns; ++n) {
            const uint32_t pairs[4] = {x[j][n].x, x[j][n].y, x[j][n].z, x[j][n].w};
            ESPARSE_UNROLL
            for (int k = 0; k < 4; ++k) {
              float low, high;
              device.template Widen<T>(pairs[k], &low, &high);
              sum_of_squares[n] = fmaf(low, low, fmaf(high, high, sum_of_squares[n]));
            }
          }
        }
      }
      ESPARSE_UNROLL
      for (int r = 0; r < kTiles; ++r) {
        if (r >= count) continue;
        Fragments weight[4];
        ESPARSE_UNROLL
        for (int j = 0; j < 4; ++j) {
          weight[j] = device.LoadMatrices((piece + r * kUnitValueBytes + weight_line) ^
                                          (((j & 1) + 4 * (j >> 1)) << 4));
        }
        ESPARSE_UNROLL
        for (int j = 0; j < 4; ++j) {
          ESPARSE_UNROLL
          for (int n = 0; n < kColumns; ++n) {
            if (j < 2) {
              device.template MultiplySparse<T, 0>(sum[r][n], weight[j], x[j][n],
                                                   indices[r][j & 1]);
            } else {
              device.template MultiplySparse<T, 1>(sum[r][n], weight[j], x[j][n],
                                                   indices[r][j & 1]);
            }
          }
        }
      }
      device.SyncWarp();
      if (next_tile < last_tile) {
        load_weight(piece);
        load_x(piece);
        advance();
      }
      device.CommitCopies();
      if (++slot == depth) slot = 0;
    }

    if (square) {
      ESPARSE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        float total = sum_of_squares[n];
        total += device.Exchange(total, 1);
        total += device.Exchange(total, 2);
        if (!(lane & 3)) {
          device.StoreShared(squares + (warp * kColumns * 8 + n * 8 + (lane >> 2)) * 4, total);
        }
      }
    }
    ESPARSE_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      ESPARSE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        if (r < count && n * 8 + (lane & 3) * 2 < rows) {
          device.StoreShared(sums + warp * kSumsBytes + ((r * kColumns + n) * 32 + lane) * 16,
                             sum[r][n]);
        }
      }
    }
    device.SyncBlock();
    ESPARSE_KEEP_LOOP
    for (int i = thread; i < outputs; i += threads) {
      const T added = next_residual;
      next_residual = load_residual(i + threads);
      const int row = i & 15, m = (i >> 4) % (8 * kColumns), r = (i >> 4) / (8 * kColumns);
      if (m >= rows || (swiglu && row >= 8)) continue;
      // mma leaves row g = lane / 4 and columns 2 (lane % 4) + 0, 1 in registers 0, 1; row g + 8 in
      // 2, 3.
      const uint32_t at =
          sums + (((r * kColumns + (m >> 3)) * 32 + (row & 7) * 4 + ((m & 7) >> 1)) * 4 + (m & 1) +
                  2 * (row >> 3)) *
                     4;
      float value = 0, up = 0, squared = 0;
      ESPARSE_KEEP_LOOP
      for (int w = 0; w < warps; w += kMinWarps) {
        value += add_four(at + w * kSumsBytes, kSumsBytes);
        if (swiglu) up += add_four(at + w * kSumsBytes + 8, kSumsBytes);
        if (norm) {
          constexpr uint32_t kSquaresBytes = kColumns * 8 * 4;
          squared += add_four(squares + m * 4 + w * kSquaresBytes, kSquaresBytes);
        }
      }
      const float scale = norm ? device.ReciprocalRoot(squared / channels + p.epsilon) : 1.0f;
      value *= scale;
      size_t to = static_cast<size_t>(m) * p.out + (tile + r) * kTileRows + row;
      if (swiglu) {
        value = value / (1 + device.Exp(-value)) * (up * scale);
        to = static_cast<size_t>(m) * (p.out / 2) + (tile + r) * 8 + row;
      }
      value += device.Widen(added);
      y[to] = device.template Narrow<T>(value);
      if (scatter) {
        const int place = places[(tile + r) * kTileRows + row];
        scattered[static_cast<size_t>(m) * p.out + place] = device.template Narrow<T>(value);
      }
    }
    if (tile + kTiles < last_tile) {
      if (p.sums_toggle == 0) {
        device.SyncBlock();
      } else {
        sums += (((tile - first_tile) / kTiles) & 1) ? -p.sums_toggle : p.sums_toggle;
      }
    }
  }
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_DECODE_KERNEL_H_
