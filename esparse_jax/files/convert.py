"""A pruned checkpoint from the hf format to the compressed one, and back, without a model.

Both ways pass one tensor at a time through the host and need neither a device nor the calibration:
what `esparse.json` says goes with the weights, and what is expanded is what was compressed, byte
for byte.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esparse_jax.files.checkpoint import abstract_model, check_tensors, compressed_layers
from esparse_jax.files.compressed import (
    WEIGHT_SUFFIX,
    CompressedForm,
    DenseForm,
    permutation_error,
)
from esparse_jax.files.directory import (
    ESPARSE_FILE,
    PERMUTATIONS_FILE,
    PERMUTATIONS_IN_TENSORS,
    PathLike,
    carry_files,
    check_output,
    format_of,
    listed_layers,
    read_config,
    read_esparse,
    read_permutations,
    replacing,
    require_directory,
    write_esparse,
    write_permutations,
)
from esparse_jax.files.tensors import TensorFiles, Tensors, byte_size, write_shards
from esparse_jax.models.llama import LlamaForCausalLM
from esparse_jax.models.surgery import iter_linears, require_compressible
from esparse_jax.pruning.mask import NMPattern
from esparse_jax.sparse.compress import GROUP


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `compress_checkpoint` or `expand_checkpoint` did.

    Attributes:
        layers: Linears that changed their format.
        source_bytes: All tensors before.
        written_bytes: All tensors after.
        positive_zeros: -0.0 that became +0.0 for want of a place in their groups. A checkpoint
            pruned by this package has none; expanded again, it is the same in every byte.
    """

    layers: int
    source_bytes: int
    written_bytes: int
    positive_zeros: int


def compress_checkpoint(
    path: PathLike,
    output: PathLike,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes a pruned hf checkpoint in the compressed format; nothing is pruned again.

    The layers and the order of their channels are those of `esparse.json`. As with `save_model`,
    the output takes its place when it is whole.

    Args:
        path: A directory that `esparse prune` or `save_model` wrote.
        output: The directory to write.
        overwrite: Take the place of an earlier checkpoint. Other files in that directory stay.
        progress: Called with (tensors done, tensors in all).

    Raises:
        FileExistsError: The output directory is not empty.
        FileNotFoundError: The directory or a file of it is missing.
        ValueError: No `esparse.json`, another pattern than 2:4 and 1:4, a directory that is
            compressed already, tensors that do not fit `config.json`, permutations that are none,
            or a layer that is not 2:4 in its order.

    Source: E-Sparse, section 4.
    """
    path, recorded = _recorded(path)
    check_output(output, like=path, overwrite=overwrite)
    if format_of(recorded) == "compressed":
        raise ValueError(f"{path} is in the compressed format already.")
    require_compressible(NMPattern.parse(str(recorded.get("pattern"))))
    config = read_config(path)[1]
    permutations = _permutations(path, recorded)
    layers = listed_layers(recorded, permutations, lambda: config)
    model = abstract_model(config)
    with TensorFiles(path) as files:
        check_tensors(path, files, model)
        form = CompressedForm(files, _orders(path, model, layers, permutations))
        with replacing(Path(output).resolve()) as beside:
            carry_files(path, beside)
            written = write_shards(beside, _Watched(form, progress))
            write_esparse(
                beside,
                "compressed",
                {**recorded, "layers": recorded.get("layers") or layers},
                permutations=PERMUTATIONS_IN_TENSORS if permutations else None,
                written=written,
                source=_source(recorded),
            )
    return Conversion(len(layers), _bytes(files), _bytes(form), form.unplaced)


def expand_checkpoint(
    path: PathLike,
    output: PathLike,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes a compressed checkpoint in the hf format: dense weights with zeros in place.

    The tensors are those of the hf checkpoint that was compressed, byte for byte, and so are the
    permutations beside them.

    Args:
        path: A compressed directory.
        output: The directory to write.
        overwrite: Take the place of an earlier checkpoint. Other files in that directory stay.
        progress: Called with (tensors done, tensors in all).

    Raises:
        FileExistsError: The output directory is not empty.
        FileNotFoundError: The directory or a file of it is missing.
        ValueError: A directory that is not compressed, tensors that do not fit `config.json`, or
            indices and permutations that are not valid, named by layer.
    """
    path, recorded = _recorded(path)
    check_output(output, like=path, overwrite=overwrite)
    if format_of(recorded) == "hf":
        raise ValueError(f"{path} is in the hf format already; there is nothing to expand.")
    layers = compressed_layers(path)
    model = abstract_model(read_config(path)[1])
    with TensorFiles(path) as files:
        check_tensors(path, files, model, layers)
        form = DenseForm(files, layers)
        orders = {layer: form.order(layer) for layer in layers}
        known = recorded.get("permutations") or any(order is not None for order in orders.values())
        with replacing(Path(output).resolve()) as beside:
            carry_files(path, beside)
            written = write_shards(beside, _Watched(form, progress))
            if known:
                written |= write_permutations(beside, _all_orders(form, orders))
            write_esparse(
                beside,
                "hf",
                recorded,
                permutations=PERMUTATIONS_FILE if known else None,
                written=written,
                source=_source(recorded),
            )
    return Conversion(len(layers), _bytes(files), _bytes(form), 0)


class _Watched:
    """Tensors that report how many of them were read."""

    def __init__(self, tensors: Tensors, progress: Callable[[int, int], None] | None):
        self._tensors, self._progress, self._done = tensors, progress, 0
        self.layout = tensors.layout

    def read(self, name: str) -> np.ndarray:
        values = self._tensors.read(name)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self.layout))
        return values


