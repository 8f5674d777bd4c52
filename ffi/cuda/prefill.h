// The 2:4 product for any number of rows of x on Hopper, by its sparse warpgroup products: plan ->
// launch.
//
// Plain CUDA, no XLA: prefill_handler.cc checks buffers and calls this. Nothing here waits for the
// device, allocates, or keeps anything between calls but what the device has room for, so every
// call may be captured in a CUDA graph.
#ifndef ESPARSE_FFI_CUDA_PREFILL_H_
#define ESPARSE_FFI_CUDA_PREFILL_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/prefill_plan.h"

namespace esparse::cuda {

// y = x W^T of a product without fusion, on a device of compute capability 9.0. All buffers start
// at multiples of kAlignment.
cudaError_t LaunchPrefill(const Product& product, const PrefillPlan& plan, cudaStream_t stream);

// The kernels of a product, for those who queue them in another way: `teams` clusters of `team`
// blocks, whose parameters are the last four fields.
struct PrefillLaunch {
  const char* name;      // in the cubin
  const void* function;  // for the CUDA runtime
  int teams, team, threads, shared;
  CUtensorMap values, x, indices;
  PrefillArgs args;
};
struct PrefillLaunches {
  PrefillLaunch all[2];
  int count;  // the second one may start before the first has ended
};

// `prefetch`: the caller knows that W was complete before the kernel before began, and lets the
// first kernel start before that one has ended (programmatic dependent launch).
cudaError_t PreparePrefill(const Product& product, const PrefillPlan& plan, bool prefetch,
                           PrefillLaunches* launches);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_H_
