// The library's context on one GPU, which all plans there share: the library loads its kernels for
// it.
#ifndef ESPARSE_FFI_CUSPARSELT_CONTEXT_H_
#define ESPARSE_FFI_CUSPARSELT_CONTEXT_H_

#include <memory>
#include <mutex>
#include <utility>

#include "cusparselt/handles.h"
#include "cusparselt/library.h"
#include "status.h"

namespace esparse::cusparselt {

using SharedLibrary = std::shared_ptr<const Library>;

class Context {
 public:
  // The context on the GPU that is current, by its number; made unless there is one. It is
  // destroyed with the last plan that holds it. Threads that ask for the same meanwhile wait for
  // it.
  static ffi::ErrorOr<std::shared_ptr<const Context>> On(SharedLibrary library, int device);

  Context(SharedLibrary library, Handle handle)
      : library_(std::move(library)), handle_(std::move(handle)) {}

  const Library& library() const { return *library_; }
  const Handle& handle() const { return handle_; }

  // To be held around calls with the handle, and around those that destroy what was made with it:
  // the library does not say that threads may share one.
  std::unique_lock<std::mutex> Lock() const { return std::unique_lock<std::mutex>(mutex_); }

 private:
  SharedLibrary library_;
  Handle handle_;
  mutable std::mutex mutex_;
};

using SharedContext = std::shared_ptr<const Context>;

// Destroys owners of the library's objects under the lock of their context, which it keeps until
// then. Not to be reached by a thread that holds the lock already.
template <typename Owners>
struct UnderLock {
  SharedContext context;
  void operator()(Owners* owners) const {
    const auto lock = context->Lock();
    delete owners;
  }
};

// Owners of objects that were made with one context. Move-only.
template <typename Owners>
using InContext = std::unique_ptr<Owners, UnderLock<Owners>>;

// Owners of nothing yet.
template <typename Owners>
InContext<Owners> NothingIn(SharedContext context) {
  return InContext<Owners>(new Owners, UnderLock<Owners>{std::move(context)});
}

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_CONTEXT_H_
