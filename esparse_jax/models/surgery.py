"""Finds and replaces the linear layers of a model, by their checkpoint path.

A path is the checkpoint's name without `.weight`: `model.layers.0.self_attn.q_proj` in a model,
`self_attn.q_proj` in one of its blocks. Functions that return a module leave the given one as it
was and share its arrays with it (`set_linear` alone works in place).
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from esparse_jax.models.layers import (
    MaskedLinear,
    ObservedLinear,
    SparseLinear,
)
from esparse_jax.pruning.error import GramMatrix, init_gram
from esparse_jax.pruning.mask import NMPattern
from esparse_jax.pruning.stats import ChannelRange, ChannelStats
from esparse_jax.sparse.compress import compress24
from esparse_jax.sparse.table import FormChoice, TuningTable, choose_form

_LOGGER = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nnx.Module)

TWO_OF_FOUR = NMPattern(2, 4)

LINEARS = (nnx.Linear, ObservedLinear, MaskedLinear, SparseLinear)


def clone_model(model: ModuleT) -> ModuleT:
    """A copy whose layers can be replaced and reassigned freely; the arrays are shared."""
    return nnx.clone(model)


def split_layer(layer: nnx.Module) -> tuple[Any, Any]:
    """A block as a static description and its arrays, for a function jitted once for all blocks.

    The description is hashable and equal for all blocks of a model, as long as the same of their
    linears were replaced by the same kind of layer::

        @partial(jax.jit, static_argnums=0)
        def forward(graphdef, state, hidden):
            return nnx.merge(graphdef, state)(hidden)

        for layer in model.model.layers:
            hidden = forward(*split_layer(layer), hidden)     # compiles once
    """
    return nnx.split(layer)


def iter_linears(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """(path, layer) of every linear layer, drop-ins included; sorted by name, blocks by number.

    The linear inside an `ObservedLinear` or `MaskedLinear` is part of it and is not listed.
    """

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, nnx.Module]]:
        if isinstance(node, LINEARS):
            yield ".".join(path), node
        elif isinstance(node, nnx.List):
            for index, child in enumerate(node):
                yield from walk(child, (*path, str(index)))
        elif isinstance(node, nnx.Module):
            for name, child in sorted(vars(node).items()):
                yield from walk(child, (*path, name))

    yield from walk(module, ())


def get_linear(module: nnx.Module, path: str) -> nnx.Module:
    """The linear layer at a path.

    Raises:
        KeyError: There is none; the message names those that there are.
    """
    parent, name = _parent(module, path)
    return parent[name] if isinstance(parent, nnx.List) else getattr(parent, name)


def set_linear(module: nnx.Module, path: str, linear: nnx.Module) -> None:
    """Puts a layer where the one at `path` stood, in place. Clone the model first to keep it."""
    parent, name = _parent(module, path)
    if isinstance(parent, nnx.List):
        parent[name] = linear
    else:
        setattr(parent, name, linear)


def replace_linears(module: ModuleT, replacements: Mapping[str, nnx.Module]) -> ModuleT:
    """A new model with other layers at the given paths."""
    module = clone_model(module)
    for path, linear in replacements.items():
        set_linear(module, path, linear)
    return module


def weight_of(linear: nnx.Module) -> Float[Array, "out channel"]:
    """The weight of a linear layer, masked if the layer masks it."""
    if isinstance(linear, ObservedLinear):
        return weight_of(linear.linear)
    if isinstance(linear, MaskedLinear):
        weight = weight_of(linear.linear)
        return jnp.where(linear.mask[...], weight, jnp.zeros((), weight.dtype))
    if isinstance(linear, nnx.Linear):
        return linear.kernel[...].T
    raise TypeError(
        f"{type(linear).__name__} holds no dense weight; weight_of takes nnx.Linear, "
        f"ObservedLinear and MaskedLinear. For a SparseLinear use decompress24, or expand its "
        f"checkpoint (esparse expand)."
    )


def with_weight(linear: nnx.Linear, weight: Float[Array, "out channel"]) -> nnx.Linear:
    """A new linear layer with another weight and the same bias and settings."""
    expected = (linear.out_features, linear.in_features)
    if weight.shape != expected:
        raise ValueError(
            f"The weight has shape {tuple(weight.shape)}; this layer's is [out, channel] = "
            f"{expected}."
        )
    linear = nnx.clone(linear)
    linear.kernel.set_value(weight.T)
    return linear


def observe(
    module: ModuleT,
    statistics: Mapping[str, ChannelRange | ChannelStats],
    *,
    grams: bool = False,
) -> ModuleT:
    """A new module in which the layers at the given paths gather statistics of their inputs.

    Args:
        module: A block or a model.
        statistics: For each path what to start from: `init_range(channels)` for the first pass,
            `init_stats(range)` for the second, or what an earlier run came to.
        grams: Whether the layers also gather the Gram matrix of their input, from nothing.
    """
    module = clone_model(module)
    for path, start in statistics.items():
        linear = get_linear(module, path)
        if not isinstance(linear, nnx.Linear):
            raise TypeError(
                f"{path} is a {type(linear).__name__}; only an nnx.Linear can be observed. Read "
                f"the statistics and call unobserve first."
            )
        channels = start.minimum.shape[0]
        if channels != linear.in_features:
            raise ValueError(
                f"The statistics for {path} have {channels} channels; the layer has "
                f"{linear.in_features}."
            )
        gram = init_gram(channels) if grams else None
        set_linear(module, path, ObservedLinear(linear, start, gram))
    return module


def observed(module: nnx.Module) -> dict[str, ChannelRange | ChannelStats]:
    """What every observed layer has seen so far, by path."""
    return {
        path: linear.calibration.get_value()
        for path, linear in iter_linears(module)
        if isinstance(linear, ObservedLinear)
    }


def observed_grams(module: nnx.Module) -> dict[str, GramMatrix]:
    """The Gram matrix of every observed layer that gathers one, by path."""
    return {
        path: linear.gram.get_value()
        for path, linear in iter_linears(module)
        if isinstance(linear, ObservedLinear) and linear.gram is not None
    }


def unobserve(module: ModuleT) -> ModuleT:
    """A new module with the plain linear layers back; the statistics are gone with the others."""
    module = clone_model(module)
    for path, linear in list(iter_linears(module)):
        if isinstance(linear, ObservedLinear):
            set_linear(module, path, linear.linear)
    return module


def matches_path(path: str, names: Collection[str]) -> bool:
    """Whether a layer is meant by one of the names: its path, the end of it or the start of it.

    `model.layers.3.mlp.down_proj` is meant by itself, by `mlp.down_proj`, `down_proj` and by
    `model.layers.3`; names match whole words, so `model.layers.1` does not mean block 10.
    """
    dotted = f".{path}."
    return any(dotted.startswith(f".{name}.") or dotted.endswith(f".{name}.") for name in names)


def require_compressible(pattern: NMPattern) -> None:
    """Passes 2:4 and 1:4, the patterns that `Compressed24` has room for.

    Raises:
        ValueError: Another pattern.
    """
    if pattern.m != 4 or pattern.n > 2:
        raise ValueError(
            f"{pattern} has no compressed form: that holds two values and their 2-bit places for "
            f"every 4 channels, so 2:4 and 1:4 fit, while 4:8 may keep all four values of 8 "
            f"channels in one group of 4. Keep the masked dense model (format 'hf') for {pattern}."
        )


def choose_forms(
    model: nnx.Module,
    paths: Iterable[str],
    *,
    rows: tuple[int, int],
    table: TuningTable | None = None,
) -> dict[str, FormChoice]:
    """Whether each of the layers is faster 2:4 or dense on this machine's GPU, and by how much.

    What `sparsify_model` does with the same `rows`, to look at before. A layer is judged as a
    product of its own, by the times of its shape and dtype: the geometric means over the measured
    numbers of rows that serve the range (`choose_form`). One that was not measured is sparse.

    Args:
        model: A pruned model.
        paths: Of its layers.
        rows: The smallest and the largest number of tokens that are multiplied at once, such as
            (1, 16) for decoding up to 16 sequences.
        table: None is the one in use here, see `use_table`.

    Raises:
        KeyError: A path at which the model has no linear layer.
    """
    forms = {}
    for path in paths:
        linear = get_linear(model, path)
        plain = linear.linear if isinstance(linear, MaskedLinear | ObservedLinear) else linear
        dtype = plain.dtype or weight_of(linear).dtype
        shape = (plain.out_features, plain.in_features)
        forms[path] = choose_form(shape, dtype, rows, table)
    return forms


def sparsify_model(
    model: ModuleT,
    permutations: Mapping[str, Int[Array, " channel"] | Int[np.ndarray, " channel"] | None],
    *,
    pattern: NMPattern = TWO_OF_FOUR,
    skip: Collection[str] = (),
    rows: tuple[int, int] | None = None,
    table: TuningTable | None = None,
) -> ModuleT:
    """A new model whose pruned layers hold compressed weights; the given one stays dense.

    A pruned model keeps its channels in the natural order, and a layer is N:M in the order of its
    permutation. So it is `weight[:, permutation]` that is compressed, and the new layer reads its
    input in that order.

    Args:
        model: A pruned model, dense with zeros.
        permutations: The pruned layers by path, with the channel order in which each is N:M; None
            for the natural order. Layers that are not named stay dense.
        pattern: What the model was pruned to; 2:4 and 1:4 have a compressed form.
        skip: Layers to leave dense, see `matches_path`.
        rows: The smallest and the largest number of tokens that the model will multiply at once.
            Where given, layers that were measured to be faster dense over that range stay dense, as
            they are; one line is logged for each kind of them. `choose_forms` says which, and with
            what times. None compresses all.
        table: What was measured; None is the table in use here, see `use_table`.

    Raises:
        ValueError: Another pattern, or layers whose weights do not follow it in the order given;
            all of them are named. Or `rows` is no range.
        KeyError: A path at which the model has no linear layer.
        TypeError: `permutations` is no mapping, or a layer is compressed already.

    Source: E-Sparse, section 4.
    """
    require_compressible(pattern)
    if not isinstance(permutations, Mapping):
        raise TypeError(
            f"permutations maps the path of each pruned layer to its channel order, or to None for "
            f"the natural one, as prune_model returns them; got {type(permutations).__name__}."
        )
    meant = [path for path in permutations if not matches_path(path, skip)]
    if not meant:
        _LOGGER.warning(
            "No layer is compressed: permutations names %s. It names each pruned layer, as "
            "prune_model's report does, with None for the natural order.",
            "skipped layers alone" if permutations else "none",
        )
    for path in meant:
        if isinstance(get_linear(model, path), SparseLinear):
            raise TypeError(f"{path} is compressed already; start from the dense pruned model.")
    if rows is not None:
        forms = choose_forms(model, meant, rows=rows, table=table)
        _log_dense({path: choice for path, choice in forms.items() if choice.form == "dense"})
        meant = [path for path in meant if forms[path].form == "sparse"]
    replacements, wrong = {}, []
    for path in meant:
        permutation = permutations[path]
        linear = get_linear(model, path)
        weight = weight_of(linear)
        if permutation is not None:
            permutation = np.asarray(permutation)
            if not np.array_equal(np.sort(permutation), np.arange(weight.shape[1])):
                raise ValueError(
                    f"The permutation for {path} must hold each of 0..{weight.shape[1] - 1} once, "
                    f"the layer's {weight.shape[1]} input channels; got shape {permutation.shape}."
                )
            permutation = jnp.asarray(permutation, jnp.int32)
            weight = weight[:, permutation]
        try:
            compressed = compress24(weight)
        except ValueError as error:
            wrong.append((path, str(error)))
            continue
        plain = linear.linear if isinstance(linear, MaskedLinear) else linear
        bias = None if plain.bias is None else plain.bias[...]
        replacements[path] = SparseLinear(compressed, permutation, bias, dtype=plain.dtype)
    if wrong:
        others = [path for path, _ in wrong[1:]]
        listed = f" The others: {', '.join(others)}." if others else ""
        raise ValueError(
            f"{len(wrong)} of {len(permutations)} layers cannot be compressed to {pattern}; give "
            f"the permutation that each was pruned with, or leave them dense with skip=.\n"
            f"{': '.join(wrong[0])}{listed}"
        )
    return replace_linears(model, replacements)


def _log_dense(forms: Mapping[str, FormChoice]) -> None:
    """One line for all layers that stay dense for the same reason."""
    for reason in dict.fromkeys(choice.reason for choice in forms.values()):
        paths = [path for path, choice in forms.items() if choice.reason == reason]
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        _LOGGER.warning("%s%s stay%s dense: %s.", paths[0], others, "" if others else "s", reason)


def _parent(module: nnx.Module, path: str) -> tuple[Any, Any]:
    """The module that holds the layer at a path, and its name or index there."""
    *parents, name = path.split(".")
    node: Any = module
    for part in parents:
        node = _child(node, part)
    if not isinstance(_child(node, name), LINEARS):
        known = [known for known, _ in iter_linears(module)]
        raise KeyError(
            f"{type(module).__name__} has no linear layer at {path!r}. It has: {', '.join(known)}."
        )
    return (node, int(name)) if isinstance(node, nnx.List) else (node, name)


def _child(node: Any, name: str) -> Any:
    if isinstance(node, nnx.List):
        inside = name.isdecimal() and int(name) < len(node)
        return node[int(name)] if inside else None
    return getattr(node, name, None)
