// The kernel of attention.h. Its body is plain C++ over a few primitives of the device, which the
// file that includes this defines: attention.cu those of a GPU, testing/attention_on_host.cc those
// of a test without one.
//
// A cluster of blocks has one key/value head of one row, and cuts its filled slots among its
// blocks. In a block, kLanes lanes together read a slot, 8 features each, so that a warp reads 2 or
// 4 slots at once and all warps neighbouring ones. Each such group of lanes keeps a softmax of its
// own (greatest logit, sum, weighted values), as the slots pass through its registers; they are
// merged inside the warp, the block and the cluster. The new token's key and value do not pass
// through the cache: the first group of the first block begins with them.
//
// The result may be written in another order of its features, that of the product behind.
#ifndef ESPARSE_FFI_CUDA_ATTENTION_KERNEL_H_
#define ESPARSE_FFI_CUDA_ATTENTION_KERNEL_H_

#include <cstdint>

namespace esparse::cuda {

// Threads of a block. Where clusters are small there are many blocks: then smaller ones, more of
// which are in different stages at once.
template <int kCluster>
constexpr int kAttentionThreads = kCluster == 8 ? 256 : 128;

struct AttentionArgs {
  int kv_heads, slots, width;  // width: of projected, in numbers
  int angle_stride;            // between the angles of two rows: 0 where all have the same
  int has_start, has_places, prefetch;
  float scale;  // of the logits, in base 2
};

// Below every logit. Finite, so that the difference of two is a number.
constexpr float kNoLogit = -1e30f;

// Eight numbers of 16 bits, as they are loaded.
struct alignas(16) Eight {
  uint32_t pairs[4];
};

// What a block has in shared memory, for kShared heads.
template <typename T, int kFeatures, int kShared, int kCluster>
struct alignas(16) AttentionShared {
  static constexpr int kWarps = kAttentionThreads<kCluster> / 32;
  float query[kShared][kFeatures];  // scaled
  alignas(16) T fresh_key[kFeatures], fresh_value[kFeatures];
  // Weighted values, then the greatest logit and the sum.
  float warps[kWarps][kShared][kFeatures + 2];
  float block[kShared][kFeatures + 2];
};

// kCluster blocks share a head.
template <typename Device, typename T, int kFeatures, int kShared, int kCluster>
ESPARSE_DEVICE void Attend(Device& device, AttentionShared<T, kFeatures, kShared, kCluster>& shared,
                           const T* projected, T* keys, T* values, const float* cosines,
                           const float* sines, const int32_t* length, const int32_t* start,
                           const int32_t* places, T* attended, const AttentionArgs& p) {
  constexpr int kThreads = kAttentionThreads<kCluster>;
  constexpr int kLanes = kFeatures / 8;                            // that share a slot
  constexpr int kGroups = kThreads / kLanes;                       // slots that are read at once
  constexpr int kAhead = kShared == 1 ? 8 : kShared == 8 ? 2 : 4;  // slots a group has under way
  constexpr int kWarps = kThreads / 32;
  constexpr int kHalf = kFeatures / 2;
  const int thread = device.Thread(), warp = thread / 32, group = thread / kLanes;
  const int feature = thread % kLanes * 8;
  const int matrix = device.Block() / kCluster, rank = device.Block() % kCluster;
  const int row = matrix / p.kv_heads, head = matrix % p.kv_heads;

  if (!p.prefetch) device.WaitForPrevious();
  // The filled slots of this row, and of them the new token's slot and this block's part.
  struct Slots {
    int filled, first;
  };
  auto look = [&]() -> Slots {
    return {device.Load(length), p.has_start ? device.Load(start + row) : 0};
  };
  int place, begin, end;
  auto cut = [&](const Slots& slots) {
    place = slots.filled < 0 ? 0 : slots.filled < p.slots ? slots.filled : p.slots - 1;
    const int first = slots.first < 0 ? 0 : slots.first > place ? place : slots.first;
    const int part = (place - first + kCluster - 1) / kCluster;
    begin = first + rank * part;
    end = begin + part < place ? begin + part : place;
  };
  const Slots early = look();
  cut(early);
  const int64_t at = static_cast<int64_t>(matrix) * p.slots * kFeatures + feature;

  Eight key[kAhead], value[kAhead];
  auto request = [&](int slot) {
    ESPARSE_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int s = slot + u * kGroups;
      if (s >= end) continue;
      key[u] = device.Load(reinterpret_cast<const Eight*>(keys + at + int64_t{kFeatures} * s));
      value[u] = device.Load(reinterpret_cast<const Eight*>(values + at + int64_t{kFeatures} * s));
    }
  };
  ESPARSE_UNROLL
  for (int u = 0; u < kAhead; ++u) key[u] = value[u] = Eight{};  // slots that are not there
  request(begin + group);
  device.LetNextStart();
  // How far the cache is filled is counted in the same computation: asked again with the queries.
  Slots settled = early;
  if (p.prefetch) {
    device.WaitForPrevious();
    settled = look();
  }

