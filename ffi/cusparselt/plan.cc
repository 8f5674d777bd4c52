#include "cusparselt/plan.h"

#include <iterator>
#include <map>
#include <mutex>
#include <sstream>
#include <tuple>
#include <utility>

namespace esparse::cusparselt {
namespace {

ffi::Error Set(const Library& library, const Handle& handle, const Selection& selection,
               AlgorithmAttribute attribute, int value) {
  ESPARSE_CUSPARSELT_CALL(library, MatmulAlgSetAttribute, handle.get(), selection.get(), attribute,
                          &value, sizeof(value));
  return ffi::Error::Success();
}

ffi::Error Get(const Library& library, const Handle& handle, const Selection& selection,
               AlgorithmAttribute attribute, int* value) {
  ESPARSE_CUSPARSELT_CALL(library, MatmulAlgGetAttribute, handle.get(), selection.get(), attribute,
                          value, sizeof(*value));
  return ffi::Error::Success();
}

// The error with what it happened to.
ffi::Error Explain(const ffi::Error& error, const std::string& what) {
  return ffi::Error(error.errc().value_or(ffi::ErrorCode::kInternal), error.message() + " " + what);
}

// A context by its address: what is alive of its plans holds it, so no other has come there.
using Key =
    std::tuple<uintptr_t, int64_t, int64_t, int64_t, int, int32_t, int32_t, int32_t, int32_t>;

// A product that was asked for. Its mutex is held while its plan is made, the table's is not.
struct Entry {
  std::mutex mutex;
  std::weak_ptr<const Plan> plan;

