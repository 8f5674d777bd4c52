#include "cusparselt/handlers.h"

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cusparselt/context.h"
#include "cusparselt/library.h"
#include "cusparselt/plan.h"
#include "cusparselt/platform.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cusparselt {
namespace {

// One T for each GPU an executable runs on, held from when that GPU first initializes: what it has
// of the library belongs to one GPU. XLA runs GPUs on threads of their own, and may run one
// executable from several, so the table has a mutex; what is in it is used by any thread.
template <typename T>
class PerDevice {
 public:
  // Asks `make` for the GPU's T, a std::shared_ptr, unless it is there. GPUs do not wait for each
  // other; of two threads that prepare the same one the first to be done leaves its T.
  template <typename Make>
  ffi::Error Prepare(int32_t device, Make make) {
    if (Find(device) != nullptr) return ffi::Error::Success();
    ESPARSE_ASSIGN_OR_RETURN(made, make());
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.emplace(device, std::move(made));
    return ffi::Error::Success();
  }

  // The GPU's T, or an error: only initialize brings one.
  ffi::ErrorOr<const T*> Get(int32_t device) const {
    const T* found = Find(device);
    if (found == nullptr) {
      return Failure{ffi::Error::Internal("cuSPARSELt was not initialized on GPU " +
                                          std::to_string(device) + ".")};
    }
    return found;
  }

 private:
  const T* Find(int32_t device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(device);
    return found == entries_.end() ? nullptr : found->second.get();
  }

  mutable std::mutex mutex_;
  std::map<int32_t, std::shared_ptr<const T>> entries_;
};

// The state of one call to Matmul in an executable.
template <typename Platform>
struct MatmulState {
  static ffi::TypeId id;  // XLA writes it when the type is registered

  SharedLibrary vendor;
  Algorithm algorithm;
  std::vector<int32_t> readers;
  PerDevice<Plan> plans;
};

// The state of one call to Compress.
template <typename Platform>
struct CompressState {
  static ffi::TypeId id;

  SharedLibrary vendor;
  PerDevice<Compression> compressions;
};

template <typename Platform>
ffi::TypeId MatmulState<Platform>::id = {};
template <typename Platform>
ffi::TypeId CompressState<Platform>::id = {};

// ---- checks

ffi::ErrorOr<int> TypeOf(const ffi::AnyBuffer& buffer, const char* name) {
  if (buffer.element_type() == ffi::F16) return kTypeFloat16;
  if (buffer.element_type() == ffi::BF16) return kTypeBfloat16;
  return Failure{InvalidArgument("cuSPARSELt is called for F16 and BF16; got ", name, " ",
                                 Describe(buffer), ". Cast x and the weight.")};
}

ffi::Error CheckMatrix(const char* name, const ffi::AnyBuffer& buffer) {
  if (buffer.dimensions().size() == 2 && buffer.dimensions()[0] > 0 && buffer.dimensions()[1] > 0) {
    return ffi::Error::Success();
  }
  return InvalidArgument("cuSPARSELt takes matrices that are not empty; got ", name, " ",
                         Describe(buffer), ". Flatten leading axes.");
}

ffi::Error CheckBytes(const char* name, const ffi::AnyBuffer& buffer) {
  if (buffer.element_type() == ffi::U8 && buffer.dimensions().size() == 1) {
    return ffi::Error::Success();
  }
  return InvalidArgument(name, " must be U8[bytes]; got ", Describe(buffer), ".");
}

ffi::Error CheckAligned(const char* name, const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment == 0) {
    return ffi::Error::Success();
  }
  return InvalidArgument("cuSPARSELt needs addresses that are multiples of ", kAlignment, "; ",
                         name, " ", Describe(buffer), " is at another.");
}

ffi::Error CheckWorkspace(const ffi::AnyBuffer& workspace, size_t needed, const std::string& what) {
  ESPARSE_RETURN_IF_ERROR(CheckBytes("workspace", workspace));
  if (workspace.element_count() >= needed) return ffi::Error::Success();
  return InvalidArgument(what, " needs a workspace of ", needed, " bytes on this GPU; got ",
                         Describe(workspace), ". Lower the computation where the GPU is, or give ",
                         "workspace_bytes with the algorithm.");
}

