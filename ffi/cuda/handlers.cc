#include "cuda/handlers.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cuda/decode.h"
#include "cuda/decode_args.h"
#include "cuda/errors.h"
#include "cuda/product_checks.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"
#ifdef ESPARSE_CUBINS
#include "cuda/cubins.h"
#include "cuda/record.h"
#endif

namespace esparse::cuda {
namespace {

constexpr const char* kProduct = "the 2:4 decode product";

ffi::ErrorOr<Plan> CheckedPlan(const ffi::Span<const int32_t>& fields) {
  if (fields.size() != kPlanFields) {
    return ffi::Unexpected(InvalidArgument("a plan has ", kPlanFields, " numbers (tiles, warps, ",
                                           "blocks, interleave, depth, resident); got ",
                                           fields.size(), "."));
  }
  const Plan plan = PlanOf(fields.begin());
  const auto one_of = [](int32_t value, std::initializer_list<int32_t> allowed) {
    for (int32_t each : allowed) {
      if (value == each) return true;
    }
    return false;
  };
  if (plan.tiles < 0 || plan.tiles > kMaxTiles || !one_of(plan.warps, {0, 4, 8, 16}) ||
      !one_of(plan.blocks, {0, 1, 2}) || !one_of(plan.interleave, {0, 1, 2}) || plan.depth < 0 ||
      plan.depth > kMaxDepth || !one_of(plan.resident, {0, 1, 2}) ||
      plan.warps * plan.blocks > kMaxWarps) {
    return ffi::Unexpected(InvalidArgument(
        "a plan is tiles 1..4, warps 4, 8 or 16, blocks 1 or 2, interleave 1 or 2, depth 1..8, ",
        "resident 1 or 2, no more than 16 warps in all blocks of a multiprocessor, and 0 for what ",
        "is to be chosen; got ", plan.tiles, ", ", plan.warps, ", ", plan.blocks, ", ",
        plan.interleave, ", ", plan.depth, ", ", plan.resident, "."));
  }
  return plan;
}

// The buffers of a product; null for those that its fusion does not ask for.
struct Operands {
  const ffi::AnyBuffer* x;
  const ffi::AnyBuffer* blob;
  const ffi::AnyBuffer* residual;
  const ffi::AnyBuffer* permutation;
  const ffi::AnyBuffer* places;
  const ffi::AnyBuffer* y;
  const ffi::AnyBuffer* scratch;
  const ffi::AnyBuffer* scattered;
};

ffi::Error CheckOrder(const char* name, const ffi::AnyBuffer& buffer, int64_t size) {
  if (buffer.element_type() != ffi::S32 || buffer.dimensions().size() != 1 ||
      buffer.dimensions()[0] != size) {
    return InvalidArgument("the ", name, " of the 2:4 decode product must be S32[", size, "]; got ",
                           Describe(buffer), ".");
  }
  return ffi::Error::Success();
}

ffi::Error CheckFusion(int32_t fusion) {
  const bool alone = (fusion & kSwiglu) && (fusion & (kResidual | kScatter));
  if ((fusion & ~kAllFusions) != 0 || alone) {
    return InvalidArgument("fusion adds up ", kNorm, " (norm), ", kSwiglu, " (SwiGLU), ", kResidual,
                           " (residual), ", kPermute, " (permutation) and ", kScatter,
                           " (scatter), and SwiGLU takes neither residual nor scatter; got ",
                           fusion, ".");
  }
  return ffi::Error::Success();
}

// Checks every buffer and fills in the product.
ffi::Error MakeProduct(const Operands& given, int32_t fusion, float epsilon, Product* product) {
  const ffi::AnyBuffer &x = *given.x, &y = *given.y;
  ESPARSE_RETURN_IF_ERROR(CheckX(kProduct, x, kMaxRows));
  ESPARSE_RETURN_IF_ERROR(CheckFusion(fusion));
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  if (y.dimensions().size() != 2) {
    return InvalidArgument("y must be [row, out]; got ", Describe(y), ".");
  }
  const int64_t columns = y.dimensions()[1];
  const int64_t out = fusion & kSwiglu ? 2 * columns : columns;
  ESPARSE_RETURN_IF_ERROR(CheckMatrix(kProduct, "y", y, rows, columns, x.element_type()));
  ESPARSE_RETURN_IF_ERROR(CheckBlob(kProduct, "blob", *given.blob, out, channels));
  *product = {};
  product->blob = given.blob->untyped_data();
  product->x = x.untyped_data();
  product->y = y.untyped_data();
  product->rows = rows;
  product->out = out;
  product->channels = channels;
  product->dtype = DtypeOf(x);
  product->fusion = fusion;
  product->epsilon = epsilon;
  if (fusion & kResidual) {
    ESPARSE_RETURN_IF_ERROR(
        CheckMatrix(kProduct, "residual", *given.residual, rows, out, x.element_type()));
    product->residual = given.residual->untyped_data();
  }
  if (fusion & kPermute) {
    ESPARSE_RETURN_IF_ERROR(CheckOrder("permutation", *given.permutation, channels));
    ESPARSE_RETURN_IF_ERROR(
        CheckMatrix(kProduct, "scratch", *given.scratch, rows, channels, x.element_type()));
    ESPARSE_RETURN_IF_ERROR(CheckAligned(kProduct, "scratch", *given.scratch));
    product->permutation = static_cast<const int32_t*>(given.permutation->untyped_data());
    product->scratch = given.scratch->untyped_data();
  }
  if (fusion & kScatter) {
    ESPARSE_RETURN_IF_ERROR(CheckOrder("places", *given.places, out));
    ESPARSE_RETURN_IF_ERROR(
        CheckMatrix(kProduct, "scattered", *given.scattered, rows, out, x.element_type()));
    product->places = static_cast<const int32_t*>(given.places->untyped_data());
    product->scattered = given.scattered->untyped_data();
  }
  return ffi::Error::Success();
}

// A call's buffers as one list, arguments before results.
ffi::Error Gather(const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results,
                  std::vector<ffi::AnyBuffer>* buffers) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto buffer = arguments.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    buffers->push_back(*buffer);
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    buffers->push_back(**buffer);
  }
  return ffi::Error::Success();
}

