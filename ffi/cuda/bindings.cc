#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/decode.h"
#include "cuda/timing.h"

namespace py = pybind11;

namespace esparse::cuda {
namespace {

// Microseconds of one decode product in a graph of `launches`, which take the blobs that lie one
// behind the other in turn. Addresses are those of device buffers on the current device.
double Time(int64_t rows, int64_t out, int64_t channels, const std::string& dtype,
            const std::array<int32_t, kPlanFields>& plan, bool prefetch, uintptr_t x,
            uintptr_t blobs, int64_t blob_bytes, int64_t copies, uintptr_t y, int32_t launches,
            int32_t replays) {
  if (dtype != "float16" && dtype != "bfloat16") {
    throw std::invalid_argument("the decode kernel multiplies float16 and bfloat16; got " + dtype +
                                ".");
  }
  Product product = {};
  product.x = reinterpret_cast<const void*>(x);
  product.blob = reinterpret_cast<const void*>(blobs);
  product.y = reinterpret_cast<void*>(y);
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  product.dtype = dtype == "float16" ? Dtype::kFloat16 : Dtype::kBfloat16;
  const Plan cut = {plan[0], plan[1], plan[2], plan[3], plan[4], plan[5]};
  const py::gil_scoped_release release;
  ffi::ErrorOr<double> microseconds =
      TimeDecode(product, blob_bytes, copies, cut, prefetch ? Start::kPrefetch : Start::kAlone,
                 launches, replays);
  if (!microseconds.has_value()) throw std::runtime_error(microseconds.error().message());
  return *microseconds;
}

}  // namespace

void Bind(py::module_& module) {
  using py::arg;
  module.def("decode_time", &Time, py::kw_only(), arg("rows"), arg("out"), arg("channels"),
             arg("dtype"), arg("plan"), arg("prefetch"), arg("x"), arg("blobs"), arg("blob_bytes"),
             arg("copies"), arg("y"), arg("launches"), arg("replays"));
}

}  // namespace esparse::cuda
