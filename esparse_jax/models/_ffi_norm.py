"""The extension's norm of many rows, for NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from esparse_jax import native

_DTYPES = ("bfloat16", "float16")
_UNIT, _MOST_CHANNELS = 8, 24320  # kNormUnit and kMostNormChannels of ffi/cuda/row_norm.h


def norm_takes(dtype: DTypeLike, channels: int) -> bool:
    """Whether the kernel is there for such rows, and on this machine."""
    fits = jnp.dtype(dtype).name in _DTYPES
    return fits and channels % _UNIT == 0 and channels <= _MOST_CHANNELS and _runs()


@functools.cache
def _runs() -> bool:
    return jax.default_backend() == "gpu" and native.has_cuda()


def add_norm(
    x: Float[Array, "row channel"],
    residual: Float[Array, "row channel"] | None = None,
    *,
    gain: Float[Array, " channel"] | None = None,
    permutation: Int32[Array, " channel"] | None = None,
    epsilon: float,
) -> tuple[Float[Array, "row channel"], Float[Array, "row channel"]]:
    """`x + residual`, and its rows divided by `sqrt(mean(square) + epsilon)`.

    In one pass over the memory, where XLA takes three: its gather computes a norm once more for
    every channel it fetches.

    Args:
        x: float16 or bfloat16, as `norm_takes` says.
        residual: None adds nothing, and x comes back.
        gain: Of the RMSNorm, one factor a channel.
        permutation: The second result is `[:, permutation]` of the norm.

    Returns:
        The sum, rounded; and its norm, computed from that in float32 and rounded.
    """
    present = [each for each in (residual, gain, permutation) if each is not None]
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(
        native.extension().CUDA_ROW_NORM_TARGET, [like] * (1 if residual is None else 2)
    )
    normed, *total = call(
        x,
        *present,
        add=residual is not None,
        scale=gain is not None,
        permute=permutation is not None,
        epsilon=np.float32(epsilon),
    )
    return (total[0] if total else x), normed