// The one product of a call: x, blob, then what the fusion asks for of residual, permutation,
// places; results y, then scratch (permutation), scattered (places).
ffi::Error OneProduct(const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results,
                      int32_t fusion, float epsilon, Product* product) {
  ESPARSE_RETURN_IF_ERROR(CheckFusion(fusion));
  const bool residual = fusion & kResidual, permute = fusion & kPermute,
             scatter = fusion & kScatter;
  const size_t expected = 2 + residual + permute + scatter,
               expected_results = 1 + permute + scatter;
  if (arguments.size() != expected || results.size() != expected_results) {
    return InvalidArgument("fusion ", fusion, " takes ", expected, " arguments and ",
                           expected_results, " results; got ", arguments.size(), " and ",
                           results.size(), ".");
  }
  std::vector<ffi::AnyBuffer> buffers;
  ESPARSE_RETURN_IF_ERROR(Gather(arguments, results, &buffers));
  size_t next = 0;
  const auto take = [&](bool there) { return there ? &buffers[next++] : nullptr; };
  Operands operands;
  operands.x = take(true);
  operands.blob = take(true);
  operands.residual = take(residual);
  operands.permutation = take(permute);
  operands.places = take(scatter);
  operands.y = take(true);
  operands.scratch = take(permute);
  operands.scattered = take(scatter);
  return MakeProduct(operands, fusion, epsilon, product);
}

Start StartOf(bool prefetch) { return prefetch ? Start::kPrefetch : Start::kAlone; }

