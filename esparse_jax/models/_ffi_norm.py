"""The extension's norm of many rows, for NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from esparse_jax import native
from esparse_jax.models.attention import log_once
from esparse_jax.sparse.machine import build

_DTYPES = ("bfloat16", "float16")
_UNIT, _MOST_CHANNELS = 8, 24320  # kNormUnit and kMostNormChannels of ffi/cuda/row_norm.h
# Up to 16 rows have kernels of their own around their products, or too little to do for this one.
_LEAST_ROWS = 17


def norm_takes(dtype: DTypeLike, rows: int, channels: int) -> bool:
    """Whether the kernel is there for so many such rows, and runs on this machine's GPUs.

    Where it would run but is not there for their channels, one line is logged.
    """
    if jnp.dtype(dtype).name not in _DTYPES or rows < _LEAST_ROWS or not _runs():
        return False
    if channels % _UNIT == 0 and channels <= _MOST_CHANNELS:
        return True
    log_once(
        f"the norms of a prompt are several kernels in place of one: that is there for multiples "
        f"of {_UNIT} channels up to {_MOST_CHANNELS:,}; here are {channels:,}."
    )
    return False


@functools.cache
def _runs() -> bool:
    if jax.default_backend() != "gpu" or not native.has_cuda():
        return False
    return all(build().runs_on(device.compute_capability) for device in jax.local_devices())


def add_norm(
    x: Float[Array, "row channel"],
    residual: Float[Array, "row channel"] | None = None,
    *,
    gain: Float[Array, " channel"] | None = None,
    permutation: Int32[Array, " channel"] | None = None,
    epsilon: float,
) -> tuple[Float[Array, "row channel"], Float[Array, "row channel"]]:
    """`x + residual`, and its rows divided by `sqrt(mean(square) + epsilon)`.

    On NVIDIA GPUs in one pass over the memory, elsewhere in plain JAX. XLA takes three passes, and
    its gather computes a norm once more for every channel that it fetches.

    Args:
        x: As `norm_takes` says.
        residual: Of the same dtype; None adds nothing, and x comes back.
        gain: Of the RMSNorm, one factor a channel, of the same dtype.
        permutation: The second result is `[:, permutation]` of the norm. Each channel once: it is
            not checked here.

    Returns:
        The sum, rounded; and its norm, computed from that in float32 and rounded.
    """
    return _add_norm(x, residual, gain, permutation, float(epsilon))


def add_norm_reference(
    x: Float[Array, "row channel"],
    residual: Float[Array, "row channel"] | None = None,
    gain: Float[Array, " channel"] | None = None,
    permutation: Int32[Array, " channel"] | None = None,
    *,
    epsilon: float,
) -> tuple[Float[Array, "row channel"], Float[Array, "row channel"]]:
    """What `add_norm` computes, in plain JAX; any dtype and number of channels."""
    total = x if residual is None else residual + x
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=1, keepdims=True) + epsilon)
    if gain is not None:
        scale = scale * gain.astype(jnp.float32)[None]
    normed = (wide * scale).astype(x.dtype)
    if permutation is not None:
        normed = normed.at[:, permutation].get(mode="promise_in_bounds")
    return total, normed


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _add_norm(x, residual, gain, permutation, epsilon):
    return jax.lax.platform_dependent(
        x,
        residual,
        gain,
        permutation,
        cuda=functools.partial(_kernel, epsilon=epsilon),
        default=functools.partial(add_norm_reference, epsilon=epsilon),
    )


@_add_norm.defjvp
def _add_norm_jvp(epsilon, primals, tangents):
    return jax.jvp(functools.partial(add_norm_reference, epsilon=epsilon), primals, tangents)


def _kernel(x, residual, gain, permutation, epsilon):
    present = [each for each in (residual, gain, permutation) if each is not None]
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(
        native.extension().CUDA_ROW_NORM_TARGET,
        [like] * (1 if residual is None else 2),
        vmap_method="sequential",
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
