// The CUDA runtime's errors, handed on where no XLA is (errors.h has them as XLA's).
#ifndef ESPARSE_FFI_CUDA_RETURN_IF_ERROR_H_
#define ESPARSE_FFI_CUDA_RETURN_IF_ERROR_H_

#include <cuda_runtime_api.h>

// Leaves the calling function with the error of a call of the runtime.
#define ESPARSE_CUDA_RETURN_IF_ERROR(call)                    \
  do {                                                        \
    const cudaError_t esparse_status = (call);                \
    if (esparse_status != cudaSuccess) return esparse_status; \
  } while (false)

#endif  // ESPARSE_FFI_CUDA_RETURN_IF_ERROR_H_