ffi::Error Decode24Impl(cudaStream_t stream, ffi::RemainingArgs arguments,
                        ffi::RemainingRets results, int32_t fusion, float epsilon, bool prefetch,
                        ffi::Span<const int32_t> plan_fields) {
  Product product;
  ESPARSE_RETURN_IF_ERROR(OneProduct(arguments, results, fusion, epsilon, &product));
  ffi::ErrorOr<Plan> plan = CheckedPlan(plan_fields);
  if (!plan.has_value()) return plan.error();
  // While XLA traces a call, its kernels make a graph of their own, with no kernel before them to
  // overlap with: fetching W apart from x would only cost.
  cudaStreamCaptureStatus capture;
  ESPARSE_RETURN_IF_ERROR(
      ToError(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing"));
  const Start start = StartOf(prefetch && capture == cudaStreamCaptureStatusNone);
  return ToError(Launch(product, *plan, start, stream), "the 2:4 decode product");
}

// One product of a chain, as numbers: buffers are counted over the arguments and then the results,
// -1 for none.
struct ChainStep {
  int32_t x, blob, residual, places, y, scattered;
  int32_t fusion;
  int32_t plan[kPlanFields];
};
constexpr size_t kStepFields = sizeof(ChainStep) / sizeof(int32_t);

ffi::Error Chain24Impl(cudaStream_t stream, ffi::RemainingArgs arguments,
                       ffi::RemainingRets results, float epsilon, bool prefetch,
                       ffi::Span<const int32_t> fields) {
  if (fields.size() == 0 || fields.size() % kStepFields != 0) {
    return InvalidArgument("a chain has ", kStepFields, " numbers a step; got ", fields.size(),
                           ".");
  }
  std::vector<ffi::AnyBuffer> buffers;
  ESPARSE_RETURN_IF_ERROR(Gather(arguments, results, &buffers));
  // All steps are checked before the first is queued.
  std::vector<std::pair<Product, Plan>> steps;
  for (size_t at = 0; at < fields.size(); at += kStepFields) {
    ChainStep step;
    std::memcpy(&step, fields.begin() + at, sizeof(step));
    ESPARSE_RETURN_IF_ERROR(CheckFusion(step.fusion));
    if (step.fusion & kPermute) {
      return InvalidArgument("a product in a chain reads no permutation: the one before scatters.");
    }
    const auto find = [&](int32_t index, bool needed, bool written, const ffi::AnyBuffer** buffer) {
      *buffer = nullptr;
      if (!needed && index == -1) return true;
      const bool inside = index >= (written ? static_cast<int32_t>(arguments.size()) : 0) &&
                          index < static_cast<int32_t>(buffers.size());
      if (inside) *buffer = &buffers[index];
      return inside;
    };
    Operands operands = {};
    const bool residual = step.fusion & kResidual, scatter = step.fusion & kScatter;
    if (!find(step.x, true, false, &operands.x) || !find(step.blob, true, false, &operands.blob) ||
        !find(step.residual, residual, false, &operands.residual) ||
        !find(step.places, scatter, false, &operands.places) ||
        !find(step.y, true, true, &operands.y) ||
        !find(step.scattered, scatter, true, &operands.scattered)) {
      return InvalidArgument("step ", at / kStepFields, " of a chain names a buffer that is not ",
                             "there: the call has ", arguments.size(), " arguments and ",
                             results.size(), " results.");
    }
    Product product;
    ESPARSE_RETURN_IF_ERROR(MakeProduct(operands, step.fusion, epsilon, &product));
    ffi::ErrorOr<Plan> plan = CheckedPlan(ffi::Span<const int32_t>(step.plan, kPlanFields));
    if (!plan.has_value()) return plan.error();
    steps.emplace_back(product, *plan);
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    // Whatever ran before may have written the weights, unless the caller knows better; from the
    // second step on it is known that nothing earlier is left to run.
    const Start start = StartOf(prefetch || i > 0);
    ESPARSE_RETURN_IF_ERROR(ToError(Launch(steps[i].first, steps[i].second, start, stream),
                                    "a product of a 2:4 chain"));
  }
  return ffi::Error::Success();
}

#ifdef ESPARSE_CUBINS
ffi::Error Record24Impl(record::Recorder recorder, ffi::RemainingArgs arguments,
                        ffi::RemainingRets results, int32_t fusion, float epsilon, bool prefetch,
                        ffi::Span<const int32_t> plan_fields) {
  Product product;
  ESPARSE_RETURN_IF_ERROR(OneProduct(arguments, results, fusion, epsilon, &product));
  ffi::ErrorOr<Plan> plan = CheckedPlan(plan_fields);
  if (!plan.has_value()) return plan.error();
  bool runs = false;
  ESPARSE_RETURN_IF_ERROR(ToError(CubinsRun(&runs), "asking for the compute capability"));
  if (!runs || (fusion & kPermute)) return record::RequestCapture(recorder);
  KernelLaunch launch;
  const Start start = prefetch ? Start::kPrefetch : Start::kEarly;
  ESPARSE_RETURN_IF_ERROR(
      ToError(Prepare(product, *plan, start, &launch), "the 2:4 decode product"));
  // A pointer that the fusion does not ask for is never followed; XLA wants one all the same.
  const auto or_x = [&](const void* address) { return address == nullptr ? launch.x : address; };
  const record::KernelArg list[] = {
      record::Pointer(launch.blob),
      record::Pointer(launch.x),
      record::Pointer(or_x(launch.residual)),
      record::Pointer(or_x(launch.places)),
      record::Pointer(launch.y),
      record::Pointer(or_x(launch.scattered)),
      {&launch.args, sizeof(launch.args), record::ArgType::kHostValue}};
  const record::KernelArgList kernel_args = {list, sizeof(list) / sizeof(list[0])};
  const Cubin cubin = DecodeCubin(product.dtype);
  return record::AddOrUpdate(
      recorder, {launch.name, cubin.data, cubin.size, launch.grid, launch.threads, launch.shared},
      kernel_args);
}
#endif  // ESPARSE_CUBINS

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Decode24, Decode24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()  // x, blob, residual?, permutation?, places?
                                  .RemainingRets()  // y, scratch?, scattered?
                                  .Attr<int32_t>("fusion")
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("prefetch")
                                  .Attr<ffi::Span<const int32_t>>("plan"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(Chain24, Chain24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("prefetch")
                                  .Attr<ffi::Span<const int32_t>>("steps"),
                              {ffi::Traits::kCmdBufferCompatible});

#ifdef ESPARSE_CUBINS
XLA_FFI_DEFINE_HANDLER(kRecord24, Record24Impl,
                       ffi::Ffi::Bind()
                           .Ctx<record::Recorder>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<int32_t>("fusion")
                           .Attr<float>("epsilon")
                           .Attr<bool>("prefetch")
                           .Attr<ffi::Span<const int32_t>>("plan"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_Error* RecordDecode24(XLA_FFI_CallFrame* frame) {
  return record::AsExecution(kRecord24, frame);
}
#endif  // ESPARSE_CUBINS

}  // namespace esparse::cuda