  bool Expired() {
    const std::lock_guard<std::mutex> lock(mutex);
    return plan.expired();
  }
};

// The entry of a product; a new one takes the place of those whose plans are gone.
std::shared_ptr<Entry> EntryOf(const Key& key) {
  // Never destroyed, so that threads may end after the process has begun to.
  static auto& mutex = *new std::mutex;
  static auto& entries = *new std::map<Key, std::shared_ptr<Entry>>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = entries.find(key);
  if (found != entries.end()) return found->second;
  for (auto each = entries.begin(); each != entries.end();) {
    // Who uses an entry has it from here, so with a count of one nobody does, nor will.
    const bool gone = each->second.use_count() == 1 && each->second->Expired();
    each = gone ? entries.erase(each) : std::next(each);
  }
  return entries[key] = std::make_shared<Entry>();
}

}  // namespace

std::string TextOf(const Problem& problem) {
  std::ostringstream text;
  text << "y[" << problem.rows << ", " << problem.out << "] = x[" << problem.rows << ", "
       << problem.channels << "] * W[" << problem.out << ", " << problem.channels << "]^T in "
       << (problem.type == kTypeFloat16 ? "float16" : "bfloat16");
  return text.str();
}

ffi::ErrorOr<SharedPlan> Plan::Of(SharedContext context, const Problem& problem,
                                  const Algorithm& algorithm) {
  const std::shared_ptr<Entry> entry =
      EntryOf({reinterpret_cast<uintptr_t>(context.get()), problem.rows, problem.out,
               problem.channels, problem.type, algorithm.id, algorithm.split_k,
               algorithm.split_k_mode, algorithm.split_k_buffers});
  const std::lock_guard<std::mutex> lock(entry->mutex);
  SharedPlan plan = entry->plan.lock();
  if (plan == nullptr) {
    ESPARSE_ASSIGN_OR_RETURN(made, Create(std::move(context), problem, algorithm));
    plan = std::make_shared<const Plan>(std::move(made));
    entry->plan = plan;
  }
  return plan;
}

ffi::ErrorOr<Plan> Plan::Create(SharedContext context, const Problem& problem,
                                const Algorithm& algorithm) {
  Plan plan;
  plan.context_ = std::move(context);
  plan.problem_ = problem;
  ESPARSE_RETURN_IF_ERROR(plan.Change(algorithm));
  return ffi::ErrorOr<Plan>(std::move(plan));
}

ffi::Error Plan::Change(const Algorithm& algorithm) {
  const auto change = [&]() -> ffi::Error {
    if (owners_ != nullptr) {
      const auto lock = context_->Lock();
      if (Restore()) return Choose(algorithm);
    }
    owners_ = NothingIn<Owners>(context_);  // outside of the lock, which what was there takes
    const auto lock = context_->Lock();
    ESPARSE_RETURN_IF_ERROR(Describe());
    return Choose(algorithm);
  };
  const ffi::Error error = change();
  if (error.success()) return error;
  std::ostringstream what;
  what << "The product is " << TextOf(problem_) << ", with ";
  if (algorithm.id < 0) {
    what << "the library's own algorithm";
  } else {
    what << "algorithm " << algorithm.id;
  }
  what << ", split_k " << algorithm.split_k << ", split_k_mode " << algorithm.split_k_mode
       << ", split_k_buffers " << algorithm.split_k_buffers << ".";
  return Explain(error, what.str());
}

ffi::Error Plan::Describe() {
  const Library& library = context_->library();
  const Handle& handle = context_->handle();
  changed_.clear();
  restorable_ = false;
  // Without a transpose: x [row, channel] is B read with "op transpose", and y [row, out] is the
  // library's D [out, row] in column order, which is the same bytes.
  ESPARSE_ASSIGN_OR_RETURN(
      weight, MakeSparse(library, handle, problem_.out, problem_.channels, problem_.type));
  owners_->weight = std::move(weight);
  ESPARSE_ASSIGN_OR_RETURN(x, MakeDense(library, handle, problem_.rows, problem_.channels,
                                        problem_.channels, problem_.type, kOrderRow));
  owners_->x = std::move(x);
  ESPARSE_ASSIGN_OR_RETURN(y, MakeDense(library, handle, problem_.out, problem_.rows, problem_.out,
                                        problem_.type, kOrderColumn));
  owners_->y = std::move(y);
  owners_->matmul = std::make_unique<MatmulData>();
  ESPARSE_CUSPARSELT_CALL(library, MatmulDescriptorInit, handle.get(), owners_->matmul.get(),
                          kNonTranspose, kTranspose, owners_->weight.get(), owners_->x.get(),
                          owners_->y.get(), owners_->y.get(), kCompute32F);
  ESPARSE_ASSIGN_OR_RETURN(
      selection, Make<SelectionData>(library.functions().MatmulAlgSelectionDestroy,
                                     [&](SelectionData* data) -> ffi::Error {
                                       ESPARSE_CUSPARSELT_CALL(
                                           library, MatmulAlgSelectionInit, handle.get(), data,
                                           owners_->matmul.get(), kDefaultSelection);
                                       return ffi::Error::Success();
                                     }));
  owners_->selection = std::move(selection);
  ESPARSE_RETURN_IF_ERROR(Get(library, handle, owners_->selection, kConfigMaxId, &algorithms_));
  size_t buffer_bytes = 0;
  ESPARSE_CUSPARSELT_CALL(library, SpMMACompressedSize2, handle.get(), owners_->weight.get(),
                          &blob_bytes_, &buffer_bytes);
  restorable_ = true;
  return ffi::Error::Success();
}

ffi::Error Plan::Choose(const Algorithm& algorithm) {
  const Library& library = context_->library();
  const Handle& handle = context_->handle();
  if (algorithm.id >= algorithms_) {
    return InvalidArgument("cuSPARSELt ", VersionName(library.version()),
                           " has the algorithms 0 to ", algorithms_ - 1,
                           " for this product on this GPU. Their numbers mean ",
                           "nothing on another GPU or version: search again.");
  }
  constexpr int32_t kNotSet = 0;
  const std::tuple<AlgorithmAttribute, int32_t, bool> wanted[] = {
      {kConfigId, algorithm.id, algorithm.id >= 0},
      {kSplitK, algorithm.split_k, algorithm.split_k != kNotSet},
      {kSplitKMode, algorithm.split_k_mode, algorithm.split_k_mode != kNotSet},
      {kSplitKBuffers, algorithm.split_k_buffers, algorithm.split_k_buffers != kNotSet}};
  for (const auto& [attribute, value, asked] : wanted) {
    if (!asked) continue;
    int before = 0;
    const bool told = Get(library, handle, owners_->selection, attribute, &before).success();
    ESPARSE_RETURN_IF_ERROR(Set(library, handle, owners_->selection, attribute, value));
    changed_.push_back({attribute, before});
    restorable_ = restorable_ && told;
  }
  ESPARSE_ASSIGN_OR_RETURN(
      plan,
      Make<PlanData>(library.functions().MatmulPlanDestroy, [&](PlanData* data) -> ffi::Error {
        ESPARSE_CUSPARSELT_CALL(library, MatmulPlanInit, handle.get(), data, owners_->matmul.get(),
                                owners_->selection.get());
        return ffi::Error::Success();
      }));
  owners_->plan = std::move(plan);
  ESPARSE_CUSPARSELT_CALL(library, MatmulGetWorkspace, handle.get(), owners_->plan.get(),
                          &workspace_bytes_);
  return ffi::Error::Success();
}

bool Plan::Restore() {
  if (owners_->plan != nullptr) owners_->spent.emplace_back(owners_->plan.release());
  for (; restorable_ && !changed_.empty(); changed_.pop_back()) {
    restorable_ = Set(context_->library(), context_->handle(), owners_->selection,
                      changed_.back().attribute, changed_.back().before)
                      .success();
  }
  return restorable_;
}

ffi::ErrorOr<Algorithm> Plan::Chosen() const {
  Algorithm chosen;
  const std::pair<AlgorithmAttribute, int32_t*> attributes[] = {
      {kConfigId, &chosen.id},
      {kSplitK, &chosen.split_k},
      {kSplitKMode, &chosen.split_k_mode},
      {kSplitKBuffers, &chosen.split_k_buffers}};
  const auto lock = context_->Lock();
  for (const auto& [attribute, value] : attributes) {
    ESPARSE_RETURN_IF_ERROR(
        Get(context_->library(), context_->handle(), owners_->selection, attribute, value));
  }
  return chosen;
}

ffi::Error Plan::Run(const void* blob, const void* x, void* y, void* workspace,
                     Stream stream) const {
  const float alpha = 1.0f, beta = 0.0f;
  const auto lock = context_->Lock();
  // C is D: with beta = 0 it is not read.
  ESPARSE_CUSPARSELT_CALL(context_->library(), Matmul, context_->handle().get(),
                          owners_->plan.get(), &alpha, blob, x, &beta, y, y,
                          workspace_bytes_ == 0 ? nullptr : workspace, &stream, 1);
  return ffi::Error::Success();
}

ffi::ErrorOr<Compression> Compression::Create(SharedContext context, int64_t out, int64_t channels,
                                              int type) {
  Compression compression;
  compression.context_ = context;
  compression.weight_ = NothingIn<Matrix>(std::move(context));
  const auto build = [&]() -> ffi::Error {
    const Library& vendor = compression.context_->library();
    const Handle& handle = compression.context_->handle();
    const auto lock = compression.context_->Lock();
    ESPARSE_ASSIGN_OR_RETURN(weight, MakeSparse(vendor, handle, out, channels, type));
    *compression.weight_ = std::move(weight);
    ESPARSE_CUSPARSELT_CALL(vendor, SpMMACompressedSize2, handle.get(), compression.weight_->get(),
                            &compression.blob_bytes_, &compression.workspace_bytes_);
    return ffi::Error::Success();
  };
  const ffi::Error error = build();
  if (error.failure()) {
    std::ostringstream what;
    what << "The weight is " << (type == kTypeFloat16 ? "float16" : "bfloat16") << "[" << out
         << ", " << channels << "].";
    return Failure{Explain(error, what.str())};
  }
  return ffi::ErrorOr<Compression>(std::move(compression));
}

ffi::Error Compression::Run(const void* dense, void* blob, void* workspace, Stream stream) const {
  constexpr int kWeightIsA = 1;
  const auto lock = context_->Lock();
  ESPARSE_CUSPARSELT_CALL(context_->library(), SpMMACompress2, context_->handle().get(),
                          weight_->get(), kWeightIsA, kNonTranspose, dense, blob,
                          workspace_bytes_ == 0 ? nullptr : workspace, stream);
  return ffi::Error::Success();
}

}  // namespace esparse::cusparselt
