// The kernel of prefill_kernel.h run on the host, in the cut that prefill_plan.cc makes. Built by
// the tests.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <iterator>
#include <list>
#include <map>
#include <utility>
#include <vector>

#include "cuda/prefill_plan.h"
#include "cuda/testing/fibers.h"
#include "cuda/testing/numbers.h"

#define ESPARSE_DEVICE inline
#define ESPARSE_UNROLL
namespace esparse::cuda {
using std::max;
using std::min;
}  // namespace esparse::cuda
#include "cuda/prefill_kernel.h"

namespace esparse::cuda {
namespace {

// A row-major matrix of 16-bit numbers, and what a copy takes of it. Boxes may reach outside.
struct Matrix {
  uint16_t* data;
  int64_t rows, columns;
  int box_rows, box_columns;
  Swizzle swizzle;

  uint16_t* At(int64_t row, int64_t column) const {
    const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
    return inside ? data + row * columns + column : nullptr;
  }
};

// Where a byte lies that would lie at `address` if nothing were strewn.
uint32_t Strewn(uint32_t address, Swizzle swizzle) {
  const uint32_t rows = swizzle == Swizzle::k128Bytes ? 7 : swizzle == Swizzle::k64Bytes ? 3 : 0;
  return address ^ ((address >> 7 & rows) << 4);
}

// When what is asked for takes place: at the request, or when it is waited for.
enum class Asynchronous { kEarly, kLate };

struct Barrier {
  int arrivals = 0, left = 0;
  int64_t bytes = 0, phase = 0;

  void Settle() {
    if (left != 0 || bytes != 0) return;
    ++phase;
    left = arrivals;
  }
};

// A copy to one block: a box of a matrix, or four numbers that another block sends.
struct Copy {
  int rank;
  uint32_t to, barrier;
  const Matrix* matrix;
  int64_t row, column;
  float sent[4];
};

// wgmma.mma_async.sp of one warpgroup, as far as its threads have come to it.
struct WarpgroupProduct {
  uint64_t weight, rows;
  int columns, selector;
  bool add;
  int arrived = 0;
  bool done = false;
  float* sums[kGroupThreads];
  uint32_t indices[kGroupThreads];
};

struct Warpgroup {
  Meeting meeting{kGroupThreads};
  std::deque<WarpgroupProduct> products;  // all there were
};

// What the blocks of a cluster have in common, beside their memory.
struct Hopper {
  PrefillArgs args;
  Asynchronous copying, multiplying;
  Matrix values, x, indices, y;
  std::map<std::pair<int, uint32_t>, Barrier> barriers;  // by rank and address
  std::list<Copy> copies;                                // under way
  std::map<std::pair<int, int>, Warpgroup> warpgroups;   // by rank and number
  std::vector<bool>* written;                            // of y, by all launches
  bool let_next_start = false;
  int waited = 0;        // threads that saw the launch before end
  bool outside = false;  // something was done that a GPU would not take
};

template <typename T>
class Host {
 public:
  Host(Fiber& fiber, Hopper* hopper, int blocks)
      : fiber_(fiber), hopper_(hopper), blocks_(blocks) {}

  int Thread() const { return fiber_.Thread(); }
  int Block() const { return fiber_.Block(); }
  int Blocks() const { return blocks_; }
  int Rank() const { return fiber_.Rank(); }
  int OfWarp(int number) const { return number; }
  int Anew(int number) const { return number; }
  uint32_t Shared() const { return 0; }
  // Who lets the next kernel start has seen the one before end, or requests W alone until then.
  void LetNextStart() {
    const bool early = hopper_->args.prefetch && !hopper_->args.followed;
    if (!early && !waited_) hopper_->outside = true;
    hopper_->let_next_start = true;
  }
  void WaitForPrevious() {
    waited_ = true;
    ++hopper_->waited;
  }
  bool Elect() const { return fiber_.Lane() == 0; }
  void SyncWarp() { fiber_.SyncWarp(); }
  void SyncGroup(int group) { fiber_.Meet(&GroupOf(group).meeting); }
  void SyncBlock() { fiber_.SyncBlock(); }
  void SyncCluster() { fiber_.SyncCluster(); }
  void BeginMeeting() { meeting_ = fiber_.ArriveAtCluster(); }
  void EndMeeting() { fiber_.WaitForCluster(meeting_); }

