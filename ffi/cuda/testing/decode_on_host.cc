// The kernel of decode_kernel.h run on the host, in the cut that decode_plan.cc makes for a device
// of given numbers. Built by the tests.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <type_traits>
#include <vector>

#include "cuda/decode_plan.h"
#include "cuda/testing/fibers.h"
#include "cuda/testing/numbers.h"

#define ESPARSE_DEVICE inline
#define ESPARSE_UNROLL
#define ESPARSE_KEEP_LOOP
namespace esparse::cuda {
using std::fmaf;
using std::min;
}  // namespace esparse::cuda
#include "cuda/decode_kernel.h"

namespace esparse::cuda {
namespace {

// What the kernel before writes. Until it has ended there is something else in its place.
class Later {
 public:
  Later(const void* data, size_t bytes)
      : data_(static_cast<const char*>(data)), seen_(data == nullptr ? 0 : bytes, '\xff') {}

  // Whether the range is inside, and begins at a multiple of its size.
  bool Holds(const void* from, size_t size) const {
    const std::ptrdiff_t at = static_cast<const char*>(from) - seen_.data();
    return at >= 0 && at + size <= seen_.size() && at % size == 0;
  }
  void Arrive() { std::copy(data_, data_ + seen_.size(), seen_.begin()); }
  template <typename T>
  const T* Seen() const {
    return reinterpret_cast<const T*>(seen_.data());
  }

 private:
  const char* data_;
  std::vector<char> seen_;
};

// When a copy to shared memory takes place: at its request, or when it is waited for.
enum class Copies { kEarly, kLate };

// What the kernel needs of a device.
class Host {
 public:
  // May copy from the two ranges. `outside` is told where it does something a GPU would not take.
  Host(Fiber& fiber, Copies copies, const Later& blob, const Later& x, bool* outside)
      : fiber_(fiber), copies_(copies), blob_(blob), x_(x), outside_(outside) {}

  unsigned Thread() const { return fiber_.Thread(); }
  unsigned Threads() const { return fiber_.Threads(); }
  unsigned Block() const { return fiber_.Block(); }
  uint32_t Shared() const { return 0; }
  void WaitForPrevious() { fiber_.WaitForPrevious(); }
  void LetNextStart() const {}
  void SyncWarp() { fiber_.SyncWarp(); }
  void SyncBlock() { fiber_.SyncBlock(); }
  float Exchange(float x, int offset) { return fiber_.Exchange(x, offset); }

  void CopyReadOnce(uint32_t to, const void* from, int size) { Copy(to, from, size); }
  void CopyKept(uint32_t to, const void* from, int size) { Copy(to, from, size); }
  void CommitCopies() {
    groups_.push_back(std::move(requested_));
    requested_.clear();
  }
  void WaitCopies(int pending) {
    for (; static_cast<int>(groups_.size()) > pending; groups_.pop_front()) {
      for (const Request& request : groups_.front()) Perform(request);
    }
  }

  Fragments LoadMatrices(uint32_t address) {
    uint32_t lines[kWarpThreads], parts[4];
    fiber_.Exchange(address, lines);
    const int lane = fiber_.Lane();
    Place(address, 16);
    for (int i = 0; i < 4; ++i) Read(lines[8 * i + lane / 4] + lane % 4 * 4, &parts[i]);
    return {parts[0], parts[1], parts[2], parts[3]};
  }
  void LoadShared(uint32_t address, uint32_t* first, uint32_t* second) {
    Place(address, 8);
    Read(address, first);
    Read(address + 4, second);
  }
  float LoadShared(uint32_t address) {
    float value;
    Read(address, &value);
    return value;
  }
  void StoreShared(uint32_t address, float value) { Write(address, value); }
  void StoreShared(uint32_t address, const float (&four)[4]) {
    Place(address, 16);
    for (int i = 0; i < 4; ++i) Write(address + 4 * i, four[i]);
  }

