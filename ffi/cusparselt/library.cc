#include "cusparselt/library.h"

#include <dlfcn.h>

#include <utility>

namespace esparse::cusparselt {
namespace {

// dlerror, which is empty where dlopen failed for no other reason than RTLD_NOLOAD.
std::string LoaderError() {
  const char* text = dlerror();
  return text == nullptr ? "it is not there" : text;
}

ffi::Error FailedPrecondition(const std::string& text) {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, text);
}

}  // namespace

std::string VersionName(int version) {
  return std::to_string(version / 1000000) + "." + std::to_string(version % 1000000 / 100) + "." +
         std::to_string(version % 100);
}

void Library::Close::operator()(void* library) const { dlclose(library); }

ffi::ErrorOr<Library> Library::Open(const std::string& path, const char* soname) {
  Reference loaded(dlopen(soname, RTLD_NOW | RTLD_NOLOAD));
  if (loaded != nullptr) return Read(std::move(loaded));
  const char* file = path.empty() ? soname : path.c_str();
  // Whatever its version, the library stays loaded (measured for 0.7.1): dlclose does not unload
  // it.
  Reference opened(dlopen(file, RTLD_NOW | RTLD_LOCAL));
  if (opened == nullptr) {
    return Failure{FailedPrecondition("cuSPARSELt could not be opened: " + LoaderError() + ".")};
  }
  Reference found(dlopen(soname, RTLD_NOW | RTLD_NOLOAD));
  if (found == nullptr) {
    return Failure{
        FailedPrecondition(std::string(file) + " is a shared library, but not " + soname + ".")};
  }
  ESPARSE_ASSIGN_OR_RETURN(library, Read(std::move(found)));
  // The reference of RTLD_NODELETE is never given back.
  Reference kept(dlopen(soname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE));
  return ffi::ErrorOr<Library>(std::move(library));
}

ffi::ErrorOr<Library> Library::Loaded(const char* soname) {
  Reference loaded(dlopen(soname, RTLD_NOW | RTLD_NOLOAD));
  if (loaded == nullptr) {
    return Failure{FailedPrecondition(
        std::string("this computation calls cuSPARSELt, and ") + soname +
        " is not loaded in this process. Call esparse_jax.sparse.load_cusparselt() first.")};
  }
  return Read(std::move(loaded));
}

ffi::ErrorOr<Library> Library::Read(Reference reference) {
  Library library;
  library.reference_ = std::move(reference);
  // The version first: what an older library lacks is then no riddle.
  Functions& functions = library.functions_;
  ESPARSE_RETURN_IF_ERROR(library.Resolve("cusparseLtGetProperty", &functions.GetProperty));
  int numbers[3] = {};
  for (int property : {kMajorVersion, kMinorVersion, kPatchLevel}) {
    if (functions.GetProperty(property, &numbers[property]) != kSuccess) {
      return Failure{FailedPrecondition(library.path() + " does not tell its version.")};
    }
  }
  library.version_ = numbers[0] * 1000000 + numbers[1] * 100 + numbers[2];
  if (library.version_ < kOldest || library.version_ >= kTooNew) {
    return Failure{FailedPrecondition(
        library.path() + " is cuSPARSELt " + VersionName(library.version_) + "; " +
        VersionName(kOldest) + " up to, not including, " + VersionName(kTooNew) +
        " can be called, whose objects have the sizes assumed here. Install one of them: pip "
        "install nvidia-cusparselt-cu13.")};
  }
#define ESPARSE_CUSPARSELT_RESOLVE(result, name, parameters) \
  ESPARSE_RETURN_IF_ERROR(library.Resolve("cusparseLt" #name, &functions.name));
  ESPARSE_CUSPARSELT_FUNCTIONS(ESPARSE_CUSPARSELT_RESOLVE)
#undef ESPARSE_CUSPARSELT_RESOLVE
  return ffi::ErrorOr<Library>(std::move(library));
}

template <typename Function>
ffi::Error Library::Resolve(const char* name, Function** function) const {
  *function = reinterpret_cast<Function*>(Symbol(name));
  if (*function != nullptr) return ffi::Error::Success();
  const std::string version = version_ == 0 ? "" : " (cuSPARSELt " + VersionName(version_) + ")";
  return FailedPrecondition(path() + version + " has no function " + name + ".");
}

std::string Library::path() const {
  Dl_info info = {};
  void* symbol = Symbol("cusparseLtGetProperty");
  if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return kSoname;
  return info.dli_fname;
}

void* Library::Symbol(const char* name) const { return dlsym(reference_.get(), name); }

ffi::Error Library::Check(Status status, const char* call) const {
  if (status == kSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(call) + " of cuSPARSELt " + VersionName(version_) +
                              " failed: " + functions_.GetErrorString(status) + " (" +
                              functions_.GetErrorName(status) + ").");
}

}  // namespace esparse::cusparselt
