// What Python can ask of the CUDA kernels outside of XLA.
#ifndef ESPARSE_FFI_CUDA_BINDINGS_H_
#define ESPARSE_FFI_CUDA_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace esparse::cuda {

void Bind(pybind11::module_& module);

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_BINDINGS_H_
