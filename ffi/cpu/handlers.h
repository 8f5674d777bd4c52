// The XLA entry points of the 2:4 weight on the CPU, and the levels its product can run at.
#ifndef ESPARSE_FFI_CPU_HANDLERS_H_
#define ESPARSE_FFI_CPU_HANDLERS_H_

#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace esparse::cpu {

// Names of the instruction-set levels this processor runs, best first; the last is "portable".
std::vector<std::string> SupportedLevels();

// The `level` attribute of the product that names a level, or -1 for an unknown name. The attribute
// -1 itself asks for the best level of the processor the handler runs on.
int LevelCode(const std::string& name);

// y = x * W^T: arguments x, values, indices; result y; attribute level (int32).
XLA_FFI_DECLARE_HANDLER_SYMBOL(Product24);

// The dense W: arguments values, indices; result W.
XLA_FFI_DECLARE_HANDLER_SYMBOL(Expand24);

}  // namespace esparse::cpu

#endif  // ESPARSE_FFI_CPU_HANDLERS_H_
