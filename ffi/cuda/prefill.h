// The 2:4 product for many rows of x (prompts) on Hopper, by its sparse warpgroup products: plan ->
// launch.
//
// Plain CUDA, no XLA: prefill_handler.cc checks buffers and calls this. Nothing here waits for the
// device, allocates, or keeps anything between calls, so every call may be captured in a CUDA
// graph.
#ifndef ESPARSE_FFI_CUDA_PREFILL_H_
#define ESPARSE_FFI_CUDA_PREFILL_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/decode_plan.h"

namespace esparse::cuda {

// How the work is cut. Zero chooses by the shape.
struct PrefillPlan {
  int32_t rows = 0;     // of x that a block multiplies at a time: 64, 128 or 256
  int32_t cluster = 0;  // 1, or of 256 rows 2 blocks, of neighbouring outputs, share what they load
  int32_t group = 0;    // 1..64 tiles of rows that are walked together, for the second-level cache
  int32_t split = 0;    // 1, or if cluster is 1 up to 8 blocks multiply a part of the channels each
};

// As it is handed over: its fields in their order.
constexpr int kPrefillPlanFields = 4;
inline PrefillPlan PrefillPlanOf(const int32_t* fields) {
  static_assert(sizeof(PrefillPlan) == kPrefillPlanFields * sizeof(int32_t));
  return {fields[0], fields[1], fields[2], fields[3]};
}
constexpr int kMostSplit = 8;

// y = x W^T of a product without fusion, on a device of compute capability 9.0. All buffers start
// at multiples of kAlignment.
cudaError_t LaunchPrefill(const Product& product, const PrefillPlan& plan, cudaStream_t stream);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PREFILL_H_
