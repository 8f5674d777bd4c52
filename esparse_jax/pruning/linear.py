"""One linear layer, pruned in the paper's order: metric, shuffle, mask (E-Sparse, section 3)."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esparse_jax.pruning.error import GramMatrix, relative_error, row_errors
from esparse_jax.pruning.mask import NMPattern, nm_mask, retained_metric
from esparse_jax.pruning.metric import esparse_metric, magnitude_metric, wanda_metric
from esparse_jax.pruning.shuffle import (
    SHUFFLES,
    Deal,
    Scores,
    channel_shuffle,
    shuffle_heads,
)
from esparse_jax.pruning.stats import (
    AMPLITUDES,
    BIN_SPANS,
    ChannelStats,
    amplitude,
    information_richness,
)

METHODS = ("magnitude", "wanda", "esparse")
DEALS = get_args(Deal)
SCORES = get_args(Scores)
SELECTIONS = ("metric", "error")
HEADS = ("free", "within")


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
        block_size: Channels in a block of the local block shuffle; None: see `channel_shuffle`.
        deal: How the global shuffle deals out the sorted channels, see `global_naive_shuffle`;
            None: see `channel_shuffle`.
        scores: What the search adds up, see `local_block_shuffle`.
        escape: Kicks after the search, see `local_block_shuffle`.
        slices: Permutations stay inside that many equal slices of the channels, so that every
            tensor-parallel shard of an input holds whole groups.
        heads: "free": the input of the attention output projection is permuted like any other.
            "within": inside its heads, alike for the query heads that share a key/value head, so
            that the permutation can be folded into the value projection; see `shuffle_heads`.
        select: "metric": `shuffle` is taken. "error": all of `candidates` are searched and the
            one of least true output error is taken, summed over the linears that share an input;
            of equal errors the earlier candidate. Needs the Gram matrix of the input.
        candidates: Shuffles that compete where select is "error".
        measure_error: Record the true output error, whatever selects; needs the Gram matrix of
            the input. "error" does so anyway.
        skip: Checkpoint paths of linears that stay dense.

    Raises:
        TypeError, ValueError: a field outside what it allows.

    Source: E-Sparse, sections 3.2, 3.3 and 5.1: 2:4, 100 bins, blocks of 256 channels. It judges
    a shuffle by the metric, equation (5), in place of the error, equation (4).
    Paper silent: alpha, the kind of amplitude, the bin span, and how the channels are dealt.
    """

    pattern: NMPattern = field(default=NMPattern(2, 4))
    method: str = "esparse"
    shuffle: str = "strided"
    alpha: float | int = 300.0
    amplitude: str = "rms"
    num_bins: int = 100
    bin_span: str = "channel"
    block_size: int | None = None
    deal: str | None = None
    scores: str = "fixed"
    escape: int = 0
    slices: int = 1
    heads: str = "free"
    select: str = "metric"
    candidates: tuple[str, ...] = SHUFFLES
    measure_error: bool = False
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
            ("deal", (*DEALS, None)),
            ("scores", SCORES),
            ("heads", HEADS),
            ("select", SELECTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is one of {', '.join(map(str, allowed))}; got {getattr(self, name)!r}."
                )
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool):
            raise TypeError(f"alpha is a number; got {self.alpha!r}.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha is finite and not negative; got {self.alpha!r}.")
        object.__setattr__(self, "alpha", float(self.alpha))
        for name, least, why in (
            ("num_bins", 2, "one bin makes every richness 0"),
            ("block_size", self.pattern.m, f"a block holds whole groups of {self.pattern}"),
            ("escape", 0, "0 does not disturb the search"),
            ("slices", 1, "1 lets permutations reach all channels"),
        ):
            value = getattr(self, name)
            if name == "block_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is an int; got {value!r}.")
            if value < least:
                raise ValueError(f"{name} is at least {least} ({why}); got {value}.")
        if not isinstance(self.candidates, tuple):
            raise TypeError(
                f"candidates takes a tuple of shuffles, for example ('none', 'strided'); "
                f"got {self.candidates!r}."
            )
        unknown = [name for name in self.candidates if name not in SHUFFLES]
        if unknown or not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise ValueError(
                f"candidates are one or more of {', '.join(SHUFFLES)}, each once; "
                f"got {self.candidates!r}."
            )
        if not isinstance(self.measure_error, bool):
            raise TypeError(f"measure_error is a bool; got {self.measure_error!r}.")
        if not isinstance(self.skip, tuple) or not all(isinstance(p, str) for p in self.skip):
            raise TypeError(
                f"skip takes a tuple of checkpoint paths, for example "
                f"('model.layers.0.mlp.down_proj',); got {self.skip!r}."
            )

    @property
    def needs_gram(self) -> bool:
        """Whether pruning by these choices takes the Gram matrix of the input."""
        return self.measure_error or self.select == "error"


