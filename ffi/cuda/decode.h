// The 2:4 product for a few rows of x (decoding) on NVIDIA GPUs: plan -> launch.
//
// Plain CUDA, no XLA: handlers.cc checks buffers and calls this. Nothing here waits for the device,
// allocates, or keeps anything between calls, so every call may be captured in a CUDA graph.
#ifndef ESPARSE_FFI_CUDA_DECODE_H_
#define ESPARSE_FFI_CUDA_DECODE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/decode_args.h"
#include "cuda/decode_plan.h"

namespace esparse::cuda {

// How a kernel stands to the one before it, from sm_90 on (programmatic dependent launch). Whatever
// is chosen, x and residual are read and y is written only when all earlier work has ended.
enum class Start : int32_t {
  kAlone,     // it begins when the kernel before has ended
  kEarly,     // it is set up before that, and then waits
  kPrefetch,  // it also requests W meanwhile: the caller knows that W was complete before the
              // kernel before began
};

// The cut that the current device gets.
cudaError_t CutOf(const Product& product, const Plan& plan, Cut* cut);

// Queues the product.
cudaError_t Launch(const Product& product, const Plan& plan, Start start, cudaStream_t stream);

// The kernel of a product, for those who queue it in another way. kPermute is refused: it takes
// two.
struct KernelLaunch {
  const char* name;           // in the cubin of its dtype and architecture
  const void* function;       // for the CUDA runtime
  int grid, threads, shared;  // blocks, threads in each, bytes of dynamic shared memory
  const void* blob;
  const void* x;
  const void* residual;
  const void* places;
  void* y;
  void* scattered;
  KernelArgs args;
};
cudaError_t Prepare(const Product& product, const Plan& plan, Start start, KernelLaunch* launch);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_DECODE_H_
