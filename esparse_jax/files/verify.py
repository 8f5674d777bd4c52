"""Whether a checkpoint is N:M, group by group, and still what was written."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from esparse_jax.files.checkpoint import (
    PERMUTATIONS_FILE,
    is_permutation,
    read_config,
    read_esparse,
    read_permutations,
)
from esparse_jax.files.tensors import TensorFiles, file_sha256, nonzero
from esparse_jax.models.llama import LAYERS_PATH, PRUNED_GROUPS
from esparse_jax.pruning.mask import NMPattern

_ROWS = 1024  # rows of a weight looked at together


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
            layer that is not there.
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
            lines.append(f"{unnamed} more violations are not named")
        if self.ok:
            lines.append(f"ok: {checked}, all {self.pattern}")
        elif self.violation_count:
            lines.append(f"FAILED: {self.violation_count} of {checked} are not {self.pattern}")
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
    problems: list[str] = []
    permutations = _permutations(path, recorded, problems)
    layers = _listed_layers(path, recorded, permutations)
    if not layers:
        problems.append("no layer is listed as pruned, so there is nothing to check")
    for layer in sorted(set(permutations) - set(layers)):
        problems.append(f"{layer}: has a permutation but is not listed as pruned")
    violations: list[Violation] = []
    count = groups = checked = 0
    with TensorFiles(path) as files:
        for layer in layers:
            name = f"{layer}.weight"
            if name not in files.names:
                problems.append(f"{layer}: the checkpoint has no tensor {name}")
                continue
            _, channels = files.shape(name)
            if channels % pattern.m:
                problems.append(f"{layer}: {channels} channels are no multiple of {pattern.m}")
                continue
            order = permutations.get(layer, np.arange(channels))
            if not is_permutation(order, channels):
                problems.append(
                    f"{layer}: its permutation does not hold each of 0..{channels - 1} once, so "
                    f"its groups are not known"
                )
                continue
            found, total = _check_layer(
                layer, files.read(name), order, pattern, max_violations - len(violations)
            )
            violations += found
            count += total
            checked += 1
            groups += files.shape(name)[0] * channels // pattern.m
    return VerifyResult(
        pattern=str(pattern),
        layers=checked,
        groups=groups,
        violations=tuple(violations),
        violation_count=count,
        problems=tuple(problems),
        changed_files=_changed_files(path, recorded),
    )


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


def _listed_layers(
    path: Path, recorded: dict[str, Any] | None, permutations: dict[str, Any]
) -> list[str]:
    if recorded is not None and "layers" in recorded:
        return list(recorded["layers"])
    if permutations:
        return list(permutations)
    blocks = read_config(path)[1].num_hidden_layers
    return [
        f"{LAYERS_PATH}.{block}.{linear}"
        for block in range(blocks)
        for group in PRUNED_GROUPS
        for linear in group
    ]


def _check_layer(
    layer: str,
    weight: Shaped[np.ndarray, "out channel"],
    order: Int[np.ndarray, " channel"],
    pattern: NMPattern,
    wanted: int,
) -> tuple[list[Violation], int]:
    """The first violations of a layer, and how many it has."""
    violations: list[Violation] = []
    total = 0
    for start in range(0, weight.shape[0], _ROWS):
        kept = nonzero(weight[start : start + _ROWS])[:, order]
        counts = kept.reshape(len(kept), -1, pattern.m).sum(axis=2)
        places = np.argwhere(counts > pattern.n)
        total += len(places)
        for row, group in places[: max(0, wanted - len(violations))]:
            channels = order[group * pattern.m : (group + 1) * pattern.m]
            violations.append(
                Violation(
                    layer=layer,
                    row=int(start + row),
                    group=int(group),
                    count=int(counts[row, group]),
                    channels=tuple(map(int, channels)),
                    pattern=str(pattern),
                )
            )
    return violations, total


def _changed_files(path: Path, recorded: dict[str, Any] | None) -> tuple[str, ...]:
    written = {} if recorded is None else recorded.get("sha256", {}).get("written", {})
    return tuple(
        name
        for name, digest in sorted(written.items())
        if not (path / name).is_file() or file_sha256(path / name) != digest
    )
