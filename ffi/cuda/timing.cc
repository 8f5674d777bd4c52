#include "cuda/timing.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/errors.h"
#include "status.h"

namespace esparse::cuda {
namespace {

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

}  // namespace

ffi::ErrorOr<double> TimeGraph(const QueueLaunch& queue, int32_t launches, int32_t replays) {
  cudaStream_t raw_stream = nullptr;
  ESPARSE_CUDA_CALL(cudaStreamCreateWithFlags, &raw_stream, cudaStreamNonBlocking);
  const OwnedStream stream(raw_stream);
  // Once outside a graph: what the library does on the first launch only belongs there, and a
  // kernel that fails is told from a graph that does.
  ESPARSE_RETURN_IF_ERROR(queue(0, stream.get()));
  ESPARSE_CUDA_CALL(cudaStreamSynchronize, stream.get());

  // The mode of XLA's own captures: other threads may go on allocating.
  ESPARSE_CUDA_CALL(cudaStreamBeginCapture, stream.get(), cudaStreamCaptureModeThreadLocal);
  ffi::Error launched = ffi::Error::Success();
  for (int64_t i = 0; i < launches && launched.success(); ++i) {
    launched = queue(i, stream.get());
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

ffi::ErrorOr<double> TimeProduct(const Product& product, int64_t blob_bytes, int64_t copies,
                                 const QueueProduct& queue, const char* name, int32_t launches,
                                 int32_t replays) {
  if (copies < 1 || launches < 1 || replays < 1) {
    return Failure{InvalidArgument("a timing needs at least one copy, launch and replay; got ",
                                   copies, ", ", launches, " and ", replays, ".")};
  }
  const auto queue_one = [&](int64_t i, cudaStream_t stream) {
    Product one = product;
    one.blob = static_cast<const char*>(product.blob) + i % copies * blob_bytes;
    return ToError(queue(one, i == 0, stream), name);
  };
  return TimeGraph(queue_one, launches, replays);
}

}  // namespace esparse::cuda
