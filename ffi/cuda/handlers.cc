#include "cuda/handlers.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "cuda/decode.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {
namespace {

ffi::Error ToError(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(what) + " failed on this GPU: " +
                              cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ").");
}

ffi::Error CheckMatrix(const char* name, const ffi::AnyBuffer& buffer, int64_t rows,
                       int64_t columns, ffi::DataType dtype) {
  const auto dimensions = buffer.dimensions();
  if (buffer.element_type() != dtype || dimensions.size() != 2 || dimensions[0] != rows ||
      dimensions[1] != columns) {
    return InvalidArgument("the 2:4 decode product needs ", name, " ", dtype, "[", rows, ", ",
                           columns, "]; got ", Describe(buffer), ".");
  }
  return ffi::Error::Success();
}

ffi::Error CheckAligned(const char* name, const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment != 0) {
    return InvalidArgument("the 2:4 decode product reads ", kAlignment, " bytes at a time; ", name,
                           " ", Describe(buffer), " starts at an address that is no multiple.");
  }
  return ffi::Error::Success();
}

ffi::Error CheckX(const ffi::AnyBuffer& x) {
  const auto dimensions = x.dimensions();
  if (dimensions.size() != 2 || (x.element_type() != ffi::F16 && x.element_type() != ffi::BF16)) {
    return InvalidArgument("the 2:4 decode product takes x F16 or BF16 [row, channel]; got ",
                           Describe(x), ". Flatten leading axes; cast x and the weight.");
  }
  if (dimensions[0] < 1 || dimensions[0] > kMaxRows) {
    return InvalidArgument("the 2:4 decode product takes 1 to ", kMaxRows, " rows; got x ",
                           Describe(x), ". More rows are another kernel's work.");
  }
  if (dimensions[1] < kShapeUnit || dimensions[1] % kShapeUnit != 0) {
    return InvalidArgument("the 2:4 decode product needs channels that are a multiple of ",
                           kShapeUnit, "; got x ", Describe(x), ". Leave such a layer dense.");
  }
  return CheckAligned("x", x);
}

ffi::Error CheckBlob(const char* name, const ffi::AnyBuffer& blob, int64_t out, int64_t channels) {
  constexpr int64_t kMostElements = int64_t{1} << 31;  // the kernel's offsets have 32 bits
  if (out < kShapeUnit || out % kShapeUnit != 0 || out > kMostElements / channels) {
    return InvalidArgument("the 2:4 decode product needs outputs that are a multiple of ",
                           kShapeUnit, ", and less than 2^31 weights; got ", out, " outputs of ",
                           channels, " channels. Leave such a layer dense, or split it.");
  }
  const int64_t bytes = out * channels / 16 * 18;
  if (blob.element_type() != ffi::U8 || blob.dimensions().size() != 1 ||
      blob.dimensions()[0] != bytes) {
    return InvalidArgument("a 2:4 weight of ", out, " outputs and ", channels, " channels is ",
                           name, " U8[", bytes, "]; got ", Describe(blob),
                           ". Make it with esparse_jax.sparse.blob24.");
  }
  return CheckAligned(name, blob);
}

Dtype DtypeOf(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::F16 ? Dtype::kFloat16 : Dtype::kBfloat16;
}

