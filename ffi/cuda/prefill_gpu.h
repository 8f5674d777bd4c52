// What the prefill kernel needs of Hopper: barriers in shared memory, tensor copies, and the sparse
// products of a warpgroup (PTX: mbarrier, cp.async.bulk.tensor, wgmma.mma_async.sp, st.async).
#ifndef ESPARSE_FFI_CUDA_PREFILL_GPU_H_
#define ESPARSE_FFI_CUDA_PREFILL_GPU_H_

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/cluster.h"
#include "cuda/dependent_launch.h"

#define ESPARSE_DEVICE __device__ __forceinline__
#define ESPARSE_UNROLL _Pragma("unroll")
#include "cuda/prefill_kernel.h"

namespace esparse::cuda {

// Operands and registers of a long instruction, eight at a time.
#define ESPARSE_SUMS_8(i)                                                               \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), \
      "+f"(sum[i + 5]), "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define ESPARSE_SUMS_32(i) \
  ESPARSE_SUMS_8(i), ESPARSE_SUMS_8(i + 8), ESPARSE_SUMS_8(i + 16), ESPARSE_SUMS_8(i + 24)
#define ESPARSE_SUMS_64 ESPARSE_SUMS_32(0), ESPARSE_SUMS_32(32)
#define ESPARSE_SUMS_128 ESPARSE_SUMS_64, ESPARSE_SUMS_32(64), ESPARSE_SUMS_32(96)
#define ESPARSE_TEN(t)                                                                             \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9"
#define ESPARSE_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ESPARSE_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " ESPARSE_TEN(1) ", " ESPARSE_TEN(2) ", %30, %31"
#define ESPARSE_REGISTERS_60                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " ESPARSE_TEN(1) ", " ESPARSE_TEN(2) ", " ESPARSE_TEN( \
      3) ", " ESPARSE_TEN(4) ", " ESPARSE_TEN(5)
#define ESPARSE_REGISTERS_64 ESPARSE_REGISTERS_60 ", %60, %61, %62, %63"
#define ESPARSE_REGISTERS_128 \
  ESPARSE_REGISTERS_60 ", " ESPARSE_TEN(6) ", " ESPARSE_TEN(7) ", " ESPARSE_TEN(8) ", " ESPARSE_TEN( \
      9) ", " ESPARSE_TEN(10) ", " ESPARSE_TEN(11)                                            \
      ", %120, %121, %122, %123, %124, %125, %126, %127"
#define ESPARSE_WGMMA_SP(columns, dtype, registers, sums, w, x, e, more, selector)                \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #more                                     \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sp.sync.aligned.m64n" #columns "k32.f32." dtype "." dtype         \
               " {" registers "}, %" #w ", %" #x ", %" #e ", %" #selector ", add, 1, 1, 0, 0;\n}" \
               : sums                                                                             \
               : "l"(weight), "l"(rows), "r"(indices), "r"(add), "n"(kSelector))
#define ESPARSE_WAIT_BARRIER(order)           \
  asm volatile(                               \
      "{\n.reg .pred ended;\nagain:\n"        \
      "mbarrier.try_wait.parity" order        \
      ".shared::cta.b64 ended, [%0], %1;\n"   \
      "@!ended bra again;\n}" ::"r"(barrier), \
      "r"(parity)                             \
      : "memory")

class PrefillGpu {
 public:
  // The matrices that copies read, described in parameters of the kernel.
  ESPARSE_DEVICE PrefillGpu(const void* shared, const CUtensorMap* values, const CUtensorMap* x,
                            const CUtensorMap* indices)
      : shared_((static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023) & ~1023u),
        values_(values),
        x_(x),
        indices_(indices) {}

