"""Shapes of the products in a decoder layer: of published models, and of the one at hand."""

from esparse_jax.models.llama import LlamaConfig

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


# What `decoder_shapes` is made of, from the models' own config.json.
_SIZES = {
    "llama-7b": (4096, 11008, 4096, 4096),
    "llama-13b": (5120, 13824, 5120, 5120),
    "llama-70b": (8192, 28672, 8192, 1024),
    "llama-3-8b": (4096, 14336, 4096, 1024),
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
    **{name: decoder_shapes(*sizes) for name, sizes in _SIZES.items()},
}


def published_shapes(name: str, *, fused: bool = True) -> dict[str, Shape]:
    """The products of one of `PUBLISHED_SHAPES`, fused or not; table 5 has them fused only."""
    if fused or name not in _SIZES:
        return PUBLISHED_SHAPES[name]
    return decoder_shapes(*_SIZES[name], fused=False)
