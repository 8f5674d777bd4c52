"""Shuffles: bijections that keep to their limits, never lose, and end where no swap helps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import lowered_for_cuda

from esparse_jax import native
from esparse_jax.pruning import escape as escape_module
from esparse_jax.pruning import swap
from esparse_jax.pruning.fixed_point import fixed_scores
from esparse_jax.pruning.mask import NMPattern, nm_mask, retained_metric
from esparse_jax.pruning.max_sum import MAX_SUM_FORMS, max_sum
from esparse_jax.pruning.shuffle import (
    SHUFFLES,
    assignment_shuffle,
    channel_shuffle,
    global_naive_shuffle,
    local_block_shuffle,
    residual_rows,
    shuffle_heads,
    shuffle_residual,
)

PATTERNS = [NMPattern(2, 4), NMPattern(4, 8), NMPattern(1, 4), NMPattern(3, 8)]
PATTERN_24 = PATTERNS[0]
ROWS = 24


def scores(seed, channels, rows=ROWS, spread=0.7):
    """Heavy-tailed scores whose channels differ in scale, as metrics of real layers do."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((rows, channels)) + spread * rng.standard_normal(channels)
    return np.exp(noise).astype(np.float32)


def kept(metric, pattern, permutation):
    return reference.retained(np.asarray(metric, np.float64), pattern.n, pattern.m, permutation)


def best_gain(metric, pattern, groups):
    """The most a single swap between two of the groups brings, by trying every one."""
    metric = np.asarray(metric, np.float64)

    def keeps(columns):
        return np.sort(metric[:, columns], axis=1)[:, -pattern.n :].sum()

    best = -np.inf
    for one in range(len(groups)):
        for two in range(one):
            before = keeps(groups[one]) + keeps(groups[two])
            for here in range(pattern.m):
                for there in range(pattern.m):
                    new_one, new_two = groups[one].copy(), groups[two].copy()
                    new_one[here], new_two[there] = groups[two][there], groups[one][here]
                    best = max(best, keeps(new_one) + keeps(new_two) - before)
    return best


def assert_bijection(permutation, channels):
    assert permutation.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(permutation), np.arange(channels))


@partial(jax.jit, static_argnames="pattern")
def keeps_of_pairs(values, pattern):
    flat = (1, ROWS, 2 * pattern.m)
    return max_sum(swap.thresholds(values, pattern).reshape(flat), values.reshape(flat))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), ties=st.booleans())
