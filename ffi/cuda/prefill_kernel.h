// The prefill kernel. Its body is plain C++ over a few primitives of the device: prefill_gpu.h has
// those of a GPU, testing/prefill_on_host.cc those of a test without one. Each also sees to `min`
// and `max`. Addresses of shared memory are numbers.
//
// The blob is read as it lies (see decode_kernel.h). A block computes 128 outputs x kRows rows of
// x, 64 channels at a stage:
//
//   values    128 rows of 64 bytes, 32 values each    a tensor copy, strewn in 64 bytes
//   x         kRows rows of 128 bytes, 64 channels    a tensor copy, strewn in 128 bytes; each
//                                                     block of a cluster loads a part for all
//   indices   twice 512 bytes, of 64 outputs each     a tensor copy: they lie together in the blob
//
// One thread fills the stages; two warpgroups multiply, 64 outputs each, by two wgmma.sp of 32
// channels. A stage is full when its bytes are there, and empty when the warps of all blocks that
// its part of x went to have multiplied it. Blocks stay for all their tiles, so that the stages
// fill up for the next tile while the sums of this one are written: transposed through shared
// memory, 32 rows of y at a time, and from there by tensor stores.
//
// Where there are fewer tiles than blocks run at once, the channels are split among the blocks of a
// cluster instead. Then each leaves its sums in its own shared memory, and when all have, each adds
// up a part of the tile from all of them, always in the same order. The tiles that are left when
// all blocks had as many as each other are multiplied so as well, by a second launch, whose blocks
// start where those of the first one end.
#ifndef ESPARSE_FFI_CUDA_PREFILL_KERNEL_H_
#define ESPARSE_FFI_CUDA_PREFILL_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "cuda/prefill_args.h"