// Whether this library on this GPU reads the blob. Its layout is the library's own affair, and a
// blob of another layout would give wrong numbers and no error.
template <typename Platform>
ffi::Error CheckReader(const Library& library, const std::vector<int32_t>& readers) {
  ESPARSE_ASSIGN_OR_RETURN(architecture, Platform::Architecture(library));
  std::ostringstream known;
  for (int32_t reader : readers) {
    if (reader == library.version() * 1000 + architecture) return ffi::Error::Success();
    known << (known.tellp() > 0 ? ", " : "") << VersionName(reader / 1000) << " on sm_"
          << reader % 1000;
  }
  return ffi::Error(
      ffi::ErrorCode::kFailedPrecondition,
      "this computation holds a 2:4 weight laid out as cuSPARSELt reads it in version " +
          known.str() + "; here it is " + VersionName(library.version()) + " on sm_" +
          std::to_string(architecture) +
          ", whose layout may be another. Trace it again on this machine, with weights from "
          "esparse_jax.sparse.device_blob24.");
}

// ---- the product

template <typename Platform>
ffi::ErrorOr<std::unique_ptr<MatmulState<Platform>>> InstantiateMatmul(
    int32_t algorithm, int32_t split_k, int32_t split_k_mode, int32_t split_k_buffers,
    ffi::Span<const int32_t> readers) {
  using Result = ffi::ErrorOr<std::unique_ptr<MatmulState<Platform>>>;
  return WithoutExceptions([&]() -> Result {
    if (algorithm < -1 || split_k < -1 || split_k_mode < 0 || split_k_mode > kStreamK ||
        split_k_buffers < 0) {
      return Failure{InvalidArgument(
          "an algorithm of cuSPARSELt is a number from 0, or -1 for the library's own choice; ",
          "split_k a number of slices, -1 for segment-K, or 0; split_k_mode 0 to ",
          static_cast<int>(kStreamK), "; split_k_buffers a number from 0. Got ", algorithm, ", ",
          split_k, ", ", split_k_mode, ", ", split_k_buffers, ".")};
    }
    auto state = std::make_unique<MatmulState<Platform>>();
    ESPARSE_ASSIGN_OR_RETURN(library, Library::Loaded(Platform::kLibrary));
    state->vendor = std::make_shared<const Library>(std::move(library));
    state->algorithm = {algorithm, split_k, split_k_mode, split_k_buffers};
    state->readers.assign(readers.begin(), readers.end());
    return Result(std::move(state));
  });
}

template <typename Platform>
ffi::ErrorOr<SharedPlan> PlanOf(const MatmulState<Platform>& state, const ffi::AnyBuffer& x,
                                const ffi::AnyBuffer& blob, const ffi::AnyBuffer& y,
                                const ffi::AnyBuffer& workspace) {
  ESPARSE_RETURN_IF_ERROR(CheckMatrix("x", x));
  ESPARSE_RETURN_IF_ERROR(CheckMatrix("y", y));
  ESPARSE_RETURN_IF_ERROR(CheckBytes("blob", blob));
  ESPARSE_ASSIGN_OR_RETURN(type, TypeOf(x, "x"));
  const Problem problem = {x.dimensions()[0], y.dimensions()[1], x.dimensions()[1], type};
  if (y.dimensions()[0] != problem.rows || y.element_type() != x.element_type()) {
    return Failure{InvalidArgument("y must have the rows and the dtype of x; got x ", Describe(x),
                                   " and y ", Describe(y), ".")};
  }
  ESPARSE_RETURN_IF_ERROR(CheckReader<Platform>(*state.vendor, state.readers));
  ESPARSE_ASSIGN_OR_RETURN(current, Platform::Device(*state.vendor));
  ESPARSE_ASSIGN_OR_RETURN(context, Context::On(state.vendor, current));
  ESPARSE_ASSIGN_OR_RETURN(plan, Plan::Of(context, problem, state.algorithm));
  if (blob.element_count() != plan->blob_bytes()) {
    return Failure{InvalidArgument("a 2:4 weight of ", problem.out, " outputs and ",
                                   problem.channels, " channels is a blob U8[", plan->blob_bytes(),
                                   "] on this GPU; got ", Describe(blob),
                                   ". Make it with esparse_jax.sparse.device_blob24.")};
  }
  ESPARSE_RETURN_IF_ERROR(CheckWorkspace(workspace, plan->workspace_bytes(), TextOf(problem)));
  return plan;
}