  // Where this thread's part of the result goes.
  constexpr int kWriters = kCluster * kThreads;
  constexpr int kWritten = (kShared * kFeatures + kWriters - 1) / kWriters;
  const int writer = rank * kThreads + thread;
  int to[kWritten];
  ESPARSE_UNROLL
  for (int w = 0; w < kWritten; ++w) {
    const int i = head * kShared * kFeatures + writer + w * kWriters;
    const bool there = writer + w * kWriters < kShared * kFeatures;
    to[w] = there && p.has_places ? device.Load(places + i) : i;
  }

  // The queries of this head, and for the first block the new key and value.
  const T* of_row = projected + static_cast<int64_t>(row) * p.width;
  const float* cosine = cosines + row * p.angle_stride;
  const float* sine = sines + row * p.angle_stride;
  for (int i = thread; i < (kShared + (rank == 0)) * kHalf; i += kThreads) {
    const int r = i / kHalf, pair = i % kHalf;
    const bool fresh = r == kShared;
    const T* from = of_row + (fresh ? p.kv_heads * kShared + head : head * kShared + r) * kFeatures;
    // Of a query this is itself: all that an item needs is under way at once.
    const T* value_from = from + (fresh ? p.kv_heads * kFeatures : 0);
    const float a = device.Widen(from[pair]), b = device.Widen(from[pair + kHalf]);
    const float c = cosine[pair], s = sine[pair];
    const T low_value = value_from[pair], high_value = value_from[pair + kHalf];
    // Rounded as a query of its own would be.
    const T low = device.template Narrow<T>(a * c - b * s);
    const T high = device.template Narrow<T>(b * c + a * s);
    if (fresh) {
      shared.fresh_key[pair] = low;
      shared.fresh_key[pair + kHalf] = high;
      shared.fresh_value[pair] = low_value;
      shared.fresh_value[pair + kHalf] = high_value;
    } else {
      shared.query[r][pair] = p.scale * device.Widen(low);
      shared.query[r][pair + kHalf] = p.scale * device.Widen(high);
    }
  }
  if (settled.filled != early.filled || settled.first != early.first) {
    cut(settled);
    request(begin + group);
  }
  device.SyncBlock();
  // Into the cache, by the last warp: the first one has the new token.
  static_assert(2 * kLanes <= 32);
  if (const int i = thread - (kThreads - 32); rank == 0 && i >= 0 && i < 2 * kLanes) {
    const int64_t slot_at = (static_cast<int64_t>(matrix) * p.slots + place) * kFeatures;
    const T* fresh = i < kLanes ? shared.fresh_key : shared.fresh_value;
    T* into = (i < kLanes ? keys : values) + slot_at;
    *reinterpret_cast<Eight*>(into + feature) = *reinterpret_cast<const Eight*>(fresh + feature);
  }

  float query[kShared][8], most[kShared], sum[kShared], weighted[kShared][8];
  ESPARSE_UNROLL
  for (int r = 0; r < kShared; ++r) {
    most[r] = kNoLogit;
    sum[r] = 0;
    ESPARSE_UNROLL
    for (int i = 0; i < 8; ++i) {
      query[r][i] = shared.query[r][feature + i];
      weighted[r][i] = 0;
    }
  }
  // The sum over the features of a slot, known to all its lanes.
  auto over_features = [&](float x) {
    ESPARSE_UNROLL
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += device.Exchange(x, offset);
    return x;
  };
  if (rank == 0 && warp == 0) {
    ESPARSE_UNROLL
    for (int r = 0; r < kShared; ++r) {
      float logit = 0;
      ESPARSE_UNROLL
      for (int i = 0; i < 8; ++i)
        logit += query[r][i] * device.Widen(shared.fresh_key[feature + i]);
      logit = over_features(logit);
      if (group == 0) {
        most[r] = logit;
        sum[r] = 1;
        ESPARSE_UNROLL
        for (int i = 0; i < 8; ++i) weighted[r][i] = device.Widen(shared.fresh_value[feature + i]);
      }
    }
  }

