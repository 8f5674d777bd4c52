// XLA's entry points to the decode kernel.
#ifndef ESPARSE_FFI_CUDA_HANDLERS_H_
#define ESPARSE_FFI_CUDA_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {

// One product; see Fusion for what may stand around it. Arguments x, blob, then those that the
// fusion asks for: residual, permutation. Results y and, with a permutation, scratch like x.
XLA_FFI_DECLARE_HANDLER_SYMBOL(Decode24);

// norm -> gate and up -> SwiGLU -> down -> residual: two products that overlap. Arguments x (also
// the residual), blob of gate and up, blob of down; results y and the hidden activations.
XLA_FFI_DECLARE_HANDLER_SYMBOL(Mlp24);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_HANDLERS_H_
