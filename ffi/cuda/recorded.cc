// Registers the targets that XLA records instead of tracing them.
#include <cstddef>
#include <cstring>

#include "cuda/attention_handlers.h"
#include "cuda/handlers.h"
#include "cuda/record.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {
namespace {

XLA_FFI_Error* Refusal(const XLA_FFI_Api* api, const char* message) {
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_UNIMPLEMENTED;
  return api->XLA_FFI_Error_Create(&args);
}

ffi::Error NotCalledImpl() {
  return ffi::Error::Internal("this target only registers others; nothing calls it.");
}
XLA_FFI_DEFINE_HANDLER(kNotCalled, NotCalledImpl, ffi::Ffi::Bind());

struct Target {
  const char* name;
  XLA_FFI_Handler* execute;
  XLA_FFI_Handler* record;
};
constexpr Target kTargets[] = {{kRecordedTarget, Decode24, RecordDecode24},
                               {kRecordedPrefillTarget, Prefill24, RecordPrefill24},
                               {kRecordedAttendTarget, DecodeAttention, RecordDecodeAttention}};

}  // namespace

XLA_FFI_Error* RegisterRecorded(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr && frame->api != nullptr) {
    if (frame->api->api_version.minor_version < record::kLeastApiMinor) {
      return Refusal(frame->api, "XLA's FFI API has no record stage before version 0.4.");
    }
    for (const Target& target : kTargets) {
      record::RegisterArgs args = {};
      args.struct_size = offsetof(record::RegisterArgs, traits) + sizeof(args.traits);
      args.name = {target.name, std::strlen(target.name)};
      args.platform = {"CUDA", 4};
      args.bundle.execute = target.execute;
      args.bundle.record = target.record;
      args.traits = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
      XLA_FFI_Error* error = frame->api->XLA_FFI_Handler_Register(
          reinterpret_cast<XLA_FFI_Handler_Register_Args*>(&args));
      if (error != nullptr) return error;
    }
  }
  return kNotCalled(frame);
}

}  // namespace esparse::cuda