template <typename Platform>
ffi::Error InitializeMatmul(MatmulState<Platform>* state, int32_t device, ffi::AnyBuffer x,
                            ffi::AnyBuffer blob, ffi::Result<ffi::AnyBuffer> y,
                            ffi::Result<ffi::AnyBuffer> workspace) {
  return WithoutExceptions([&]() -> ffi::Error {
    // Shapes do not change between the runs of an executable.
    return state->plans.Prepare(device, [&] { return PlanOf(*state, x, blob, *y, *workspace); });
  });
}

template <typename Platform>
ffi::Error ExecuteMatmul(Stream stream, MatmulState<Platform>* state, int32_t device,
                         ffi::AnyBuffer x, ffi::AnyBuffer blob, ffi::Result<ffi::AnyBuffer> y,
                         ffi::Result<ffi::AnyBuffer> workspace) {
  ESPARSE_ASSIGN_OR_RETURN(plan, state->plans.Get(device));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("x", x));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("blob", blob));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("y", *y));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("workspace", *workspace));
  return plan->Run(blob.untyped_data(), x.untyped_data(), y->untyped_data(),
                   workspace->untyped_data(), stream);
}

ffi::Error ExecuteMatmulOnHost(MatmulState<OnHost>* state, int32_t device, ffi::AnyBuffer x,
                               ffi::AnyBuffer blob, ffi::Result<ffi::AnyBuffer> y,
                               ffi::Result<ffi::AnyBuffer> workspace) {
  ESPARSE_RETURN_IF_ERROR(InitializeMatmul<OnHost>(state, device, x, blob, y, workspace));
  return ExecuteMatmul<OnHost>(/*stream=*/nullptr, state, device, x, blob, y, workspace);
}

// ---- the compression

template <typename Platform>
ffi::ErrorOr<std::unique_ptr<CompressState<Platform>>> InstantiateCompress() {
  using Result = ffi::ErrorOr<std::unique_ptr<CompressState<Platform>>>;
  return WithoutExceptions([&]() -> Result {
    auto state = std::make_unique<CompressState<Platform>>();
    ESPARSE_ASSIGN_OR_RETURN(library, Library::Loaded(Platform::kLibrary));
    state->vendor = std::make_shared<const Library>(std::move(library));
    return Result(std::move(state));
  });
}

template <typename Platform>
ffi::ErrorOr<std::shared_ptr<const Compression>> MakeCompression(
    const CompressState<Platform>& state, const ffi::AnyBuffer& weight, const ffi::AnyBuffer& blob,
    const ffi::AnyBuffer& workspace) {
  ESPARSE_RETURN_IF_ERROR(CheckMatrix("weight", weight));
  ESPARSE_RETURN_IF_ERROR(CheckBytes("blob", blob));
  ESPARSE_ASSIGN_OR_RETURN(type, TypeOf(weight, "weight"));
  ESPARSE_ASSIGN_OR_RETURN(current, Platform::Device(*state.vendor));
  ESPARSE_ASSIGN_OR_RETURN(context, Context::On(state.vendor, current));
  ESPARSE_ASSIGN_OR_RETURN(compression, Compression::Create(context, weight.dimensions()[0],
                                                            weight.dimensions()[1], type));
  if (blob.element_count() != compression.blob_bytes()) {
    return Failure{InvalidArgument("cuSPARSELt compresses ", Describe(weight), " to ",
                                   compression.blob_bytes(), " bytes on this GPU; got room for ",
                                   Describe(blob), ".")};
  }
  ESPARSE_RETURN_IF_ERROR(CheckWorkspace(workspace, compression.workspace_bytes(),
                                         "the compression of " + Describe(weight)));
  return std::make_shared<const Compression>(std::move(compression));
}

template <typename Platform>
ffi::Error InitializeCompress(CompressState<Platform>* state, int32_t device, ffi::AnyBuffer weight,
                              ffi::Result<ffi::AnyBuffer> blob,
                              ffi::Result<ffi::AnyBuffer> workspace) {
  return WithoutExceptions([&]() -> ffi::Error {
    return state->compressions.Prepare(
        device, [&] { return MakeCompression(*state, weight, *blob, *workspace); });
  });
}

