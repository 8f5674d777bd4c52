// The kernel of attention_kernel.h run on the host, for tests where no GPU is: its threads are
// fibers that take turns, and change at every exchange and barrier. Built by the tests.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define ESPARSE_DEVICE inline
#define ESPARSE_UNROLL
#include "cuda/attention_kernel.h"

namespace esparse::cuda {
namespace {

constexpr int kWarpThreads = 32;
constexpr size_t kStackBytes = 128 << 10;

// Where so many threads wait for each other.
struct Meeting {
  int expected = 0, arrived = 0;
  int64_t times = 0;
};

struct Cluster;

// One thread, and what the kernel asks of it.
struct Fiber {
  Cluster* cluster;
  int block, thread;  // block: of the grid
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;

  int Thread() const { return thread; }
  int Block() const { return block; }
  void WaitForPrevious();
  void LetNextStart() const {}
  int Load(const int32_t* from) const { return *from; }
  Eight Load(const Eight* from) const { return *from; }
  float Widen(_Float16 x) const { return static_cast<float>(x); }
  template <typename T>
  T Narrow(float x) const {
    return static_cast<T>(x);
  }
  template <typename T>
  void Widen(const Eight& eight, float (&wide)[8]) const {
    T numbers[8];
    std::memcpy(numbers, &eight, sizeof(numbers));
    for (int i = 0; i < 8; ++i) wide[i] = Widen(numbers[i]);
  }
  float Exp2(float x) const { return std::exp2(x); }
  float Exchange(float x, int offset);
  void SyncBlock();
  void SyncCluster();
  float LoadFrom(int rank, const float* place) const;
  void Meet(Meeting* meeting);
};

struct Cluster {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<float> exchanged;        // a number for each fiber
  std::vector<Meeting> warps, blocks;  // of this cluster
  Meeting all;
  std::vector<std::vector<char>> shared;  // memory of each block
  std::vector<int> running;               // fibers of each block
  int64_t steps = 0;                      // arrivals and ends so far
  std::function<void()> previous;         // what the kernel before writes, at its end
  std::function<void(Fiber*)> body;
  int block_threads = 0;
};

void Fiber::Meet(Meeting* meeting) {
  const int64_t time = meeting->times;
  ++cluster->steps;
  if (++meeting->arrived == meeting->expected) {
    meeting->arrived = 0;
    ++meeting->times;
  }
  while (meeting->times == time) swapcontext(&context, &cluster->scheduler);
}

int Rank(const Fiber& fiber) {
  return fiber.block % static_cast<int>(fiber.cluster->blocks.size());
}

float Fiber::Exchange(float x, int offset) {
  const int me = Rank(*this) * cluster->block_threads + thread;
  Meeting* warp = &cluster->warps[me / kWarpThreads];
  cluster->exchanged[me] = x;
  Meet(warp);
  const float other = cluster->exchanged[me ^ offset];
  Meet(warp);
  return other;
}

void Fiber::WaitForPrevious() {
  Meet(&cluster->all);  // until then all have what was there before
  if (cluster->previous) cluster->previous();
  cluster->previous = nullptr;
}

void Fiber::SyncBlock() { Meet(&cluster->blocks[Rank(*this)]); }
void Fiber::SyncCluster() { Meet(&cluster->all); }

float Fiber::LoadFrom(int rank, const float* place) const {
  const size_t at = reinterpret_cast<const char*>(place) - cluster->shared[Rank(*this)].data();
  return *reinterpret_cast<const float*>(cluster->shared[rank].data() + at);
}

void Enter(unsigned high, unsigned low) {
  auto* fiber = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
  Cluster* cluster = fiber->cluster;
  cluster->body(fiber);
  fiber->done = true;
  ++cluster->steps;
  // A block that has ended has no memory that others could read.
  std::vector<char>& shared = cluster->shared[Rank(*fiber)];
  if (--cluster->running[Rank(*fiber)] == 0) std::fill(shared.begin(), shared.end(), '\xff');
  setcontext(&fiber->cluster->scheduler);
}

// False where threads wait for others that never come.
bool Run(int first_block, int blocks, int block_threads, size_t shared_bytes,
         std::function<void()> previous, std::function<void(Fiber*)> body) {
  Cluster cluster;
  cluster.body = std::move(body);
  cluster.previous = std::move(previous);
  cluster.block_threads = block_threads;
  cluster.running.assign(blocks, cluster.block_threads);
  const int threads = blocks * cluster.block_threads;
  cluster.exchanged.resize(threads);
  cluster.warps.assign(threads / kWarpThreads, {kWarpThreads});
  cluster.blocks.assign(blocks, {cluster.block_threads});
  cluster.all.expected = threads;
  cluster.shared.assign(blocks, std::vector<char>(shared_bytes, '\x7f'));  // what memory may hold
  for (int i = 0; i < threads; ++i) {
    auto fiber = std::make_unique<Fiber>();
    fiber->cluster = &cluster;
    fiber->block = first_block + i / cluster.block_threads;
    fiber->thread = i % cluster.block_threads;
    fiber->stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    const auto address = reinterpret_cast<uintptr_t>(fiber.get());
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(Enter), 2,
                static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
    cluster.fibers.push_back(std::move(fiber));
  }
  for (bool running = true; running;) {
    running = false;
    const int64_t before = cluster.steps;
    for (auto& fiber : cluster.fibers) {
      if (fiber->done) continue;
      running = true;
      swapcontext(&cluster.scheduler, &fiber->context);
    }
    if (running && cluster.steps == before) return false;
  }
  return true;
}

// What the kernel before gives this one. Until it has ended there is something else in its place.
struct Given {
  std::vector<char> projected, cosines, sines;
  int32_t length;
  std::vector<int32_t> start;  // empty for none
};

template <int kFeatures, int kShared, int kCluster>
bool AttendAll(const Given& given, int32_t early_length, void* keys, void* values,
               const int32_t* places, void* attended, const AttentionArgs& args, int matrices) {
  using Shared = AttentionShared<_Float16, kFeatures, kShared, kCluster>;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    Given seen = {std::vector<char>(given.projected.size(), '\xff'),
                  std::vector<char>(given.cosines.size(), '\xff'),
                  std::vector<char>(given.sines.size(), '\xff'), early_length,
                  std::vector<int32_t>(given.start.size(), early_length)};
    const auto previous = [&] {
      std::copy(given.projected.begin(), given.projected.end(), seen.projected.begin());
      std::copy(given.cosines.begin(), given.cosines.end(), seen.cosines.begin());
      std::copy(given.sines.begin(), given.sines.end(), seen.sines.begin());
      seen.length = given.length;
      std::copy(given.start.begin(), given.start.end(), seen.start.begin());
    };
    const bool ended =
        Run(matrix * kCluster, kCluster, kAttentionThreads<kCluster>, sizeof(Shared), previous,
            [&](Fiber* fiber) {
              auto* shared = reinterpret_cast<Shared*>(fiber->cluster->shared[Rank(*fiber)].data());
              Attend<Fiber, _Float16, kFeatures, kShared, kCluster>(
                  *fiber, *shared, reinterpret_cast<const _Float16*>(seen.projected.data()),
                  static_cast<_Float16*>(keys), static_cast<_Float16*>(values),
                  reinterpret_cast<const float*>(seen.cosines.data()),
                  reinterpret_cast<const float*>(seen.sines.data()), &seen.length,
                  seen.start.data(), places, static_cast<_Float16*>(attended), args);
            });
    if (!ended) return false;
  }
  return true;
}

}  // namespace
}  // namespace esparse::cuda