  ESPARSE_DEVICE int Thread() const { return threadIdx.x; }
  // A number that all threads of a warp have, so that the compiler knows.
  ESPARSE_DEVICE int OfWarp(int number) const { return __shfl_sync(0xffffffff, number, 0); }
  // The same number, of which the compiler does not know it: what is computed from it is not kept
  // in registers from before a loop.
  ESPARSE_DEVICE int Anew(int number) const {
    asm volatile("" : "+r"(number));
    return number;
  }
  ESPARSE_DEVICE int Block() const { return blockIdx.x; }
  ESPARSE_DEVICE int Blocks() const { return gridDim.x; }
  // Of the block in its cluster.
  ESPARSE_DEVICE int Rank() const {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
  }
  ESPARSE_DEVICE uint32_t Shared() const { return shared_; }
  ESPARSE_DEVICE void WaitForPrevious() const { cuda::WaitForPrevious(); }
  ESPARSE_DEVICE void LetNextStart() const { cuda::LetNextStart(); }
  // Whether this is the one thread of its warp that does what one has to. The compiler knows that
  // no other does, which it cannot tell of a comparison.
  ESPARSE_DEVICE bool Elect() const {
    int elected;
    asm volatile(
        "{\n"
        ".reg .pred mine;\n"
        "elect.sync _|mine, 0xffffffff;\n"
        "selp.b32 %0, 1, 0, mine;\n"
        "}"
        : "=r"(elected));
    return elected;
  }
  ESPARSE_DEVICE void SyncWarp() const { __syncwarp(); }
  ESPARSE_DEVICE void SyncGroup(int group) const {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  }
  ESPARSE_DEVICE void SyncBlock() const { __syncthreads(); }
  // The cluster; what one wrote, and its arrivals at barriers, are there for all.
  ESPARSE_DEVICE void SyncCluster() const { cuda::SyncCluster(); }
  // Of all threads of the cluster. What they wrote before is not there for each other because of
  // it, but barriers are.
  ESPARSE_DEVICE void BeginMeeting() const { BeginClusterMeeting(); }
  ESPARSE_DEVICE void EndMeeting() const { EndClusterMeeting(); }

  // ---- barriers: addresses of 8 bytes

  ESPARSE_DEVICE void InitBarrier(uint32_t barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
  }
  // Barriers are there for other blocks and for copies.
  ESPARSE_DEVICE void FenceBarriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // One arrival, and so many bytes of copies to wait for.
  ESPARSE_DEVICE void ArriveAndExpect(uint32_t barrier, uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
  }
  ESPARSE_DEVICE void Arrive(uint32_t barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
  // At the same barrier of a block of the cluster.
  ESPARSE_DEVICE void ArriveAt(uint32_t barrier, int rank) const {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
  }
  // Until the phase of this parity has ended.
  ESPARSE_DEVICE void WaitBarrier(uint32_t barrier, uint32_t parity) const {
    ESPARSE_WAIT_BARRIER("");
  }

  // The same, where other blocks of the cluster send what it counts.
  ESPARSE_DEVICE void WaitForSent(uint32_t barrier, uint32_t parity) const {
    ESPARSE_WAIT_BARRIER(".acquire.cluster");
  }
  // To this address of the shared memory of a block of the cluster, whose `barrier` counts it.
  ESPARSE_DEVICE void SendTo(int rank, uint32_t address, float a, float b, float c, float d,
                             uint32_t barrier) const {
    asm volatile(
        "{\n"
        ".reg .b32 there, counts;\n"
        "mapa.shared::cluster.u32 there, %0, %6;\n"
        "mapa.shared::cluster.u32 counts, %1, %6;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
        "[there], {%2, %3, %4, %5}, [counts];\n"
        "}" ::"r"(address),
        "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d), "r"(rank)
        : "memory");
  }

  // ---- copies, which a barrier counts

  // The first copies need not wait for what describes their matrices.
  ESPARSE_DEVICE void PrefetchDescriptions() const {
    for (const CUtensorMap* map : {values_, x_, indices_}) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
    }
  }