  void InitBarrier(uint32_t barrier, int arrivals) {
    Place(Rank(), barrier, 8);
    hopper_->barriers[{Rank(), barrier}] = {arrivals, arrivals};
  }
  void FenceBarriers() const {}
  void PrefetchDescriptions() const {}
  void ArriveAndExpect(uint32_t barrier, uint32_t bytes) {
    BarrierOf(Rank(), barrier).bytes += bytes;
    Arrive(barrier);
  }
  void Arrive(uint32_t barrier) { ArriveAt(barrier, Rank()); }
  void ArriveAt(uint32_t barrier, int rank) {
    Barrier& there = BarrierOf(rank, barrier);
    if (--there.left < 0 || fiber_.HasEnded(rank)) hopper_->outside = true;
    there.Settle();
    fiber_.SayProgress();
  }
  void WaitBarrier(uint32_t barrier, uint32_t parity) {
    fiber_.WaitUntil([&] {
      const Barrier& mine = BarrierOf(Rank(), barrier);
      if ((mine.phase & 1) != parity) return true;
      auto& copies = hopper_->copies;
      const auto next = std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) {
        return copy.rank == Rank() && copy.barrier == barrier;
      });
      if (next == copies.end()) return false;
      Perform(*next);
      copies.erase(next);
      return (mine.phase & 1) != parity;
    });
  }

  void CopyValues(uint32_t to, int column, int row, uint32_t barrier) {
    MayBegin(hopper_->args.prefetch);
    Request(Box(Rank(), to, barrier, hopper_->values, row, column));
  }
  template <int kCluster>
  void CopyX(uint32_t to, int column, int row, uint32_t barrier) {
    MayBegin(false);
    for (int rank = 0; rank < kCluster; ++rank) {
      Request(Box(kCluster > 1 ? rank : Rank(), to, barrier, hopper_->x, row, column));
    }
  }
  void CopyIndices(uint32_t to, int column, int row, uint32_t barrier) {
    MayBegin(hopper_->args.prefetch);
    Request(Box(Rank(), to, barrier, hopper_->indices, row, column));
  }

