"""The 2:4 weight and its product."""

from ._ffi_cusparselt import Algorithm, SplitKMode, load_cusparselt
from .blob import (
    Blob24,
    LibraryBlob24,
    blob24,
    compressed24_of,
    device_blob24,
    interleave_gate_up,
    library_blob_agrees,
)
from .compress import Compressed24, check24, compress24, decompress24
from .fused import (
    ChainWeights,
    fused_matmul,
    fused_matmul_reference,
    sparse_chain,
    sparse_chain_reference,
    sparse_mlp,
    sparse_mlp_reference,
)
from .matmul import sparse_matmul, sparse_matmul_reference

__all__ = [
    "Algorithm",
    "Blob24",
    "ChainWeights",
    "Compressed24",
    "LibraryBlob24",
    "SplitKMode",
    "blob24",
    "check24",
    "compress24",
    "compressed24_of",
    "decompress24",
    "device_blob24",
    "fused_matmul",
    "fused_matmul_reference",
    "interleave_gate_up",
    "library_blob_agrees",
    "load_cusparselt",
    "sparse_chain",
    "sparse_chain_reference",
    "sparse_matmul",
    "sparse_matmul_reference",
    "sparse_mlp",
    "sparse_mlp_reference",
]
