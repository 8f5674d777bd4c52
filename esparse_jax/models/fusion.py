"""Surgery that makes an `InferenceModel` of a model of compressed layers, layer by layer.

Linears that read one input become one, and the channel order of each linear goes where it costs the
least:

    down          into the rows of gate and up
    o             into the rows of v, where the order stays inside heads; else the attention of a
                  decode step writes its output in that order (one gather elsewhere)
    q, k, v and   the product before writes its result a second time in that order (one gather each
    gate, up      where products run one at a time); the residual stream keeps the natural order

Source: E-Sparse, section 4. Paper silent: what the shuffle costs at run time.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from esparse_jax.models.inference import InferenceLayer, InferenceModel
from esparse_jax.models.layers import DenseLinear, MaskedLinear, ObservedLinear, SparseLinear
from esparse_jax.models.llama import (
    CausalLM,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)
from esparse_jax.models.surgery import iter_linears, set_linear, weight_of
from esparse_jax.sparse.blob import blob24, device_blob24, interleave_gate_up, why_no_blob
from esparse_jax.sparse.compress import (
    GROUP,
    KEPT,
    Compressed24,
    decompress24,
    kept_positions,
)

FORMS = ("device", "portable", "dense")

_LOGGER = logging.getLogger(__name__)

# The fused kernels' activation is silu alone.
_SILU = ("silu", "swish")


def default_form() -> str:
    """The form for this machine: "device" where JAX computes on a GPU, else "portable"."""
    return "device" if jax.default_backend() == "gpu" else "portable"


def inference_model(
    model: LlamaForCausalLM | InferenceModel,
    *,
    form: str | None = None,
    consume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> InferenceModel:
    """A model of compressed layers in the form that decodes fastest; the same logits but rounding.

    Whatever a layer's linears do not allow is left out for that layer, and one line is logged:
    linears are one product where all of them are compressed, in one channel order; they are part of
    a chain of fused kernels where they have no bias as well, 16 bits and sizes that are multiples
    of 64, and where the activation is silu. Other linears stay as they are, one product each.

    In the chain the gain of a norm is part of the weight behind it: `weight * gain`, computed in
    float32 and rounded once. That takes the place of another rounding of the same size, of the
    normalised and scaled activations. Where products are so small or large that float16 loses more
    than such a rounding, the layer is left out of the chain; outside of it gains stay in the norms.

    Layers are built one after the other; each time the device holds the layer in both forms.
    Embedding, last norm and head are shared with the given model.

    Args:
        model: From `load_model` of a compressed directory, or `sparsify_model`; for "dense" any
            model that is not observed. One that is an inference model already is returned as it is,
            unless another form is asked for.
        form: "device" for NVIDIA GPUs: weights in their device form (anywhere else they are
            multiplied by plain JAX, right and slow). "portable": compressed weights as they are,
            for the CPU and for float32. "dense": the same structure with dense weights, the twin
            that benchmarks compare with. None chooses for this machine, and takes the form that an
            inference model has.
        consume: Take the layers out of the given model one by one, which is of no use afterwards:
            so no weight is held twice, unless something else holds its arrays. Without it both
            models live until the caller drops the given one.
        progress: Called with (layers done, layers in all).

    Raises:
        ValueError: An unknown form, an inference model of another form, or a model without any
            compressed layer.
        TypeError: Layers that are observed, or no model.

    Source: E-Sparse, section 4.
    """
    if not isinstance(model, CausalLM):
        raise TypeError(
            f"inference_model takes a model; got {type(model).__name__}. Load it first, with "
            f"load_model, or load_inference_model, which does both."
        )
    builder = InferenceBuilder(model.config, dtype=model.dtype, form=form)
    if isinstance(model, InferenceModel):
        if form not in (None, model.form):
            raise ValueError(
                f"The model is an inference model of form {model.form!r} already, of which none of "
                f"form {form!r} is made. Make that of what load_model or sparsify_model gave, or "
                f"leave form out."
            )
        return model
    kinds = {type(linear) for _, linear in iter_linears(model)}
    if ObservedLinear in kinds:
        raise TypeError("The model has observed layers; take them out first, with unobserve.")
    if form != "dense" and SparseLinear not in kinds:
        raise ValueError(
            "The model has no compressed layer, so there is nothing to gain. Compress it with "
            "sparsify_model, or load a compressed directory; form='dense' makes the dense twin."
        )
    layers = model.model.layers
    for index in range(len(layers)):
        builder.add(layers[index])
        if consume:
            layers[index] = nnx.Module()
        if progress is not None:
            progress(index + 1, len(layers))
    return builder.finish(model)


class InferenceBuilder:
    """Builds an `InferenceModel` layer by layer, for those who have them one at a time.

    Args:
        config: The model's configuration.
        dtype: What it computes in.
        form: As for `inference_model`.
    """

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, form: str | None):
        form = default_form() if form is None else form
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}, or None.")
        self._config, self._dtype, self._form = config, jnp.dtype(dtype), form
        self._layers: list[InferenceLayer] = []
        self._slow: dict[str, list[int]] = {}

    def add(self, layer: LlamaDecoderLayer) -> None:
        """Converts the next layer. It is complete on return, so the given one may be dropped.

        Raises:
            TypeError: Its weights are in their device form already, of which there is no way to the
                fused one.
        """
        for path, linear in iter_linears(layer):
            if isinstance(linear, SparseLinear):
                held = linear.weight.get_value()
                if not isinstance(held, Compressed24):
                    raise TypeError(
                        f"{path} holds a {type(held).__name__}; an inference model is made of "
                        f"Compressed24 weights, as sparsify_model and load_model give them."
                    )
        linears = _linears_of(layer, self._dtype)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        if self._form == "dense":
            built = _dense_layer(self._config, linears, norms)
        else:
            built, reasons = _sparse_layer(
                self._config, linears, norms, device=self._form == "device"
            )
            for reason in reasons:
                self._slow.setdefault(reason, []).append(len(self._layers))
        jax.block_until_ready(jax.tree.leaves(nnx.state(built)))
        self._layers.append(built)

    def finish(self, model: LlamaForCausalLM) -> InferenceModel:
        """The model, with embedding, last norm and head of the given one; logs what is slow."""
        if self._slow:
            reasons = (f"{reason} (layers {_ranges(at)})" for reason, at in self._slow.items())
            count = len(set().union(*self._slow.values()))
            _LOGGER.warning(
                "%d of %d layers are not one chain of kernels between two attentions: %s.",
                count,
                len(self._layers),
                "; ".join(reasons),
            )
        return InferenceModel(
            self._config,
            self._layers,
            embed_tokens=_held_in(model.model.embed_tokens, self._dtype),
            norm=model.model.norm,
            lm_head=None
            if self._config.tie_word_embeddings
            else _held_in(model.lm_head, self._dtype),
            dtype=self._dtype,
            form=self._form,
        )


class _Linears(NamedTuple):
    """The linears of a decoder layer, computing in the model's dtype."""

    q_proj: nnx.Module
    k_proj: nnx.Module
    v_proj: nnx.Module
    o_proj: nnx.Module
    gate_proj: nnx.Module
    up_proj: nnx.Module
    down_proj: nnx.Module


