from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    amplitudes,
    bin_counts,
    entropy,
    esparse_scores,
    global_deal,
    mask_nm,
    retained,
)

from esparse_jax.pruning import linear as linear_module
from esparse_jax.pruning.error import init_gram, output_error, update_gram
from esparse_jax.pruning.linear import METHODS, PruneConfig, layer_metric, prune_linear
from esparse_jax.pruning.mask import NMPattern, is_nm, nm_mask
from esparse_jax.pruning.shuffle import SHUFFLES, channel_shuffle
from esparse_jax.pruning.stats import (
    BIN_SPANS,
    amplitude,
    init_range,
    init_stats,
    update_range,
    update_stats,
)

# One shape throughout: the shuffles take seconds to compile.
OUT, CHANNELS, TOKENS, BLOCK = 24, 32, 200, 16
EPSILON = np.finfo(np.float32).eps


def stats_of(activations, *, num_bins=100, span="channel"):
    activations = jnp.asarray(activations, jnp.float32)
    seen = update_range(init_range(activations.shape[1]), activations)
    return update_stats(init_stats(seen, num_bins=num_bins, span=span), activations)


def layer(seed=0):
    """A weight, and activations whose neighbouring channels are alike, as the paper observes."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(OUT, CHANNELS)).astype(np.float32)
    scale = np.exp(np.sin(np.arange(CHANNELS) / 5) + 0.3 * rng.normal(size=CHANNELS))
    activations = (rng.normal(size=(TOKENS, CHANNELS)) ** 3 * scale).astype(np.float32)
    return weight, activations


def gram_of(activations):
    return update_gram(init_gram(activations.shape[1]), jnp.asarray(activations, jnp.float32))


def correlated_layer(seed):
    """A layer of few sources: neighbouring channels carry much of the same."""
    rng = np.random.default_rng(seed)
    weight, activations = layer(seed)
    mixed = rng.normal(size=(TOKENS, CHANNELS // 4)) @ rng.normal(size=(CHANNELS // 4, CHANNELS))
    return weight, (mixed + 0.1 * activations).astype(np.float32)


def relative_error(activations, weight, pruned):
    """Equation (4) from the outputs themselves, as a share of the dense output."""
    x = np.float64(activations)
    moved, dense = x @ (np.float64(weight) - np.float64(pruned)).T, x @ np.float64(weight).T
    return np.square(moved).sum() / np.square(dense).sum()


def config(method="esparse", shuffle="none", **options):
    return PruneConfig(method=method, shuffle=shuffle, block_size=BLOCK, **options)


def reference_scores(weight, activations, config):
    """Equations (1) to (3) for the default bin span."""
    if config.method == "magnitude":
        return np.abs(weight)
    strength = amplitudes(activations, config.amplitude)
    if config.method == "wanda":
        return np.abs(weight) * strength
    richness = [entropy(bin_counts(x, x.min(), x.max(), config.num_bins)) for x in activations.T]
    return esparse_scores(weight, richness, strength, config.alpha)


# Of the searches two, since each takes seconds to compile; test_shuffle.py has them all.
@pytest.mark.parametrize("shuffle", ["none", "global", "strided", "assignment"])
def test_all_methods(shuffle):
    weight, activations = layer()
    stats = stats_of(activations)
    for method in METHODS:
        choice = config(method, shuffle)
        pruned = prune_linear(jnp.asarray(weight), stats, choice)
        order, mask = np.asarray(pruned.permutation), np.asarray(pruned.mask)

        np.testing.assert_array_equal(np.sort(order), np.arange(CHANNELS))
        kept = mask[:, order].reshape(OUT, -1, 4).sum(axis=-1)
        np.testing.assert_array_equal(kept, 2)
        np.testing.assert_array_equal(pruned.weight, np.where(mask, weight, 0))
        assert is_nm(pruned.weight[:, pruned.permutation], choice.pattern)

        metric = layer_metric(jnp.asarray(weight), stats, choice)
        np.testing.assert_array_equal(mask[:, order], mask_nm(np.asarray(metric)[:, order], 2, 4))
        record = pruned.record
        # Float32 sums of terms of one sign.
        rounding = OUT * CHANNELS * EPSILON
        for ours, expected in (
            (record.retained, retained(metric, 2, 4, order)),
            (record.natural_retained, retained(metric, 2, 4)),
            (record.total, np.asarray(metric, np.float64).sum()),
        ):
            np.testing.assert_allclose(ours, expected, rtol=rounding)
        if shuffle == "none":
            np.testing.assert_array_equal(order, np.arange(CHANNELS))
            np.testing.assert_allclose(record.retained, record.natural_retained, rtol=rounding)
        elif shuffle != "global":  # a search retains more than where it starts
            start = prune_linear(jnp.asarray(weight), stats, config(method, "global"))
            assert start.record.retained < record.retained < record.total
        assert SHUFFLES[int(record.shuffle)] == shuffle
        assert np.isnan([record.output_error, record.natural_output_error]).all()
        assert record.alpha == PruneConfig().alpha
        assert 0 < record.richness_min < record.richness_max <= np.log(100)
        strength = amplitude(stats)
        assert record.amplitude_min == strength.min()
        assert record.amplitude_max == strength.max()


@pytest.mark.parametrize(
    ("method", "kind", "pattern"),
    [
        ("magnitude", "rms", "2:4"),
        ("wanda", "l2", "4:8"),
        ("esparse", "rms", "2:4"),
        ("esparse", "l2", "4:8"),
        ("esparse", "relative", "1:4"),
    ],
)
def test_the_whole_layer_against_the_formulas(method, kind, pattern):
    choice = config(method, "none", amplitude=kind, pattern=NMPattern.parse(pattern))
    weight, activations = layer(seed=1)
    scores = reference_scores(weight, activations, choice)
    stats = stats_of(activations)
    metric = layer_metric(jnp.asarray(weight), stats, choice)
    # The longest sums are over the tokens and the bins.
    np.testing.assert_allclose(metric, scores, rtol=TOKENS * EPSILON)
    mask = prune_linear(jnp.asarray(weight), stats, choice).mask
    np.testing.assert_array_equal(mask, mask_nm(scores, choice.pattern.n, choice.pattern.m))


@pytest.mark.parametrize("deal", ["naive", "snake"])
def test_the_global_shuffle_against_the_formulas(deal):
    choice = config(shuffle="global", deal=deal)
    weight, activations = layer(seed=2)
    pruned = prune_linear(jnp.asarray(weight), stats_of(activations), choice)
    scores = reference_scores(weight, activations, choice)
    order = global_deal(scores, 4, snake=deal == "snake")
    np.testing.assert_array_equal(pruned.permutation, order)


@pytest.mark.parametrize("span", BIN_SPANS)
def test_every_bin_span_prunes(span):
    weight, activations = layer()
    stats = stats_of(activations, num_bins=50, span=span)
    choice = config(bin_span=span, num_bins=50, alpha=0.0)
    pruned = prune_linear(jnp.asarray(weight), stats, choice)
    assert is_nm(pruned.mask, choice.pattern)
    richness = [entropy(row) for row in np.asarray(stats.histogram)]
    expected = mask_nm(np.abs(weight) * richness, 2, 4)
    np.testing.assert_array_equal(pruned.mask, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_kept_weights_are_untouched_and_pruned_ones_are_plus_zero(dtype):
    weight, activations = layer()
    weight[0, :8] = -0.0
    given = jnp.asarray(weight, dtype)
    pruned = prune_linear(given, stats_of(activations), config())
    assert pruned.weight.dtype == given.dtype
    mask = np.asarray(pruned.mask)
    assert np.asarray(pruned.weight)[mask].tobytes() == np.asarray(given)[mask].tobytes()
    assert not np.asarray(pruned.weight)[~mask].tobytes().strip(b"\0")


@pytest.mark.parametrize("shuffle", ["none", "global"])
def test_moving_scale_from_weight_to_norm_does_not_move_wandas_mask(shuffle):
    """A norm's weight up and the columns after it down: the layer computes what it did."""
    rng = np.random.default_rng(4)
    weight, normed = layer()
    norm_weight = np.exp2(rng.integers(-3, 4, CHANNELS)).astype(np.float32)
    moved = np.exp2(rng.integers(-8, 9, CHANNELS)).astype(np.float32)
    before = prune_linear(
        jnp.asarray(weight), stats_of(normed * norm_weight), config("wanda", shuffle)
    )
    after = prune_linear(
        jnp.asarray(weight / moved),
        stats_of(normed * (norm_weight * moved)),
        config("wanda", shuffle),
    )
    np.testing.assert_array_equal(after.mask, before.mask)
    np.testing.assert_array_equal(after.permutation, before.permutation)
    np.testing.assert_array_equal(after.weight * moved[None], before.weight)
    # The magnitude looks at the weight alone, so it does move: the test can tell.
    magnitudes = [
        prune_linear(jnp.asarray(w), stats_of(normed), config("magnitude")).mask
        for w in (weight, weight / moved)
    ]
    assert (magnitudes[0] != magnitudes[1]).any()


