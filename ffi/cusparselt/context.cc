#include "cusparselt/context.h"

#include <map>
#include <string>
#include <utility>

namespace esparse::cusparselt {

namespace {

// A context that was asked for. Its mutex is held while it is made, the table's is not: GPUs do not
// wait for each other.
struct Entry {
  std::mutex mutex;
  std::weak_ptr<const Context> context;
};

// The entry of a GPU with the library in a file: one each, which stays.
Entry& EntryOf(const std::string& path, int device) {
  // Never destroyed, so that threads may end after the process has begun to.
  static auto& mutex = *new std::mutex;
  static auto& entries = *new std::map<std::pair<std::string, int>, Entry>;
  const std::lock_guard<std::mutex> lock(mutex);
  return entries[{path, device}];
}

}  // namespace

ffi::ErrorOr<SharedContext> Context::On(SharedLibrary library, int device) {
  Entry& entry = EntryOf(library->path(), device);
  const std::lock_guard<std::mutex> lock(entry.mutex);
  SharedContext context = entry.context.lock();
  if (context == nullptr) {
    ESPARSE_ASSIGN_OR_RETURN(handle, MakeHandle(*library));
    context = std::make_shared<const Context>(std::move(library), std::move(handle));
    entry.context = context;
  }
  return context;
}

}  // namespace esparse::cusparselt
