// The prefill kernel. Its body is plain C++ over a few primitives of the device: prefill_gpu.h has
// those of a GPU, testing/prefill_on_host.cc those of a test without one. Each also sees to `min`
// and `max`. Addresses of shared memory are numbers.
//
// The blob is read as it lies (see decode_kernel.h). A block has two or three warpgroups and
// computes 64 outputs for each x kRows rows of x, 64 channels at a stage:
//
//   values    rows of 64 bytes, 32 values each        a tensor copy, strewn in 64 bytes
//   x         kRows rows of 128 bytes, 64 channels    a tensor copy, strewn in 128 bytes; each
//                                                     block of a cluster loads a part for all
//   indices   512 bytes for 64 outputs                a tensor copy: they lie together in the blob
//
// One thread fills the stages; the warpgroups multiply, 64 outputs each, by two wgmma.sp of 32
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

constexpr int kStoreRows = 32;
constexpr int kChunk = 8;  // numbers of y in 16 bytes

// What a block computes at a time, and how: `groups` warpgroups of 64 outputs each x `rows` rows of
// x, which `cluster` blocks of neighbouring outputs share. Bytes of shared memory are counted from
// a multiple of 1024 on.
template <int rows, int groups, int stages, int cluster>
struct PrefillTile {
  static constexpr int kRows = rows, kGroups = groups, kStages = stages, kCluster = cluster;
  static constexpr int kOutputs = groups * kGroupOutputs;
  static constexpr int kWorkers = groups * kGroupThreads;  // threads that multiply
  static constexpr int kThreads = PrefillThreads(rows, kOutputs);
  static constexpr bool kHasLoader = HasLoader(rows, kOutputs);
  static constexpr int kValueBytes = kOutputs * kStageChannels / 2 * 2;
  static constexpr int kXBytes = rows * kStageChannels * 2;
  static constexpr int kStageBytes = kValueBytes + kXBytes;
  static constexpr int kIndexBytes = kGroupOutputs * kStageChannels / 8;  // of a warpgroup
  static constexpr int kStoreBytes = kStoreRows * kGroupOutputs * 2;
  static constexpr int kStoreAt = stages * kStageBytes;  // two for each warpgroup
  static constexpr int kIndicesAt = kStoreAt + 2 * groups * kStoreBytes;
  static constexpr int kBarriersAt = kIndicesAt + stages * groups * kIndexBytes;
  static constexpr int kBytes = kBarriersAt + stages * 2 * 8;
  // Sums that are left for the cluster, where the stages and what is stored were: rows of x, far
  // enough apart that the threads of a warp write to different banks.
  static constexpr int kSumsPitch = (kOutputs + 4) * 4;
  static_assert(rows * kSumsPitch <= kIndicesAt);
  static_assert(kStageBytes % 1024 == 0 && kValueBytes % 1024 == 0);
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
template <typename Tile>
ESPARSE_DEVICE void PlaceTile(const PrefillArgs& p, int tile, int* output, int* row) {
  const int rank = tile % p.wide, shared = tile / p.wide;
  const int run = p.group * p.out_tiles;
  const int first = shared / run * p.group, within = shared % run;
  const int high = min(p.group, p.row_tiles - first);
  *row = (first + within % high) * Tile::kRows;
  *output = (within / high * p.wide + rank) * Tile::kOutputs;
}

// What a block of a cluster multiplies: stages `first` to `end` - 1 of every tile.
struct Share {
  int first, end;
};
template <typename Tile, typename Device>
ESPARSE_DEVICE Share ShareOf(Device& device, const PrefillArgs& p) {
  const int steps = p.channels / kStageChannels;
  if (Tile::kCluster > 1) return {0, steps};
  const int rank = device.Rank();
  return {steps * rank / p.split, steps * (rank + 1) / p.split};
}

// Loads all stages of all tiles of a block, one after the other: one thread.
template <typename Tile, typename Device>
class StageLoader {
 public:
  ESPARSE_DEVICE StageLoader(Device& device, const PrefillArgs& p)
      : device_(device),
        p_(p),
        share_(ShareOf<Tile>(device, p)),
        rank_(Tile::kCluster > 1 ? device.Rank() : 0) {}

