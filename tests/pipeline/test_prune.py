import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esparse_jax import (
    NMPattern,
    PruneConfig,
    calibrate_block,
    channel_shuffle,
    init_range,
    init_stats,
    is_nm,
    prune_linear,
    prune_model,
    prune_params,
    sparsify_model,
    update_range,
    update_stats,
)
from esparse_jax.files.interop import flax_params_from_model
from esparse_jax.models import LlamaConfig, LlamaForCausalLM
from esparse_jax.models.llama import PRUNED_GROUPS
from esparse_jax.models.surgery import get_linear, iter_linears, set_linear, weight_of, with_weight
from esparse_jax.pipeline import prune as prune_room

FIELDS = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
WINDOWS = np.random.default_rng(0).integers(0, 61, size=(6, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(LlamaConfig.from_dict(FIELDS), rngs=nnx.Rngs(0))


@functools.cache
def pruned_by(method: str, shuffle: str, pattern: str):
    """One run for all tests that look at it."""
    config = PruneConfig(
        pattern=NMPattern.parse(pattern), method=method, shuffle=shuffle, block_size=16
    )
    model = LlamaForCausalLM(LlamaConfig.from_dict(FIELDS), rngs=nnx.Rngs(0))
    return prune_model(model, WINDOWS, config, batch_size=6)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits(model) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(WINDOWS)))


def weights(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(weight_of(linear)) for path, linear in iter_linears(model)}


@pytest.mark.parametrize(
    ("method", "shuffle", "pattern"),
    [
        ("magnitude", "none", "2:4"),
        ("wanda", "none", "4:8"),
        ("esparse", "none", "1:4"),
        ("esparse", "global", "2:4"),
        ("esparse", "paper", "2:4"),
        ("esparse", "strided", "2:4"),
        ("esparse", "strided", "4:8"),
        ("esparse", "full", "2:4"),
        ("esparse", "assignment", "2:4"),
    ],
)
def test_pruned_model_is_nm_in_its_order_and_keeps_the_other_weights(
    model, method, shuffle, pattern
):
    before = weights(model)
    pruned, report = pruned_by(method, shuffle, pattern)
    config = report.config
    assert set(report.layers) == set(before) == set(report.permutations)
    for path, weight in weights(pruned).items():
        permutation = report.permutations[path]
        np.testing.assert_array_equal(np.sort(permutation), np.arange(weight.shape[1]))
        assert bool(is_nm(jnp.asarray(weight[:, permutation]), config.pattern)), path
        kept = weight != 0
        assert kept.mean() == pytest.approx(config.pattern.n / config.pattern.m), path
        np.testing.assert_array_equal(weight[kept], before[path][kept])
        record = report.layers[path]
        assert (record.out, record.channels) == weight.shape
        assert 0 < record.kept_share < 1
        if shuffle == "none":
            assert record.kept_share == pytest.approx(record.natural_share, rel=1e-6)
            np.testing.assert_array_equal(permutation, np.arange(weight.shape[1]))
    for group in PRUNED_GROUPS:
        orders = [report.permutations[f"model.layers.0.{path}"] for path in group]
        assert all((order == orders[0]).all() for order in orders)


@pytest.mark.parametrize("shuffle", ["none", "global", "paper", "strided", "full", "assignment"])
def test_sparse_model_gives_the_logits_of_the_masked_dense_model(model, shuffle):
    pruned, report = pruned_by("esparse", shuffle, "2:4")
    masked, dense = logits(pruned), logits(model)
    ours = logits(sparsify_model(pruned, report.permutations))
    # Rounding: both are float32 sums of the same products in another order.
    scale = np.abs(masked).max()
    assert np.abs(ours - masked).max() <= 64 * np.finfo(np.float32).eps * scale
    assert np.abs(dense - masked).max() > 0.01 * scale  # pruning did change the model


def test_each_block_sees_the_pruned_blocks_before_it(model):
    config = PruneConfig(shuffle="none")
    pruned, _ = prune_model(model, WINDOWS, config, batch_size=3)
    hidden = pruned.model.layers[0](pruned.embed(jnp.asarray(WINDOWS)))
    block = model.model.layers[1]
    attended, _ = block.self_attn(block.input_layernorm(hidden), None)
    inputs = {
        "self_attn.q_proj": block.input_layernorm(hidden),
        "mlp.gate_proj": block.post_attention_layernorm(hidden + attended),
    }
    for group in (PRUNED_GROUPS[0], PRUNED_GROUPS[2]):
        x = inputs[group[0]].reshape(-1, 32)
        stats = update_stats(init_stats(update_range(init_range(32), x)), x)
        stacked = jnp.concatenate([weight_of(get_linear(block, path)) for path in group])
        expected = np.asarray(prune_linear(stacked, stats, config).mask)
        got = np.concatenate(
            [np.asarray(weight_of(get_linear(pruned.model.layers[1], p))) != 0 for p in group]
        )
        assert (expected != got).mean() < 0.002  # ties under other roundings of the activations
    dense_hidden = model.model.layers[0](model.embed(jnp.asarray(WINDOWS)))
    assert float(jnp.abs(dense_hidden - hidden).max()) > 1e-3


