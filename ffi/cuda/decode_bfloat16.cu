#include "cuda/decode_kernel.h"

namespace esparse::cuda {

DecodeFunction FindBfloat16(int columns, int tiles) {
  return FindDecode<__nv_bfloat16>(columns, tiles);
}

}  // namespace esparse::cuda
