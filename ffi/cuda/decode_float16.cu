#include "cuda/decode_gpu.h"

namespace esparse::cuda {

ESPARSE_DECODE_INSTANCES(esparse_decode_float16, __half);

DecodeKernel FindFloat16(int columns, int tiles) {
  return esparse_decode_float16_kernels[columns - 1][tiles - 1];
}

}  // namespace esparse::cuda
