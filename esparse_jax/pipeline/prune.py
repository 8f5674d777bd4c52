"""Prunes a whole model: block by block, each block seeing the pruned blocks before it.

Every block passes three times over the calibration windows: once for the span of each channel,
once for its histogram (both through the block's dense weights), and once pruned, for the inputs of
the next block. Where the choices look at the true output error, the second pass gathers the Gram
matrix of every input as well.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from esparse_jax.files.interop import flax_params_from_model, model_from_flax_params
from esparse_jax.models.layers import Calibration
from esparse_jax.models.llama import HEADS_LINEAR, LAYERS_PATH, PRUNED_GROUPS, LlamaConfig
from esparse_jax.models.surgery import (
    clone_model,
    get_linear,
    matches_path,
    observe,
    observed,
    observed_grams,
    set_linear,
    split_layer,
    weight_of,
    with_weight,
)
from esparse_jax.pruning import (
    SHUFFLES,
    ChannelRange,
    ChannelStats,
    GramMatrix,
    NMPattern,
    PruneConfig,
    init_range,
    init_stats,
    layer_metric,
    nm_mask,
    prune_linear,
)


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What pruning did to one linear layer.

    Attributes:
        path: The layer's name in the checkpoint.
        out: Output features.
        channels: Input features.
        kept_share: The retained metric (equation 5) over the sum of all scores.
        natural_share: The same had the channels stayed in the given order.
        shuffle: The one that gave the permutation.
        output_error: ||XW^T - XV^T||_F^2 / ||XW^T||_F^2 over the calibration tokens, equation (4);
            None where it was not measured.
        natural_output_error: The same had the channels stayed in the given order.
        alpha: The weight of the amplitude in equation (3).
        richness: Least and greatest information richness of a channel, nats.
        amplitude: Least and greatest amplitude of a channel.
        seconds: Wall time of metric, shuffle and mask for all layers that share this input.
    """

    path: str
    out: int
    channels: int
    kept_share: float
    natural_share: float
    shuffle: str
    output_error: float | None
    natural_output_error: float | None
    alpha: float
    richness: tuple[float, float]
    amplitude: tuple[float, float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """The choices of a run, and what became of every linear layer, by checkpoint path."""

    config: PruneConfig
    layers: dict[str, LayerRecord]
    permutations: dict[str, np.ndarray]
    skipped: tuple[str, ...]
    windows: tuple[int, int]
    seconds: float

    @property
    def kept_share(self) -> float:
        """Mean over the pruned layers of the share of the metric that was kept; 1 for none."""
        shares = [record.kept_share for record in self.layers.values()]
        return float(np.mean(shares)) if shares else 1.0

    @property
    def output_error(self) -> float | None:
        """Mean over the pruned layers of the relative output error; None where not measured."""
        errors = [r.output_error for r in self.layers.values() if r.output_error is not None]
        return float(np.mean(errors)) if errors else None

    def metadata(self) -> dict[str, Any]:
        """What `esparse.json` says of this run: plain values only."""
        options = dataclasses.asdict(self.config) | {"pattern": str(self.config.pattern)}
        return {
            "pattern": str(self.config.pattern),
            "method": self.config.method,
            "options": options,
            "calibration_windows": list(self.windows),
            "layers": {path: dataclasses.asdict(record) for path, record in self.layers.items()},
            "skipped": list(self.skipped),
            "kept_share": self.kept_share,
            "output_error": self.output_error,
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True)
class PruneProgress:
    """How far a run is: `done` of `blocks` blocks, and the records of the last one."""

    done: int
    blocks: int
    records: tuple[LayerRecord, ...]


# Compiled once per shape: the blocks of a model share one graph definition.
@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _observe(graphdef, calibration, weights, hidden):
    block = nnx.merge(graphdef, calibration, weights)
    block(hidden)
    return nnx.state(block, Calibration)


@partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, hidden):
    return nnx.merge(graphdef, state)(hidden)


