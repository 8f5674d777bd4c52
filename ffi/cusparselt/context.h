// The library's context on one GPU, which all plans there share: making one takes the library a
// fifth of a second, since it loads its kernels.
#ifndef ESPARSE_FFI_CUSPARSELT_CONTEXT_H_
#define ESPARSE_FFI_CUSPARSELT_CONTEXT_H_

#include <memory>
#include <mutex>

#include "cusparselt/handles.h"
#include "cusparselt/library.h"
#include "status.h"

namespace esparse::cusparselt {

using SharedLibrary = std::shared_ptr<const Library>;

class Context {
 public:
  // The context on the GPU that is current, by its number; made unless there is one. It is
  // destroyed with the last plan that holds it.
  static ffi::ErrorOr<std::shared_ptr<const Context>> On(SharedLibrary library, int device);

  Context(SharedLibrary library, Handle handle)
      : library_(std::move(library)), handle_(std::move(handle)) {}

  const Library& library() const { return *library_; }
  const Handle& handle() const { return handle_; }

  // To be held around calls with the handle: the library does not say that threads may share one.
  std::unique_lock<std::mutex> Lock() const { return std::unique_lock<std::mutex>(mutex_); }

 private:
  SharedLibrary library_;
  Handle handle_;
  mutable std::mutex mutex_;
};

using SharedContext = std::shared_ptr<const Context>;

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_CONTEXT_H_
