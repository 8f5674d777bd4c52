#include "cuda/decode_gpu.h"

namespace esparse::cuda {

ESPARSE_DECODE_INSTANCES(esparse_decode_bfloat16, __nv_bfloat16);

DecodeKernel FindBfloat16(int columns, int tiles) {
  return esparse_decode_bfloat16_kernels[columns - 1][tiles - 1];
}

}  // namespace esparse::cuda
