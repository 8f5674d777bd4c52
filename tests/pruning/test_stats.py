import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import amplitudes, bin_counts, entropy

from esparse_jax.pruning.stats import (
    AMPLITUDES,
    ChannelRange,
    ChannelStats,
    amplitude,
    bin_range,
    information_richness,
    init_range,
    init_stats,
    merge_range,
    merge_stats,
    update_range,
    update_stats,
)

TOKENS, CHANNELS, BINS = 24, 5, 10
EPSILON = np.finfo(np.float32).eps

activations = hnp.arrays(
    np.float32,
    (TOKENS, CHANNELS),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    | st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1.0, -1.0]),
)


def range_of(values) -> ChannelRange:
    return update_range(init_range(values.shape[1]), jnp.asarray(values))


def stats_of(values, **options) -> ChannelStats:
    return update_stats(init_stats(range_of(values), **options), jnp.asarray(values))


def awkward_values(tokens, channels, bins=100):
    """Activations that sit on the bins' edges, one float above and one below them."""
    rng = np.random.default_rng(3)
    low = rng.normal(size=channels).astype(np.float32)
    high = low + np.exp(rng.normal(size=channels)).astype(np.float32)
    edge = low + (high - low) * (rng.integers(0, bins + 1, (tokens, channels)) / bins)
    edge = np.clip(edge.astype(np.float32), low, high)
    toward = rng.choice(np.float32([-np.inf, np.inf]), (tokens, channels))
    values = np.where(rng.random((tokens, channels)) < 0.5, np.nextafter(edge, toward), edge)
    values[0], values[1] = low, high
    return np.clip(values, low, high)


@given(activations)
def test_counts_are_the_reference_counts(values):
    stats = stats_of(values, num_bins=BINS)
    for c in range(CHANNELS):
        expected = bin_counts(values[:, c], values[:, c].min(), values[:, c].max(), BINS)
        np.testing.assert_array_equal(stats.histogram[c], expected)


def test_counts_are_numpys_where_the_edges_are_exact():
    values = np.random.default_rng(0).integers(0, 65, (500, 3)).astype(np.float32)
    values[0], values[1] = 0, 64
    stats = stats_of(values, num_bins=16)
    for c in range(3):
        np.testing.assert_array_equal(stats.histogram[c], np.histogram(values[:, c], bins=16)[0])


@pytest.mark.parametrize("sizes", [(1, 332), (332, 1), (7, 64, 128, 134), (111, 111, 111)])
def test_counts_do_not_depend_on_the_batches(sizes):
    values = awkward_values(sum(sizes), 37)
    whole = stats_of(values)
    empty = init_stats(range_of(values))
    stats, start = empty, 0
    for size in sizes:
        stats = update_stats(stats, jnp.asarray(values[start : start + size]))
        start += size
    np.testing.assert_array_equal(stats.histogram, whole.histogram)
    assert stats.tokens == whole.tokens == sum(sizes)


def test_counts_do_not_depend_on_the_batches_beyond_one_block():
    tokens, channels, bins = 2600, 1024, 100  # two and a half blocks of tokens
    values = awkward_values(tokens, channels)
    whole = stats_of(values)
    stats = init_stats(range_of(values))
    for part in np.split(values, [1900]):
        stats = update_stats(stats, jnp.asarray(part))
    np.testing.assert_array_equal(stats.histogram, whole.histogram)
    low, high = values.min(axis=0), values.max(axis=0)
    index = ((values - low) * (np.float32(bins) / (high - low))).astype(np.int64)
    index = np.minimum(index, bins - 1) + bins * np.arange(channels)
    expected = np.bincount(index.reshape(-1), minlength=channels * bins)
    np.testing.assert_array_equal(whole.histogram, expected.reshape(channels, bins))


def test_counts_do_not_depend_on_what_they_are_fused_with():
    values = awkward_values(333, 37)
    empty = init_stats(range_of(values))

    @jax.jit
    def fused(stats, half):
        return update_stats(stats, half * 2)  # exact

    np.testing.assert_array_equal(
        fused(empty, jnp.asarray(values / 2)).histogram, stats_of(values).histogram
    )


@pytest.mark.parametrize("exponent", [-100, -30, 1, 30, 100])
def test_counts_do_not_depend_on_the_unit(exponent):
    values = awkward_values(333, 37)
    scaled = stats_of(values * np.float32(2.0**exponent))
    np.testing.assert_array_equal(scaled.histogram, stats_of(values).histogram)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-3e38, 3e38), (0.0, 3e38), (1.2e-38, 2.4e-38), (3e38, 3.4e38)],
)
def test_bins_at_the_ends_of_float32(low, high):
    values = np.linspace(low, high, 1000, dtype=np.float32)[:, None]
    stats = stats_of(values)
    assert np.isfinite(stats.bins_per_unit).all()
    # Evenly spread values fill every bin, up to those that round over an edge.
    counts = np.asarray(stats.histogram[0])
    assert counts.sum() == 1000
    assert counts.min() >= 8
    assert counts.max() <= 12


