"""Linears are found, watched, replaced and compressed by their checkpoint path."""

import inspect
import logging
from functools import partial

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
from flax import nnx

from esparse_jax.models.layers import MaskedLinear, ObservedLinear, SparseLinear
from esparse_jax.models.llama import LAYERS_PATH, PRUNED_GROUPS
from esparse_jax.models.surgery import (
    choose_forms,
    clone_model,
    get_linear,
    iter_linears,
    matches_path,
    observe,
    observed,
    observed_grams,
    replace_linears,
    set_linear,
    sparsify_model,
    split_layer,
    unobserve,
    weight_of,
    with_weight,
)
from esparse_jax.pruning.mask import NMPattern
from esparse_jax.pruning.stats import init_range
from esparse_jax.sparse.machine import Machine
from esparse_jax.sparse.table import KernelTime, Record, TuningTable, use_table

FIELDS = llama_cases.CASES["gqa"]
PRUNED = sorted(path for group in PRUNED_GROUPS for path in group)


@pytest.fixture(scope="module")
def model():
    return llama_cases.build(FIELDS)


def pruned_model(model, pattern, *, shuffled):
    """The model with random weights kept n of every m in a random order of the channels."""
    generator = np.random.default_rng(2)
    pruned, permutations = clone_model(model), {}
    for path, linear in iter_linears(model):
        if not path.startswith(LAYERS_PATH):
            continue
        weight = np.asarray(weight_of(linear))
        order = np.arange(weight.shape[1])
        if shuffled:
            order = generator.permutation(order)
        scores = generator.random((weight.shape[0], weight.shape[1] // pattern.m, pattern.m))
        keep = np.empty(weight.shape, bool)
        keep[:, order] = (scores.argsort(-1).argsort(-1) < pattern.n).reshape(weight.shape)
        set_linear(pruned, path, with_weight(linear, jnp.where(keep, weight, 0.0)))
        permutations[path] = order.astype(np.int32) if shuffled else None
    return pruned, permutations


def test_linears_have_their_checkpoint_names(model):
    paths = [path for path, _ in iter_linears(model)]
    blocks = [f"{LAYERS_PATH}.{index}.{path}" for index in range(2) for path in PRUNED]
    assert paths == ["lm_head", *blocks]
    assert [path for path, _ in iter_linears(model.model.layers[1])] == PRUNED
    assert [path for path, _ in iter_linears(clone_model(model))] == paths
    named = llama_cases.weights(FIELDS)
    for path, linear in iter_linears(model):
        assert get_linear(model, path) is linear
        np.testing.assert_array_equal(weight_of(linear), named[f"{path}.weight"])


def test_with_weight_leaves_the_given_layer(model):
    path = "model.layers.0.mlp.down_proj"
    linear = get_linear(model, path)
    before = weight_of(linear)
    changed = with_weight(linear, 2.0 * before)
    np.testing.assert_array_equal(weight_of(changed), 2.0 * before)
    np.testing.assert_array_equal(weight_of(linear), before)
    assert changed.bias.get_value() is linear.bias.get_value()
    with pytest.raises(ValueError, match=r"shape \(96, 64\); .* \(64, 96\)"):
        with_weight(linear, before.T)


def test_clones_share_arrays_and_nothing_else(model):
    clone = clone_model(model)
    for (path, ours), (_, theirs) in zip(iter_linears(clone), iter_linears(model), strict=True):
        assert ours is not theirs
        assert ours.kernel is not theirs.kernel
        assert ours.kernel.get_value() is theirs.kernel.get_value(), path
    before = weight_of(get_linear(model, "lm_head"))
    get_linear(clone, "lm_head").kernel.set_value(jnp.zeros((64, 61)))
    set_linear(clone, "model.layers.1.mlp.up_proj", get_linear(model, "lm_head"))
    np.testing.assert_array_equal(weight_of(get_linear(model, "lm_head")), before)
    assert weight_of(get_linear(model, "model.layers.1.mlp.up_proj")).shape == (96, 64)


def test_a_function_jitted_for_one_block_serves_all(model):
    traces = []

    @partial(jax.jit, static_argnums=0)
    def forward(graphdef, state, hidden):
        traces.append(hidden.shape)
        return nnx.merge(graphdef, state)(hidden)

    hidden = model.embed(jnp.asarray(llama_cases.tokens("gqa", 12)))
    for layer in model.model.layers:
        hidden = forward(*split_layer(layer), hidden)
    assert len(traces) == 1
    _, error = llama_cases.torch_logits("gqa", 12)
    expected = llama_cases.our_logits("gqa", 12)
    llama_cases.assert_rounding_only(model.head(hidden), expected, error)

    # The same holds for blocks of which the same linears are watched, and for changed weights.
    starts = {"mlp.down_proj": init_range(96)}
    for layer in model.model.layers:
        watched = observe(layer, starts)
        set_linear(
            watched,
            "mlp.gate_proj",
            with_weight(get_linear(layer, "mlp.gate_proj"), jnp.zeros((96, 64))),
        )
        forward(*split_layer(watched), hidden)
    assert len(traces) == 2


def test_observing_and_back(model):
    layer = model.model.layers[0]
    inputs = {"self_attn.q_proj": 64, "self_attn.o_proj": 64, "mlp.up_proj": 64}
    watched = observe(layer, {path: init_range(size) for path, size in inputs.items()})
    hidden = model.embed(jnp.asarray(llama_cases.tokens("gqa", 12, batch=2)))

    @jax.jit
    def step(state, hidden):
        module = nnx.merge(graphdef, state)
        inputs = module.input_layernorm(hidden).reshape(-1, 64)
        module(hidden)
        return inputs, nnx.state(module)

    graphdef, state = split_layer(watched)
    normed, state = step(state, hidden)
    nnx.update(watched, state)
    seen = observed(watched)
    assert list(seen) == sorted(inputs)
    np.testing.assert_array_equal(seen["self_attn.q_proj"].maximum, normed.max(axis=0))
    assert int(seen["mlp.up_proj"].tokens) == 24
    assert isinstance(get_linear(watched, "self_attn.q_proj"), ObservedLinear)
    np.testing.assert_array_equal(
        weight_of(get_linear(watched, "self_attn.q_proj")),
        weight_of(get_linear(layer, "self_attn.q_proj")),
    )

    assert observed_grams(watched) == {}
    starts = {path: init_range(size) for path, size in inputs.items()}
    both = observe(layer, starts, grams=True)
    both(hidden)
    grams = observed_grams(both)
    assert list(grams) == list(observed(both)) == sorted(inputs)
    for path, gram in grams.items():
        assert int(gram.tokens) == 24
        np.testing.assert_allclose(
            jnp.diagonal(gram.products), observed(both)[path].sum_of_squares, rtol=1e-5
        )

    plain = unobserve(watched)
    assert {type(linear) for _, linear in iter_linears(plain)} == {nnx.Linear}
    assert {type(linear) for _, linear in iter_linears(layer)} == {nnx.Linear}
    assert split_layer(plain)[0] == split_layer(layer)[0]

    with pytest.raises(TypeError, match=r"mlp.up_proj is a ObservedLinear"):
        observe(watched, {"mlp.up_proj": init_range(64)})
    with pytest.raises(ValueError, match=r"mlp.down_proj have 64 channels; the layer has 96"):
        observe(layer, {"mlp.down_proj": init_range(64)})


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4)])
def test_the_sparse_model_is_the_masked_model(model, pattern, shuffled):
    pruned, permutations = pruned_model(model, pattern, shuffled=shuffled)
    sparse = sparsify_model(pruned, permutations, pattern=pattern)
    kinds = {path: type(linear) for path, linear in iter_linears(sparse)}
    assert kinds.pop("lm_head") is nnx.Linear
    assert set(kinds.values()) == {SparseLinear}
    ids = llama_cases.tokens("gqa", 12)
    _, error = llama_cases.torch_logits("gqa", 12)
    expected = llama_cases.run(pruned, ids)
    llama_cases.assert_rounding_only(llama_cases.run(sparse, ids), expected, error)
    assert {type(linear) for _, linear in iter_linears(pruned)} == {nnx.Linear}


