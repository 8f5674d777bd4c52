from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    amplitudes,
    bin_counts,
    entropy,
    esparse_scores,
    global_deal,
    mask_nm,
    retained,
)

from esparse_jax.pruning.linear import METHODS, PruneConfig, layer_metric, prune_linear
from esparse_jax.pruning.mask import NMPattern, is_nm, nm_mask
from esparse_jax.pruning.shuffle import SHUFFLES
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
        ({"skip": ["lm_head"]}, r"skip takes a tuple of checkpoint paths, .*; got \['lm_head'\]"),
        ({"skip": "lm_head"}, "skip takes a tuple of checkpoint paths, .*; got 'lm_head'"),
    ],
)
def test_config_of_other_types(options, message):
    # The tests' type checker would refuse a whole PruneConfig before the class itself does.
    fields = {**vars(PruneConfig()), **options}
    with pytest.raises(TypeError, match=message):
        PruneConfig.__post_init__(SimpleNamespace(**fields))
