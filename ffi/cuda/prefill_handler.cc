#include <cstdint>

#include "cuda/errors.h"
#include "cuda/handlers.h"
#include "cuda/prefill.h"
#include "cuda/product_checks.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {
namespace {

constexpr const char* kProduct = "the 2:4 prefill product";
constexpr int64_t kMostRows = int64_t{1} << 24;

ffi::ErrorOr<PrefillPlan> CheckedPlan(const ffi::Span<const int32_t>& fields) {
  if (fields.size() != kPrefillPlanFields) {
    return ffi::Unexpected(InvalidArgument("a plan of ", kProduct, " has ", kPrefillPlanFields,
                                           " numbers (rows, cluster, group, split, tail); got ",
                                           fields.size(), "."));
  }
  const PrefillPlan plan = PrefillPlanOf(fields.begin());
  if (!IsPlan(plan)) {
    return ffi::Unexpected(InvalidArgument(
        "a plan of ", kProduct, " is rows 64, 128 or 256, cluster 1, or 2 with 256 rows, group ",
        "1..64, split 1..", kMostSplit, ", or 1 with a cluster of 2, tail 1..", kMostSplit,
        ", or 1 with a split, and 0 for what is to be chosen; got ", plan.rows, ", ", plan.cluster,
        ", ", plan.group, ", ", plan.split, ", ", plan.tail, "."));
  }
  return plan;
}

ffi::Error Prefill24Impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer blob,
                         ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int32_t> plan_fields) {
  ESPARSE_RETURN_IF_ERROR(CheckX(kProduct, x, kMostRows));
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  if (y->dimensions().size() != 2) {
    return InvalidArgument("y must be [row, out]; got ", Describe(*y), ".");
  }
  const int64_t out = y->dimensions()[1];
  ESPARSE_RETURN_IF_ERROR(CheckMatrix(kProduct, "y", *y, rows, out, x.element_type()));
  ESPARSE_RETURN_IF_ERROR(CheckAligned(kProduct, "y", *y));
  ESPARSE_RETURN_IF_ERROR(CheckBlob(kProduct, "blob", blob, out, channels));
  ESPARSE_ASSIGN_OR_RETURN(plan, CheckedPlan(plan_fields));
  Product product = {};
  product.blob = blob.untyped_data();
  product.x = x.untyped_data();
  product.y = y->untyped_data();
  product.rows = rows;
  product.out = out;
  product.channels = channels;
  product.dtype = DtypeOf(x);
  return ToError(LaunchPrefill(product, plan, stream), kProduct);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Prefill24, Prefill24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()  // x [row, channel]
                                  .Arg<ffi::AnyBuffer>()  // blob
                                  .Ret<ffi::AnyBuffer>()  // y [row, out]
                                  .Attr<ffi::Span<const int32_t>>("plan"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace esparse::cuda
