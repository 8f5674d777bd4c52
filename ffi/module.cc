// The Python module: what to register with XLA, and what this build and processor can do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/handlers.h"
#include "xla/ffi/api/c_api.h"
#ifdef ESPARSE_CUDA
#include "cuda/handlers.h"
#endif

namespace py = pybind11;

namespace {

// The number at the end changes when the handler's arguments, attributes or their meaning do:
// compiled computations are cached and exported by this name, not by the library's version.
constexpr const char* kProductTarget = "esparse_product24_cpu_v1";
constexpr const char* kExpandTarget = "esparse_expand24_cpu_v1";
constexpr const char* kCudaDecodeTarget = "esparse_decode24_cuda_v1";
constexpr const char* kCudaMlpTarget = "esparse_mlp24_cuda_v1";

#ifdef ESPARSE_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

py::capsule Capsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

// name -> (platform, {stage: handler}), as jax.ffi.register_ffi_target takes them.
py::dict Registrations() {
  py::dict registrations;
  py::dict product;
  product["execute"] = Capsule(esparse::cpu::Product24);
  registrations[kProductTarget] = py::make_tuple("cpu", product);
  py::dict expand;
  expand["execute"] = Capsule(esparse::cpu::Expand24);
  registrations[kExpandTarget] = py::make_tuple("cpu", expand);
#ifdef ESPARSE_CUDA
  py::dict decode;
  decode["execute"] = Capsule(esparse::cuda::Decode24);
  registrations[kCudaDecodeTarget] = py::make_tuple("CUDA", decode);
  py::dict mlp;
  mlp["execute"] = Capsule(esparse::cuda::Mlp24);
  registrations[kCudaMlpTarget] = py::make_tuple("CUDA", mlp);
#endif
  return registrations;
}

}  // namespace

PYBIND11_MODULE(_esparse_ffi, module) {
  module.doc() = "XLA FFI handlers of esparse_jax; use it through esparse_jax.sparse._ffi.";
  module.attr("PRODUCT24_CPU") = kProductTarget;
  module.attr("EXPAND24_CPU") = kExpandTarget;
  module.attr("CUDA_DECODE_TARGET") = kCudaDecodeTarget;
  module.attr("CUDA_MLP_TARGET") = kCudaMlpTarget;
  module.attr("HAS_CUDA") = kHasCuda;
  module.def("registrations", &Registrations);
  module.def("cpu_levels", &esparse::cpu::SupportedLevels);
  module.def("cpu_level_code", &esparse::cpu::LevelCode);
}
