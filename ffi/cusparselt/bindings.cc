#include "cusparselt/bindings.h"

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "cusparselt/context.h"
#include "cusparselt/library.h"
#include "cusparselt/plan.h"
#include "cusparselt/platform.h"
#ifdef ESPARSE_CUDA
#include "cusparselt/timing.h"
#endif

namespace py = pybind11;

namespace esparse::cusparselt {
namespace {

// The value, or RuntimeError. Python is outside XLA: here errors may be exceptions.
template <typename T>
T ValueOrThrow(ffi::ErrorOr<T> result) {
  if (!result.has_value()) throw std::runtime_error(result.error().message());
  return std::move(*result);
}

void ThrowIfError(const ffi::Error& error) {
  if (error.failure()) throw std::runtime_error(error.message());
}

const char* Soname(bool on_host) { return on_host ? OnHost::kLibrary : OnCuda::kLibrary; }

SharedLibrary LoadedLibrary(bool on_host) {
  return std::make_shared<const Library>(ValueOrThrow(Library::Loaded(Soname(on_host))));
}

int TypeNamed(const std::string& dtype) {
  if (dtype == "float16") return kTypeFloat16;
  if (dtype == "bfloat16") return kTypeBfloat16;
  throw std::invalid_argument("cuSPARSELt is called for float16 and bfloat16; got " + dtype + ".");
}

py::tuple Open(const std::string& path, bool on_host) {
  Library library = [&] {
    const py::gil_scoped_release release;  // reading 200 MB may take a while
    return ValueOrThrow(Library::Open(path, Soname(on_host)));
  }();
  return py::make_tuple(library.version(), library.path());
}

// The context on the GPU that is current, or the host's. A GPU's is kept for the rest of the
// process: while a computation is traced no plan holds it yet, and each question would make one
// anew.
SharedContext CurrentContext(bool on_host) {
  const SharedLibrary library = LoadedLibrary(on_host);
  const int device = ValueOrThrow(on_host ? OnHost::Device(*library) : OnCuda::Device(*library));
  SharedContext context = ValueOrThrow(Context::On(library, device));
  if (on_host) return context;
  static auto& mutex = *new std::mutex;
  static auto& kept = *new std::set<SharedContext>;  // never destroyed: the driver may be gone
  const std::lock_guard<std::mutex> lock(mutex);
  kept.insert(context);
  return context;
}

// The plan of a product on the GPU that is current, or the host's. Of the GPUs' the last kKeptPlans
// that were asked for are kept: tracing asks before an executable holds the plan.
SharedPlan CurrentPlan(bool on_host, const Problem& problem, const Algorithm& algorithm) {
  constexpr size_t kKeptPlans = 64;
  SharedPlan plan = ValueOrThrow(Plan::Of(CurrentContext(on_host), problem, algorithm));
  if (on_host) return plan;
  static auto& mutex = *new std::mutex;
  static auto& kept = *new std::list<SharedPlan>;  // the last first; never destroyed, as above
  SharedPlan dropped;                              // destroyed after the mutex is free again
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find(kept.begin(), kept.end(), plan);
  if (found != kept.end()) {
    kept.splice(kept.begin(), kept, found);
    return plan;
  }
  kept.push_front(plan);
  if (kept.size() > kKeptPlans) {
    dropped = std::move(kept.back());
    kept.pop_back();
  }
  return plan;
}

int HostArchitecture() { return ValueOrThrow(OnHost::Architecture(*LoadedLibrary(true))); }

// What Python is told of a plan.
struct PlanFacts {
  explicit PlanFacts(const Plan& plan)
      : algorithms(plan.algorithms()),
        workspace_bytes(plan.workspace_bytes()),
        blob_bytes(plan.blob_bytes()) {
    const ffi::ErrorOr<Algorithm> answer = plan.Chosen();
    if (answer.has_value()) chosen = *answer;
  }

  py::dict Dict() const {
    py::dict facts;
    facts["algorithms"] = algorithms;
    facts["workspace_bytes"] = workspace_bytes;
    facts["blob_bytes"] = blob_bytes;
    facts["algorithm"] = chosen.id;
    facts["split_k"] = chosen.split_k;
    facts["split_k_mode"] = chosen.split_k_mode;
    facts["split_k_buffers"] = chosen.split_k_buffers;
    return facts;
  }

