#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(ESPARSE_X86)
#include <cpuid.h>
#endif
#if defined(ESPARSE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/handlers.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace esparse::cpu {
namespace {

// The codes are part of the handler's interface: they stand in exported computations.
enum LevelNumber {
  kPortableLevel = 0,
  kAvx2Level = 1,
  kAvx512Level = 2,
  kAvx512Bf16Level = 3,
  kAmxBf16Level = 4
};

constexpr const char* kLevelNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// Whether this process may use AMX for bfloat16: the processor has it, the system saves its
// registers, and gives them to the process, which on Linux (5.16) has to ask for them.
bool AskForAmx() {
#if defined(ESPARSE_X86) && defined(__linux__)
  constexpr unsigned kBfloat16Tiles = 1u << 22, kTiles = 1u << 24;  // CPUID 7.0, EDX
  constexpr unsigned kSystemSaves = 1u << 27;                       // CPUID 1, ECX: OSXSAVE
  constexpr unsigned kTileState = 3u << 17;                         // XCR0: TILECFG and TILEDATA
  constexpr int kTileData = 18;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM in asm/prctl.h
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSystemSaves)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & kBfloat16Tiles) || !(d & kTiles)) return false;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Clang 15 does not know this feature by name. The answer is kept: under a hypervisor CPUID takes
// several microseconds, as long as a small product.
bool HasF16c() {
#if defined(ESPARSE_X86)
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
  }();
  return has;
#else
  return false;
#endif
}

bool Supports(int level) {
#if defined(ESPARSE_X86)
  switch (level) {
    case kAvx2Level:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
    case kAvx512Level:
      return Supports(kAvx2Level) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case kAvx512Bf16Level:
      return Supports(kAvx512Level) && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512bf16");
    case kAmxBf16Level: {
      static const bool given = AskForAmx();
      return given && Supports(kAvx512Bf16Level) && __builtin_cpu_supports("avx512vbmi2");
    }
  }
#endif
  return level == kPortableLevel;
}

// Whether vdpbf16ps is as fast as other multiply-adds: on Zen 4 it was measured at 1.7 G/s like
// vfmadd, on Sapphire Rapids at 1.3 G/s against 4.8 G/s. What is not AMD is taken to be like the
// latter.
bool FastDotBfloat16() {
#if defined(ESPARSE_X86)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Levels from best to worst.
std::vector<int> Preference() {
  if (FastDotBfloat16()) {
    return {kAmxBf16Level, kAvx512Bf16Level, kAvx512Level, kAvx2Level, kPortableLevel};
  }
  return {kAmxBf16Level, kAvx512Level, kAvx512Bf16Level, kAvx2Level, kPortableLevel};
}

int BestLevel(ffi::DataType dtype, int64_t rows, int64_t channels) {
  // With very few rows the work is unpacking, which is less where nothing has to be widened
  // (1.25x), as long as its steps of 64 channels leave no scalar rest. 4096 x 4096 on one core of
  // Sapphire Rapids, from memory, in us:
  //
  //   rows              1     3     4     6
  //   avx512_bf16    1281  1205  1568  2319
  //   avx512         1302  1453  1511  2053
  //   amx_bf16       1495  1501  1500  1496
  constexpr int64_t kRowsForDot = 3;
  if (dtype == ffi::BF16 && rows <= kRowsForDot && Supports(kAvx512Level)) {
    const bool dot = Supports(kAvx512Bf16Level) && (channels % 64 == 0 || FastDotBfloat16());
    return dot ? kAvx512Bf16Level : kAvx512Level;
  }
  for (int level : Preference()) {
    if (Supports(level)) return level;
  }
  return kPortableLevel;
}

const Level& BaseLevel(int level) {
#if defined(ESPARSE_X86)
  if (level >= kAvx512Level) return kAvx512;
  if (level == kAvx2Level) return kAvx2;
#endif
  return kPortable;
}

Method<float> MethodFor(int level, const float*) { return BaseLevel(level).float32; }
Method<Float16> MethodFor(int level, const Float16*) { return BaseLevel(level).float16; }
Method<Bfloat16> MethodFor(int level, const Bfloat16*) {
#if defined(ESPARSE_X86)
  if (level == kAmxBf16Level) return kTileBfloat16;
  if (level == kAvx512Bf16Level) return kDotBfloat16;
#endif
  return BaseLevel(level).bfloat16;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<float[], Free>;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Work is shared only where it takes much longer than waking a thread, some ten microseconds: bytes
// of W and multiply-adds below which the caller computes alone.
constexpr int64_t kBytesToShare = 256 << 10;
constexpr int64_t kWorkToShare = 512 << 10;
constexpr int64_t kChunksPerThread =
    8;  // so that a thread that is held up elsewhere matters little

template <typename T>
ffi::Error Compute(ffi::ThreadPool& pool, int level, const Product<T>& product) {
  const Method<T> method = MethodFor(level, product.x);
  const int64_t kept = product.outs * product.kept();
  const int64_t bytes = kept * sizeof(T) + product.outs * product.index_bytes();
  const bool share = bytes >= kBytesToShare || kept * product.rows >= kWorkToShare;
  const int64_t threads = share ? pool.num_threads() : 1;

  Scratch scratch;
  if (const size_t size = method.scratch_bytes(product.rows, product.channels); size > 0) {
    scratch.reset(static_cast<float*>(std::aligned_alloc(kAlignment, RoundUp(size, kAlignment))));
    if (scratch == nullptr) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        "the 2:4 product could not allocate " + std::to_string(size) +
                            " bytes for x; compute fewer rows at a time.");
    }
    const int64_t unit = kChannelBlock;
    const bool share_x = product.rows * product.channels >= kWorkToShare / 8;
    const int64_t chunk = RoundUp(product.channels / (4 * (share_x ? threads : 1)) + 1, unit);
    std::atomic<bool> prepared{true};
    ParallelFor(pool, product.channels, share_x ? chunk : product.channels, threads,
                [&](int64_t begin, int64_t end) {
                  if (!method.prepare(product, scratch.get(), begin, end)) prepared = false;
                });
    if (!prepared) {  // only AMX refuses any x, one with Inf or NaN; this level does not
      scratch.reset();
      return Compute(pool, kAvx512Level, product);
    }
  }
  const int64_t chunk = RoundUp(product.outs / (kChunksPerThread * threads) + 1, kOutBlock);
  ParallelFor(pool, product.outs, chunk, threads,
              [&](int64_t begin, int64_t end) { method.run(product, scratch.get(), begin, end); });
  return ffi::Error::Success();
}