class LinearRecord(NamedTuple):
    """What pruning one layer did to its metric and its output, and what the metric was made of.

    retained: Metric kept by the mask, summed over the layer.
    natural_retained: What a mask without shuffle would have kept.
    total: Metric before pruning.
    shuffle: The place in `SHUFFLES` of the one that gave the permutation.
    row_error: Squared change of each output, summed over the calibration tokens (`row_errors`).
    natural_row_error: The same for a mask without shuffle.
    row_energy: Square of each dense output, summed over the tokens.
    alpha: As given; only the esparse metric uses it.
    richness_*, amplitude_*: Least and greatest over the input channels.

    The errors go row by row, since the rows may be those of several linears that share their
    input; they are nan where they were not measured.
    """

    retained: Float[Array, ""]
    natural_retained: Float[Array, ""]
    total: Float[Array, ""]
    shuffle: Int[Array, ""]
    row_error: Float[Array, " out"]
    natural_row_error: Float[Array, " out"]
    row_energy: Float[Array, " out"]
    alpha: Float[Array, ""]
    richness_min: Float[Array, ""]
    richness_max: Float[Array, ""]
    amplitude_min: Float[Array, ""]
    amplitude_max: Float[Array, ""]

    @property
    def output_error(self) -> Float[Array, ""]:
        """The change of the output as a share of it (`relative_output_error`), or nan."""
        return relative_error(self.row_error, self.row_energy)

    @property
    def natural_output_error(self) -> Float[Array, ""]:
        """What a mask without shuffle would have changed, as a share; or nan."""
        return relative_error(self.natural_row_error, self.row_energy)


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
    return _metric(weight, stats, config.alpha, method=config.method, kind=config.amplitude)


def prune_linear(
    weight: Float[Array, "out channel"],
    stats: ChannelStats,
    config: PruneConfig,
    *,
    gram: GramMatrix | None = None,
    heads: tuple[int, int] | None = None,
) -> Pruned:
    """Prunes one linear layer to N:M without changing the weights that stay.

    Layers that read the same input (query, key and value; gate and up) share its statistics and
    one permutation: stack their weights along `out`, prune once, split the result.

    Its stages are jitted one by one, since only the shuffle takes long to compile: called
    outside jit, another method or alpha finds it compiled.

    Args:
        weight: Of any float dtype; flax's kernel transposed.
        stats: Statistics of the layer's input.
        config: The choices; `skip` and `heads` are for drivers of whole models and ignored here.
        gram: Gram matrix of the layer's input, for the true output error; used only where
            `config.needs_gram`.
        heads: (num_heads, num_kv_heads) where the input channels are those of attention heads
            one by one, and are to stay inside them as `shuffle_heads` says: the output projection
            of an attention whose permutation is to be folded. None: no such limit.

    Returns:
        Everything in natural channel order, so the pruned layer needs no permutation to be
        right. The permutation is for compressing it.

    Raises:
        ValueError: channels not a multiple of M, or another number than in the statistics or the
            Gram matrix; slices or heads that hold no whole groups; no Gram matrix where the
            choices need one.

    Source: E-Sparse, section 3 and algorithm 1.
    """
    config.pattern.groups(weight.shape[1])
    if config.needs_gram:
        _check_gram(gram, weight.shape[1], config)
    metric = layer_metric(weight, stats, config)
    methods = config.candidates if config.select == "error" else (config.shuffle,)
    permutations = [_shuffle(metric, config, method, heads) for method in methods]
    if config.needs_gram:
        measure = partial(_masked_errors, weight, metric, gram=gram, pattern=config.pattern)
        errors = [measure(permutation) for permutation in permutations]
        natural_error = measure(jnp.arange(weight.shape[1], dtype=jnp.int32))
        energy = row_errors(weight, jnp.zeros_like(weight), gram)
    else:
        errors = [jnp.full(len(weight), jnp.nan)]
        natural_error = energy = errors[0]
    return _prune_in_best_order(
        weight,
        metric,
        jnp.stack(permutations),
        jnp.stack(errors),
        stats,
        shuffles=jnp.array([SHUFFLES.index(method) for method in methods], jnp.int32),
        natural_error=natural_error,
        energy=energy,
        alpha=config.alpha,
        pattern=config.pattern,
        kind=config.amplitude,
    )


