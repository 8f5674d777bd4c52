"""The extension's calls for the CPU platform.

The extension is optional: without it `cpu_product_available` says no, and `sparse_matmul` computes
with plain JAX: it unpacks the weight at each call.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from esparse_jax import native

CPU_DTYPES = ("float32", "bfloat16", "float16")


def cpu_product_available() -> bool:
    """Whether the compiled product for the CPU platform can be called."""
    return native.extension() is not None


@functools.cache
def cpu_levels() -> tuple[str, ...]:
    """The instruction-set levels this processor can run, best first; the last is "portable"."""
    extension = native.extension()
    return () if extension is None else tuple(extension.cpu_levels())


def cpu_product(
    x: Float[Array, "row channel"],
    values: Float[Array, "out kept"],
    indices: UInt8[Array, "out byte"],
    *,
    level: str = "best",
) -> Float[Array, "row out"]:
    """`x @ weight.T` by the compiled kernels, on the threads XLA computes with.

    Args:
        level: One of `cpu_levels()`, or "best": the first of them. For tests and benchmarks.
    """
    extension = _require_extension(values)
    if level != "best" and level not in cpu_levels():
        raise ValueError(f"this processor runs the levels {cpu_levels()}; got {level!r}.")
    result = result_like(x, values, (x.shape[0], values.shape[0]), x.dtype)
    call = jax.ffi.ffi_call(extension.PRODUCT24_CPU, result)
    code = -1 if level == "best" else extension.cpu_level_code(level)
    return call(x, values, indices, level=np.int32(code))


def cpu_expand(
    values: Float[Array, "out kept"], indices: UInt8[Array, "out byte"]
) -> Float[Array, "out channel"]:
    """The dense weight; several times as fast as `decompress24` is on the CPU."""
    extension = _require_extension(values)
    out, kept = values.shape
    result = result_like(values, indices, (out, 2 * kept), values.dtype)
    return jax.ffi.ffi_call(extension.EXPAND24_CPU, result)(values, indices)


def result_like(
    x: Array, weight: Array, shape: tuple[int, ...], dtype: Any
) -> jax.ShapeDtypeStruct:
    """What a call with these arguments returns.

    Inside `shard_map` it varies over the same mesh axes as x, the weight, or both; a bare
    `ShapeDtypeStruct` would vary over none, and break a loop that carries it.
    """

    def from_both(x, weight):
        return jnp.broadcast_to(x.sum().astype(dtype) + weight.sum().astype(dtype), shape)

    return jax.ShapeDtypeStruct.like(jax.eval_shape(from_both, x, weight))


def _require_extension(values: Array) -> ModuleType:
    extension = native.extension()
    if extension is None:
        raise RuntimeError(
            'backend="cpu" needs the compiled extension, which is not installed. Build it with '
            '`pip install .` (see BUILD.md), or use backend="reference".'
        )
    if values.dtype.name not in CPU_DTYPES:
        raise TypeError(
            f'backend="cpu" multiplies {", ".join(CPU_DTYPES)}; got {values.dtype.name}. Use '
            f'backend="reference", or cast both x and the weight.'
        )
    return extension