def _linears_of(layer: LlamaDecoderLayer, dtype: np.dtype) -> _Linears:
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return _Linears(
        *(_held_in(each, dtype) for each in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    )


def _held_in(module: nnx.Module, dtype: np.dtype) -> nnx.Module:
    """The module with its weights in the dtype that it computes in, so that no step converts them.

    It is the same module, and no copy is made, where that is so already.
    """
    if isinstance(module, SparseLinear):
        weight = module.weight.get_value()
        values = weight.values.astype(dtype)
        weight = dataclasses.replace(weight, values=values)
        return SparseLinear(weight, _value(module.permutation), _value(module.bias), dtype=dtype)
    parameters = nnx.state(module, nnx.Param)
    if all(array.dtype == dtype for array in jax.tree.leaves(parameters)):
        return module
    module = nnx.clone(module)
    nnx.update(module, jax.tree.map(lambda array: array.astype(dtype), parameters))
    return module


def _dense_layer(
    config: LlamaConfig, linears: _Linears, norms: tuple[nnx.RMSNorm, nnx.RMSNorm]
) -> InferenceLayer:
    return InferenceLayer(
        config,
        qkv=[_dense(linears.q_proj, linears.k_proj, linears.v_proj)],
        o=_dense(linears.o_proj),
        gate_up=[_dense(linears.gate_proj, linears.up_proj)],
        down=_dense(linears.down_proj),
        input_norm=norms[0],
        mlp_norm=norms[1],
    )


def _dense(*linears: nnx.Module) -> DenseLinear:
    """Linears one below the other, dense, in the natural order of channels."""
    weights, biases = [], []
    for linear in linears:
        weights.append(_natural_weight(linear))
        bias = linear.linear.bias if isinstance(linear, MaskedLinear) else linear.bias
        biases.append(_value(bias))
    if all(bias is None for bias in biases):
        return DenseLinear(jnp.concatenate(weights))
    filled = [
        jnp.zeros(weight.shape[0], weight.dtype) if bias is None else bias
        for bias, weight in zip(biases, weights, strict=True)
    ]
    return DenseLinear(jnp.concatenate(weights), jnp.concatenate(filled))


def _natural_weight(linear: nnx.Module) -> Float[Array, "out channel"]:
    """The weight of any linear, dense, its channels in the natural order."""
    if not isinstance(linear, SparseLinear):
        return weight_of(linear)
    weight = decompress24(linear.weight.get_value())
    return weight if linear.permutation is None else weight[:, jnp.argsort(linear.permutation[...])]


def with_dense_linears(layer: LlamaDecoderLayer) -> LlamaDecoderLayer:
    """The same layer, its compressed linears made dense, as a dense checkpoint loads."""
    for path, linear in list(iter_linears(layer)):
        if not isinstance(linear, SparseLinear):
            continue
        dense = nnx.eval_shape(
            lambda linear=linear: nnx.Linear(
                linear.in_features,
                linear.out_features,
                use_bias=linear.bias is not None,
                dtype=linear.dtype,
                param_dtype=linear.dtype,
                rngs=nnx.Rngs(0),
            )
        )
        dense.kernel.set_value(_natural_weight(linear).astype(linear.dtype).T)
        if linear.bias is not None:
            dense.bias.set_value(linear.bias[...].astype(linear.dtype))
        set_linear(layer, path, dense)
    return layer


def _sparse_layer(
    config: LlamaConfig,
    linears: _Linears,
    norms: tuple[nnx.RMSNorm, nnx.RMSNorm],
    *,
    device: bool,
) -> tuple[InferenceLayer, list[str]]:
    """The layer, and why parts of it are not in the chain."""
    linears = _fold_orders(config, linears)
    input_norm, mlp_norm = norms
    reasons = []

    qkv = (linears.q_proj, linears.k_proj, linears.v_proj)
    why, qkv = _joined(qkv, ("q_proj", "k_proj", "v_proj"), _stacked)
    qkv_fused = False
    if device:
        why = why or _why_not_fused(qkv[0], "q_proj, k_proj and v_proj")
        folded = None if why else _with_gain(qkv[0], input_norm)
        if folded is None:
            reasons.append(why or "the gain of input_layernorm does not fit into the weights")
        else:
            qkv, input_norm, qkv_fused = (folded,), None, True

    o, down = linears.o_proj, linears.down_proj
    gate_up = (linears.gate_proj, linears.up_proj)
    mlp_fused = False
    if device:
        why = _why_no_chain(config, gate_up, o, down)
        if why is None:
            _, (joined,) = _joined(gate_up, ("gate_proj", "up_proj"), interleave_gate_up)
            folded = _with_gain(joined, mlp_norm)
            if folded is None:
                why = "the gain of post_attention_layernorm does not fit into the weights"
            else:
                gate_up, mlp_norm, mlp_fused = (folded,), None, True
        if why is not None:
            reasons.append(why)
    if not mlp_fused:
        _, gate_up = _joined(gate_up, ("gate_proj", "up_proj"), _stacked)

    if device:
        qkv, gate_up = map(_on_device, qkv), map(_on_device, gate_up)
        o, down = _on_device(o), _on_device(down)
    layer = InferenceLayer(
        config,
        qkv=tuple(qkv),
        o=o,
        gate_up=tuple(gate_up),
        down=down,
        input_norm=input_norm,
        mlp_norm=mlp_norm,
        qkv_fused=qkv_fused,
        mlp_fused=mlp_fused,
    )
    return layer, reasons


def _fold_orders(config: LlamaConfig, linears: _Linears) -> _Linears:
    """The same layer with the channel orders of o and down in the rows of v, gate and up."""
    v, o, gate, up, down = (
        linears.v_proj,
        linears.o_proj,
        linears.gate_proj,
        linears.up_proj,
        linears.down_proj,
    )
    if isinstance(o, SparseLinear) and isinstance(v, SparseLinear) and o.permutation is not None:
        rows = order_of_values(
            np.asarray(o.permutation[...]),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
        )
        if rows is not None:
            linears = linears._replace(v_proj=_with_rows(v, rows), o_proj=_in_order(o))
    both = isinstance(gate, SparseLinear) and isinstance(up, SparseLinear)
    if both and isinstance(down, SparseLinear) and down.permutation is not None:
        rows = down.permutation[...]
        linears = linears._replace(
            gate_proj=_with_rows(gate, rows),
            up_proj=_with_rows(up, rows),
            down_proj=_in_order(down),
        )
    return linears


def order_of_values(
    permutation: Int[np.ndarray, " channel"], *, num_heads: int, num_kv_heads: int
) -> Int[np.ndarray, " row"] | None:
    """The order of the value projection's rows that takes the place of o_proj's channel order.

    Args:
        permutation: Of the attention output projection, whose channels are the heads one by one.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.

    Returns:
        The order, or None where there is none: a channel leaves its head, or query heads that share
        a key/value head are ordered differently.
    """
    size = len(permutation) // num_heads
    inside = permutation.reshape(num_heads, size) - size * np.arange(num_heads)[:, None]
    if inside.min() < 0 or inside.max() >= size:
        return None
    shared = inside.reshape(num_kv_heads, num_heads // num_kv_heads, size)
    if (shared != shared[:, :1]).any():
        return None
    return (shared[:, 0] + size * np.arange(num_kv_heads)[:, None]).reshape(-1).astype(np.int32)


def _with_rows(linear: SparseLinear, rows: Int[Array, " out"] | np.ndarray) -> SparseLinear:
    """The linear with its outputs in another order."""
    weight = linear.weight.get_value()
    weight = Compressed24(weight.values[rows], weight.indices[rows], weight.shape)
    bias = None if linear.bias is None else linear.bias[...][rows]
    return SparseLinear(weight, _value(linear.permutation), bias, dtype=linear.dtype)


def _in_order(linear: SparseLinear) -> SparseLinear:
    """The linear, reading its input as it comes."""
    return SparseLinear(linear.weight.get_value(), None, _value(linear.bias), dtype=linear.dtype)


def _joined(
    linears: tuple[nnx.Module, ...],
    names: tuple[str, ...],
    join: Callable[..., Compressed24],
) -> tuple[str | None, tuple[nnx.Module, ...]]:
    """Linears that read one input as one; or why that cannot be, and the linears as they are."""
    why = _why_not_joined(linears, names)
    if why is not None:
        return why, linears
    weight = join(*(linear.weight.get_value() for linear in linears))
    first = linears[0]
    bias = None
    if first.bias is not None:
        bias = jnp.concatenate([linear.bias[...] for linear in linears])
    return None, (SparseLinear(weight, _value(first.permutation), bias, dtype=first.dtype),)


def _why_not_joined(linears: tuple[nnx.Module, ...], names: tuple[str, ...]) -> str | None:
    dense = [
        name
        for name, linear in zip(names, linears, strict=True)
        if not isinstance(linear, SparseLinear)
    ]
    if dense:
        return f"{' and '.join(dense)} not compressed"
    listed = " and ".join(names)
    orders = [_value(linear.permutation) for linear in linears]
    for order in orders[1:]:
        both = order is not None and orders[0] is not None
        if (order is not orders[0]) and not (both and bool(jnp.array_equal(order, orders[0]))):
            return f"{listed} compressed in different channel orders"
    if len({linear.bias is None for linear in linears}) > 1:
        return f"only some of {listed} with a bias"
    return None


def _stacked(*weights: Compressed24) -> Compressed24:
    """Weights one below the other."""
    return Compressed24(
        jnp.concatenate([weight.values for weight in weights]),
        jnp.concatenate([weight.indices for weight in weights]),
        (sum(weight.shape[0] for weight in weights), weights[0].shape[1]),
    )


def _why_no_chain(
    config: LlamaConfig, gate_up: tuple[nnx.Module, ...], o: nnx.Module, down: nnx.Module
) -> str | None:
    """Why o, gate and up, and down cannot be one chain, or None where they can."""
    if config.hidden_act not in _SILU:
        return f"the activation is {config.hidden_act}, and the kernels compute silu"
    why = _why_not_joined(gate_up, ("gate_proj", "up_proj"))
    for linear, name in (*zip(gate_up, ("gate_proj", "up_proj"), strict=True), (o, "o_proj")):
        why = why or _why_not_fused(linear, name)
    return why or _why_not_fused(down, "down_proj")


def _why_not_fused(linear: nnx.Module, name: str) -> str | None:
    """Why the fused kernels do not take a linear, or None where they do."""
    if not isinstance(linear, SparseLinear):
        return f"{name} not compressed"
    if linear.bias is not None:
        return f"{name} with a bias"
    reason = why_no_blob((linear.out_features, linear.in_features), linear.dtype)
    return None if reason is None else f"{name} has no device form ({reason})"


def _with_gain(linear: SparseLinear, norm: nnx.RMSNorm) -> SparseLinear | None:
    """The linear with the gain of the norm before it in its weight; None if it does not fit."""
    weight, gain = linear.weight.get_value(), linear.ordered(norm.scale[...].astype(jnp.float32))
    values, error = _scaled(weight.values, weight.indices, gain)
    # A number that is neither too small nor too large is off by half of this at most.
    if not float(error) <= float(jnp.finfo(weight.dtype).eps) / 2:
        return None
    weight = dataclasses.replace(weight, values=values)
    return SparseLinear(weight, _value(linear.permutation), dtype=linear.dtype)


@jax.jit
def _scaled(
    values: Float[Array, "out kept"],
    indices: UInt8[Array, "out byte"],
    gain: Float[Array, " channel"],
) -> tuple[Float[Array, "out kept"], Float[Array, ""]]:
    """Kept values times the gain of their channels, and the relative error of rounding them."""
    places = kept_positions(indices, values.shape[1])
    groups = gain.reshape(-1, GROUP)
    factor = jnp.zeros((), jnp.float32)
    for place in range(GROUP):
        at_place = jnp.repeat(groups[:, place], KEPT)[None]
        factor = jnp.where(places == place, at_place, factor)
    exact = values.astype(jnp.float32) * factor
    rounded = exact.astype(values.dtype)
    squares = jnp.square(exact).sum()
    error = jnp.square(rounded.astype(jnp.float32) - exact).sum()
    return rounded, jnp.where(squares == 0, 0.0, jnp.sqrt(error / squares))


def _on_device(linear: nnx.Module) -> nnx.Module:
    """A compressed linear with its weight in the device form, if it has one; others as they are."""
    if not isinstance(linear, SparseLinear):
        return linear
    weight = linear.weight.get_value()
    try:
        # Where cuSPARSELt has a layout of its own, device_blob24 would give one that the decode
        # kernel cannot read.
        fits = why_no_blob(weight.shape, weight.dtype) is None
        weight = blob24(weight) if fits else device_blob24(weight)
    except (ValueError, TypeError):
        return linear
    return SparseLinear(weight, _value(linear.permutation), _value(linear.bias))


def _value(variable: nnx.Variable | None) -> Any:
    return None if variable is None else variable[...]


def _ranges(numbers: Sequence[int]) -> str:
    """0, 2-5, 7"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