def test_masked_layers_can_be_compressed(model):
    pruned, permutations = pruned_model(model, NMPattern(2, 4), shuffled=True)
    path = "model.layers.0.mlp.gate_proj"
    keep = weight_of(get_linear(pruned, path)) != 0
    masked = replace_linears(pruned, {path: MaskedLinear(get_linear(model, path), keep)})
    one = {path: permutations[path]}
    ours = sparsify_model(masked, one)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(get_linear(ours, path)),
        nnx.state(get_linear(sparsify_model(pruned, one), path)),
    )


def test_skipped_layers_stay_dense(model):
    pruned, permutations = pruned_model(model, NMPattern(2, 4), shuffled=True)
    sparse = sparsify_model(pruned, permutations, skip=("mlp.down_proj", "model.layers.1"))
    dense = [path for path, linear in iter_linears(sparse) if isinstance(linear, nnx.Linear)]
    assert dense == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.1.{path}" for path in PRUNED),
    ]


def tuning_table(**times):
    """Times for 1 and 8 rows, `(sparse, dense)` by the last part of a path."""
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "gate_proj": (96, 64), "down_proj": (64, 96)}
    records = [
        Record(*shapes[name], "float32", rows, dense, KernelTime(sparse))
        for name, (sparse, dense) in times.items()
        for rows in (1, 8)
    ]
    return TuningTable(Machine("Abacus 9", "9.0", None), "0.11.2", tuple(records))


