// Times one algorithm on one GPU, for the search of the best. The only part of this folder that
// needs the CUDA runtime.
#ifndef ESPARSE_FFI_CUSPARSELT_TIMING_H_
#define ESPARSE_FFI_CUSPARSELT_TIMING_H_

#include <cstddef>
#include <cstdint>

#include "cusparselt/plan.h"
#include "status.h"

namespace esparse::cusparselt {

// What the copies of the weight, x and y must come to. The caches of the largest GPUs hold some 60
// MB (L2 of an H200): a weight that is still there from the launch before would be read from the
// cache.
constexpr int64_t kLeastBytes = 300'000'000;

// Makes a GPU current, and the one before again at the end.
class CurrentDevice {
 public:
  ~CurrentDevice();
  ffi::Error Set(int32_t device);

 private:
  int before_ = -1;
};

// Memory on the GPU, all of it aligned to kAlignment bytes.
struct Candidate {
  const void* x;
  const void* blobs;  // `copies` of them, back to back
  int64_t copies;
  void* y;
  void* workspace;
  size_t workspace_bytes;
};

// Median time of a launch on the plan's GPU, which is current, in microseconds: `launches` of them,
// which take the copies in turn, are captured in a CUDA graph on a stream of their own, and the
// graph is replayed `replays` times after two more. Waits for the GPU.
ffi::ErrorOr<double> TimeCandidate(const Plan& plan, const Candidate& candidate, int32_t launches,
                                   int32_t replays);

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_TIMING_H_