template <typename Platform>
ffi::Error ExecuteCompress(Stream stream, CompressState<Platform>* state, int32_t device,
                           ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> blob,
                           ffi::Result<ffi::AnyBuffer> workspace) {
  ESPARSE_ASSIGN_OR_RETURN(compression, state->compressions.Get(device));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("weight", weight));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("blob", *blob));
  ESPARSE_RETURN_IF_ERROR(CheckAligned("workspace", *workspace));
  return compression->Run(weight.untyped_data(), blob->untyped_data(), workspace->untyped_data(),
                          stream);
}

ffi::Error ExecuteCompressOnHost(CompressState<OnHost>* state, int32_t device,
                                 ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> blob,
                                 ffi::Result<ffi::AnyBuffer> workspace) {
  ESPARSE_RETURN_IF_ERROR(InitializeCompress<OnHost>(state, device, weight, blob, workspace));
  return ExecuteCompress<OnHost>(/*stream=*/nullptr, state, device, weight, blob, workspace);
}

// ---- bindings

auto BindMatmulAttributes() {
  return ffi::Ffi::BindInstantiate()
      .Attr<int32_t>("algorithm")
      .Attr<int32_t>("split_k")
      .Attr<int32_t>("split_k_mode")
      .Attr<int32_t>("split_k_buffers")
      .Attr<ffi::Span<const int32_t>>("readers");
}

// What initialize and execute see of a product: both come after `binding`.
template <typename Platform, typename Binding>
auto BindMatmul(Binding binding) {
  return std::move(binding)
      .template Ctx<ffi::State<MatmulState<Platform>>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::AnyBuffer>()   // x [row, channel]
      .template Arg<ffi::AnyBuffer>()   // blob U8[bytes]
      .template Ret<ffi::AnyBuffer>()   // y [row, out]
      .template Ret<ffi::AnyBuffer>();  // workspace U8[bytes]
}

template <typename Platform, typename Binding>
auto BindCompress(Binding binding) {
  return std::move(binding)
      .template Ctx<ffi::State<CompressState<Platform>>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::AnyBuffer>()   // weight [out, channel]
      .template Ret<ffi::AnyBuffer>()   // blob U8[bytes]
      .template Ret<ffi::AnyBuffer>();  // workspace U8[bytes]
}

auto BindStream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>(); }

template <typename Matmul, typename Compress>
std::vector<StateType> StateTypes(const char* matmul, const char* compress) {
  static constexpr XLA_FFI_TypeInfo kMatmul = ffi::MakeTypeInfo<Matmul>();
  static constexpr XLA_FFI_TypeInfo kCompress = ffi::MakeTypeInfo<Compress>();
  return {{matmul, &Matmul::id, &kMatmul}, {compress, &Compress::id, &kCompress}};
}

}  // namespace

std::vector<StateType> StateTypesOnCuda() {
  return StateTypes<MatmulState<OnCuda>, CompressState<OnCuda>>("esparse_cusparselt_matmul",
                                                                "esparse_cusparselt_compress");
}

std::vector<StateType> StateTypesOnHost() {
  return StateTypes<MatmulState<OnHost>, CompressState<OnHost>>("esparse_cusparselt_matmul_host",
                                                                "esparse_cusparselt_compress_host");
}

// A launch does the same work each time and neither allocates nor waits, so it may be captured in a
// CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltMatmulInstantiate, InstantiateMatmul<OnCuda>,
                              BindMatmulAttributes());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltMatmulInitialize, InitializeMatmul<OnCuda>,
                              BindMatmul<OnCuda>(ffi::Ffi::BindInitialize()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltMatmulExecute, ExecuteMatmul<OnCuda>,
                              BindMatmul<OnCuda>(BindStream()),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltMatmulHostInstantiate, InstantiateMatmul<OnHost>,
                              BindMatmulAttributes());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltMatmulHostExecute, ExecuteMatmulOnHost,
                              BindMatmul<OnHost>(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltCompressInstantiate, InstantiateCompress<OnCuda>,
                              ffi::Ffi::BindInstantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltCompressInitialize, InitializeCompress<OnCuda>,
                              BindCompress<OnCuda>(ffi::Ffi::BindInitialize()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltCompressExecute, ExecuteCompress<OnCuda>,
                              BindCompress<OnCuda>(BindStream()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltCompressHostInstantiate, InstantiateCompress<OnHost>,
                              ffi::Ffi::BindInstantiate());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CusparseltCompressHostExecute, ExecuteCompressOnHost,
                              BindCompress<OnHost>(ffi::Ffi::Bind()));

}  // namespace esparse::cusparselt
