// The CUDA runtime's errors, as values.
#ifndef ESPARSE_CUDA_ERRORS_H_
#define ESPARSE_CUDA_ERRORS_H_

#include <cuda_runtime_api.h>

#include <string>

#include "status.h"

namespace esparse::cuda {

// What the runtime said of `call`: "cudaGraphLaunch", or words such as "the decode product".
inline ffi::Error ToError(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(call) + " failed on this GPU: " +
                              cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ").");
}

}  // namespace esparse::cuda

// Calls a function of the runtime, and leaves the calling function with its error.
#define ESPARSE_CUDA_CALL(name, ...) \
  ESPARSE_RETURN_IF_ERROR(::esparse::cuda::ToError(name(__VA_ARGS__), #name))

#endif  // ESPARSE_CUDA_ERRORS_H_