ffi::Error Check(const ffi::AnyBuffer& x, const ffi::AnyBuffer& values,
                 const ffi::AnyBuffer& indices, const ffi::AnyBuffer& y) {
  if (x.dimensions().size() != 2 || values.dimensions().size() != 2 ||
      indices.dimensions().size() != 2 || y.dimensions().size() != 2) {
    return InvalidArgument(
        "the 2:4 product takes matrices: x [row, channel], values [out, channel ",
        "/ 2], indices U8[out, ceil(channel / 8)] and y [row, out]; got x ", Describe(x),
        ", values ", Describe(values), ", indices ", Describe(indices), ", y ", Describe(y),
        ". Flatten leading axes.");
  }
  const ffi::DataType dtype = x.element_type();
  if (dtype != ffi::F32 && dtype != ffi::BF16 && dtype != ffi::F16) {
    return InvalidArgument("the 2:4 product multiplies F32, BF16 and F16; got x ", Describe(x),
                           ". Cast x and the weight, or use the pure-JAX reference.");
  }
  if (values.element_type() != dtype || y.element_type() != dtype ||
      indices.element_type() != ffi::U8) {
    return InvalidArgument("x, values and y must have one dtype, and indices U8; got x ",
                           Describe(x), ", values ", Describe(values), ", indices ",
                           Describe(indices), ", y ", Describe(y), ".");
  }
  const int64_t rows = x.dimensions()[0];
  const int64_t channels = x.dimensions()[1];
  const int64_t outs = values.dimensions()[0];
  if (channels % 4 != 0) {
    return InvalidArgument("2:4 groups 4 channels, so their number must be a multiple of 4; got x ",
                           Describe(x), ".");
  }
  if (values.dimensions()[1] != channels / 2 || indices.dimensions()[0] != outs ||
      indices.dimensions()[1] != (channels + 7) / 8) {
    return InvalidArgument("x ", Describe(x), " needs values [", outs, ", ", channels / 2,
                           "] and indices U8[", outs, ", ", (channels + 7) / 8, "]; got values ",
                           Describe(values), " and indices ", Describe(indices), ".");
  }
  if (y.dimensions()[0] != rows || y.dimensions()[1] != outs) {
    return InvalidArgument("x ", Describe(x), " and values ", Describe(values), " make y [", rows,
                           ", ", outs, "]; got y ", Describe(y), ".");
  }
  return ffi::Error::Success();
}

template <typename T>
ffi::Error Dispatch(ffi::ThreadPool& pool, int level, const ffi::AnyBuffer& x,
                    const ffi::AnyBuffer& values, const ffi::AnyBuffer& indices,
                    ffi::AnyBuffer& y) {
  Product<T> product;
  product.x = static_cast<const T*>(x.untyped_data());
  product.values = static_cast<const T*>(values.untyped_data());
  product.indices = static_cast<const uint8_t*>(indices.untyped_data());
  product.y = static_cast<T*>(y.untyped_data());
  product.rows = x.dimensions()[0];
  product.channels = x.dimensions()[1];
  product.outs = values.dimensions()[0];
  if (product.rows == 0 || product.outs == 0) return ffi::Error::Success();
  return Compute(pool, level, product);
}

ffi::Error Product24Impl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                         ffi::AnyBuffer indices, ffi::Result<ffi::AnyBuffer> y, int32_t level) {
  ESPARSE_RETURN_IF_ERROR(Check(x, values, indices, *y));
  if (level < 0) level = BestLevel(x.element_type(), x.dimensions()[0], x.dimensions()[1]);
  if (!Supports(level)) {
    return InvalidArgument("level ", level, " of the 2:4 product does not run on this processor; ",
                           "-1 takes the best that does.");
  }
  switch (x.element_type()) {
    case ffi::F32:
      return Dispatch<float>(pool, level, x, values, indices, *y);
    case ffi::BF16:
      return Dispatch<Bfloat16>(pool, level, x, values, indices, *y);
    default:
      return Dispatch<Float16>(pool, level, x, values, indices, *y);
  }
}

}  // namespace

std::vector<std::string> SupportedLevels() {
  std::vector<std::string> names;
  for (int level : Preference()) {
    if (Supports(level)) names.push_back(kLevelNames[level]);
  }
  return names;
}

int LevelCode(const std::string& name) {
  for (int level = kPortableLevel; level <= kAmxBf16Level; ++level) {
    if (name == kLevelNames[level]) return level;
  }
  return -1;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Product24, Product24Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x [row, channel]
                                  .Arg<ffi::AnyBuffer>()  // values [out, channel / 2]
                                  .Arg<ffi::AnyBuffer>()  // indices U8[out, ceil(channel / 8)]
                                  .Ret<ffi::AnyBuffer>()  // y [row, out]
                                  .Attr<int32_t>("level"));

}  // namespace esparse::cpu
