// Blocks of a GPU run on the host, for tests where no GPU is: their threads are fibers that take
// turns, and change at every exchange and barrier.
#ifndef ESPARSE_FFI_CUDA_TESTING_FIBERS_H_
#define ESPARSE_FFI_CUDA_TESTING_FIBERS_H_

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace esparse::cuda {

constexpr int kWarpThreads = 32;

// Where so many threads wait for each other.
struct Meeting {
  int expected = 0, arrived = 0;
  int64_t times = 0;
};

// What the lanes of a warp show each other. Two places for each, in turn: so a lane may go on to
// the next exchange while others still read.
struct Shown {
  static constexpr size_t kBytes = 64;
  alignas(16) char of[2][kWarpThreads][kBytes];
};

class Fiber;

// A cluster of blocks, and what the kernel before it leaves.
struct Cluster {
  int blocks, block_threads;
  size_t shared_bytes;             // of each block
  std::function<void()> previous;  // what the kernel before writes, at its end
  std::function<void(Fiber&)> body;
  bool uneven = false;  // whole warps fall behind others, as chance will have it
};

class Running {
 public:
  Running(const Cluster& cluster, int first_block);

  // False where threads wait for others that never come.
  bool ToTheEnd();

 private:
  friend class Fiber;

  Cluster cluster_;
  ucontext_t scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Shown> shown_;             // of each warp
  std::vector<Meeting> warps_, blocks_;  // of the cluster
  Meeting all_;
  std::vector<std::vector<char>> shared_;  // memory of each block
  std::vector<int> left_;                  // fibers of each block that have not ended
  int64_t steps_ = 0;                      // arrivals and ends so far
};

// One thread.
class Fiber {
 public:
  Fiber(Running* running, int rank, int block, int thread);

  unsigned Thread() const { return thread_; }
  unsigned Threads() const { return running_->cluster_.block_threads; }
  unsigned Block() const { return block_; }  // of the grid
  int Rank() const { return rank_; }         // of the block in its cluster
  int Lane() const { return thread_ % kWarpThreads; }

  // All threads of the cluster meet here, as those of a GPU do not have to: what a kernel would
  // need a barrier for around it is not seen.
  void WaitForPrevious() {
    Meet(&running_->all_);  // until then all have what was there before
    if (running_->cluster_.previous) running_->cluster_.previous();
    running_->cluster_.previous = nullptr;
  }
  void SyncWarp() { Meet(&running_->warps_[Warp()]); }
  void SyncBlock() { Meet(&running_->blocks_[rank_]); }
  void SyncCluster() { Meet(&running_->all_); }
  // The same in two steps.
  int64_t ArriveAtCluster() { return Arrive(&running_->all_); }
  void WaitForCluster(int64_t time) { WaitUntilMet(running_->all_, time); }

  // All that are expected there.
  void Meet(Meeting* meeting) { WaitUntilMet(*meeting, Arrive(meeting)); }
  // Until something holds that other threads bring about; who does says so.
  template <typename Condition>
  void WaitUntil(Condition holds) {
    while (!holds()) swapcontext(&context_, &running_->scheduler_);
  }
  void SayProgress() { ++running_->steps_; }

  // Whether all threads of a block of the cluster have.
  bool HasEnded(int rank) const { return running_->left_[rank] == 0; }
  // The shared memory of a block of the cluster.
  std::vector<char>& Shared(int rank) const { return running_->shared_[rank]; }

  // What the lanes of this warp show, in their order.
  template <typename T>
  void Exchange(const T& mine, T (&all)[kWarpThreads]) {
    static_assert(sizeof(T) <= Shown::kBytes);
    auto& shown = running_->shown_[Warp()].of[turn_];
    turn_ = 1 - turn_;
    std::memcpy(shown[Lane()], &mine, sizeof(T));
    SyncWarp();
    for (int lane = 0; lane < kWarpThreads; ++lane) std::memcpy(&all[lane], shown[lane], sizeof(T));
  }
  // The value of the lane whose number differs in the bit `offset`.
  float Exchange(float x, int offset) {
    float all[kWarpThreads];
    Exchange(x, all);
    return all[Lane() ^ offset];
  }

 private:
  friend class Running;
  static constexpr size_t kStackBytes = 128 << 10;

  // How often they had met before.
  int64_t Arrive(Meeting* meeting) {
    const int64_t time = meeting->times;
    ++running_->steps_;
    if (++meeting->arrived == meeting->expected) {
      meeting->arrived = 0;
      ++meeting->times;
    }
    return time;
  }
  void WaitUntilMet(const Meeting& meeting, int64_t time) {
    WaitUntil([&] { return meeting.times != time; });
  }

  int Warp() const { return (rank_ * running_->cluster_.block_threads + thread_) / kWarpThreads; }

  static void Enter(unsigned high, unsigned low) {
    auto* fiber = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
    Running* running = fiber->running_;
    running->cluster_.body(*fiber);
    fiber->done_ = true;
    ++running->steps_;
    // A block that has ended has no memory that others could read.
    std::vector<char>& shared = running->shared_[fiber->rank_];
    if (--running->left_[fiber->rank_] == 0) std::fill(shared.begin(), shared.end(), '\xff');
    setcontext(&running->scheduler_);
  }

  Running* running_;
  int rank_, block_, thread_, turn_ = 0;
  ucontext_t context_;
  std::unique_ptr<char[]> stack_;
  bool done_ = false;
};

inline Fiber::Fiber(Running* running, int rank, int block, int thread)
    : running_(running),
      rank_(rank),
      block_(block),
      thread_(thread),
      stack_(std::make_unique<char[]>(kStackBytes)) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = kStackBytes;
  const auto address = reinterpret_cast<uintptr_t>(this);
  makecontext(&context_, reinterpret_cast<void (*)()>(Enter), 2,
              static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
}

inline Running::Running(const Cluster& cluster, int first_block) : cluster_(cluster) {
  const int threads = cluster.blocks * cluster.block_threads;
  shown_.resize(threads / kWarpThreads);
  warps_.assign(threads / kWarpThreads, {kWarpThreads});
  blocks_.assign(cluster.blocks, {cluster.block_threads});
  all_.expected = threads;
  left_.assign(cluster.blocks, cluster.block_threads);
  // What memory may hold.
  shared_.assign(cluster.blocks, std::vector<char>(cluster.shared_bytes, '\x7f'));
  for (int i = 0; i < threads; ++i) {
    const int rank = i / cluster.block_threads;
    fibers_.push_back(
        std::make_unique<Fiber>(this, rank, first_block + rank, i % cluster.block_threads));
  }
}

inline bool Running::ToTheEnd() {
  constexpr int kPatience = 64;
  std::minstd_rand chance(1 + fibers_.front()->block_);
  std::vector<bool> rests(warps_.size());
  int idle = cluster_.uneven ? 1 : 0;  // rounds in which nobody got on
  for (bool running = true; running;) {
    // Those that rest do so until the others get no further without them.
    for (size_t warp = 0; idle > 0 && warp < rests.size(); ++warp) {
      rests[warp] = idle < kPatience && chance() % 4 != 0;
    }
    running = false;
    const int64_t before = steps_;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      if (fibers_[i]->done_) continue;
      running = true;
      if (!rests[i / kWarpThreads]) swapcontext(&scheduler_, &fibers_[i]->context_);
    }
    idle = steps_ == before ? idle + 1 : 0;
    if (running && idle > (cluster_.uneven ? kPatience : 0)) return false;
  }
  return true;
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_TESTING_FIBERS_H_
