// The Python module: what to register with XLA, and what this build and processor can do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cpu/handlers.h"
#include "cusparselt/bindings.h"
#include "cusparselt/handlers.h"
#include "xla/ffi/api/c_api.h"
#ifdef ESPARSE_CUDA
#include "cuda/attention_handlers.h"
#include "cuda/bindings.h"
#include "cuda/handlers.h"
#endif

namespace py = pybind11;

namespace {

// The number at the end changes when the handler's arguments, attributes or their meaning do:
// compiled computations are cached and exported by this name, not by the library's version.
constexpr const char* kProductTarget = "esparse_product24_cpu_v1";
constexpr const char* kExpandTarget = "esparse_expand24_cpu_v1";
constexpr const char* kDecodeTarget = "esparse_decode24_cuda_v4";
constexpr const char* kChainTarget = "esparse_chain24_cuda_v3";
constexpr const char* kPrefillTarget = "esparse_prefill24_cuda_v3";
constexpr const char* kAttendTarget = "esparse_attend_cuda_v2";
constexpr const char* kMaxSumTarget = "esparse_max_sum_cuda_v1";
constexpr const char* kRowNormTarget = "esparse_row_norm_cuda_v1";
constexpr const char* kRecordTarget = "esparse_register_recorded_v1";
constexpr const char* kMatmulTarget = "esparse_cusparselt_matmul_cuda_v1";
constexpr const char* kCompressTarget = "esparse_cusparselt_compress_cuda_v1";
constexpr const char* kHostMatmulTarget = "esparse_cusparselt_matmul_host_v1";
constexpr const char* kHostCompressTarget = "esparse_cusparselt_compress_host_v1";

#ifdef ESPARSE_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#define ESPARSE_CUDA_ARCHITECTURES ""
#define ESPARSE_CUDA_TOOLKIT ""
#endif

py::capsule Capsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

py::dict Stages(std::initializer_list<std::pair<const char*, XLA_FFI_Handler*>> stages) {
  py::dict capsules;
  for (const auto& [stage, handler] : stages) capsules[stage] = Capsule(handler);
  return capsules;
}

// name -> (platform, {stage: handler}), as jax.ffi.register_ffi_target takes them.
py::dict Registrations() {
  using namespace esparse;  // NOLINT: the namespaces below it say where a handler is from
  py::dict registrations;
  registrations[kProductTarget] = py::make_tuple("cpu", Stages({{"execute", cpu::Product24}}));
  registrations[kExpandTarget] = py::make_tuple("cpu", Stages({{"execute", cpu::Expand24}}));
  registrations[kMatmulTarget] =
      py::make_tuple("CUDA", Stages({{"instantiate", cusparselt::CusparseltMatmulInstantiate},
                                     {"initialize", cusparselt::CusparseltMatmulInitialize},
                                     {"execute", cusparselt::CusparseltMatmulExecute}}));
  registrations[kCompressTarget] =
      py::make_tuple("CUDA", Stages({{"instantiate", cusparselt::CusparseltCompressInstantiate},
                                     {"initialize", cusparselt::CusparseltCompressInitialize},
                                     {"execute", cusparselt::CusparseltCompressExecute}}));
#ifdef ESPARSE_CUDA
  registrations[kDecodeTarget] = py::make_tuple("CUDA", Stages({{"execute", cuda::Decode24}}));
  registrations[kChainTarget] = py::make_tuple("CUDA", Stages({{"execute", cuda::Chain24}}));
  registrations[kAttendTarget] =
      py::make_tuple("CUDA", Stages({{"execute", cuda::DecodeAttention}}));
  registrations[kMaxSumTarget] = py::make_tuple("CUDA", Stages({{"execute", cuda::MaxSum32}}));
  registrations[kRowNormTarget] = py::make_tuple("CUDA", Stages({{"execute", cuda::RowNorm16}}));
#endif
#ifdef ESPARSE_HOPPER
  registrations[kPrefillTarget] = py::make_tuple("CUDA", Stages({{"execute", cuda::Prefill24}}));
#endif
  return registrations;
}

// The target whose registration registers all recorded targets, or nothing; see cuda/handlers.h.
py::dict RecordRegistration() {
#ifdef ESPARSE_CUBINS
  return Stages({{"execute", esparse::cuda::RegisterRecorded}});
#else
  return Stages({});
#endif
}

// The form of cuSPARSELt's handlers for tests on the CPU platform (cusparselt/platform.h). Apart
// from the others, because XLA refuses a handler with a state before its CPU backend is up.
py::dict HostRegistrations() {
  using namespace esparse::cusparselt;  // NOLINT
  py::dict registrations;
  registrations[kHostMatmulTarget] =
      py::make_tuple("cpu", Stages({{"instantiate", CusparseltMatmulHostInstantiate},
                                    {"execute", CusparseltMatmulHostExecute}}));
  registrations[kHostCompressTarget] =
      py::make_tuple("cpu", Stages({{"instantiate", CusparseltCompressHostInstantiate},
                                    {"execute", CusparseltCompressHostExecute}}));
  return registrations;
}

// name -> (platform, registration), as jax.ffi.register_ffi_type takes them.
py::dict TypeRegistrations(const std::vector<esparse::cusparselt::StateType>& types,
                           const char* platform) {
  py::dict registrations;
  for (const auto& type : types) {
    py::dict registration;
    registration["type_id"] = py::capsule(type.id, "xla._TYPE_ID");
    registration["type_info"] = py::capsule(type.info, "xla._TYPE_INFO");
    registrations[type.name] = py::make_tuple(platform, registration);
  }
  return registrations;
}

}  // namespace

