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
#include <string>
#include <utility>

#include "status.h"
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

// XLA's error as ours, with what was asked of it.
inline ffi::Error TakeError(const XLA_FFI_Api* api, XLA_FFI_Error* error, const char* what) {
  if (error == nullptr) return ffi::Error::Success();
  std::string text = std::string(what) + ": " + ffi::internal::GetErrorMessage(api, error);
  ffi::internal::DestroyError(api, error);
  return ffi::Error::Internal(std::move(text));
}

// What one kernel is to XLA. The kernel's name, code and cut stay the same for as long as a graph
// is updated.
struct Kernel {
  const char* name;
  const void* cubin;
  size_t cubin_bytes;
  int grid, threads, shared;
  int cluster = 0;  // blocks of one; 0 where there are none
};

// Adds a kernel to XLA's graph, or gives the one that is there new arguments.
inline ffi::Error AddOrUpdate(const Recorder& recorder, const Kernel& kernel,
                              const KernelArgList& args) {
  const Frame& frame = *recorder.frame;
  if (frame.action == Action::kUpdate) {
    if (*frame.num_commands != 1) {
      return ffi::Error::Internal("XLA updates a recorded kernel that has no single command.");
    }
    return TakeError(recorder.ffi,
                     frame.api->update_launch(frame.context, frame.commands[0], &args),
                     "XLA's update_launch");
  }
  if (*frame.num_commands >= frame.max_commands) {
    return ffi::Error::Internal("XLA gives a recorded kernel no room for its command.");
  }
  LaunchDims dims = {{kernel.grid, 1, 1}, {kernel.threads, 1, 1}, {}};
  if (kernel.cluster > 0) dims.cluster = {kernel.cluster, 1, 1};
  const Command* command = nullptr;
  ESPARSE_RETURN_IF_ERROR(TakeError(
      recorder.ffi,
      frame.api->create_launch(frame.context, kernel.name, kernel.cubin,
                               static_cast<int64_t>(kernel.cubin_bytes), SourceFormat::kCubin, dims,
                               kernel.shared, /*uses_pdl=*/1, &args, nullptr, 0, &command),
      "XLA's create_launch"));
  frame.commands[(*frame.num_commands)++] = command;
  return ffi::Error::Success();
}

// Has XLA trace the call instead, into a graph of its own.
inline ffi::Error RequestCapture(const Recorder& recorder) {
  return TakeError(recorder.ffi,
                   recorder.frame->api->request_stream_capture(recorder.frame->context),
                   "XLA's request_stream_capture");
}

inline KernelArg Pointer(const void* address) { return {address, 0, ArgType::kDevicePointer}; }

// The record stage. The headers know no such stage, so the call is passed on as one that executes;
// what XLA asks of a handler when it registers it is passed on as it is.
inline XLA_FFI_Error* AsExecution(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr) return handler(frame);
  XLA_FFI_CallFrame executed = *frame;
  executed.stage = XLA_FFI_ExecutionStage_EXECUTE;
  return handler(&executed);
}

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
