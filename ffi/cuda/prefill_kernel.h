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
// memory, up to 32 rows of y at a time, and from there by the threads of the warpgroup. Tensor
// stores were no faster (H200), and slower where no warp of its own loads.
//
// Where there are fewer tiles than blocks run at once, the channels are split among the blocks of a
// cluster instead. Then 8 rows x 64 outputs of the sums are an item, and each block owns some. When
// all have multiplied, each sends its part of every item to the owner's shared memory, and the
// owner adds up the parts, always in the same order. That one block sends rather than another one
// reads spares a barrier that waits for all that the cluster wrote. The tiles that are left when
// all blocks had as many as each other are multiplied so as well, by a second launch, whose blocks
// start where those of the first one end.
#ifndef ESPARSE_FFI_CUDA_PREFILL_KERNEL_H_
#define ESPARSE_FFI_CUDA_PREFILL_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "cuda/prefill_args.h"

namespace esparse::cuda {

constexpr int kChunk = 8;  // numbers of y in 16 bytes
constexpr int kItemRows = 8, kItemBytes = kItemRows * kGroupOutputs * 4;

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
  static constexpr int kStoreRows = rows < 32 ? rows : 32;  // of y that are written at a time
  static constexpr int kStoreBytes = kStoreRows * kGroupOutputs * 2;
  static constexpr int kStoreAt = stages * kStageBytes;  // two for each warpgroup
  static constexpr int kIndicesAt = kStoreAt + 2 * groups * kStoreBytes;
  static constexpr int kBarriersAt = kIndicesAt + stages * groups * kIndexBytes;
  static constexpr int kRoomAt = kBarriersAt + stages * 2 * 8;
  static constexpr int kSumsAt = kRoomAt + 8;
  static constexpr int kBytes = kSumsAt + 8;
  // Parts of items lie where the stages and what is stored were.
  static constexpr int kItems = rows / kItemRows * groups;
  static constexpr int MostParts() {
    int most = 0;
    for (int split = 2; split <= kMostSplit; ++split) {
      const int parts = (kItems + split - 1) / split * split;
      most = parts > most ? parts : most;
    }
    return most;
  }
  static_assert(MostParts() * kItemBytes <= kIndicesAt);
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

// Sends the sums of a block's only tile to those who own them, and adds up and writes the items
// that this block owns: item `place` * split + rank is the one at `place` of its owner.
template <typename T, typename Tile, typename Device>
ESPARSE_DEVICE void ShareSums(Device& device, const PrefillArgs& p, int tile,
                              const float (&sum)[Tile::kRows / 2]) {
  const int thread = device.Anew(device.Thread()), lane = thread % 32;
  const int group = device.OfWarp(thread / kGroupThreads), rank = device.Rank();
  const uint32_t room = device.Shared() + Tile::kRoomAt, sums = device.Shared() + Tile::kSumsAt;
  const uint32_t mine = device.Shared() + thread % kGroupThreads * 16;
  int output, row;
  PlaceTile<Tile>(p, tile, &output, &row);
  const int items = min(Tile::kRows, p.rows - row + kItemRows - 1) / kItemRows * Tile::kGroups;
  if (thread == 0) {
    const int owned = (items - rank + p.split - 1) / p.split;
    device.ArriveAndExpect(sums, owned * p.split * kItemBytes);
  }
  device.SyncWarp();
  if (lane < p.split) device.ArriveAt(room, lane);
  device.WaitBarrier(room, 0);  // all stages of all blocks were multiplied

  int owner = group % p.split, place = group / p.split;
  ESPARSE_UNROLL
  for (int i = 0; i < Tile::kRows / kItemRows; ++i) {
    if (i * Tile::kGroups + group < items) {
      device.SendTo(owner, mine + (place * p.split + rank) * kItemBytes, sum[i * 4], sum[i * 4 + 1],
                    sum[i * 4 + 2], sum[i * 4 + 3], sums);
    }
    for (owner += Tile::kGroups; owner >= p.split; owner -= p.split) ++place;
  }

  device.WaitForSent(sums, 0);
  for (int at = group; at * p.split + rank < items; at += Tile::kGroups) {
    const int item = at * p.split + rank;
    float all[4] = {}, part[kMostSplit][4];
    ESPARSE_UNROLL
    for (int i = 0; i < kMostSplit; ++i) {
      if (i < p.split) device.LoadShared16(mine + (at * p.split + i) * kItemBytes, part[i]);
    }
    ESPARSE_UNROLL
    for (int i = 0; i < kMostSplit; ++i) {
      ESPARSE_UNROLL
      for (int j = 0; j < 4; ++j) all[j] += i < p.split ? part[i][j] : 0;
    }
    // A warp has 16 outputs: lane 4 g + t those at g and g + 8, of rows 2 t and 2 t + 1; and after
    // that outputs 2 t and 2 t + 1 of row g.
    const uint32_t first = device.Transpose(device.template Pack<T>(all[0], all[1]));
    const uint32_t second = device.Transpose(device.template Pack<T>(all[2], all[3]));
    const int y_row = row + item / Tile::kGroups * kItemRows + (lane >> 2);
    const int of_group = output + item % Tile::kGroups * kGroupOutputs;
    if (y_row >= p.rows || of_group >= p.out) continue;
    uint16_t* const to = p.y + static_cast<size_t>(y_row) * p.out + of_group +
                         thread % kGroupThreads / 32 * 16 + (lane & 3) * 2;
    device.Store4(to, first);
    device.Store4(to + kChunk, second);
  }
}

// Multiplies all stages of all tiles of a block, and writes y: all warpgroups.
template <typename T, typename Tile, typename Device>
ESPARSE_DEVICE void MultiplyStages(Device& device, const PrefillArgs& p,
                                   StageLoader<Tile, Device>& loader) {
  const uint32_t stages = device.Shared(), full = stages + Tile::kBarriersAt,
                 empty = full + Tile::kStages * 8;
  const int thread = device.Thread(), lane = thread % 32;
  const int warp = device.OfWarp(thread / 32), group = warp * 32 / kGroupThreads;
  const int team = Tile::kCluster * p.split, rank = Tile::kCluster > 1 ? device.Rank() : 0;
  const Share share = ShareOf<Tile>(device, p);
  const int steps = share.end - share.first;
  // Of the indices: 256 bytes for 32 channels, in them 64 for 16 outputs, in them 8 for outputs
  // (o, o + 8), whose nibbles alternate, and in them bytes of the two chunks of 16 channels by
  // turns. Lane t of four serves the product t / 2 of a stage with the chunk t % 2.
  const uint32_t my_indices = stages + Tile::kIndicesAt + group * Tile::kIndexBytes +
                              ((lane >> 1) & 1) * 256 + (warp & 3) * 64 + (lane >> 2) * 8;
  const uint32_t my_bytes = lane & 1 ? 0x7531 : 0x6420;

  uint32_t turn = 0;  // stages that were multiplied
  int first_place = 0;  // of the two, where the first rows of the next tile go
  float sum[Tile::kRows / 2];
  // While it waits for the other warpgroups, products of its own are under way.
  const auto load = [&] {
    if (Tile::kHasLoader || warp != 0) return;
    if (device.Elect()) loader.Next();
    device.SyncWarp();
  };
  for (int tile = p.first + device.Block() / team; tile < p.end; tile += device.Blocks() / team) {
    // The stage before, whose products have ended.
    const auto release = [&] {
      const uint32_t barrier = empty + (turn - 1) % Tile::kStages * 8;
      if (Tile::kCluster == 1) {
        if (lane == 0) device.Arrive(barrier);
      } else if (lane < Tile::kCluster) {
        device.ArriveAt(barrier, lane);
      }
    };
    const auto multiply = [&](uint32_t& indices, int done) {
      const int stage = turn % Tile::kStages;
      device.WaitBarrier(full + 8 * stage, turn / Tile::kStages & 1);
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
      device.template MultiplySparse<T, Tile::kRows, 0>(sum, weight, rows, indices, done > 0);
      device.template MultiplySparse<T, Tile::kRows, 1>(sum, Further<32>(weight), Further<64>(rows),
                                                        indices, true);
      device.CommitProducts();
      device.template WaitProducts<1>();
      if (done > 0) {
        release();
        load();
      }
      ++turn;
    };
    // The indices stay in their register while the products run, so the next stage has another.
    uint32_t even, odd;
    for (int done = 0; done < steps; done += 2) {
      multiply(even, done);
      if (done + 1 < steps) multiply(odd, done + 1);
    }
    device.template WaitProducts<0>();
    if (Tile::kCluster == 1 && p.split > 1) {
      ShareSums<T, Tile>(device, p, tile, sum);
      return;
    }
    release();
    load();

    // A thread writes every `kStep`th row of y, eight numbers of it.
    constexpr int kChunks = kGroupOutputs / kChunk, kStep = kGroupThreads / kChunks;
    constexpr int kParts = Tile::kRows / Tile::kStoreRows;
    const uint32_t store = stages + Tile::kStoreAt + group * 2 * Tile::kStoreBytes;
    uint32_t from;
    uint16_t* to;
    int left;  // rows of y, from the first one of this thread on
    ESPARSE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      // All have read what was here, since they met for the part, or tile, before.
      const int place = (part + first_place) % 2 * Tile::kStoreBytes;
      ESPARSE_UNROLL
      for (int half = 0; half < Tile::kStoreRows / 16; ++half) {  // of 16 outputs of this warp
        const int at = part * Tile::kStoreRows / 2 + half * 8;
        const int mine = device.Anew(lane);
        const int matrix = mine >> 3, y_row = half * 16 + (matrix >> 1) * 8 + (mine & 7);
        const int chunk = (warp & 3) * 2 + (matrix & 1);
        device.StoreTransposed(store + place + y_row * 128 + ((chunk ^ (y_row & 7)) << 4),
                               device.template Pack<T>(sum[at], sum[at + 1]),
                               device.template Pack<T>(sum[at + 2], sum[at + 3]),
                               device.template Pack<T>(sum[at + 4], sum[at + 5]),
                               device.template Pack<T>(sum[at + 6], sum[at + 7]));
      }
      device.SyncGroup(group);
      if (part == 0) {
        const int mine = device.Anew(thread) % kGroupThreads;
        const int my_row = mine / kChunks, my_chunk = mine % kChunks;
        int output, row;
        PlaceTile<Tile>(p, tile * Tile::kCluster + rank, &output, &row);
        output += group * kGroupOutputs;
        from = store + my_row * 128 + ((my_chunk ^ (my_row & 7)) << 4);
        to = p.y + static_cast<size_t>(row + my_row) * p.out + output + my_chunk * kChunk;
        left = output < p.out ? p.rows - row - my_row : 0;
      }
      ESPARSE_UNROLL
      for (int r = 0; r < Tile::kStoreRows; r += kStep) {
        uint32_t four[4];
        device.LoadShared16(from + place + r * 128, four);
        if (part * Tile::kStoreRows + r < left) {
          device.Store16(to, four[0], four[1], four[2], four[3]);
        }
        to += kStep * p.out;
      }
    }
    if (kParts % 2 != 0) first_place ^= 1;
  }
}

