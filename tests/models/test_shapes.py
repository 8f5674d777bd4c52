import jax
import pytest
from flax import nnx

from esparse_jax.models import (
    PUBLISHED_MODELS,
    PUBLISHED_SHAPES,
    LlamaConfig,
    LlamaForCausalLM,
    init_cache,
    model_bytes,
    product_shapes,
    published_shapes,
)
from esparse_jax.models.shapes import decoder_shapes
from esparse_jax.sparse.blob import why_no_blob

CONFIGS = {name: PUBLISHED_MODELS[name] for name in PUBLISHED_SHAPES if name != "table-5"}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_shapes_are_those_of_the_models(name):
    for fused in (True, False):
        assert product_shapes(CONFIGS[name], fused=fused) == published_shapes(name, fused=fused)
    assert PUBLISHED_SHAPES[name] == published_shapes(name)
    assert all(why_no_blob(shape, "float16") is None for shape in PUBLISHED_SHAPES[name].values())


def test_fused_products_hold_what_the_separate_ones_hold():
    for name in CONFIGS:
        fused, separate = (product_shapes(CONFIGS[name], fused=way) for way in (True, False))
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


# As published: LLaMA's paper (arXiv 2302.13971, table 2), Llama 2's and 3's model cards.
BILLIONS = {
    "llama-7b": 6.7,
    "llama-13b": 13.0,
    "llama-30b": 32.5,
    "llama-65b": 65.2,
    "llama-70b": 69.0,
    "llama-3-8b": 8.0,
}


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_published_models_have_the_parameters_they_are_named_after(name):
    found = model_bytes(PUBLISHED_MODELS[name], sparse=False, width=1).total
    assert found / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_arrays(tied):
    config = LlamaConfig(100, 64, 128, 3, 4, 2, tie_word_embeddings=tied, dtype="float16")
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: init_cache(config, 5, 7, dtype="float16"))
    arrays = {
        "model": sum(2 * leaf.size for leaf in jax.tree.leaves(nnx.state(model))),
        "cache": sum(2 * leaf.size for leaf in (*cache.keys, *cache.values)),
    }
    found = model_bytes(config, sparse=False, batch=5, slots=7)
    assert (found.linear + found.outside, found.cache) == (arrays["model"], arrays["cache"])
    assert found.total == sum(arrays.values())


@pytest.mark.parametrize(("width", "share"), [(2, 0.5625), (4, 0.53125)])
def test_compressed_linears_take_their_share(width, share):
    config = PUBLISHED_MODELS["llama-7b"]
    dense, sparse = (model_bytes(config, sparse=form, width=width) for form in (False, True))
    assert sparse.linear == share * dense.linear
    assert sparse.outside == dense.outside
    assert dense.linear == 6_476_005_376 * width
