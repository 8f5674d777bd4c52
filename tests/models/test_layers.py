"""The drop-ins for nnx.Linear compute what they stand for and travel through split and jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esparse_jax.models.layers import (
    Calibration,
    CalibrationGram,
    CalibrationRange,
    CalibrationStats,
    CompressedWeight,
    DenseLinear,
    MaskedLinear,
    ObservedLinear,
    Permutation,
    SparseLinear,
)
from esparse_jax.pruning.error import init_gram, update_gram
from esparse_jax.pruning.stats import init_range, init_stats, update_range, update_stats
from esparse_jax.sparse.compress import compress24

CHANNELS, OUT = 16, 12
EPSILON = float(jnp.finfo(jnp.float32).eps)


def linear(*, use_bias=True, **kinds):
    bias_init = nnx.initializers.normal(1.0)
    return nnx.Linear(
        CHANNELS, OUT, use_bias=use_bias, bias_init=bias_init, rngs=nnx.Rngs(3), **kinds
    )


def inputs(seed=0, shape=(2, 5)):
    return jax.random.normal(jax.random.key(seed), (*shape, CHANNELS))


def two_of_four(seed=0, order=None):
    """A random 2:4 mask, in the given order of the channels."""
    scores = np.random.default_rng(seed).random((OUT, CHANNELS // 4, 4))
    shuffled = (scores.argsort(-1).argsort(-1) < 2).reshape(OUT, CHANNELS)
    if order is None:
        return shuffled
    mask = np.empty_like(shuffled)
    mask[:, order] = shuffled
    return mask


@pytest.mark.parametrize("kind", [CalibrationRange, CalibrationStats])
def test_an_observed_layer_gathers_what_it_reads(kind):
    dense, batches = linear(), [inputs(0), inputs(1)]
    start, update = init_range(CHANNELS), update_range
    if kind is CalibrationStats:
        for x in batches:
            start = update_range(start, x.reshape(-1, CHANNELS))
        start, update = init_stats(start, num_bins=7), update_stats

    graphdef, calibration, weights = nnx.split(ObservedLinear(dense, start), Calibration, ...)

    @jax.jit
    def step(calibration, weights, x):
        layer = nnx.merge(graphdef, calibration, weights)
        y = layer(x)
        return y, nnx.split(layer, Calibration, ...)[1]

    expected = start
    for x in batches:
        y, calibration = step(calibration, weights, x)
        np.testing.assert_array_equal(y, jax.jit(dense)(x))
        expected = update(expected, x.reshape(-1, CHANNELS))
    assert step._cache_size() == 1

    layer = nnx.merge(graphdef, calibration, weights)
    assert isinstance(layer.calibration, kind)
    seen = layer.calibration.get_value()
    assert int(seen.tokens) == 20
    np.testing.assert_allclose(
        seen.sum_of_squares, expected.sum_of_squares, rtol=int(seen.tokens) * EPSILON
    )
    exact = seen._replace(sum_of_squares=expected.sum_of_squares)
    jax.tree.map(np.testing.assert_array_equal, exact, expected)


def test_an_observed_layer_gathers_the_gram_matrix_beside_its_statistics():
    dense, batches = linear(), [inputs(0), inputs(1)]
    layer = ObservedLinear(dense, init_range(CHANNELS), init_gram(CHANNELS))
    graphdef, grams, statistics, weights = nnx.split(layer, CalibrationGram, Calibration, ...)
    assert [leaf.shape for leaf in jax.tree.leaves(grams)] == [(CHANNELS, CHANNELS), ()]

    @jax.jit
    def step(grams, statistics, x):
        layer = nnx.merge(graphdef, grams, statistics, weights)
        y = layer(x)
        return y, *nnx.split(layer, CalibrationGram, Calibration, ...)[1:3]

    plain, seen = init_gram(CHANNELS), init_range(CHANNELS)
    for x in batches:
        y, grams, statistics = step(grams, statistics, x)
        np.testing.assert_array_equal(y, jax.jit(dense)(x))
        tokens = x.reshape(-1, CHANNELS)
        plain, seen = update_gram(plain, tokens), update_range(seen, tokens)
    assert step._cache_size() == 1
    layer = nnx.merge(graphdef, grams, statistics, weights)
    gram = layer.gram.get_value()
    assert int(gram.tokens) == 20
    bound = 20 * EPSILON * jnp.diagonal(gram.products).max()
    assert np.abs(gram.products - plain.products).max() <= bound
    np.testing.assert_array_equal(layer.calibration.get_value().maximum, seen.maximum)
    assert ObservedLinear(dense, init_range(CHANNELS)).gram is None


def test_a_masked_layer_ignores_what_is_masked_out():
    dense, mask = linear(), two_of_four()
    poisoned = nnx.clone(dense)
    poisoned.kernel.set_value(jnp.where(mask.T, dense.kernel[...], jnp.inf))
    zeroed = nnx.clone(dense)
    zeroed.kernel.set_value(jnp.where(mask.T, dense.kernel[...], 0.0))
    layer = MaskedLinear(poisoned, jnp.asarray(mask))
    graphdef, state = nnx.split(layer)
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, inputs())
    np.testing.assert_array_equal(y, jax.jit(zeroed)(inputs()))
    assert bool(jnp.isinf(poisoned.kernel[...]).any())


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sparse_layer_is_the_masked_layer(use_bias, shuffled, dtype):
    order = np.random.default_rng(5).permutation(CHANNELS) if shuffled else None
    dense = linear(use_bias=use_bias, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    mask = two_of_four(order=order)
    weight = jnp.where(mask, dense.kernel[...].T, 0)
    compressed = compress24(weight if order is None else weight[:, order])
    permutation = None if order is None else jnp.asarray(order)
    bias = dense.bias[...] if use_bias else None
    layer = SparseLinear(compressed, permutation, bias)

    graphdef, state = nnx.split(layer)
    x = inputs()
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    assert y.dtype == dtype
    assert y.shape == (2, 5, OUT)

    x64 = np.asarray(x.astype(dtype), np.float64)
    truth = x64 @ np.asarray(weight, np.float64).T
    truth += 0.0 if bias is None else np.asarray(bias, np.float64)
    plain = nnx.clone(dense)
    plain.kernel.set_value(weight.T)
    error = np.abs(np.asarray(plain(x), np.float64) - truth).max()
    assert np.abs(np.asarray(y, np.float64) - truth).max() <= 3 * error + EPSILON


def test_a_sparse_layer_keeps_its_parts_apart():
    weight = jnp.where(two_of_four(), linear().kernel[...].T, 0)
    layer = SparseLinear(compress24(weight), jnp.arange(CHANNELS), jnp.ones(OUT))
    _, compressed, permutation, parameters = nnx.split(
        layer, CompressedWeight, Permutation, nnx.Param
    )
    assert len(jax.tree.leaves(compressed)) == 2
    assert jax.tree.leaves(permutation)[0].dtype == jnp.int32
    assert [leaf.shape for leaf in jax.tree.leaves(parameters)] == [(OUT,)]
    assert (layer.in_features, layer.out_features) == (CHANNELS, OUT)


def test_a_sparse_layer_may_compute_in_another_dtype_than_it_stores():
    weight = jnp.where(two_of_four(), linear().kernel[...].T, 0).astype(jnp.bfloat16)
    layer = SparseLinear(compress24(weight), dtype=jnp.float32)
    y = layer(inputs())
    assert y.dtype == jnp.float32
    truth = np.asarray(inputs(), np.float64) @ np.asarray(weight, np.float64).T
    assert np.abs(y - truth).max() <= CHANNELS * EPSILON * np.abs(truth).max()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(16, 12\).*\(12, 16\)"):
        MaskedLinear(linear(), jnp.ones((CHANNELS, OUT), bool))
    weight = jnp.where(two_of_four(), linear().kernel[...].T, 0)
    with pytest.raises(ValueError, match=r"permutation has shape \(4,\).*must be \(16,\)"):
        SparseLinear(compress24(weight), jnp.arange(4))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dense_product_sums_in_float32_and_writes_16_bits(dtype):
    """On CUDA the product is rounded where it is summed; on the CPU float32 is asked for."""
    generator = np.random.default_rng(0)
    weight = jnp.asarray(generator.normal(size=(24, 4096)), dtype)
    x = jnp.asarray(generator.normal(size=(3, 4096)), dtype)
    layer = DenseLinear(weight)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    found = jax.jit(lambda x: layer(x))(x)
    assert found.dtype == jnp.dtype(dtype)
    error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
    assert error <= float(jnp.finfo(dtype).eps)
    text = jax.export.export(jax.jit(lambda x: layer(x)), platforms=["cuda"])(x).mlir_module()
    (product,) = (line for line in text.splitlines() if "stablehlo.dot_general" in line)
    name = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    assert f"-> tensor<3x24x{name}>" in product
    assert "xf32>" not in text
