"""A checkpoint directory as a whole: what is in it, what was done to it, how one is written.

A pruned checkpoint holds two files more than an ordinary one:

    esparse.json                        what was done
        format_version                  1
        esparse_jax                     version of the package that wrote it
        format                          "hf": the tensors that other tools read, with zeros in
                                        place (also where the field is missing); "compressed":
                                        those of `files.compressed`
        pattern                         "2:4"
        permutations                    where the orders of the layers are: name of the other file,
                                        or "<layer>.permutation" (compressed); null if all orders
                                        are natural
        layers                          {path: record} or [path]: the linears that were pruned
        ...                             method, options, seed, calibration: whatever was given
        sha256                          {"written": {file: digest}, "source": {file: digest}}; the
                                        source is the checkpoint that was pruned
    esparse_permutations.safetensors    `<path>.permutation`, int32 [channel]: the new order of
                                        the input channels, in which the layer is N:M; hf only
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from esparse_jax import atomic
from esparse_jax.files.tensors import TensorFiles, read_tensors, write_tensors
from esparse_jax.models.llama import LAYERS_PATH, PRUNED_GROUPS, LlamaConfig

CONFIG_FILE = "config.json"
ESPARSE_FILE = "esparse.json"
PERMUTATIONS_FILE = "esparse_permutations.safetensors"

# The version of `esparse.json` and of what it describes.
FORMAT_VERSION = 1

Format = Literal["hf", "compressed"]
FORMATS = ("hf", "compressed")

# What a layer's order is called, behind its path: in the permutations file, or beside its values.
PERMUTATION_SUFFIX = ".permutation"

# What `esparse.json` says of the orders where they lie beside the values.
PERMUTATIONS_IN_TENSORS = f"<layer>{PERMUTATION_SUFFIX}"

# The fields of `esparse.json` that belong to the directory, not to the pruning.
_OWN_FIELDS = ("format_version", "esparse_jax", "format", "permutations", "sha256")

# Files that go with the weights whoever prunes them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CARRIED_FILES = (CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES)
_CARRIED_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")

PathLike = str | os.PathLike[str]


def check_output(
    directory: PathLike, *, like: PathLike | None = None, overwrite: bool = False
) -> None:
    """Whether a checkpoint may be written to a directory; ask before hours of work, not after.

    Raises:
        FileExistsError: It holds something, and `overwrite` is not set or that is no checkpoint.
        NotADirectoryError: A file has that name, or that of a folder it would lie in.
        OSError: Nothing can be made there.
        ValueError: It is the source checkpoint, or the source lies inside it.
    """
    directory = Path(directory).resolve()
    if like is not None:
        source = Path(like).resolve()
        if directory == source or directory in source.parents:
            raise ValueError(
                f"The output {directory} is the input checkpoint or holds it ({source}). Name "
                f"another directory: the input is left as it is."
            )
    if directory.parent != directory:
        atomic.check_place(directory)  # what is written lies beside it at first
    if not directory.exists():
        return
    if not directory.is_dir():
        raise NotADirectoryError(f"The output {directory} is a file. Name a directory.")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"The output directory {directory} is not empty. Name another one, or replace the "
            f"checkpoint in it with overwrite=True (--overwrite)."
        )
    if not (directory / CONFIG_FILE).is_file():
        raise FileExistsError(
            f"The output directory {directory} is not empty and holds no checkpoint (no "
            f"{CONFIG_FILE}), so it is not overwritten. Name another directory."
        )


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new directory beside the given one that takes its place when the block ends well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    name = f".{directory.name}.{uuid.uuid4().hex}"
    beside, aside = directory.with_name(f"{name}.new"), directory.with_name(f"{name}.old")
    beside.mkdir()
    try:
        yield beside
        earlier = directory.is_dir() and any(directory.iterdir())
        if earlier:
            _keep_others(directory, beside)
            directory.rename(aside)
        try:
            beside.rename(directory)
        except BaseException:
            if earlier:
                aside.rename(directory)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def carry_files(source: Path, directory: Path) -> None:
    """Copies what goes with the weights whoever prunes them: configuration, tokenizer, licences."""
    for file in sorted(source.iterdir()):
        carried = file.name in _CARRIED_FILES or file.name.startswith(_CARRIED_PREFIXES)
        if carried and file.is_file():
            shutil.copyfile(file, directory / file.name)


def _keep_others(earlier: Path, beside: Path) -> None:
    """Copies what is no part of a checkpoint from an earlier directory into its successor."""
    for entry in earlier.iterdir():
        weights = ".safetensors" in entry.name
        ours = weights or entry.name in (*_CARRIED_FILES, ESPARSE_FILE)
        if ours or (beside / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, beside / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, beside / entry.name, follow_symlinks=False)


def require_directory(path: PathLike) -> Path:
    """The path, if there is a directory.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(path)
    if not path.is_dir():
        there = f"{path} is a file" if path.is_file() else f"There is no directory {path}"
        raise FileNotFoundError(
            f"{there}. Give the checkpoint directory: the one with "
            f"{CONFIG_FILE} and the safetensors files."
        )
    return path


