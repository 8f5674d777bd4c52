"""Hugging Face checkpoint directories <-> models: safetensors, configuration, tokenizer.

A pruned checkpoint is an ordinary one with zeros in place, and two files more:

    esparse.json                        what was done
        format_version                  1
        esparse_jax                     version of the package that wrote it
        pattern                         "2:4"
        permutations                    name of the other file; null if all orders are natural
        layers                          {path: record} or [path]: the linears that were pruned
        ...                             method, options, seed, calibration: whatever was given
        sha256                          {"written": {file: digest}, "source": {file: digest}}
    esparse_permutations.safetensors    `<path>.permutation`, int32 [channel]: the new order of
                                        the input channels, in which the layer is N:M
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from esparse_jax.files.tensors import (
    FLOATING_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Layout,
    TensorFiles,
    header_dtype,
    nonfinite_count,
    read_tensors,
    rewrite_tensors,
    write_tensors,
)
from esparse_jax.models.layers import MaskedLinear
from esparse_jax.models.llama import (
    DERIVED_TENSORS,
    DTYPES,
    PARAMETER_NAMES,
    TIED_TENSORS,
    TRANSPOSED,
    LlamaConfig,
    LlamaForCausalLM,
)
from esparse_jax.models.surgery import iter_linears, replace_linears, weight_of, with_weight
from esparse_jax.pruning.mask import NMPattern

CONFIG_FILE = "config.json"
ESPARSE_FILE = "esparse.json"
PERMUTATIONS_FILE = "esparse_permutations.safetensors"

# The version of `esparse.json` and of the file beside it.
FORMAT_VERSION = 1

# What a tensor of the permutations file is called, behind the layer's path.
PERMUTATION_SUFFIX = ".permutation"

# Files that go with the weights whoever prunes them.
_TOKENIZER_FILES = (
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
_CARRIED_FILES = (CONFIG_FILE, "generation_config.json", *_TOKENIZER_FILES)
_CARRIED_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")

_SHARD_BYTES = 5 * 10**9  # transformers' limit for one file

PathLike = str | os.PathLike[str]


def load_model(
    path: PathLike, *, dtype: str | None = None, check_finite: bool = True
) -> tuple[LlamaForCausalLM, Any]:
    """Reads a LLaMA and its tokenizer from a Hugging Face directory.

    The weights are read one tensor at a time into a model without arrays, so no second copy of
    them is ever held.

    Args:
        path: Directory with `config.json` and safetensors, sharded or not.
        dtype: What to hold the parameters and to compute in. None: each parameter as it is stored,
            computing in the dtype that `config.json` names (the embedding's if it names none).
        check_finite: Look for NaN and Inf. The check reads what is read anyway.

    Returns:
        The model; and the tokenizer, None if the directory holds none.

    Raises:
        FileNotFoundError: The directory, its configuration or a weight file is missing.
        ValueError: A configuration that is not supported, a truncated file, names missing or
            unexpected, wrong shapes or dtypes (all of them in one message), or a tokenizer with
            more ids than the model has embeddings.
        FloatingPointError: NaN or Inf among the weights; the tensors are named.
    """
    path = _directory(path)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or None.")
    fields, config = read_config(path)
    tokenizer = load_tokenizer(path)
    _check_tokenizer(path, tokenizer, config)
    with TensorFiles(path) as files:
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
        elif fields.get("dtype") is None and fields.get("torch_dtype") is None:
            config = dataclasses.replace(config, dtype=_embedding_dtype(files, config.dtype))
        model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
        flat = dict(nnx.to_flat_state(nnx.state(model)))
        shapes = {_name(place): _stored_shape(place, leaf) for place, leaf in flat.items()}
        _check_tensors(path, files, shapes)
        broken = []
        for place, variable in flat.items():
            values, found = _read(files, _name(place), dtype, check_finite)
            broken += found
            array = jnp.asarray(values)
            variable.set_value(array.T if place[-1] in TRANSPOSED else array)
    if broken:
        raise FloatingPointError(
            f"{path} has weights that are NaN or Inf; pruning and evaluation would spread them. "
            f"Download the checkpoint again, or load it as it is with check_finite=False.\n"
            + "\n".join(broken)
        )
    nnx.update(model, nnx.from_flat_state(flat.items()))
    return model, tokenizer


def load_tokenizer(path: PathLike) -> Any:
    """The tokenizer of a checkpoint directory, by transformers; None where there is none.

    With a `tokenizer.json` alone, BOS and EOS are those that `config.json` names.

    Raises:
        ValueError: The files are there but cannot be read.
    """
    path = _directory(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    # transformers takes seconds to import, and only text needs it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (path / "tokenizer_config.json").is_file() or not (path / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(
            f"The tokenizer of {path} cannot be read: {error}. Download its files again; a "
            f"tokenizer.model without tokenizer.json also needs the sentencepiece package."
        ) from error
    fields = _config_fields(path) if (path / CONFIG_FILE).is_file() else {}
    for role in ("bos", "eos"):
        number = fields.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        token = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
        if token is not None:
            setattr(tokenizer, f"{role}_token", token)
    return tokenizer


def save_model(
    model: LlamaForCausalLM,
    directory: PathLike,
    *,
    tokenizer: Any = None,
    like: PathLike | None = None,
    metadata: Mapping[str, Any] | None = None,
    permutations: Mapping[str, Int[Array, " channel"] | Int[np.ndarray, " channel"]] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face directory: tensors by checkpoint name, [out, channel].

    Everything is written to a directory beside the target, which takes the target's place at the
    very end; whatever goes wrong before leaves the target as it was.

    With `like`, the directory that the model was loaded from, the output has that checkpoint's
    files, tensor layout, dtypes and tokenizer, and every weight that the model did not change has
    the very bytes it has there, also if the model computes in another dtype. What the model set
    to zero is +0.

    Args:
        model: A dense model; layers that mask their weight are written masked.
        directory: Where to write.
        tokenizer: Written as well; instead of the one beside `like`.
        like: The source directory. Without it: the parameters as they are held, and a
            `config.json` from the model's configuration.
        metadata: What `esparse.json` says of the pruning; `pattern` ("2:4") is required. Beside
            it stand format and package version and the sha256 of all files of weights.
        permutations: Channel order in which each pruned layer is N:M, by path; needs `metadata`.
        overwrite: Take the place of an earlier checkpoint. Other files in that directory stay.

    Raises:
        FileExistsError: The directory is not empty.
        ValueError: It is the source or holds it, `like` is another model's, or permutations that
            do not fit the model.
        TypeError: A compressed or an observed layer.
    """
    directory = Path(directory).resolve()
    check_output(directory, like=like, overwrite=overwrite)
    model = _plain(model)
    parameters = {
        _name(place): (place, variable)
        for place, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    _check_permutations(model, metadata, permutations)

    def tensor(name: str) -> np.ndarray:
        place, variable = parameters[TIED_TENSORS.get(name, name) if tied else name]
        value = variable.get_value()
        return np.asarray(value.T if place[-1] in TRANSPOSED else value)

    tied = model.config.tie_word_embeddings
    with _replacing(directory) as beside:
        if like is None:
            written = _write_new(beside, model, parameters, tensor)
            sources: dict[str, str] = {}
        else:
            written, sources = _write_like(beside, Path(like), model.config, parameters, tensor)
        if tokenizer is not None:
            for name in _TOKENIZER_FILES:
                (beside / name).unlink(missing_ok=True)
            tokenizer.save_pretrained(str(beside))
        if metadata is not None:
            if permutations:
                written[PERMUTATIONS_FILE] = _write_permutations(
                    beside / PERMUTATIONS_FILE, permutations
                )
            esparse = {
                "format_version": FORMAT_VERSION,
                "esparse_jax": package_version(),
                "permutations": PERMUTATIONS_FILE if permutations else None,
                **metadata,
                "sha256": {"written": written, "source": sources},
            }
            write_json(beside / ESPARSE_FILE, esparse)


def check_output(
    directory: PathLike, *, like: PathLike | None = None, overwrite: bool = False
) -> None:
    """Whether `save_model` may write to a directory; ask before hours of work, not after.

    Raises:
        FileExistsError: It holds something, and `overwrite` is not set or that is no checkpoint.
        NotADirectoryError: A file has that name.
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


def read_esparse(path: PathLike) -> dict[str, Any] | None:
    """What `esparse.json` says; None for a checkpoint that was not pruned by this package.

    Raises:
        ValueError: The file is broken, or of a later format.
    """
    path = _directory(path)
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
    return fields


def read_permutations(path: PathLike) -> dict[str, np.ndarray]:
    """The channel order in which each pruned layer is N:M, by path; empty where none is stored.

    The arrays are as they stand in the file; `verify_checkpoint` says whether they are
    permutations.
    """
    file = _directory(path) / PERMUTATIONS_FILE
    if not file.is_file():
        return {}
    stored = read_tensors(file)
    return {name.removesuffix(PERMUTATION_SUFFIX): values for name, values in stored.items()}


def write_json(path: PathLike, values: Mapping[str, Any]) -> None:
    """Writes values as JSON, in one go at the end: numbers of numpy and JAX, paths, dataclasses.

    JSON has no infinity and no NaN; both become null.
    """
    path = Path(path)
    text = json.dumps(_plain_values(values), indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def package_version() -> str:
    """The installed version of this package; "unknown" when it runs without being installed."""
    try:
        return package_metadata.version("esparse-jax")
    except package_metadata.PackageNotFoundError:
        return "unknown"


def _directory(path: PathLike) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no directory {path}. Give the checkpoint directory: the one with "
            f"{CONFIG_FILE} and the safetensors files."
        )
    return path


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold one JSON object; it holds a {type(fields).__name__}.")
    return fields


def read_config(path: Path) -> tuple[dict[str, Any], LlamaConfig]:
    """The fields of a directory's `config.json`, and the configuration that they give."""
    fields = _config_fields(path)
    try:
        return fields, LlamaConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error


def _config_fields(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no {CONFIG_FILE}. Give the checkpoint directory: the one with "
            f"{CONFIG_FILE} and the safetensors files."
        )
    return _read_json(file)


def _check_tokenizer(path: Path, tokenizer: Any, config: LlamaConfig) -> None:
    if tokenizer is None:
        return
    greatest = max(tokenizer.get_vocab().values(), default=-1)
    if greatest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer of {path} has ids up to {greatest}, but the model has embeddings for "
            f"{config.vocab_size} ids (vocab_size) only, so the two do not belong together. Put "
            f"the model's own tokenizer there, or none."
        )


def _name(place: tuple[Any, ...]) -> str:
    """The checkpoint's name of a parameter from its place in the state."""
    return ".".join(map(str, (*place[:-1], PARAMETER_NAMES[place[-1]])))


def _stored_shape(place: tuple[Any, ...], variable: Any) -> tuple[int, ...]:
    shape = tuple(variable.get_value().shape)
    return shape[::-1] if place[-1] in TRANSPOSED else shape


def _embedding_dtype(files: TensorFiles, default: str) -> str:
    name = "model.embed_tokens.weight"
    known = name in files.names and files.dtype(name) in FLOATING_DTYPES
    return str(FLOATING_DTYPES[files.dtype(name)]) if known else default


def _derived(name: str) -> bool:
    return name.endswith(DERIVED_TENSORS)


def _check_tensors(path: Path, files: TensorFiles, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """All disagreements between the files and the model, in one error."""
    extra = {name for name in files.names - set(shapes) if not _derived(name)}
    tied = {name for name in extra if name in TIED_TENSORS}
    wrong = [f"missing: {name} {shapes[name]}" for name in sorted(set(shapes) - files.names)]
    wrong += [f"unexpected: {name} {files.shape(name)}" for name in sorted(extra - tied)]
    for name in sorted(files.names & set(shapes)):
        if files.shape(name) != shapes[name]:
            wrong.append(
                f"wrong shape: {name} is {files.shape(name)}, config.json gives {shapes[name]}"
            )
        if files.dtype(name) not in FLOATING_DTYPES:
            wrong.append(
                f"wrong dtype: {name} is {files.dtype(name)}, it may be "
                f"{', '.join(FLOATING_DTYPES)}"
            )
    wrong += [
        f"not tied: {name} differs from {TIED_TENSORS[name]}, yet config.json has "
        f"tie_word_embeddings true"
        for name in sorted(tied)
        if TIED_TENSORS[name] in files.names
        and not _same_bytes(files.read(name), files.read(TIED_TENSORS[name]))
    ]
    if wrong:
        raise ValueError(
            f"The weights in {path} do not fit its {CONFIG_FILE}; {len(wrong)} disagreements. They "
            f"belong to different models, or a file was not downloaded whole:\n" + "\n".join(wrong)
        )


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def _read(
    files: TensorFiles, name: str, dtype: str | None, check_finite: bool
) -> tuple[np.ndarray, list[str]]:
    """A tensor in the dtype asked for, and what is wrong with its numbers."""
    values = files.read(name)
    if check_finite and (count := nonfinite_count(values)):
        return values, [f"{name}: {count} of {values.size} are NaN or Inf"]
    if dtype is None or values.dtype == jnp.dtype(dtype):
        return values, []
    with np.errstate(over="ignore"):  # counted below
        converted = values.astype(jnp.dtype(dtype))
    if check_finite and (count := nonfinite_count(converted)):
        return values, [
            f"{name}: {count} of {values.size} are too large for {dtype} (stored as {values.dtype})"
        ]
    return converted, []


def _plain(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with plain linears only; masks are applied."""
    masked, wrong = {}, []
    for path, linear in iter_linears(model):
        if isinstance(linear, MaskedLinear):
            masked[path] = with_weight(linear.linear, weight_of(linear))
        elif not isinstance(linear, nnx.Linear):
            wrong.append(f"{path}: {type(linear).__name__}")
    if wrong:
        raise TypeError(
            "save_model writes dense models; these layers are compressed or observed. Save the "
            "pruned model from which the compressed one was made.\n" + "\n".join(wrong)
        )
    return replace_linears(model, masked) if masked else model


def _check_permutations(
    model: LlamaForCausalLM,
    metadata: Mapping[str, Any] | None,
    permutations: Mapping[str, Any] | None,
) -> None:
    if metadata is None:
        if permutations is not None:
            raise ValueError(
                "permutations need metadata: without a pattern in esparse.json nobody can tell "
                "what they are for. Give metadata={'pattern': '2:4', ...}."
            )
        return
    if not isinstance(metadata.get("pattern"), str):
        raise ValueError(
            f"metadata['pattern'] is {metadata.get('pattern')!r}; esparse.json needs the N:M "
            f"pattern as text, for example '2:4'."
        )
    NMPattern.parse(metadata["pattern"])
    linears = dict(iter_linears(model))
    wrong = [
        f"{path}: listed in metadata['layers'], but the model has no such linear layer"
        for path in metadata.get("layers", ())
        if path not in linears
    ]
    for path, permutation in (permutations or {}).items():
        if path not in linears:
            wrong.append(f"{path}: the model has no such linear layer")
        elif not is_permutation(np.asarray(permutation), linears[path].in_features):
            wrong.append(f"{path}: not each of 0..{linears[path].in_features - 1} once")
    if wrong:
        raise ValueError("Layers or permutations that do not fit the model:\n" + "\n".join(wrong))


def is_permutation(permutation: np.ndarray, channels: int) -> bool:
    """Whether it holds each channel once."""
    return permutation.shape == (channels,) and np.array_equal(
        np.sort(permutation), np.arange(channels)
    )


def _write_permutations(file: Path, permutations: Mapping[str, Any]) -> str:
    arrays = {
        f"{path}{PERMUTATION_SUFFIX}": np.asarray(permutation, np.int32)
        for path, permutation in permutations.items()
    }
    layout = {name: ("I32", array.shape) for name, array in arrays.items()}
    return write_tensors(file, layout, arrays.__getitem__)


def _write_new(
    directory: Path,
    model: LlamaForCausalLM,
    parameters: Mapping[str, tuple[tuple[Any, ...], Any]],
    tensor: Callable[[str], np.ndarray],
) -> dict[str, str]:
    """Configuration and weights as the model holds them; gives the sha256 of the files."""
    layout = {}
    for name, (place, variable) in parameters.items():
        dtype = np.dtype(variable.get_value().dtype)
        layout[name] = (header_dtype(dtype), _stored_shape(place, variable))
    stored = str(parameters["model.embed_tokens.weight"][1].get_value().dtype)
    config = dataclasses.replace(model.config, dtype=stored)
    write_json(directory / CONFIG_FILE, config.to_dict())
    shards = _shards(layout)
    if len(shards) == 1:
        return {SINGLE_FILE: write_tensors(directory / SINGLE_FILE, shards[0], tensor)}
    written, weight_map, total = {}, {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        written[file] = write_tensors(directory / file, shard, tensor)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(_byte_size(*entry) for entry in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, index)
    return written


def _byte_size(kind: str, shape: tuple[int, ...]) -> int:
    return FLOATING_DTYPES[kind].itemsize * math.prod(shape)


def _shards(layout: Layout) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """The tensors in files of at most `_SHARD_BYTES` (a larger tensor has its own)."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, entry in layout.items():
        more = _byte_size(*entry)
        if shards[-1] and size + more > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += more
    return shards


def _write_like(
    directory: Path,
    source: Path,
    config: LlamaConfig,
    parameters: Mapping[str, Any],
    tensor: Callable[[str], np.ndarray],
) -> tuple[dict[str, str], dict[str, str]]:
    """The source's files with the model's weights; gives the sha256 of the new and old files."""
    source = _directory(source)
    theirs = dataclasses.replace(read_config(source)[1], dtype=config.dtype)
    if theirs != config:
        differing = [
            f"{field.name}: {getattr(config, field.name)!r} and {getattr(theirs, field.name)!r}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(theirs, field.name)
        ]
        raise ValueError(
            f"The model was not loaded from like={source}; their configurations differ in "
            f"{'; '.join(differing)}. Give the directory it was loaded from, or no like."
        )

    def replace(name: str, stored: np.ndarray) -> np.ndarray | None:
        known = name in parameters or name in TIED_TENSORS
        return restore_kept(stored, tensor(name)) if known else None

    for file in sorted(source.iterdir()):
        carried = file.name in _CARRIED_FILES or file.name.startswith(_CARRIED_PREFIXES)
        if carried and file.is_file():
            shutil.copyfile(file, directory / file.name)
    with TensorFiles(source) as files:
        paths = files.paths
        _check_tensors(
            source,
            files,
            {name: _stored_shape(place, leaf) for name, (place, leaf) in parameters.items()},
        )
    written, sources = {}, {}
    for path in paths:
        sources[path.name], written[path.name] = rewrite_tensors(
            path, directory / path.name, replace
        )
    if paths[0].name != SINGLE_FILE:
        shutil.copyfile(source / INDEX_FILE, directory / INDEX_FILE)
    return written, sources


def restore_kept(stored: np.ndarray, values: np.ndarray) -> np.ndarray:
    """New values in the dtype of the stored ones, and their very bytes where nothing changed.

    A model may be held in a narrower dtype than its checkpoint. A weight that equals the stored
    one in that dtype is the stored one; what became zero is +0.
    """
    if values.dtype == stored.dtype:
        return values
    with np.errstate(over="ignore"):
        unchanged = stored.astype(values.dtype) == values
    # A zero in the model is one in the file, with its sign: neither a weight too small for the
    # model's dtype nor a pruned -0 comes back.
    unchanged &= (values != 0) | ((stored == 0) & (np.signbit(stored) == np.signbit(values)))
    return np.where(unchanged, stored, values.astype(stored.dtype))


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
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
