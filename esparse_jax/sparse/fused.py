"""Products of a decode step together with what stands around them, in one call on NVIDIA GPUs.

Each function is a custom call for up to 16 rows on CUDA, and everywhere else its plain-JAX twin,
the function of the same name with `_reference`. Both give the same result up to the order of sums.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from . import _ffi_cuda
from .blob import Blob24, compressed24_of
from .compress import decompress24
from .matmul import decode_fits


def fused_matmul(
    x: Float[Array, "row channel"],
    blob: Blob24,
    *,
    permutation: Int32[Array, " source"] | None = None,
    norm_epsilon: float | None = None,
    swiglu: bool = False,
    residual: Float[Array, "row out"] | None = None,
) -> Float[Array, "row column"]:
    """The product with a 2:4 weight, with the steps before and after it that a decoder has.

    Sums, norm, SwiGLU and residual are in float32; the result is rounded once.

    Args:
        x: Activations, in the dtype of the weight.
        blob: From `blob24`.
        permutation: `x[:, permutation]` is multiplied: the order the weight was compressed in.
        norm_epsilon: Where given, rows of x are first divided by `sqrt(mean(x^2) + norm_epsilon)`.
            The gain of the RMSNorm belongs into the weight, `weight * gain`.
        swiglu: The weight is `interleave_gate_up(gate, up)`; the result is
            `silu(gate(x)) * up(x)`, with half as many columns as the weight has rows.
        residual: Added to the result; not together with `swiglu`.

    Returns:
        `[row, out]`, with `swiglu` `[row, out / 2]`, in the dtype of x.

    Raises:
        ValueError: Shapes that do not fit each other, or `swiglu` with `residual`.
        TypeError: `x` or `residual` in another dtype than the weight.
    """
    _require(x, blob, residual, permutation, swiglu)
    out = blob.shape[0]
    operands = (x, blob.data, residual, permutation)

    def kernel(x, data, residual, permutation):
        return _ffi_cuda.decode(
            x,
            data,
            out=out,
            residual=residual,
            permutation=permutation,
            norm_epsilon=norm_epsilon,
            swiglu=swiglu,
        )

    def plain(x, data, residual, permutation):
        return fused_matmul_reference(
            x,
            Blob24(data, blob.shape, blob.dtype),
            permutation=permutation,
            norm_epsilon=norm_epsilon,
            swiglu=swiglu,
            residual=residual,
        )

    if not decode_fits(x.shape[0]):
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cuda=kernel, default=plain)


def fused_matmul_reference(
    x: Float[Array, "row channel"],
    blob: Blob24,
    *,
    permutation: Int32[Array, " source"] | None = None,
    norm_epsilon: float | None = None,
    swiglu: bool = False,
    residual: Float[Array, "row out"] | None = None,
) -> Float[Array, "row column"]:
    """What `fused_matmul` computes, in plain JAX from the dense weight."""
    _require(x, blob, residual, permutation, swiglu)
    dense = decompress24(compressed24_of(blob))
    shuffled = x if permutation is None else x[:, permutation]
    y = jax.lax.dot_general(
        shuffled, dense, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if norm_epsilon is not None:
        squares = jnp.square(x.astype(jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(squares, axis=1, keepdims=True) + norm_epsilon)
    if swiglu:
        pairs = y.reshape(y.shape[0], -1, 2, 8)
        y = (jax.nn.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(y.shape[0], -1)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(x.dtype)


def sparse_mlp(
    x: Float[Array, "row channel"], gate_up: Blob24, down: Blob24, *, epsilon: float
) -> Float[Array, "row channel"]:
    """The MLP half of a LLaMA layer: `x + down(silu(gate(n)) * up(n))`, n the RMS-normalised x.

    On CUDA its two kernels run in one call, so that the weight of the second is on its way while
    the first still computes (programmatic dependent launch, from Hopper on).

    Args:
        x: The residual stream.
        gate_up: `blob24(interleave_gate_up(gate, up))`, with the gain of the norm in it.
        down: `blob24` of the down projection.
        epsilon: Of the RMSNorm.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: Different dtypes.
    """
    inner = _require_mlp(x, gate_up, down)

    def kernel(x, gate_up_data, down_data):
        return _ffi_cuda.mlp(x, gate_up_data, down_data, inner=inner, epsilon=epsilon)

    def plain(x, gate_up_data, down_data):
        return sparse_mlp_reference(
            x,
            Blob24(gate_up_data, gate_up.shape, gate_up.dtype),
            Blob24(down_data, down.shape, down.dtype),
            epsilon=epsilon,
        )

    if not decode_fits(x.shape[0]):
        return plain(x, gate_up.data, down.data)
    return jax.lax.platform_dependent(x, gate_up.data, down.data, cuda=kernel, default=plain)


def sparse_mlp_reference(
    x: Float[Array, "row channel"], gate_up: Blob24, down: Blob24, *, epsilon: float
) -> Float[Array, "row channel"]:
    """What `sparse_mlp` computes, in plain JAX; the hidden activations are rounded once."""
    _require_mlp(x, gate_up, down)
    hidden = fused_matmul_reference(x, gate_up, norm_epsilon=epsilon, swiglu=True)
    return fused_matmul_reference(hidden, down, residual=x)


def _require_mlp(x: Array, gate_up: Blob24, down: Blob24) -> int:
    """Checks an MLP's operands; returns its inner width."""
    _require_blob24(gate_up, down)
    inner = gate_up.shape[0] // 2
    if down.shape != (x.shape[1], inner):
        raise ValueError(
            f"x {tuple(x.shape)} and gate_up of shape {gate_up.shape} need down of shape "
            f"{(x.shape[1], inner)}; got {down.shape}."
        )
    _require(x, gate_up, None, None, True)
    if down.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} and down {down.dtype}; cast one of them.")
    return inner


def _require_blob24(*blobs: Blob24) -> None:
    for blob in blobs:
        if not isinstance(blob, Blob24):
            raise TypeError(
                f"the fused products read a Blob24; got {type(blob).__name__}, whose layout only "
                f"cuSPARSELt knows. Use sparse_matmul, and the steps around it in plain JAX."
            )


def _require(
    x: Array, blob: Blob24, residual: Array | None, permutation: Array | None, swiglu: bool
) -> None:
    _require_blob24(blob)
    out, channels = blob.shape
    if x.shape[1] != channels:
        raise ValueError(
            f"x must have the weight's {channels} input channels; got shape {tuple(x.shape)} for a "
            f"blob of dense shape {blob.shape}."
        )
    if swiglu and residual is not None:
        raise ValueError(
            "swiglu and residual cannot stand together: the residual is as wide as the weight's "
            "outputs, SwiGLU's result half of it. Add it to the product that follows."
        )
    if residual is not None and residual.shape != (x.shape[0], out):
        raise ValueError(
            f"the residual must be [row, out] = {[x.shape[0], out]}; got {list(residual.shape)}."
        )
    if permutation is not None and permutation.shape != (channels,):
        raise ValueError(
            f"the permutation must name each of the {channels} channels once; got shape "
            f"{tuple(permutation.shape)}."
        )
    for name, array in (("x", x), ("residual", residual)):
        if array is not None and array.dtype != blob.dtype:
            raise TypeError(
                f"{name} is {array.dtype} and the weight {blob.dtype}; cast it, "
                f"{name}.astype({blob.dtype})."
            )
