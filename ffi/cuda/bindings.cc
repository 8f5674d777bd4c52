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

Product ProductOf(int64_t rows, int64_t out, int64_t channels, const std::string& dtype) {
  if (dtype != "float16" && dtype != "bfloat16") {
    throw std::invalid_argument("the decode kernel multiplies float16 and bfloat16; got " + dtype +
                                ".");
  }
  Product product = {};
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  product.dtype = dtype == "float16" ? Dtype::kFloat16 : Dtype::kBfloat16;
  return product;
}

// Microseconds of one decode product in a graph of `launches`, which take the blobs that lie one
// behind the other in turn. Addresses are those of device buffers on the current device.
double Time(int64_t rows, int64_t out, int64_t channels, const std::string& dtype,
            const std::array<int32_t, kPlanFields>& plan, bool prefetch, uintptr_t x,
            uintptr_t blobs, int64_t blob_bytes, int64_t copies, uintptr_t y, int32_t launches,
            int32_t replays) {
  Product product = ProductOf(rows, out, channels, dtype);
  product.x = reinterpret_cast<const void*>(x);
  product.blob = reinterpret_cast<const void*>(blobs);
  product.y = reinterpret_cast<void*>(y);
  const py::gil_scoped_release release;
  ffi::ErrorOr<double> microseconds =
      TimeDecode(product, blob_bytes, copies, PlanOf(plan.data()),
                 prefetch ? Start::kPrefetch : Start::kAlone, launches, replays);
  if (!microseconds.has_value()) throw std::runtime_error(microseconds.error().message());
  return *microseconds;
}

// What the current device makes of a plan.
py::dict UsedPlan(int64_t rows, int64_t out, int64_t channels, const std::string& dtype,
                  const std::array<int32_t, kPlanFields>& plan) {
  Cut cut;
  const cudaError_t status =
      CutOf(ProductOf(rows, out, channels, dtype), PlanOf(plan.data()), &cut);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  py::dict used;
  used["tiles"] = cut.tiles;
  used["warps"] = cut.warps;
  used["blocks"] = cut.blocks;
  used["interleave"] = cut.args.interleave ? 1 : 2;
  used["depth"] = cut.args.depth;
  used["resident"] = cut.args.resident ? 1 : 2;
  return used;
}

}  // namespace

void Bind(py::module_& module) {
  using py::arg;
  module.def("decode_time", &Time, py::kw_only(), arg("rows"), arg("out"), arg("channels"),
             arg("dtype"), arg("plan"), arg("prefetch"), arg("x"), arg("blobs"), arg("blob_bytes"),
             arg("copies"), arg("y"), arg("launches"), arg("replays"));
  module.def("decode_used_plan", &UsedPlan, py::kw_only(), arg("rows"), arg("out"), arg("channels"),
             arg("dtype"), arg("plan"));
}

}  // namespace esparse::cuda