@given(activations, activations)
def test_every_row_sums_to_the_tokens_also_outside_the_range(first, second):
    stats = update_stats(init_stats(range_of(first), num_bins=BINS), jnp.asarray(second))
    np.testing.assert_array_equal(stats.histogram.sum(axis=1), TOKENS)


def test_what_lies_outside_is_counted_in_the_end_bins():
    empty = init_stats(range_of(np.float32([[0.0], [1.0]])), num_bins=4)
    outside = jnp.asarray([[-np.inf], [-5.0], [0.3], [5.0], [np.inf], [np.inf]], jnp.float32)
    np.testing.assert_array_equal(update_stats(empty, outside).histogram, [[2, 1, 0, 3]])


def test_every_row_sums_to_the_tokens_with_nan_among_them():
    empty = init_stats(range_of(np.float32([[0.0], [1.0]])), num_bins=4)
    stats = update_stats(empty, jnp.asarray([[np.nan], [1.0]], jnp.float32))
    np.testing.assert_array_equal(stats.histogram, [[1, 0, 0, 1]])


def test_a_nan_or_infinity_shows_in_the_range():
    values = np.ones((4, 3), np.float32)
    values[1, 0], values[2, 1] = np.nan, -np.inf
    ours = range_of(values)
    finite = np.isfinite(ours.minimum) & np.isfinite(ours.maximum)
    np.testing.assert_array_equal(finite, [False, False, True])


@given(activations, st.integers(1, TOKENS - 1))
def test_merging_equals_having_seen_both(values, cut):
    # The same shapes in every example: the rows beyond the cut are copies of a row before it.
    first, second = values.copy(), values.copy()
    first[cut:] = first[0]
    second[:cut] = second[-1]
    both = np.concatenate([first, second])

    merged_range = merge_range(range_of(first), range_of(second))
    expected_range = range_of(both)
    np.testing.assert_array_equal(merged_range.minimum, expected_range.minimum)
    np.testing.assert_array_equal(merged_range.maximum, expected_range.maximum)
    assert merged_range.tokens == expected_range.tokens == 2 * TOKENS

    empty = init_stats(merged_range, num_bins=BINS)
    merged = merge_stats(
        update_stats(empty, jnp.asarray(first)), update_stats(empty, jnp.asarray(second))
    )
    expected = update_stats(empty, jnp.asarray(both))
    np.testing.assert_array_equal(merged.histogram, expected.histogram)
    assert merged.tokens == expected.tokens
    # Two float32 sums of the same squares in another order.
    for ours, theirs in ((merged, expected), (merged_range, expected_range)):
        np.testing.assert_allclose(
            ours.sum_of_squares, theirs.sum_of_squares, rtol=2 * TOKENS * EPSILON
        )


def test_merging_with_nothing_changes_nothing():
    values = np.random.default_rng(1).normal(size=(TOKENS, CHANNELS)).astype(np.float32)
    seen = range_of(values)
    for merged in (
        merge_range(seen, init_range(CHANNELS)),
        merge_range(init_range(CHANNELS), seen),
    ):
        jax.tree.map(np.testing.assert_array_equal, merged, seen)
    empty = init_stats(seen)
    stats = update_stats(empty, jnp.asarray(values))
    for merged in (merge_stats(stats, empty), merge_stats(empty, stats)):
        jax.tree.map(np.testing.assert_array_equal, merged, stats)


def test_statistics_merge_inside_jit():
    values = np.random.default_rng(1).normal(size=(TOKENS, CHANNELS)).astype(np.float32)
    stats = stats_of(values, num_bins=BINS)
    merged = jax.jit(merge_stats)(stats, stats)
    np.testing.assert_array_equal(merged.histogram, 2 * stats.histogram)


def test_constant_and_unseen_channels_carry_nothing():
    values = np.random.default_rng(2).normal(size=(TOKENS, 3)).astype(np.float32)
    values[:, 0], values[:, 1] = 0.0, 0.7
    stats = stats_of(values)
    richness = information_richness(stats.histogram)
    np.testing.assert_array_equal(richness[:2], 0.0)
    assert richness[2] > 1.0
    for span in ("channel", "layer", "rms"):
        unseen = init_stats(init_range(3), span=span)
        np.testing.assert_array_equal(information_richness(unseen.histogram), 0.0)
        for kind in AMPLITUDES:
            np.testing.assert_array_equal(amplitude(unseen, kind=kind), 0.0)
        seen_later = update_stats(unseen, jnp.asarray(values))
        np.testing.assert_array_equal(seen_later.histogram.sum(axis=1), TOKENS)


@given(hnp.arrays(np.int32, (CHANNELS, BINS), elements=st.integers(0, 10_000)))
def test_richness_is_the_entropy(histogram):
    richness = np.asarray(information_richness(jnp.asarray(histogram)))
    # The terms add up to at most log(bins), every one and every partial sum rounded.
    tolerance = BINS * EPSILON * math.log(BINS)
    np.testing.assert_allclose(richness, [entropy(row) for row in histogram], atol=tolerance)
    assert (richness >= 0).all()
    assert (richness <= math.log(BINS) + tolerance).all()