def _calibrate(
    block: nnx.Module,
    statistics: Mapping[str, ChannelRange | ChannelStats],
    batches: list[Float[Array, "_ seq channel"]],
    *,
    grams: bool = False,
) -> nnx.Module:
    """The block, observed while it saw all batches, with its weights as they are."""
    # Donated below; the caller keeps its own.
    watched = observe(block, jax.tree.map(jnp.copy, statistics), grams=grams)
    graphdef, calibration, weights = nnx.split(watched, Calibration, ...)
    for hidden in batches:
        calibration = _observe(graphdef, calibration, weights, hidden)
    nnx.update(watched, calibration)
    return watched


def calibrate_block(
    block: nnx.Module,
    groups: tuple[tuple[str, ...], ...],
    batches: list[Float[Array, "_ seq channel"]],
    config: PruneConfig,
    *,
    name: str = "the block",
) -> dict[str, ChannelStats]:
    """Statistics of the inputs of a block's linears, in two exact passes over its own inputs.

    The second pass may compute activations that differ from the first's in their last bits (other
    fusions); they are clipped into the span, so that every histogram counts every token.

    Args:
        block: A decoder layer with plain linears.
        groups: Paths of linears that share an input; the first of each is watched.
        batches: The block's inputs.
        config: `num_bins` and `bin_span` are read.
        name: For messages.

    Returns:
        For each group's first path the statistics of the input that the group shares.

    Raises:
        FloatingPointError: An input of a linear holds NaN or Inf; all are named.
    """
    return _calibrate_inputs(block, groups, batches, config, name=name, grams=False)[0]


def _calibrate_inputs(
    block: nnx.Module,
    groups: tuple[tuple[str, ...], ...],
    batches: list[Float[Array, "_ seq channel"]],
    config: PruneConfig,
    *,
    name: str,
    grams: bool,
) -> tuple[dict[str, ChannelStats], dict[str, GramMatrix]]:
    """`calibrate_block`, and the Gram matrices of the same inputs where they are wanted."""
    watched = {group[0]: get_linear(block, group[0]).in_features for group in groups}
    start = {path: init_range(channels) for path, channels in watched.items()}
    ranges = observed(_calibrate(block, start, batches))
    wrong = [
        f"{name}.{path}: {count} of {watched[path]} input channels"
        for path, seen in ranges.items()
        if (count := int((~jnp.isfinite(seen.maximum - seen.minimum)).sum()))
    ]
    if wrong:
        raise FloatingPointError(
            "Activations are NaN or Inf while calibrating, so no channel can be compared with "
            "another. Look for such values in the weights, or calibrate in a wider dtype "
            "(dtype='float32'). Found in:\n" + "\n".join(wrong)
        )
    start = {
        path: init_stats(seen, num_bins=config.num_bins, span=config.bin_span)
        for path, seen in ranges.items()
    }
    counted = _calibrate(block, start, batches, grams=grams)
    return observed(counted), observed_grams(counted)


@partial(jax.jit, static_argnames=("pattern", "bounds"))
def _shares(
    metric: Float[Array, "out channel"],
    mask: Bool[Array, "out channel"],
    pattern: NMPattern,
    bounds: tuple[int, ...],
) -> tuple[Float[Array, " member"], Float[Array, " member"]]:
    """For each linear of a stack the share of its metric kept: by the mask, and without shuffle."""

    def share(kept: Bool[Array, "out channel"]) -> Float[Array, " member"]:
        retained = jnp.split(jnp.where(kept, metric, 0.0), bounds)
        total = jnp.split(metric, bounds)
        return jnp.stack(
            [r.sum() / jnp.maximum(t.sum(), 1e-38) for r, t in zip(retained, total, strict=True)]
        )

    return share(mask), share(nm_mask(metric, pattern))