  void LoadShared(uint32_t address, uint32_t* first, uint32_t* second) {
    const char* from = Place(Rank(), address, 8);
    std::memcpy(first, from, 4);
    std::memcpy(second, from + 4, 4);
  }
  void LoadShared16(uint32_t address, uint32_t (&four)[4]) {
    std::memcpy(four, Place(Rank(), address, 16), 16);
  }
  void LoadShared16(uint32_t address, float (&four)[4]) {
    std::memcpy(four, Place(Rank(), address, 16), 16);
  }
  void WaitForSent(uint32_t barrier, uint32_t parity) { WaitBarrier(barrier, parity); }
  void SendTo(int rank, uint32_t address, float a, float b, float c, float d, uint32_t barrier) {
    Request({rank, address, barrier, nullptr, 0, 0, {a, b, c, d}});
  }
  void Store16(uint16_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    Store(to, {a, b, c, d});
  }
  void Store4(uint16_t* to, uint32_t a) { Store(to, {a}); }
  uint32_t Bytes(uint32_t low, uint32_t high, uint32_t which) const {
    return PickBytes(low, high, which);
  }
  template <typename>
  uint32_t Pack(float low, float high) const {
    const T both[] = {T(low), T(high)};
    uint32_t packed;
    std::memcpy(&packed, both, sizeof(packed));
    return packed;
  }
  // movmatrix.trans: the lane has row lane / 4, columns 2 (lane % 4) + 0, 1.
  uint32_t Transpose(uint32_t pair) {
    uint32_t all[kWarpThreads], transposed = 0;
    fiber_.Exchange(pair, all);
    const int row = fiber_.Lane() / 4, column = fiber_.Lane() % 4 * 2;
    for (int c = 0; c < 2; ++c) {
      const uint32_t number = all[4 * (column + c) + row / 2] >> (row % 2 * 16) & 0xffff;
      transposed |= number << (c * 16);
    }
    return transposed;
  }
  // stmatrix.trans: the lane has row lane / 4, columns 2 (lane % 4) + 0, 1 of each matrix.
  void StoreTransposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    struct Shown {
      uint32_t to, parts[4];
    };
    Shown all[kWarpThreads];
    fiber_.Exchange(Shown{to, {a, b, c, d}}, all);
    const int lane = fiber_.Lane(), matrix = lane / 8, column = lane % 8;
    char* line = Place(Rank(), to, 16);
    for (int row = 0; row < 8; ++row) {
      const uint32_t pair = all[4 * row + column / 2].parts[matrix];
      const auto half = static_cast<uint16_t>(pair >> (column % 2 * 16));
      std::memcpy(line + 2 * row, &half, sizeof(half));
    }
    fiber_.SyncWarp();
  }

  void BeginProducts() const {}
  template <typename, int kColumns, int kSelector>
  void MultiplySparse(float (&sum)[kColumns / 2], uint64_t weight, uint64_t rows, uint32_t indices,
                      bool add) {
    auto& products = Mine().products;
    if (issued_ == static_cast<int64_t>(products.size())) {
      products.push_back({weight, rows, kColumns, kSelector, add});
    }
    WarpgroupProduct& product = products[issued_++];
    if (product.weight != weight || product.rows != rows || product.selector != kSelector ||
        product.add != add) {
      hopper_->outside = true;
    }
    product.sums[Thread() % kGroupThreads] = sum;
    product.indices[Thread() % kGroupThreads] = indices;
    ++product.arrived;
    fiber_.SayProgress();
    if (hopper_->multiplying == Asynchronous::kEarly && product.arrived == kGroupThreads)
      Compute(&product);
  }
  void CommitProducts() { groups_.push_back(issued_); }
  template <int kPending>
  void WaitProducts() {
    for (; static_cast<int>(groups_.size()) > kPending; groups_.pop_front()) {
      for (; finished_ < groups_.front(); ++finished_) {
        WarpgroupProduct& product = Mine().products[finished_];
        fiber_.WaitUntil([&] { return product.arrived == kGroupThreads; });
        if (!product.done) Compute(&product);
      }
    }
  }

 private:
  // What is asked for before the kernel before has ended. The second launch starts when the first
  // one has seen that.
  void MayBegin(bool early) {
    if (!early && !waited_ && hopper_->args.first == 0) hopper_->outside = true;
  }

  Barrier& BarrierOf(int rank, uint32_t address) {
    const auto found = hopper_->barriers.find({rank, address});
    if (found != hopper_->barriers.end()) return found->second;
    hopper_->outside = true;
    return nobody_;
  }
  Warpgroup& GroupOf(int group) { return hopper_->warpgroups[{Rank(), group}]; }
  Warpgroup& Mine() { return GroupOf(Thread() / kGroupThreads); }

  char* Place(int rank, uint32_t address, size_t size) {
    std::vector<char>& shared = fiber_.Shared(rank);
    if (address % size == 0 && address + size <= shared.size()) return shared.data() + address;
    hopper_->outside = true;
    return nowhere_;
  }

  static Copy Box(int rank, uint32_t to, uint32_t barrier, const Matrix& matrix, int row,
                  int column) {
    return {rank, to, barrier, &matrix, row, column, {}};
  }
  template <int kCount>
  void Store(uint16_t* to, const uint32_t (&pairs)[kCount]) {
    MayBegin(false);
    constexpr int kNumbers = 2 * kCount;
    const int64_t at = to - hopper_->y.data;
    if (at < 0 || at % kNumbers != 0 || at + kNumbers > hopper_->y.rows * hopper_->y.columns) {
      hopper_->outside = true;
      return;
    }
    std::memcpy(to, pairs, sizeof(pairs));
    for (int i = 0; i < kNumbers; ++i) NoteWritten(at + i);
  }
  void Request(const Copy& copy) {
    if (hopper_->copying == Asynchronous::kEarly) {
      Perform(copy);
    } else {
      hopper_->copies.push_back(copy);
    }
    fiber_.SayProgress();
  }
  void Perform(const Copy& copy) {
    if (fiber_.HasEnded(copy.rank)) hopper_->outside = true;
    Barrier& barrier = BarrierOf(copy.rank, copy.barrier);
    if (copy.matrix == nullptr) {
      std::memcpy(Place(copy.rank, copy.to, sizeof(copy.sent)), copy.sent, sizeof(copy.sent));
      barrier.bytes -= sizeof(copy.sent);
    } else {
      CopyBox(copy);
      barrier.bytes -= copy.matrix->box_rows * copy.matrix->box_columns * 2;
    }
    barrier.Settle();
    fiber_.SayProgress();
  }
  void CopyBox(const Copy& copy) {
    if (copy.to % 512 != 0) hopper_->outside = true;
    const Matrix& matrix = *copy.matrix;
    for (int r = 0; r < matrix.box_rows; ++r) {
      for (int c = 0; c < matrix.box_columns; ++c) {
        const uint32_t at = copy.to + (r * matrix.box_columns + c) * 2;
        const uint16_t* from = matrix.At(copy.row + r, copy.column + c);
        const uint16_t value = from == nullptr ? 0 : *from;
        std::memcpy(Place(copy.rank, Strewn(at, matrix.swizzle), 2), &value, 2);
      }
    }
  }
  // Nothing is computed twice.
  void NoteWritten(int64_t at) {
    if ((*hopper_->written)[at]) hopper_->outside = true;
    (*hopper_->written)[at] = true;
  }

  // The numbers of a row of an operand, from the first byte that the descriptor names on.
  std::vector<float> Row(uint64_t descriptor, int row, int count) {
    const auto swizzle = static_cast<Swizzle>(descriptor >> 62);
    const uint32_t width = swizzle == Swizzle::k128Bytes ? 128 : 64;
    const uint32_t start = (descriptor & 0x3fff) << 4;
    const auto eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    std::vector<float> numbers(count);
    for (int i = 0; i < count; ++i) {
      const uint32_t at = start + row / 8 * eight_rows + row % 8 * width + 2 * i;
      T value;
      std::memcpy(&value, Place(Rank(), Strewn(at, swizzle), 2), 2);
      numbers[i] = static_cast<float>(value);
    }
    return numbers;
  }
  // m64nNk32, 16 bits. Warp w has outputs 16 w and on: lane 4 g + t those at g and g + 8, and of
  // each 8 rows of x 2 t and 2 t + 1. The index words of lanes 4 g + 2 selector + 0, 1 are those of
  // the first and the last 16 channels, two bits for each kept value, output g in the low half.
  void Compute(WarpgroupProduct* product) {
    constexpr int kKept = 16;
    std::vector<std::vector<float>> rows(product->columns);
    for (int n = 0; n < product->columns; ++n) rows[n] = Row(product->rows, n, 2 * kKept);
    for (int m = 0; m < kGroupOutputs; ++m) {
      const std::vector<float> kept = Row(product->weight, m, kKept);
      const int first_lane = m / 16 * 32 + m % 8 * 4, high = m / 8 % 2;
      int channels[kKept];
      for (int i = 0; i < kKept; ++i) {
        const uint32_t word = product->indices[first_lane + 2 * product->selector + i / 8];
        channels[i] = i / 2 * 4 + (word >> (16 * high + i % 8 * 2) & 3);
      }
      for (int n = 0; n < product->columns; ++n) {
        float* sum = product->sums[first_lane + n % 8 / 2] + n / 8 * 4 + high * 2 + n % 2;
        if (!product->add) *sum = 0;
        for (int i = 0; i < kKept; ++i) *sum += kept[i] * rows[n][channels[i]];
      }
    }
    product->done = true;
    fiber_.SayProgress();
  }

  Fiber& fiber_;
  Hopper* hopper_;
  int blocks_;
  bool waited_ = false;
  int64_t issued_ = 0, finished_ = 0, meeting_ = 0;
  std::deque<int64_t> groups_;
  Barrier nobody_{1 << 30, 1 << 30};
  alignas(16) char nowhere_[16];
};

