// Where a handler runs. The same handlers are compiled for two platforms: for CUDA, and, in a form
// for tests, for XLA's CPU platform, where a stand-in of the library computes on the host
// (testing/fake_cusparselt.cc). The stand-in has a soname of its own, so neither form can meet the
// library of the other: host memory never reaches a GPU's kernels.
#ifndef ESPARSE_FFI_CUSPARSELT_PLATFORM_H_
#define ESPARSE_FFI_CUSPARSELT_PLATFORM_H_

#include "cusparselt/library.h"
#include "status.h"

namespace esparse::cusparselt {

struct OnCuda {
  static constexpr const char* kLibrary = kSoname;

  // Of the GPU that is current in this thread, as XLA's is while it initializes and executes: 90
  // for compute capability 9.0. It comes from the driver, which XLA has loaded.
  static ffi::ErrorOr<int> Architecture(const Library& library);

  // The number of that GPU, which the driver gives it; where none is current yet, the first one's,
  // which is what a call of the CUDA runtime makes current.
  static ffi::ErrorOr<int> Device(const Library& library);
};

struct OnHost {
  static constexpr const char* kLibrary = "libesparse_fake_cusparselt.so.0";

  // What the stand-in says.
  static ffi::ErrorOr<int> Architecture(const Library& library);

  // What the stand-in says of this thread: 0, unless a test has several. There is one host, however
  // many devices XLA makes of it.
  static ffi::ErrorOr<int> Device(const Library& library);
};

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_PLATFORM_H_