def test_closed_form_gain_is_the_brute_force_one(pattern, seed, ties):
    # keep(i <- j): the retained sum of i's group when j stands in i's place.
    metric = np.random.default_rng(seed).integers(0, 4 if ties else 10**6, (ROWS, 2 * pattern.m))
    values = jnp.asarray(metric, jnp.int32).reshape(1, ROWS, 2, pattern.m).transpose(0, 1, 3, 2)
    product = keeps_of_pairs(values, pattern)[0]

    groups = np.arange(2 * pattern.m).reshape(2, pattern.m)
    places = groups.T.reshape(-1)  # the search lays channels out slot by slot
    keeps = lambda columns: np.sort(metric[:, columns], axis=1)[:, -pattern.n :].sum()  # noqa: E731
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            if here // pattern.m == there // pattern.m:
                continue
            changed = groups[here // pattern.m].copy()
            changed[here % pattern.m] = there
            gain = keeps(changed) - keeps(groups[here // pattern.m])
            assert product[i, j] - product[i, i] == 2 * gain


@pytest.mark.parametrize("form", [form for form in MAX_SUM_FORMS if form != "cuda"])
@pytest.mark.parametrize(("rows", "dtype"), [(1, np.float32), (131, np.int32)])
def test_max_sum_is_twice_the_sum_of_the_greater(form, rows, dtype):
    rng = np.random.default_rng(rows)
    left, right = (rng.integers(-999, 999, (2, rows, n)).astype(dtype) for n in (5, 70))
    expected = 2 * np.maximum(left[:, :, :, None], right[:, :, None, :]).sum(axis=1)
    product = jax.jit(max_sum, static_argnames="form")(
        jnp.asarray(left), jnp.asarray(right), form=form
    )
    np.testing.assert_array_equal(product, expected)


needs_cuda = pytest.mark.skipif(
    not native.has_cuda(), reason="the extension was built without its CUDA part"
)
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX sees no NVIDIA GPU")


@needs_cuda
def test_max_sum_lowers_to_the_cuda_kernel():
    target = native.extension().CUDA_MAX_SUM_TARGET
    left, right = jnp.zeros((2, 40, 5), jnp.int32), jnp.zeros((2, 40, 70), jnp.int32)
    text = lowered_for_cuda(max_sum, left, right)
    assert text.count(target) == 1
    assert "(tensor<2x40x8xi32>, tensor<2x40x72xi32>) -> tensor<2x8x72xi32>" in text
    search = partial(channel_shuffle, pattern=PATTERN_24, method="strided", block_size=24)
    assert target in lowered_for_cuda(search, jnp.ones((ROWS, 48)))


@needs_cuda
def test_the_cuda_form_adds_integers_only():
    floats = jnp.zeros((1, 4, 4))
    with pytest.raises(TypeError, match="int32 scores; got float32"):
        max_sum(floats, floats, form="cuda")


def test_without_the_cuda_part_its_form_is_refused(monkeypatch):
    monkeypatch.setattr(native, "extension", lambda: None)
    zeros = jnp.zeros((1, 4, 4), jnp.int32)
    with pytest.raises(RuntimeError, match="ESPARSE_CUDA=ON"):
        max_sum(zeros, zeros, form="cuda")


@pytest.mark.gpu
@needs_gpu
@needs_cuda
@pytest.mark.parametrize(
    ("blocks", "rows", "lefts", "rights"),
    [(1, 1, 1, 1), (3, 131, 5, 70), (2, 4099, 64, 64), (1, 5000, 130, 300), (16, 700, 64, 256)],
)
def test_the_cuda_form_is_exact_modulo_two_to_the_32(blocks, rows, lefts, rights):
    rng = np.random.default_rng(rows)
    left, right = (
        rng.integers(-(2**30), 2**30, (blocks, rows, n)).astype(np.int32) for n in (lefts, rights)
    )
    expected = np.zeros((blocks, lefts, rights), np.int64)
    for row in range(rows):
        expected += 2 * np.maximum(left[:, row, :, None], right[:, row, None, :])
    product = jax.jit(partial(max_sum, form="cuda"))(left, right)
    np.testing.assert_array_equal(product, expected.astype(np.int32))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", ["global", "paper", "strided", "full"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gpu_and_cpu_find_the_same_permutation(method, pattern):
    metric = scores(5, 480, rows=200)
    found = [
        channel_shuffle(jax.device_put(metric, device), pattern, method=method, block_size=96)
        for device in (jax.devices()[0], jax.devices("cpu")[0])
    ]
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("deal", ["naive", "snake"])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_global_shuffle_deals_the_ranking(deal, seed):
    metric = scores(seed, 24)
    permutation = np.asarray(
        global_naive_shuffle(jnp.asarray(metric), PATTERN_24, deal=deal)
    ).reshape(-1, 4)
    expected = reference.global_deal(metric, 4, snake=deal == "snake").reshape(-1, 4)
    np.testing.assert_array_equal(permutation, np.sort(expected, axis=1))


def test_equal_means_keep_the_given_order():
    metric = jnp.ones((3, 8))
    permutation = global_naive_shuffle(metric, PATTERN_24)
    np.testing.assert_array_equal(permutation, [0, 2, 4, 6, 1, 3, 5, 7])


def shuffled(metric, pattern=PATTERN_24, method="strided"):
    """Always these shapes and options, so that each method compiles once."""
    assert metric.shape == (ROWS, 48)
    return np.asarray(channel_shuffle(jnp.asarray(metric), pattern, method=method, block_size=24))


def rounding(metric):
    """How far the retained sum may fall by fixed point: half a unit of 2^-28 sums per score."""
    return metric.size * metric.sum(axis=0).max() * 2.0**-28


@pytest.mark.parametrize("method", SHUFFLES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_every_method_gives_a_bijection_that_loses_nothing(method, seed):
    metric = scores(seed, 48)
    permutation = shuffled(metric, method=method)
    assert_bijection(permutation, 48)
    start = np.arange(48)
    if method != "none":
        start = np.asarray(global_naive_shuffle(jnp.asarray(metric), PATTERN_24))
    assert kept(metric, PATTERN_24, permutation) >= (
        kept(metric, PATTERN_24, start) - rounding(metric)
    )


# 44 channels in blocks of 16: three blocks of 4, 4 and 3 groups.
@pytest.mark.parametrize(("layout", "kind"), [("strided", "fixed"), ("contiguous", "float32")])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_local_shuffle_stays_in_its_blocks_and_ends_where_no_swap_helps(layout, kind, seed):
    # Small whole numbers: exact in float32, and no different in fixed point.
    metric = np.random.default_rng(seed).integers(0, 2**12, (ROWS, 44)).astype(np.float32)
    start = np.random.default_rng(seed + 1).permutation(44).astype(np.int32)
    permutation = np.asarray(
        local_block_shuffle(
            jnp.asarray(metric),
            PATTERN_24,
            jnp.asarray(start),
            block_size=16,
            layout=layout,
            scores=kind,
        )
    )
    assert_bijection(permutation, 44)
    groups = np.arange(11)
    blocks = (
        np.array_split(groups, 3) if layout == "contiguous" else [groups[b::3] for b in (0, 1, 2)]
    )
    # Gains within float32 rounding are not taken.
    least = 0 if kind == "fixed" else 2 * ROWS * 2**12 * ROWS**0.5 * np.finfo(np.float32).eps
    for block in blocks:
        before, after = (order.reshape(11, 4)[block] for order in (start, permutation))
        assert set(before.ravel()) == set(after.ravel())
        assert kept(metric, PATTERN_24, after.ravel()) >= kept(metric, PATTERN_24, before.ravel())
        assert best_gain(metric, PATTERN_24, after) <= least


@pytest.mark.parametrize("method", ["full", "assignment"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_full_width_search_ends_where_no_swap_helps(pattern, method):
    metric = np.random.default_rng(3).integers(0, 2**12, (ROWS, 48)).astype(np.float32)
    permutation = shuffled(metric, pattern, method)
    assert_bijection(permutation, 48)
    assert best_gain(metric, pattern, permutation.reshape(-1, pattern.m)) <= 0


def test_every_phase_and_round_raises_the_retained_sum():
    metric = jnp.asarray(np.random.default_rng(5).integers(0, 2**12, (ROWS, 64)), jnp.int32)
    order = jnp.arange(64, dtype=jnp.int32).reshape(1, 16, 4)
    search, real = swap.start_search(metric, order)

    def sums(search):
        return kept(metric, PATTERN_24, np.asarray(search.order).transpose(0, 2, 1).ravel())

    before = sums(search)
    phases = [jax.jit(swap.scatter_phase, static_argnames="pattern")]
    phases += [jax.jit(swap.settle_phase, static_argnames="pattern")]
    scattered, _ = phases[0](search, real, pattern=PATTERN_24)
    settled, rounds = phases[1](scattered, real, pattern=PATTERN_24)
    assert rounds > 0
    assert before < sums(scattered) < sums(settled)
    for state in (scattered, settled):  # scores travel with their channels
        np.testing.assert_array_equal(
            state.values[0], np.asarray(metric)[:, np.asarray(state.order[0])]
        )


def test_escape_only_ever_gains():
    gains = []
    for seed in range(4):
        metric = np.random.default_rng(seed).integers(0, 2**12, (ROWS, 48)).astype(np.float32)
        permutation = np.asarray(
            channel_shuffle(
                jnp.asarray(metric), PATTERN_24, method="strided", block_size=24, escape=8
            )
        )
        assert_bijection(permutation, 48)
        settled = kept(metric, PATTERN_24, shuffled(metric))
        gains.append(kept(metric, PATTERN_24, permutation) - settled)
        for block in (0, 1):  # still where no swap helps
            groups = permutation.reshape(-1, 4)[block::2]
            assert best_gain(metric, PATTERN_24, groups) <= 0
    assert min(gains) >= 0
    assert max(gains) > 0


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_retained_sums_in_two_parts_are_exact(seed):
    values = np.random.default_rng(seed).integers(0, 2**29, (2, 3, 4, 5)).astype(np.int32)
    high, low = escape_module._retained(jnp.asarray(values), PATTERN_24)
    expected = np.sort(values.astype(np.int64), axis=2)[:, :, -2:].sum(axis=(1, 2, 3))
    np.testing.assert_array_equal((np.asarray(high, np.int64) << 12) + np.asarray(low), expected)


def test_search_reaches_the_greedy_reference():
    metric = scores(11, 16)
    start = np.asarray(global_naive_shuffle(jnp.asarray(metric), PATTERN_24))
    greedy = reference.local_shuffle(metric, 2, 4, start, [np.arange(16)])
    ours = channel_shuffle(jnp.asarray(metric), PATTERN_24, method="full")
    before = kept(metric, PATTERN_24, start)
    gain = kept(metric, PATTERN_24, np.asarray(ours)) - before
    # Both are local optima of the same moves; neither is always the better one.
    assert gain >= 0.9 * (kept(metric, PATTERN_24, greedy) - before)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-90, 90))
def test_fixed_point_knows_no_scale_and_no_row_order(seed, exponent):
    metric = scores(seed, 48)
    rows = np.random.default_rng(seed).permutation(ROWS)
    first = shuffled(metric)
    other = shuffled(metric[rows] * np.float32(2.0) ** exponent)
    np.testing.assert_array_equal(first, other)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-95, 95), outlier=st.booleans())
def test_fixed_point_is_fine_and_does_not_overflow(seed, exponent, outlier):
    metric = scores(seed, 12, rows=40, spread=2.0)
    if outlier:
        metric[3, 5] *= 1e6
    metric = (metric * np.float32(2.0) ** exponent).astype(np.float32)
    fixed = np.asarray(fixed_scores(jnp.asarray(metric))).astype(np.int64)
    sums = fixed.sum(axis=0)
    assert 2**26 - 40 <= sums.max() <= 2**28 + 20
    unit = metric.astype(np.float64).sum(axis=0).max() / sums.max()
    np.testing.assert_allclose(fixed * unit, metric, rtol=1e-6, atol=0.51 * unit)


def test_all_zero_scores_keep_every_group():
    np.testing.assert_array_equal(fixed_scores(jnp.zeros((3, 8))), np.zeros((3, 8)))
    start = np.random.default_rng(1).permutation(44).astype(np.int32)
    permutation = local_block_shuffle(
        jnp.zeros((ROWS, 44)), PATTERN_24, jnp.asarray(start), block_size=16, layout="strided"
    )
    np.testing.assert_array_equal(permutation, np.sort(start.reshape(11, 4), axis=1).reshape(-1))


def test_a_dense_pattern_has_nothing_to_search():
    metric = jnp.asarray(scores(0, 16))
    for method in SHUFFLES:
        permutation = channel_shuffle(metric, NMPattern(4, 4), method=method)
        assert_bijection(permutation, 16)


CONSTRAINED = ["none", "global", "strided", "assignment"]


@pytest.mark.parametrize("method", CONSTRAINED)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_slices_keep_their_channels_and_lose_nothing(method, seed):
    metric = scores(seed, 48)
    permutation = channel_shuffle(
        jnp.asarray(metric), PATTERN_24, method=method, block_size=8, deal="naive", slices=3
    )
    assert_bijection(permutation, 48)
    np.testing.assert_array_equal(np.asarray(permutation) // 16, np.repeat([0, 1, 2], 16))
    start = np.arange(48)
    if method != "none":
        start = np.asarray(global_naive_shuffle(jnp.asarray(metric), PATTERN_24, slices=3))
    assert kept(metric, PATTERN_24, np.asarray(permutation)) >= (
        kept(metric, PATTERN_24, start) - rounding(metric)
    )


@pytest.mark.parametrize("method", ["strided", "full", "assignment"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_search_that_ends_below_the_given_order_gives_that(method, seed):
    # Pairs of groups, from the worst start there is: few swaps can be found.
    metric = scores(seed, 64)
    found = channel_shuffle(jnp.asarray(metric), PATTERN_24, method=method, block_size=8)
    assert kept(metric, PATTERN_24, np.asarray(found)) >= (
        kept(metric, PATTERN_24, np.arange(64)) * (1 - 1e-6)
    )
    # An order that nothing can improve: every group holds two great channels.
    best = np.tile(np.array([5.0, 4.0, 0.1, 0.2], np.float32), (ROWS, 16))
    found = channel_shuffle(jnp.asarray(best), PATTERN_24, method=method, block_size=8)
    assert kept(best, PATTERN_24, np.asarray(found)) == kept(best, PATTERN_24, np.arange(64))


def test_a_slice_is_dealt_as_if_alone():
    metric = jnp.asarray(scores(4, 48))
    together = global_naive_shuffle(metric, PATTERN_24, slices=2)
    for first in (0, 24):
        alone = global_naive_shuffle(metric[:, first : first + 24], PATTERN_24)
        np.testing.assert_array_equal(together[first : first + 24], alone + first)


def assert_inside_heads(permutation, heads, kv_heads):
    """Every head keeps its channels, and those of one key/value head have one order."""
    size = len(permutation) // heads
    inside = np.asarray(permutation).reshape(heads, size) - size * np.arange(heads)[:, None]
    assert inside.min() == 0
    assert inside.max() == size - 1
    shared = heads // kv_heads
    np.testing.assert_array_equal(inside, np.repeat(inside[::shared], shared, axis=0))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "method"),
    [(6, 6, "global"), (6, 2, "full"), (6, 1, "strided"), (3, 3, "assignment"), (6, 3, "none")],
)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_heads_of_one_key_value_head_move_alike(heads, kv_heads, method, seed):
    metric = scores(seed, 48)
    options = {"num_heads": heads, "num_kv_heads": kv_heads}
    permutation = np.asarray(
        shuffle_heads(jnp.asarray(metric), PATTERN_24, method=method, **options)
    )
    assert_bijection(permutation, 48)
    assert_inside_heads(permutation, heads, kv_heads)
    if method == "none":
        np.testing.assert_array_equal(permutation, np.arange(48))
        return
    start = np.asarray(shuffle_heads(jnp.asarray(metric), PATTERN_24, method="global", **options))
    assert kept(metric, PATTERN_24, permutation) >= (
        kept(metric, PATTERN_24, start) - rounding(metric)
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_search_inside_heads_gains_for_every_pattern(pattern):
    metric = scores(6, 96)
    permutation = np.asarray(
        shuffle_heads(jnp.asarray(metric), pattern, num_heads=6, num_kv_heads=3, slices=3)
    )
    assert_bijection(permutation, 96)
    assert_inside_heads(permutation, 6, 3)
    np.testing.assert_array_equal(permutation // 32, np.repeat([0, 1, 2], 32))
    assert kept(metric, pattern, permutation) > kept(metric, pattern, np.arange(96))


def parts(metric):
    """The rows of three linears, of which the last is on the host."""
    return [jnp.asarray(metric[:5]), jnp.asarray(metric[5:16]), metric[16:]]


@pytest.mark.parametrize("method", ["strided", "full"])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_the_residual_stream_has_the_shuffle_of_the_stack(method, seed):
    metric = scores(seed, 48)
    shared = shuffle_residual(parts(metric), PATTERN_24, method=method, block_size=24)
    np.testing.assert_array_equal(shared, shuffled(metric, method=method))


@pytest.mark.parametrize("method", ["none", "global", "strided"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), ordered=st.booleans())
def test_a_shared_order_of_drawn_rows_never_falls_below_the_given_one(method, seed, ordered):
    metric = scores(seed, 48, spread=0.0)
    if ordered:  # the given order is a good one, which few rows do not show
        metric = metric[:, shuffled(metric, method="full")]
    shared = np.asarray(
        shuffle_residual(parts(metric), PATTERN_24, method=method, block_size=24, max_rows=3)
    )
    assert_bijection(shared, 48)
    given_order = np.arange(48)
    gain = kept(metric, PATTERN_24, shared) - kept(metric, PATTERN_24, given_order)
    assert gain > 0 or (shared == given_order).all()


def test_a_shared_order_falls_back_to_the_given_one():
    metric = scores(0, 48, spread=0.0)
    metric = metric[:, shuffled(metric, method="full")]
    found = channel_shuffle(jnp.asarray(metric), PATTERN_24, method="global")
    assert kept(metric, PATTERN_24, np.asarray(found)) < kept(metric, PATTERN_24, np.arange(48))
    shared = shuffle_residual(parts(metric), PATTERN_24, method="global")
    np.testing.assert_array_equal(shared, np.arange(48))


@given(rows=st.lists(st.integers(0, 90), min_size=1, max_size=6), max_rows=st.integers(1, 200))
def test_rows_are_drawn_evenly(rows, max_rows):
    drawn = residual_rows(rows, max_rows)
    total = sum(rows)
    assert sum(map(len, drawn)) == min(total, max_rows)
    for count, taken in zip(rows, drawn, strict=True):
        assert (np.diff(taken) > 0).all()
        assert ((taken >= 0) & (taken < count)).all()
        # Each has its share of the rows, to within those that straddle a border.
        assert abs(len(taken) - count * min(1, max_rows / max(total, 1))) <= 2
    again = residual_rows(rows, max_rows)
    assert all((one == two).all() for one, two in zip(drawn, again, strict=True))


def test_drawn_rows_do_not_favour_a_feature_of_the_heads():
    drawn = residual_rows([128 * 32] * 8, 128 * 16)  # 16 rows in a run, 128 features in a head
    features = np.bincount(np.concatenate(drawn) % 128, minlength=128)
    assert features.min() >= 8
    assert features.max() <= 24


def test_a_shared_order_needs_rows_of_the_same_channels():
    with pytest.raises(ValueError, match="at least one linear; got none"):
        shuffle_residual([], PATTERN_24)
    with pytest.raises(ValueError, match=r"same input channels; got \[32, 48\]"):
        shuffle_residual([jnp.ones((2, 32)), jnp.ones((3, 48))], PATTERN_24)
    with pytest.raises(ValueError, match="number of rows to look at; got 0"):
        shuffle_residual([jnp.ones((2, 32))], PATTERN_24, max_rows=0)


def test_assignment_starts_anywhere_and_gains():
    metric = scores(9, 64)
    start = jnp.asarray(np.random.default_rng(9).permutation(64), jnp.int32)
    permutation = assignment_shuffle(jnp.asarray(metric), PATTERN_24, start)
    assert_bijection(permutation, 64)
    assert kept(metric, PATTERN_24, np.asarray(permutation)) > kept(
        metric, PATTERN_24, np.asarray(start)
    )


def test_shuffle_inside_jit_with_its_host_call_is_the_same():
    metric = jnp.asarray(scores(1, 48))

    @jax.jit
    def doubled(metric):
        return 2 * channel_shuffle(metric, PATTERN_24, method="assignment", block_size=24)

    np.testing.assert_array_equal(doubled(metric), 2 * shuffled(metric, method="assignment"))


def test_ties_keep_the_lower_channel_after_a_shuffle():
    metric = jnp.asarray(np.random.default_rng(8).integers(0, 3, (ROWS, 48)), jnp.float32)
    permutation = jnp.asarray(shuffled(metric, method="full"))
    groups = np.asarray(permutation).reshape(-1, 4)
    assert (np.diff(groups, axis=1) > 0).all()
    mask = np.asarray(nm_mask(metric[:, permutation], PATTERN_24))
    assert (
        float(retained_metric(metric, PATTERN_24, permutation))
        == np.where(mask, np.asarray(metric)[:, permutation], 0).sum()
    )


def test_better_searches_recover_more():
    # The order of the synthetic benchmark of benchmarks/shuffle.py, in small.
    total = dict.fromkeys(SHUFFLES, 0.0)
    for seed in range(12):
        metric = scores(seed, 48)
        for method in SHUFFLES:
            total[method] += kept(metric, PATTERN_24, shuffled(metric, method=method))
    assert total["none"] < total["global"] < total["paper"] < total["strided"]
    assert total["strided"] < min(total["full"], total["assignment"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "method is one of none, global, paper, .*; got 'best'"),
        (
            {"deal": "riffle", "method": "global"},
            "deal is one of naive, snake, sorted; got 'riffle'",
        ),
        ({"scores": "bf16"}, "scores is one of fixed, float32; got 'bf16'"),
        ({"slices": 5}, "48 channels in 5 equal slices of groups of 4"),
        ({"block_size": 0}, "block_size is a number of channels"),
    ],
)
def test_bad_options_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        channel_shuffle(jnp.asarray(scores(0, 48)), PATTERN_24, **arguments)


def test_channels_must_divide_into_groups():
    with pytest.raises(ValueError, match="must be a multiple of 4; this one has 46"):
        channel_shuffle(jnp.asarray(scores(0, 46)), PATTERN_24)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key/value heads"):
        shuffle_heads(jnp.asarray(scores(0, 48)), PATTERN_24, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"48 channels do not make 8 heads of whole 2:4 groups"):
        shuffle_heads(jnp.asarray(scores(0, 48)), PATTERN_24, num_heads=8, num_kv_heads=8)
    with pytest.raises(ValueError, match="4 slices cut through 6 heads"):
        shuffle_heads(jnp.asarray(scores(0, 48)), PATTERN_24, num_heads=6, num_kv_heads=6, slices=4)
