#include <cstdint>

#include "cuda/errors.h"
#include "cuda/handlers.h"
#include "cuda/max_sum.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {
namespace {

ffi::Error CheckScores(const char* name, const ffi::AnyBuffer& buffer) {
  const auto dimensions = buffer.dimensions();
  if (buffer.element_type() != ffi::S32 || dimensions.size() != 3 ||
      dimensions[2] % kMaxSumUnit != 0) {
    return InvalidArgument("the max-sum product takes ", name,
                           " S32 [block, row, column], columns a ", "multiple of ", kMaxSumUnit,
                           "; got ", Describe(buffer), ". Pad them with zeros.");
  }
  return ffi::Error::Success();
}

ffi::Error MaxSumImpl(cudaStream_t stream, ffi::AnyBuffer left, ffi::AnyBuffer right,
                      ffi::Result<ffi::AnyBuffer> out) {
  ESPARSE_RETURN_IF_ERROR(CheckScores("left", left));
  ESPARSE_RETURN_IF_ERROR(CheckScores("right", right));
  ESPARSE_RETURN_IF_ERROR(CheckScores("out", *out));
  const auto l = left.dimensions(), r = right.dimensions(), o = out->dimensions();
  if (l[0] != r[0] || l[1] != r[1] || o[0] != l[0] || o[1] != l[2] || o[2] != r[2]) {
    return InvalidArgument("the max-sum product of left [block, row, left] and right [block, row, ",
                           "right] is [block, left, right]; got ", Describe(left), ", ",
                           Describe(right), " and ", Describe(*out), ".");
  }
  const MaxSum product = {left.typed_data<int32_t>(),
                          right.typed_data<int32_t>(),
                          out->typed_data<int32_t>(),
                          l[0],
                          l[1],
                          l[2],
                          r[2]};
  return ToError(LaunchMaxSum(product, stream), "the max-sum product");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MaxSum32, MaxSumImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()   // left S32[block, row, left]
                                  .Arg<ffi::AnyBuffer>()   // right S32[block, row, right]
                                  .Ret<ffi::AnyBuffer>(),  // S32[block, left, right]
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace esparse::cuda
