#include "cusparselt/context.h"

#include <map>
#include <string>
#include <utility>

namespace esparse::cusparselt {

ffi::ErrorOr<SharedContext> Context::On(SharedLibrary library, int device) {
  using Key = std::pair<std::string, int>;  // the library's file, and the GPU
  // Never destroyed, so that threads may end after the process has begun to.
  static auto& mutex = *new std::mutex;
  static auto& contexts = *new std::map<Key, std::weak_ptr<const Context>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<const Context>& known = contexts[{library->path(), device}];
  SharedContext context = known.lock();
  if (context == nullptr) {
    ESPARSE_ASSIGN_OR_RETURN(handle, MakeHandle(*library));
    context = std::make_shared<const Context>(std::move(library), std::move(handle));
    known = context;
  }
  return context;
}

}  // namespace esparse::cusparselt