// 0, 1 where there is no such instance, or 2 where threads wait for each other for ever. `start`
// and `places` may be null; `early_length` is what stands in the place of `length` and of every
// start until the kernel before has ended.
extern "C" __attribute__((visibility("default"))) int esparse_attend_on_host(
    int batch, int kv_heads, int shared, int features, int slots, int angle_rows, int cluster,
    int prefetch, int length, int early_length, const void* projected, void* keys, void* values,
    const float* cosines, const float* sines, const int32_t* start, const int32_t* places,
    void* attended) {
  using namespace esparse::cuda;
  AttentionArgs args = {};
  args.kv_heads = kv_heads;
  args.slots = slots;
  args.width = (shared + 2) * kv_heads * features;
  args.angle_stride = angle_rows == 1 ? 0 : features / 2;
  args.has_start = start != nullptr;
  args.has_places = places != nullptr;
  args.prefetch = prefetch;
  args.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(features)));
  const auto bytes = [](const void* from, size_t count) {
    return std::vector<char>(static_cast<const char*>(from),
                             static_cast<const char*>(from) + count);
  };
  const size_t angle_bytes = sizeof(float) * angle_rows * features / 2;
  const Given given = {
      bytes(projected, sizeof(_Float16) * batch * args.width), bytes(cosines, angle_bytes),
      bytes(sines, angle_bytes), length,
      start == nullptr ? std::vector<int32_t>() : std::vector<int32_t>(start, start + batch)};
  const auto attend = [&](auto features_constant, auto shared_constant, auto cluster_constant) {
    const bool ended = AttendAll<features_constant, shared_constant, cluster_constant>(
        given, early_length, keys, values, places, attended, args, batch * kv_heads);
    return ended ? 0 : 2;
  };
  using std::integral_constant;
  const auto with_shared = [&](auto features_constant, auto shared_constant) {
    if (cluster == 1)
      return attend(features_constant, shared_constant, integral_constant<int, 1>{});
    if (cluster == 4)
      return attend(features_constant, shared_constant, integral_constant<int, 4>{});
    if (cluster == 8)
      return attend(features_constant, shared_constant, integral_constant<int, 8>{});
    return 1;
  };
  const auto with_features = [&](auto features_constant) {
    if (shared == 1) return with_shared(features_constant, integral_constant<int, 1>{});
    if (shared == 2) return with_shared(features_constant, integral_constant<int, 2>{});
    if (shared == 4) return with_shared(features_constant, integral_constant<int, 4>{});
    if (shared == 8) return with_shared(features_constant, integral_constant<int, 8>{});
    return 1;
  };
  if (features == 64) return with_features(integral_constant<int, 64>{});
  if (features == 128) return with_features(integral_constant<int, 128>{});
  return 1;
}
