#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/attention.h"
#include "cuda/cluster.h"
#include "cuda/dependent_launch.h"

#define ESPARSE_DEVICE __device__ __forceinline__
#define ESPARSE_UNROLL _Pragma("unroll")
#include "cuda/attention_kernel.h"

namespace esparse::cuda {
namespace {

#if __CUDA_ARCH__ >= 900
// What the kernel needs of a GPU.
struct Gpu {
  ESPARSE_DEVICE int Thread() const { return threadIdx.x; }
  ESPARSE_DEVICE int Block() const { return blockIdx.x; }
  ESPARSE_DEVICE void WaitForPrevious() const { cuda::WaitForPrevious(); }
  ESPARSE_DEVICE void LetNextStart() const { cuda::LetNextStart(); }

  ESPARSE_DEVICE int Load(const int32_t* from) const { return __ldcg(from); }
  ESPARSE_DEVICE Eight Load(const Eight* from) const {
    const uint4 loaded = __ldcg(reinterpret_cast<const uint4*>(from));
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
  }

  ESPARSE_DEVICE float Widen(__half x) const { return __half2float(x); }
  ESPARSE_DEVICE float Widen(__nv_bfloat16 x) const { return __bfloat162float(x); }
  template <typename T>
  ESPARSE_DEVICE T Narrow(float x) const {
    return static_cast<T>(x);  // to the nearest
  }
  template <typename T>
  ESPARSE_DEVICE void Widen(const Eight& eight, float (&wide)[8]) const {
    ESPARSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const T* pair = reinterpret_cast<const T*>(&eight.pairs[i]);
      wide[2 * i] = Widen(pair[0]);
      wide[2 * i + 1] = Widen(pair[1]);
    }
  }
  ESPARSE_DEVICE float Exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // The value of the lane whose number differs in the bit `offset`.
  ESPARSE_DEVICE float Exchange(float x, int offset) const {
    return __shfl_xor_sync(0xffffffffu, x, offset);
  }
  ESPARSE_DEVICE void SyncBlock() const { __syncthreads(); }
  ESPARSE_DEVICE void SyncCluster() const { cuda::SyncCluster(); }
  // What lies at this place of the shared memory of another block of the cluster.
  ESPARSE_DEVICE float LoadFrom(int rank, const float* place) const {
    return LoadOfBlock(rank, static_cast<uint32_t>(__cvta_generic_to_shared(place)));
  }
};
#endif

}  // namespace

#if __CUDA_ARCH__ >= 900
#define ESPARSE_BODY(T, FEATURES, SHARED, CLUSTER)                                          \
  __shared__ AttentionShared<T, FEATURES, SHARED, CLUSTER> shared;                          \
  Gpu gpu;                                                                                  \
  Attend<Gpu, T, FEATURES, SHARED, CLUSTER>(gpu, shared, static_cast<const T*>(projected),  \
                                            static_cast<T*>(keys), static_cast<T*>(values), \
                                            cosines, sines, length, start, places,          \
                                            static_cast<T*>(attended), args)
#else
#define ESPARSE_BODY(T, FEATURES, SHARED, CLUSTER) __trap()
#endif

// The instances are extern "C", so that a loaded cubin can be asked for them.
#define ESPARSE_ATTEND_NAME(NAME, FEATURES, SHARED, CLUSTER) \
  esparse_attend_##NAME##_##FEATURES##_##SHARED##_##CLUSTER
#define ESPARSE_ATTEND(NAME, T, FEATURES, SHARED, CLUSTER)                                        \
  extern "C" __global__ void ESPARSE_CLUSTER(CLUSTER) __launch_bounds__(                          \
      kAttentionThreads<CLUSTER>, (SHARED <= 2 ? 512 : 256) / kAttentionThreads<CLUSTER>)         \
      ESPARSE_ATTEND_NAME(NAME, FEATURES, SHARED, CLUSTER)(                                       \
          const void* projected, void* keys, void* values, const float* cosines,                  \
          const float* sines, const int32_t* length, const int32_t* start, const int32_t* places, \
          void* attended, const __grid_constant__ AttentionArgs args) {                           \
    ESPARSE_BODY(T, FEATURES, SHARED, CLUSTER);                                                   \
  }
