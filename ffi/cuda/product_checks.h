// What the handlers of 2:4 products ask of their buffers.
#ifndef ESPARSE_FFI_CUDA_PRODUCT_CHECKS_H_
#define ESPARSE_FFI_CUDA_PRODUCT_CHECKS_H_

#include <cstdint>

#include "cuda/decode_plan.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cuda {

// `product` says which, in messages: "the 2:4 decode product".

inline ffi::Error CheckMatrix(const char* product, const char* name, const ffi::AnyBuffer& buffer,
                              int64_t rows, int64_t columns, ffi::DataType dtype) {
  const auto dimensions = buffer.dimensions();
  if (buffer.element_type() != dtype || dimensions.size() != 2 || dimensions[0] != rows ||
      dimensions[1] != columns) {
    return InvalidArgument(product, " needs ", name, " ", dtype, "[", rows, ", ", columns,
                           "]; got ", Describe(buffer), ".");
  }
  return ffi::Error::Success();
}

inline ffi::Error CheckAligned(const char* product, const char* name,
                               const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment != 0) {
    return InvalidArgument(product, " reads ", kAlignment, " bytes at a time; ", name, " ",
                           Describe(buffer), " starts at an address that is no multiple.");
  }
  return ffi::Error::Success();
}

// x [row, channel], up to `most_rows`.
inline ffi::Error CheckX(const char* product, const ffi::AnyBuffer& x, int64_t most_rows) {
  const auto dimensions = x.dimensions();
  if (dimensions.size() != 2 || (x.element_type() != ffi::F16 && x.element_type() != ffi::BF16)) {
    return InvalidArgument(product, " takes x F16 or BF16 [row, channel]; got ", Describe(x),
                           ". Flatten leading axes; cast x and the weight.");
  }
  if (dimensions[0] < 1 || dimensions[0] > most_rows) {
    return InvalidArgument(product, " takes 1 to ", most_rows, " rows; got x ", Describe(x),
                           ". More rows are another kernel's work.");
  }
  if (dimensions[1] < kShapeUnit || dimensions[1] % kShapeUnit != 0) {
    return InvalidArgument(product, " needs channels that are a multiple of ", kShapeUnit,
                           "; got x ", Describe(x), ". Leave such a layer dense.");
  }
  return CheckAligned(product, "x", x);
}

// The weight; `channels` are those of x.
inline ffi::Error CheckBlob(const char* product, const char* name, const ffi::AnyBuffer& blob,
                            int64_t out, int64_t channels) {
  constexpr int64_t kMostElements = int64_t{1} << 31;  // the kernels' offsets have 32 bits
  if (out < kShapeUnit || out % kShapeUnit != 0 || out > kMostElements / channels) {
    return InvalidArgument(product, " needs outputs that are a multiple of ", kShapeUnit,
                           ", and less than 2^31 weights; got ", out, " outputs of ", channels,
                           " channels. Leave such a layer dense, or split it.");
  }
  const int64_t bytes = out * channels / 16 * 18;
  if (blob.element_type() != ffi::U8 || blob.dimensions().size() != 1 ||
      blob.dimensions()[0] != bytes) {
    return InvalidArgument("a 2:4 weight of ", out, " outputs and ", channels, " channels is ",
                           name, " U8[", bytes, "]; got ", Describe(blob),
                           ". Make it with esparse_jax.sparse.blob24.");
  }
  return CheckAligned(product, name, blob);
}

inline Dtype DtypeOf(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::F16 ? Dtype::kFloat16 : Dtype::kBfloat16;
}

}  // namespace esparse::cuda

#endif  // ESPARSE_FFI_CUDA_PRODUCT_CHECKS_H_
