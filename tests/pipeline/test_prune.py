import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esparse_jax import (
    SHUFFLES,
    NMPattern,
    PruneConfig,
    calibrate_block,
    channel_shuffle,
    init_range,
    init_stats,
    is_nm,
    load_model,
    prune_linear,
    prune_model,
    prune_params,
    row_errors,
    save_model,
    sparsify_model,
    update_range,
    update_stats,
)
from esparse_jax.files.interop import flax_params_from_model
from esparse_jax.models import LlamaConfig, LlamaForCausalLM, surgery
from esparse_jax.models.layers import SparseLinear
from esparse_jax.models.llama import PRUNED_GROUPS
from esparse_jax.models.surgery import get_linear, iter_linears, set_linear, weight_of, with_weight
from esparse_jax.pipeline import prune as prune_room
from esparse_jax.pruning import linear as linear_room

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


@pytest.mark.parametrize(
    ("shuffle", "pattern"), [("none", "1:4"), *((shuffle, "2:4") for shuffle in SHUFFLES)]
)
def test_sparse_model_gives_the_logits_of_the_masked_dense_model(model, shuffle, pattern, tmp_path):
    pruned, report = pruned_by("esparse", shuffle, pattern)
    masked, dense = logits(pruned), logits(model)
    save_model(
        pruned,
        tmp_path / "out",
        format="compressed",
        metadata=report.metadata(),
        permutations=report.permutations,
    )
    # Rounding: all are float32 sums of the same products in another order.
    scale = np.abs(masked).max()
    for sparse in (
        sparsify_model(pruned, report.permutations),
        load_model(tmp_path / "out")[0],
    ):
        kinds = {type(linear) for _, linear in iter_linears(sparse)}
        assert kinds == {SparseLinear}
        assert np.abs(logits(sparse) - masked).max() <= 64 * np.finfo(np.float32).eps * scale
    assert np.abs(dense - masked).max() > 0.01 * scale  # pruning did change the model


def inputs_of(block, hidden) -> dict[str, np.ndarray]:
    """What the linears of a block read, [token, channel], by the first of each group but o_proj."""
    attended, _ = block.self_attn(block.input_layernorm(hidden), None)
    normed = block.post_attention_layernorm(hidden + attended)
    gated = jax.nn.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)
    found = {
        "self_attn.q_proj": block.input_layernorm(hidden),
        "mlp.gate_proj": normed,
        "mlp.down_proj": gated,
    }
    return {path: np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for path, x in found.items()}