template <typename T, typename Tile, typename Device>
ESPARSE_DEVICE void Prefill(Device& device, const PrefillArgs& p) {
  const uint32_t full = device.Shared() + Tile::kBarriersAt;
  const int thread = device.Thread();
  // Who lets the next kernel start has seen the one before end, or requests W alone until then (see
  // dependent_launch.h). The second launch reads x at once, so the first one has to have seen it.
  if (p.prefetch && !p.followed) device.LetNextStart();
  if (thread == Tile::kThreads - 32) device.PrefetchDescriptions();
  const bool splits = Tile::kCluster == 1 && p.split > 1;
  if (thread == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      device.InitBarrier(full + 8 * s, 1);
      device.InitBarrier(full + 8 * (Tile::kStages + s), Tile::kWorkers / 32 * Tile::kCluster);
    }
    if (splits) {
      device.InitBarrier(device.Shared() + Tile::kRoomAt, Tile::kWorkers / 32 * p.split);
      device.InitBarrier(device.Shared() + Tile::kSumsAt, 1);
    }
    device.FenceBarriers();
  }
  // The barriers of all blocks are there when the meeting of the cluster has ended.
  if (Tile::kCluster > 1 || splits) device.BeginMeeting();
  if (Tile::kCluster > 1) {
    device.EndMeeting();
  } else {
    device.SyncBlock();
  }
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
    if (splits) device.EndMeeting();
    MultiplyStages<T, Tile>(device, p, loader);
    device.SyncWarp();
  } else {
    if (Tile::kHasLoader && device.Elect()) {
      loader.Begin();
      while (loader.Left()) loader.Next();
    }
    device.SyncWarp();
    if (splits) device.EndMeeting();
  }
  // No block leaves while others send it x, or arrive at its barriers. Where it is sums that they
  // send, it has waited for them, and for all arrivals.
  if (Tile::kCluster > 1) device.SyncCluster();
  // Who waits for the second launch waits for the first one too.
  if (p.first > 0) device.WaitForPrevious();
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_KERNEL_H_
