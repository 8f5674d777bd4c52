import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import esparse_scores

from esparse_jax.pruning.mask import NMPattern, nm_mask
from esparse_jax.pruning.metric import esparse_metric, magnitude_metric, wanda_metric

OUT, CHANNELS = 5, 16
# One sum and two products, every one rounded once; all terms of one sign.
TOLERANCE = 4 * np.finfo(np.float32).eps

numbers = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
weights = hnp.arrays(np.float32, (OUT, CHANNELS), elements=numbers)
channels = hnp.arrays(np.float32, CHANNELS, elements=numbers.map(abs))


@given(weights, channels, channels, st.sampled_from([0.0, 0.5, 1, 30.0]))
def test_esparse_metric_is_equation_3(weight, richness, amplitude, alpha):
    ours = esparse_metric(
        jnp.asarray(weight), jnp.asarray(richness), jnp.asarray(amplitude), alpha=alpha
    )
    expected = esparse_scores(weight, richness, amplitude, alpha)
    np.testing.assert_allclose(ours, expected, rtol=TOLERANCE)


@given(weights, channels)
def test_wanda_is_equation_3_without_richness(weight, amplitude):
    weight, amplitude = jnp.asarray(weight), jnp.asarray(amplitude)
    ours = wanda_metric(weight, amplitude)
    np.testing.assert_array_equal(
        ours, esparse_metric(weight, jnp.zeros(CHANNELS), amplitude, alpha=1.0)
    )


@given(weights)
def test_magnitude_is_wanda_on_equal_amplitudes(weight):
    weight = jnp.asarray(weight)
    np.testing.assert_array_equal(magnitude_metric(weight), np.abs(weight))
    np.testing.assert_array_equal(
        magnitude_metric(weight), wanda_metric(weight, jnp.ones(CHANNELS))
    )


@given(weights, channels)
def test_a_common_factor_does_not_move_wandas_mask(weight, amplitude):
    weight, amplitude = jnp.asarray(weight), jnp.asarray(amplitude)
    pattern = NMPattern(2, 4)
    np.testing.assert_array_equal(
        nm_mask(wanda_metric(weight, amplitude), pattern),
        nm_mask(wanda_metric(weight, 64 * amplitude), pattern),
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_metrics_are_float32_whatever_the_weights_dtype(dtype):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(OUT, CHANNELS)), dtype)
    richness, amplitude = jnp.asarray(rng.random((2, CHANNELS)), jnp.float32)
    for low, high in (
        (magnitude_metric(weight), magnitude_metric(weight.astype(jnp.float32))),
        (wanda_metric(weight, amplitude), wanda_metric(weight.astype(jnp.float32), amplitude)),
        (
            esparse_metric(weight, richness, amplitude, alpha=2.0),
            esparse_metric(weight.astype(jnp.float32), richness, amplitude, alpha=2.0),
        ),
    ):
        assert low.dtype == jnp.float32
        np.testing.assert_array_equal(low, high)


def test_alpha_may_be_an_array():
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(OUT, CHANNELS)), jnp.float32)
    richness, amplitude = jnp.ones(CHANNELS), jnp.arange(CHANNELS, dtype=jnp.float32)
    np.testing.assert_array_equal(
        esparse_metric(weight, richness, amplitude, alpha=jnp.float32(3.0)),
        esparse_metric(weight, richness, amplitude, alpha=3.0),
    )