  // The first stages of the first tile, as many as there is room for. W may come before the kernel
  // before has ended, x may not.
  ESPARSE_DEVICE void Begin() {
    tile_ = p_.first + device_.Block() / (Tile::kCluster * p_.split);
    Place();
    const int count = Left() ? min(Tile::kStages, share_.end - share_.first) : 0;
    if (p_.prefetch) {
      for (int i = 0; i < count; ++i) CopyWeight(i, share_.first + i);
    }
    if (p_.first == 0) device_.WaitForPrevious();
    for (int i = 0; i < count; ++i) {
      if (!p_.prefetch) CopyWeight(i, k_);
      CopyX();
    }
  }
  // One more, where there is one, as soon as its place is free.
  ESPARSE_DEVICE void Next() {
    if (!Left()) return;
    const int stage = turn_ % Tile::kStages;
    device_.WaitBarrier(Empty(stage), ~(turn_ / Tile::kStages) & 1);  // free from the start
    CopyWeight(stage, k_);
    CopyX();
  }
  ESPARSE_DEVICE bool Left() const { return tile_ < p_.end; }

 private:
  ESPARSE_DEVICE uint32_t Full(int stage) const {
    return device_.Shared() + Tile::kBarriersAt + 8 * stage;
  }
  ESPARSE_DEVICE uint32_t Empty(int stage) const { return Full(Tile::kStages + stage); }
  ESPARSE_DEVICE void Place() {
    if (!Left()) return;
    PlaceTile<Tile>(p_, tile_ * Tile::kCluster + rank_, &output_, &row_);
    k_ = share_.first;
  }
  ESPARSE_DEVICE void CopyWeight(int stage, int k) {
    const uint32_t bytes = Tile::kValueBytes + Tile::kCluster * p_.x_rows * kStageChannels * 2 +
                           Tile::kGroups * Tile::kIndexBytes;
    device_.ArriveAndExpect(Full(stage), bytes);
    device_.CopyValues(device_.Shared() + stage * Tile::kStageBytes, k * (kStageChannels / 2),
                       output_, Full(stage));
    device_.CopyIndices(
        device_.Shared() + Tile::kIndicesAt + stage * Tile::kGroups * Tile::kIndexBytes,
        k * (Tile::kIndexBytes / 2), output_ / kGroupOutputs, Full(stage));
  }
  // The part of x that this block loads, into the stage whose turn it is.
  ESPARSE_DEVICE void CopyX() {
    constexpr int kPart = Tile::kRows / Tile::kCluster;
    const int stage = turn_++ % Tile::kStages;
    device_.template CopyX<Tile::kCluster>(
        device_.Shared() + stage * Tile::kStageBytes + Tile::kValueBytes + rank_ * (kPart * 128),
        k_ * kStageChannels, row_ + rank_ * kPart, Full(stage));
    if (++k_ == share_.end) {
      tile_ += device_.Blocks() / (Tile::kCluster * p_.split);
      Place();
    }
  }

