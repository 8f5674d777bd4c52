"""The model in the form that decodes fastest: fewer, larger products, and nothing between them.

`fusion.inference_model` makes it from a model of compressed layers. Linears that read one input
become one product, and shuffles disappear wherever a product before can write in the order that the
next one reads. On NVIDIA GPUs, for up to 16 rows, a layer is then an attention and one chain of
products::

    embed -> q,k,v -> attention -> [ o -> gate,up -> down -> q,k,v ] -> attention -> [ o -> ...
                                     norms, SwiGLU, residuals inside

From compute capability 9.0 on the attention of one token a row is one kernel as well, see
`decode_attention`. More rows (a prompt) go through the same weights one product at a time, with one
kernel between two of them that adds the residual, normalises, and puts the channels into the order
that is read (`_ffi_norm`). On other platforms everything goes one product at a time.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from esparse_jax.models._ffi_norm import add_norm, add_norm_reference, norm_takes
from esparse_jax.models.cache import LayerCache
from esparse_jax.models.layers import Permutation, SparseLinear
from esparse_jax.models.llama import (
    ACTIVATIONS,
    CausalLM,
    LlamaConfig,
    attends_in_one_kernel,
    decode_attention,
    rotary_attention,
)
from esparse_jax.sparse.fused import ChainWeights, fused_matmul, fused_takes, sparse_chain

# What several linears made of one input (queries, keys and values; gates and ups): side by side
# where one product gave them.
Projected = Array | tuple[Array, ...]


class InferenceLayer(nnx.Module):
    """A decoder layer of `InferenceModel`. Activations are [row, channel], whatever a row is.

    Attributes:
        qkv: One linear with queries, keys and values one below the other, or three.
        o, down: One linear each.
        gate_up: One linear, or two.
        input_norm, mlp_norm: None where the gain is in the weights that follow.
        qkv_places, mlp_places: Where each channel of the residual stream stands in the order that
            qkv and gate_up read; None for the natural order.
        o_places: The same for the attention's features and o; None where o has no order.
        qkv_fused: Whether qkv can be the end of a chain.
        mlp_fused: Whether o, gate_up and down can be a chain; gate_up has 8 rows of gate, 8 of up
            and so on then, and otherwise all of gate first.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        qkv: Sequence[nnx.Module],
        o: nnx.Module,
        gate_up: Sequence[nnx.Module],
        down: nnx.Module,
        input_norm: nnx.RMSNorm | None,
        mlp_norm: nnx.RMSNorm | None,
        qkv_fused: bool = False,
        mlp_fused: bool = False,
    ):
        self.config = config
        self.qkv = nnx.List(qkv)
        self.o = o
        self.gate_up = nnx.List(gate_up)
        self.down = down
        self.input_norm = nnx.data(input_norm)
        self.mlp_norm = nnx.data(mlp_norm)
        self.qkv_fused, self.mlp_fused = qkv_fused, mlp_fused
        self.qkv_places = nnx.data(_places(qkv[0]) if qkv_fused else None)
        self.mlp_places = nnx.data(_places(gate_up[0]) if mlp_fused else None)
        self.o_places = nnx.data(_places(o) if isinstance(o, SparseLinear) else None)

    def project(self, hidden: Float[Array, "row channel"]) -> Projected:
        """Queries, keys and values from the residual stream."""
        if self.qkv_fused and fused_takes(hidden.shape[0]):
            (linear,) = self.qkv
            return fused_matmul(
                linear.ordered(hidden),
                linear.weight.get_value(),
                norm_epsilon=self.config.rms_norm_eps,
                prefetch=True,
            )
        return self._normed_products(hidden, None, self.input_norm, self.qkv)[1]

    def split(
        self, projected: Projected
    ) -> tuple[Float[Array, "row query"], Float[Array, "row key"], Float[Array, "row key"]]:
        """Queries, keys and values, each by itself."""
        if isinstance(projected, tuple):
            return projected
        query = self.config.num_attention_heads * self.config.head_dim
        key = self.config.num_key_value_heads * self.config.head_dim
        return tuple(jnp.split(projected, (query, query + key), axis=1))

    def finish(
        self,
        attended: Float[Array, "row feature"],
        hidden: Float[Array, "row channel"],
        following: "InferenceLayer | None",
        *,
        ordered: bool = False,
    ) -> tuple[Float[Array, "row channel"], Projected | None]:
        """All that comes after the attention, and maybe the next layer's projections with it.

        Args:
            attended: The attention's output.
            hidden: The residual stream before the layer.
            following: The next layer.
            ordered: Whether attended is in the order that o reads, by `o_places`.

        Returns:
            The residual stream behind the layer; what `following.project` would give, or None if
            that is still to be computed.
        """
        if self.mlp_fused and fused_takes(hidden.shape[0]):
            with_next = following is not None and following.qkv_fused
            hidden, projected = sparse_chain(
                attended if ordered else self.o.ordered(attended),
                hidden,
                ChainWeights(
                    o=self.o.weight.get_value(),
                    gate_up=self.gate_up[0].weight.get_value(),
                    down=self.down.weight.get_value(),
                    qkv=following.qkv[0].weight.get_value() if with_next else None,
                    gate_up_places=_value(self.mlp_places),
                    qkv_places=_value(following.qkv_places) if with_next else None,
                ),
                epsilon=self.config.rms_norm_eps,
                prefetch=True,
            )
            return hidden, projected if with_next else None
        x = self.o.multiply(attended.astype(self.o.dtype)) if ordered else self.o(attended)
        hidden, both = self._normed_products(x, hidden, self.mlp_norm, self.gate_up)
        down = self.down(self._inner(both))
        if following is None or (following.qkv_fused and fused_takes(hidden.shape[0])):
            return hidden + down, None
        return following._normed_products(down, hidden, following.input_norm, following.qkv)

    def _normed_products(
        self,
        x: Float[Array, "row channel"],
        residual: Float[Array, "row channel"] | None,
        norm: nnx.RMSNorm | None,
        linears: Sequence[nnx.Module],
    ) -> tuple[Float[Array, "row channel"], Projected]:
        """The sum of x and the residual, and what linears make of its norm.

        Few rows, other dtypes and other machines than `norm_takes` says go through XLA's norm.
        """
        gain = None if norm is None else norm.scale[...]
        same = all(each.dtype == x.dtype for each in (residual, gain) if each is not None)
        if not same or not norm_takes(x.dtype, *x.shape):
            hidden = x if residual is None else residual + x
            return hidden, _each(linears, self._normed(hidden, norm))
        one = linears[0] if len(linears) == 1 and isinstance(linears[0], SparseLinear) else None
        hidden, normed = add_norm(
            x,
            residual,
            gain=gain,
            permutation=None if one is None else _value(one.permutation),
            epsilon=self.config.rms_norm_eps,
        )
        if one is None:
            return hidden, _each(linears, normed)
        return hidden, one.multiply(normed.astype(one.dtype))

    def _normed(
        self, hidden: Float[Array, "row channel"], norm: nnx.RMSNorm | None
    ) -> Float[Array, "row channel"]:
        if norm is not None:
            return norm(hidden)
        return add_norm_reference(hidden, epsilon=self.config.rms_norm_eps)[1]

    def _inner(self, both: Projected) -> Float[Array, "row inner"]:
        """Activated gates times up; in float32, as the fused kernels do it, and rounded once."""
        if isinstance(both, tuple):
            gate, up = both
        else:
            rows, width = both.shape
            shape = (rows, width // 16, 2, 8) if self.mlp_fused else (rows, 1, 2, width // 2)
            gate, up = (both.reshape(shape)[:, :, i].reshape(rows, width // 2) for i in (0, 1))
        wide = jnp.promote_types(gate.dtype, jnp.float32)
        activated = ACTIVATIONS[self.config.hidden_act](gate.astype(wide)) * up.astype(wide)
        return activated.astype(gate.dtype)


class _Inside(nnx.Module):
    """What a checkpoint has under the name `model`, with other layers."""

    def __init__(self, embed_tokens: nnx.Embed, layers: Sequence[InferenceLayer], norm: nnx.Module):
        self.embed_tokens = embed_tokens
        self.layers = nnx.List(layers)
        self.norm = norm


class InferenceModel(CausalLM):
    """A LLaMA of `InferenceLayer`s; see `fusion.inference_model`.

    It is called like any other model and generates like any other, and is neither pruned nor saved.
    The weights must be arguments of the `jit` around it, as `generate` has them: the kernels
    request them before the computation before has ended, see `fused_matmul`'s `prefetch`. It is for
    one GPU: sharded weights or caches are gathered before every kernel. What is one kernel in a
    decode step has no derivative there.

    Attributes:
        form: One of `fusion.FORMS`, that of the weights.
    """

    def __init__(
        self,
        config: LlamaConfig,
        layers: Sequence[InferenceLayer],
        *,
        embed_tokens: nnx.Embed,
        norm: nnx.Module,
        lm_head: nnx.Linear | None,
        dtype: DTypeLike,
        form: str,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.form = form
        self.model = _Inside(embed_tokens, layers, norm)
        if lm_head is not None:
            self.lm_head = lm_head

    def _blocks(
        self,
        hidden: Float[Array, "batch seq channel"],
        positions: Int[Array, "#batch seq"] | None,
        caches: list[LayerCache | None],
        empty: bool,
        in_place: bool,
    ) -> tuple[Float[Array, "batch seq channel"], list[LayerCache | None]]:
        batch, seq, channels = hidden.shape
        stream = hidden.reshape(batch * seq, channels)
        layers = list(self.model.layers)
        projected, written = None, []
        for layer, following, cache in zip(layers, [*layers[1:], None], caches, strict=True):
            if projected is None:
                projected = layer.project(stream)
            one_each = seq == 1 and positions is None and cache is not None and not empty
            ordered = False
            if one_each and not isinstance(projected, tuple):
                # Elsewhere a gather by o itself costs less.
                ordered = layer.o_places is not None and attends_in_one_kernel(
                    self.config, projected, cache
                )
                attended, cache = decode_attention(
                    self.config,
                    projected,
                    cache,
                    places=_value(layer.o_places) if ordered else None,
                    prefetch=in_place,
                )
            else:
                attended, cache = rotary_attention(
                    self.config,
                    *(x.reshape(batch, seq, -1) for x in layer.split(projected)),
                    positions,
                    cache=cache,
                    empty=empty,
                )
            attended = attended.reshape(batch * seq, -1)
            stream, projected = layer.finish(attended, stream, following, ordered=ordered)
            written.append(cache)
        return stream.reshape(hidden.shape), written


def _places(linear: SparseLinear) -> Permutation | None:
    if linear.permutation is None:
        return None
    return Permutation(jnp.argsort(linear.permutation[...]).astype(jnp.int32))


def _each(linears: Sequence[nnx.Module], x: Float[Array, "row channel"]) -> Projected:
    products = tuple(linear(x) for linear in linears)
    return products[0] if len(products) == 1 else products


def _value(variable: nnx.Variable | None) -> Any:
    return None if variable is None else variable[...]
