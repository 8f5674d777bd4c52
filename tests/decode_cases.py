"""Operands of the decode product, and what it is by the formulas."""

import jax.numpy as jnp
import numpy as np

from esparse_jax.sparse import Blob24, blob24, compress24, compressed24_of, decompress24


def random_blob(shape, dtype=jnp.float16, seed=0) -> Blob24:
    rng = np.random.default_rng(seed)
    out, channels = shape
    kept = rng.permuted(np.tile([True, True, False, False], (out, channels // 4, 1)), axis=2)
    weight = rng.standard_normal(shape) / np.sqrt(channels / 2) * kept.reshape(shape)
    return blob24(compress24(jnp.asarray(weight, dtype)))


def random_x(rows, channels, dtype=jnp.float16, seed=0):
    x = np.random.default_rng(seed + 100).standard_normal((rows, channels))
    x[0, ::7] = -0.0
    return jnp.asarray(x, dtype)


def random_order(size, seed=5):
    return jnp.asarray(np.random.default_rng(seed).permutation(size).astype(np.int32))


def slow_product(
    x, blob, permutation=None, norm_epsilon=None, swiglu=False, residual=None, places=None
):
    """Float64 numpy, a formula at a time."""
    x = np.asarray(x, np.float64)
    weight = np.asarray(decompress24(compressed24_of(blob)), np.float64)
    if norm_epsilon is not None:
        x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + norm_epsilon)
    if permutation is not None:
        x = x[:, np.asarray(permutation)]
    y = x @ weight.T
    if swiglu:
        rows = np.arange(y.shape[1])
        gate, up = y[:, rows % 16 < 8], y[:, rows % 16 >= 8]
        y = gate / (1 + np.exp(-gate)) * up
    if residual is not None:
        y = y + np.asarray(residual, np.float64)
    if places is None:
        return y
    return np.stack([y, y[:, np.argsort(np.asarray(places))]])


def relative(got, want):
    got = np.stack(got) if isinstance(got, tuple) else got
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def rounding(dtype):
    """Error of rounding a result once, relative: uniform over half a unit in the last place."""
    return float(jnp.finfo(dtype).eps) / np.sqrt(12)


def variants(rows, shape, dtype):
    """What may stand around a product, as arguments of `slow_product`."""
    out, channels = shape
    order = random_order(channels)
    residual = random_x(rows, out, dtype, seed=7)
    return [
        {},
        {"permutation": order},
        {"norm_epsilon": 1e-5, "residual": residual},
        {"norm_epsilon": 1e-5, "swiglu": True},
        {"norm_epsilon": 1e-2, "permutation": order, "residual": residual},
        {"residual": residual, "places": random_order(out)},
        {"permutation": order, "places": random_order(out), "norm_epsilon": 1e-5},
    ]
