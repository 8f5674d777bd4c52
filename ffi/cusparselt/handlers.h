// XLA's entry points to cuSPARSELt: for CUDA, and for the CPU platform in a form for tests.
//
// Stages: instantiate reads the attributes and takes hold of the library; initialize makes the plan
// of its GPU, once; execute launches. What they share lives in the FFI state of the call, which is
// made and destroyed with the executable. On the CPU platform XLA runs no initialize stage, so the
// form for tests initializes at the beginning of execute.
#ifndef ESPARSE_FFI_CUSPARSELT_HANDLERS_H_
#define ESPARSE_FFI_CUSPARSELT_HANDLERS_H_

#include <vector>

#include "xla/ffi/api/ffi.h"

namespace esparse::cusparselt {

// y = x * W^T. Arguments x [row, channel] and blob U8; results y [row, out] and workspace U8, as
// large as the plan asks for or larger. Attributes (int32) algorithm, split_k, split_k_mode,
// split_k_buffers: see Algorithm; readers (int32 array): version * 1000 + architecture, as
// 800090 for 0.8.0 on sm_90, of each library and GPU that reads this blob. Others refuse it.
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltMatmulInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltMatmulInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltMatmulExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltMatmulHostInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltMatmulHostExecute);

// The library's own compression. Argument weight [out, channel], masked; results blob U8 of exactly
// the size the library gives it, and workspace U8.
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltCompressInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltCompressInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltCompressExecute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltCompressHostInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CusparseltCompressHostExecute);

// The types of the handlers' states, which XLA has to know before it knows the handlers.
struct StateType {
  const char* name;
  XLA_FFI_TypeId* id;
  const XLA_FFI_TypeInfo* info;
};

std::vector<StateType> StateTypesOnCuda();
std::vector<StateType> StateTypesOnHost();

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_HANDLERS_H_
