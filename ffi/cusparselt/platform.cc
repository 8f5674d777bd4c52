#include "cusparselt/platform.h"

#include <dlfcn.h>

#include <memory>
#include <string>

namespace esparse::cusparselt {
namespace {

struct Close {
  void operator()(void* library) const { dlclose(library); }
};

}  // namespace

ffi::ErrorOr<int> OnCuda::Architecture(const Library&) {
  // Of cuda.h, CUDA 13.0.
  using CtxGetDevice = int(int* device);                                  // cuCtxGetDevice
  using DeviceGetAttribute = int(int* value, int attribute, int device);  // cuDeviceGetAttribute
  constexpr int kMajor = 75;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
  constexpr int kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR

  const std::unique_ptr<void, Close> driver(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD));
  CtxGetDevice* get_device = nullptr;
  DeviceGetAttribute* get_attribute = nullptr;
  if (driver != nullptr) {
    get_device = reinterpret_cast<CtxGetDevice*>(dlsym(driver.get(), "cuCtxGetDevice"));
    get_attribute =
        reinterpret_cast<DeviceGetAttribute*>(dlsym(driver.get(), "cuDeviceGetAttribute"));
  }
  if (get_device == nullptr || get_attribute == nullptr) {
    return Failure{ffi::Error::Internal(
        "the architecture of the GPU cannot be asked for: the CUDA driver, libcuda.so.1, is not "
        "loaded in this process.")};
  }
  int device = 0, major = 0, minor = 0;
  int status = get_device(&device);
  if (status == 0) status = get_attribute(&major, kMajor, device);
  if (status == 0) status = get_attribute(&minor, kMinor, device);
  if (status != 0) {
    return Failure{
        ffi::Error::Internal("the CUDA driver does not tell the GPU's architecture: error " +
                             std::to_string(status) + ".")};
  }
  return 10 * major + minor;
}

ffi::ErrorOr<int> OnHost::Architecture(const Library& library) {
  using Answer = int();
  auto* answer = reinterpret_cast<Answer*>(library.Symbol("esparse_fake_architecture"));
  if (answer == nullptr) {
    return Failure{ffi::Error::Internal(library.path() + " is no stand-in for tests.")};
  }
  return answer();
}

}  // namespace esparse::cusparselt