enum Outcome { kDone = 0, kNoInstance = 1, kEndless = 2, kOutside = 3 };

struct Job {
  Product product;
  PrefillPlan plan;
  int teams_at_once;
  Asynchronous copying, multiplying;
  bool uneven, prefetch;
};

// One launch, a cluster after the other. They share nothing but what they read.
template <typename T, typename Tile>
Outcome RunLaunch(const Job& job, const PrefillArgs& args, int teams, std::vector<bool>* written) {
  const Product& product = job.product;
  const int team = Tile::kCluster * args.split;
  const auto matrix = [](void* data, int64_t rows, int64_t columns, int box_rows, int box_columns,
                         Swizzle swizzle) {
    return Matrix{static_cast<uint16_t*>(data), rows, columns, box_rows, box_columns, swizzle};
  };
  for (int c = 0; c < teams; ++c) {
    Hopper hopper = {};
    hopper.args = args;
    hopper.written = written;
    hopper.copying = job.copying;
    hopper.multiplying = job.multiplying;
    void* const blob = const_cast<void*>(product.blob);
    hopper.values = matrix(blob, product.out, product.channels / 2, Tile::kOutputs,
                           kStageChannels / 2, Swizzle::k64Bytes);
    hopper.x = matrix(const_cast<void*>(product.x), product.rows, product.channels, args.x_rows,
                      kStageChannels, Swizzle::k128Bytes);
    constexpr int kIndexNumbers = Tile::kIndexBytes / 2;
    hopper.indices =
        matrix(static_cast<uint8_t*>(blob) + product.out * product.channels,
               product.out / kGroupOutputs, product.channels / kStageChannels * kIndexNumbers,
               Tile::kGroups, kIndexNumbers, Swizzle::kNone);
    hopper.y = matrix(product.y, product.rows, product.out, 0, 0, Swizzle::kNone);
    const auto body = [&](Fiber& fiber) {
      Host<T> host(fiber, &hopper, teams * team);
      Prefill<T, Tile>(host, args);
    };
    const Cluster cluster = {team,    Tile::kThreads, static_cast<size_t>(Tile::kBytes),
                             nullptr, body,           job.uneven};
    if (!Running(cluster, c * team).ToTheEnd()) return kEndless;
    if (hopper.outside || !hopper.copies.empty()) return kOutside;
    // The second launch lets nobody start before its end, and all its threads wait for the first.
    if (hopper.let_next_start != (args.first == 0)) return kOutside;
    const int waiting = args.first > 0 ? Tile::kThreads : Tile::kWorkers + 1;
    if (hopper.waited != team * waiting) return kOutside;
  }
  return kDone;
}