def _prune_group(
    block: nnx.Module,
    name: str,
    group: tuple[str, ...],
    stats: ChannelStats,
    gram: GramMatrix | None,
    config: PruneConfig,
    heads: tuple[int, int] | None,
) -> tuple[list[LayerRecord], np.ndarray]:
    """Prunes linears that share an input under one permutation, their rows stacked; in place."""
    started = time.perf_counter()
    linears = [get_linear(block, path) for path in group]
    weights = [weight_of(linear) for linear in linears]
    bounds = tuple(np.cumsum([weight.shape[0] for weight in weights[:-1]]).tolist())
    stacked = jnp.concatenate(weights)
    pruned = prune_linear(stacked, stats, config, gram=gram, heads=heads)
    metric = layer_metric(stacked, stats, config)
    kept, natural = map(np.asarray, _shares(metric, pruned.mask, config.pattern, bounds))
    for path, linear, weight in zip(group, linears, jnp.split(pruned.weight, bounds), strict=True):
        set_linear(block, path, with_weight(linear, weight))
    record = jax.tree.map(np.asarray, pruned.record)
    permutation = np.asarray(pruned.permutation)  # waits for the device
    paths = [f"{name}.{path}" for path in group]
    output_errors = _relative_errors(record.row_error, record.row_energy, bounds, paths, config)
    natural_errors = _relative_errors(
        record.natural_row_error, record.row_energy, bounds, paths, config
    )
    seconds = time.perf_counter() - started
    records = [
        LayerRecord(
            path=path,
            out=weights[member].shape[0],
            channels=weights[member].shape[1],
            kept_share=float(kept[member]),
            natural_share=float(natural[member]),
            shuffle=SHUFFLES[record.shuffle],
            output_error=output_errors[member],
            natural_output_error=natural_errors[member],
            alpha=config.alpha,
            richness=(float(record.richness_min), float(record.richness_max)),
            amplitude=(float(record.amplitude_min), float(record.amplitude_max)),
            seconds=seconds,
        )
        for member, path in enumerate(paths)
    ]
    return records, permutation


def _relative_errors(
    errors: Float[np.ndarray, " out"],
    energies: Float[np.ndarray, " out"],
    bounds: tuple[int, ...],
    paths: list[str],
    config: PruneConfig,
) -> list[float] | list[None]:
    """The relative output error of each linear of a stack; None for each where not measured."""
    if not config.needs_gram:
        return [None] * len(paths)
    if not np.isfinite([errors, energies]).all():
        raise FloatingPointError(
            f"The Gram matrix of the input of {', '.join(paths)} is not finite, though the "
            f"activations are: their products overflow float32. Leave these dense with skip, or "
            f"prune with select='metric' and measure_error=False."
        )
    shares = []
    for error, energy in zip(np.split(errors, bounds), np.split(energies, bounds), strict=True):
        total = float(error.sum(dtype=np.float64))
        shares.append(total / float(energy.sum(dtype=np.float64)) if total else 0.0)
    return shares


