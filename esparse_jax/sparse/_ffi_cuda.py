"""The extension's calls for NVIDIA GPUs; `_ffi.py` loads it and registers its targets."""

from types import ModuleType

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from . import _ffi

DTYPES = ("bfloat16", "float16")
MAX_ROWS = 16  # of x
PLAN_FIELDS = ("tiles", "warps", "blocks", "interleave", "depth", "resident")

# What the decode kernel does around the product; the numbers are those of ffi/cuda/decode.h.
_NORM, _SWIGLU, _RESIDUAL, _PERMUTE = 1, 2, 4, 8


def decode_available() -> bool:
    """Whether this build of the extension holds the decode kernel."""
    extension = _ffi._extension()
    return extension is not None and extension.HAS_CUDA


def _extension() -> ModuleType:
    extension = _ffi._extension()
    if extension is None or not extension.HAS_CUDA:
        raise RuntimeError(
            "the CUDA decode kernel needs the compiled extension with its CUDA part, which is not "
            "in this build. Install with nvcc at hand, pip install . "
            '-C cmake.define.ESPARSE_CUDA=ON (see BUILD.md), or use backend="reference".'
        )
    return extension


def _plan(plan: dict[str, int] | None) -> np.ndarray:
    """How the kernel cuts its work; what is not named it chooses itself (see ffi/cuda/decode.h)."""
    plan = plan or {}
    unknown = set(plan) - set(PLAN_FIELDS)
    if unknown:
        raise ValueError(f"a plan has the fields {PLAN_FIELDS}; got {sorted(unknown)} as well.")
    return np.array([plan.get(field, 0) for field in PLAN_FIELDS], np.int32)


def _require_rows(rows: int) -> None:
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(
            f"the decode kernel takes 1 to {MAX_ROWS} rows; got {rows}. sparse_matmul with "
            f"backend=None takes any number."
        )


def decode(
    x: Float[Array, "row channel"],
    blob: UInt8[Array, " blob_byte"],
    *,
    out: int,
    residual: Float[Array, "row out"] | None = None,
    permutation: Int32[Array, " source"] | None = None,
    norm_epsilon: float | None = None,
    swiglu: bool = False,
    plan: dict[str, int] | None = None,
) -> Float[Array, "row column"]:
    """`x @ weight.T` by the decode kernel, for 1 to 16 rows.

    Args:
        blob: `Blob24.data` of a weight with `out` outputs.
        residual: Added to the result.
        permutation: `x[:, permutation]` is multiplied.
        norm_epsilon: Where given, the result is scaled to that of RMS-normalised rows of x.
        swiglu: The weight is `interleave_gate_up(gate, up)`; the result is `silu(gate) * up`.
        plan: For tests, tuning and benchmarks.
    """
    extension = _extension()
    _require_rows(x.shape[0])
    columns = out // 2 if swiglu else out
    fusion, more, results = 0, [], [_ffi.result_like(x, blob, (x.shape[0], columns), x.dtype)]
    if norm_epsilon is not None:
        fusion |= _NORM
    if swiglu:
        fusion |= _SWIGLU
    if residual is not None:
        fusion |= _RESIDUAL
        more.append(residual)
    if permutation is not None:
        fusion |= _PERMUTE
        more.append(permutation)
        results.append(_ffi.result_like(x, blob, x.shape, x.dtype))
    return jax.ffi.ffi_call(extension.CUDA_DECODE_TARGET, results)(
        x,
        blob,
        *more,
        fusion=np.int32(fusion),
        epsilon=np.float32(norm_epsilon or 0.0),
        plan=_plan(plan),
    )[0]


def mlp(
    x: Float[Array, "row channel"],
    gate_up: UInt8[Array, " gate_up_byte"],
    down: UInt8[Array, " down_byte"],
    *,
    inner: int,
    epsilon: float,
    gate_up_plan: dict[str, int] | None = None,
    down_plan: dict[str, int] | None = None,
) -> Float[Array, "row channel"]:
    """`x + down(swiglu(gate_up(norm(x))))` in one call, whose two kernels overlap."""
    extension = _extension()
    _require_rows(x.shape[0])
    results = [
        _ffi.result_like(x, gate_up, x.shape, x.dtype),
        _ffi.result_like(x, gate_up, (x.shape[0], inner), x.dtype),
    ]
    return jax.ffi.ffi_call(extension.CUDA_MLP_TARGET, results)(
        x,
        gate_up,
        down,
        epsilon=np.float32(epsilon),
        gate_up_plan=_plan(gate_up_plan),
        down_plan=_plan(down_plan),
    )[0]
