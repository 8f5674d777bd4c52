// XLA's record stage: a handler adds its kernel to XLA's own CUDA graph, instead of being traced
// into a graph of its own. Only so can kernels of two calls overlap (programmatic dependent
// launch).
//
// It is there from FFI API 0.4 on (jax 0.11), whose header calls it unstable, and not in the
// headers this is built against (0.3, see BUILD.md). What is used of it is declared again here, by
// the names of xla/ffi/api/record_c_api.h without their prefix, and the version of the extension is
// checked at run time. Where it is another one, calls are traced as ever.
#ifndef ESPARSE_FFI_CUDA_RECORD_H_
#define ESPARSE_FFI_CUDA_RECORD_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "xla/ffi/api/ffi.h"

namespace esparse::cuda::record {

constexpr int64_t kExtensionType = 128;
constexpr int32_t kMajorVersion = 0;
constexpr int32_t kLeastMinorVersion = 1;
constexpr int32_t kLeastApiMinor = 4;

struct Context;
struct Command;

enum class Action : int { kCreate = 0, kUpdate = 1 };
enum class SourceFormat : int { kPtx = 0, kCubin = 1 };

struct Dim3 {
  int32_t x, y, z;
};
struct LaunchDims {
  Dim3 grid, block, cluster;  // cluster: zeros for none
};

enum class ArgType : int { kDevicePointer = 0, kHostValue = 1 };
struct KernelArg {
  const void* address;  // the device pointer itself, or where the value lies
  int64_t size;         // 0 for a device pointer
  ArgType type;
};
struct KernelArgList {
  const KernelArg* args;
  int64_t count;
};

struct Api {
  XLA_FFI_Error* (*create_launch)(Context*, const char* kernel_name, const void* kernel_data,
                                  int64_t kernel_size, SourceFormat, LaunchDims,
                                  uint32_t shared_bytes, int32_t uses_pdl, const KernelArgList*,
                                  const Command* const* dependencies, uint32_t num_dependencies,
                                  const Command** out);
  XLA_FFI_Error* (*update_launch)(Context*, const Command*, const KernelArgList*);
  XLA_FFI_Error* (*create_memcpy_d2d)(Context*, void* to, void* from, int64_t size,
                                      const Command* const*, uint32_t, const Command**);
  XLA_FFI_Error* (*update_memcpy_d2d)(Context*, const Command*, void* to, void* from, int64_t size);
  XLA_FFI_Error* (*request_stream_capture)(Context*);
};

struct Frame {
  Context* context;
  const Api* api;
  Action action;
  const Command** commands;
  int64_t* num_commands;
  int64_t max_commands;
};

struct ExtensionId {
  int64_t type;
  int32_t major, minor;
};
struct Extension {
  size_t struct_size;
  ExtensionId id;
  const Extension* next;
};
struct RecordExtension {
  Extension base;
  Frame* frame;
};

struct FindExtensionArgs {
  size_t struct_size;
  void* extension_start;
  XLA_FFI_ExecutionContext* context;
  int64_t type;
  const Extension* extension;  // out
};
using FindExtension = XLA_FFI_Error*(FindExtensionArgs*);

// The function that API 0.4 adds behind the last one of 0.3.
constexpr size_t kFindExtensionAt =
    offsetof(XLA_FFI_Api, XLA_FFI_DeviceOrdinal_Get) + sizeof(void*);

// A handler's bundle, and the arguments that register it, as of API 0.4.
struct Bundle {
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* prepare;
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
  XLA_FFI_Handler* record;
};
struct RegisterArgs {
  size_t struct_size;
  void* extension_start;
  XLA_FFI_ByteSpan name;
  XLA_FFI_ByteSpan platform;
  Bundle bundle;
  XLA_FFI_Handler_Traits traits;
};

// Argument of a record handler, by `.Ctx<Recorder>()`.
struct Recorder {
  const XLA_FFI_Api* ffi;
  Frame* frame;
};

}  // namespace esparse::cuda::record

namespace xla::ffi {

template <>
struct CtxDecoding<esparse::cuda::record::Recorder> {
  using Type = esparse::cuda::record::Recorder;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    namespace record = esparse::cuda::record;
    record::FindExtensionArgs args = {sizeof(args), nullptr, context, record::kExtensionType,
                                      nullptr};
    const auto find = *reinterpret_cast<record::FindExtension* const*>(
        reinterpret_cast<const char*>(api) + record::kFindExtensionAt);
    if (XLA_FFI_Error* error = find(&args)) {
      diagnostic.Emit("finding XLA's record extension failed: ")
          << internal::GetErrorMessage(api, error);
      internal::DestroyError(api, error);
      return std::nullopt;
    }
    if (args.extension == nullptr || args.extension->id.major != record::kMajorVersion ||
        args.extension->id.minor < record::kLeastMinorVersion) {
      diagnostic.Emit("this XLA's record extension has another version than 0.1 and later 0.x");
      return std::nullopt;
    }
    const auto* extension = reinterpret_cast<const record::RecordExtension*>(args.extension);
    return Type{api, extension->frame};
  }
};

}  // namespace xla::ffi

#endif  // ESPARSE_FFI_CUDA_RECORD_H_