#define ESPARSE_INSTANCE(NAME, DTYPE, FEATURES, SHARED, CLUSTER) \
  {DTYPE,                                                        \
   FEATURES,                                                     \
   SHARED,                                                       \
   CLUSTER,                                                      \
   kAttentionThreads<CLUSTER>,                                   \
   ESPARSE_ATTEND_NAME(NAME, FEATURES, SHARED, CLUSTER),         \
   "esparse_attend_" #NAME "_" #FEATURES "_" #SHARED "_" #CLUSTER},

// WHAT(NAME, MORE, features, query heads to a key, blocks of a cluster), for all of them.
#define ESPARSE_FOR_CLUSTERS(WHAT, NAME, MORE, FEATURES, SHARED) \
  WHAT(NAME, MORE, FEATURES, SHARED, 1)                          \
  WHAT(NAME, MORE, FEATURES, SHARED, 4)                          \
  WHAT(NAME, MORE, FEATURES, SHARED, 8)
#define ESPARSE_FOR_SHARED(WHAT, NAME, MORE, FEATURES) \
  ESPARSE_FOR_CLUSTERS(WHAT, NAME, MORE, FEATURES, 1)  \
  ESPARSE_FOR_CLUSTERS(WHAT, NAME, MORE, FEATURES, 2)  \
  ESPARSE_FOR_CLUSTERS(WHAT, NAME, MORE, FEATURES, 4)  \
  ESPARSE_FOR_CLUSTERS(WHAT, NAME, MORE, FEATURES, 8)
#define ESPARSE_FOR_FEATURES(WHAT, NAME, MORE) \
  ESPARSE_FOR_SHARED(WHAT, NAME, MORE, 64)     \
  ESPARSE_FOR_SHARED(WHAT, NAME, MORE, 128)

ESPARSE_FOR_FEATURES(ESPARSE_ATTEND, float16, __half)
ESPARSE_FOR_FEATURES(ESPARSE_ATTEND, bfloat16, __nv_bfloat16)

namespace {

using AttendFunction = void (*)(const void*, void*, void*, const float*, const float*,
                                const int32_t*, const int32_t*, const int32_t*, void*,
                                AttentionArgs);
struct Instance {
  Dtype dtype;
  int features, shared, cluster, threads;
  AttendFunction function;
  const char* name;
};
constexpr Instance kInstances[] = {
    ESPARSE_FOR_FEATURES(ESPARSE_INSTANCE, float16, Dtype::kFloat16)
        ESPARSE_FOR_FEATURES(ESPARSE_INSTANCE, bfloat16, Dtype::kBfloat16)};

const Instance* Find(Dtype dtype, int64_t heads, int64_t kv_heads, int64_t features, int cluster) {
  for (const Instance& instance : kInstances) {
    if (instance.dtype == dtype && instance.features == features &&
        instance.shared * kv_heads == heads && instance.cluster == cluster) {
      return &instance;
    }
  }
  return nullptr;
}

// Blocks for a head of a row: as few as fill the device, for merging them costs; not quite 256
// threads for every multiprocessor do. More than 8 are not for every device.
int ClusterOf(int64_t matrices, int multiprocessors) {
  constexpr int kEnough = 224;
  const auto fills = [&](int cluster, int threads) {
    return matrices * cluster * threads >= int64_t{kEnough} * multiprocessors;
  };
  return fills(1, kAttentionThreads<1>) ? 1 : fills(4, kAttentionThreads<4>) ? 4 : 8;
}

}  // namespace

bool AttentionRuns() {
  int device = 0, major = 0;
  cudaFuncAttributes code;
  const auto* any = reinterpret_cast<const void*>(kInstances[0].function);
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaFuncGetAttributes(&code, any) != cudaSuccess) {
    cudaGetLastError();  // it is an answer, and no error of what comes after
    return false;
  }
  return major >= kAttentionMajor && code.ptxVersion >= 10 * kAttentionMajor;
}

bool AttentionFits(int64_t heads, int64_t kv_heads, int64_t features) {
  return kv_heads > 0 && Find(Dtype::kFloat16, heads, kv_heads, features, 1) != nullptr;
}

cudaError_t Prepare(const Attention& attention, Start start, AttentionLaunch* launch) {
  int device, multiprocessors;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t matrices = attention.batch * attention.kv_heads;
  const int cluster = ClusterOf(matrices, multiprocessors);
  const Instance* instance =
      Find(attention.dtype, attention.heads, attention.kv_heads, attention.features, cluster);
  if (instance == nullptr) return cudaErrorInvalidValue;
  AttentionArgs args = {};
  args.kv_heads = static_cast<int>(attention.kv_heads);
  args.slots = static_cast<int>(attention.slots);
  args.width = static_cast<int>((attention.heads + 2 * attention.kv_heads) * attention.features);
  args.angle_stride = attention.angle_rows == 1 ? 0 : static_cast<int>(attention.features / 2);
  args.has_start = attention.start != nullptr;
  args.has_places = attention.places != nullptr;
  args.prefetch = start == Start::kPrefetch;
  // Logits in base 2, whose power is one instruction.
  args.scale =
      static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(attention.features)));
  launch->name = instance->name;
  launch->function = reinterpret_cast<const void*>(instance->function);
  launch->grid = static_cast<int>(matrices) * cluster;
  launch->threads = instance->threads;
  // A pointer that is not followed is none that is missing.
  const auto any = [&](const int32_t* given) {
    return given == nullptr ? attention.length : given;
  };
  launch->pointers = {attention.projected,  attention.keys,        attention.values,
                      attention.cosines,    attention.sines,       attention.length,
                      any(attention.start), any(attention.places), attention.attended};
  static_assert(sizeof(AttentionArgs) == kAttentionArgsBytes);
  std::memcpy(launch->args.data(), &args, sizeof(args));
  return cudaSuccess;
}

cudaError_t Launch(const Attention& attention, Start start, cudaStream_t stream) {
  AttentionLaunch launch;
  const cudaError_t status = Prepare(attention, start, &launch);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.grid);
  config.blockDim = dim3(launch.threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = start == Start::kAlone ? 0 : 1;
  void* parameters[std::tuple_size_v<decltype(launch.pointers)> + 1];
  for (size_t i = 0; i < launch.pointers.size(); ++i) parameters[i] = &launch.pointers[i];
  parameters[launch.pointers.size()] = launch.args.data();
  return cudaLaunchKernelExC(&config, launch.function, parameters);
}

}  // namespace esparse::cuda
