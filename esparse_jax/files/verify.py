"""Whether a checkpoint is N:M, group by group, and still what was written."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from esparse_jax.files.checkpoint import abstract_model, compressed_layers, tensor_problems
from esparse_jax.files.compressed import (
    INDICES_SUFFIX,
    VALUES_SUFFIX,
    index_error,
    kept_places,
    permutation_error,
)
from esparse_jax.files.directory import (
    PERMUTATION_SUFFIX,
    PERMUTATIONS_FILE,
    format_of,
    listed_layers,
    read_config,
    read_esparse,
    read_permutations,
)
from esparse_jax.files.tensors import TensorFiles, file_sha256, nonzero, row_slices
from esparse_jax.pruning.mask import NMPattern


@dataclasses.dataclass(frozen=True)
class Violation:
    """A group with more non-zeros than the pattern allows.

    Attributes:
        layer: The linear's checkpoint path.
        row: Output feature.
        group: Number of the group in that row, in the order of the layer's permutation.
        count: Its non-zeros.
        channels: Its input channels in the natural order of the file.
        pattern: What it should be.
    """

    layer: str
    row: int
    group: int
    count: int
    channels: tuple[int, ...]
    pattern: str

    def __str__(self) -> str:
        allowed = self.pattern.split(":")[0]
        channels = ", ".join(map(str, self.channels))
        return (
            f"{self.layer}: row {self.row}, group {self.group} (channels {channels}) has "
            f"{self.count} non-zeros, {self.pattern} allows {allowed}"
        )


@dataclasses.dataclass(frozen=True)
class VerifyResult:
    """What `verify_checkpoint` found.

    Attributes:
        pattern: What the layers were checked for.
        layers: Checked layers.
        groups: Groups in them.
        violations: The first groups that are wrong, layer by layer.
        violation_count: How many there are in all.
        problems: What makes the record of the pruning useless: a permutation that is none, a
            layer that is not there. Of a compressed checkpoint also tensors that do not fit its
            configuration, and indices that are not valid.
        changed_files: Files that differ from those that `esparse.json` was written with.
    """

    pattern: str
    layers: int
    groups: int
    violations: tuple[Violation, ...]
    violation_count: int
    problems: tuple[str, ...]
    changed_files: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Every group follows the pattern, and every file is the one that was written."""
        return not (self.violation_count or self.problems or self.changed_files)

    def summary(self) -> str:
        """A few lines for a person; the violations themselves are not repeated."""
        checked = f"{self.layers} layers, {self.groups} groups"
        lines = [f"problem: {problem}" for problem in self.problems]
        lines += [
            f"changed: {name} is not the file that esparse.json was written with (sha256)"
            for name in self.changed_files
        ]
        unnamed = self.violation_count - len(self.violations)
        if unnamed:
            lines.append(f"{unnamed} more groups are not {self.pattern} and not named here")
        if self.ok:
            lines.append(f"ok: {checked}, all {self.pattern}")
        elif self.violation_count:
            lines.append(
                f"FAILED: {self.violation_count} of {self.groups} groups in {self.layers} layers "
                f"are not {self.pattern}"
            )
        else:
            lines.append(f"FAILED: {checked} are {self.pattern}, but see above")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def verify_checkpoint(
    path: str | os.PathLike[str],
    pattern: NMPattern | None = None,
    *,
    max_violations: int = 1000,
) -> VerifyResult:
    """Checks every pruned layer of a checkpoint, group by group.

    Where the directory has an `esparse.json`, the layers that it lists are checked, each in the
    order of its permutation, and the files of weights are compared with the hashes in it.
    Elsewhere all decoder linears are, in their natural order. One tensor is in memory at a time.

    In a compressed checkpoint names, shapes and dtypes of all tensors and the indices of every
    group are checked as well.

    Args:
        path: The checkpoint directory.
        pattern: What to check for; None for the one in `esparse.json`.
        max_violations: How many are named; all are counted.

    Raises:
        FileNotFoundError: The directory or a file of it is missing.
        ValueError: No pattern given and none recorded, or files that cannot be read.
    """
    path = Path(path)
    recorded = read_esparse(path)
    if pattern is None:
        if recorded is None:
            raise ValueError(
                f"{path} has no esparse.json to take the pattern from. Give one, for example "
                f"NMPattern(2, 4) (--pattern 2:4)."
            )
        pattern = NMPattern.parse(str(recorded.get("pattern")))
    check = _check_compressed if format_of(recorded) == "compressed" else _check_hf
    found = check(path, recorded, pattern, max_violations)
    return VerifyResult(
        pattern=str(pattern),
        layers=found.layers,
        groups=found.groups,
        violations=tuple(found.violations),
        violation_count=found.violation_count,
        problems=tuple(found.problems),
        changed_files=_changed_files(path, recorded),
    )