  Device& device_;
  const PrefillArgs& p_;
  const Share share_;
  const int rank_;
  int tile_, k_, output_, row_;
  uint32_t turn_ = 0;  // stages that were loaded
};

// Leaves the sums of a block for the cluster, where its stages were.
template <typename Tile, typename Device>
ESPARSE_DEVICE void LeaveSums(Device& device, const float (&sum)[Tile::kRows / 2]) {
  constexpr int kPitch = Tile::kSumsPitch;
  const int thread = device.Thread(), lane = thread % 32;
  // A warp has 16 outputs: lane 4 g + t those at g and g + 8, of each 8 rows 2 t and 2 t + 1.
  const uint32_t at =
      device.Shared() + (lane & 3) * 2 * kPitch + (thread / 32 * 16 + (lane >> 2)) * 4;
  device.template SyncWorkers<Tile::kWorkers>();  // both have read the stages
  ESPARSE_UNROLL
  for (int i = 0; i < Tile::kRows / 8; ++i) {
    ESPARSE_UNROLL
    for (int j = 0; j < 4; ++j) {
      device.StoreShared(at + (i * 8 + j % 2) * kPitch + j / 2 * 32, sum[i * 4 + j]);
    }
  }
}

// Adds up what the blocks of a cluster left, and writes a part of y.
template <typename T, typename Tile, typename Device>
ESPARSE_DEVICE void AddSums(Device& device, const PrefillArgs& p) {
  constexpr int kPitch = Tile::kSumsPitch;
  constexpr int kChunks = Tile::kOutputs / kChunk;
  int output, row;
  PlaceTile<Tile>(p, p.first + device.Block() / p.split, &output, &row);
  constexpr int kAtATime = Tile::kRows == 64 ? 2 : 4;  // chunks whose loads are under way together
  const int rows = min(Tile::kRows, p.rows - row), outputs = min(Tile::kOutputs, p.out - output);
  const int step = p.split * Tile::kWorkers;
  for (int i = device.Rank() * Tile::kWorkers + device.Thread(); i < rows * kChunks;
       i += kAtATime * step) {
    float sum[kAtATime][kChunk] = {};
    for (int part = 0; part < p.split; ++part) {
      float more[kAtATime][kChunk];
      ESPARSE_UNROLL
      for (int c = 0; c < kAtATime; ++c) {  // rows that x does not have are read and not written
        const int at = min(i + c * step, Tile::kRows * kChunks - 1);
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
// for the cluster: all warpgroups.
template <typename T, typename Tile, typename Device>
ESPARSE_DEVICE void MultiplyStages(Device& device, const PrefillArgs& p,
                                   StageLoader<Tile, Device>& loader) {
  const uint32_t stages = device.Shared(), full = stages + Tile::kBarriersAt,
                 empty = full + Tile::kStages * 8;
  const int thread = device.Thread(), warp = thread / 32, lane = thread % 32;
  const int group = thread / kGroupThreads;
  const bool leader = thread % kGroupThreads == 0;
  const int team = Tile::kCluster * p.split, rank = Tile::kCluster > 1 ? device.Rank() : 0;
  const Share share = ShareOf<Tile>(device, p);
  // Of the indices: 256 bytes for 32 channels, in them 64 for 16 outputs, in them 8 for outputs
  // (o, o + 8), whose nibbles alternate, and in them bytes of the two chunks of 16 channels by
  // turns. Lane t of four serves the product t / 2 of a stage with the chunk t % 2.
  const uint32_t my_indices = stages + Tile::kIndicesAt + group * Tile::kIndexBytes +
                              ((lane >> 1) & 1) * 256 + (warp & 3) * 64 + (lane >> 2) * 8;
  const uint32_t my_bytes = lane & 1 ? 0x7531 : 0x6420;

  int stage = 0;
  uint32_t phase = 0;
  float sum[Tile::kRows / 2];
  // While it waits for the other warpgroups, products of its own are under way.
  const auto load = [&] {
    if (Tile::kHasLoader || warp != 0) return;
    if (device.Elect()) loader.Next();
    device.SyncWarp();
  };
  for (int tile = p.first + device.Block() / team; tile < p.end; tile += device.Blocks() / team) {
    int output, row;
    PlaceTile<Tile>(p, tile * Tile::kCluster + rank, &output, &row);
    // The stage before, whose products have ended.
    const auto release = [&] {
      const int done = (stage == 0 ? Tile::kStages : stage) - 1;
      if (Tile::kCluster == 1) {
        if (lane == 0) device.Arrive(empty + 8 * done);
      } else if (lane < Tile::kCluster) {
        device.ArriveAt(empty + 8 * done, lane);
      }
    };
    const auto multiply = [&](uint32_t& indices, int k) {
      device.WaitBarrier(full + 8 * stage, phase);
      uint32_t a, b;
      device.LoadShared(my_indices + stage * Tile::kGroups * Tile::kIndexBytes, &a, &b);
      const uint32_t mine = device.Bytes(a, b, my_bytes);
      const uint32_t low = mine & 0x0f0f0f0fu, high = (mine >> 4) & 0x0f0f0f0fu;
      indices = device.Bytes(low | (low >> 4), high | (high >> 4), 0x6420);
      const uint32_t at = stages + stage * Tile::kStageBytes;
      const uint64_t weight =
          MatrixDescriptor<Swizzle::k64Bytes>(at + group * (Tile::kValueBytes / Tile::kGroups));
      const uint64_t rows = MatrixDescriptor<Swizzle::k128Bytes>(at + Tile::kValueBytes);
      device.BeginProducts();
      device.template MultiplySparse<T, Tile::kRows, 0>(sum, weight, rows, indices,
                                                        k > share.first);
      device.template MultiplySparse<T, Tile::kRows, 1>(sum, Further<32>(weight), Further<64>(rows),
                                                        indices, true);
      device.CommitProducts();
      device.template WaitProducts<1>();
      if (k > share.first) {
        release();
        load();
      }
      if (++stage == Tile::kStages) {
        stage = 0;
        phase ^= 1;
      }
    };
    // The indices stay in their register while the products run, so the next stage has another.
    uint32_t even, odd;
    int k = share.first;
    for (; k + 1 < share.end; k += 2) {
      multiply(even, k);
      multiply(odd, k + 1);
    }
    if (k < share.end) multiply(even, k);
    device.template WaitProducts<0>();
    if (Tile::kCluster == 1 && p.split > 1) {
      LeaveSums<Tile>(device, sum);
      return;
    }
    release();
    load();

    ESPARSE_UNROLL
    for (int part = 0; part < Tile::kRows / kStoreRows; ++part) {
      const uint32_t store = stages + Tile::kStoreAt + (group * 2 + part % 2) * Tile::kStoreBytes;
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

template <typename T, typename Tile, typename Device>
ESPARSE_DEVICE void Prefill(Device& device, const PrefillArgs& p) {
  const uint32_t full = device.Shared() + Tile::kBarriersAt;
  const int thread = device.Thread();
  // Who lets the next kernel start has seen the one before end, or requests W alone until then (see
  // dependent_launch.h). The second launch reads x at once, so the first one has to have seen it.
  if (p.prefetch && !p.followed) device.LetNextStart();
  if (thread == Tile::kThreads - 32) device.PrefetchDescriptions();
  if (thread == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      device.InitBarrier(full + 8 * s, 1);
      device.InitBarrier(full + 8 * (Tile::kStages + s), Tile::kWorkers / 32 * Tile::kCluster);
    }
    device.FenceBarriers();
  }
  device.template SyncAll<(Tile::kCluster > 1)>();
  StageLoader<Tile, Device> loader(device, p);
  if (thread < Tile::kWorkers) {
    if (!Tile::kHasLoader && thread < 32) {
      if (device.Elect()) loader.Begin();
      device.SyncWarp();
    }
    if (p.first == 0) {
      device.WaitForPrevious();
      if (!p.prefetch || p.followed) device.LetNextStart();
    }
    MultiplyStages<T, Tile>(device, p, loader);
  } else if (Tile::kHasLoader && device.Elect()) {
    loader.Begin();
    while (loader.Left()) loader.Next();
  }
  device.SyncWarp();
  if (Tile::kCluster == 1 && p.split > 1) {
    device.template SyncAll<true>();
    if (thread < Tile::kWorkers) AddSums<T, Tile>(device, p);
    device.SyncWarp();
    device.template SyncAll<true>();  // no block leaves while others read its sums
  } else {
    // No block leaves while others send it x, or count on its barriers.
    device.template SyncAll<(Tile::kCluster > 1)>();
  }
  // Who waits for the second launch waits for the first one too.
  if (p.first > 0) device.WaitForPrevious();
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_KERNEL_H_
