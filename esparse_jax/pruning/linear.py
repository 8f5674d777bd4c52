"""One linear layer, pruned in the paper's order: metric, shuffle, mask (E-Sparse, section 3)."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esparse_jax.pruning.mask import NMPattern, nm_mask, retained_metric
from esparse_jax.pruning.metric import esparse_metric, magnitude_metric, wanda_metric
from esparse_jax.pruning.shuffle import SHUFFLES, Deal, channel_shuffle
from esparse_jax.pruning.stats import (
    AMPLITUDES,
    BIN_SPANS,
    ChannelStats,
    amplitude,
    information_richness,
)

METHODS = ("magnitude", "wanda", "esparse")
DEALS = get_args(Deal)


@dataclass(frozen=True)
class PruneConfig:
    """How to prune: every choice of the paper and every one it leaves open.

    Args:
        pattern: Weights kept per group.
        method: Whose metric: "magnitude", "wanda" or "esparse".
        shuffle: How channels are brought into groups; see `channel_shuffle`.
        alpha: Weight of the amplitude beside the richness, equation (3).
        amplitude: Kind of the amplitude, equation (2); see `amplitude`.
        num_bins: Bins of the histogram, equation (1).
        bin_span: What the bins span; see `bin_range`.
        block_size: Channels in a block of the local block shuffle.
        deal: How the global shuffle deals out the sorted channels; see `global_naive_shuffle`.
        skip: Checkpoint paths of linears that stay dense.

    Raises:
        TypeError, ValueError: a field outside what it allows.

    Source: E-Sparse, sections 3.2, 3.3 and 5.1: 2:4, 100 bins, blocks of 256 channels.
    Paper silent: alpha, the kind of amplitude, the bin span, and how the channels are dealt.
    """

    pattern: NMPattern = field(default=NMPattern(2, 4))
    method: str = "esparse"
    shuffle: str = "strided"
    alpha: float | int = 300.0
    amplitude: str = "rms"
    num_bins: int = 100
    bin_span: str = "channel"
    block_size: int = 256
    deal: str = "naive"
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.pattern, NMPattern):
            raise TypeError(
                f"pattern takes an NMPattern, for example NMPattern.parse('2:4'); "
                f"got {self.pattern!r}."
            )
        for name, allowed in (
            ("method", METHODS),
            ("shuffle", SHUFFLES),
            ("amplitude", AMPLITUDES),
            ("bin_span", BIN_SPANS),
            ("deal", DEALS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}."
                )
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool):
            raise TypeError(f"alpha is a number; got {self.alpha!r}.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha is finite and not negative; got {self.alpha!r}.")
        object.__setattr__(self, "alpha", float(self.alpha))
        for name, least, why in (
            ("num_bins", 2, "one bin makes every richness 0"),
            ("block_size", self.pattern.m, f"a block holds whole groups of {self.pattern}"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is an int; got {value!r}.")
            if value < least:
                raise ValueError(f"{name} is at least {least} ({why}); got {value}.")
        if not isinstance(self.skip, tuple) or not all(isinstance(p, str) for p in self.skip):
            raise TypeError(
                f"skip takes a tuple of checkpoint paths, for example "
                f"('model.layers.0.mlp.down_proj',); got {self.skip!r}."
            )


class LinearRecord(NamedTuple):
    """What pruning one layer did to its metric, and what the metric was made of.

    retained: Metric kept by the mask, summed over the layer.
    natural_retained: What a mask without shuffle would have kept.
    total: Metric before pruning.
    alpha: As given; only the esparse metric uses it.
    richness_*, amplitude_*: Least and greatest over the input channels.
    """

    retained: Float[Array, ""]
    natural_retained: Float[Array, ""]
    total: Float[Array, ""]
    alpha: Float[Array, ""]
    richness_min: Float[Array, ""]
    richness_max: Float[Array, ""]
    amplitude_min: Float[Array, ""]
    amplitude_max: Float[Array, ""]


class Pruned(NamedTuple):
    """A pruned layer, in the natural order of its channels.

    weight: The given weight with zeros where the mask is False; nothing else is touched.
    mask: True keeps.
    permutation: The channel order in which `mask[:, permutation]` is N:M.
    """

    weight: Float[Array, "out channel"]
    mask: Bool[Array, "out channel"]
    permutation: Int[Array, " channel"]
    record: LinearRecord


@partial(jax.jit, static_argnames="config")
def layer_metric(
    weight: Float[Array, "out channel"], stats: ChannelStats, config: PruneConfig
) -> Float[Array, "out channel"]:
    """The scores of one layer by the method of `config`.

    Args:
        stats: Statistics of the layer's input. The magnitude does not look at them.

    Raises:
        ValueError: weight and statistics have different numbers of channels.

    Source: E-Sparse, section 3.2.
    """
    channels = stats.histogram.shape[0]
    if weight.shape[1] != channels:
        raise ValueError(
            f"the statistics are of {channels} input channels; the weight [out, channel] has the "
            f"shape {weight.shape}. A flax kernel is [channel, out]: give its transpose."
        )
    if config.method == "magnitude":
        return magnitude_metric(weight)
    channel_amplitude = amplitude(stats, kind=config.amplitude)
    if config.method == "wanda":
        return wanda_metric(weight, channel_amplitude)
    richness = information_richness(stats.histogram)
    return esparse_metric(weight, richness, channel_amplitude, alpha=config.alpha)


def prune_linear(
    weight: Float[Array, "out channel"], stats: ChannelStats, config: PruneConfig
) -> Pruned:
    """Prunes one linear layer to N:M without changing the weights that stay.

    Layers that read the same input (query, key and value; gate and up) share its statistics and
    one permutation: stack their weights along `out`, prune once, split the result.

    Its three stages are jitted one by one, since only the shuffle takes long to compile: called
    outside jit, another method or alpha finds it compiled.

    Args:
        weight: Of any float dtype; flax's kernel transposed.
        stats: Statistics of the layer's input.
        config: The choices; `skip` is for drivers of whole models and ignored here.

    Returns:
        Everything in natural channel order, so the pruned layer needs no permutation to be
        right. The permutation is for compressing it.

    Raises:
        ValueError: channels not a multiple of M, or another number than in the statistics.

    Source: E-Sparse, section 3 and algorithm 1.
    """
    config.pattern.groups(weight.shape[1])
    metric = layer_metric(weight, stats, config)
    permutation = channel_shuffle(
        metric,
        config.pattern,
        method=config.shuffle,
        block_size=config.block_size,
        deal=config.deal,
    )
    return _prune_in_order(weight, metric, permutation, stats, config)


@partial(jax.jit, static_argnames="config")
def _prune_in_order(
    weight: Float[Array, "out channel"],
    metric: Float[Array, "out channel"],
    permutation: Int[Array, " channel"],
    stats: ChannelStats,
    config: PruneConfig,
) -> Pruned:
    """Masks the weight with the groups formed in the order of the permutation."""
    position = (
        jnp.zeros_like(permutation)
        .at[permutation]
        .set(jnp.arange(permutation.size, dtype=permutation.dtype))
    )
    mask = nm_mask(metric[:, permutation], config.pattern)[:, position]
    richness = information_richness(stats.histogram)
    channel_amplitude = amplitude(stats, kind=config.amplitude)
    record = LinearRecord(
        retained=jnp.where(mask, metric, 0.0).sum(),
        natural_retained=retained_metric(metric, config.pattern),
        total=metric.sum(),
        alpha=jnp.float32(config.alpha),
        richness_min=richness.min(),
        richness_max=richness.max(),
        amplitude_min=channel_amplitude.min(),
        amplitude_max=channel_amplitude.max(),
    )
    pruned = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
    return Pruned(pruned, mask, permutation, record)
