#include "cuda/cubins.h"

#include <initializer_list>

// The assembler puts the files into the library; the build names them.
#define ESPARSE_EMBED(NAME, FILE)                                                       \
  asm(".pushsection .rodata\n"                                                          \
      ".balign 64\n"                                                                    \
      ".hidden " #NAME "_begin\n.global " #NAME                                         \
      "_begin\n"                                                                        \
      ".hidden " #NAME "_end\n.global " #NAME "_end\n" #NAME "_begin:\n.incbin \"" FILE \
      "\"\n" #NAME                                                                      \
      "_end:\n"                                                                         \
      ".byte 0\n"                                                                       \
      ".popsection\n");                                                                 \
  extern "C" __attribute__((visibility("hidden"))) const unsigned char NAME##_begin[], NAME##_end[]

ESPARSE_EMBED(esparse_cubin_float16, ESPARSE_CUBIN_FLOAT16);
ESPARSE_EMBED(esparse_cubin_bfloat16, ESPARSE_CUBIN_BFLOAT16);
ESPARSE_EMBED(esparse_cubin_attention, ESPARSE_CUBIN_ATTENTION);
ESPARSE_EMBED(esparse_cubin_prefill, ESPARSE_CUBIN_PREFILL);

namespace esparse::cuda {

cudaError_t CubinsRun(bool* run) {
  int device = 0, major = 0, minor = 0;
  for (const cudaError_t status :
       {cudaGetDevice(&device),
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)}) {
    if (status != cudaSuccess) return status;
  }
  *run = major == kCubinMajor && minor == kCubinMinor;
  return cudaSuccess;
}

Cubin AttentionCubin() {
  return {esparse_cubin_attention_begin,
          static_cast<size_t>(esparse_cubin_attention_end - esparse_cubin_attention_begin)};
}

Cubin PrefillCubin() {
  return {esparse_cubin_prefill_begin,
          static_cast<size_t>(esparse_cubin_prefill_end - esparse_cubin_prefill_begin)};
}

Cubin DecodeCubin(Dtype dtype) {
  if (dtype == Dtype::kFloat16) {
    return {esparse_cubin_float16_begin,
            static_cast<size_t>(esparse_cubin_float16_end - esparse_cubin_float16_begin)};
  }
  return {esparse_cubin_bfloat16_begin,
          static_cast<size_t>(esparse_cubin_bfloat16_end - esparse_cubin_bfloat16_begin)};
}

}  // namespace esparse::cuda