def test_layers_that_are_faster_dense_stay_so(model, caplog):
    pruned, permutations = pruned_model(model, NMPattern(2, 4), shuffled=True)
    keep = weight_of(get_linear(pruned, "model.layers.0.mlp.down_proj")) != 0
    masked = MaskedLinear(get_linear(model, "model.layers.0.mlp.down_proj"), keep)
    pruned = replace_linears(pruned, {"model.layers.0.mlp.down_proj": masked})
    table = tuning_table(k_proj=(3.0, 2.0), down_proj=(4.0, 3.0), gate_proj=(1.0, 2.0))
    with caplog.at_level(logging.WARNING):
        sparse = sparsify_model(pruned, permutations, rows=(1, 8), table=table)
    kinds = {path.split(".", 3)[-1]: type(linear) for path, linear in iter_linears(sparse)}
    # k_proj and v_proj have one shape, as have q_proj and o_proj, which were not measured.
    dense = {path for path, kind in kinds.items() if kind is not SparseLinear}
    assert dense == {"lm_head", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}
    assert get_linear(sparse, "model.layers.0.mlp.down_proj").mask is not None
    assert [record.getMessage() for record in caplog.records] == [
        "model.layers.0.mlp.down_proj and 1 more stay dense: 64x96 float32 takes 4.0 us 2:4 and "
        "3.0 us dense for 1 to 8 rows.",
        "model.layers.0.self_attn.k_proj and 3 more stay dense: 32x64 float32 takes 3.0 us 2:4 and "
        "2.0 us dense for 1 to 8 rows.",
    ]
    ids = llama_cases.tokens("gqa", 12)
    _, error = llama_cases.torch_logits("gqa", 12)
    expected = llama_cases.run(pruned, ids)
    llama_cases.assert_rounding_only(llama_cases.run(sparse, ids), expected, error)