def prune_model(
    model: nnx.Module,
    calibration: Int[np.ndarray, "sample seq"],
    config: PruneConfig,
    *,
    batch_size: int = 8,
    progress: Callable[[PruneProgress], None] | None = None,
) -> tuple[nnx.Module, PruneReport]:
    """Prunes every decoder linear of a model to N:M; embeddings, norms and head stay dense.

    The pruned model keeps its weights in the given channel order with zeros in place, so it needs
    no permutation to be right. Where a channel shuffle was searched, a layer is N:M in the order
    of its permutation, which the report carries beside it.

    Args:
        model: A dense model; it is not changed.
        calibration: Token windows, one a row (`files.data.calibration_windows`).
        config: The choices. Those that look at the true output error (`select="error"`,
            `measure_error`) need the Gram matrix of every input of a block at once: for each
            channels x channels float32 on the device, and as much again while a batch is added
            (7B: 0.64 GiB a block and 0.45 more; 70B: 3.8 and 3.1).
        batch_size: Windows a step; activations of one step are the driver's working memory beside
            the hidden states of all windows.
        progress: Called after every block.

    Returns:
        The pruned model, and what was done.

    Raises:
        ValueError: Calibration windows of the wrong shape or with ids outside the vocabulary; a
            layer whose channels, slices or heads hold no whole groups of M (leave it dense with
            `skip`); a name in `skip` that means no layer.
        FloatingPointError: NaN or Inf in weights or activations, or a Gram matrix beyond float32;
            named by layer.

    Source: E-Sparse, sections 3 and 5.1; statistics of a block from one dense pass of that block
    on the outputs of the pruned blocks before it, as in Wanda (arXiv 2306.11695).
    """
    _check_calibration(calibration, model.config)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    started = time.perf_counter()
    model = clone_model(model)
    blocks = len(model.model.layers)
    plan = _plan(model, config)
    batches = [
        model.embed(jnp.asarray(calibration[start : start + batch_size], jnp.int32))
        for start in range(0, len(calibration), batch_size)
    ]
    layers: dict[str, LayerRecord] = {}
    permutations: dict[str, np.ndarray] = {}
    for index in range(blocks):
        block, name = model.model.layers[index], f"{LAYERS_PATH}.{index}"
        groups = plan[index]
        statistics, grams = {}, {}
        if groups:
            statistics, grams = _calibrate_inputs(
                block, groups, batches, config, name=name, grams=config.needs_gram
            )
        records = []
        for group in groups:
            stats, gram = statistics[group[0]], grams.pop(group[0], None)
            heads = _heads(model, config) if HEADS_LINEAR in group else None
            done, permutation = _prune_group(block, name, group, stats, gram, config, heads)
            records += done
            permutations |= {record.path: permutation for record in done}
        layers |= {record.path: record for record in records}
        if index + 1 < blocks:
            graphdef, state = split_layer(block)
            batches = [_forward(graphdef, state, hidden) for hidden in batches]
        if progress is not None:
            progress(PruneProgress(index + 1, blocks, tuple(records)))
    report = PruneReport(
        config=config,
        layers=layers,
        permutations=permutations,
        skipped=tuple(path for path in _all_paths(blocks) if path not in layers),
        windows=(int(calibration.shape[0]), int(calibration.shape[1])),
        seconds=time.perf_counter() - started,
    )
    return model, report


def prune_params(
    params: Mapping[str, Any],
    model_config: LlamaConfig | Mapping[str, Any] | Any,
    calibration: Int[np.ndarray, "sample seq"],
    config: PruneConfig,
    *,
    batch_size: int = 8,
    progress: Callable[[PruneProgress], None] | None = None,
) -> tuple[Mapping[str, Any], PruneReport]:
    """`prune_model` for the parameters of transformers' FlaxLlamaForCausalLM.

    Args:
        params: The pytree, `model/layers/0/self_attn/q_proj/kernel` as [in, out] and so on, nested
            dicts or a FrozenDict.
        model_config: `LlamaConfig`, the fields of `config.json`, or a transformers config object.
        calibration, config, batch_size, progress: As for `prune_model`.

    Returns:
        Pruned parameters in a pytree of the same structure and dtypes, and the report; its paths
        are the checkpoint's names.

    Raises:
        TypeError: `model_config` is nothing of that kind.
    """
    if not isinstance(model_config, LlamaConfig):
        if not isinstance(model_config, Mapping) and not hasattr(model_config, "to_dict"):
            raise TypeError(
                f"model_config is a LlamaConfig, the fields of config.json, or a transformers "
                f"config; got {type(model_config).__name__}."
            )
        fields = model_config if isinstance(model_config, Mapping) else model_config.to_dict()
        model_config = LlamaConfig.from_dict(fields)
    model = model_from_flax_params(params, model_config)
    pruned, report = prune_model(
        model, calibration, config, batch_size=batch_size, progress=progress
    )
    return flax_params_from_model(pruned, like=params), report


