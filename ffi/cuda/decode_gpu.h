// What the decode kernel needs of a GPU, and its instances. Included by the sources that hold them,
// one per dtype.
#ifndef ESPARSE_FFI_CUDA_DECODE_GPU_H_
#define ESPARSE_FFI_CUDA_DECODE_GPU_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/decode_args.h"
#include "cuda/dependent_launch.h"

#define ESPARSE_DEVICE __device__ __forceinline__
#define ESPARSE_UNROLL _Pragma("unroll")
#define ESPARSE_KEEP_LOOP _Pragma("unroll 1")
#include "cuda/decode_kernel.h"

namespace esparse::cuda {

class DecodeGpu {
 public:
  // W is read once, x by every block: the second-level cache keeps x.
  ESPARSE_DEVICE explicit DecodeGpu(const uint8_t* shared)
      : shared_(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once_));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(kept_));
  }

  ESPARSE_DEVICE unsigned Thread() const { return threadIdx.x; }
  ESPARSE_DEVICE unsigned Threads() const { return blockDim.x; }
  ESPARSE_DEVICE unsigned Block() const { return blockIdx.x; }
  ESPARSE_DEVICE uint32_t Shared() const { return shared_; }
  ESPARSE_DEVICE void WaitForPrevious() const { cuda::WaitForPrevious(); }
  ESPARSE_DEVICE void LetNextStart() const { cuda::LetNextStart(); }
  ESPARSE_DEVICE void SyncWarp() const { __syncwarp(); }
  ESPARSE_DEVICE void SyncBlock() const { __syncthreads(); }
  // The value of the lane whose number differs in the bit `offset`.
  ESPARSE_DEVICE float Exchange(float x, int offset) const {
    return __shfl_xor_sync(0xffffffffu, x, offset);
  }

  // Copies `size` bytes, 16 or 0, to shared memory, and fills up to 16 with zeros.
  ESPARSE_DEVICE void CopyReadOnce(uint32_t to, const void* from, int size) const {
    Copy(to, from, size, read_once_);
  }
  ESPARSE_DEVICE void CopyKept(uint32_t to, const void* from, int size) const {
    Copy(to, from, size, kept_);
  }
  // The copies of this thread since the last call are a group.
  ESPARSE_DEVICE void CommitCopies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Until at most `pending` of this thread's groups are under way: the count must be a constant.
  ESPARSE_DEVICE void WaitCopies(int pending) const {
    switch (pending) {
      case 0:
        return WaitCopies<0>();
      case 1:
        return WaitCopies<1>();
      case 2:
        return WaitCopies<2>();
      case 3:
        return WaitCopies<3>();
      case 4:
        return WaitCopies<4>();
      case 5:
        return WaitCopies<5>();
      case 6:
        return WaitCopies<6>();
      default:
        return WaitCopies<kMaxDepth - 1>();
    }
  }

  // Four matrices, their rows of 16 bytes at the addresses that lanes 0 to 31 name.
  ESPARSE_DEVICE Fragments LoadMatrices(uint32_t address) const {
    Fragments r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(address)
                 : "memory");
    return r;
  }
  ESPARSE_DEVICE void LoadShared(uint32_t address, uint32_t* first, uint32_t* second) const {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                 : "=r"(*first), "=r"(*second)
                 : "r"(address)
                 : "memory");
  }
  ESPARSE_DEVICE float LoadShared(uint32_t address) const {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
  }
  ESPARSE_DEVICE void StoreShared(uint32_t address, float value) const {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
  }
  ESPARSE_DEVICE void StoreShared(uint32_t address, const float (&four)[4]) const {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(four[0]), "f"(four[1]),
                 "f"(four[2]), "f"(four[3])
                 : "memory");
  }

  // sum += weight * x, with the indices of lanes 0, 1 (kSelector 0) or 2, 3 (kSelector 1) of each
  // quad.
#define ESPARSE_MMA_SP(TYPE)                                                                      \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                 \
      ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,%13;"                   \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                    \
      : "r"(weight.x), "r"(weight.y), "r"(weight.z), "r"(weight.w), "r"(x.x), "r"(x.y), "r"(x.z), \
        "r"(x.w), "r"(indices), "n"(kSelector))
  template <typename T, int kSelector>
  ESPARSE_DEVICE void MultiplySparse(float (&sum)[4], const Fragments& weight, const Fragments& x,
                                     uint32_t indices) const {
    if constexpr (std::is_same_v<T, __half>) {
      ESPARSE_MMA_SP("f16");
    } else {
      ESPARSE_MMA_SP("bf16");
    }
  }
