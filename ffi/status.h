// Errors that cross the border into XLA, as values: no exception leaves a handler.
#ifndef ESPARSE_FFI_STATUS_H_
#define ESPARSE_FFI_STATUS_H_

#include <cstdint>
#include <exception>
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

// Converts to whatever the calling function returns: ffi::Error or ffi::ErrorOr<T>.
struct Failure {
  ffi::Error error;
  operator ffi::Error() && { return std::move(error); }  // NOLINT
  template <typename T>
  operator ffi::ErrorOr<T>() && {  // NOLINT
    return ffi::Unexpected(std::move(error));
  }
};

// Runs `body`, which returns ffi::Error or ffi::ErrorOr<T>, where exceptions must not get out: what
// the standard library throws (there is no memory left) becomes an error.
template <typename Body>
auto WithoutExceptions(Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::exception& exception) {
    return Failure{ffi::Error::Internal(exception.what())};
  }
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

// Leaves the calling function with the error of `expression`, an ffi::Error, if it is one.
#define ESPARSE_RETURN_IF_ERROR(expression)                                           \
  do {                                                                                \
    ::xla::ffi::Error esparse_error = (expression);                                   \
    if (esparse_error.failure()) return ::esparse::Failure{std::move(esparse_error)}; \
  } while (false)

// Declares `variable` as the value of `expression`, an ffi::ErrorOr<T>, or leaves with its error.
#define ESPARSE_ASSIGN_OR_RETURN(variable, expression)                                         \
  auto variable##_or = (expression);                                                           \
  if (!variable##_or.has_value()) return ::esparse::Failure{std::move(variable##_or.error())}; \
  auto& variable = *variable##_or

#endif  // ESPARSE_FFI_STATUS_H_
