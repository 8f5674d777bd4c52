"""Scores as int32, so that sums over rows are exact whatever the order of summation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SUM_BITS = 28


def fixed_scores(metric: Float[Array, "row channel"]) -> Int[Array, "row channel"]:
    """Rounds scores to int32 fixed point, in units of one power of two for the whole array.

    The unit is the finest with which the absolute scores of a channel sum to at most
    2^28 + rows / 2. Then every comparison of the swap search is exact in int32, on any
    device and with any order of summation: a gain is at most sum_r |v_i[r] - v_j[r]|, less than
    2^30, so even twice of it is right where the sums it is the difference of wrap around. The
    unit itself is found by exact steps only (a maximum, and integer sums), for the same reason.

    Every score keeps its place to within half a unit, so a channel of the greatest sum is
    known to rows / 2^29 of itself; float32 sums are known to about as much.
    """
    rows = metric.shape[0]
    magnitude = jnp.abs(metric.astype(jnp.float32))
    # A first, coarse rounding whose sums cannot overflow bounds the channel sums from above.
    coarse = 30 - (rows - 1).bit_length() - _bit_length(magnitude.max())
    sums = jnp.ceil(_times_power_of_two(magnitude, coarse)).astype(jnp.int32).sum(axis=0)
    unit = coarse + _SUM_BITS - _bit_length(sums.max())
    return jnp.rint(_times_power_of_two(metric.astype(jnp.float32), unit)).astype(jnp.int32)


def _bit_length(value):
    """The least b with value < 2^b (for value 0 any bound will do), from the bits themselves."""
    if jnp.issubdtype(value.dtype, jnp.integer):
        return 32 - jax.lax.clz(value)
    return (jax.lax.bitcast_convert_type(value, jnp.int32) >> 23) - 126


def _times_power_of_two(value, exponent):
    """value * 2^exponent without rounding; in two steps, since 2^exponent may not be a float."""
    for part in (exponent // 2, exponent - exponent // 2):
        value = value * jax.lax.bitcast_convert_type((part + 127) << 23, jnp.float32)
    return value
