// cuSPARSELt, opened at run time: where its functions are, and which version it is.
//
// Nothing here includes a CUDA header, so this part builds with no CUDA toolkit at hand. Python
// finds the file and has it opened once; whoever needs the library later asks for the one that is
// loaded, by its soname, so that no path gets into a compiled or exported computation.
#ifndef ESPARSE_FFI_CUSPARSELT_LIBRARY_H_
#define ESPARSE_FFI_CUSPARSELT_LIBRARY_H_

#include <memory>
#include <string>

#include "cusparselt/abi.h"
#include "status.h"

namespace esparse::cusparselt {

constexpr const char* kSoname = "libcusparseLt.so.0";

// One reference to the loaded library; it stays loaded as long as any exists. Move-only.
class Library {
 public:
  // The library in the file `path`, which stays loaded for the rest of the process. A process has
  // one library of a soname: if another file of that soname is loaded already (by PyTorch, say, or
  // because it was opened here and is too old), it is that one, whatever the path. An empty path
  // leaves the file to the system's search.
  static ffi::ErrorOr<Library> Open(const std::string& path, const char* soname);

  // The library that is loaded under this soname.
  static ffi::ErrorOr<Library> Loaded(const char* soname);

  const Functions& functions() const { return functions_; }

  // 800 for 0.8.0: the encoding of CUSPARSELT_VERSION, which is minor * 100 + patch up to 1.0.
  int version() const { return version_; }

  // The file it was loaded from.
  std::string path() const;

  // Any other function it exports, or nullptr.
  void* Symbol(const char* name) const;

  // The error of `call`, unless the status is success.
  ffi::Error Check(Status status, const char* call) const;

 private:
  struct Close {
    void operator()(void* library) const;
  };
  using Reference = std::unique_ptr<void, Close>;

  static ffi::ErrorOr<Library> Read(Reference reference);

  template <typename Function>
  ffi::Error Resolve(const char* name, Function** function) const;

  Reference reference_;
  Functions functions_;
  int version_ = 0;
};

// "0.8.0" for 800.
std::string VersionName(int version);

}  // namespace esparse::cusparselt

// Leaves the calling function with an error if `library` answers a call with anything but success:
// ESPARSE_CUSPARSELT_CALL(library, Init, handle).
#define ESPARSE_CUSPARSELT_CALL(library, name, ...) \
  ESPARSE_RETURN_IF_ERROR(                          \
      (library).Check((library).functions().name(__VA_ARGS__), "cusparseLt" #name))

#endif  // ESPARSE_FFI_CUSPARSELT_LIBRARY_H_