template <typename T, typename Tile>
Outcome RunGrid(const Job& job) {
  PrefillCut cut = CutPrefill(job.product, job.plan, job.teams_at_once);
  cut.args.prefetch = job.prefetch;
  std::vector<bool> written(job.product.rows * job.product.out);
  const Outcome outcome = RunLaunch<T, Tile>(job, cut.args, cut.teams, &written);
  if (outcome != kDone || cut.tail_teams == 0) return outcome;
  using Alone = PrefillTile<Tile::kRows, Tile::kGroups, Tile::kStages, 1>;
  return RunLaunch<T, Alone>(job, cut.tail, cut.tail_teams, &written);
}

template <typename T>
Outcome RunInstance(const Job& job, int stages) {
  const auto is = [&](int of_rows, int of_outputs, int of_stages, int of_cluster) {
    return job.plan.rows == of_rows && job.plan.outputs == of_outputs && stages == of_stages &&
           job.plan.cluster == of_cluster;
  };
  // As the GPU has them.
  if (is(16, 128, 9, 1)) return RunGrid<T, PrefillTile<16, 2, 9, 1>>(job);
  if (is(64, 128, 5, 1)) return RunGrid<T, PrefillTile<64, 2, 5, 1>>(job);
  if (is(128, 128, 8, 1)) return RunGrid<T, PrefillTile<128, 2, 8, 1>>(job);
  if (is(128, 192, 6, 1)) return RunGrid<T, PrefillTile<128, 3, 6, 1>>(job);
  if (is(256, 128, 5, 1)) return RunGrid<T, PrefillTile<256, 2, 5, 1>>(job);
  if (is(256, 128, 5, 2)) return RunGrid<T, PrefillTile<256, 2, 5, 2>>(job);
  if (is(256, 192, 4, 1)) return RunGrid<T, PrefillTile<256, 3, 4, 1>>(job);
  if (is(256, 192, 4, 2)) return RunGrid<T, PrefillTile<256, 3, 4, 2>>(job);
  // With hardly any stages, and with many blocks.
  if (is(128, 128, 4, 1)) return RunGrid<T, PrefillTile<128, 2, 4, 1>>(job);
  if (is(128, 128, 4, 2)) return RunGrid<T, PrefillTile<128, 2, 4, 2>>(job);
  if (is(128, 128, 4, 4)) return RunGrid<T, PrefillTile<128, 2, 4, 4>>(job);
  return kNoInstance;
}

}  // namespace
}  // namespace esparse::cuda

