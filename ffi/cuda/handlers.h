// XLA's entry points to the CUDA kernels.
#ifndef ESPARSE_FFI_CUDA_HANDLERS_H_
#define ESPARSE_FFI_CUDA_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {

// One product; see Fusion for what may stand around it. Arguments x, blob, then those that the
// fusion asks for: residual, permutation, places. Results y, then scratch (permutation), scattered
// (places).
XLA_FFI_DECLARE_HANDLER_SYMBOL(Decode24);

// Several products, the later ones reading what the earlier ones write, which overlap: from the
// second on, a weight is requested before the product before it has ended.
XLA_FFI_DECLARE_HANDLER_SYMBOL(Chain24);

// Twice the sums over rows of the greater of two scores; see max_sum.h.
XLA_FFI_DECLARE_HANDLER_SYMBOL(MaxSum32);

// A residual added to rows, their norm, and its channels in another order; see row_norm.h.
XLA_FFI_DECLARE_HANDLER_SYMBOL(RowNorm16);

// A product of many rows; see prefill.h. Only builds for compute capability 9.0 have it.
XLA_FFI_DECLARE_HANDLER_SYMBOL(Prefill24);

#ifdef ESPARSE_CUBINS
// Products that XLA records instead of tracing them.
constexpr const char* kRecordedTarget = "esparse_decode24_recorded_v3";
XLA_FFI_Error* RecordDecode24(XLA_FFI_CallFrame* frame);
constexpr const char* kRecordedPrefillTarget = "esparse_prefill24_recorded_v1";
XLA_FFI_Error* RecordPrefill24(XLA_FFI_CallFrame* frame);

// `jax.ffi` cannot register a record stage (0.11 takes one and drops it), so RegisterRecorded is
// what it registers: when XLA asks that handler who it is, it registers all recorded targets with
// the API that XLA came with. Where that is older than 0.4, it refuses.
extern "C" XLA_FFI_Error* RegisterRecorded(XLA_FFI_CallFrame* frame);
#endif

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_HANDLERS_H_
