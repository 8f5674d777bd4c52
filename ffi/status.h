// Errors that cross the border into XLA, as values: no exception leaves a handler.
#ifndef ESPARSE_FFI_STATUS_H_
#define ESPARSE_FFI_STATUS_H_

#include <cstdint>
#include <sstream>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace esparse {

namespace ffi = ::xla::ffi;

// Joins its arguments into the text of an error.
template <typename... Parts>
ffi::Error InvalidArgument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return ffi::Error::InvalidArgument(text.str());
}

// A buffer as its user would write it: "F32[8, 4096]".
inline std::string Describe(const ffi::AnyBuffer& buffer) {
  std::ostringstream text;
  text << buffer.element_type() << "[";
  const char* separator = "";
  for (int64_t size : buffer.dimensions()) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

}  // namespace esparse

// Leaves the calling handler with the error of `expression`, an ffi::Error, if it is one.
#define ESPARSE_RETURN_IF_ERROR(expression)            \
  do {                                                 \
    ::xla::ffi::Error esparse_error = (expression);    \
    if (esparse_error.failure()) return esparse_error; \
  } while (false)

#endif  // ESPARSE_FFI_STATUS_H_