ffi::ErrorOr<Plan> PlanOf(const ffi::Span<const int32_t>& fields) {
  Plan plan;
  if (fields.size() != kPlanFields) {
    return ffi::Unexpected(InvalidArgument("a plan has ", kPlanFields, " numbers (tiles, warps, ",
                                           "blocks, interleave, depth, resident); got ",
                                           fields.size(), "."));
  }
  const int32_t* field = fields.begin();
  plan.tiles = field[0];
  plan.warps = field[1];
  plan.blocks = field[2];
  plan.interleave = field[3];
  plan.depth = field[4];
  plan.resident = field[5];
  const auto one_of = [](int32_t value, std::initializer_list<int32_t> allowed) {
    for (int32_t each : allowed) {
      if (value == each) return true;
    }
    return false;
  };
  if (!one_of(plan.tiles, {0, 1, 2, 3, 4}) || !one_of(plan.warps, {0, 4, 8, 16}) ||
      !one_of(plan.blocks, {0, 1, 2}) || !one_of(plan.interleave, {0, 1, 2}) || plan.depth < 0 ||
      !one_of(plan.resident, {0, 1, 2})) {
    return ffi::Unexpected(InvalidArgument(
        "a plan is tiles 1..4, warps 4, 8 or 16, blocks 1 or 2, interleave 1 or 2, depth 1..8, ",
        "resident 1 or 2, and 0 for what is to be chosen; got ", plan.tiles, ", ", plan.warps, ", ",
        plan.blocks, ", ", plan.interleave, ", ", plan.depth, ", ", plan.resident, "."));
  }
  return plan;
}

ffi::Error Decode24Impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer blob,
                        ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> y,
                        ffi::RemainingRets scratches, int32_t fusion, float epsilon,
                        ffi::Span<const int32_t> plan_fields) {
  ESPARSE_RETURN_IF_ERROR(CheckX(x));
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  if (fusion < 0 || fusion > (kNorm | kSwiglu | kResidual | kPermute) ||
      ((fusion & kSwiglu) && (fusion & kResidual))) {
    return InvalidArgument("fusion adds up ", kNorm, " (norm), ", kSwiglu, " (SwiGLU), ", kResidual,
                           " (residual) and ", kPermute,
                           " (permutation), and SwiGLU takes no residual; got ", fusion, ".");
  }
  if (y->dimensions().size() != 2) {
    return InvalidArgument("y must be [row, out]; got ", Describe(*y), ".");
  }
  const int64_t columns = y->dimensions()[1];
  const int64_t out = fusion & kSwiglu ? 2 * columns : columns;
  ESPARSE_RETURN_IF_ERROR(CheckMatrix("y", *y, rows, columns, x.element_type()));
  ESPARSE_RETURN_IF_ERROR(CheckBlob("blob", blob, out, channels));

  Product product = {};
  product.blob = blob.untyped_data();
  product.x = x.untyped_data();
  product.y = y->untyped_data();
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  product.dtype = DtypeOf(x);
  product.fusion = fusion;
  product.epsilon = epsilon;

  const size_t expected = ((fusion & kResidual) != 0) + ((fusion & kPermute) != 0);
  if (others.size() != expected || scratches.size() != ((fusion & kPermute) != 0)) {
    return InvalidArgument("fusion ", fusion, " takes ", expected,
                           " arguments after the blob; got ", others.size(), ", and ",
                           scratches.size(), " results after y.");
  }
  size_t at = 0;
  if (fusion & kResidual) {
    auto residual = others.get<ffi::AnyBuffer>(at++);
    if (!residual.has_value()) return residual.error();
    ESPARSE_RETURN_IF_ERROR(CheckMatrix("residual", *residual, rows, out, x.element_type()));
    product.residual = residual->untyped_data();
  }
  if (fusion & kPermute) {
    auto permutation = others.get<ffi::AnyBuffer>(at++);
    if (!permutation.has_value()) return permutation.error();
    if (permutation->element_type() != ffi::S32 || permutation->dimensions().size() != 1 ||
        permutation->dimensions()[0] != channels) {
      return InvalidArgument("the permutation of x ", Describe(x), " must be S32[", channels,
                             "]; got ", Describe(*permutation), ".");
    }
    auto scratch = scratches.get<ffi::AnyBuffer>(0);
    if (!scratch.has_value()) return scratch.error();
    ESPARSE_RETURN_IF_ERROR(CheckMatrix("scratch", **scratch, rows, channels, x.element_type()));
    ESPARSE_RETURN_IF_ERROR(CheckAligned("scratch", **scratch));
    product.permutation = static_cast<const int32_t*>(permutation->untyped_data());
    product.scratch = (*scratch)->untyped_data();
  }

  ffi::ErrorOr<Plan> plan = PlanOf(plan_fields);
  if (!plan.has_value()) return plan.error();
  return ToError(Launch(product, *plan, /*overlap=*/false, stream), "the 2:4 decode product");
}