def _recorded(path: PathLike) -> tuple[Path, dict[str, Any]]:
    """The directory, and what was done to it."""
    path = require_directory(path)
    recorded = read_esparse(path)
    if recorded is None:
        raise ValueError(
            f"{path} has no {ESPARSE_FILE}, which says what layers were pruned and in what order. "
            f"Prune a model that is not pruned yet, which writes it: `esparse prune {path} "
            f"--output DIR --calibration TEXT`. One pruned by something else is written by "
            f"save_model(load_model(path)[0], output, like=path, format='compressed', "
            f"metadata={{'pattern': '2:4'}})."
        )
    return path, recorded


def _permutations(path: Path, recorded: dict[str, Any]) -> dict[str, np.ndarray]:
    if recorded.get("permutations") is None:
        return {}
    if not (path / PERMUTATIONS_FILE).is_file():
        raise FileNotFoundError(
            f"{path} lacks {PERMUTATIONS_FILE}, where {ESPARSE_FILE} says the order of each "
            f"layer's channels is. Download it again."
        )
    return read_permutations(path)


def _orders(
    path: Path, model: LlamaForCausalLM, layers: list[str], permutations: dict[str, np.ndarray]
) -> dict[str, np.ndarray | None]:
    """In which order each layer is to be compressed, all of them checked."""
    linears = dict(iter_linears(model))
    orders, wrong = {}, []
    for layer in sorted(set(permutations) - set(layers)):
        wrong.append(f"{layer}: has a permutation but is not listed as pruned")
    for layer in layers:
        if layer not in linears:
            wrong.append(f"{layer}: the model has no such linear layer")
            continue
        channels = linears[layer].in_features
        if channels % GROUP:
            wrong.append(f"{layer}: {channels} channels are no multiple of {GROUP}")
        order = permutations.get(layer)
        if order is not None and (problem := permutation_error(order, channels)):
            wrong.append(f"{layer}: {problem}")
        orders[layer] = order
    if wrong:
        raise ValueError(
            f"What {ESPARSE_FILE} and {PERMUTATIONS_FILE} of {path} say does not fit its layers:\n"
            + "\n".join(wrong)
        )
    return orders


def _all_orders(form: DenseForm, orders: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """The orders with the natural ones written out, as the hf format has them."""
    channels = {layer: form.layout[layer + WEIGHT_SUFFIX][1][1] for layer in orders}
    return {
        layer: np.arange(channels[layer]) if order is None else order
        for layer, order in orders.items()
    }


def _source(recorded: dict[str, Any]) -> dict[str, str]:
    """The hashes of the checkpoint that was pruned, handed on."""
    return recorded.get("sha256", {}).get("source", {})


def _bytes(tensors: Tensors) -> int:
    return sum(byte_size(*entry) for entry in tensors.layout.values())
