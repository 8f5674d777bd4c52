from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import mask_nm, retained

from esparse_jax.pruning.mask import NMPattern, is_nm, nm_mask, nm_violations, retained_metric

ROWS, CHANNELS = 3, 48
# 12:24 is beyond the group size up to which ranks come from comparisons.
PATTERNS = [NMPattern.parse(text) for text in ("2:4", "4:8", "1:4", "3:4", "6:8", "3:3", "12:24")]

patterns = st.sampled_from(PATTERNS)
# Few levels, so that most groups hold ties.
tied_metrics = hnp.arrays(
    np.float32, (ROWS, CHANNELS), elements=st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e30, np.inf])
)
# XLA flushes subnormals to zero on the CPU.
metrics = hnp.arrays(
    np.float32, (ROWS, CHANNELS), elements=st.floats(0, 1e6, width=32, allow_subnormal=False)
)


@given(tied_metrics | metrics, patterns)
def test_mask_is_the_reference_mask(metric, pattern):
    mask = nm_mask(jnp.asarray(metric), pattern)
    np.testing.assert_array_equal(mask, mask_nm(metric, pattern.n, pattern.m))


@given(hnp.arrays(np.float32, (ROWS, CHANNELS), elements=st.floats(width=32)), patterns)
def test_every_group_keeps_exactly_n_whatever_the_scores(metric, pattern):
    mask = nm_mask(jnp.asarray(metric), pattern)
    kept = np.asarray(mask).reshape(ROWS, -1, pattern.m).sum(axis=-1)
    np.testing.assert_array_equal(kept, pattern.n)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ties_go_to_the_lower_channel(pattern):
    mask = nm_mask(jnp.ones((ROWS, CHANNELS)), pattern)
    expected = np.tile(np.arange(pattern.m) < pattern.n, (ROWS, CHANNELS // pattern.m))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nan_ranks_below_everything(pattern):
    metric = np.full((1, CHANNELS), -np.inf, np.float32)
    metric[:, :: pattern.m] = np.nan
    mask = np.asarray(nm_mask(jnp.asarray(metric), pattern))
    # Equal to the -inf beside it, so that the tie rule decides and the count stays n.
    np.testing.assert_array_equal(mask.reshape(-1, pattern.m).sum(axis=1), pattern.n)
    metric[:, 1 :: pattern.m] = 1.0
    mask = np.asarray(nm_mask(jnp.asarray(metric), NMPattern(1, pattern.m)))
    assert mask[:, 1 :: pattern.m].all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_metrics(dtype):
    metric = jnp.asarray(np.random.default_rng(0).random((ROWS, CHANNELS)), dtype)
    mask = nm_mask(metric, NMPattern(2, 4))
    np.testing.assert_array_equal(mask, mask_nm(np.asarray(metric, np.float32), 2, 4))


def test_one_weight_too_many_is_found_in_its_group():
    pattern = NMPattern(2, 4)
    weight = jnp.where(nm_mask(jnp.ones((ROWS, CHANNELS)), pattern), -1.0, -0.0)
    assert is_nm(weight, pattern)
    assert is_nm(weight != 0, pattern)
    broken = weight.at[1, 11].set(1e-30)
    assert not is_nm(broken, pattern)
    assert not is_nm(broken != 0, pattern)
    assert np.argwhere(np.asarray(nm_violations(broken, pattern))).tolist() == [[1, 2]]


def test_a_nan_weight_is_a_weight():
    weight = jnp.asarray([[1.0, 1.0, jnp.nan, 0.0]])
    assert not is_nm(weight, NMPattern(2, 4))
    assert is_nm(weight, NMPattern(3, 4))


def test_fewer_than_n_is_still_nm():
    assert is_nm(jnp.zeros((2, 8)), NMPattern(1, 4))


@given(metrics, patterns, st.permutations(range(CHANNELS)))
def test_retained_metric_is_the_reference_sum(metric, pattern, permutation):
    ours = retained_metric(jnp.asarray(metric), pattern, jnp.asarray(permutation, dtype=jnp.int32))
    expected = retained(metric, pattern.n, pattern.m, permutation)
    # A float32 sum of so many terms, all of one sign.
    np.testing.assert_allclose(ours, expected, rtol=ROWS * CHANNELS * np.finfo(np.float32).eps)


def test_retained_metric_without_permutation_is_the_natural_order():
    metric = jnp.asarray(np.random.default_rng(1).random((ROWS, CHANNELS)), jnp.float32)
    natural = retained_metric(metric, NMPattern(2, 4), jnp.arange(CHANNELS, dtype=jnp.int32))
    assert retained_metric(metric, NMPattern(2, 4)) == natural
    assert retained_metric(metric, NMPattern(1, 1)) == metric.sum()


def test_usable_in_anybodys_jit():
    metric = jnp.asarray(np.random.default_rng(2).random((ROWS, CHANNELS)), jnp.float32)

    @jax.jit
    def masked(metric):
        return jnp.where(nm_mask(metric, NMPattern(2, 4)), metric, 0.0)

    np.testing.assert_array_equal(masked(metric) != 0, nm_mask(metric, NMPattern(2, 4)))


@pytest.mark.parametrize("function", [nm_mask, nm_violations, is_nm, retained_metric])
def test_channels_not_a_multiple_of_m(function):
    with pytest.raises(
        ValueError, match=r"4:8 .* must be a multiple of 8; this one has 172.*dense"
    ):
        function(jnp.ones((2, 172)), NMPattern(4, 8))


@pytest.mark.parametrize("text", ["2:4", " 2 : 4 "])
def test_pattern_is_parsed(text):
    assert NMPattern.parse(text) == NMPattern(2, 4)
    assert str(NMPattern.parse(text)) == "2:4"
    assert hash(NMPattern.parse(text)) == hash(NMPattern(2, 4))


@pytest.mark.parametrize("text", ["", "2", "2:", "2:4:8", "2/4", "-2:4", "2.0:4", "two:four"])
def test_pattern_text_that_is_none(text):
    with pytest.raises(ValueError, match="two whole numbers with a colon between, for example 2:4"):
        NMPattern.parse(text)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (0, 0)])
def test_pattern_out_of_range(n, m):
    with pytest.raises(ValueError, match=f"so 1 <= N <= M; got {n}:{m}"):
        NMPattern(n, m)


@pytest.mark.parametrize(("n", "m", "name"), [(2.0, 4, "n"), (2, "4", "m"), (True, 4, "n")])
def test_pattern_of_other_types(n, m, name):
    # The tests' type checker would refuse a whole NMPattern before the class itself does.
    with pytest.raises(TypeError, match=f"takes two ints, .*; {name} is "):
        NMPattern.__post_init__(SimpleNamespace(n=n, m=m))