namespace esparse::cuda {

constexpr int kGroupOutputs = 64;  // of a warpgroup
constexpr int kStoreRows = 32;
constexpr int kGroupThreads = 128;
constexpr int kWorkers = 2 * kGroupThreads;     // threads that multiply
constexpr int kPrefillThreads = kWorkers + 32;  // up to 224 registers for each
constexpr int kWorkerWarps = kWorkers / 32;
constexpr int kChunk = 8;  // numbers of y in 16 bytes

// Bytes of shared memory, from a multiple of 1024 on.
template <int kRows, int kStages>
struct PrefillLayout {
  static constexpr int kValueBytes = kBlockOutputs * kStageChannels / 2 * 2;
  static constexpr int kXBytes = kRows * kStageChannels * 2;
  static constexpr int kStageBytes = kValueBytes + kXBytes;
  static constexpr int kIndexBytes = kGroupOutputs * kStageChannels / 8;  // of a warpgroup
  static constexpr int kStoreBytes = kStoreRows * kGroupOutputs * 2;
  static constexpr int kStoreAt = kStages * kStageBytes;  // two for each warpgroup
  static constexpr int kIndicesAt = kStoreAt + 4 * kStoreBytes;
  static constexpr int kBarriersAt = kIndicesAt + kStages * 2 * kIndexBytes;
  static constexpr int kBytes = kBarriersAt + kStages * 2 * 8;
  // Sums that are left for the cluster, where the stages were: rows of x, far enough apart that the
  // threads of a warp write to different banks.
  static constexpr int kSumsPitch = (kBlockOutputs + 4) * 4;
  static_assert(kRows * kSumsPitch <= kStoreAt);
};

// Rows of operands as tensor copies strew them, each row as wide as the pattern: a chunk of 16
// bytes is moved by bits of its row, so that the chunks of a column lie in different banks.
enum class Swizzle : uint64_t { kNone = 0, k128Bytes = 1, k64Bytes = 2 };

// What wgmma calls a descriptor: a matrix in shared memory, K-major, whose rows are as wide as the
// swizzle.
template <Swizzle kSwizzle>
ESPARSE_DEVICE uint64_t MatrixDescriptor(uint32_t address) {
  constexpr uint64_t kEightRows = kSwizzle == Swizzle::k128Bytes ? 1024 : 512;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         kEightRows >> 4 << 32 | static_cast<uint64_t>(kSwizzle) << 62;
}
// How much a descriptor grows by so many bytes along K.
template <int kBytes>
ESPARSE_DEVICE uint64_t Further(uint64_t descriptor) {
  return descriptor + (kBytes >> 4);
}

// Where the tile of a block lies: runs of `group` row tiles, in which the rows go fastest.
template <int kRows>
ESPARSE_DEVICE void PlaceTile(const PrefillArgs& p, int tile, int* output, int* row) {
  const int rank = tile % p.wide, shared = tile / p.wide;
  const int run = p.group * p.out_tiles;
  const int first = shared / run * p.group, within = shared % run;
  const int high = min(p.group, p.row_tiles - first);
  *row = (first + within % high) * kRows;
  *output = (within / high * p.wide + rank) * kBlockOutputs;
}

// What a block of a cluster multiplies: stages `first` to `end` - 1 of every tile.
struct Share {
  int first, end;
};
template <int kCluster, typename Device>
ESPARSE_DEVICE Share ShareOf(Device& device, const PrefillArgs& p) {
  const int steps = p.channels / kStageChannels;
  if (kCluster > 1) return {0, steps};
  const int rank = device.Rank();
  return {steps * rank / p.split, steps * (rank + 1) / p.split};
}

// Loads all stages of all tiles of a block: one thread.
template <int kRows, int kStages, int kCluster, typename Device>
ESPARSE_DEVICE void FillStages(Device& device, const PrefillArgs& p) {
  using Places = PrefillLayout<kRows, kStages>;
  constexpr int kPart = kRows / kCluster;
  const uint32_t stages = device.Shared(), full = stages + Places::kBarriersAt,
                 empty = full + kStages * 8;
  const int team = kCluster * p.split, rank = kCluster > 1 ? device.Rank() : 0;
  const Share share = ShareOf<kCluster>(device, p);
  const uint32_t bytes =
      Places::kValueBytes + kCluster * p.x_rows * kStageChannels * 2 + 2 * Places::kIndexBytes;
  int stage = 0;
  uint32_t phase = 1;
  for (int tile = p.first + device.Block() / team; tile < p.end; tile += device.Blocks() / team) {
    int output, row;
    PlaceTile<kRows>(p, tile * kCluster + rank, &output, &row);
    for (int k = share.first; k < share.end; ++k) {
      device.WaitBarrier(empty + 8 * stage, phase);
      const uint32_t barrier = full + 8 * stage, at = stages + stage * Places::kStageBytes;
      device.ArriveAndExpect(barrier, bytes);
      device.CopyValues(at, k * (kStageChannels / 2), output, barrier);
      device.template CopyX<kCluster>(at + Places::kValueBytes + rank * (kPart * 128),
                                      k * kStageChannels, row + rank * kPart, barrier);
      device.CopyIndices(stages + Places::kIndicesAt + stage * 2 * Places::kIndexBytes,
                         k * (Places::kIndexBytes / 2), output / kGroupOutputs, barrier);
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
  }
}

// Leaves the sums of a block for the cluster, where its stages were.
template <int kRows, int kStages, typename Device>
ESPARSE_DEVICE void LeaveSums(Device& device, const float (&sum)[kRows / 2]) {
  constexpr int kPitch = PrefillLayout<kRows, kStages>::kSumsPitch;
  const int thread = device.Thread(), lane = thread % 32;
  // A warp has 16 outputs: lane 4 g + t those at g and g + 8, of each 8 rows 2 t and 2 t + 1.
  const uint32_t at =
      device.Shared() + (lane & 3) * 2 * kPitch + (thread / 32 * 16 + (lane >> 2)) * 4;
  device.SyncWorkers();  // both have read the stages
  ESPARSE_UNROLL
  for (int i = 0; i < kRows / 8; ++i) {
    ESPARSE_UNROLL
    for (int j = 0; j < 4; ++j) {
      device.StoreShared(at + (i * 8 + j % 2) * kPitch + j / 2 * 32, sum[i * 4 + j]);
    }
  }
}

// Adds up what the blocks of a cluster left, and writes a part of y.
template <typename T, int kRows, int kStages, typename Device>
ESPARSE_DEVICE void AddSums(Device& device, const PrefillArgs& p) {
  constexpr int kPitch = PrefillLayout<kRows, kStages>::kSumsPitch;
  constexpr int kChunks = kBlockOutputs / kChunk;
  int output, row;
  PlaceTile<kRows>(p, p.first + device.Block() / p.split, &output, &row);
  constexpr int kAtATime = kRows == 64 ? 2 : 4;  // chunks whose loads are under way together
  const int rows = min(kRows, p.rows - row), outputs = min(kBlockOutputs, p.out - output);
  const int step = p.split * kWorkers;
  for (int i = device.Rank() * kWorkers + device.Thread(); i < rows * kChunks;
       i += kAtATime * step) {
    float sum[kAtATime][kChunk] = {};
    for (int part = 0; part < p.split; ++part) {
      float more[kAtATime][kChunk];
      ESPARSE_UNROLL
      for (int c = 0; c < kAtATime; ++c) {  // rows that x does not have are read and not written
        const int at = min(i + c * step, kRows * kChunks - 1);
        device.LoadOfBlock(
            part, device.Shared() + at / kChunks * kPitch + at % kChunks * kChunk * 4, more[c]);
      }
      ESPARSE_UNROLL
      for (int c = 0; c < kAtATime; ++c) {
        ESPARSE_UNROLL
        for (int j = 0; j < kChunk; ++j) sum[c][j] += more[c][j];
      }
    }
    ESPARSE_UNROLL
    for (int c = 0; c < kAtATime; ++c) {
      const int at = i + c * step, r = at / kChunks, first = at % kChunks * kChunk;
      if (r >= rows || first >= outputs) continue;
      device.Store16(p.y + static_cast<size_t>(row + r) * p.out + output + first,
                     device.template Pack<T>(sum[c][0], sum[c][1]),
                     device.template Pack<T>(sum[c][2], sum[c][3]),
                     device.template Pack<T>(sum[c][4], sum[c][5]),
                     device.template Pack<T>(sum[c][6], sum[c][7]));
    }
  }
}

// Multiplies all stages of all tiles of a block, and writes y or leaves the sums of its only tile
// for the cluster: two warpgroups.
template <typename T, int kRows, int kStages, int kCluster, typename Device>
ESPARSE_DEVICE void MultiplyStages(Device& device, const PrefillArgs& p) {
  using Places = PrefillLayout<kRows, kStages>;
  const uint32_t stages = device.Shared(), full = stages + Places::kBarriersAt,
                 empty = full + kStages * 8;
  const int thread = device.Thread(), warp = thread / 32, lane = thread % 32;
  const int group = thread / kGroupThreads;
  const bool leader = thread % kGroupThreads == 0;
  const int team = kCluster * p.split, rank = kCluster > 1 ? device.Rank() : 0;
  const Share share = ShareOf<kCluster>(device, p);
  // Of the indices: 256 bytes for 32 channels, in them 64 for 16 outputs, in them 8 for outputs
  // (o, o + 8), whose nibbles alternate, and in them bytes of the two chunks of 16 channels by
  // turns. Lane t of four serves the product t / 2 of a stage with the chunk t % 2.
  const uint32_t my_indices = stages + Places::kIndicesAt + group * Places::kIndexBytes +
                              ((lane >> 1) & 1) * 256 + (warp & 3) * 64 + (lane >> 2) * 8;
  const uint32_t my_bytes = lane & 1 ? 0x7531 : 0x6420;

  int stage = 0;
  uint32_t phase = 0;
  float sum[kRows / 2];
  for (int tile = p.first + device.Block() / team; tile < p.end; tile += device.Blocks() / team) {
    int output, row;
    PlaceTile<kRows>(p, tile * kCluster + rank, &output, &row);
    int before = -1;  // the stage whose products may still run
    const auto release = [&](int done) {
      if (lane < kCluster) {
        device.ArriveAt(empty + 8 * done, kCluster > 1 ? lane : device.Rank());
      }
    };
    const auto multiply = [&](uint32_t& indices, bool add) {
      device.WaitBarrier(full + 8 * stage, phase);
      uint32_t a, b;
      device.LoadShared(my_indices + stage * 2 * Places::kIndexBytes, &a, &b);
      const uint32_t mine = device.Bytes(a, b, my_bytes);
      const uint32_t low = mine & 0x0f0f0f0fu, high = (mine >> 4) & 0x0f0f0f0fu;
      indices = device.Bytes(low | (low >> 4), high | (high >> 4), 0x6420);
      const uint32_t at = stages + stage * Places::kStageBytes;
      const uint64_t weight =
          MatrixDescriptor<Swizzle::k64Bytes>(at + group * (Places::kValueBytes / 2));
      const uint64_t rows = MatrixDescriptor<Swizzle::k128Bytes>(at + Places::kValueBytes);
      device.BeginProducts();
      device.template MultiplySparse<T, kRows, 0>(sum, weight, rows, indices, add);
      device.template MultiplySparse<T, kRows, 1>(sum, Further<32>(weight), Further<64>(rows),
                                                  indices, true);
      device.CommitProducts();
      device.template WaitProducts<1>();
      if (before >= 0) release(before);
      before = stage;
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    };
    // The indices stay in their register while the products run, so the next stage has another.
    uint32_t even, odd;
    int k = share.first;
    for (; k + 1 < share.end; k += 2) {
      multiply(even, k > share.first);
      multiply(odd, true);
    }
    if (k < share.end) multiply(even, k > share.first);
    device.template WaitProducts<0>();
    if (kCluster == 1 && p.split > 1) {
      LeaveSums<kRows, kStages>(device, sum);
      return;
    }
    release(before);

    ESPARSE_UNROLL
    for (int part = 0; part < kRows / kStoreRows; ++part) {
      const uint32_t store =
          stages + Places::kStoreAt + (group * 2 + part % 2) * Places::kStoreBytes;
      if (leader) device.template WaitStoresRead<1>();
      device.SyncGroup(group);
      ESPARSE_UNROLL
      for (int half = 0; half < 2; ++half) {  // 16 rows of y, 16 outputs of this warp
        const int from = (part * 4 + half * 2) * 4;
        const int matrix = lane >> 3, y_row = half * 16 + (matrix >> 1) * 8 + (lane & 7);
        const int chunk = (warp & 3) * 2 + (matrix & 1);
        device.StoreTransposed(store + y_row * 128 + ((chunk ^ (y_row & 7)) << 4),
                               device.template Pack<T>(sum[from], sum[from + 1]),
                               device.template Pack<T>(sum[from + 2], sum[from + 3]),
                               device.template Pack<T>(sum[from + 4], sum[from + 5]),
                               device.template Pack<T>(sum[from + 6], sum[from + 7]));
      }
      device.FenceForCopies();
      device.SyncGroup(group);
      if (leader) {
        device.StoreY(output + group * kGroupOutputs, row + part * kStoreRows, store);
      }
    }
  }
  if (leader) device.WaitStores();
}

template <typename T, int kRows, int kStages, int kCluster, typename Device>
ESPARSE_DEVICE void Prefill(Device& device, const PrefillArgs& p) {
  const uint32_t full = device.Shared() + PrefillLayout<kRows, kStages>::kBarriersAt;
  const int thread = device.Thread();
  if (p.followed) device.LetNextStart();
  if (thread == kWorkers) device.PrefetchDescriptions();
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      device.InitBarrier(full + 8 * s, 1);
      device.InitBarrier(full + 8 * (kStages + s), kWorkerWarps * kCluster);
    }
    device.FenceBarriers();
  }
  device.template SyncAll<(kCluster > 1)>();
  if (thread < kWorkers) {
    MultiplyStages<T, kRows, kStages, kCluster>(device, p);
  } else if (device.Elect()) {
    FillStages<kRows, kStages, kCluster>(device, p);
  }
  device.SyncWarp();
  if (kCluster == 1 && p.split > 1) {
    device.template SyncAll<true>();
    if (thread < kWorkers) AddSums<T, kRows, kStages>(device, p);
    device.SyncWarp();
    device.template SyncAll<true>();  // no block leaves while others read its sums
  } else {
    // No block leaves while others send it x, or count on its barriers.
    device.template SyncAll<(kCluster > 1)>();
  }
  // Who waits for the second launch waits for the first one too.
  if (p.first > 0) device.WaitForPrevious();
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_KERNEL_H_