def _check_gram(gram: GramMatrix | None, channels: int, config: PruneConfig) -> None:
    if gram is None:
        choice = "select='error'" if config.select == "error" else "measure_error=True"
        raise ValueError(
            f"{choice} looks at the layer's output over the calibration tokens, for which it needs "
            f"the Gram matrix of the layer's input. Give gram=, which init_gram({channels}) and "
            f"update_gram make, or leave select and measure_error at their defaults."
        )
    if len(gram.products) != channels:
        raise ValueError(
            f"the Gram matrix is of {len(gram.products)} input channels; the layer has {channels}. "
            f"Both are of the layer's input."
        )


@partial(jax.jit, static_argnames=("method", "kind"))
def _metric(weight, stats, alpha, *, method, kind):
    if method == "magnitude":
        return magnitude_metric(weight)
    channel_amplitude = amplitude(stats, kind=kind)
    if method == "wanda":
        return wanda_metric(weight, channel_amplitude)
    return esparse_metric(
        weight, information_richness(stats.histogram), channel_amplitude, alpha=alpha
    )


def _shuffle(
    metric: Float[Array, "out channel"],
    config: PruneConfig,
    method: str,
    heads: tuple[int, int] | None,
) -> Int[Array, " channel"]:
    shuffle = channel_shuffle
    if heads is not None:
        shuffle = partial(shuffle_heads, num_heads=heads[0], num_kv_heads=heads[1])
    return shuffle(
        metric,
        config.pattern,
        method=method,
        block_size=config.block_size,
        deal=config.deal,
        scores=config.scores,
        slices=config.slices,
        escape=config.escape,
    )


def _mask_in_order(
    metric: Float[Array, "out channel"], permutation: Int[Array, " channel"], pattern: NMPattern
) -> Bool[Array, "out channel"]:
    """The mask, in natural order, with the groups formed in the order of the permutation."""
    position = (
        jnp.zeros_like(permutation)
        .at[permutation]
        .set(jnp.arange(permutation.size, dtype=permutation.dtype))
    )
    return nm_mask(metric[:, permutation], pattern)[:, position]


@partial(jax.jit, static_argnames="pattern")
def _masked_errors(
    weight: Float[Array, "out channel"],
    metric: Float[Array, "out channel"],
    permutation: Int[Array, " channel"],
    gram: GramMatrix,
    pattern: NMPattern,
) -> Float[Array, " out"]:
    """`row_errors` of the weight masked in the order of the permutation."""
    mask = _mask_in_order(metric, permutation, pattern)
    return row_errors(weight, jnp.where(mask, weight, jnp.zeros((), weight.dtype)), gram)


@partial(jax.jit, static_argnames=("pattern", "kind"))
def _prune_in_best_order(
    weight: Float[Array, "out channel"],
    metric: Float[Array, "out channel"],
    permutations: Int[Array, "candidate channel"],
    errors: Float[Array, "candidate out"],
    stats: ChannelStats,
    *,
    shuffles: Int[Array, " candidate"],
    natural_error: Float[Array, " out"],
    energy: Float[Array, " out"],
    alpha: float | Float[Array, ""],
    pattern: NMPattern,
    kind: str,
) -> Pruned:
    """Masks the weight in the order of least error, the first of equal ones, and records it."""
    total = errors.sum(axis=1)
    best = jnp.argmin(jnp.where(jnp.isnan(total), jnp.inf, total))
    permutation = permutations[best]
    mask = _mask_in_order(metric, permutation, pattern)
    richness = information_richness(stats.histogram)
    channel_amplitude = amplitude(stats, kind=kind)
    record = LinearRecord(
        retained=jnp.where(mask, metric, 0.0).sum(),
        natural_retained=retained_metric(metric, pattern),
        total=metric.sum(),
        shuffle=shuffles[best],
        row_error=errors[best],
        natural_row_error=natural_error,
        row_energy=energy,
        alpha=jnp.float32(alpha),
        richness_min=richness.min(),
        richness_max=richness.max(),
        amplitude_min=channel_amplitude.min(),
        amplitude_max=channel_amplitude.max(),
    )
    pruned = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
    return Pruned(pruned, mask, permutation, record)
