"""Products of a decode step together with what stands around them, in one call on NVIDIA GPUs.

Each function is a custom call for up to 16 rows on CUDA, and everywhere else its plain-JAX twin,
the function of the same name with `_reference`. Both give the same result up to the order of sums.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from . import _ffi_cuda
from .blob import Blob24, compressed24_of
from .compress import decompress24
from .matmul import decode_fits

# A plan of the decode kernel (`_ffi_cuda.PLAN_VALUES`), and one for each product of a chain.
Plan = Mapping[str, int]
Plans = Mapping[str, Plan]


def fused_matmul(
    x: Float[Array, "row channel"],
    blob: Blob24,
    *,
    permutation: Int32[Array, " source"] | None = None,
    norm_epsilon: float | None = None,
    swiglu: bool = False,
    residual: Float[Array, "row out"] | None = None,
    places: Int32[Array, " out"] | None = None,
    prefetch: bool = False,
) -> Float[Array, "row column"] | tuple[Float[Array, "row out"], Float[Array, "row out"]]:
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
        places: The result is written once more, with column c at `places[c]`: the channel order
            that a later product reads its x in, at no cost. `jnp.argsort(permutation)` gives
            `y[:, permutation]`. Not together with `swiglu`.
        prefetch: The weight was complete before this computation began: an argument of the `jit`,
            neither computed, sliced nor copied inside it. A kernel may then read it before the
            kernel before has ended, which hides the gap between the two (where XLA records calls:
            Hopper, jax 0.11). Set it for anything else, and the product may read what is not
            written yet.

    Returns:
        `[row, out]`, with `swiglu` `[row, out / 2]`, in the dtype of x; with `places` that and the
        same in the other order.

    Raises:
        ValueError: Shapes that do not fit each other, or `swiglu` with `residual` or `places`.
        TypeError: `x` or `residual` in another dtype than the weight.
    """
    _require(x, blob, residual, permutation, places, swiglu)
    out = blob.shape[0]
    operands = (x, blob.data, residual, permutation, places)

    def kernel(x, data, residual, permutation, places):
        y, scattered = _ffi_cuda.decode(
            x,
            data,
            out=out,
            residual=residual,
            permutation=permutation,
            places=places,
            norm_epsilon=norm_epsilon,
            swiglu=swiglu,
            prefetch=prefetch,
        )
        return y if places is None else (y, scattered)

    def plain(x, data, residual, permutation, places):
        return fused_matmul_reference(
            x,
            Blob24(data, blob.shape, blob.dtype),
            permutation=permutation,
            norm_epsilon=norm_epsilon,
            swiglu=swiglu,
            residual=residual,
            places=places,
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
    places: Int32[Array, " out"] | None = None,
) -> Float[Array, "row column"] | tuple[Float[Array, "row out"], Float[Array, "row out"]]:
    """What `fused_matmul` computes, in plain JAX from the dense weight."""
    _require(x, blob, residual, permutation, places, swiglu)
    dense = decompress24(compressed24_of(blob))
    shuffled = x if permutation is None else x[:, permutation]
    y = jax.lax.platform_dependent(shuffled, dense, cpu=_dot_cpu, default=_dot)
    if norm_epsilon is not None:
        squares = jnp.square(x.astype(jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(squares, axis=1, keepdims=True) + norm_epsilon)
    if swiglu:
        pairs = y.reshape(y.shape[0], -1, 2, 8)
        y = (jax.nn.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(y.shape[0], -1)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    y = y.astype(x.dtype)
    return y if places is None else (y, jnp.zeros_like(y).at[:, places].set(y))


def _dot(x: Array, weight: Array) -> Array:
    return jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _dot_cpu(x: Array, weight: Array) -> Array:
    # XLA's CPU backend (jax 0.10.2) compiles a bfloat16 product with a transposed operand and
    # refuses to run it. Products of 16-bit numbers are exact in float32, so these are the same.
    return _dot(x.astype(jnp.float32), weight.astype(jnp.float32))


def _plans_of(plans: Plans | None, products: Sequence[str]) -> dict[str, Plan | None]:
    unknown = sorted(set(plans or {}) - set(products))
    if unknown:
        raise ValueError(f"plans are for {', '.join(products)}; got {', '.join(unknown)} as well.")
    for product, plan in (plans or {}).items():
        try:
            _ffi_cuda.require_plan(plan)
        except ValueError as error:
            raise ValueError(f"{product}: {error}") from None
    return {product: (plans or {}).get(product) for product in products}


def sparse_mlp(
    x: Float[Array, "row channel"],
    gate_up: Blob24,
    down: Blob24,
    *,
    epsilon: float,
    prefetch: bool = False,
    plans: Plans | None = None,
) -> Float[Array, "row channel"]:
    """The MLP half of a LLaMA layer: `x + down(silu(gate(n)) * up(n))`, n the RMS-normalised x.

    On CUDA the weight of the second product is on its way while the first still computes
    (programmatic dependent launch, from Hopper on).

    Args:
        x: The residual stream.
        gate_up: `blob24(interleave_gate_up(gate, up))`, with the gain of the norm in it.
        down: `blob24` of the down projection.
        epsilon: Of the RMSNorm.
        prefetch: As for `fused_matmul`.
        plans: How the kernel cuts `gate_up` and `down`, where its own rule is not the best; without
            effect where there is no kernel.

    Raises:
        ValueError: Shapes that do not fit each other, or what is no plan of these products.
        TypeError: Different dtypes.
    """
    _require_mlp(x, gate_up, down)
    plan_of = _plans_of(plans, ("gate_up", "down"))

    def kernel(x, gate_up_data, down_data):
        steps = [
            _ffi_cuda.Step(
                x, gate_up_data, gate_up.shape[0], norm=True, swiglu=True, plan=plan_of["gate_up"]
            ),
            _ffi_cuda.Step(
                _ffi_cuda.Result(0), down_data, down.shape[0], residual=x, plan=plan_of["down"]
            ),
        ]
        return _ffi_cuda.chain(steps, epsilon=epsilon, prefetch=prefetch)[-1][0]

    def plain(x, gate_up_data, down_data):
        return sparse_mlp_reference(
            x, _with_data(gate_up, gate_up_data), _with_data(down, down_data), epsilon=epsilon
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChainWeights:
    """The 2:4 weights between two attentions, with the gains of the norms in them.

    Attributes:
        o: Of the attention's output projection.
        gate_up: `blob24(interleave_gate_up(gate, up))`.
        down: Of the down projection.
        qkv: Query, key and value of the next layer, one below the other; None after the last layer.
        gate_up_places: Where each channel of the residual stream stands in the order that gate_up
            was compressed in (`jnp.argsort(permutation)`); None for the natural order.
        qkv_places: The same for qkv.
    """

    o: Blob24
    gate_up: Blob24
    down: Blob24
    qkv: Blob24 | None = None
    gate_up_places: Any = None
    qkv_places: Any = None


def sparse_chain(
    attended: Float[Array, "row feature"],
    hidden: Float[Array, "row channel"],
    weights: ChainWeights,
    *,
    epsilon: float,
    prefetch: bool = False,
    plans: Plans | None = None,
) -> tuple[Float[Array, "row channel"], Float[Array, "row out"] | None]:
    """All that stands between two attentions of a LLaMA: o -> gate, up -> down -> next q, k, v.

    ::

        hidden = hidden + o(attended)
        hidden = hidden + down(silu(gate(norm(hidden))) * up(norm(hidden)))
        qkv    = qkv(norm(hidden))

    On CUDA each weight is on its way while the product before still computes. A product whose
    weight was compressed in another channel order reads a copy of the residual stream that the
    product before has written in that order, so the shuffle costs no kernel.

    Args:
        attended: The attention's output, in the channel order that `weights.o` was compressed in.
        hidden: The residual stream.
        epsilon: Of all norms.
        prefetch: As for `fused_matmul`.
        plans: How the kernel cuts `o`, `gate_up`, `down` and `qkv`, where its own rule is not the
            best; without effect where there is no kernel.

    Returns:
        The residual stream, and the next layer's queries, keys and values; None without
        `weights.qkv`.

    Raises:
        ValueError: Shapes that do not fit each other, or what is no plan of these products.
        TypeError: Different dtypes.
    """
    _require_chain(attended, hidden, weights)
    plan_of = _plans_of(plans, ("o", "gate_up", "down", "qkv"))

    def kernel(attended, hidden, weights):
        result = _ffi_cuda.Result
        steps = [
            _ffi_cuda.Step(
                attended,
                weights.o.data,
                weights.o.shape[0],
                residual=hidden,
                places=weights.gate_up_places,
                plan=plan_of["o"],
            ),
            _ffi_cuda.Step(
                result(0, weights.gate_up_places is not None),
                weights.gate_up.data,
                weights.gate_up.shape[0],
                norm=True,
                swiglu=True,
                plan=plan_of["gate_up"],
            ),
            _ffi_cuda.Step(
                result(1),
                weights.down.data,
                weights.down.shape[0],
                residual=result(0),
                places=None if weights.qkv is None else weights.qkv_places,
                plan=plan_of["down"],
            ),
        ]
        if weights.qkv is not None:
            steps.append(
                _ffi_cuda.Step(
                    result(2, weights.qkv_places is not None),
                    weights.qkv.data,
                    weights.qkv.shape[0],
                    norm=True,
                    plan=plan_of["qkv"],
                )
            )
        done = _ffi_cuda.chain(steps, epsilon=epsilon, prefetch=prefetch)
        return done[2][0], None if weights.qkv is None else done[3][0]

    def plain(attended, hidden, weights):
        return sparse_chain_reference(attended, hidden, weights, epsilon=epsilon)

    if not decode_fits(hidden.shape[0]):
        return plain(attended, hidden, weights)
    return jax.lax.platform_dependent(attended, hidden, weights, cuda=kernel, default=plain)


def sparse_chain_reference(
    attended: Float[Array, "row feature"],
    hidden: Float[Array, "row channel"],
    weights: ChainWeights,
    *,
    epsilon: float,
) -> tuple[Float[Array, "row channel"], Float[Array, "row out"] | None]:
    """What `sparse_chain` computes, in plain JAX; each product's result is rounded once."""
    _require_chain(attended, hidden, weights)

    def normed(hidden, blob, places, **options):
        x = hidden if places is None else jnp.zeros_like(hidden).at[:, places].set(hidden)
        return fused_matmul_reference(x, blob, norm_epsilon=epsilon, **options)

    hidden = fused_matmul_reference(attended, weights.o, residual=hidden)
    inner = normed(hidden, weights.gate_up, weights.gate_up_places, swiglu=True)
    hidden = fused_matmul_reference(inner, weights.down, residual=hidden)
    if weights.qkv is None:
        return hidden, None
    return hidden, normed(hidden, weights.qkv, weights.qkv_places)


def fused_takes(rows: int) -> bool:
    """Whether so many rows should go through the products of this file rather than `sparse_matmul`.

    Not on a GPU whose build lacks the decode kernel: there they would unpack the weight, which
    `sparse_matmul` may leave to cuSPARSELt.
    """
    few = 1 <= rows <= _ffi_cuda.MAX_ROWS
    return few and (_ffi_cuda.decode_available() or jax.default_backend() != "gpu")


def _with_data(blob: Blob24, data: Array) -> Blob24:
    return Blob24(data, blob.shape, blob.dtype)


def _require_chain(attended: Array, hidden: Array, weights: ChainWeights) -> None:
    channels = hidden.shape[1]
    _require(attended, weights.o, hidden, None, weights.gate_up_places, False)
    _require_mlp(hidden, weights.gate_up, weights.down)
    if weights.qkv is not None:
        _require(hidden, weights.qkv, None, None, None, False)
        if weights.qkv_places is not None and weights.qkv_places.shape != (channels,):
            raise ValueError(
                f"qkv_places must name a place for each of the {channels} channels; got shape "
                f"{tuple(weights.qkv_places.shape)}."
            )


def _require_mlp(x: Array, gate_up: Blob24, down: Blob24) -> None:
    _require_blob24(gate_up, down)
    inner = gate_up.shape[0] // 2
    if down.shape != (x.shape[1], inner):
        raise ValueError(
            f"x {tuple(x.shape)} and gate_up of shape {gate_up.shape} need down of shape "
            f"{(x.shape[1], inner)}; got {down.shape}."
        )
    _require(x, gate_up, None, None, None, True)
    if down.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} and down {down.dtype}; cast one of them.")


def _require_blob24(*blobs: Blob24) -> None:
    for blob in blobs:
        if not isinstance(blob, Blob24):
            raise TypeError(
                f"the fused products read a Blob24; got {type(blob).__name__}, whose layout only "
                f"cuSPARSELt knows. Use sparse_matmul, and the steps around it in plain JAX."
            )


def _require(
    x: Array,
    blob: Blob24,
    residual: Array | None,
    permutation: Array | None,
    places: Array | None,
    swiglu: bool,
) -> None:
    _require_blob24(blob)
    out, channels = blob.shape
    if x.shape[1] != channels:
        raise ValueError(
            f"x must have the weight's {channels} input channels; got shape {tuple(x.shape)} for a "
            f"blob of dense shape {blob.shape}."
        )
    if swiglu and (residual is not None or places is not None):
        raise ValueError(
            "swiglu and residual or places cannot stand together: those are as wide as the "
            "weight's outputs, SwiGLU's result half of it. Give them to the product that follows."
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
    if places is not None and places.shape != (out,):
        raise ValueError(
            f"places must name one for each of the {out} outputs; got shape {tuple(places.shape)}."
        )
    for name, array in (("x", x), ("residual", residual)):
        if array is not None and array.dtype != blob.dtype:
            raise TypeError(
                f"{name} is {array.dtype} and the weight {blob.dtype}; cast it, "
                f"{name}.astype({blob.dtype})."
            )
