// Shapes -> plan: what cuSPARSELt has to be told once, so that a product is a launch and no more.
#ifndef ESPARSE_FFI_CUSPARSELT_PLAN_H_
#define ESPARSE_FFI_CUSPARSELT_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cusparselt/abi.h"
#include "cusparselt/context.h"
#include "cusparselt/handles.h"
#include "cusparselt/library.h"
#include "status.h"

namespace esparse::cusparselt {

// y[rows][out] = x[rows][channels] * W[out][channels]^T, all row-major, sums in float32.
struct Problem {
  int64_t rows, out, channels;
  int type;  // kTypeFloat16 or kTypeBfloat16
};

// Which of the library's kernels, and how it shares out the sum over channels. What an attribute
// may be depends on architecture and version: the library decides, and its refusal is reported.
struct Algorithm {
  int32_t id = -1;              // 0 <= id < Plan::algorithms(); -1: the library's own choice
  int32_t split_k = 0;          // slices of the sum; -1: segment-K; 0: not set
  int32_t split_k_mode = 0;     // SplitKMode; 0: not set
  int32_t split_k_buffers = 0;  // 0: not set
};

// A product on a GPU with all its descriptors, which all who compute it there share: making one
// takes the library 0.15 to 0.4 s of an H200's host, nearly all of it in
// cusparseLtMatmulAlgSelectionInit (0.8.0), and a model has the same few products in every layer.
// It may be run again and again, by any thread: those of a GPU take turns.
class Plan {
 public:
  // The plan of a product by an algorithm on the context's GPU, which is current; made unless there
  // is one. It is destroyed with the last that holds it. Threads that ask for the same meanwhile
  // wait for it; if it cannot be made, the next of them tries.
  static ffi::ErrorOr<std::shared_ptr<const Plan>> Of(SharedContext context, const Problem& problem,
                                                      const Algorithm& algorithm);

  // A plan that is nobody else's. Context and product as for `Of`.
  static ffi::ErrorOr<Plan> Create(SharedContext context, const Problem& problem,
                                   const Algorithm& algorithm);

  // Takes another algorithm for the same product, for a search: 14 us of an H200's host, where a
  // new plan takes 0.15 to 0.4 s. What the plan before held of the host's memory is lost (156 KiB
  // for the first 156 of them). Nobody else may use the plan meanwhile. After a failure it can be
  // changed again, and nothing else.
  ffi::Error Change(const Algorithm& algorithm);

  const Problem& problem() const { return problem_; }
  size_t blob_bytes() const { return blob_bytes_; }
  size_t workspace_bytes() const { return workspace_bytes_; }
  int algorithms() const { return algorithms_; }  // ids are 0 .. algorithms() - 1

  // What the library makes of the algorithm asked for; of its own choice above all.
  ffi::ErrorOr<Algorithm> Chosen() const;

  // Queues the product. All buffers are on the plan's GPU and aligned to kAlignment bytes; without
  // workspace_bytes(), `workspace` is not looked at.
  ffi::Error Run(const void* blob, const void* x, void* y, void* workspace, Stream stream) const;

 private:
  struct Owners {
    Matrix weight, x, y;
    Matmul matmul;
    Selection selection;
    PlanHandle plan;
    // Of the algorithms before. They are not destroyed: that takes what the selection goes on
    // needing (0.8.0 then dies while it plans the next one), so what they hold is lost.
    std::vector<std::unique_ptr<PlanData>> spent;
  };
  // An attribute of the selection that an algorithm set, and what the library had there.
  struct Changed {
    AlgorithmAttribute attribute;
    int before;
  };

  // All but the algorithm. Like the two that follow it takes no lock.
  ffi::Error Describe();
  // Sets what the algorithm says in an untouched selection, and plans.
  ffi::Error Choose(const Algorithm& algorithm);
  // Gives the plan up and undoes the setting; false where the product has to be described anew.
  bool Restore();

  SharedContext context_;
  Problem problem_ = {};
  InContext<Owners> owners_;
  std::vector<Changed> changed_;
  bool restorable_ = false;  // the product is described, and the library told what is in `changed_`
  size_t blob_bytes_ = 0, workspace_bytes_ = 0;
  int algorithms_ = 0;
};

using SharedPlan = std::shared_ptr<const Plan>;

// The library's own compression of a masked dense weight, on the GPU that is current when this is
// made. Move-only.
class Compression {
 public:
  static ffi::ErrorOr<Compression> Create(SharedContext context, int64_t out, int64_t channels,
                                          int type);

  size_t blob_bytes() const { return blob_bytes_; }
  size_t workspace_bytes() const { return workspace_bytes_; }

  // Queues the compression of dense[out][channels].
  ffi::Error Run(const void* dense, void* blob, void* workspace, Stream stream) const;

 private:
  SharedContext context_;
  InContext<Matrix> weight_;
  size_t blob_bytes_ = 0, workspace_bytes_ = 0;
};

// "y[8, 64] = x[8, 128] * W[64, 128]^T in float16", for messages.
std::string TextOf(const Problem& problem);

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_PLAN_H_
