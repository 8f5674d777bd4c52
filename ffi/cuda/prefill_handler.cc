#include <cstdint>

#include "cuda/errors.h"
#include "cuda/handlers.h"
#include "cuda/prefill.h"
#include "cuda/product_checks.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"
#ifdef ESPARSE_CUBINS
#include "cuda/cubins.h"
#include "cuda/record.h"
#endif

namespace esparse::cuda {
namespace {

constexpr const char* kProduct = "the 2:4 prefill product";
constexpr int64_t kMostRows = int64_t{1} << 24;

ffi::ErrorOr<PrefillPlan> CheckedPlan(const ffi::Span<const int32_t>& fields) {
  if (fields.size() != kPrefillPlanFields) {
    return ffi::Unexpected(InvalidArgument(
        "a plan of ", kProduct, " has ", kPrefillPlanFields,
        " numbers (rows, outputs, cluster, group, split, tail); got ", fields.size(), "."));
  }
  const PrefillPlan plan = PrefillPlanOf(fields.begin());
  if (!IsPlan(plan)) {
    return ffi::Unexpected(InvalidArgument(
        "a plan of ", kProduct,
        " is rows 16, 64, 128 or 256, outputs 128, or 192 with 128 rows and more, cluster 1, or 2 "
        "with 256 rows, group 1..64, split 1..",
        kMostSplit, ", or 1 with a cluster of 2, tail 1..", kMostSplit,
        ", or 1 with a split, and 0 for what is to be chosen; got ", plan.rows, ", ", plan.outputs,
        ", ", plan.cluster, ", ", plan.group, ", ", plan.split, ", ", plan.tail, "."));
  }
  return plan;
}

// Checks every buffer and fills in the product.
ffi::Error MakeProduct(const ffi::AnyBuffer& x, const ffi::AnyBuffer& blob,
                       ffi::Result<ffi::AnyBuffer>& y, Product* product) {
  ESPARSE_RETURN_IF_ERROR(CheckX(kProduct, x, kMostRows));
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  if (y->dimensions().size() != 2) {
    return InvalidArgument("y must be [row, out]; got ", Describe(*y), ".");
  }
  const int64_t out = y->dimensions()[1];
  ESPARSE_RETURN_IF_ERROR(CheckMatrix(kProduct, "y", *y, rows, out, x.element_type()));
  ESPARSE_RETURN_IF_ERROR(CheckAligned(kProduct, "y", *y));
  ESPARSE_RETURN_IF_ERROR(CheckBlob(kProduct, "blob", blob, out, channels));
  *product = {};
  product->blob = blob.untyped_data();
  product->x = x.untyped_data();
  product->y = y->untyped_data();
  product->rows = rows;
  product->out = out;
  product->channels = channels;
  product->dtype = DtypeOf(x);
  return ffi::Error::Success();
}

// What XLA executes or traces has no kernel of a graph before it to overlap with: fetching W apart
// from x would gain nothing.
ffi::Error Prefill24Impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer blob,
                         ffi::Result<ffi::AnyBuffer> y, bool /*prefetch*/,
                         ffi::Span<const int32_t> plan_fields) {
  Product product;
  ESPARSE_RETURN_IF_ERROR(MakeProduct(x, blob, y, &product));
  ESPARSE_ASSIGN_OR_RETURN(plan, CheckedPlan(plan_fields));
  return ToError(LaunchPrefill(product, plan, stream), kProduct);
}

#ifdef ESPARSE_CUBINS
ffi::Error RecordPrefill24Impl(record::Recorder recorder, ffi::AnyBuffer x, ffi::AnyBuffer blob,
                               ffi::Result<ffi::AnyBuffer> y, bool prefetch,
                               ffi::Span<const int32_t> plan_fields) {
  Product product;
  ESPARSE_RETURN_IF_ERROR(MakeProduct(x, blob, y, &product));
  ESPARSE_ASSIGN_OR_RETURN(plan, CheckedPlan(plan_fields));
  bool runs = false;
  ESPARSE_RETURN_IF_ERROR(ToError(CubinsRun(&runs), "asking for the compute capability"));
  if (!runs) return record::RequestCapture(recorder);
  PrefillLaunches launches;
  ESPARSE_RETURN_IF_ERROR(ToError(PreparePrefill(product, plan, prefetch, &launches), kProduct));
  // XLA records one command for a call. Products that take two kernels are long.
  if (launches.count > 1) return record::RequestCapture(recorder);
  const PrefillLaunch& launch = launches.all[0];
  const auto value = [](const auto& of) {
    return record::KernelArg{&of, sizeof(of), record::ArgType::kHostValue};
  };
  const record::KernelArg list[] = {value(launch.values), value(launch.x), value(launch.indices),
                                    value(launch.args)};
  const Cubin cubin = PrefillCubin();
  return record::AddOrUpdate(recorder,
                             {launch.name, cubin.data, cubin.size, launch.teams * launch.team,
                              launch.threads, launch.shared, launch.team},
                             {list, sizeof(list) / sizeof(list[0])});
}
#endif  // ESPARSE_CUBINS

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Prefill24, Prefill24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()  // x [row, channel]
                                  .Arg<ffi::AnyBuffer>()  // blob
                                  .Ret<ffi::AnyBuffer>()  // y [row, out]
                                  .Attr<bool>("prefetch")
                                  .Attr<ffi::Span<const int32_t>>("plan"),
                              {ffi::Traits::kCmdBufferCompatible});

#ifdef ESPARSE_CUBINS
XLA_FFI_DEFINE_HANDLER(kRecordPrefill24, RecordPrefill24Impl,
                       ffi::Ffi::Bind()
                           .Ctx<record::Recorder>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<bool>("prefetch")
                           .Attr<ffi::Span<const int32_t>>("plan"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_Error* RecordPrefill24(XLA_FFI_CallFrame* frame) {
  return record::AsExecution(kRecordPrefill24, frame);
}
#endif  // ESPARSE_CUBINS

}  // namespace esparse::cuda