def test_the_forms_can_be_looked_at_before(model, caplog):
    pruned, permutations = pruned_model(model, NMPattern(2, 4), shuffled=False)
    table = tuning_table(down_proj=(4.0, 3.0))
    forms = choose_forms(pruned, permutations, rows=(1, 1), table=table)
    assert list(forms) == list(permutations)
    down = forms["model.layers.1.mlp.down_proj"]
    assert (down.form, down.sparse, down.dense) == ("dense", pytest.approx(4), pytest.approx(3))
    assert forms["model.layers.1.mlp.up_proj"].form == "sparse"
    assert "was not measured at rows 1" in forms["model.layers.1.mlp.up_proj"].reason
    with use_table(table):
        assert choose_forms(pruned, permutations, rows=(1, 1)) == forms
        with caplog.at_level(logging.WARNING):
            everything = sparsify_model(pruned, permutations)  # nobody asked for a choice
            skipped = sparsify_model(pruned, permutations, rows=(1, 1), skip=("down_proj",))
    assert caplog.records == []
    assert isinstance(get_linear(everything, "model.layers.1.mlp.down_proj"), SparseLinear)
    assert isinstance(get_linear(skipped, "model.layers.1.mlp.down_proj"), nnx.Linear)
    with pytest.raises(ValueError, match=r"smallest and the largest number .*got \(8, 1\)"):
        sparsify_model(pruned, permutations, rows=(8, 1), table=table)
    with pytest.raises(KeyError, match="no linear layer at 'mlp'"):
        choose_forms(pruned, ["mlp"], rows=(1, 1), table=table)


def test_names_match_whole_words():
    path = "model.layers.1.mlp.down_proj"
    assert all(
        matches_path(path, [name])
        for name in (path, "down_proj", "mlp.down_proj", "model.layers.1", "model")
    )
    assert not any(
        matches_path(path, [name])
        for name in ("proj", "mlp", "model.layers.10", "model.layers.1.mlp.down", "")
    )
    assert not matches_path(path, [])


@pytest.mark.parametrize(("named", "skip", "said"), [
    ({}, (), "names none"),
    ({"model.layers.0.mlp.up_proj": None}, ("up_proj",), "names skipped layers alone"),
])  # fmt: skip
def test_a_model_that_stays_dense_as_a_whole_is_told_of(model, caplog, named, skip, said):
    with caplog.at_level(logging.WARNING):
        dense = sparsify_model(model, named, skip=skip)
    assert not any(isinstance(linear, SparseLinear) for _, linear in iter_linears(dense))
    (record,) = caplog.records
    assert f"No layer is compressed: permutations {said}. " in record.getMessage()


def test_what_cannot_be_compressed_is_named(model):
    pruned, permutations = pruned_model(model, NMPattern(2, 4), shuffled=True)
    with pytest.raises(ValueError, match=r"4:8 has no compressed form.*2:4 and 1:4 fit"):
        sparsify_model(pruned, permutations, pattern=NMPattern(4, 8))
    with pytest.raises(
        ValueError, match=r"(?s)14 of 14 layers.*layers.0.*others: .*layers.1.mlp.down_proj"
    ):
        sparsify_model(pruned, dict.fromkeys(permutations))
    with pytest.raises(TypeError, match=r"permutations maps the path .*; got NoneType"):
        inspect.unwrap(sparsify_model)(pruned, None)  # the annotations refuse it first
    path = "model.layers.0.self_attn.o_proj"
    with pytest.raises(ValueError, match=f"permutation for {path} must hold each of 0..63 once"):
        sparsify_model(pruned, {path: np.zeros(64, np.int32)})
    sparse = sparsify_model(pruned, permutations)
    with pytest.raises(TypeError, match=f"{path} is compressed already"):
        sparsify_model(sparse, {path: permutations[path]})
    with pytest.raises(TypeError, match=r"SparseLinear holds no dense weight"):
        weight_of(get_linear(sparse, path))
    with pytest.raises(
        KeyError, match=r"no linear layer at 'mlp.side_proj'\. It has: mlp.down_proj"
    ):
        get_linear(model.model.layers[0], "mlp.side_proj")
    with pytest.raises(KeyError, match=r"no linear layer at 'model.layers.7.mlp.up_proj'"):
        get_linear(model, "model.layers.7.mlp.up_proj")
