// A stand-in of cuSPARSELt for tests: the functions that abi.h declares, on the host.
//
// It keeps the rules of the real one that matter here: the contract of sizes and alignments, the
// range of algorithm ids and of split-K by architecture, and that an object is made before it is
// used and destroyed once. It computes honestly: what it compresses it lays out like sm_90 does (as
// sparse/blob.py writes it down; sizes that are no multiples of 64 padded to them), and it
// multiplies from those bytes, by the orders and leading dimensions it was given. The functions
// named esparse_fake_* let a test look inside, count, and make calls fail.
//
// Built by the tests with the C++ compiler alone, under a soname of its own or the real one:
//   c++ -std=c++17 -shared -fPIC -I ffi -Wl,-soname,NAME fake_cusparselt.cc -o NAME
// FAKE_VERSION=701 makes it an older one, FAKE_WITHOUT_COMPRESS one that lacks a function.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/scalar.h"
#include "cusparselt/abi.h"

#ifndef FAKE_VERSION
#define FAKE_VERSION 800
#endif

namespace esparse::cusparselt {
namespace {

constexpr Status kNotInitialized = 1, kInvalidValue = 3, kNotSupported = 10;

struct MatrixFacts {
  int64_t rows, columns, ld;
  int type, order;
  bool sparse;
};

struct MatmulFacts {
  int operation_a, operation_b;
  const MatrixData *a, *b, *d;
};

struct SelectionFacts {
  const MatmulData* matmul;
  int id, split_k, mode, buffers;
  bool spoilt = false;  // a plan made from it was destroyed
};

struct PlanFacts {
  const SelectionData* of;
  SelectionFacts selection;
  MatmulFacts matmul;
  MatrixFacts a, b, d;
};

// All there is to know of this process's use of the library.
struct World {
  std::mutex mutex;
  std::set<const void*> handles;
  std::map<const void*, MatrixFacts> matrices;
  std::map<const void*, MatmulFacts> matmuls;  // never destroyed: the interface has no call for it
  std::map<const void*, SelectionFacts> selections;
  std::map<const void*, PlanFacts> plans;
  std::map<const void*, const void*> handle_of;  // of a matrix, selection or plan
  std::map<const void*, int64_t> inside;         // calls under way, by their handle
  int64_t overlaps = 0;                          // calls that began inside another of their handle
  std::map<std::string, int64_t> calls;
  std::map<std::string, int64_t> under_way, most_under_way;  // of each function
  std::map<std::string, int64_t> milliseconds;               // what a call takes, at least
  std::map<std::string, int64_t> settings;
  std::map<std::string, int64_t> last;
  std::string failing_call;
  Status failing_status = 0;
  int64_t failing_skip = 0;
};

World& TheWorld() {
  static World* world = new World;
  return *world;
}

thread_local int current_device = 0;

int64_t Setting(const World& world, const std::string& name) {
  static const std::map<std::string, int64_t> kDefaults = {
      {"architecture", 90},       {"algorithms", 8}, {"workspace", 0},
      {"compress_workspace", 48}, {"scrambled", 0},  {"default_algorithm", 2}};
  const auto found = world.settings.find(name);
  return found != world.settings.end() ? found->second : kDefaults.at(name);
}

// A call with a handle, or with what was made by one, from its begin to its end. The real library
// has no lock in it, so here too the callers have to see to it that a handle's calls do not
// overlap.
class Call {
 public:
  Call(const char* name, const void* object) : name_(name) {
    World& world = TheWorld();
    std::unique_lock<std::mutex> lock(world.mutex);
    const auto maker = world.handle_of.find(object);
    handle_ = maker != world.handle_of.end() ? maker->second : object;
    if (world.inside[handle_]++ != 0) ++world.overlaps;
    int64_t& most = world.most_under_way[name];
    most = std::max(most, ++world.under_way[name]);
    const auto slow = world.milliseconds.find(name);
    const int64_t milliseconds = slow != world.milliseconds.end() ? slow->second : 0;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  }
  Call(const Call&) = delete;
  ~Call() {
    World& world = TheWorld();
    const std::lock_guard<std::mutex> lock(world.mutex);
    --world.under_way[name_];
    if (--world.inside[handle_] == 0) world.inside.erase(handle_);
  }