PYBIND11_MODULE(_esparse_ffi, module) {
  module.doc() = "XLA FFI handlers of esparse_jax; use it through esparse_jax.native.";
  module.attr("PRODUCT24_CPU") = kProductTarget;
  module.attr("EXPAND24_CPU") = kExpandTarget;
  module.attr("CUDA_DECODE_TARGET") = kDecodeTarget;
  module.attr("CUDA_CHAIN_TARGET") = kChainTarget;
  module.attr("CUDA_ATTEND_TARGET") = kAttendTarget;
  module.attr("CUDA_MAX_SUM_TARGET") = kMaxSumTarget;
  module.attr("CUDA_ROW_NORM_TARGET") = kRowNormTarget;
#ifdef ESPARSE_HOPPER
  module.attr("CUDA_PREFILL_TARGET") = kPrefillTarget;
#else
  module.attr("CUDA_PREFILL_TARGET") = py::none();
#endif
#ifdef ESPARSE_CUBINS
  module.attr("CUDA_RECORDED_TARGET") = esparse::cuda::kRecordedTarget;
  module.attr("CUDA_RECORDED_PREFILL_TARGET") = esparse::cuda::kRecordedPrefillTarget;
  module.attr("CUDA_RECORDED_ATTEND_TARGET") = esparse::cuda::kRecordedAttendTarget;
#else
  module.attr("CUDA_RECORDED_TARGET") = py::none();
  module.attr("CUDA_RECORDED_PREFILL_TARGET") = py::none();
  module.attr("CUDA_RECORDED_ATTEND_TARGET") = py::none();
#endif
  module.attr("CUDA_RECORD_TARGET") = kRecordTarget;
  module.attr("CUSPARSELT_MATMUL") = kMatmulTarget;
  module.attr("CUSPARSELT_COMPRESS") = kCompressTarget;
  module.attr("CUSPARSELT_MATMUL_HOST") = kHostMatmulTarget;
  module.attr("CUSPARSELT_COMPRESS_HOST") = kHostCompressTarget;
  module.attr("HAS_CUDA") = kHasCuda;
  module.attr("HAS_CUSPARSELT_TIMER") = kHasCuda;
  // As CMake has them: "80-real 90", and nvcc's version.
  module.attr("CUDA_ARCHITECTURES") = ESPARSE_CUDA_ARCHITECTURES;
  module.attr("CUDA_TOOLKIT") = ESPARSE_CUDA_TOOLKIT;
  module.attr("FFI_API_VERSION") =
      std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  module.def("registrations", &Registrations);
  module.def("record_registration", &RecordRegistration);
  module.def("types",
             [] { return TypeRegistrations(esparse::cusparselt::StateTypesOnCuda(), "CUDA"); });
  module.def("host_registrations", &HostRegistrations);
  module.def("host_types",
             [] { return TypeRegistrations(esparse::cusparselt::StateTypesOnHost(), "cpu"); });
  esparse::cusparselt::Bind(module);
#ifdef ESPARSE_CUDA
  esparse::cuda::Bind(module);
#endif
  module.def("cpu_levels", &esparse::cpu::SupportedLevels);
  module.def("cpu_level_code", &esparse::cpu::LevelCode);
}
