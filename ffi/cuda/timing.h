// How long kernels take, for the tuner: a CUDA graph of many launches, replayed.
#ifndef ESPARSE_FFI_CUDA_TIMING_H_
#define ESPARSE_FFI_CUDA_TIMING_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

#include "cuda/decode.h"
#include "xla/ffi/api/ffi.h"

namespace esparse {

namespace ffi = ::xla::ffi;

namespace cuda {

// Queues launch number i on the stream.
using QueueLaunch = std::function<ffi::Error(int64_t i, cudaStream_t stream)>;

// Captures `launches` launches on the current device into a graph, on a stream of its own, and
// replays it. Launch 0 runs once by itself before: what a library does on the first launch only
// belongs outside a graph, and a kernel that fails is told from a graph that does.
//
// Returns the median over the replays, in microseconds for one launch.
ffi::ErrorOr<double> TimeGraph(const QueueLaunch& queue, int32_t launches, int32_t replays);

// Queues a product; `first` is the one of launch 0.
using QueueProduct =
    std::function<cudaError_t(const Product& product, bool first, cudaStream_t stream)>;

// A product with weights that lie one behind the other, taken in turn; `name` as ToError has it.
ffi::ErrorOr<double> TimeProduct(const Product& product, int64_t blob_bytes, int64_t copies,
                                 const QueueProduct& queue, const char* name, int32_t launches,
                                 int32_t replays);

}  // namespace cuda
}  // namespace esparse

#endif  // ESPARSE_FFI_CUDA_TIMING_H_