 private:
  const char* name_;
  const void* handle_;
};

// Counts a call, under the world's lock; fails it if a test asked for that.
Status Enter(World& world, const char* call) {
  ++world.calls[call];
  if (world.failing_call != call) return kSuccess;
  if (world.failing_skip-- > 0) return kSuccess;
  return world.failing_status;
}

#define FAKE_ENTER(call, object)                  \
  const Call under_way(call, object);             \
  World& world = TheWorld();                      \
  std::unique_lock<std::mutex> lock(world.mutex); \
  if (const Status failed = Enter(world, call); failed != kSuccess) return failed

#define FAKE_REQUIRE(condition, status) \
  if (!(condition)) return status

bool Is16Bit(int type) { return type == kTypeFloat16 || type == kTypeBfloat16; }

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// ---- the compressed weight

struct Layout {
  int64_t out, channels;  // padded
  bool scrambled;

  int64_t values() const { return out * channels / 2; }
  int64_t bytes() const { return out * channels / 8 * 9; }
  int64_t nibble(int64_t row, int64_t group) const {
    if (scrambled) return row * channels / 4 + (channels / 4 - 1 - group);
    return (row / 64 * (channels / 64) + group / 16) * 1024 + 512 * (group >> 3 & 1) +
           128 * (row >> 4 & 3) + 16 * (row & 7) + 4 * (group & 3) + 2 * (group >> 2 & 1) +
           (row >> 3 & 1);
  }
};

Layout LayoutOf(const World& world, const MatrixFacts& weight) {
  return {RoundUp(weight.rows, 64), RoundUp(weight.columns, 64), Setting(world, "scrambled") != 0};
}

void CompressInto(const MatrixFacts& weight, const Layout& layout, const uint16_t* dense,
                  uint8_t* blob) {
  auto* values = reinterpret_cast<uint16_t*>(blob);
  uint8_t* metadata = blob + 2 * layout.values();
  std::fill(blob, blob + layout.bytes(), 0);
  for (int64_t row = 0; row < layout.out; ++row) {
    for (int64_t group = 0; group < layout.channels / 4; ++group) {
      int positions[4], kept = 0;
      uint16_t found[4] = {};
      for (int p = 0; p < 4 && row < weight.rows && 4 * group < weight.columns; ++p) {
        const uint16_t bits = dense[row * weight.ld + 4 * group + p];
        found[p] = bits;
        if ((bits & 0x7fff) != 0 && kept < 2) positions[kept++] = p;
      }
      for (int p = 0; p < 4 && kept < 2; ++p) {
        if ((found[p] & 0x7fff) == 0) {
          found[p] = 0;
          positions[kept++] = p;
        }
      }
      std::sort(positions, positions + 2);
      for (int i = 0; i < 2; ++i) {
        values[row * layout.channels / 2 + 2 * group + i] = found[positions[i]];
      }
      const int64_t nibble = layout.nibble(row, group);
      metadata[nibble / 2] |= (positions[0] | positions[1] << 2) << (4 * (nibble % 2));
    }
  }
}

float Widen16(uint16_t bits, int type) {
  return type == kTypeFloat16 ? cpu::Widen(cpu::Float16{bits}) : cpu::Widen(cpu::Bfloat16{bits});
}

uint16_t Narrow16(float value, int type) {
  cpu::Float16 half;
  cpu::Bfloat16 brain;
  cpu::Narrow(value, &half);
  cpu::Narrow(value, &brain);
  return type == kTypeFloat16 ? half.bits : brain.bits;
}

// Where element (row, column) of a matrix stands.
int64_t At(const MatrixFacts& matrix, int64_t row, int64_t column) {
  return matrix.order == kOrderRow ? row * matrix.ld + column : column * matrix.ld + row;
}

void Multiply(const PlanFacts& plan, const Layout& layout, const uint8_t* blob, const uint16_t* b,
              float alpha, float beta, const uint16_t* c, uint16_t* d, float* partial) {
  const auto* values = reinterpret_cast<const uint16_t*>(blob);
  const uint8_t* metadata = blob + 2 * layout.values();
  const bool transpose = plan.matmul.operation_b == kTranspose;
  const int64_t kept = plan.a.columns / 2;
  const int64_t slices = std::max(plan.selection.split_k, 1);
  for (int64_t row = 0; row < plan.d.rows; ++row) {
    for (int64_t column = 0; column < plan.d.columns; ++column) {
      float sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice) {
        float part = 0;
        for (int64_t j = kept * slice / slices; j < kept * (slice + 1) / slices; ++j) {
          const int64_t nibble = layout.nibble(row, j / 2);
          const int position = metadata[nibble / 2] >> (4 * (nibble % 2)) >> (2 * (j % 2)) & 3;
          const int64_t channel = j / 2 * 4 + position;
          const uint16_t x =
              b[transpose ? At(plan.b, column, channel) : At(plan.b, channel, column)];
          part +=
              Widen16(values[row * layout.channels / 2 + j], plan.a.type) * Widen16(x, plan.b.type);
        }
        if (slice + 1 < slices) {  // through the workspace, as a real split-K goes
          float& kept_part = partial[(slice * plan.d.rows + row) * plan.d.columns + column];
          kept_part = part;
          part = kept_part;
        }
        sum += part;
      }
      const int64_t at = At(plan.d, row, column);
      const float before = beta == 0 ? 0 : beta * Widen16(c[at], plan.d.type);
      d[at] = Narrow16(alpha * sum + before, plan.d.type);
    }
  }
}

size_t WorkspaceOf(const World& world, const PlanFacts& plan) {
  const int64_t slices = std::max(plan.selection.split_k, 1) - 1;
  return Setting(world, "workspace") + 4 * slices * plan.d.rows * plan.d.columns;
}

Status MakeMatrix(World& world, const HandleData* handle, MatrixData* matrix,
                  const MatrixFacts& facts, uint32_t alignment, int64_t unit) {
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(alignment == 16, kInvalidValue);
  FAKE_REQUIRE(Is16Bit(facts.type), kNotSupported);
  FAKE_REQUIRE(facts.order == kOrderRow || facts.order == kOrderColumn, kInvalidValue);
  FAKE_REQUIRE(facts.rows > 0 && facts.columns > 0, kInvalidValue);
  FAKE_REQUIRE(facts.rows % unit == 0 && facts.columns % unit == 0, kNotSupported);
  const int64_t least = facts.order == kOrderRow ? facts.columns : facts.rows;
  FAKE_REQUIRE(facts.ld >= least && facts.ld % 8 == 0, kInvalidValue);
  FAKE_REQUIRE(world.matrices.emplace(matrix, facts).second, kInvalidValue);
  world.handle_of[matrix] = handle;
  return kSuccess;
}

}  // namespace
}  // namespace esparse::cusparselt

