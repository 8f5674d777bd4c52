#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/decode.h"
#include "cuda/prefill.h"
#include "cuda/timing.h"

namespace py = pybind11;

namespace esparse::cuda {
namespace {

Product ProductOf(int64_t rows, int64_t out, int64_t channels, const std::string& dtype) {
  if (dtype != "float16" && dtype != "bfloat16") {
    throw std::invalid_argument("our kernels multiply float16 and bfloat16; got " + dtype + ".");
  }
  Product product = {};
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  product.dtype = dtype == "float16" ? Dtype::kFloat16 : Dtype::kBfloat16;
  return product;
}

// Microseconds of one product in a graph of `launches`, which take the blobs that lie one behind
// the other in turn. Addresses are those of device buffers on the current device.
double Time(Product product, uintptr_t x, uintptr_t blobs, int64_t blob_bytes, int64_t copies,
            uintptr_t y, const QueueProduct& queue, const char* name, int32_t launches,
            int32_t replays) {
  product.x = reinterpret_cast<const void*>(x);
  product.blob = reinterpret_cast<const void*>(blobs);
  product.y = reinterpret_cast<void*>(y);
  const py::gil_scoped_release release;
  ffi::ErrorOr<double> microseconds =
      TimeProduct(product, blob_bytes, copies, queue, name, launches, replays);
  if (!microseconds.has_value()) throw std::runtime_error(microseconds.error().message());
  return *microseconds;
}

double DecodeTime(int64_t rows, int64_t out, int64_t channels, const std::string& dtype,
                  const std::array<int32_t, kPlanFields>& plan, bool prefetch, uintptr_t x,
                  uintptr_t blobs, int64_t blob_bytes, int64_t copies, uintptr_t y,
                  int32_t launches, int32_t replays) {
  const auto queue = [&](const Product& product, bool first, cudaStream_t stream) {
    return Launch(product, PlanOf(plan.data()),
                  prefetch && !first ? Start::kPrefetch : Start::kAlone, stream);
  };
  return Time(ProductOf(rows, out, channels, dtype), x, blobs, blob_bytes, copies, y, queue,
              "the decode kernel", launches, replays);
}

#ifdef ESPARSE_HOPPER
double PrefillTime(int64_t rows, int64_t out, int64_t channels, const std::string& dtype,
                   const std::array<int32_t, kPrefillPlanFields>& plan, uintptr_t x,
                   uintptr_t blobs, int64_t blob_bytes, int64_t copies, uintptr_t y,
                   int32_t launches, int32_t replays) {
  const auto queue = [&](const Product& product, bool, cudaStream_t stream) {
    return LaunchPrefill(product, PrefillPlanOf(plan.data()), stream);
  };
  return Time(ProductOf(rows, out, channels, dtype), x, blobs, blob_bytes, copies, y, queue,
              "the prefill kernel", launches, replays);
}
#endif

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
  module.def("decode_time", &DecodeTime, py::kw_only(), arg("rows"), arg("out"), arg("channels"),
             arg("dtype"), arg("plan"), arg("prefetch"), arg("x"), arg("blobs"), arg("blob_bytes"),
             arg("copies"), arg("y"), arg("launches"), arg("replays"));
#ifdef ESPARSE_HOPPER
  module.def("prefill_time", &PrefillTime, py::kw_only(), arg("rows"), arg("out"), arg("channels"),
             arg("dtype"), arg("plan"), arg("x"), arg("blobs"), arg("blob_bytes"), arg("copies"),
             arg("y"), arg("launches"), arg("replays"));
#endif
  module.def("decode_used_plan", &UsedPlan, py::kw_only(), arg("rows"), arg("out"), arg("channels"),
             arg("dtype"), arg("plan"));
}

}  // namespace esparse::cuda
