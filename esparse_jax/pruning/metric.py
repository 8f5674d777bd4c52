"""Scores of weights, higher keeps: E-Sparse (section 3.2) and the baselines beside it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num


@jax.jit
def esparse_metric(
    weight: Float[Array, "out channel"],
    richness: Float[Array, " channel"],
    amplitude: Float[Array, " channel"],
    *,
    alpha: float | Num[Array, ""],
) -> Float[Array, "out channel"]:
    """|weight| times what its input channel carries: richness + alpha * amplitude.

    Args:
        richness: Nats, from `information_richness`.
        amplitude: From `amplitude`; its kind sets the scale of alpha.
        alpha: Nats per unit of amplitude.

    Returns:
        xi in float32.

    Source: E-Sparse, section 3.2, equation (3).
    Paper silent: the value of alpha.
    """
    importance = richness + alpha * amplitude
    return jnp.abs(weight.astype(jnp.float32)) * importance.astype(jnp.float32)[None]


@jax.jit
def wanda_metric(
    weight: Float[Array, "out channel"], amplitude: Float[Array, " channel"]
) -> Float[Array, "out channel"]:
    """|weight| times the amplitude of its input channel, in float32.

    A common factor of all amplitudes does not move the mask, so any kind will do.

    Source: Wanda (arXiv 2306.11695), equation (1).
    """
    return jnp.abs(weight.astype(jnp.float32)) * amplitude.astype(jnp.float32)[None]


@jax.jit
def magnitude_metric(weight: Float[Array, "out channel"]) -> Float[Array, "out channel"]:
    """|weight|, in float32: needs no calibration."""
    return jnp.abs(weight.astype(jnp.float32))
