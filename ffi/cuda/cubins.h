// The kernels of a decode step as cubins, for XLA to load: it cannot be handed a kernel of the CUDA
// runtime.
#ifndef ESPARSE_FFI_CUDA_CUBINS_H_
#define ESPARSE_FFI_CUDA_CUBINS_H_

#include <cstddef>

#include "cuda/decode.h"

namespace esparse::cuda {

struct Cubin {
  const void* data;
  size_t size;
};

// Compute capability that the cubins are for; no other one runs them.
constexpr int kCubinMajor = 9, kCubinMinor = 0;

// Whether the current device runs them.
cudaError_t CubinsRun(bool* run);

Cubin DecodeCubin(Dtype dtype);
Cubin AttentionCubin();
Cubin PrefillCubin();

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_CUBINS_H_
