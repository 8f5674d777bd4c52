import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esparse_jax.models import LlamaConfig, LlamaForCausalLM
from esparse_jax.models.inference import InferenceModel
from esparse_jax.models.random_model import random_compressed, random_layer, random_model
from esparse_jax.models.surgery import get_linear, iter_linears, weight_of
from esparse_jax.pruning import NMPattern, is_nm
from esparse_jax.sparse import Blob24, decompress24

CONFIG = LlamaConfig(61, 64, 128, 2, 4, num_key_value_heads=2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))


def logits(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model(tokens))(TOKENS))


@pytest.mark.parametrize("shuffle", ["none", "within", "free"])
def test_every_form_computes_the_same(shuffle):
    expected = logits(random_model(CONFIG, form="plain", shuffle=shuffle))
    assert np.isfinite(expected).all()
    for form in ("portable", "dense"):
        found = logits(random_model(CONFIG, form=form, shuffle=shuffle))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_plain_form_is_what_a_pruned_checkpoint_loads_as():
    model = random_model(CONFIG, form="plain", seed=3)
    assert type(model) is LlamaForCausalLM
    shaped = nnx.eval_shape(lambda: LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(model) == nnx.graphdef(shaped)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, shaped)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    for _, linear in iter_linears(model.model):
        assert float((weight_of(linear) != 0).mean()) == pytest.approx(0.5, abs=1e-3)
    scales = [
        np.abs(leaf).mean()
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))
        if "scale" in str(path)
    ]
    np.testing.assert_allclose(scales, 1, atol=0.05)


def test_a_seed_decides():
    a, b, c = (random_model(CONFIG, form="dense", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(logits(a), logits(b))
    assert (logits(a) != logits(c)).any()


def test_the_device_form_is_one_chain_a_layer():
    config = dataclasses.replace(CONFIG, dtype="float16")
    model = random_model(config, form="device")
    assert isinstance(model, InferenceModel)
    for layer in model.model.layers:
        assert layer.qkv_fused
        assert layer.mlp_fused
        assert isinstance(layer.o.weight.get_value(), Blob24)
        assert layer.o.permutation is None  # it stays inside heads
    free = random_model(config, form="device", shuffle="free")
    assert all(layer.o.permutation is not None for layer in free.model.layers)
    natural = random_model(config, form="device", shuffle="none")
    assert all(layer.mlp_places is None for layer in natural.model.layers)
    small = dataclasses.replace(CONFIG, dtype="bfloat16", tie_word_embeddings=True)
    assert random_model(small, form="device").dtype == jnp.bfloat16


def test_orders_are_shared_by_linears_that_read_one_input():
    layer = random_layer(CONFIG, jax.random.key(0), shuffle="within")
    orders = {path: np.asarray(linear.permutation[...]) for path, linear in iter_linears(layer)}
    for path, order in orders.items():
        channels = get_linear(layer, path).in_features
        np.testing.assert_array_equal(np.sort(order), np.arange(channels), err_msg=path)
        assert (order != np.arange(channels)).any(), path
    q, gate = orders["self_attn.q_proj"], orders["mlp.gate_proj"]
    np.testing.assert_array_equal(orders["self_attn.v_proj"], q)
    np.testing.assert_array_equal(orders["mlp.up_proj"], gate)
    assert (q != gate).any()
    o = orders["self_attn.o_proj"]
    np.testing.assert_array_equal(o // CONFIG.head_dim, np.repeat(np.arange(4), CONFIG.head_dim))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_2_of_4_and_keep_the_size_of_their_input(dtype):
    weight = random_compressed(jax.random.key(0), 96, 512, dtype)
    dense = decompress24(weight)
    assert (dense.shape, dense.dtype) == ((96, 512), jnp.dtype(dtype))
    assert is_nm(dense != 0, NMPattern(2, 4))
    used = (np.asarray(dense) != 0).reshape(-1, 4)
    patterns, counts = np.unique(used, axis=0, return_counts=True)
    assert len(patterns) == 6
    assert counts.min() > 0.9 * counts.mean()
    x = jax.random.normal(jax.random.key(1), (512,))
    assert float(jnp.std(dense.astype(jnp.float32) @ x)) == pytest.approx(1, abs=0.2)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="shuffle is 'all'; it must be one of none, within, free"):
        random_model(CONFIG, shuffle="all")
    with pytest.raises(ValueError, match="form is 'fast'; it must be one of"):
        random_model(CONFIG, form="fast")
    narrow = dataclasses.replace(CONFIG, head_dim=4)
    with pytest.raises(ValueError, match="multiples of 8; got 64, 128, 4"):
        random_model(narrow)