def _all_paths(blocks: int) -> list[str]:
    return [
        f"{LAYERS_PATH}.{index}.{path}"
        for index in range(blocks)
        for group in PRUNED_GROUPS
        for path in group
    ]


def _heads(model: nnx.Module, config: PruneConfig) -> tuple[int, int] | None:
    """The query and key/value heads that channels of the output projection stay in, if they do."""
    if config.heads == "free":
        return None
    return model.config.num_attention_heads, model.config.num_key_value_heads


def _plan(model: nnx.Module, config: PruneConfig) -> list[tuple[tuple[str, ...], ...]]:
    """For each block the groups of linears to prune, skipped ones left out; all checked first."""
    blocks = model.model.layers
    paths = _all_paths(len(blocks))
    unknown = [name for name in config.skip if not any(matches_path(p, (name,)) for p in paths)]
    if unknown:
        raise ValueError(
            f"skip={unknown} names no linear of this model. Give a checkpoint path or its end, "
            f"for example {paths[-1]!r} or {PRUNED_GROUPS[-1][0]!r}."
        )
    plan, uneven, broken = [], [], []
    for index, block in enumerate(blocks):
        name = f"{LAYERS_PATH}.{index}"
        groups = []
        for group in PRUNED_GROUPS:
            kept = tuple(p for p in group if not matches_path(f"{name}.{p}", config.skip))
            if kept:
                groups.append(kept)
            for path in kept:
                linear = get_linear(block, path)
                heads = _heads(model, config) if path == HEADS_LINEAR else None
                if misfit := _misfit(linear.in_features, heads, config):
                    uneven.append(f"{name}.{path} {misfit}")
                if not bool(jnp.isfinite(weight_of(linear)).all()):
                    broken.append(f"{name}.{path}")
        plan.append(tuple(groups))
    if uneven:
        raise ValueError(
            f"{config.pattern} pruning groups {config.pattern.m} neighbouring input channels, so "
            f"their number must be a multiple of {config.pattern.m}, in every slice and in every "
            f"head that keeps its channels. Take another pattern, leave these dense (skip), or "
            f"change slices or heads:\n" + _listed(uneven)
        )
    if broken:
        raise FloatingPointError(
            "NaN or Inf among the weights to prune; a score from them would mean nothing. Repair "
            "the checkpoint, or leave these dense (skip):\n" + _listed(broken)
        )
    return plan


def _listed(names: Sequence[str], most: int = 10) -> str:
    """A line each; of many the first ones."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return "\n".join([*names[:most], *more])


def _misfit(channels: int, heads: tuple[int, int] | None, config: PruneConfig) -> str | None:
    """What keeps a layer's channels from falling into groups; None where nothing does."""
    parts, kind = (config.slices, "slices") if heads is None else (heads[0], "heads")
    if parts % config.slices:
        return f"has {parts} heads, which {config.slices} slices cut through"
    if channels % (parts * config.pattern.m):
        return f"has {channels}" + (f" in {parts} {kind}" if parts > 1 else "")
    return None


def _check_calibration(calibration: Int[np.ndarray, "sample seq"], config: LlamaConfig) -> None:
    if calibration.ndim != 2 or 0 in calibration.shape:
        raise ValueError(
            f"Calibration takes token windows [sample, seq], at least one of at least one token; "
            f"got shape {tuple(calibration.shape)}."
        )
    if not np.issubdtype(calibration.dtype, np.integer):
        raise TypeError(f"Calibration takes token ids, integers; got {calibration.dtype}.")
    if calibration.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"The calibration windows have {calibration.shape[1]} tokens and the model's context "
            f"{config.max_position_embeddings}. Take a sequence length of at most that."
        )
    least, greatest = int(calibration.min()), int(calibration.max())
    if least < 0 or greatest >= config.vocab_size:
        raise ValueError(
            f"Calibration ids run from {least} to {greatest}; the model's vocabulary has ids 0 to "
            f"{config.vocab_size - 1}. The windows were made with another tokenizer."
        )