  int algorithms;
  size_t workspace_bytes, blob_bytes;
  Algorithm chosen;  // stays empty if the library does not tell
};

py::dict DescribePlan(int64_t rows, int64_t out, int64_t channels, const std::string& dtype,
                      int32_t algorithm, int32_t split_k, int32_t split_k_mode,
                      int32_t split_k_buffers, bool on_host) {
  const Problem problem = {rows, out, channels, TypeNamed(dtype)};
  const Algorithm wanted = {algorithm, split_k, split_k_mode, split_k_buffers};
  const PlanFacts facts = [&] {
    const py::gil_scoped_release release;  // to the end of the plan, which waits for its turn
    return PlanFacts(*CurrentPlan(on_host, problem, wanted));
  }();
  return facts.Dict();
}

// The algorithms of one product, one after the other, on one GPU or on the host. For one thread at
// a time.
class AlgorithmSearch {
 public:
  AlgorithmSearch(int64_t rows, int64_t out, int64_t channels, const std::string& dtype,
                  int32_t device, bool on_host)
      : on_host_(on_host), device_(device), problem_({rows, out, channels, TypeNamed(dtype)}) {}

  // Takes an algorithm; what was taken before is gone, even where this fails.
  py::dict Take(int32_t algorithm, int32_t split_k, int32_t split_k_mode, int32_t split_k_buffers) {
    const Algorithm wanted = {algorithm, split_k, split_k_mode, split_k_buffers};
    taken_ = false;
    const PlanFacts facts = [&] {
      const py::gil_scoped_release release;
#ifdef ESPARSE_CUDA  // else nothing is timed, and the plan is for the GPU that is current
      CurrentDevice current;
      if (!on_host_) ThrowIfError(current.Set(device_));
#endif
      if (plan_.has_value()) {
        ThrowIfError(plan_->Change(wanted));
      } else {
        plan_ = ValueOrThrow(Plan::Create(CurrentContext(on_host_), problem_, wanted));
      }
      return PlanFacts(*plan_);
    }();
    taken_ = true;
    return facts.Dict();
  }

#ifdef ESPARSE_CUDA
  // Times what was taken last; see TimeCandidate.
  double Time(uintptr_t x, uintptr_t blobs, int64_t copies, uintptr_t y, uintptr_t workspace,
              size_t workspace_bytes, int32_t launches, int32_t replays) const {
    if (!taken_) throw std::runtime_error("there is no algorithm to time: take one first.");
    Candidate candidate;
    candidate.x = reinterpret_cast<const void*>(x);
    candidate.blobs = reinterpret_cast<const void*>(blobs);
    candidate.copies = copies;
    candidate.y = reinterpret_cast<void*>(y);
    candidate.workspace = reinterpret_cast<void*>(workspace);
    candidate.workspace_bytes = workspace_bytes;
    const py::gil_scoped_release release;
    CurrentDevice current;
    ThrowIfError(current.Set(device_));
    return ValueOrThrow(TimeCandidate(*plan_, candidate, launches, replays));
  }
#endif

 private:
  bool on_host_;
  int32_t device_;
  Problem problem_;
  std::optional<Plan> plan_;
  bool taken_ = false;
};

py::tuple CompressedBytes(int64_t out, int64_t channels, const std::string& dtype, bool on_host) {
  const int type = TypeNamed(dtype);
  const auto [blob_bytes, workspace_bytes] = [&] {
    const py::gil_scoped_release release;
    const auto compression =
        ValueOrThrow(Compression::Create(CurrentContext(on_host), out, channels, type));
    return std::make_pair(compression.blob_bytes(), compression.workspace_bytes());
  }();
  return py::make_tuple(blob_bytes, workspace_bytes);
}

}  // namespace

void Bind(py::module_& module) {
  using py::arg;
  module.def("cusparselt_open", &Open, arg("path"), arg("on_host") = false);
  module.def("cusparselt_host_architecture", &HostArchitecture);
  module.def("cusparselt_plan", &DescribePlan, py::kw_only(), arg("rows"), arg("out"),
             arg("channels"), arg("dtype"), arg("algorithm"), arg("split_k"), arg("split_k_mode"),
             arg("split_k_buffers"), arg("on_host"));
  module.def("cusparselt_compressed_bytes", &CompressedBytes, py::kw_only(), arg("out"),
             arg("channels"), arg("dtype"), arg("on_host"));
  py::class_<AlgorithmSearch> search(module, "CusparseltSearch");
  search.def(py::init<int64_t, int64_t, int64_t, const std::string&, int32_t, bool>(),
             py::kw_only(), arg("rows"), arg("out"), arg("channels"), arg("dtype"), arg("device"),
             arg("on_host"));
  search.def("take", &AlgorithmSearch::Take, py::kw_only(), arg("algorithm"), arg("split_k"),
             arg("split_k_mode"), arg("split_k_buffers"));
#ifdef ESPARSE_CUDA
  search.def("time", &AlgorithmSearch::Time, py::kw_only(), arg("x"), arg("blobs"), arg("copies"),
             arg("y"), arg("workspace"), arg("workspace_bytes"), arg("launches"), arg("replays"));
#endif
}

}  // namespace esparse::cusparselt