  // mma.sp.m16n8k32: of W the lane has rows g = lane / 4 and g + 8, kept values 2 (lane % 4) + 0, 1
  // and 8 further; of x column g, channels 2 (lane % 4) + 0, 1 and 8, 16, 24 further; of the sum
  // rows g and g + 8, columns 2 (lane % 4) + 0, 1. An index word has the channels of eight kept
  // values of row g, two bits each, then of row g + 8.
  template <typename T, int kSelector>
  void MultiplySparse(float (&sum)[4], const Fragments& weight, const Fragments& x,
                      uint32_t indices) {
    struct Operands {
      uint32_t weight[4], x[4], indices;
    };
    const Operands mine = {{weight.x, weight.y, weight.z, weight.w}, {x.x, x.y, x.z, x.w}, indices};
    Operands all[kWarpThreads];
    fiber_.Exchange(mine, all);
    const auto half_of = [](uint32_t pair, int half) {
      const auto bits = static_cast<uint16_t>(pair >> (16 * half));
      T value;
      std::memcpy(&value, &bits, sizeof(value));
      return static_cast<float>(value);
    };
    const int g = fiber_.Lane() / 4;
    for (int i = 0; i < 4; ++i) {
      const int low = i / 2, column = fiber_.Lane() % 4 * 2 + i % 2;
      for (int kept = 0; kept < 16; ++kept) {
        const Operands& of_weight = all[4 * g + kept % 8 / 2];
        const uint32_t word = all[4 * g + 2 * kSelector + kept / 8].indices >> (16 * low);
        const int channel = kept / 2 * 4 + ((word >> (kept % 8 * 2)) & 3);
        const Operands& of_x = all[4 * column + channel % 8 / 2];
        sum[i] += half_of(of_weight.weight[low + kept / 8 * 2], kept % 2) *
                  half_of(of_x.x[channel / 8], channel % 2);
      }
    }
  }

  uint32_t Bytes(uint32_t low, uint32_t high, uint32_t which) const {
    return PickBytes(low, high, which);
  }
  template <typename T>
  void Widen(uint32_t pair, float* low, float* high) const {
    T both[2];
    std::memcpy(both, &pair, sizeof(both));
    *low = static_cast<float>(both[0]);
    *high = static_cast<float>(both[1]);
  }
  template <typename T>
  float Widen(T x) const {
    return static_cast<float>(x);
  }
  template <typename T>
  T Narrow(float x) const {
    return T(x);
  }
  float ReciprocalRoot(float x) const { return 1 / std::sqrt(x); }
  float Exp(float x) const { return std::exp(x); }

 private:
  struct Request {
    uint32_t to;
    const void* from;
    int size;
  };

  void Copy(uint32_t to, const void* from, int size) {
    if (size > 0 && !blob_.Holds(from, size) && !x_.Holds(from, size)) {
      *outside_ = true;
      return;
    }
    if (copies_ == Copies::kEarly) {
      Perform({to, from, size});
    } else {
      requested_.push_back({to, from, size});
    }
  }
  void Perform(const Request& request) {
    char* to = Place(request.to, 16);
    std::memset(to, 0, 16);
    std::memcpy(to, request.from, request.size);
  }
  char* Place(uint32_t address, size_t size) {
    std::vector<char>& shared = fiber_.Shared(fiber_.Rank());
    if (address % size == 0 && address + size <= shared.size()) return shared.data() + address;
    *outside_ = true;
    return nowhere_;
  }
  template <typename T>
  void Read(uint32_t address, T* value) {
    std::memcpy(value, Place(address, sizeof(T)), sizeof(T));
  }
  template <typename T>
  void Write(uint32_t address, T value) {
    std::memcpy(Place(address, sizeof(T)), &value, sizeof(T));
  }