@pytest.mark.parametrize("method", METHODS)
def test_permuting_hidden_channels_permutes_the_result_along(method):
    """Groups move as wholes, and channels inside their group: the groups are what they were."""
    rng = np.random.default_rng(5)
    weight, activations = layer()
    groups = np.arange(CHANNELS).reshape(-1, 4)[rng.permutation(CHANNELS // 4)]
    moved = rng.permuted(groups, axis=1).reshape(-1)
    before = prune_linear(jnp.asarray(weight), stats_of(activations), config(method))
    after = prune_linear(
        jnp.asarray(weight[:, moved]), stats_of(activations[:, moved]), config(method)
    )
    np.testing.assert_array_equal(after.mask, before.mask[:, moved])
    np.testing.assert_array_equal(after.weight, before.weight[:, moved])


@pytest.mark.parametrize("shuffle", ["none", "global"])
@pytest.mark.parametrize("method", ["wanda", "esparse"])
def test_a_channel_of_huge_activations_is_kept(method, shuffle):
    weight, activations = layer()
    channel = 13
    before = prune_linear(jnp.asarray(weight), stats_of(activations), config(method, shuffle))
    assert not before.mask[:, channel].all()
    activations[:, channel] *= 1e6
    after = prune_linear(jnp.asarray(weight), stats_of(activations), config(method, shuffle))
    assert after.mask[:, channel].all()


def test_projections_of_one_input_stacked_are_pruned_as_apart_without_a_shuffle():
    weight, activations = layer()
    stats = stats_of(activations)
    whole = prune_linear(jnp.asarray(weight), stats, config())
    parts = [prune_linear(jnp.asarray(part), stats, config()) for part in np.split(weight, 2)]
    np.testing.assert_array_equal(whole.mask, np.concatenate([part.mask for part in parts]))


# Float32 sums over tokens and channels against float64 ones.
SUM_ROUNDING = (TOKENS + 2 * CHANNELS) * EPSILON


@pytest.mark.parametrize("shuffle", ["none", "global"])
def test_the_error_is_recorded_and_changes_nothing(shuffle):
    weight, activations = correlated_layer(0)
    given_arrays = (jnp.asarray(weight), stats_of(activations))
    plain = prune_linear(*given_arrays, config(shuffle=shuffle))
    measured = prune_linear(
        *given_arrays, config(shuffle=shuffle, measure_error=True), gram=gram_of(activations)
    )
    jax.tree.map(np.testing.assert_array_equal, measured[:3], plain[:3])
    natural = prune_linear(*given_arrays, config(shuffle="none")).weight
    record = measured.record
    for ours, pruned in (
        (record.output_error, plain.weight),
        (record.natural_output_error, natural),
    ):
        expected = relative_error(activations, weight, pruned)
        assert 0 < expected < 1
        np.testing.assert_allclose(ours, expected, rtol=100 * SUM_ROUNDING)
    for field in ("retained", "natural_retained", "total", "shuffle", "alpha"):
        assert getattr(record, field) == getattr(plain.record, field)
    rows = np.square(np.float64(activations) @ np.float64(weight - plain.weight).T).sum(axis=0)
    np.testing.assert_allclose(record.row_error, rows, rtol=100 * SUM_ROUNDING)


CANDIDATES = ("none", "global", "strided")


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31))
def test_the_least_error_is_selected(seed):
    weight, activations = correlated_layer(seed)
    stats, gram = stats_of(activations), gram_of(activations)
    found = [prune_linear(jnp.asarray(weight), stats, config(shuffle=s)) for s in CANDIDATES]
    errors = [relative_error(activations, weight, pruned.weight) for pruned in found]
    choice = config(select="error", candidates=CANDIDATES)
    selected = prune_linear(jnp.asarray(weight), stats, choice, gram=gram)
    best = CANDIDATES.index(SHUFFLES[int(selected.record.shuffle)])
    jax.tree.map(np.testing.assert_array_equal, selected[:3], found[best][:3])
    assert errors[best] <= min(errors) * (1 + 100 * SUM_ROUNDING)
    np.testing.assert_allclose(selected.record.output_error, errors[best], rtol=100 * SUM_ROUNDING)
    np.testing.assert_allclose(
        selected.record.natural_output_error, errors[0], rtol=100 * SUM_ROUNDING
    )


