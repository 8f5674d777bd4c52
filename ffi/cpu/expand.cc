// The dense weight from its compressed form: what a product with very many rows starts from where
// no kernel of ours beats the dense one (see esparse_jax/sparse/matmul.py).
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/handlers.h"
#include "cpu/parallel.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cpu {
namespace {

// Elements are moved as bits, so only their size matters.
template <typename Bits>
void ExpandRow(const Bits* values, const uint8_t* indices, Bits* dense, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    const unsigned nibble = indices[g / 2] >> (g % 2 * 4);
    Bits* group = dense + 4 * g;
    std::memset(group, 0, 4 * sizeof(Bits));
    group[nibble & 3] = values[2 * g];
    group[nibble >> 2 & 3] = values[2 * g + 1];
  }
}

template <typename Bits>
void Expand(ffi::ThreadPool& pool, const ffi::AnyBuffer& values, const ffi::AnyBuffer& indices,
            ffi::AnyBuffer& dense) {
  constexpr int64_t kChannelsToShare = 256 << 10;  // waking a thread takes some ten microseconds
  const int64_t outs = dense.dimensions()[0];
  const int64_t channels = dense.dimensions()[1];
  const int64_t index_bytes = indices.dimensions()[1];
  const Bits* from = static_cast<const Bits*>(values.untyped_data());
  const uint8_t* index = static_cast<const uint8_t*>(indices.untyped_data());
  Bits* to = static_cast<Bits*>(dense.untyped_data());
  const int64_t threads = outs * channels >= kChannelsToShare ? pool.num_threads() : 1;
  const int64_t chunk = outs / (8 * std::max<int64_t>(threads, 1)) + 1;
  ParallelFor(pool, outs, chunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t out = begin; out < end; ++out) {
      ExpandRow(from + out * (channels / 2), index + out * index_bytes, to + out * channels,
                channels / 4);
    }
  });
}

ffi::Error Expand24Impl(ffi::ThreadPool pool, ffi::AnyBuffer values, ffi::AnyBuffer indices,
                        ffi::Result<ffi::AnyBuffer> dense) {
  if (values.dimensions().size() != 2 || indices.dimensions().size() != 2 ||
      dense->dimensions().size() != 2) {
    return InvalidArgument("a compressed weight is values [out, channel / 2] and indices U8[out, ",
                           "ceil(channel / 8)]; got values ", Describe(values), ", indices ",
                           Describe(indices), " and a dense result ", Describe(*dense), ".");
  }
  const int64_t outs = values.dimensions()[0];
  const int64_t channels = 2 * values.dimensions()[1];
  if (channels % 4 != 0 || indices.element_type() != ffi::U8 || indices.dimensions()[0] != outs ||
      indices.dimensions()[1] != (channels + 7) / 8) {
    return InvalidArgument("values ", Describe(values), " need an even number of columns and ",
                           "indices U8[", outs, ", ", (channels + 7) / 8, "]; got indices ",
                           Describe(indices), ".");
  }
  if (dense->element_type() != values.element_type() || dense->dimensions()[0] != outs ||
      dense->dimensions()[1] != channels) {
    return InvalidArgument("values ", Describe(values), " make a dense weight ",
                           values.element_type(), "[", outs, ", ", channels, "]; got ",
                           Describe(*dense), ".");
  }
  switch (ffi::ByteWidth(values.element_type())) {
    case 2:
      Expand<uint16_t>(pool, values, indices, *dense);
      return ffi::Error::Success();
    case 4:
      Expand<uint32_t>(pool, values, indices, *dense);
      return ffi::Error::Success();
    default:
      return InvalidArgument("weights of 2 and 4 bytes can be expanded; got values ",
                             Describe(values), ". Use the pure-JAX decompress24.");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Expand24, Expand24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // values [out, channel / 2]
                                  .Arg<ffi::AnyBuffer>()  // indices U8[out, ceil(channel / 8)]
                                  .Ret<ffi::AnyBuffer>()  // W [out, channel]
);

}  // namespace esparse::cpu
