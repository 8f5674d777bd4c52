// Work shared between the calling thread and the threads XLA computes with.
#ifndef ESPARSE_FFI_CPU_PARALLEL_H_
#define ESPARSE_FFI_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace esparse::cpu {

// Calls body(begin, end) for ranges of at most `chunk` that cover [0, total), on the calling thread
// and on helpers from XLA's own pool: no threads of ours, and XLA's settings for them hold.
//
// A handler may itself run on a thread of that pool, so it must not wait for helpers that have not
// started. Ranges are claimed from a counter; the caller claims until none is left and then waits
// only for ranges that are being worked on. A helper that comes late finds nothing to claim, and
// all it touches is the job, which it co-owns.
template <typename Body>
void ParallelFor(::xla::ffi::ThreadPool& pool, int64_t total, int64_t chunk, int64_t threads,
                 const Body& body) {
  if (total <= 0) return;
  const int64_t chunks = (total + chunk - 1) / chunk;
  const int64_t helpers = std::min(threads, chunks) - 1;
  if (helpers < 1) {
    body(int64_t{0}, total);
    return;
  }
  struct Job {
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> finished{0};
    int64_t total, chunk, chunks;
    const Body* body;  // outlives every claimed range

    void Work() {
      for (int64_t i; (i = claimed.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        (*body)(i* chunk, std::min(total, (i + 1) * chunk));
        finished.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto job = std::make_shared<Job>();
  job->total = total;
  job->chunk = chunk;
  job->chunks = chunks;
  job->body = &body;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job] { job->Work(); });
  job->Work();
  while (job->finished.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
}

}  // namespace esparse::cpu

#endif  // ESPARSE_FFI_CPU_PARALLEL_H_
