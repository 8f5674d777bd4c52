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
#ifndef ESPARSE_FFI_CUDA_ATTENTION_KERNEL_H_
#define ESPARSE_FFI_CUDA_ATTENTION_KERNEL_H_

#include <cstdint>

namespace esparse::cuda {

constexpr int kAttentionThreads = 256;

struct AttentionArgs {
  int kv_heads, slots, width;  // width: of projected, in numbers
  int angle_stride;            // between the angles of two rows: 0 where all have the same
  int has_start, prefetch;
  float scale;  // of the logits, in base 2
};

// Below every logit. Finite, so that the difference of two is a number.
constexpr float kNoLogit = -1e30f;

// Eight numbers of 16 bits, as they are loaded.
struct alignas(16) Eight {
  uint32_t pairs[4];
};

// What a block has in shared memory, for kShared heads.
template <typename T, int kFeatures, int kShared>
struct AttentionShared {
  static constexpr int kWarps = kAttentionThreads / 32;
  float query[kShared][kFeatures];  // scaled
  T fresh_key[kFeatures], fresh_value[kFeatures];
  // Weighted values, then the greatest logit and the sum.
  float warps[kWarps][kShared][kFeatures + 2];
  float block[kShared][kFeatures + 2];
};

// kCluster blocks share a head.
template <typename Device, typename T, int kFeatures, int kShared, int kCluster>
ESPARSE_DEVICE void Attend(Device& device, AttentionShared<T, kFeatures, kShared>& shared,
                           const T* projected, T* keys, T* values, const float* cosines,
                           const float* sines, const int32_t* length, const int32_t* start,
                           T* attended, const AttentionArgs& p) {
  constexpr int kLanes = kFeatures / 8;                            // that share a slot
  constexpr int kGroups = kAttentionThreads / kLanes;              // slots that are read at once
  constexpr int kAhead = kShared == 1 ? 8 : kShared == 8 ? 2 : 4;  // slots a group has under way
  constexpr int kWarps = kAttentionThreads / 32;
  constexpr int kHalf = kFeatures / 2;
  const int thread = device.Thread(), warp = thread / 32, group = thread / kLanes;
  const int feature = thread % kLanes * 8;
  const int matrix = device.Block() / kCluster, rank = device.Block() % kCluster;
  const int row = matrix / p.kv_heads, head = matrix % p.kv_heads;

  if (!p.prefetch) device.WaitForPrevious();
  // The new token's slot, and this block's part of the filled ones; false if it was that before.
  int place = -1, begin = -1, end = -1;
  auto cut = [&] {
    const int was[] = {place, begin, end};
    const int filled = device.Load(length);
    place = filled < 0 ? 0 : filled < p.slots ? filled : p.slots - 1;
    int first = p.has_start ? device.Load(start + row) : 0;
    first = first < 0 ? 0 : first > place ? place : first;
    const int part = (place - first + kCluster - 1) / kCluster;
    begin = first + rank * part;
    end = begin + part < place ? begin + part : place;
    return place != was[0] || begin != was[1] || end != was[2];
  };
  cut();
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
  if (p.prefetch) {
    device.WaitForPrevious();
    // How far the cache is filled is counted in the same computation.
    if (cut()) request(begin + group);
  }

  // The queries of this head, and the new key and value.
  const T* of_row = projected + static_cast<int64_t>(row) * p.width;
  const float* cosine = cosines + row * p.angle_stride;
  const float* sine = sines + row * p.angle_stride;
  for (int i = thread; i < kShared * kHalf; i += kAttentionThreads) {
    const int r = i / kHalf, pair = i % kHalf;
    const T* query = of_row + (head * kShared + r) * kFeatures;
    const float a = device.Widen(query[pair]), b = device.Widen(query[pair + kHalf]);
    const float c = cosine[pair], s = sine[pair];
    // Rounded as a query of its own would be.
    shared.query[r][pair] = p.scale * device.Widen(device.template Narrow<T>(a * c - b * s));
    shared.query[r][pair + kHalf] =
        p.scale * device.Widen(device.template Narrow<T>(b * c + a * s));
  }
  if (rank == 0) {
    const T* new_key = of_row + (p.kv_heads * kShared + head) * kFeatures;
    const T* new_value = new_key + p.kv_heads * kFeatures;
    T* key_to = keys + (static_cast<int64_t>(matrix) * p.slots + place) * kFeatures;
    T* value_to = values + (static_cast<int64_t>(matrix) * p.slots + place) * kFeatures;
    for (int pair = thread; pair < kHalf; pair += kAttentionThreads) {
      const float a = device.Widen(new_key[pair]), b = device.Widen(new_key[pair + kHalf]);
      const float c = cosine[pair], s = sine[pair];
      key_to[pair] = shared.fresh_key[pair] = device.template Narrow<T>(a * c - b * s);
      key_to[pair + kHalf] = shared.fresh_key[pair + kHalf] =
          device.template Narrow<T>(b * c + a * s);
      value_to[pair] = shared.fresh_value[pair] = new_value[pair];
      value_to[pair + kHalf] = shared.fresh_value[pair + kHalf] = new_value[pair + kHalf];
    }
  }
  device.SyncBlock();

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
  for (int i = thread; i < kShared * kFeatures; i += kAttentionThreads) {
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
  T* to = attended + (static_cast<int64_t>(row) * p.kv_heads + head) * kShared * kFeatures;
  for (int i = rank * kAttentionThreads + thread; i < kShared * kFeatures;
       i += kCluster * kAttentionThreads) {
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
    to[i] = device.template Narrow<T>(total / all);
  }
  device.SyncCluster();  // nobody leaves while its part is read
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_ATTENTION_KERNEL_H_
