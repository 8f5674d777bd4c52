// The kernel of attention_kernel.h run on the host. Built by the tests.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/testing/fibers.h"

#define ESPARSE_DEVICE inline
#define ESPARSE_UNROLL
#include "cuda/attention_kernel.h"

namespace esparse::cuda {
namespace {

// What the kernel needs of a device.
class Host {
 public:
  explicit Host(Fiber& fiber) : fiber_(fiber) {}

  int Thread() const { return fiber_.Thread(); }
  int Block() const { return fiber_.Block(); }
  void WaitForPrevious() { fiber_.WaitForPrevious(); }
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
  float Exchange(float x, int offset) { return fiber_.Exchange(x, offset); }
  void SyncBlock() { fiber_.SyncBlock(); }
  void SyncCluster() { fiber_.SyncCluster(); }
  float LoadFrom(int rank, const float* place) const {
    const size_t at = reinterpret_cast<const char*>(place) - fiber_.Shared(fiber_.Rank()).data();
    return *reinterpret_cast<const float*>(fiber_.Shared(rank).data() + at);
  }

 private:
  Fiber& fiber_;
};

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
    const auto attend = [&](Fiber& fiber) {
      Host host(fiber);
      auto* shared = reinterpret_cast<Shared*>(fiber.Shared(fiber.Rank()).data());
      Attend<Host, _Float16, kFeatures, kShared, kCluster>(
          host, *shared, reinterpret_cast<const _Float16*>(seen.projected.data()),
          static_cast<_Float16*>(keys), static_cast<_Float16*>(values),
          reinterpret_cast<const float*>(seen.cosines.data()),
          reinterpret_cast<const float*>(seen.sines.data()), &seen.length, seen.start.data(),
          places, static_cast<_Float16*>(attended), args);
    };
    const Cluster cluster = {kCluster, kAttentionThreads<kCluster>, sizeof(Shared), previous,
                             attend,   /*uneven=*/matrix % 2 == 1};
    if (!Running(cluster, matrix * kCluster).ToTheEnd()) return false;
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
