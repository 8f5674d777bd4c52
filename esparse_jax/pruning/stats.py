"""Calibration statistics of a layer's input channels (E-Sparse, section 3.2).

Two exact streaming passes over the same activations, batch by batch: the first finds every
channel's range, which fixes the bins; the second counts. Both are monoids: merging the statistics
of two parts equals having seen the whole.

    range = init_range(channels)
    for activations in batches: range = update_range(range, activations)
    stats = init_stats(range)
    for activations in batches: stats = update_stats(stats, activations)
    information_richness(stats.histogram), amplitude(stats)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BIN_SPANS = ("channel", "layer", "rms")
AMPLITUDES = ("rms", "l2", "relative")

# Activations whose bins are computed at once: the working memory stays at some ten megabytes
# however many tokens a batch has, and a CPU's cache holds it. (XLA for CPUs still widens a whole
# bfloat16 batch to float32 first; it does not loop over bfloat16.)
_BLOCK_ELEMENTS = 1 << 20


class ChannelRange(NamedTuple):
    """What the first pass knows of each input channel.

    A channel that was never seen has the minimum +inf and the maximum -inf. A nan among the
    activations makes both nan; an infinite one shows in one of them.
    """

    minimum: Float[Array, " channel"]
    maximum: Float[Array, " channel"]
    sum_of_squares: Float[Array, " channel"]
    tokens: Int[Array, ""]


class ChannelStats(NamedTuple):
    """What the second pass knows of each input channel; the bins stay as `init_stats` made them.

    Bin b of a channel holds the values in minimum + [b, b + 1) * width. `minimum` and `maximum`
    are the outer edges; what lies beyond them is counted in the end bins, so every row of the
    histogram sums to `tokens`. `bins_per_unit` is the reciprocal of the width, in the channel's
    unit (see `_unit`); 0 where the bounds coincide, which puts everything in the first bin.
    """

    minimum: Float[Array, " channel"]
    maximum: Float[Array, " channel"]
    bins_per_unit: Float[Array, " channel"]
    histogram: Int[Array, "channel bin"]
    sum_of_squares: Float[Array, " channel"]
    tokens: Int[Array, ""]


def init_range(channels: int) -> ChannelRange:
    """The range of `channels` input channels before any activation was seen.

    Raises:
        ValueError: No number of channels.
    """
    if channels < 0:
        raise ValueError(f"a layer has 0 or more input channels; got channels={channels}.")
    return ChannelRange(
        minimum=jnp.full(channels, jnp.inf, jnp.float32),
        maximum=jnp.full(channels, -jnp.inf, jnp.float32),
        sum_of_squares=jnp.zeros(channels, jnp.float32),
        tokens=jnp.zeros((), jnp.int32),
    )


@jax.jit
def update_range(range: ChannelRange, activations: Float[Array, "token channel"]) -> ChannelRange:
    """The range after these activations as well.

    Args:
        activations: Inputs of the layer; of any float dtype, taken as float32.

    Raises:
        ValueError: another number of channels.
    """
    _check_channels(range.minimum, activations)
    values = activations.astype(jnp.float32)
    return ChannelRange(
        minimum=jnp.minimum(range.minimum, values.min(axis=0, initial=jnp.inf)),
        maximum=jnp.maximum(range.maximum, values.max(axis=0, initial=-jnp.inf)),
        sum_of_squares=range.sum_of_squares + jnp.square(values).sum(axis=0),
        tokens=range.tokens + values.shape[0],
    )


@jax.jit
def merge_range(a: ChannelRange, b: ChannelRange) -> ChannelRange:
    """The range of a layer that saw both inputs.

    Raises:
        ValueError: the two have different numbers of channels.
    """
    _check_same_channels(a.minimum, b.minimum)
    return ChannelRange(
        minimum=jnp.minimum(a.minimum, b.minimum),
        maximum=jnp.maximum(a.maximum, b.maximum),
        sum_of_squares=a.sum_of_squares + b.sum_of_squares,
        tokens=a.tokens + b.tokens,
    )


@partial(jax.jit, static_argnames=("span", "k"))
def bin_range(range: ChannelRange, *, span: str = "channel", k: float = 4.0) -> ChannelRange:
    """The same statistics with each channel's minimum and maximum set to the edges of its bins.

    Args:
        span: "channel": the channel's own minimum to maximum; "layer": the smallest to the
            largest value of all channels, the same bins for each; "rms": the channel's root mean
            square, k times to either side of 0.
        k: Half width of the "rms" span.

    Returns:
        Finite edges wherever the activations were finite. A channel that was never seen gets
        0, 0.

    Raises:
        ValueError: another span, or k not positive.

    Paper silent: what the bins span.
    """
    if span not in BIN_SPANS:
        raise ValueError(f"bins span one of {', '.join(BIN_SPANS)}; got {span!r}.")
    if not k > 0:
        raise ValueError(f"the rms span reaches k root mean squares to either side; got k={k!r}.")
    if span == "channel":
        low, high = range.minimum, range.maximum
    elif span == "layer":
        low = jnp.full_like(range.minimum, range.minimum.min())
        high = jnp.full_like(range.maximum, range.maximum.max())
    else:
        high = k * amplitude(range, kind="rms")
        low = -high
    unseen = low > high
    return range._replace(minimum=jnp.where(unseen, 0.0, low), maximum=jnp.where(unseen, 0.0, high))


@partial(jax.jit, static_argnames=("num_bins", "span", "k"))
def init_stats(
    range: ChannelRange, *, num_bins: int = 100, span: str = "channel", k: float = 4.0
) -> ChannelStats:
    """Empty statistics whose bins divide each channel's range equally.

    Args:
        range: What the first pass found.
        num_bins: K of equation (1).
        span, k: What the bins reach over, as in `bin_range`.

    Raises:
        ValueError: fewer than one bin, or another span.

    Source: E-Sparse, section 3.2: "we first divide it into K different bins"; K = 100 there.
    Paper silent: what the bins span. Ours are equally wide, over the channel's own range unless
    told otherwise.
    """
    if num_bins < 1:
        raise ValueError(f"the histogram needs at least one bin; got num_bins={num_bins}.")
    bounds = bin_range(range, span=span, k=k)
    unit = _unit(bounds.minimum, bounds.maximum)
    extent = bounds.maximum * unit - bounds.minimum * unit
    return ChannelStats(
        minimum=bounds.minimum,
        maximum=bounds.maximum,
        bins_per_unit=jnp.where(extent > 0, num_bins / extent, 0.0),
        histogram=jnp.zeros((*bounds.minimum.shape, num_bins), jnp.int32),
        sum_of_squares=jnp.zeros_like(bounds.minimum),
        tokens=jnp.zeros((), jnp.int32),
    )


@jax.jit
def update_stats(stats: ChannelStats, activations: Float[Array, "token channel"]) -> ChannelStats:
    """The statistics after these activations as well.

    The counts do not depend on how activations are split into batches, to the last bit.

    Args:
        activations: Inputs of the layer; of any float dtype, taken as float32. Values outside
            the bins' range are counted in the end bins (a nan in the first), so that every row of
            the histogram sums to `tokens`.

    Raises:
        ValueError: another number of channels.
    """
    _check_channels(stats.minimum, activations)
    tokens, channels = activations.shape
    rows = max(1, _BLOCK_ELEMENTS // max(channels, 1))
    blocks, rest = divmod(tokens, rows)

    def count_block(block, stats):
        start = block * rows
        return _count(stats, jax.lax.dynamic_slice_in_dim(activations, start, rows))

    if blocks:
        stats = jax.lax.fori_loop(0, blocks, count_block, stats)
    return _count(stats, activations[tokens - rest :]) if rest else stats


def merge_stats(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    """The statistics of a layer that saw both inputs.

    Raises:
        ValueError: the two count in different bins. Where they are traced (inside jit) only the
            shapes are compared.
    """
    if a.histogram.shape != b.histogram.shape:
        raise ValueError(
            f"statistics merge when both count in the same bins; their histograms [channel, bin] "
            f"are {a.histogram.shape} and {b.histogram.shape}."
        )
    edges = (a.minimum, b.minimum, a.maximum, b.maximum)
    if not any(isinstance(edge, jax.core.Tracer) for edge in edges):
        same = (np.asarray(a.minimum) == np.asarray(b.minimum)) & (
            np.asarray(a.maximum) == np.asarray(b.maximum)
        )
        if not same.all():
            raise ValueError(
                f"statistics merge when both count in the same bins; {(~same).sum()} of "
                f"{same.size} channels have other bounds. Start both from one "
                f"init_stats(range), with the ranges of all parts merged before."
            )
    return a._replace(
        histogram=a.histogram + b.histogram,
        sum_of_squares=a.sum_of_squares + b.sum_of_squares,
        tokens=a.tokens + b.tokens,
    )


@partial(jax.jit, static_argnames="kind")
def amplitude(stats: ChannelStats | ChannelRange, *, kind: str = "rms") -> Float[Array, " channel"]:
    """How large each channel is: its norm over the calibration tokens.

    Args:
        stats: Statistics of either pass.
        kind: "rms": the root mean square, in the activations' own unit; "l2": the plain L2 norm,
            which grows with the square root of the token count; "relative": the root mean
            square divided by its mean over the layer's channels, without a unit.

    Returns:
        AM_c in float32. Before any token, 0.

    Raises:
        ValueError: another kind.

    Source: E-Sparse, section 3.2, equation (2), which is "l2".
    Paper silent: how many tokens the norm runs over. Equation (3) adds the richness to it, so
    its scale matters; with "rms" an alpha keeps its meaning whatever the number of tokens.
    """
    if kind not in AMPLITUDES:
        raise ValueError(f"the amplitude is one of {', '.join(AMPLITUDES)}; got {kind!r}.")
    if kind == "l2":
        return jnp.sqrt(stats.sum_of_squares)
    tokens = jnp.maximum(stats.tokens, 1).astype(jnp.float32)
    root_mean_square = jnp.sqrt(stats.sum_of_squares / tokens)
    if kind == "rms":
        return root_mean_square
    mean = root_mean_square.mean()
    return root_mean_square / jnp.where(mean > 0, mean, 1.0)


@jax.jit
def information_richness(histogram: Int[Array, "channel bin"]) -> Float[Array, " channel"]:
    """How much each channel says: the entropy of its activation histogram.

    A channel whose values share one bin gives 0; one spread evenly over all bins gives
    log(bins). The logarithm is natural, so the unit is nats. A channel that was never seen
    (an all-zero row) gives 0, not nan: it carries nothing.

    Args:
        histogram: How many calibration tokens fell in each bin, one row per input channel.

    Returns:
        IR_c in [0, log(bins)], in float32 whatever the model's dtype.

    Source: E-Sparse, section 3.2, equation (1); bins = 100 there.
    Paper silent: what the bins span (see `init_stats`), and the base of the logarithm, which
    only rescales alpha.
    """
    tokens = jnp.maximum(histogram.sum(axis=1, keepdims=True), 1)
    probability = histogram.astype(jnp.float32) / tokens.astype(jnp.float32)
    return jax.scipy.special.entr(probability).sum(axis=1)


def _count(stats: ChannelStats, activations: Float[Array, "token channel"]) -> ChannelStats:
    """The statistics after one block of activations as well.

    Counts are an integer scatter-add, exact in any order. Comparing with every bin in turn is
    slower (4096 tokens x 1024 channels, 100 bins, two CPU cores: 72 ms against 12 ms).
    """
    values = activations.astype(jnp.float32)
    unit = _unit(stats.minimum, stats.maximum)[None]
    minimum, maximum = stats.minimum[None], stats.maximum[None]
    # Elementwise with factors fixed beforehand, so that no shape or fusion can move a value into
    # another bin; the product with the unit is exact, so contraction to a fused multiply-add
    # changes nothing either.
    inside = jnp.clip(values, minimum, maximum)
    position = (inside * unit - minimum * unit) * stats.bins_per_unit[None]
    position = jnp.where(jnp.isnan(position), 0.0, position)
    channels, bins = stats.histogram.shape
    index = jnp.clip(position.astype(jnp.int32), 0, bins - 1)
    channel = jnp.arange(channels, dtype=jnp.int32)[None]
    return stats._replace(
        histogram=stats.histogram.at[channel, index].add(1, mode="promise_in_bounds"),
        sum_of_squares=stats.sum_of_squares + jnp.square(values).sum(axis=0),
        tokens=stats.tokens + values.shape[0],
    )


def _unit(
    minimum: Float[Array, " channel"], maximum: Float[Array, " channel"]
) -> Float[Array, " channel"]:
    """A power of two per channel that brings its bounds to the size of 1.

    Without it the width of a range near the largest float would overflow, and the bins per unit
    of one near the smallest. Multiplying by a power of two is exact.
    """
    magnitude = jnp.maximum(jnp.abs(minimum), jnp.abs(maximum)).astype(jnp.float32)
    # A float32 is sign (1 bit), exponent (8 bits, biased by 127), fraction (23 bits).
    exponent = jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> 23
    return jax.lax.bitcast_convert_type(jnp.clip(254 - exponent, 1, 254) << 23, jnp.float32)


def _check_channels(seen: Array, activations: Array) -> None:
    if activations.shape[1] != seen.shape[0]:
        raise ValueError(
            f"these statistics are of {seen.shape[0]} input channels; the activations "
            f"[token, channel] have the shape {activations.shape}."
        )


def _check_same_channels(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"ranges merge when both are of the same channels; one has {a.shape[0]}, the other "
            f"{b.shape[0]}."
        )