  for (int slot = begin; slot < end; slot += kGroups * kAhead) {
    float logit[kAhead][kShared];
    ESPARSE_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      float wide[8];
      device.template Widen<T>(key[u], wide);
      const bool there = slot + group + u * kGroups < end;
      ESPARSE_UNROLL
      for (int r = 0; r < kShared; ++r) {
        float x = 0;
        ESPARSE_UNROLL
        for (int i = 0; i < 8; ++i) x += query[r][i] * wide[i];
        x = over_features(x);
        logit[u][r] = there ? x : kNoLogit;
      }
    }
    float shrink[kShared];
    ESPARSE_UNROLL
    for (int r = 0; r < kShared; ++r) {
      float now = most[r];
      ESPARSE_UNROLL
      for (int u = 0; u < kAhead; ++u) now = logit[u][r] > now ? logit[u][r] : now;
      shrink[r] = device.Exp2(most[r] - now);
      most[r] = now;
      sum[r] *= shrink[r];
      ESPARSE_UNROLL
      for (int i = 0; i < 8; ++i) weighted[r][i] *= shrink[r];
    }
    ESPARSE_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      float wide[8];
      const bool there = slot + group + u * kGroups < end;
      // What is there of another slot may be infinite, and no weight makes that nothing.
      device.template Widen<T>(there ? value[u] : Eight{}, wide);
      ESPARSE_UNROLL
      for (int r = 0; r < kShared; ++r) {
        const float weight = there ? device.Exp2(logit[u][r] - most[r]) : 0.0f;
        sum[r] += weight;
        ESPARSE_UNROLL
        for (int i = 0; i < 8; ++i) weighted[r][i] += weight * wide[i];
      }
    }
    request(slot + group + kGroups * kAhead);
  }

  // Merged over the groups of a warp,
  ESPARSE_UNROLL
  for (int offset = kLanes; offset < 32; offset *= 2) {
    ESPARSE_UNROLL
    for (int r = 0; r < kShared; ++r) {
      const float other = device.Exchange(most[r], offset);
      const float now = other > most[r] ? other : most[r];
      const float mine = device.Exp2(most[r] - now), theirs = device.Exp2(other - now);
      most[r] = now;
      sum[r] = sum[r] * mine + device.Exchange(sum[r], offset) * theirs;
      ESPARSE_UNROLL
      for (int i = 0; i < 8; ++i) {
        weighted[r][i] = weighted[r][i] * mine + device.Exchange(weighted[r][i], offset) * theirs;
      }
    }
  }
  if (thread % 32 < kLanes) {
    ESPARSE_UNROLL
    for (int r = 0; r < kShared; ++r) {
      ESPARSE_UNROLL
      for (int i = 0; i < 8; ++i) shared.warps[warp][r][feature + i] = weighted[r][i];
      if (feature == 0) {
        shared.warps[warp][r][kFeatures] = most[r];
        shared.warps[warp][r][kFeatures + 1] = sum[r];
      }
    }
  }
  device.SyncBlock();
  // the block,
  for (int i = thread; i < kShared * kFeatures; i += kThreads) {
    const int r = i / kFeatures, f = i % kFeatures;
    float now = kNoLogit, all = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) {
      now = shared.warps[w][r][kFeatures] > now ? shared.warps[w][r][kFeatures] : now;
    }
    for (int w = 0; w < kWarps; ++w) {
      const float shrink = device.Exp2(shared.warps[w][r][kFeatures] - now);
      all += shared.warps[w][r][kFeatures + 1] * shrink;
      total += shared.warps[w][r][f] * shrink;
    }
    shared.block[r][f] = total;
    if (f == 0) {
      shared.block[r][kFeatures] = now;
      shared.block[r][kFeatures + 1] = all;
    }
  }
  // and the cluster, whose blocks share that work.
  device.SyncCluster();
  T* result = attended + static_cast<int64_t>(row) * p.kv_heads * kShared * kFeatures;
  ESPARSE_UNROLL
  for (int w = 0; w < kWritten; ++w) {
    const int i = writer + w * kWriters;
    if (i >= kShared * kFeatures) break;
    const int r = i / kFeatures, f = i % kFeatures;
    float now = kNoLogit, all = 0, total = 0;
    for (int k = 0; k < kCluster; ++k) {
      const float most_there = device.LoadFrom(k, &shared.block[r][kFeatures]);
      now = most_there > now ? most_there : now;
    }
    for (int k = 0; k < kCluster; ++k) {
      const float shrink = device.Exp2(device.LoadFrom(k, &shared.block[r][kFeatures]) - now);
      all += device.LoadFrom(k, &shared.block[r][kFeatures + 1]) * shrink;
      total += device.LoadFrom(k, &shared.block[r][f]) * shrink;
    }
    result[to[w]] = device.template Narrow<T>(total / all);
  }
  device.SyncCluster();  // nobody leaves while its part is read
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_ATTENTION_KERNEL_H_
