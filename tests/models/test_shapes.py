import pytest

from esparse_jax.models import PUBLISHED_SHAPES, LlamaConfig, product_shapes, published_shapes
from esparse_jax.models.shapes import decoder_shapes
from esparse_jax.sparse.blob import why_no_blob

# Hidden, intermediate, layers, heads, key/value heads: from the models' own config.json.
CONFIGS = {
    "llama-7b": (4096, 11008, 32, 32, 32),
    "llama-13b": (5120, 13824, 40, 40, 40),
    "llama-70b": (8192, 28672, 80, 64, 8),
    "llama-3-8b": (4096, 14336, 32, 32, 8),
}


def config(name) -> LlamaConfig:
    hidden, intermediate, layers, heads, key_heads = CONFIGS[name]
    return LlamaConfig(32000, hidden, intermediate, layers, heads, key_heads)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_shapes_are_those_of_the_models(name):
    for fused in (True, False):
        assert product_shapes(config(name), fused=fused) == published_shapes(name, fused=fused)
    assert PUBLISHED_SHAPES[name] == published_shapes(name)
    assert all(why_no_blob(shape, "float16") is None for shape in PUBLISHED_SHAPES[name].values())


def test_fused_products_hold_what_the_separate_ones_hold():
    for name in CONFIGS:
        fused, separate = (product_shapes(config(name), fused=way) for way in (True, False))
        assert fused["qkv"][0] == sum(separate[part][0] for part in "qkv")
        assert fused["gate_up"][0] == separate["gate"][0] + separate["up"][0]
        weights = [sum(out * c for out, c in shapes.values()) for shapes in (fused, separate)]
        assert weights[0] == weights[1]


def test_heads_may_be_wider_than_the_stream():
    wide = LlamaConfig(100, 64, 128, 1, 4, 2, head_dim=32)
    assert product_shapes(wide) == decoder_shapes(64, 128, 128, 64)
    assert product_shapes(wide)["qkv"] == (256, 64)
    assert product_shapes(wide)["o"] == (64, 128)


def test_table_5_is_the_papers():
    """Weights in the paper are channel x out."""
    assert list(PUBLISHED_SHAPES["table-5"].values()) == [
        (5376, 14336), (14336, 1792), (7168, 14336), (14336, 7168),
    ]  # fmt: skip
    assert published_shapes("table-5", fused=False) == PUBLISHED_SHAPES["table-5"]
