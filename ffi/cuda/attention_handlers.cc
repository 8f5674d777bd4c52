#include "cuda/attention_handlers.h"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <tuple>

#include "cuda/attention.h"
#include "cuda/errors.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"
#ifdef ESPARSE_CUBINS
#include "cuda/cubins.h"
#include "cuda/record.h"
#endif

namespace esparse::cuda {
namespace {

ffi::Error CheckShape(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
                      std::initializer_list<int64_t> shape) {
  const auto dimensions = buffer.dimensions();
  bool same = buffer.element_type() == dtype && dimensions.size() == shape.size();
  size_t axis = 0;
  for (int64_t size : shape) {
    same = same && dimensions[axis] == size;
    ++axis;
  }
  if (same) return ffi::Error::Success();
  std::ostringstream wanted;
  const char* separator = "";
  for (int64_t size : shape) {
    wanted << separator << size;
    separator = ", ";
  }
  return InvalidArgument("the attention of a decode step needs ", name, " ", dtype, "[",
                         wanted.str(), "]; got ", Describe(buffer), ".");
}

ffi::Error CheckAligned(const char* name, const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment == 0) {
    return ffi::Error::Success();
  }
  return InvalidArgument("the attention of a decode step reads ", kAlignment, " bytes at a time; ",
                         name, " ", Describe(buffer),
                         " starts at an address that is no multiple. Give an array of its own.");
}

// The attention that a call is about, or what is wrong with the call.
ffi::Error MakeAttention(const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results,
                         int32_t heads, bool has_start, bool has_places, Attention* attention) {
  const size_t expected = size_t{6} + has_start + has_places;
  if (arguments.size() != expected || results.size() != 3) {
    return InvalidArgument("this attention of a decode step takes ", expected,
                           " arguments and 3 results; got ", arguments.size(), " and ",
                           results.size(), ".");
  }
  const auto argument = [&](size_t i) { return arguments.get<ffi::AnyBuffer>(i); };
  const auto result = [&](size_t i) { return results.get<ffi::AnyBuffer>(i); };
  ESPARSE_ASSIGN_OR_RETURN(projected, argument(0));
  ESPARSE_ASSIGN_OR_RETURN(keys, argument(1));
  ESPARSE_ASSIGN_OR_RETURN(values, argument(2));
  ESPARSE_ASSIGN_OR_RETURN(cosines, argument(3));
  ESPARSE_ASSIGN_OR_RETURN(sines, argument(4));
  ESPARSE_ASSIGN_OR_RETURN(length, argument(5));
  ESPARSE_ASSIGN_OR_RETURN(attended, result(0));
  ESPARSE_ASSIGN_OR_RETURN(keys_to, result(1));
  ESPARSE_ASSIGN_OR_RETURN(values_to, result(2));

  const ffi::DataType dtype = projected.element_type();
  if ((dtype != ffi::F16 && dtype != ffi::BF16) || projected.dimensions().size() != 2 ||
      keys.dimensions().size() != 3) {
    return InvalidArgument("the attention of a decode step takes projections F16 or BF16 [row, ",
                           "feature] and keys [row and head, slot, feature]; got ",
                           Describe(projected), " and ", Describe(keys), ".");
  }
  const int64_t batch = projected.dimensions()[0], width = projected.dimensions()[1];
  const int64_t matrices = keys.dimensions()[0], slots = keys.dimensions()[1],
                features = keys.dimensions()[2];
  const int64_t kv_heads = batch > 0 ? matrices / batch : 0;
  constexpr int64_t kMost = int64_t{1} << 31;
  if (batch < 1 || slots < 1 || kv_heads < 1 || kv_heads * batch != matrices ||
      matrices * 8 >= kMost || slots >= kMost) {
    return InvalidArgument(
        "the attention of a decode step takes keys [row and head, slot, feature], as many heads ",
        "for each row of the projections, at least one slot, and less than 2^28 heads of all "
        "rows; ",
        "got projections ", Describe(projected), " and keys ", Describe(keys),
        ". Make the cache by init_cache, for this batch.");
  }
  if (!AttentionFits(heads, kv_heads, features)) {
    return InvalidArgument(
        "the attention of a decode step is there for 64 or 128 features and 1, 2, 4 or 8 query ",
        "heads to a key; got ", heads, " query heads, ", kv_heads, " of keys, and ", features,
        " features. Use rotary_attention.");
  }
  if (width != (heads + 2 * kv_heads) * features) {
    return InvalidArgument("the attention of a decode step takes queries, keys and values side by ",
                           "side: ", (heads + 2 * kv_heads) * features, " numbers a row for ",
                           heads, " and twice ", kv_heads, " heads of ", features,
                           " features; got ", Describe(projected), ".");
  }
  const int64_t angle_rows = cosines.dimensions().size() == 2 ? cosines.dimensions()[0] : 0;
  const int64_t angles = angle_rows == 1 ? 1 : batch;
  ESPARSE_RETURN_IF_ERROR(CheckShape("values", values, dtype, {matrices, slots, features}));
  ESPARSE_RETURN_IF_ERROR(CheckShape("keys", keys, dtype, {matrices, slots, features}));
  ESPARSE_RETURN_IF_ERROR(CheckShape("cosines", cosines, ffi::F32, {angles, features / 2}));
  ESPARSE_RETURN_IF_ERROR(CheckShape("sines", sines, ffi::F32, {angles, features / 2}));
  ESPARSE_RETURN_IF_ERROR(CheckShape("length", length, ffi::S32, {}));
  ESPARSE_RETURN_IF_ERROR(CheckShape("attended", *attended, dtype, {batch, heads * features}));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("keys", keys));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("values", values));
  if (keys_to->untyped_data() != keys.untyped_data() ||
      values_to->untyped_data() != values.untyped_data()) {
    return InvalidArgument("the attention of a decode step writes keys and values in place: ",
                           "the results must be the arguments (input_output_aliases).");
  }
  *attention = {};
  if (has_start) {
    ESPARSE_ASSIGN_OR_RETURN(start, argument(6));
    ESPARSE_RETURN_IF_ERROR(CheckShape("start", start, ffi::S32, {batch}));
    attention->start = static_cast<const int32_t*>(start.untyped_data());
  }
  if (has_places) {
    ESPARSE_ASSIGN_OR_RETURN(places, argument(has_start ? 7 : 6));
    ESPARSE_RETURN_IF_ERROR(CheckShape("places", places, ffi::S32, {heads * features}));
    attention->places = static_cast<const int32_t*>(places.untyped_data());
  }
  attention->projected = projected.untyped_data();
  attention->keys = keys_to->untyped_data();
  attention->values = values_to->untyped_data();
  attention->cosines = static_cast<const float*>(cosines.untyped_data());
  attention->sines = static_cast<const float*>(sines.untyped_data());
  attention->length = static_cast<const int32_t*>(length.untyped_data());
  attention->attended = attended->untyped_data();
  attention->batch = batch;
  attention->heads = heads;
  attention->kv_heads = kv_heads;
  attention->features = features;
  attention->slots = slots;
  attention->angle_rows = angle_rows;
  attention->dtype = dtype == ffi::F16 ? Dtype::kFloat16 : Dtype::kBfloat16;
  return ffi::Error::Success();
}

