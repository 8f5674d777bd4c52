"""The output error from the Gram matrix is that of the outputs themselves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse_jax.pruning import error as error_module
from esparse_jax.pruning.error import (
    init_gram,
    merge_gram,
    output_error,
    relative_output_error,
    row_errors,
    update_gram,
)

TOKENS, OUT, CHANNELS = 60, 10, 16
EPSILON = float(np.finfo(np.float32).eps)


def case(seed, *, tokens=TOKENS, correlated=False):
    """Activations whose channels differ in scale, a weight, and the weight with half of it gone."""
    rng = np.random.default_rng(seed)
    scale = np.exp(2 * rng.standard_normal(CHANNELS))
    activations = rng.standard_normal((tokens, CHANNELS)) * scale
    if correlated:
        activations = activations[:, :2] @ rng.standard_normal((2, CHANNELS))
    weight = rng.standard_normal((OUT, CHANNELS))
    pruned = np.where(rng.random((OUT, CHANNELS)) < 0.5, weight, 0)
    return [array.astype(np.float32) for array in (activations, weight, pruned)]


def gram_of(activations):
    return update_gram(init_gram(CHANNELS), jnp.asarray(activations))


def direct(activations, weight, pruned):
    """Squared errors of the rows, and how far float32 sums of their terms may be off."""
    x, difference = np.float64(activations), np.float64(weight) - np.float64(pruned)
    terms = np.abs(difference) @ np.abs(x).T @ np.abs(x)
    rounding = (len(x) + 2 * CHANNELS) * EPSILON * (terms * np.abs(difference)).sum(axis=1)
    return np.square(x @ difference.T).sum(axis=0), rounding


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), correlated=st.booleans())
def test_errors_are_those_of_the_outputs(seed, correlated):
    activations, weight, pruned = case(seed, correlated=correlated)
    expected, rounding = direct(activations, weight, pruned)
    energy, energy_rounding = direct(activations, weight, np.zeros_like(weight))
    given = (jnp.asarray(weight), jnp.asarray(pruned), gram_of(activations))
    errors = np.asarray(row_errors(*given))
    assert errors.dtype == np.float32
    assert (errors >= 0).all()
    assert (np.abs(errors - expected) <= rounding).all()
    assert abs(float(output_error(*given)) - expected.sum()) <= rounding.sum()
    share = expected.sum() / energy.sum()
    slack = (rounding.sum() + share * energy_rounding.sum()) / energy.sum()
    assert abs(float(relative_output_error(*given)) - share) <= 2 * slack


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), cut=st.integers(0, TOKENS))
def test_merging_is_having_seen_both(seed, cut):
    activations, *_ = case(seed)
    whole, first, second = map(gram_of, (activations, activations[:cut], activations[cut:]))
    rounding = TOKENS * EPSILON * (np.abs(activations).T @ np.abs(activations))
    for merged in (
        merge_gram(first, second),
        merge_gram(second, first),
        update_gram(first, jnp.asarray(activations[cut:])),
    ):
        assert int(merged.tokens) == TOKENS
        assert (np.abs(merged.products - whole.products) <= rounding).all()
    empty = merge_gram(init_gram(CHANNELS), whole)
    jax.tree.map(np.testing.assert_array_equal, empty, whole)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_weight_itself_has_none_and_no_weight_has_all(seed):
    activations, weight, _ = case(seed)
    weight, gram = jnp.asarray(weight), gram_of(activations)
    assert float(output_error(weight, weight, gram)) == 0
    assert float(relative_output_error(weight, weight, gram)) == 0
    assert float(relative_output_error(weight, jnp.zeros_like(weight), gram)) == 1


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_a_change_that_no_token_sees_is_never_negative(seed):
    """Where channels are the same the exact error is 0, and rounding may fall to either side."""
    rng = np.random.default_rng(seed)
    column = 100 * rng.standard_normal((TOKENS, 1)).astype(np.float32)
    activations = np.tile(column, (1, CHANNELS))
    change = rng.standard_normal((OUT, CHANNELS)).astype(np.float32)
    change[:, -1] -= change.sum(axis=1)
    weight = np.ones((OUT, CHANNELS), np.float32)
    errors = row_errors(jnp.asarray(weight), jnp.asarray(weight - change), gram_of(activations))
    _, rounding = direct(activations, weight, weight - change)
    assert (np.asarray(errors) >= 0).all()
    assert (np.asarray(errors) <= rounding).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_inputs_lose_nothing_beyond_their_own_rounding(dtype):
    activations, weight, pruned = (jnp.asarray(array, dtype) for array in case(1))
    gram = gram_of(activations)
    assert gram.products.dtype == jnp.float32
    wide = [np.asarray(array, np.float32) for array in (activations, weight, pruned)]
    expected, rounding = direct(*wide)
    assert (np.abs(row_errors(weight, pruned, gram) - expected) <= rounding).all()
    np.testing.assert_array_equal(
        row_errors(weight, pruned, gram),
        row_errors(*map(jnp.asarray, wide[1:]), gram),
    )


def test_long_sums_of_bfloat16_go_on_growing():
    gram, ones = init_gram(CHANNELS), jnp.ones((512, CHANNELS), jnp.bfloat16)
    for _ in range(20):
        gram = update_gram(gram, ones)
    assert int(gram.tokens) == 20 * 512
    np.testing.assert_array_equal(gram.products, np.full((CHANNELS, CHANNELS), 20 * 512.0))


@pytest.mark.parametrize("rows", [1, 3, OUT, 4 * OUT])
def test_tiles_of_rows_make_no_difference(rows, monkeypatch):
    activations, weight, pruned = case(2)
    given = (jnp.asarray(weight), jnp.asarray(pruned), gram_of(activations))
    monkeypatch.setattr(error_module, "_TILE_ELEMENTS", rows * CHANNELS)
    tiled = jax.jit(row_errors.__wrapped__)(*given)
    expected, rounding = direct(activations, weight, pruned)
    assert tiled.shape == (OUT,)
    assert (np.abs(tiled - expected) <= rounding).all()


def test_working_memory_is_a_few_tiles_however_many_rows():
    def scratch(out):
        weight = jax.ShapeDtypeStruct((out, 256), jnp.float32)
        gram = jax.eval_shape(partial(init_gram, 256))
        compiled = row_errors.lower(weight, weight, gram).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tile = 4 * error_module._TILE_ELEMENTS
    rows = error_module._TILE_ELEMENTS // 256
    assert scratch(16 * rows) <= scratch(2 * rows) + 4 * 16 * rows
    assert scratch(16 * rows) <= 6 * tile


def test_an_output_of_nothing():
    weight, gram = jnp.ones((2, CHANNELS)), init_gram(CHANNELS)
    assert float(relative_output_error(weight, 0 * weight, gram)) == 0
    activations = np.zeros((4, CHANNELS), np.float32)
    activations[:, 0] = 1
    moved = weight.at[:, 0].set(0)
    assert float(relative_output_error(moved, weight, gram_of(activations))) == np.inf


def test_other_numbers_of_channels_are_refused():
    gram = init_gram(CHANNELS)
    with pytest.raises(ValueError, match=r"is of 16 input channels; the activations .* \(5, 8\)"):
        update_gram(gram, jnp.ones((5, 8)))
    with pytest.raises(ValueError, match="same channels; one has 16, the other 8"):
        merge_gram(gram, init_gram(8))
    with pytest.raises(ValueError, match=r"16 input channels; the weight .*\(16, 10\).*transpose"):
        output_error(jnp.ones((16, 10)), jnp.ones((16, 10)), gram)
