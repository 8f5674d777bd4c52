#include <cstddef>
#include <cstdint>

#include "cuda/errors.h"
#include "cuda/handlers.h"
#include "cuda/row_norm.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {
namespace {

ffi::Error CheckLike(const char* name, const ffi::AnyBuffer& buffer, const ffi::AnyBuffer& x) {
  if (buffer.element_type() == x.element_type() && buffer.dimensions() == x.dimensions()) {
    return ffi::Error::Success();
  }
  return InvalidArgument("the norm of rows needs ", name, " like x, ", Describe(x), "; got ",
                         Describe(buffer), ".");
}

ffi::Error CheckChannels(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
                         int64_t channels) {
  const auto dimensions = buffer.dimensions();
  if (buffer.element_type() == dtype && dimensions.size() == 1 && dimensions[0] == channels) {
    return ffi::Error::Success();
  }
  return InvalidArgument("the norm of rows needs ", name, " ", dtype, "[", channels, "]; got ",
                         Describe(buffer), ".");
}

ffi::Error CheckAligned(const char* name, const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 == 0) return ffi::Error::Success();
  return InvalidArgument(
      "the norm of rows reads and writes 16 bytes at a time; ", name, " ", Describe(buffer),
      " starts at an address that is no multiple of 16. Give an array of its own.");
}

ffi::Error RowNormImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs arguments,
                       ffi::Result<ffi::AnyBuffer> normed, ffi::RemainingRets results, bool add,
                       bool scale, bool permute, float epsilon) {
  const auto dimensions = x.dimensions();
  const ffi::DataType dtype = x.element_type();
  if ((dtype != ffi::F16 && dtype != ffi::BF16) || dimensions.size() != 2 ||
      dimensions[1] < kNormUnit || dimensions[1] % kNormUnit != 0 ||
      dimensions[1] > kMostNormChannels || dimensions[0] > int64_t{1} << 30) {
    return InvalidArgument("the norm of rows takes x F16 or BF16 [row, channel], up to 2^30 rows, ",
                           "channels a multiple of ", kNormUnit, " up to ", kMostNormChannels,
                           "; got ", Describe(x), ".");
  }
  const size_t wanted = size_t{add} + size_t{scale} + size_t{permute};
  if (arguments.size() != wanted || results.size() != size_t{add}) {
    return InvalidArgument("the norm of rows takes x and ", wanted, " more arguments, and has 1 + ",
                           int{add}, " results, as its attributes say; got ", arguments.size(),
                           " more and 1 + ", results.size(), ".");
  }
  RowNorm norm = {};
  norm.x = x.untyped_data();
  norm.normed = normed->untyped_data();
  norm.rows = dimensions[0];
  norm.channels = static_cast<int32_t>(dimensions[1]);
  norm.epsilon = epsilon;
  norm.dtype = dtype == ffi::F16 ? Dtype::kFloat16 : Dtype::kBfloat16;
  ESPARSE_RETURN_IF_ERROR(CheckAligned("x", x));
  ESPARSE_RETURN_IF_ERROR(CheckLike("normed", *normed, x));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("normed", *normed));
  size_t next = 0;
  if (add) {
    ESPARSE_ASSIGN_OR_RETURN(residual, arguments.get<ffi::AnyBuffer>(next++));
    ESPARSE_ASSIGN_OR_RETURN(sum, results.get<ffi::AnyBuffer>(0));
    ESPARSE_RETURN_IF_ERROR(CheckLike("residual", residual, x));
    ESPARSE_RETURN_IF_ERROR(CheckLike("sum", *sum, x));
    ESPARSE_RETURN_IF_ERROR(CheckAligned("residual", residual));
    ESPARSE_RETURN_IF_ERROR(CheckAligned("sum", *sum));
    norm.residual = residual.untyped_data();
    norm.sum = sum->untyped_data();
  }
  if (scale) {
    ESPARSE_ASSIGN_OR_RETURN(gain, arguments.get<ffi::AnyBuffer>(next++));
    ESPARSE_RETURN_IF_ERROR(CheckChannels("gain", gain, dtype, dimensions[1]));
    norm.gain = gain.untyped_data();
  }
  if (permute) {
    ESPARSE_ASSIGN_OR_RETURN(permutation, arguments.get<ffi::AnyBuffer>(next++));
    ESPARSE_RETURN_IF_ERROR(CheckChannels("permutation", permutation, ffi::S32, dimensions[1]));
    ESPARSE_RETURN_IF_ERROR(CheckAligned("permutation", permutation));
    norm.permutation = static_cast<const int32_t*>(permutation.untyped_data());
  }
  return ToError(LaunchRowNorm(norm, stream), "the norm of rows");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RowNorm16, RowNormImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()  // x [row, channel]
                                  .RemainingArgs()        // residual, gain, permutation S32
                                  .Ret<ffi::AnyBuffer>()  // normed [row, channel]
                                  .RemainingRets()        // sum [row, channel]
                                  .Attr<bool>("add")
                                  .Attr<bool>("scale")
                                  .Attr<bool>("permute")
                                  .Attr<float>("epsilon"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace esparse::cuda