def test_the_best_by_the_metric_may_not_be_the_best_by_the_error():
    """Two pairs of channels that cancel: one may go without loss, and a shuffle keeps both.

    In the given order the pair 2, 3 is pruned, which no output sees, and two of the last four
    stay. The global shuffle deals every pair out, keeps all of both, and prunes the last four.
    """
    sources = np.array(
        [[(-1) ** (token & source).bit_count() for source in range(1, 7)] for token in range(8)],
        np.float32,
    )  # columns of a Hadamard matrix: orthogonal, all of one norm
    activations = sources[:, [0, 0, 1, 1, 2, 3, 4, 5]]
    weight = np.array([[10, -10, 9, -9, 1, 1, 1, 1]], np.float32)
    stats, gram = stats_of(activations), gram_of(activations)
    found = {}
    for shuffle in ("none", "global"):
        choice = config("wanda", shuffle, measure_error=True)
        found[shuffle] = prune_linear(jnp.asarray(weight), stats, choice, gram=gram).record
    assert found["global"].retained == 38 > found["none"].retained == 22
    assert found["none"].row_error == 8 * 2  # two sources gone, 8 tokens
    assert found["global"].row_error == 8 * 4
    for candidates in (("none", "global"), ("global", "none")):
        choice = config("wanda", select="error", candidates=candidates)
        selected = prune_linear(jnp.asarray(weight), stats, choice, gram=gram)
        assert SHUFFLES[int(selected.record.shuffle)] == "none"
        np.testing.assert_array_equal(selected.mask, [[1, 1, 0, 0, 1, 1, 0, 0]])