def test_the_recorded_error_is_that_of_the_outputs_and_changes_nothing(model):
    config = PruneConfig(shuffle="global", measure_error=True)
    pruned, report = prune_model(model, WINDOWS, config, batch_size=4)
    plain, unmeasured = prune_model(
        model, WINDOWS, dataclasses.replace(config, measure_error=False), batch_size=4
    )
    for (path, ours), theirs in zip(weights(pruned).items(), weights(plain).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert unmeasured.layers[path].output_error is None
    assert unmeasured.output_error is None
    assert unmeasured.metadata()["output_error"] is None

    natural, _ = prune_model(model, WINDOWS, PruneConfig(shuffle="none"), batch_size=4)
    inputs = inputs_of(model.model.layers[0], model.embed(jnp.asarray(WINDOWS)))
    dense, after, unshuffled = weights(model), weights(pruned), weights(natural)
    for group in PRUNED_GROUPS:
        if group[0] not in inputs:
            continue
        x = inputs[group[0]]
        for member in group:
            path = f"model.layers.0.{member}"
            record = report.layers[path]
            energy = np.square(x @ dense[path].T).sum()
            for ours, weight in (
                (record.output_error, after[path]),
                (record.natural_output_error, unshuffled[path]),
            ):
                expected = np.square(x @ (dense[path] - weight).T).sum() / energy
                assert ours == pytest.approx(expected, rel=1e-4), path
            assert record.shuffle == "global"
    errors = [record.output_error for record in report.layers.values()]
    assert report.output_error == pytest.approx(np.mean(errors))
    said = report.metadata()
    assert said["output_error"] == report.output_error
    assert said["layers"]["model.layers.1.mlp.up_proj"]["output_error"] == errors[-2]
    assert said["options"]["measure_error"] is True


def test_selection_by_error_takes_the_best_for_each_input(model):
    """In the first block all candidates prune the same statistics."""
    candidates = ("none", "global", "strided")
    single = [
        prune_model(model, WINDOWS, PruneConfig(shuffle=name, block_size=16, measure_error=True))[1]
        for name in candidates
    ]
    config = PruneConfig(select="error", candidates=candidates, block_size=16)
    pruned, report = prune_model(model, WINDOWS, config)
    chosen = set()
    for group in PRUNED_GROUPS:
        paths = [f"model.layers.0.{path}" for path in group]
        (name,) = {report.layers[path].shuffle for path in paths}
        chosen.add(name)
        best = single[candidates.index(name)]
        for path in paths:
            np.testing.assert_array_equal(report.permutations[path], best.permutations[path])
            assert report.layers[path].output_error == best.layers[path].output_error
        if len(paths) == 1:
            errors = [each.layers[paths[0]].output_error for each in single]
            assert report.layers[paths[0]].output_error == min(errors)
    assert chosen <= set(candidates)
    for path, weight in weights(pruned).items():
        assert bool(is_nm(jnp.asarray(weight[:, report.permutations[path]]), config.pattern))


@pytest.mark.parametrize("shuffle", ["global", "full"])
def test_a_permutation_within_the_heads_folds_into_the_values(model, shuffle):
    config = PruneConfig(shuffle=shuffle, heads="within")
    pruned, report = prune_model(model, WINDOWS, config, batch_size=6)
    heads, kv_heads, size = 4, 2, 8
    masked = logits(pruned)
    rounding = 64 * np.finfo(np.float32).eps * np.abs(masked).max()
    assert np.abs(logits(sparsify_model(pruned, report.permutations)) - masked).max() <= rounding

    folded = nnx.clone(pruned)
    for index, block in enumerate(folded.model.layers):
        order = report.permutations[f"model.layers.{index}.self_attn.o_proj"]
        inside = order.reshape(kv_heads, heads // kv_heads, size) % size
        np.testing.assert_array_equal(inside[:, 0], inside[:, 1])  # query heads move alike
        np.testing.assert_array_equal(order // size, np.repeat(np.arange(heads), size))
        rows = (inside[:, 0] + size * np.arange(kv_heads)[:, None]).reshape(-1)
        assert (rows != np.arange(rows.size)).any()
        value, output = block.self_attn.v_proj, block.self_attn.o_proj
        set_linear(block, "self_attn.v_proj", with_weight(value, weight_of(value)[rows]))
        set_linear(block, "self_attn.o_proj", with_weight(output, weight_of(output)[:, order]))
        assert bool(is_nm(weight_of(block.self_attn.o_proj), config.pattern))  # no gather left
    assert np.abs(logits(folded) - masked).max() <= rounding
    for path in ("self_attn.q_proj", "mlp.down_proj"):  # the others are free
        order = report.permutations[f"model.layers.0.{path}"]
        assert (order // size != np.repeat(np.arange(order.size // size), size)).any()


def test_slices_keep_their_channels_in_every_layer(model):
    config = PruneConfig(shuffle="strided", slices=2, heads="within", block_size=8)
    _, report = prune_model(model, WINDOWS, config, batch_size=6)
    for order in report.permutations.values():
        half = order.size // 2
        np.testing.assert_array_equal(order // half, np.repeat([0, 1], half))
    assert report.metadata()["options"]["slices"] == 2


def test_the_gram_matrix_is_gathered_only_where_it_is_needed(model, monkeypatch):
    channels = []

    def counted(count, original=surgery.init_gram):
        channels.append(count)
        return original(count)

    monkeypatch.setattr(surgery, "init_gram", counted)
    config = PruneConfig(shuffle="none", skip=("model.layers.1",))
    prune_model(model, WINDOWS, config)
    calibrate_block(
        model.model.layers[0],
        PRUNED_GROUPS,
        [model.embed(jnp.asarray(WINDOWS))],
        PruneConfig(select="error"),
    )
    assert channels == []
    prune_model(model, WINDOWS, dataclasses.replace(config, measure_error=True))
    assert sorted(channels) == [32, 32, 32, 64]  # once for each input, in one of the two passes


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


def test_measuring_compiles_nothing_for_later_blocks(model):
    config = PruneConfig(pattern=NMPattern(3, 8), shuffle="global", measure_error=True)
    deep = LlamaForCausalLM(
        LlamaConfig.from_dict({**FIELDS, "num_hidden_layers": 3}), rngs=nnx.Rngs(1)
    )
    steps = (prune_room._observe, linear_room._masked_errors, row_errors)
    prune_model(model, WINDOWS, config, batch_size=6)
    before = [step._cache_size() for step in steps]
    prune_model(deep, WINDOWS, config, batch_size=6)
    assert [step._cache_size() - count for step, count in zip(steps, before, strict=True)] == [
        2,
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
    beyond = model.config.max_position_embeddings + 1
    with pytest.raises(ValueError, match=rf"windows have {beyond} tokens and the model's context"):
        prune_model(model, np.zeros((1, beyond), np.int32), config)
    with pytest.raises(ValueError, match="batch_size is 0"):
        prune_model(model, WINDOWS, config, batch_size=0)
    with pytest.raises(ValueError, match=r"skip=\['proj'\] names no linear"):
        prune_model(model, WINDOWS, dataclasses.replace(config, skip=("proj",)))
    named = r"multiple of 5.*\n.*layers\.0\.self_attn\.q_proj has 32(.*\n)+and \d+ more$"
    with pytest.raises(ValueError, match=named):
        prune_model(model, WINDOWS, PruneConfig(pattern=NMPattern(2, 5), shuffle="none"))


def test_heads_and_slices_that_do_not_fit_are_named(model):
    within = PruneConfig(pattern=NMPattern(2, 16), shuffle="none", heads="within")
    with pytest.raises(ValueError, match=r"multiple of 16.*\n.*0\.self_attn\.o_proj has 32 in 4 h"):
        prune_model(model, WINDOWS, within)
    prune_model(model, WINDOWS, dataclasses.replace(within, skip=("o_proj",)))
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj has 32 in 3 slices"):
        prune_model(model, WINDOWS, PruneConfig(shuffle="none", slices=3))
    with pytest.raises(ValueError, match=r"o_proj has 4 heads, which 8 slices cut through"):
        prune_model(model, WINDOWS, PruneConfig(shuffle="none", slices=8, heads="within"))


def test_a_gram_matrix_beyond_float32_is_named(model):
    huge = nnx.clone(model)
    block = huge.model.layers[0]
    gate = block.mlp.gate_proj  # of zeros, so that nothing huge gets through
    set_linear(block, "mlp.gate_proj", with_weight(gate, 0 * weight_of(gate)))
    scale = block.post_attention_layernorm.scale
    scale.set_value(scale[...] * 1e20)
    config = PruneConfig(method="magnitude", shuffle="none", measure_error=True)
    with pytest.raises(FloatingPointError, match=r"0\.mlp\.gate_proj.*overflow float32"):
        prune_model(huge, WINDOWS, config)


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
    selecting = PruneConfig(select="error", candidates=("none", "global"), heads="within")
    selected, chosen = prune_params(params, untied.config, WINDOWS, selecting)
    again, _ = prune_model(untied, WINDOWS, selecting)
    for ours, theirs in zip(
        jax.tree.leaves(selected), jax.tree.leaves(flax_params_from_model(again)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert {record.shuffle for record in chosen.layers.values()} <= {"none", "global"}
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


def test_parameters_without_a_config_are_refused():
    untyped = inspect.unwrap(prune_params)  # the annotations refuse it first
    with pytest.raises(TypeError, match=r"model_config is a LlamaConfig, .* got NoneType"):
        untyped({}, None, np.zeros((1, 4), np.int32), PruneConfig())
