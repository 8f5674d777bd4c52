#include "cusparselt/platform.h"

#include <dlfcn.h>

#include <memory>
#include <string>

namespace esparse::cusparselt {
namespace {

struct Close {
  void operator()(void* library) const { dlclose(library); }
};

// Of cuda.h, CUDA 13.0.
using CtxGetDevice = int(int* device);                                  // cuCtxGetDevice
using DeviceGetAttribute = int(int* value, int attribute, int device);  // cuDeviceGetAttribute
constexpr int kMajor = 75;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kMinor = 76;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int kNotInitialized = 3;  // CUDA_ERROR_NOT_INITIALIZED: it is loaded, and no more
constexpr int kNoContext = 201;     // CUDA_ERROR_INVALID_CONTEXT

// The driver that is loaded in this process, and what is asked of it.
struct Driver {
  std::unique_ptr<void, Close> file{dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD)};
  CtxGetDevice* get_device = Find<CtxGetDevice>("cuCtxGetDevice");
  DeviceGetAttribute* get_attribute = Find<DeviceGetAttribute>("cuDeviceGetAttribute");

  ffi::Error Check() const {
    if (get_device != nullptr && get_attribute != nullptr) return ffi::Error::Success();
    return ffi::Error::Internal(
        "the GPU cannot be asked for: the CUDA driver, libcuda.so.1, is not loaded in this "
        "process.");
  }

 private:
  template <typename Function>
  Function* Find(const char* name) const {
    return file == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(file.get(), name));
  }
};

ffi::Error DriverError(const char* what, int status) {
  return ffi::Error::Internal(std::string("the CUDA driver does not tell ") + what + ": error " +
                              std::to_string(status) + ".");
}

// What the stand-in's function of this name answers.
ffi::ErrorOr<int> Ask(const Library& library, const char* name) {
  using Answer = int();
  auto* answer = reinterpret_cast<Answer*>(library.Symbol(name));
  if (answer == nullptr) {
    return Failure{ffi::Error::Internal(library.path() + " is no stand-in for tests.")};
  }
  return answer();
}

}  // namespace

ffi::ErrorOr<int> OnCuda::Architecture(const Library&) {
  const Driver driver;
  ESPARSE_RETURN_IF_ERROR(driver.Check());
  int device = 0, major = 0, minor = 0;
  int status = driver.get_device(&device);
  if (status == 0) status = driver.get_attribute(&major, kMajor, device);
  if (status == 0) status = driver.get_attribute(&minor, kMinor, device);
  if (status != 0) return Failure{DriverError("the GPU's architecture", status)};
  return 10 * major + minor;
}

ffi::ErrorOr<int> OnCuda::Device(const Library&) {
  const Driver driver;
  if (driver.file == nullptr) return 0;  // then nothing is current
  ESPARSE_RETURN_IF_ERROR(driver.Check());
  int device = 0;
  const int status = driver.get_device(&device);
  if (status == kNoContext || status == kNotInitialized) return 0;
  if (status != 0) return Failure{DriverError("which GPU is current", status)};
  return device;
}

ffi::ErrorOr<int> OnHost::Architecture(const Library& library) {
  return Ask(library, "esparse_fake_architecture");
}

ffi::ErrorOr<int> OnHost::Device(const Library& library) {
  return Ask(library, "esparse_fake_device");
}

}  // namespace esparse::cusparselt
