#include "cusparselt/timing.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "cuda/errors.h"
#include "cuda/timing.h"

namespace esparse::cusparselt {
namespace {

ffi::Error Check(const Candidate& candidate, const Plan& plan, int32_t launches, int32_t replays) {
  if (launches < candidate.copies || replays < 1 || candidate.copies < 1) {
    return InvalidArgument("a timing needs at least one copy of the weight, as many launches as ",
                           "copies, and one replay; got ", candidate.copies, " copies, ", launches,
                           " launches and ", replays, " replays.");
  }
  const int64_t bytes = static_cast<int64_t>(plan.blob_bytes());
  // Between two uses of a copy the others, x and y go through the cache. A single launch is not a
  // time to compare: it shows whether the algorithm computes, and its order of magnitude.
  const Problem& problem = plan.problem();
  const int64_t needed = kLeastBytes - 2 * problem.rows * (problem.channels + problem.out);
  if (launches > 1 && candidate.copies * bytes < needed) {
    return InvalidArgument(candidate.copies, " copies of ", bytes, " bytes may stay in the GPU's ",
                           "cache from one launch to the next; give at least ",
                           (needed + bytes - 1) / bytes, " copies, ", kLeastBytes,
                           " bytes with x and y.");
  }
  if (bytes % kAlignment != 0 && candidate.copies > 1) {
    return InvalidArgument("copies of ", bytes,
                           " bytes cannot lie back to back: the library reads ", "multiples of ",
                           kAlignment, " bytes.");
  }
  if (candidate.workspace_bytes < plan.workspace_bytes()) {
    return InvalidArgument(TextOf(problem), " needs a workspace of ", plan.workspace_bytes(),
                           " bytes; got ", candidate.workspace_bytes, ".");
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

CurrentDevice::~CurrentDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

ffi::Error CurrentDevice::Set(int32_t device) {
  ESPARSE_CUDA_CALL(cudaGetDevice, &before_);
  ESPARSE_CUDA_CALL(cudaSetDevice, device);
  return ffi::Error::Success();
}

ffi::ErrorOr<double> TimeCandidate(const Plan& plan, const Candidate& candidate, int32_t launches,
                                   int32_t replays) {
  ESPARSE_RETURN_IF_ERROR(Check(candidate, plan, launches, replays));

  const auto launch = [&](int64_t i, cudaStream_t stream) {
    const int64_t copy = i % candidate.copies;
    const auto* blob = static_cast<const uint8_t*>(candidate.blobs) + copy * plan.blob_bytes();
    return plan.Run(blob, candidate.x, candidate.y, candidate.workspace, stream);
  };
  return cuda::TimeGraph(launch, launches, replays);
}

}  // namespace esparse::cusparselt