  Fiber& fiber_;
  Copies copies_;
  const Later &blob_, &x_;
  bool* outside_;
  std::vector<Request> requested_;
  std::deque<std::vector<Request>> groups_;
  alignas(16) char nowhere_[16];
};

enum Outcome { kDone = 0, kNoCut = 1, kEndless = 2, kOutside = 3 };

template <typename T, int kColumns, int kTiles>
Outcome RunGrid(const Product& product, const Cut& cut, Copies copies) {
  const size_t out_bytes = sizeof(T) * product.rows * product.out;
  bool outside = false;
  for (int block = 0; block < cut.grid; ++block) {
    Later x(product.x, sizeof(T) * product.rows * product.channels),
        residual(product.residual, out_bytes),
        blob(product.blob, product.out * product.channels / 16 * 18);
    if (cut.args.prefetch) blob.Arrive();
    const auto previous = [&] {
      x.Arrive();
      residual.Arrive();
      blob.Arrive();
    };
    const auto decode = [&](Fiber& fiber) {
      Host host(fiber, copies, blob, x, &outside);
      Decode<Host, T, kColumns, kTiles>(host, blob.Seen<uint8_t>(), x.Seen<T>(), residual.Seen<T>(),
                                        product.places, static_cast<T*>(product.y),
                                        static_cast<T*>(product.scattered), cut.args);
    };
    const Cluster cluster = {
        1,      cut.warps * kWarpThreads, static_cast<size_t>(cut.shared), previous,
        decode, /*uneven=*/block % 2 == 1};
    if (!Running(cluster, block).ToTheEnd()) return kEndless;
  }
  return outside ? kOutside : kDone;
}

template <typename T>
Outcome RunInstance(const Product& product, const Cut& cut, Copies copies) {
  const auto with_tiles = [&](auto columns, auto tiles) {
    return RunGrid<T, columns, tiles>(product, cut, copies);
  };
  using std::integral_constant;
  const auto with_columns = [&](auto columns) {
    if (cut.tiles == 1) return with_tiles(columns, integral_constant<int, 1>{});
    if (cut.tiles == 2) return with_tiles(columns, integral_constant<int, 2>{});
    if (cut.tiles == 3) return with_tiles(columns, integral_constant<int, 3>{});
    return with_tiles(columns, integral_constant<int, 4>{});
  };
  return cut.columns == 1 ? with_columns(integral_constant<int, 1>{})
                          : with_columns(integral_constant<int, 2>{});
}

}  // namespace
}  // namespace esparse::cuda

// 0; 1 where the plan fits no such device; 2 where threads wait for each other for ever; 3 where
// memory is read or written outside what is given, or not at a multiple of its size. `plan` has the
// fields of Plan, `device` those of Multiprocessors; `used` is told tiles, warps, blocks, depth and
// whether x is resident, as they are.
extern "C" __attribute__((visibility("default"))) int esparse_decode_on_host(
    int bfloat16, int64_t rows, int64_t out, int64_t channels, int fusion, float epsilon,
    const int32_t* plan_fields, const int* device_fields, int prefetch, int late_copies,
    const void* blob, const void* x, const void* residual, const int32_t* places, void* y,
    void* scattered, int* used) {
  using namespace esparse::cuda;
  Product product = {};
  product.blob = blob;
  product.x = x;
  product.residual = residual;
  product.places = places;
  product.y = y;
  product.scattered = scattered;
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  product.dtype = bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat16;
  product.fusion = fusion;
  product.epsilon = epsilon;
  const Multiprocessors device = {device_fields[0], device_fields[1], device_fields[2],
                                  device_fields[3]};
  Cut cut;
  if (!FitCut(product, PlanOf(plan_fields), device, &cut)) return kNoCut;
  cut.args.prefetch = prefetch;
  const int told[] = {cut.tiles, cut.warps, cut.grid, cut.args.depth, cut.args.resident};
  std::copy(std::begin(told), std::end(told), used);
  const Copies copies = late_copies ? Copies::kLate : Copies::kEarly;
  return bfloat16 ? RunInstance<Bfloat16>(product, cut, copies)
                  : RunInstance<_Float16>(product, cut, copies);
}