ffi::Error AttendImpl(cudaStream_t stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                      int32_t heads, bool has_start, bool has_places, bool prefetch) {
  Attention attention;
  ESPARSE_RETURN_IF_ERROR(
      MakeAttention(arguments, results, heads, has_start, has_places, &attention));
  if (!AttentionRuns()) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "the attention of a decode step needs a GPU of compute capability 9.0 or "
                      "later, and an extension that is built for it (esparse doctor says for which "
                      "it is). Trace the computation on this GPU, which takes rotary_attention, or "
                      "build with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90.");
  }
  // While XLA traces a call, its kernel makes a graph of its own: nothing to overlap with.
  cudaStreamCaptureStatus capture;
  ESPARSE_CUDA_CALL(cudaStreamIsCapturing, stream, &capture);
  const bool early = prefetch && capture == cudaStreamCaptureStatusNone;
  return ToError(Launch(attention, early ? Start::kPrefetch : Start::kAlone, stream),
                 "the attention of a decode step");
}

#ifdef ESPARSE_CUBINS
ffi::Error RecordAttendImpl(record::Recorder recorder, ffi::RemainingArgs arguments,
                            ffi::RemainingRets results, int32_t heads, bool has_start,
                            bool has_places, bool prefetch) {
  Attention attention;
  ESPARSE_RETURN_IF_ERROR(
      MakeAttention(arguments, results, heads, has_start, has_places, &attention));
  bool runs = false;
  ESPARSE_RETURN_IF_ERROR(ToError(CubinsRun(&runs), "asking for the compute capability"));
  if (!runs) return record::RequestCapture(recorder);
  AttentionLaunch launch;
  ESPARSE_RETURN_IF_ERROR(
      ToError(Prepare(attention, prefetch ? Start::kPrefetch : Start::kEarly, &launch),
              "the attention of a decode step"));
  constexpr size_t kPointers = std::tuple_size_v<decltype(launch.pointers)>;
  record::KernelArg list[kPointers + 1];
  for (size_t i = 0; i < kPointers; ++i) list[i] = record::Pointer(launch.pointers[i]);
  list[kPointers] = {launch.args.data(), kAttentionArgsBytes, record::ArgType::kHostValue};
  const Cubin cubin = AttentionCubin();
  return record::AddOrUpdate(
      recorder, {launch.name, cubin.data, cubin.size, launch.grid, launch.threads, /*shared=*/0},
      {list, kPointers + 1});
}
#endif  // ESPARSE_CUBINS

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeAttention, AttendImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("heads")
                                  .Attr<bool>("has_start")
                                  .Attr<bool>("has_places")
                                  .Attr<bool>("prefetch"),
                              {ffi::Traits::kCmdBufferCompatible});

#ifdef ESPARSE_CUBINS
XLA_FFI_DEFINE_HANDLER(kRecordAttend, RecordAttendImpl,
                       ffi::Ffi::Bind()
                           .Ctx<record::Recorder>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<int32_t>("heads")
                           .Attr<bool>("has_start")
                           .Attr<bool>("has_places")
                           .Attr<bool>("prefetch"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_Error* RecordDecodeAttention(XLA_FFI_CallFrame* frame) {
  return record::AsExecution(kRecordAttend, frame);
}
#endif  // ESPARSE_CUBINS

}  // namespace esparse::cuda
