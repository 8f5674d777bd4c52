"""Models of random 2:4 weights, made on the device layer by layer, for benchmarks."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from esparse_jax.models.fusion import InferenceBuilder, with_dense_linears
from esparse_jax.models.inference import InferenceModel
from esparse_jax.models.layers import SparseLinear
from esparse_jax.models.llama import (
    HEADS_LINEAR,
    PRUNED_GROUPS,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)
from esparse_jax.models.surgery import get_linear, set_linear
from esparse_jax.sparse.compress import GROUP, KEPT, NIBBLE_OF_SET, Compressed24

SHUFFLES = ("none", "within", "free")


def random_model(
    config: LlamaConfig, *, form: str | None = None, shuffle: str = "within", seed: int = 0
) -> InferenceModel | LlamaForCausalLM:
    """A model of random 2:4 weights in random channel orders; of one seed the weights are the same.

    Layers are made, and brought into their form, one after the other, so the device holds the
    finished ones and one more.

    Args:
        config: Of the model; the dtype of weights and products is its `dtype`.
        form: As for `fusion.inference_model`; or "plain", a `LlamaForCausalLM` with dense linears.
        shuffle: "within": the order of the attention output projection stays inside its heads;
            "free": it does not, so its input is gathered, from Hopper on that of prompts alone;
            "none": natural orders everywhere.
        seed: Of the weights.

    Raises:
        ValueError: An unknown form or shuffle, or sizes that are not multiples of 8.
    """
    if shuffle not in SHUFFLES:
        raise ValueError(f"shuffle is {shuffle!r}; it must be one of {', '.join(SHUFFLES)}.")
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    if any(size % (2 * GROUP) for size in sizes):
        raise ValueError(
            f"random 2:4 weights need hidden_size, intermediate_size and head_dim to be multiples "
            f"of {2 * GROUP}; got {', '.join(map(str, sizes))}."
        )
    key = jax.random.key(seed)
    model = _outside(config, jax.random.fold_in(key, config.num_hidden_layers))
    plain = form == "plain"
    builder = None if plain else InferenceBuilder(config, dtype=config.dtype, form=form)
    for index in range(config.num_hidden_layers):
        layer = random_layer(config, jax.random.fold_in(key, index), shuffle=shuffle)
        if plain:
            model.model.layers[index] = with_dense_linears(layer)
            jax.block_until_ready(jax.tree.leaves(nnx.state(model.model.layers[index])))
        else:
            builder.add(layer)
    return model if plain else builder.finish(model)


def random_layer(config: LlamaConfig, key: Key[Array, ""], *, shuffle: str) -> LlamaDecoderLayer:
    """A decoder layer of random 2:4 weights.

    Linears that read one input share their channel order, as pruning makes it.
    """
    layer = nnx.eval_shape(
        lambda: LlamaDecoderLayer(
            config, dtype=config.dtype, param_dtype=config.dtype, rngs=nnx.Rngs(0)
        )
    )
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        key, drawn = jax.random.split(key)
        norm.scale.set_value(_gain(config, drawn))
    for group in PRUNED_GROUPS:
        key, ordered = jax.random.split(key)
        order = None
        if shuffle != "none":
            size = config.head_dim if group == (HEADS_LINEAR,) and shuffle == "within" else None
            order = _random_order(ordered, get_linear(layer, group[0]).in_features, size)
        for path in group:
            key, drawn = jax.random.split(key)
            linear = get_linear(layer, path)
            weight = random_compressed(drawn, linear.out_features, linear.in_features, config.dtype)
            set_linear(layer, path, SparseLinear(weight, order))
    return layer


def _random_order(key: Key[Array, ""], channels: int, size: int | None) -> Array:
    """Of all channels; or inside every `size` of them, the same in each."""
    if size is None:
        return jax.random.permutation(key, channels)
    inside = jax.random.permutation(key, size)
    return (jnp.arange(0, channels, size)[:, None] + inside[None]).reshape(-1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_compressed(key: Key[Array, ""], out: int, channels: int, dtype: str) -> Compressed24:
    """A random 2:4 weight, scaled so that a product with it is about as large as its input."""
    values, places = jax.random.split(key)
    kept = jax.random.normal(values, (out, channels // KEPT), jnp.float32)
    kept = (kept / math.sqrt(channels / KEPT)).astype(dtype)
    pairs = [chosen for chosen in range(1 << GROUP) if chosen.bit_count() == KEPT]
    nibbles = jnp.asarray(NIBBLE_OF_SET[pairs])
    drawn = nibbles[jax.random.randint(places, (out, channels // (2 * GROUP), 2), 0, len(pairs))]
    return Compressed24(kept, drawn[..., 0] | drawn[..., 1] << 4, (out, channels))


def _gain(config: LlamaConfig, key: Key[Array, ""]) -> Array:
    return (1 + 0.1 * jax.random.normal(key, (config.hidden_size,))).astype(config.dtype)


def _outside(config: LlamaConfig, key: Key[Array, ""]) -> LlamaForCausalLM:
    """A model with random embedding, head and last norm, and layers that hold no arrays."""
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    for index in range(config.num_hidden_layers):
        model.model.layers[index] = nnx.Module()
    keys = jax.random.split(key, 3)
    model.model.norm.scale.set_value(_gain(config, keys[0]))
    table = (config.vocab_size, config.hidden_size)
    model.model.embed_tokens.embedding.set_value(jax.random.normal(keys[1], table, config.dtype))
    if not config.tie_word_embeddings:
        kernel = jax.random.normal(keys[2], table[::-1], config.dtype)
        model.lm_head.kernel.set_value(kernel / math.sqrt(config.hidden_size))
    return model
