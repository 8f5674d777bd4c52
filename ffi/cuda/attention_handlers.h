// XLA's entry points to the attention of a decode step.
#ifndef ESPARSE_FFI_CUDA_ATTENTION_HANDLERS_H_
#define ESPARSE_FFI_CUDA_ATTENTION_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {

// Arguments projected, keys, values, cosines, sines, length, then start where has_start says so and
// places where has_places does. Results attended, keys, values: the last two are the arguments of
// these names, written in place.
XLA_FFI_DECLARE_HANDLER_SYMBOL(DecodeAttention);

#ifdef ESPARSE_CUBINS
constexpr const char* kRecordedAttendTarget = "esparse_attend_recorded_v2";
XLA_FFI_Error* RecordDecodeAttention(XLA_FFI_CallFrame* frame);
#endif

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_ATTENTION_HANDLERS_H_
