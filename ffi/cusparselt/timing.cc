#include "cusparselt/timing.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace esparse::cusparselt {
namespace {

ffi::Error ToError(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(call) + " failed: " + cudaGetErrorString(status) + " (" +
                              cudaGetErrorName(status) + ").");
}

#define ESPARSE_CUDA_CALL(name, ...) ESPARSE_RETURN_IF_ERROR(ToError(name(__VA_ARGS__), #name))

// Owners of the runtime's objects.
template <typename Object, cudaError_t (*destroy)(Object)>
struct Destroy {
  using pointer = Object;
  void operator()(Object object) const { destroy(object); }
};
template <typename Object, cudaError_t (*destroy)(Object)>
using Owned = std::unique_ptr<std::remove_pointer_t<Object>, Destroy<Object, destroy>>;
using OwnedStream = Owned<cudaStream_t, cudaStreamDestroy>;
using OwnedGraph = Owned<cudaGraph_t, cudaGraphDestroy>;
using OwnedExecutable = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;
using OwnedEvent = Owned<cudaEvent_t, cudaEventDestroy>;

// Makes a GPU current, and the one before again at the end.
class CurrentDevice {
 public:
  ~CurrentDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  ffi::Error Set(int32_t device) {
    ESPARSE_CUDA_CALL(cudaGetDevice, &before_);
    ESPARSE_CUDA_CALL(cudaSetDevice, device);
    return ffi::Error::Success();
  }

 private:
  int before_ = -1;
};

ffi::Error Check(const Candidate& candidate, const Plan& plan, int32_t launches, int32_t replays) {
  if (launches < candidate.copies || replays < 1 || candidate.copies < 1) {
    return InvalidArgument("a timing needs at least one copy of the weight, as many launches as ",
                           "copies, and one replay; got ", candidate.copies, " copies, ", launches,
                           " launches and ", replays, " replays.");
  }
  const int64_t bytes = static_cast<int64_t>(plan.blob_bytes());
  if (candidate.copies * bytes < kLeastBytes) {
    return InvalidArgument(candidate.copies, " copies of ", bytes, " bytes may stay in the GPU's ",
                           "cache from one launch to the next; give at least ",
                           (kLeastBytes + bytes - 1) / bytes, " copies, ", kLeastBytes, " bytes.");
  }
  if (bytes % kAlignment != 0 && candidate.copies > 1) {
    return InvalidArgument("copies of ", bytes,
                           " bytes cannot lie back to back: the library reads ", "multiples of ",
                           kAlignment, " bytes.");
  }
  if (candidate.workspace_bytes < plan.workspace_bytes()) {
    return InvalidArgument(TextOf(candidate.problem), " needs a workspace of ",
                           plan.workspace_bytes(), " bytes; got ", candidate.workspace_bytes, ".");
  }
  const std::pair<const char*, const void*> buffers[] = {{"x", candidate.x},
                                                         {"blobs", candidate.blobs},
                                                         {"y", candidate.y},
                                                         {"workspace", candidate.workspace}};
  for (const auto& [name, address] : buffers) {
    if (reinterpret_cast<uintptr_t>(address) % kAlignment != 0) {
      return InvalidArgument("cuSPARSELt needs addresses that are multiples of ", kAlignment, "; ",
                             name, " is at another.");
    }
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::ErrorOr<double> TimeCandidate(SharedLibrary library, int32_t device,
                                   const Candidate& candidate, int32_t launches, int32_t replays) {
  CurrentDevice current;
  ESPARSE_RETURN_IF_ERROR(current.Set(device));
  ESPARSE_ASSIGN_OR_RETURN(
      plan, Plan::Create(std::move(library), candidate.problem, candidate.algorithm));
  ESPARSE_RETURN_IF_ERROR(Check(candidate, plan, launches, replays));

  cudaStream_t raw_stream = nullptr;
  ESPARSE_CUDA_CALL(cudaStreamCreateWithFlags, &raw_stream, cudaStreamNonBlocking);
  const OwnedStream stream(raw_stream);
  const auto launch = [&](int64_t copy) {
    const auto* blob = static_cast<const uint8_t*>(candidate.blobs) + copy * plan.blob_bytes();
    return plan.Run(blob, candidate.x, candidate.y, candidate.workspace, stream.get());
  };
  // Once outside a graph: what the library does on the first launch only belongs there, and a
  // kernel that fails is told from a graph that does.
  ESPARSE_RETURN_IF_ERROR(launch(0));
  ESPARSE_CUDA_CALL(cudaStreamSynchronize, stream.get());

  // The mode of XLA's own captures: other threads may go on allocating.
  ESPARSE_CUDA_CALL(cudaStreamBeginCapture, stream.get(), cudaStreamCaptureModeThreadLocal);
  ffi::Error launched = ffi::Error::Success();
  for (int64_t i = 0; i < launches && launched.success(); ++i) {
    launched = launch(i % candidate.copies);
  }
  cudaGraph_t raw_graph = nullptr;
  const cudaError_t captured = cudaStreamEndCapture(stream.get(), &raw_graph);
  const OwnedGraph graph(raw_graph);
  ESPARSE_RETURN_IF_ERROR(std::move(launched));
  ESPARSE_RETURN_IF_ERROR(ToError(captured, "cudaStreamEndCapture"));
  cudaGraphExec_t raw_executable = nullptr;
  ESPARSE_CUDA_CALL(cudaGraphInstantiateWithFlags, &raw_executable, graph.get(), /*flags=*/0);
  const OwnedExecutable executable(raw_executable);

  cudaEvent_t raw_begin = nullptr, raw_end = nullptr;
  ESPARSE_CUDA_CALL(cudaEventCreate, &raw_begin);
  const OwnedEvent begin(raw_begin);
  ESPARSE_CUDA_CALL(cudaEventCreate, &raw_end);
  const OwnedEvent end(raw_end);
  constexpr int32_t kWarm = 2;
  std::vector<float> milliseconds;
  for (int32_t i = 0; i < kWarm + replays; ++i) {
    ESPARSE_CUDA_CALL(cudaEventRecord, begin.get(), stream.get());
    ESPARSE_CUDA_CALL(cudaGraphLaunch, executable.get(), stream.get());
    ESPARSE_CUDA_CALL(cudaEventRecord, end.get(), stream.get());
    ESPARSE_CUDA_CALL(cudaEventSynchronize, end.get());
    float time = 0;
    ESPARSE_CUDA_CALL(cudaEventElapsedTime, &time, begin.get(), end.get());
    if (i >= kWarm) milliseconds.push_back(time);
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  const size_t half = milliseconds.size() / 2;
  const double median = milliseconds.size() % 2 == 1
                            ? milliseconds[half]
                            : (milliseconds[half - 1] + milliseconds[half]) / 2.0;
  return 1000.0 * median / launches;
}

}  // namespace esparse::cusparselt
