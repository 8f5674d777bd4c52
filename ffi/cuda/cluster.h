// Clusters of blocks (sm_90 and later).
#ifndef ESPARSE_FFI_CUDA_CLUSTER_H_
#define ESPARSE_FFI_CUDA_CLUSTER_H_

#include <cstdint>

namespace esparse::cuda {

__device__ __forceinline__ void SyncCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// The same in two steps, but what the blocks wrote before need not be there for each other.
__device__ __forceinline__ void BeginClusterMeeting() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void EndClusterMeeting() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

#if __CUDA_ARCH__ >= 900
#define ESPARSE_CLUSTER(BLOCKS) __cluster_dims__(BLOCKS, 1, 1)

// What lies at this address of the shared memory of a block of the cluster.
__device__ __forceinline__ float LoadOfBlock(int rank, uint32_t address) {
  float value;
  asm volatile(
      "{.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [there];}"
      : "=f"(value)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}
#else
// A cluster's size is a part of the kernel, so it can be launched by who cannot name one. Where
// there are no clusters nothing launches such kernels.
#define ESPARSE_CLUSTER(BLOCKS)
#endif

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_CLUSTER_H_