// 0; 1 where there is no such instance; 2 where threads wait for each other for ever; 3 where
// something is done that a GPU would not take, or a copy is still under way at the end. `plan` has
// the fields of PrefillPlan, complete.
extern "C" __attribute__((visibility("default"))) int esparse_prefill_on_host(
    int bfloat16, int64_t rows, int64_t out, int64_t channels, const int32_t* plan, int stages,
    int teams_at_once, int late_copies, int late_products, int uneven, int prefetch, void* blob,
    void* x, void* y) {
  using namespace esparse::cuda;
  const auto when = [](int late) { return late ? Asynchronous::kLate : Asynchronous::kEarly; };
  Product product = {};
  product.blob = blob;
  product.x = x;
  product.y = y;
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  const Job job = {product,           PrefillPlanOf(plan), teams_at_once,
                   when(late_copies), when(late_products), uneven != 0,
                   prefetch != 0};
  return bfloat16 ? RunInstance<Bfloat16>(job, stages) : RunInstance<_Float16>(job, stages);
}

extern "C" __attribute__((visibility("default"))) int esparse_prefill_is_plan(const int32_t* plan) {
  return esparse::cuda::IsPlan(esparse::cuda::PrefillPlanOf(plan));
}

// What CompletePlan and CutPrefill make of a plan on a device with room for so many clusters of
// two to six blocks, of one block a multiprocessor: its fields, then the teams of both launches and
// where the second one begins.
extern "C" __attribute__((visibility("default"))) void esparse_prefill_cut(
    int64_t rows, int64_t out, int64_t channels, const int32_t* plan, int multiprocessors,
    const int32_t* clusters, int32_t* result) {
  using namespace esparse::cuda;
  Product product = {};
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  const PrefillRoom room = {multiprocessors, [&](int of_rows, int, int blocks) {
                              return clusters[blocks - 2] * PrefillResident(of_rows);
                            }};
  const PrefillPlan done = CompletePlan(product, PrefillPlanOf(plan), room);
  const PrefillCut cut = CutPrefill(product, done, TeamsAtOnce(done, room));
  const int32_t all[] = {done.rows, done.outputs, done.cluster,   done.group,    done.split,
                         done.tail, cut.teams,    cut.tail_teams, cut.tail.first};
  std::copy(std::begin(all), std::end(all), result);
}