def read_config(path: Path) -> tuple[dict[str, Any], LlamaConfig]:
    """The fields of a directory's `config.json`, and the configuration that they give."""
    fields = config_fields(path)
    try:
        return fields, LlamaConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error


def config_fields(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no {CONFIG_FILE}. Give the checkpoint directory: the one with "
            f"{CONFIG_FILE} and the safetensors files."
        )
    return _read_json(file)


def read_esparse(path: PathLike) -> dict[str, Any] | None:
    """What `esparse.json` says; None for a checkpoint that was not pruned by this package.

    Raises:
        ValueError: The file is broken, or of a later format.
    """
    path = require_directory(path)
    file = path / ESPARSE_FILE
    if not file.is_file():
        return None
    fields = _read_json(file)
    version = fields.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}; this version reads 1 to {FORMAT_VERSION}. "
            f"Install a newer esparse_jax."
        )
    if fields.get("format", "hf") not in FORMATS:
        raise ValueError(
            f"{file} has format {fields['format']!r}; this version reads {', '.join(FORMATS)}. "
            f"Install a newer esparse_jax."
        )
    return fields


def format_of(recorded: Mapping[str, Any] | None) -> Format:
    """The format that `esparse.json` names; without the file or the field it is hf."""
    return "hf" if recorded is None else recorded.get("format", "hf")


def read_permutations(path: PathLike) -> dict[str, np.ndarray]:
    """The channel order in which each pruned layer is N:M, by path; empty where none is stored.

    The arrays are as they stand in the file; `verify_checkpoint` says whether they are
    permutations.
    """
    path = require_directory(path)
    if format_of(read_esparse(path)) == "compressed":
        with TensorFiles(path) as files:
            names = sorted(name for name in files.names if name.endswith(PERMUTATION_SUFFIX))
            stored = {name: files.read(name) for name in names}
    elif (path / PERMUTATIONS_FILE).is_file():
        stored = read_tensors(path / PERMUTATIONS_FILE)
    else:
        return {}
    return {name.removesuffix(PERMUTATION_SUFFIX): values for name, values in stored.items()}


def listed_layers(
    recorded: Mapping[str, Any] | None,
    permutations: Mapping[str, Any],
    config: Callable[[], LlamaConfig],
) -> list[str]:
    """The linears that were pruned, by path: those listed, or with an order, or all of them.

    The configuration is asked for in the last case only.
    """
    if recorded is not None and recorded.get("layers") is not None:
        return list(recorded["layers"])
    if permutations:
        return list(permutations)
    return [
        f"{LAYERS_PATH}.{block}.{linear}"
        for block in range(config().num_hidden_layers)
        for group in PRUNED_GROUPS
        for linear in group
    ]


def write_permutations(directory: Path, permutations: Mapping[str, Any]) -> dict[str, str]:
    """Writes the orders of the layers to their file; gives its sha256, by its name."""
    arrays = {
        f"{path}{PERMUTATION_SUFFIX}": np.asarray(permutation, np.int32)
        for path, permutation in permutations.items()
    }
    layout = {name: ("I32", array.shape) for name, array in arrays.items()}
    file = directory / PERMUTATIONS_FILE
    return {PERMUTATIONS_FILE: write_tensors(file, layout, arrays.__getitem__)}


def write_esparse(
    directory: Path,
    format: Format,
    metadata: Mapping[str, Any],
    *,
    permutations: str | None,
    written: Mapping[str, str],
    source: Mapping[str, str],
) -> None:
    """Writes `esparse.json`, see the head of this file.

    Args:
        directory: Where to write.
        format: Of the tensors beside it.
        metadata: What was done; fields that belong to the directory are not taken from it.
        permutations: Where the orders of the layers are.
        written: sha256 of the files of tensors.
        source: Those of the checkpoint that was pruned.
    """
    fields = {
        "format_version": FORMAT_VERSION,
        "esparse_jax": package_version(),
        "format": format,
        "permutations": permutations,
        **pruning_metadata(metadata),
        "sha256": {"written": written, "source": source},
    }
    write_json(directory / ESPARSE_FILE, fields)


def pruning_metadata(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What `esparse.json` says of the pruning, whatever the directory it lies in."""
    return {name: value for name, value in recorded.items() if name not in _OWN_FIELDS}


def is_permutation(permutation: np.ndarray, channels: int) -> bool:
    """Whether it holds each channel once."""
    return permutation.shape == (channels,) and np.array_equal(
        np.sort(permutation), np.arange(channels)
    )


def write_json(path: PathLike, values: Mapping[str, Any]) -> None:
    """Writes values as JSON, in one go at the end: numbers of numpy and JAX, paths, dataclasses.

    JSON has no infinity and no NaN; both become null.
    """
    atomic.write_text(path, json.dumps(_plain_values(values), indent=2, allow_nan=False) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold one JSON object; it holds a {type(fields).__name__}.")
    return fields


def _plain_values(value: Any) -> Any:
    """Lists, dicts, strings and numbers for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_values(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain_values(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def package_version() -> str:
    """The installed version of this package; "unknown" when it runs without being installed."""
    try:
        return package_metadata.version("esparse-jax")
    except package_metadata.PackageNotFoundError:
        return "unknown"