def test_richness_at_its_ends():
    one_bin = jnp.zeros((1, 100), jnp.int32).at[0, 42].set(1_000_000)
    even = jnp.full((1, 100), 20_000_000, jnp.int32)
    assert information_richness(one_bin)[0] == 0
    np.testing.assert_allclose(information_richness(even)[0], math.log(100), rtol=100 * EPSILON)


# Squares below the smallest float32 are flushed to 0.
@pytest.mark.parametrize("kind", AMPLITUDES)
@given(values=activations.map(lambda values: np.where(abs(values) < 1e-12, 0, values)))
def test_amplitude_is_equation_2(kind, values):
    expected = amplitudes(values, kind)
    for seen in (range_of(values), stats_of(values, num_bins=BINS)):
        # A float32 sum of squares, and a mean over channels for "relative".
        np.testing.assert_allclose(amplitude(seen, kind=kind), expected, rtol=TOKENS * EPSILON)


def test_rms_does_not_grow_with_the_tokens_and_l2_does():
    values = np.random.default_rng(4).normal(size=(TOKENS, CHANNELS)).astype(np.float32)
    once, four_times = range_of(values), range_of(np.tile(values, (4, 1)))
    rtol = 4 * TOKENS * EPSILON
    for kind, factor in (("rms", 1), ("l2", 2), ("relative", 1)):
        np.testing.assert_allclose(
            amplitude(four_times, kind=kind), factor * amplitude(once, kind=kind), rtol=rtol
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_activations_are_taken_as_float32(dtype):
    # Sums in either dtype would stop growing at 256 or 2,048.
    values = jnp.concatenate([jnp.ones((4095, 2)), jnp.full((1, 2), 0.5)]).astype(dtype)
    low = range_of(values)
    np.testing.assert_array_equal(low.sum_of_squares, 4095.25)
    jax.tree.map(np.testing.assert_array_equal, low, range_of(values.astype(jnp.float32)))
    stats = stats_of(values)
    assert {leaf.dtype for leaf in stats} == {jnp.dtype("float32"), jnp.dtype("int32")}
    jax.tree.map(np.testing.assert_array_equal, stats, stats_of(values.astype(jnp.float32)))


def test_what_the_bins_span():
    values = np.float32([[0.0, -2.0], [3.0, 2.0], [0.0, 2.0], [3.0, -2.0]])
    seen = range_of(values)
    own, layer = bin_range(seen, span="channel"), bin_range(seen, span="layer")
    np.testing.assert_array_equal([own.minimum, own.maximum], [[0, -2], [3, 2]])
    np.testing.assert_array_equal([layer.minimum, layer.maximum], [[-2, -2], [3, 3]])
    rms = bin_range(seen, span="rms", k=3.0)
    expected = 3 * amplitudes(values, "rms")
    np.testing.assert_allclose(rms.maximum, expected, rtol=4 * EPSILON)
    np.testing.assert_array_equal(rms.minimum, -rms.maximum)
    stats = init_stats(seen, span="rms", k=3.0)
    np.testing.assert_array_equal(stats.minimum, rms.minimum)


def test_the_layers_span_tells_narrow_channels_from_wide_ones():
    values = np.random.default_rng(5).normal(size=(1000, 2)).astype(np.float32)
    values[:, 1] *= 0.01
    own = information_richness(stats_of(values, span="channel").histogram)
    layer = information_richness(stats_of(values, span="layer").histogram)
    assert abs(own[0] - own[1]) < 0.2
    assert layer[0] - layer[1] > 2


def test_other_channels():
    values = jnp.ones((3, 7))
    with pytest.raises(ValueError, match=r"of 5 input channels; .* have the shape \(3, 7\)"):
        update_range(init_range(5), values)
    with pytest.raises(ValueError, match=r"of 5 input channels; .* have the shape \(3, 7\)"):
        update_stats(init_stats(init_range(5)), values)
    with pytest.raises(ValueError, match="0 or more input channels; got channels=-1"):
        init_range(-1)
    with pytest.raises(ValueError, match="one has 5, the other 7"):
        merge_range(init_range(5), init_range(7))


def test_statistics_in_other_bins():
    values = np.random.default_rng(6).normal(size=(TOKENS, CHANNELS)).astype(np.float32)
    stats = stats_of(values)
    with pytest.raises(ValueError, match=r"same bins; .* are \(5, 100\) and \(5, 10\)"):
        merge_stats(stats, stats_of(values, num_bins=10))
    values[:, 1] *= 2
    with pytest.raises(
        ValueError, match=r"1 of 5 channels have other bounds\. Start both from one"
    ):
        merge_stats(stats, stats_of(values))


def test_unknown_options():
    with pytest.raises(ValueError, match="span one of channel, layer, rms; got 'quantile'"):
        init_stats(init_range(5), span="quantile")
    with pytest.raises(ValueError, match=r"k root mean squares to either side; got k=0\.0"):
        bin_range(init_range(5), span="rms", k=0.0)
    with pytest.raises(ValueError, match="at least one bin; got num_bins=0"):
        init_stats(init_range(5), num_bins=0)
    with pytest.raises(ValueError, match="one of rms, l2, relative; got 'max'"):
        amplitude(init_range(5), kind="max")