  ESPARSE_DEVICE void CopyValues(uint32_t to, int column, int row, uint32_t barrier) const {
    CopyTile(to, values_, column, row, barrier);
  }
  // To the same place of every block of the cluster, whose own barriers count it.
  template <int kCluster>
  ESPARSE_DEVICE void CopyX(uint32_t to, int column, int row, uint32_t barrier) const {
    if constexpr (kCluster == 1) {
      CopyTile(to, x_, column, row, barrier);
    } else {
      constexpr uint16_t kAll = (1 << kCluster) - 1;
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
          ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
          "l"(x_), "r"(column), "r"(row), "r"(barrier), "h"(kAll)
          : "memory");
    }
  }
  ESPARSE_DEVICE void CopyIndices(uint32_t to, int column, int row, uint32_t barrier) const {
    CopyTile(to, indices_, column, row, barrier);
  }

  // ---- shared memory and registers

  ESPARSE_DEVICE void LoadShared(uint32_t address, uint32_t* first, uint32_t* second) const {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(*first), "=r"(*second) : "r"(address));
  }
  ESPARSE_DEVICE void LoadShared16(uint32_t address, uint32_t (&four)[4]) const {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3])
                 : "r"(address)
                 : "memory");
  }
  ESPARSE_DEVICE void LoadShared16(uint32_t address, float (&four)[4]) const {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
                 : "r"(address)
                 : "memory");
  }
  ESPARSE_DEVICE void Store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) const {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
  }
  ESPARSE_DEVICE void Store4(void* to, uint32_t a) const {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(a) : "memory");
  }
  ESPARSE_DEVICE uint32_t Bytes(uint32_t low, uint32_t high, uint32_t which) const {
    return __byte_perm(low, high, which);
  }
  template <typename T>
  ESPARSE_DEVICE uint32_t Pack(float low, float high) const {
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 packed = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&packed);
    } else {
      const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&packed);
    }
  }
  // An 8x8 matrix of a warp, of which lane 4 i + j has columns 2 j and 2 j + 1 of row i.
  ESPARSE_DEVICE uint32_t Transpose(uint32_t pair) const {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
  }
  // Four 8x8 matrices as products leave them, each transposed: lane 8 i + j says where column j of
  // matrix i goes, 16 bytes.
  ESPARSE_DEVICE void StoreTransposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c,
                                      uint32_t d) const {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
  }

  // ---- products of a warpgroup

  ESPARSE_DEVICE void BeginProducts() const {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  ESPARSE_DEVICE void CommitProducts() const {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  template <int kPending>
  ESPARSE_DEVICE void WaitProducts() const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  }

  // sum[64 outputs][kColumns rows of x] (+)= weight[64][32 channels, 2:4] rows[kColumns][32]^T, the
  // sums a thread's as PTX lays them out. `indices` is what PTX calls sp-meta: threads 2 kSelector
  // and 2 kSelector + 1 of each four hold those of the first and of the last 16 channels, for
  // output lane / 4 in the low half and lane / 4 + 8 in the high one.
  template <typename T, int kColumns, int kSelector>
  ESPARSE_DEVICE void MultiplySparse(float (&sum)[kColumns / 2], uint64_t weight, uint64_t rows,
                                     uint32_t indices, bool add_to) const {
    const int add = add_to;
    static_assert(kColumns == 16 || kColumns == 64 || kColumns == 128 || kColumns == 256);
    if constexpr (kColumns == 256 && std::is_same_v<T, __half>) {
      ESPARSE_WGMMA_SP(256, "f16", ESPARSE_REGISTERS_128, ESPARSE_SUMS_128, 128, 129, 130, 131,
                       132);
    } else if constexpr (kColumns == 256) {
      ESPARSE_WGMMA_SP(256, "bf16", ESPARSE_REGISTERS_128, ESPARSE_SUMS_128, 128, 129, 130, 131,
                       132);
    } else if constexpr (kColumns == 128 && std::is_same_v<T, __half>) {
      ESPARSE_WGMMA_SP(128, "f16", ESPARSE_REGISTERS_64, ESPARSE_SUMS_64, 64, 65, 66, 67, 68);
    } else if constexpr (kColumns == 128) {
      ESPARSE_WGMMA_SP(128, "bf16", ESPARSE_REGISTERS_64, ESPARSE_SUMS_64, 64, 65, 66, 67, 68);
    } else if constexpr (kColumns == 64 && std::is_same_v<T, __half>) {
      ESPARSE_WGMMA_SP(64, "f16", ESPARSE_REGISTERS_32, ESPARSE_SUMS_32(0), 32, 33, 34, 35, 36);
    } else if constexpr (kColumns == 64) {
      ESPARSE_WGMMA_SP(64, "bf16", ESPARSE_REGISTERS_32, ESPARSE_SUMS_32(0), 32, 33, 34, 35, 36);
    } else if constexpr (std::is_same_v<T, __half>) {
      ESPARSE_WGMMA_SP(16, "f16", ESPARSE_REGISTERS_8, ESPARSE_SUMS_8(0), 8, 9, 10, 11, 12);
    } else {
      ESPARSE_WGMMA_SP(16, "bf16", ESPARSE_REGISTERS_8, ESPARSE_SUMS_8(0), 8, 9, 10, 11, 12);
    }
  }

 private:
  ESPARSE_DEVICE void CopyTile(uint32_t to, const CUtensorMap* map, int column, int row,
                               uint32_t barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
  }

  uint32_t shared_;
  const CUtensorMap *values_, *x_, *indices_;
};

#undef ESPARSE_SUMS_8
#undef ESPARSE_SUMS_32
#undef ESPARSE_SUMS_64
#undef ESPARSE_SUMS_128
#undef ESPARSE_TEN
#undef ESPARSE_REGISTERS_8
#undef ESPARSE_REGISTERS_32
#undef ESPARSE_REGISTERS_60
#undef ESPARSE_REGISTERS_64
#undef ESPARSE_REGISTERS_128
#undef ESPARSE_WGMMA_SP
#undef ESPARSE_WAIT_BARRIER

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_GPU_H_