#undef ESPARSE_MMA_SP

  // The bytes of `low` (0 to 3) and `high` (4 to 7) that the four hexadecimal digits name.
  ESPARSE_DEVICE uint32_t Bytes(uint32_t low, uint32_t high, uint32_t which) const {
    return __byte_perm(low, high, which);
  }
  template <typename T>
  ESPARSE_DEVICE void Widen(uint32_t pair, float* low, float* high) const {
    float2 wide;
    if constexpr (std::is_same_v<T, __half>) {
      wide = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    } else {
      wide = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
    }
    *low = wide.x;
    *high = wide.y;
  }
  ESPARSE_DEVICE float Widen(__half x) const { return __half2float(x); }
  ESPARSE_DEVICE float Widen(__nv_bfloat16 x) const { return __bfloat162float(x); }
  template <typename T>
  ESPARSE_DEVICE T Narrow(float x) const {
    return static_cast<T>(x);  // to the nearest
  }
  ESPARSE_DEVICE float ReciprocalRoot(float x) const { return rsqrtf(x); }
  ESPARSE_DEVICE float Exp(float x) const { return __expf(x); }

 private:
  static ESPARSE_DEVICE void Copy(uint32_t to, const void* from, int size, uint64_t policy) {
    asm volatile(
        "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
        "l"(from), "r"(size), "l"(policy)
        : "memory");
  }
  template <int kPending>
  static ESPARSE_DEVICE void WaitCopies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  uint32_t shared_;
  uint64_t read_once_, kept_;  // policies of the second-level cache
};

// The instances of one dtype. They are extern "C", so that a loaded cubin can be asked for them.
#define ESPARSE_DECODE_KERNEL(NAME, T, COLUMNS, TILES)                                          \
  extern "C" __global__ void __launch_bounds__(kMaxWarps * 32, 1) NAME##_##COLUMNS##_##TILES(   \
      const uint8_t* blob, const void* x, const void* residual, const int32_t* places, void* y, \
      void* scattered, const __grid_constant__ KernelArgs args) {                               \
    extern __shared__ __align__(1024) uint8_t shared[];                                         \
    DecodeGpu gpu(shared);                                                                      \
    Decode<DecodeGpu, T, COLUMNS, TILES>(gpu, blob, static_cast<const T*>(x),                   \
                                         static_cast<const T*>(residual), places,               \
                                         static_cast<T*>(y), static_cast<T*>(scattered), args); \
  }
#define ESPARSE_DECODE_COLUMNS(NAME, T, COLUMNS) \
  ESPARSE_DECODE_KERNEL(NAME, T, COLUMNS, 1)     \
  ESPARSE_DECODE_KERNEL(NAME, T, COLUMNS, 2)     \
  ESPARSE_DECODE_KERNEL(NAME, T, COLUMNS, 3)     \
  ESPARSE_DECODE_KERNEL(NAME, T, COLUMNS, 4)
#define ESPARSE_DECODE_ENTRY(NAME, COLUMNS, TILES) \
  {NAME##_##COLUMNS##_##TILES, #NAME "_" #COLUMNS "_" #TILES}
#define ESPARSE_DECODE_ENTRIES(NAME, COLUMNS)                                      \
  {ESPARSE_DECODE_ENTRY(NAME, COLUMNS, 1), ESPARSE_DECODE_ENTRY(NAME, COLUMNS, 2), \
   ESPARSE_DECODE_ENTRY(NAME, COLUMNS, 3), ESPARSE_DECODE_ENTRY(NAME, COLUMNS, 4)}
#define ESPARSE_DECODE_INSTANCES(NAME, T)                                                 \
  ESPARSE_DECODE_COLUMNS(NAME, T, 1)                                                      \
  ESPARSE_DECODE_COLUMNS(NAME, T, 2)                                                      \
  constexpr DecodeKernel NAME##_kernels[2][kMaxTiles] = {ESPARSE_DECODE_ENTRIES(NAME, 1), \
                                                         ESPARSE_DECODE_ENTRIES(NAME, 2)}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_DECODE_GPU_H_