using namespace esparse::cusparselt;  // NOLINT: what follows is the library's own interface

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

FAKE_EXPORT Status cusparseLtGetProperty(int property, int* value) {
  const int numbers[] = {FAKE_VERSION / 1000000, FAKE_VERSION % 1000000 / 100, FAKE_VERSION % 100};
  if (property < 0 || property > 2) return kInvalidValue;
  *value = numbers[property];
  return kSuccess;
}

FAKE_EXPORT const char* cusparseLtGetErrorName(Status status) {
  switch (status) {
    case kNotInitialized:
      return "CUSPARSE_STATUS_NOT_INITIALIZED";
    case kInvalidValue:
      return "CUSPARSE_STATUS_INVALID_VALUE";
    case kNotSupported:
      return "CUSPARSE_STATUS_NOT_SUPPORTED";
  }
  return "CUSPARSE_STATUS_OTHER";
}

FAKE_EXPORT const char* cusparseLtGetErrorString(Status status) {
  switch (status) {
    case kNotInitialized:
      return "initialization error";
    case kInvalidValue:
      return "invalid value";
    case kNotSupported:
      return "operation not supported";
  }
  return "another error";
}

FAKE_EXPORT Status cusparseLtInit(HandleData* handle) {
  FAKE_ENTER("Init", handle);
  FAKE_REQUIRE(world.handles.insert(handle).second, kInvalidValue);
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtDestroy(const HandleData* handle) {
  FAKE_ENTER("Destroy", handle);
  FAKE_REQUIRE(world.handles.erase(handle), kNotInitialized);
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtDenseDescriptorInit(const HandleData* handle, MatrixData* matrix,
                                                 int64_t rows, int64_t columns, int64_t ld,
                                                 uint32_t alignment, int type, int order) {
  FAKE_ENTER("DenseDescriptorInit", handle);
  return MakeMatrix(world, handle, matrix, {rows, columns, ld, type, order, false}, alignment, 8);
}

FAKE_EXPORT Status cusparseLtStructuredDescriptorInit(const HandleData* handle, MatrixData* matrix,
                                                      int64_t rows, int64_t columns, int64_t ld,
                                                      uint32_t alignment, int type, int order,
                                                      int sparsity) {
  FAKE_ENTER("StructuredDescriptorInit", handle);
  FAKE_REQUIRE(sparsity == kHalfSparse, kInvalidValue);
  return MakeMatrix(world, handle, matrix, {rows, columns, ld, type, order, true}, alignment, 16);
}

FAKE_EXPORT Status cusparseLtMatDescriptorDestroy(const MatrixData* matrix) {
  FAKE_ENTER("MatDescriptorDestroy", matrix);
  FAKE_REQUIRE(world.matrices.erase(matrix), kInvalidValue);
  world.handle_of.erase(matrix);
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmulDescriptorInit(const HandleData* handle, MatmulData* matmul,
                                                  int operation_a, int operation_b,
                                                  const MatrixData* a, const MatrixData* b,
                                                  const MatrixData* c, const MatrixData* d,
                                                  int compute_type) {
  FAKE_ENTER("MatmulDescriptorInit", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(world.matrices.count(a) && world.matrices.count(b) && world.matrices.count(c) &&
                   world.matrices.count(d),
               kInvalidValue);
  FAKE_REQUIRE(compute_type == kCompute32F, kNotSupported);
  const MatrixFacts &weight = world.matrices[a], &x = world.matrices[b], &y = world.matrices[d];
  FAKE_REQUIRE(weight.sparse && !x.sparse && !y.sparse && c == d, kNotSupported);
  FAKE_REQUIRE(operation_a == kNonTranspose && weight.order == kOrderRow, kNotSupported);
  const bool transpose = operation_b == kTranspose;
  FAKE_REQUIRE((transpose ? x.columns : x.rows) == weight.columns, kInvalidValue);
  FAKE_REQUIRE((transpose ? x.rows : x.columns) == y.columns && y.rows == weight.rows,
               kInvalidValue);
  FAKE_REQUIRE(x.type == weight.type && y.type == weight.type, kNotSupported);
  world.matmuls[matmul] = {operation_a, operation_b, a, b, d};
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmulAlgSelectionInit(const HandleData* handle,
                                                    SelectionData* selection,
                                                    const MatmulData* matmul, int algorithm) {
  FAKE_ENTER("MatmulAlgSelectionInit", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(world.matmuls.count(matmul) && algorithm == kDefaultSelection, kInvalidValue);
  const SelectionFacts facts = {matmul, static_cast<int>(Setting(world, "default_algorithm")), 1,
                                kOneKernel, 0};
  FAKE_REQUIRE(world.selections.emplace(selection, facts).second, kInvalidValue);
  world.handle_of[selection] = handle;
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmulAlgSelectionDestroy(const SelectionData* selection) {
  FAKE_ENTER("MatmulAlgSelectionDestroy", selection);
  FAKE_REQUIRE(world.selections.erase(selection), kInvalidValue);
  world.handle_of.erase(selection);
  // What was given up without being destroyed is not to be destroyed from here on.
  for (auto plan = world.plans.begin(); plan != world.plans.end();) {
    if (plan->second.of != selection) {
      ++plan;
      continue;
    }
    world.handle_of.erase(plan->first);
    plan = world.plans.erase(plan);
  }
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmulAlgSetAttribute(const HandleData* handle,
                                                   SelectionData* selection, int attribute,
                                                   const void* data, size_t bytes) {
  FAKE_ENTER("MatmulAlgSetAttribute", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  const auto found = world.selections.find(selection);
  FAKE_REQUIRE(found != world.selections.end() && bytes == sizeof(int), kInvalidValue);
  int value;
  std::memcpy(&value, data, sizeof(value));
  SelectionFacts& facts = found->second;
  const bool hopper = Setting(world, "architecture") == 90;
  const int64_t channels = world.matrices[world.matmuls[facts.matmul].a].columns;
  switch (attribute) {
    case kConfigId:
      FAKE_REQUIRE(value >= 0 && value < Setting(world, "algorithms"), kInvalidValue);
      facts.id = value;
      return kSuccess;
    case kSplitK:
      FAKE_REQUIRE(hopper ? value == 1 || value == -1 : value >= 1 && value <= channels,
                   kNotSupported);
      facts.split_k = value;
      return kSuccess;
    case kSplitKMode:
      FAKE_REQUIRE(value == kOneKernel || value == kTwoKernels, kInvalidValue);
      facts.mode = value;
      return kSuccess;
    case kSplitKBuffers:
      FAKE_REQUIRE(hopper ? value == 0 : value > 0 && value < facts.split_k, kInvalidValue);
      facts.buffers = value;
      return kSuccess;
  }
  return kInvalidValue;
}

FAKE_EXPORT Status cusparseLtMatmulAlgGetAttribute(const HandleData* handle,
                                                   const SelectionData* selection, int attribute,
                                                   void* data, size_t bytes) {
  FAKE_ENTER("MatmulAlgGetAttribute", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  const auto found = world.selections.find(selection);
  FAKE_REQUIRE(found != world.selections.end() && bytes == sizeof(int), kInvalidValue);
  const SelectionFacts& facts = found->second;
  const std::map<int, int> values = {{kConfigId, facts.id},
                                     {kConfigMaxId, static_cast<int>(Setting(world, "algorithms"))},
                                     {kSplitK, facts.split_k},
                                     {kSplitKMode, facts.mode},
                                     {kSplitKBuffers, facts.buffers}};
  FAKE_REQUIRE(values.count(attribute), kInvalidValue);
  std::memcpy(data, &values.at(attribute), sizeof(int));
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmulPlanInit(const HandleData* handle, PlanData* plan,
                                            const MatmulData* matmul,
                                            const SelectionData* selection) {
  FAKE_ENTER("MatmulPlanInit", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(world.matmuls.count(matmul) && world.selections.count(selection), kInvalidValue);
  FAKE_REQUIRE(!world.selections[selection].spoilt, kInvalidValue);  // where 0.8.0 dies
  const MatmulFacts& facts = world.matmuls[matmul];
  const bool made = world.plans
                        .emplace(plan, PlanFacts{selection, world.selections[selection], facts,
                                                 world.matrices[facts.a], world.matrices[facts.b],
                                                 world.matrices[facts.d]})
                        .second;
  FAKE_REQUIRE(made, kInvalidValue);
  world.handle_of[plan] = handle;
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmulPlanDestroy(const PlanData* plan) {
  FAKE_ENTER("MatmulPlanDestroy", plan);
  FAKE_REQUIRE(world.plans.count(plan), kInvalidValue);
  const auto selection = world.selections.find(world.plans.at(plan).of);
  if (selection != world.selections.end()) selection->second.spoilt = true;
  world.plans.erase(plan);
  world.handle_of.erase(plan);
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmulGetWorkspace(const HandleData* handle, const PlanData* plan,
                                                size_t* bytes) {
  FAKE_ENTER("MatmulGetWorkspace", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(world.plans.count(plan), kInvalidValue);
  *bytes = WorkspaceOf(world, world.plans.at(plan));
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtMatmul(const HandleData* handle, const PlanData* plan,
                                    const void* alpha, const void* a, const void* b,
                                    const void* beta, const void* c, void* d, void* workspace,
                                    Stream* streams, int32_t num_streams) {
  FAKE_ENTER("Matmul", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(world.plans.count(plan) && num_streams == 1, kInvalidValue);
  const PlanFacts facts = world.plans.at(plan);
  FAKE_REQUIRE(world.matrices.count(facts.matmul.a) && world.matrices.count(facts.matmul.b) &&
                   world.matrices.count(facts.matmul.d),
               kInvalidValue);
  for (const void* address : {a, b, c, static_cast<const void*>(d)}) {
    FAKE_REQUIRE(address != nullptr && reinterpret_cast<uintptr_t>(address) % 16 == 0,
                 kInvalidValue);
  }
  const Layout layout = LayoutOf(world, facts.a);
  const size_t workspace_bytes = WorkspaceOf(world, facts);
  FAKE_REQUIRE(workspace_bytes == 0 || workspace != nullptr, kInvalidValue);
  world.last = {{"algorithm", facts.selection.id},
                {"split_k", facts.selection.split_k},
                {"split_k_mode", facts.selection.mode},
                {"split_k_buffers", facts.selection.buffers},
                {"rows", facts.d.columns},
                {"stream", reinterpret_cast<int64_t>(streams[0])}};
  lock.unlock();  // so that calls with other handles compute meanwhile
  if (workspace_bytes != 0) std::memset(workspace, 0xff, workspace_bytes);
  Multiply(facts, layout, static_cast<const uint8_t*>(a), static_cast<const uint16_t*>(b),
           *static_cast<const float*>(alpha), *static_cast<const float*>(beta),
           static_cast<const uint16_t*>(c), static_cast<uint16_t*>(d),
           static_cast<float*>(workspace));
  return kSuccess;
}

FAKE_EXPORT Status cusparseLtSpMMACompressedSize2(const HandleData* handle,
                                                  const MatrixData* matrix, size_t* bytes,
                                                  size_t* buffer_bytes) {
  FAKE_ENTER("SpMMACompressedSize2", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(world.matrices.count(matrix) && world.matrices[matrix].sparse, kInvalidValue);
  *bytes = LayoutOf(world, world.matrices[matrix]).bytes();
  *buffer_bytes = Setting(world, "compress_workspace");
  return kSuccess;
}

#ifndef FAKE_WITHOUT_COMPRESS
FAKE_EXPORT Status cusparseLtSpMMACompress2(const HandleData* handle, const MatrixData* matrix,
                                            int is_sparse_a, int operation, const void* dense,
                                            void* compressed, void* buffer, Stream) {
  FAKE_ENTER("SpMMACompress2", handle);
  FAKE_REQUIRE(world.handles.count(handle), kNotInitialized);
  FAKE_REQUIRE(world.matrices.count(matrix) && world.matrices[matrix].sparse, kInvalidValue);
  FAKE_REQUIRE(is_sparse_a == 1 && operation == kNonTranspose, kNotSupported);
  const int64_t buffer_bytes = Setting(world, "compress_workspace");
  FAKE_REQUIRE(buffer_bytes == 0 || buffer != nullptr, kInvalidValue);
  if (buffer_bytes != 0) std::memset(buffer, 0xff, buffer_bytes);
  CompressInto(world.matrices[matrix], LayoutOf(world, world.matrices[matrix]),
               static_cast<const uint16_t*>(dense), static_cast<uint8_t*>(compressed));
  return kSuccess;
}
#endif

// What is declared in abi.h is what is defined here.
#ifndef FAKE_WITHOUT_COMPRESS
#define FAKE_SAME(result, name, parameters) \
  static_assert(std::is_same_v<decltype(&cusparseLt##name), decltype(Functions::name)>);
ESPARSE_CUSPARSELT_FUNCTIONS(FAKE_SAME)
#endif

// ---- for tests

FAKE_EXPORT int esparse_fake_architecture() {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  return static_cast<int>(Setting(world, "architecture"));
}

// The device that is current in this thread, and another instead.
FAKE_EXPORT int esparse_fake_device() { return current_device; }
FAKE_EXPORT void esparse_fake_set_device(int device) { current_device = device; }

// How often a function was called, by its name without cusparseLt.
FAKE_EXPORT int64_t esparse_fake_calls(const char* call) {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  return world.calls[call];
}

// How many calls of a function were under way at once, at the most.
FAKE_EXPORT int64_t esparse_fake_at_once(const char* call) {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  return world.most_under_way[call];
}

// How many calls began while another with the same handle, or with what was made by it, had not
// ended, since the process began.
FAKE_EXPORT int64_t esparse_fake_overlaps() {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  return world.overlaps;
}

// How many objects of a kind there are: "handle", "matrix", "selection", "plan".
FAKE_EXPORT int64_t esparse_fake_alive(const char* kind) {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  const std::map<std::string, size_t> counts = {{"handle", world.handles.size()},
                                                {"matrix", world.matrices.size()},
                                                {"selection", world.selections.size()},
                                                {"plan", world.plans.size()}};
  return counts.count(kind) ? static_cast<int64_t>(counts.at(kind)) : -1;
}

// What the last product ran with: "algorithm", "split_k", "split_k_mode", "split_k_buffers",
// "rows", "stream".
FAKE_EXPORT int64_t esparse_fake_last(const char* name) {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  return world.last.count(name) ? world.last[name] : -1;
}

// "architecture", "algorithms" (their number), "default_algorithm", "workspace" (bytes every
// product needs), "compress_workspace", "scrambled" (1: another layout of the metadata).
FAKE_EXPORT void esparse_fake_set(const char* name, int64_t value) {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  world.settings[name] = value;
}

// Lets every call of a function, by its name without cusparseLt, take so long at least.
FAKE_EXPORT void esparse_fake_slow(const char* call, int64_t milliseconds) {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  world.milliseconds[call] = milliseconds;
}

// Lets a function fail with a status, after `skip` calls that do not; "" ends it.
FAKE_EXPORT void esparse_fake_fail(const char* call, Status status, int64_t skip) {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  world.failing_call = call;
  world.failing_status = status;
  world.failing_skip = skip;
}

// Forgets counts, settings and failures; objects and overlaps stay.
FAKE_EXPORT void esparse_fake_reset() {
  World& world = TheWorld();
  const std::lock_guard<std::mutex> lock(world.mutex);
  world.calls.clear();
  world.most_under_way.clear();
  world.milliseconds.clear();
  world.settings.clear();
  world.last.clear();
  world.failing_call.clear();
}