def test_equal_errors_go_to_the_earlier_candidate():
    """With one block, dealt alike, all three searches are the same search."""
    weight, activations = correlated_layer(1)
    stats, gram = stats_of(activations), gram_of(activations)
    for candidates in (("paper", "strided", "full"), ("full", "paper"), ("strided", "full")):
        choice = PruneConfig(
            block_size=CHANNELS, deal="naive", select="error", candidates=candidates
        )
        selected = prune_linear(jnp.asarray(weight), stats, choice, gram=gram)
        assert SHUFFLES[int(selected.record.shuffle)] == candidates[0]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("heads", [(8, 8), (4, 2), (4, 1)])
def test_heads_and_slices_keep_their_channels(heads, shuffle):
    weight, activations = layer(3)
    stats = stats_of(activations)
    options = {"slices": 2, "pattern": NMPattern(1, 4)}
    pruned = prune_linear(
        jnp.asarray(weight), stats, config("wanda", shuffle, **options), heads=heads
    )
    order = np.asarray(pruned.permutation)
    np.testing.assert_array_equal(np.sort(order), np.arange(CHANNELS))
    assert is_nm(pruned.weight[:, order], NMPattern(1, 4))
    assert pruned.mask.sum() == OUT * CHANNELS // 4
    size = CHANNELS // heads[0]
    inside = order.reshape(heads[0], size) - size * np.arange(heads[0])[:, None]
    assert inside.min() == 0
    assert inside.max() == size - 1
    shared = heads[0] // heads[1]
    np.testing.assert_array_equal(inside, np.repeat(inside[::shared], shared, axis=0))
    if shuffle not in ("none", "global"):
        start = prune_linear(
            jnp.asarray(weight), stats, config("wanda", "global", **options), heads=heads
        )
        assert pruned.record.retained >= start.record.retained * (1 - OUT * CHANNELS * EPSILON)
    free = prune_linear(jnp.asarray(weight), stats, config("wanda", shuffle, **options))
    np.testing.assert_array_equal(np.asarray(free.permutation) // 16, np.repeat([0, 1], 16))


def test_candidates_keep_to_heads_too():
    weight, activations = correlated_layer(2)
    selected = prune_linear(
        jnp.asarray(weight),
        stats_of(activations),
        config(select="error", candidates=("global", "strided")),
        gram=gram_of(activations),
        heads=(4, 2),
    )
    np.testing.assert_array_equal(np.asarray(selected.permutation) // 8, np.repeat(np.arange(4), 8))


@pytest.mark.parametrize(
    ("common", "option"),
    [({}, {"deal": "snake"}), ({}, {"scores": "float32"}), ({"deal": "naive"}, {"escape": 4})],
)
def test_options_of_the_search_reach_it(common, option):
    weight, activations = layer(6)
    stats = stats_of(activations)
    metric = layer_metric(jnp.asarray(weight), stats, PruneConfig())
    expected, plain = (
        channel_shuffle(metric, NMPattern(2, 4), method="full", **options)
        for options in (common | option, common)
    )
    choice = PruneConfig(shuffle="full", **common, **option)
    pruned = prune_linear(jnp.asarray(weight), stats, choice)
    np.testing.assert_array_equal(pruned.permutation, expected)
    # float32 sums decide like fixed point unless two gains are nearly equal.
    assert (expected != plain).any() or "scores" in option


def test_an_error_without_its_gram_matrix():
    weight, activations = layer()
    given_arrays = (jnp.asarray(weight), stats_of(activations))
    with pytest.raises(ValueError, match=r"select='error' looks at .*Give gram=.*init_gram\(32\)"):
        prune_linear(*given_arrays, config(select="error"))
    with pytest.raises(ValueError, match="measure_error=True looks at the layer's output"):
        prune_linear(*given_arrays, config(measure_error=True))
    with pytest.raises(ValueError, match="Gram matrix is of 16 input channels; the layer has 32"):
        prune_linear(*given_arrays, config(measure_error=True), gram=init_gram(16))
    with pytest.raises(ValueError, match="32 channels do not make 16 heads of whole 2:4 groups"):
        prune_linear(*given_arrays, config(), heads=(16, 16))
    with pytest.raises(ValueError, match="2 slices cut through 1 heads"):
        prune_linear(*given_arrays, config(slices=2), heads=(1, 1))


def test_another_choice_finds_the_stages_compiled():
    weight, activations = layer()
    given_arrays = (jnp.asarray(weight), stats_of(activations))
    gram = gram_of(activations)
    stages = (
        linear_module._metric,
        linear_module._masked_errors,
        linear_module._prune_in_best_order,
    )

    def prune(**options):
        prune_linear(*given_arrays, PruneConfig(measure_error=True, **options), gram=gram)
        return [stage._cache_size() for stage in stages]

    first = prune(shuffle="none")
    assert prune(shuffle="global", alpha=30, deal="snake", skip=("o_proj",)) == first
    assert prune(shuffle="global", heads="within", escape=1, slices=2) == first


def test_selection_inside_jit():
    weight, activations = correlated_layer(3)
    stats, gram = stats_of(activations), gram_of(activations)
    choice = config(select="error", candidates=("none", "global"))

    @jax.jit
    def pruned_error(weight, stats, gram):
        pruned = prune_linear(weight, stats, choice, gram=gram)
        return pruned.mask, output_error(weight, pruned.weight, gram), pruned.record.output_error

    mask, error, share = pruned_error(jnp.asarray(weight), stats, gram)
    outside = prune_linear(jnp.asarray(weight), stats, choice, gram=gram)
    np.testing.assert_array_equal(mask, outside.mask)
    np.testing.assert_allclose(share, outside.record.output_error, rtol=SUM_ROUNDING)
    np.testing.assert_allclose(error, outside.record.row_error.sum(), rtol=SUM_ROUNDING)


def test_usable_in_anybodys_jit():
    weight, activations = layer()
    stats, choice = stats_of(activations), config(shuffle="global")

    @jax.jit
    def kept_weight(weight, stats):
        return prune_linear(weight, stats, choice).weight

    expected = prune_linear(jnp.asarray(weight), stats, choice).weight
    np.testing.assert_array_equal(kept_weight(jnp.asarray(weight), stats), expected)


def test_without_calibration_magnitude_still_prunes():
    weight, _ = layer()
    pruned = prune_linear(
        jnp.asarray(weight), init_stats(init_range(CHANNELS)), config("magnitude")
    )
    np.testing.assert_array_equal(
        pruned.mask, nm_mask(jnp.abs(jnp.asarray(weight)), NMPattern(2, 4))
    )


def test_channels_not_a_multiple_of_m():
    stats = init_stats(init_range(172))
    with pytest.raises(ValueError, match=r"4:8 pruning .* multiple of 8; this one has 172"):
        prune_linear(jnp.ones((4, 172)), stats, config(pattern=NMPattern(4, 8)))


def test_a_flax_kernel_that_was_not_transposed():
    stats = init_stats(init_range(CHANNELS))
    with pytest.raises(ValueError, match=r"32 input channels; .* \(32, 24\).*give its transpose"):
        prune_linear(jnp.ones((CHANNELS, OUT)), stats, config())


def test_config_is_hashable_and_compares_by_value():
    assert hash(PruneConfig()) == hash(PruneConfig(pattern=NMPattern.parse("2:4")))
    assert PruneConfig(alpha=30) == PruneConfig(alpha=30.0)
    assert isinstance(PruneConfig(alpha=30).alpha, float)
    assert PruneConfig() != PruneConfig(alpha=1.0)


def test_only_choices_that_look_at_the_error_need_the_gram_matrix():
    assert not PruneConfig().needs_gram
    assert PruneConfig(select="error").needs_gram
    assert PruneConfig(measure_error=True).needs_gram
    assert PruneConfig().candidates == SHUFFLES


def test_config_takes_every_shuffle():
    assert [PruneConfig(shuffle=shuffle).shuffle for shuffle in SHUFFLES] == list(SHUFFLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sparsegpt"}, "method is one of magnitude, wanda, esparse; got 'sparsegpt'"),
        ({"shuffle": "random"}, "shuffle is one of none, global, .*; got 'random'"),
        ({"amplitude": "l1"}, "amplitude is one of rms, l2, relative; got 'l1'"),
        ({"bin_span": "token"}, "bin_span is one of channel, layer, rms; got 'token'"),
        ({"deal": "poker"}, "deal is one of naive, .*; got 'poker'"),
        ({"alpha": -1.0}, "alpha is finite and not negative; got -1.0"),
        ({"alpha": float("nan")}, "alpha is finite and not negative; got nan"),
        ({"num_bins": 1}, "num_bins is at least 2 .*; got 1"),
        ({"scores": "bf16"}, "scores is one of fixed, float32; got 'bf16'"),
        ({"heads": "inside"}, "heads is one of free, within; got 'inside'"),
        ({"select": "loss"}, "select is one of metric, error; got 'loss'"),
        ({"escape": -1}, "escape is at least 0 .*; got -1"),
        ({"slices": 0}, "slices is at least 1 .*; got 0"),
        ({"candidates": ()}, r"candidates are one or more of none, .*; got \(\)"),
        ({"candidates": ("none", "best")}, "candidates are one or more of none, .*'best'"),
        ({"candidates": ("full", "full")}, "each once; got .*'full', 'full'"),
        ({"block_size": 3}, "block_size is at least 4 .*whole groups of 2:4.*; got 3"),
    ],
)
def test_config_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, r"takes an NMPattern, for example NMPattern.parse\('2:4'\)"),
        ({"alpha": "auto"}, "alpha is a number; got 'auto'"),
        ({"num_bins": 10.0}, r"num_bins is an int; got 10\.0"),
        ({"block_size": True}, "block_size is an int; got True"),
        ({"slices": 2.0}, r"slices is an int; got 2\.0"),
        ({"candidates": ["none"]}, r"candidates takes a tuple of shuffles, .*; got \['none'\]"),
        ({"measure_error": 1}, "measure_error is a bool; got 1"),
        ({"skip": ["lm_head"]}, r"skip takes a tuple of checkpoint paths, .*; got \['lm_head'\]"),
        ({"skip": "lm_head"}, "skip takes a tuple of checkpoint paths, .*; got 'lm_head'"),
    ],
)
def test_config_of_other_types(options, message):
    # The tests' type checker would refuse a whole PruneConfig before the class itself does.
    fields = {**vars(PruneConfig()), **options}
    with pytest.raises(TypeError, match=message):
        PruneConfig.__post_init__(SimpleNamespace(**fields))