@dataclasses.dataclass
class _Found:
    """What the layers looked at so far gave."""

    pattern: NMPattern
    wanted: int  # violations to name
    layers: int = 0
    groups: int = 0
    violations: list[Violation] = dataclasses.field(default_factory=list)
    violation_count: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    def look(
        self,
        layer: str,
        parts: Iterator[Bool[np.ndarray, "row channel"]],
        order: Int[np.ndarray, " channel"],
    ) -> None:
        """Counts a layer's groups.

        Args:
            layer: Its path.
            parts: Some rows after the others: which weights are not zero, in that order.
            order: Of its channels.
        """
        pattern, start = self.pattern, 0
        for kept in parts:
            counts = kept.reshape(len(kept), -1, pattern.m).sum(axis=2)
            places = np.argwhere(counts > pattern.n)
            self.violation_count += len(places)
            self.groups += counts.size
            for row, group in places[: max(0, self.wanted - len(self.violations))]:
                channels = order[group * pattern.m : (group + 1) * pattern.m]
                violation = Violation(
                    layer=layer,
                    row=int(start + row),
                    group=int(group),
                    count=int(counts[row, group]),
                    channels=tuple(map(int, channels)),
                    pattern=str(pattern),
                )
                self.violations.append(violation)
            start += len(kept)
        self.layers += 1


def _check_hf(
    path: Path, recorded: dict[str, Any] | None, pattern: NMPattern, wanted: int
) -> _Found:
    found = _Found(pattern, wanted)
    permutations = _permutations(path, recorded, found.problems)
    layers = listed_layers(recorded, permutations, lambda: read_config(path)[1])
    if not layers:
        found.problems.append("no layer is listed as pruned, so there is nothing to check")
    for layer in sorted(set(permutations) - set(layers)):
        found.problems.append(f"{layer}: has a permutation but is not listed as pruned")
    with TensorFiles(path) as files:
        for layer in layers:
            name = f"{layer}.weight"
            if name not in files.names:
                found.problems.append(f"{layer}: the checkpoint has no tensor {name}")
                continue
            _, channels = files.shape(name)
            if channels % pattern.m:
                found.problems.append(
                    f"{layer}: {channels} channels are no multiple of {pattern.m}"
                )
                continue
            order = permutations.get(layer, np.arange(channels))
            if problem := permutation_error(order, channels):
                found.problems.append(f"{layer}: {problem}, so its groups are not known")
                continue
            weight = files.read(name)
            parts = (nonzero(weight[rows])[:, order] for rows in row_slices(len(weight)))
            found.look(layer, parts, order)
    return found


def _check_compressed(
    path: Path, recorded: dict[str, Any], pattern: NMPattern, wanted: int
) -> _Found:
    found = _Found(pattern, wanted)
    layers = compressed_layers(path)
    if not layers:
        found.problems.append("no layer is listed as pruned, so there is nothing to check")
    with TensorFiles(path) as files:
        wrong = tensor_problems(files, abstract_model(read_config(path)[1]), layers)
        found.problems += [line for _, line in wrong]
        spoiled = {name for name, _ in wrong}
        for layer in layers:
            parts = (VALUES_SUFFIX, INDICES_SUFFIX, PERMUTATION_SUFFIX)
            if spoiled & {layer, *(layer + part for part in parts)}:
                continue
            channels = 2 * files.shape(layer + VALUES_SUFFIX)[1]
            if channels % pattern.m:
                found.problems.append(
                    f"{layer}: {channels} channels are no multiple of {pattern.m}"
                )
                continue
            shuffled = layer + PERMUTATION_SUFFIX in files.names
            order = files.read(layer + PERMUTATION_SUFFIX) if shuffled else np.arange(channels)
            indices = files.read(layer + INDICES_SUFFIX)
            problem = index_error(indices, channels)
            if problem := problem or permutation_error(order, channels):
                found.problems.append(f"{layer}: {problem}, so its groups are not known")
                continue
            values = files.read(layer + VALUES_SUFFIX)
            found.look(layer, _unpacked(values, indices), order)
    return found


def _unpacked(
    values: Shaped[np.ndarray, "out kept"], indices: UInt8[np.ndarray, "out byte"]
) -> Iterator[Bool[np.ndarray, "row channel"]]:
    """Which weights of a compressed layer are not zero, some rows after the others."""
    for rows in row_slices(len(values)):
        kept = kept_places(indices[rows], 2 * values.shape[1])
        kept[kept] = nonzero(values[rows]).reshape(-1)
        yield kept


def _permutations(
    path: Path, recorded: dict[str, Any] | None, problems: list[str]
) -> dict[str, Int[np.ndarray, "..."]]:
    """The stored permutations; what is wrong with their file goes to the problems."""
    if recorded is None or recorded.get("permutations") is None:
        return {}
    if not (path / PERMUTATIONS_FILE).is_file():
        problems.append(f"{PERMUTATIONS_FILE} is missing; layers are checked in natural order")
        return {}
    try:
        return read_permutations(path)
    except ValueError as error:
        problems.append(f"{error} Layers are checked in natural order")
        return {}


def _changed_files(path: Path, recorded: dict[str, Any] | None) -> tuple[str, ...]:
    written = {} if recorded is None else recorded.get("sha256", {}).get("written", {})
    return tuple(
        name
        for name, digest in sorted(written.items())
        if not (path / name).is_file() or file_sha256(path / name) != digest
    )
