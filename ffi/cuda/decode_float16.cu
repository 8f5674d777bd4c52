#include "cuda/decode_kernel.h"

namespace esparse::cuda {

DecodeFunction FindFloat16(int columns, int tiles) { return FindDecode<__half>(columns, tiles); }

}  // namespace esparse::cuda
