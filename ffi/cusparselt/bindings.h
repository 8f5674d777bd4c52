// What Python asks of cuSPARSELt beside calling its handlers: to open it, and for sizes.
#ifndef ESPARSE_FFI_CUSPARSELT_BINDINGS_H_
#define ESPARSE_FFI_CUSPARSELT_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace esparse::cusparselt {

void Bind(pybind11::module_& module);

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_BINDINGS_H_
