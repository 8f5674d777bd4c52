"""Shapes of published models, and of the products in a decoder layer."""

from typing import Any, NamedTuple

from esparse_jax.models.llama import LlamaConfig, RopeConfig

Shape = tuple[int, int]  # (out, channel)


def decoder_shapes(
    hidden: int, intermediate: int, query: int, key_value: int, *, fused: bool = True
) -> dict[str, Shape]:
    """`(out, channel)` of each product of a LLaMA layer, by name.

    Args:
        hidden: Channels of the residual stream.
        intermediate: Of the MLP.
        query: Features of all query heads together.
        key_value: Features of all key heads together, and of all value heads.
        fused: Whether projections that share their input are one product.
    """
    if fused:
        return {
            "qkv": (query + 2 * key_value, hidden),
            "o": (hidden, query),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
        }
    return {
        "q": (query, hidden),
        "k": (key_value, hidden),
        "v": (key_value, hidden),
        "o": (hidden, query),
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }


def product_shapes(config: LlamaConfig, *, fused: bool = True) -> dict[str, Shape]:
    """`(out, channel)` of each product in a layer of a model, see `decoder_shapes`."""
    return decoder_shapes(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        fused=fused,
    )


def _model(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, **more: Any
) -> LlamaConfig:
    fields = {"vocab_size": 32000, "dtype": "float16"} | more
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        **fields,
    )


# From the models' own config.json; 70B is LLaMA 2's.
PUBLISHED_MODELS: dict[str, LlamaConfig] = {
    "llama-7b": _model(4096, 11008, 32, 32, 32),
    "llama-13b": _model(5120, 13824, 40, 40, 40),
    "llama-30b": _model(6656, 17920, 60, 52, 52),
    "llama-65b": _model(8192, 22016, 80, 64, 64, rms_norm_eps=1e-5),
    "llama-70b": _model(8192, 28672, 80, 64, 8, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-3-8b": _model(
        4096,
        14336,
        32,
        32,
        8,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=RopeConfig(theta=500000.0),
    ),
}

# Fused products that are timed and tuned by name. Those of the paper's table 5 are a layer of
# 14,336 channels, BLOOM-176B's, cut into eight for as many GPUs.
PUBLISHED_SHAPES: dict[str, dict[str, Shape]] = {
    "table-5": {
        "qkv": (5376, 14336),
        "att_out": (14336, 1792),
        "ffn_1": (7168, 14336),
        "ffn_2": (14336, 7168),
    },
    **{
        name: product_shapes(PUBLISHED_MODELS[name])
        for name in ("llama-7b", "llama-13b", "llama-70b", "llama-3-8b")
    },
}


def published_shapes(name: str, *, fused: bool = True) -> dict[str, Shape]:
    """The products of one of `PUBLISHED_SHAPES`, fused or not; table 5 has them fused only."""
    if fused or name not in PUBLISHED_MODELS:
        return PUBLISHED_SHAPES[name]
    return product_shapes(PUBLISHED_MODELS[name], fused=False)


class ModelBytes(NamedTuple):
    """What a model's arrays take on a device, by what they are.

    Attributes:
        linear: Weights of the linears in the decoder layers.
        outside: Embedding, head and norms.
        cache: Keys and values.
    """

    linear: int
    outside: int
    cache: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def model_bytes(
    config: LlamaConfig, *, sparse: bool, width: int = 2, batch: int = 0, slots: int = 0
) -> ModelBytes:
    """Computes what a model and its cache take, from the shapes alone.

    Channel orders are left out: an inference model of `heads="within"` has 8 bytes of them a
    channel of the residual stream and layer. Biases are, too.

    Args:
        config: Of the model.
        sparse: Whether its linears are 2:4: half of the values, and two bits for each.
        width: Bytes of a number.
        batch: Rows of the cache.
        slots: Positions of each row.
    """
    products = product_shapes(config).values()
    weights = config.num_hidden_layers * sum(out * channels for out, channels in products)
    linear = weights * width // 2 + weights // 8 if sparse else weights * width
    tables = 1 if config.tie_word_embeddings else 2
    norms = 2 * config.num_hidden_layers + 1
    outside = config.hidden_size * (tables * config.vocab_size + norms) * width
    features = config.num_key_value_heads * config.head_dim
    cache = 2 * config.num_hidden_layers * batch * slots * features * width
    return ModelBytes(linear, outside, cache)
