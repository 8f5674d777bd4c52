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
from .machine import Machine, this_machine
from .matmul import sparse_matmul, sparse_matmul_reference
from .table import (
    BUCKETS,
    FormChoice,
    Record,
    TuningTable,
    choose_form,
    load_table,
    merge_tables,
    save_table,
    stored_table,
    table_file,
    use_table,
)
from .tune import Limits, TuneProgress, tune_shape

__all__ = [
    "BUCKETS",
    "Algorithm",
    "Blob24",
    "ChainWeights",
    "Compressed24",
    "FormChoice",
    "LibraryBlob24",
    "Limits",
    "Machine",
    "Record",
    "SplitKMode",
    "TuneProgress",
    "TuningTable",
    "blob24",
    "check24",
    "choose_form",
    "compress24",
    "compressed24_of",
    "decompress24",
    "device_blob24",
    "fused_matmul",
    "fused_matmul_reference",
    "interleave_gate_up",
    "library_blob_agrees",
    "load_cusparselt",
    "load_table",
    "merge_tables",
    "save_table",
    "sparse_chain",
    "sparse_chain_reference",
    "sparse_matmul",
    "sparse_matmul_reference",
    "sparse_mlp",
    "sparse_mlp_reference",
    "stored_table",
    "table_file",
    "this_machine",
    "tune_shape",
    "use_table",
]