def test_histograms_count_every_token_whatever_the_batches(model):
    config, counts = PruneConfig(), []
    for size in (2, 6):
        batches = [model.embed(jnp.asarray(WINDOWS[i : i + size])) for i in range(0, 6, size)]
        statistics = calibrate_block(model.model.layers[0], PRUNED_GROUPS, batches, config)
        for stats in statistics.values():
            assert (np.asarray(stats.histogram).sum(axis=1) == WINDOWS.size).all()
            assert int(stats.tokens) == WINDOWS.size
        counts.append(np.concatenate([s.histogram for s in statistics.values()]))
    assert (counts[0] != counts[1]).mean() < 0.01


def test_blocks_of_a_model_share_one_compilation(model):
    config = PruneConfig(pattern=NMPattern(3, 8), shuffle="global")
    deep = LlamaForCausalLM(
        LlamaConfig.from_dict({**FIELDS, "num_hidden_layers": 4}), rngs=nnx.Rngs(1)
    )
    steps = (prune_room._observe, prune_room._forward, prune_room._shares, channel_shuffle)
    prune_model(model, WINDOWS, config, batch_size=6)
    before = [step._cache_size() for step in steps]
    prune_model(deep, WINDOWS, config, batch_size=6)
    # Once for the span and once for the histogram, once for the pruned block; the maths, whose
    # shapes are those of the other model, not at all.
    assert [step._cache_size() - count for step, count in zip(steps, before, strict=True)] == [
        2,
        1,
        0,
        0,
    ]


def test_skipped_layers_stay_dense_and_progress_counts_blocks(model):
    seen = []
    given = nnx.clone(model)
    config = PruneConfig(shuffle="none", skip=("o_proj", "model.layers.1.mlp"))
    pruned, report = prune_model(model, WINDOWS, config, progress=seen.append)
    assert [(step.done, step.blocks) for step in seen] == [(1, 2), (2, 2)]
    assert len(report.skipped) == 5
    before = weights(given)
    for path, weight in weights(model).items():
        np.testing.assert_array_equal(weight, before[path])  # the given model is untouched
    for path, weight in weights(pruned).items():
        assert (path in report.skipped) == bool((weight == before[path]).all())
    plain = report.metadata()
    assert plain["options"]["skip"] == ("o_proj", "model.layers.1.mlp")
    assert plain["pattern"] == "2:4"


def test_bad_input_is_named(model):
    config = PruneConfig(shuffle="none")
    with pytest.raises(ValueError, match=r"ids run from 0 to 61.*ids 0 to 60"):
        prune_model(model, np.array([[0, 61]], np.int32), config)
    with pytest.raises(ValueError, match=r"\[sample, seq\].*got shape \(0, 4\)"):
        prune_model(model, np.zeros((0, 4), np.int32), config)
    with pytest.raises(ValueError, match="batch_size is 0"):
        prune_model(model, WINDOWS, config, batch_size=0)
    with pytest.raises(ValueError, match=r"skip=\['proj'\] names no linear"):
        prune_model(model, WINDOWS, dataclasses.replace(config, skip=("proj",)))
    with pytest.raises(ValueError, match=r"multiple of 5.*\n.*layers\.0\.self_attn\.q_proj has 32"):
        prune_model(model, WINDOWS, PruneConfig(pattern=NMPattern(2, 5), shuffle="none"))


def test_nan_in_a_weight_or_an_activation_is_named(model):
    config = PruneConfig(shuffle="none")
    broken = nnx.clone(model)
    block = broken.model.layers[1]
    weight = weight_of(block.mlp.up_proj).at[3, 5].set(jnp.nan)
    set_linear(block, "mlp.up_proj", with_weight(block.mlp.up_proj, weight))
    with pytest.raises(FloatingPointError, match=r"among the weights.*\n.*layers\.1\.mlp\.up_proj"):
        prune_model(broken, WINDOWS, config)
    overflowing = nnx.clone(model)
    scale = overflowing.model.layers[0].input_layernorm.scale
    scale.set_value(scale[...].at[7].set(jnp.inf))
    with pytest.raises(FloatingPointError, match=r"layers\.0\.self_attn\.q_proj: 1 of 32 input"):
        prune_model(overflowing, WINDOWS, config)


def test_flax_parameters_come_back_pruned_in_their_structure(model):
    untied = LlamaForCausalLM(
        LlamaConfig.from_dict({**FIELDS, "tie_word_embeddings": False}), rngs=nnx.Rngs(2)
    )
    params = flax_params_from_model(untied)
    config = PruneConfig(shuffle="strided", block_size=16)
    pruned, report = prune_params(params, untied.config, WINDOWS, config)
    same = prune_params(params, untied.config.to_dict(), WINDOWS, config)[0]
    expected, _ = prune_model(untied, WINDOWS, config)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    expected = flax_params_from_model(expected)
    for ours, again, theirs in zip(*map(jax.tree.leaves, (pruned, same, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(again, theirs)
    kernel = np.asarray(pruned["model"]["layers"]["1"]["mlp"]["down_proj"]["kernel"])
    assert kernel.shape == (64, 32)
    order = report.permutations["model.layers.1.mlp.down_proj"]
    assert bool(is_nm(jnp.asarray(kernel.T[:, order]), config.pattern))