ffi::Error Mlp24Impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer gate_up,
                     ffi::AnyBuffer down, ffi::Result<ffi::AnyBuffer> y,
                     ffi::Result<ffi::AnyBuffer> hidden, float epsilon,
                     ffi::Span<const int32_t> gate_up_plan, ffi::Span<const int32_t> down_plan) {
  ESPARSE_RETURN_IF_ERROR(CheckX(x));
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  if (hidden->dimensions().size() != 2) {
    return InvalidArgument("hidden must be [row, channel]; got ", Describe(*hidden), ".");
  }
  const int64_t inner = hidden->dimensions()[1];
  if (inner % kShapeUnit != 0) {
    return InvalidArgument("the 2:4 decode product needs channels that are a multiple of ",
                           kShapeUnit, "; got hidden ", Describe(*hidden), ".");
  }
  ESPARSE_RETURN_IF_ERROR(CheckMatrix("hidden", *hidden, rows, inner, x.element_type()));
  ESPARSE_RETURN_IF_ERROR(CheckMatrix("y", *y, rows, channels, x.element_type()));
  ESPARSE_RETURN_IF_ERROR(CheckBlob("gate_up", gate_up, 2 * inner, channels));
  ESPARSE_RETURN_IF_ERROR(CheckBlob("down", down, channels, inner));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("hidden", *hidden));

  Product first = {};
  first.blob = gate_up.untyped_data();
  first.x = x.untyped_data();
  first.y = hidden->untyped_data();
  first.rows = rows;
  first.out = 2 * inner;
  first.channels = channels;
  first.dtype = DtypeOf(x);
  first.fusion = kNorm | kSwiglu;
  first.epsilon = epsilon;
  Product second = first;
  second.blob = down.untyped_data();
  second.x = first.y;
  second.residual = x.untyped_data();
  second.y = y->untyped_data();
  second.out = channels;
  second.channels = inner;
  second.fusion = kResidual;

  ffi::ErrorOr<Plan> first_plan = PlanOf(gate_up_plan);
  if (!first_plan.has_value()) return first_plan.error();
  ffi::ErrorOr<Plan> second_plan = PlanOf(down_plan);
  if (!second_plan.has_value()) return second_plan.error();
  // Whatever ran before may have written the weights, so the first kernel waits for it as usual.
  ESPARSE_RETURN_IF_ERROR(
      ToError(Launch(first, *first_plan, /*overlap=*/false, stream), "gate and up of the 2:4 MLP"));
  return ToError(Launch(second, *second_plan, /*overlap=*/true, stream), "down of the 2:4 MLP");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Decode24, Decode24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()  // x [row, channel]
                                  .Arg<ffi::AnyBuffer>()  // blob U8[out * channel * 9 / 8]
                                  .RemainingArgs()  // residual [row, out], permutation S32[channel]
                                  .Ret<ffi::AnyBuffer>()  // y [row, out], SwiGLU: [row, out / 2]
                                  .RemainingRets()        // scratch [row, channel]
                                  .Attr<int32_t>("fusion")
                                  .Attr<float>("epsilon")
                                  .Attr<ffi::Span<const int32_t>>("plan"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(Mlp24, Mlp24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()  // x [row, channel]
                                  .Arg<ffi::AnyBuffer>()  // gate_up U8[2 * inner * channel * 9 / 8]
                                  .Arg<ffi::AnyBuffer>()  // down U8[channel * inner * 9 / 8]
                                  .Ret<ffi::AnyBuffer>()  // y [row, channel]
                                  .Ret<ffi::AnyBuffer>()  // hidden [row, inner]
                                  .Attr<float>("epsilon")
                                  .Attr<ffi::Span<const int32_t>>("gate_up_plan")
                                  .Attr<ffi::Span<const int32_t>>("down_plan"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace esparse::cuda
