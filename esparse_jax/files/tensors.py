"""The safetensors files of a checkpoint directory: read tensor by tensor, written as a stream.

A safetensors file is

    8 bytes   length of the header, little endian
    header    JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
    data      the tensors one after the other, without gaps

so a file of any size is read and written holding one tensor at a time.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# The name of a dtype in a safetensors header -> numpy's; the dtypes that weights may have.
FLOATING_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_WRITTEN_DTYPES = {**FLOATING_DTYPES, "I32": np.dtype(np.int32), "U8": np.dtype(np.uint8)}
_HEADER_NAMES = {dtype: name for name, dtype in _WRITTEN_DTYPES.items()}

# What is only ever copied: tensors that the configuration determines.
_STORED_DTYPES = {
    **_WRITTEN_DTYPES,
    **{"F64": np.dtype(np.float64), "I64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_)},
    **{"I16": np.dtype(np.int16), "I8": np.dtype(np.int8)},
}

# Exponent bits of the dtypes: all of them set is NaN or Inf.
_EXPONENTS = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}

_PART = 1 << 24  # bytes hashed at once
_ROWS = 1024  # rows of a weight looked at together

_SHARD_BYTES = 5 * 10**9  # transformers' limit for one file

# name -> (dtype in the header, shape)
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


@runtime_checkable
class Tensors(Protocol):
    """Named tensors, each in memory only when it is read: from files, or made of other tensors."""

    @property
    def layout(self) -> Layout: ...

    def read(self, name: str) -> np.ndarray: ...


class TensorFiles:
    """The tensors of a checkpoint directory by name, whichever files they are in.

    Use it as a context manager; tensors are read when asked for, one at a time.

    Args:
        directory: Holds `model.safetensors`, or several files and `model.safetensors.index.json`.

    Raises:
        FileNotFoundError: Neither is there, or a file that the index names is not.
        ValueError: A file that is cut short or is no safetensors file, or an index that does not
            agree with the files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.paths = _weight_files(directory)
        self.layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._files: dict[str, Any] = {}  # by tensor name
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "TensorFiles":
        with contextlib.ExitStack() as opened:
            held = {}
            for path in self.paths:
                file = opened.enter_context(_open(path))
                held[path.name] = set(file.keys())
                for name in sorted(held[path.name]):
                    entry = file.get_slice(name)
                    self.layout[name] = (entry.get_dtype(), tuple(entry.get_shape()))
                    self._files[name] = file
            _check_index(self.directory, held)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.close()

    @property
    def names(self) -> set[str]:
        return set(self.layout)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layout[name][1]

    def dtype(self, name: str) -> str:
        """The dtype as the header calls it: F32, BF16, ..."""
        return self.layout[name][0]

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)


def bits_of(values: np.ndarray) -> np.ndarray:
    """The same bytes as unsigned integers, which no processor rounds, flushes or quiets."""
    return values.view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)


def nonfinite_count(values: np.ndarray) -> int:
    """How many NaN or Inf there are, by the bits: several times faster than isfinite in 16 bit."""
    exponent = _EXPONENTS[_HEADER_NAMES[values.dtype]]
    return int(np.count_nonzero((bits_of(values) & exponent) == exponent))


def nonzero(values: np.ndarray) -> np.ndarray:
    """Where the values are not zero, of either sign; NaN is not zero."""
    return (bits_of(values) << 1) != 0


def row_slices(rows: int) -> Iterator[slice]:
    """The rows of a weight, so many at a time that what is computed from them stays small."""
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


def header_dtype(dtype: np.dtype) -> str:
    """The name of a numpy dtype in a safetensors header."""
    if dtype not in _HEADER_NAMES:
        known = ", ".join(map(str, _HEADER_NAMES))
        raise ValueError(f"Tensors of dtype {dtype} cannot be stored; they may be {known}.")
    return _HEADER_NAMES[dtype]


def write_tensors(path: Path, layout: Layout, tensor: Callable[[str], np.ndarray]) -> str:
    """Writes a safetensors file, asking for one tensor at a time.

    Args:
        path: The file.
        layout: Dtype and shape of each tensor.
        tensor: Gives the tensor of a name; called once for each, in the order of the file.

    Returns:
        The file's sha256, as a hexadecimal number.
    """
    # Wider dtypes first, so that every tensor is aligned to its items; then by name.
    sizes = {name: _STORED_DTYPES[kind].itemsize for name, (kind, _) in layout.items()}
    order = sorted(layout, key=lambda name: (-sizes[name], name))
    # transformers refuses files that do not say for which framework they were written.
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        kind, shape = layout[name]
        begin, end = end, end + byte_size(kind, shape)
        fields[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        _put(file, len(header).to_bytes(8, "little") + header, digest)
        for name in order:
            kind, shape = layout[name]
            values = tensor(name)
            assert values.shape == shape, name
            assert values.dtype == _STORED_DTYPES[kind], name
            _put(file, _as_bytes(values), digest)
        _to_disk(file)
    return digest.hexdigest()


def write_shards(directory: Path, tensors: Tensors) -> dict[str, str]:
    """Writes tensors as `model.safetensors`, or as files of 5 GB with an index beside them.

    Args:
        directory: Where to write.
        tensors: What to write; the order of the layout decides what comes into the same file.

    Returns:
        The sha256 of each file of tensors, by its name.
    """
    shards = _shards(tensors.layout)
    if len(shards) == 1:
        return {SINGLE_FILE: write_tensors(directory / SINGLE_FILE, shards[0], tensors.read)}
    written, weight_map, total = {}, {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        written[file] = write_tensors(directory / file, shard, tensors.read)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(byte_size(*entry) for entry in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (directory / INDEX_FILE).write_text(text, encoding="utf-8")
    return written


def byte_size(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a layout."""
    return _STORED_DTYPES[kind].itemsize * math.prod(shape)


def _shards(layout: Layout) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """The tensors in files of at most `_SHARD_BYTES` (a larger tensor has its own)."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, entry in layout.items():
        more = byte_size(*entry)
        if shards[-1] and size + more > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += more
    return shards


def rewrite_tensors(
    source: Path, path: Path, replace: Callable[[str, np.ndarray], np.ndarray | None]
) -> tuple[str, str]:
    """Copies a safetensors file, header and all, with other values in some of its tensors.

    Args:
        source: The file to copy.
        path: The file to write.
        replace: Takes a floating tensor's name and values, in the order of the file; gives what to
            write instead, of the same dtype and shape, or None to copy it as it is.

    Returns:
        The sha256 of the source and of the written file.
    """
    with source.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        fields = json.loads(header)
        fields.pop("__metadata__", None)
        before, after = hashlib.sha256(length + header), hashlib.sha256()
        with path.open("xb") as target:
            _put(target, length + header, after)
            for name in sorted(fields, key=lambda name: fields[name]["data_offsets"]):
                begin, end = fields[name]["data_offsets"]
                data = file.read(end - begin)
                before.update(data)
                if fields[name]["dtype"] in FLOATING_DTYPES:
                    values = np.frombuffer(data, FLOATING_DTYPES[fields[name]["dtype"]])
                    values = values.reshape(fields[name]["shape"])
                    replaced = replace(name, values)
                    if replaced is not None:
                        assert (replaced.shape, replaced.dtype) == (values.shape, values.dtype)
                        data = _as_bytes(replaced)
                _put(target, data, after)
            _to_disk(target)
    return before.hexdigest(), after.hexdigest()


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a small file."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as a hexadecimal number."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        found = sorted(path.name for path in directory.iterdir() if path.is_file())
        raise FileNotFoundError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; it has: "
            f"{', '.join(found) or 'no files'}. Weights in another format (.bin, .pth) must be "
            f"saved as safetensors first."
        )
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(names)} files that {INDEX_FILE} names: "
            f"{', '.join(missing)}. Download them again."
        )
    return [directory / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = set(weight_map.values())
        if not names or any(os.path.basename(name) != name for name in names):
            raise ValueError("it must give the name of a file beside it for every tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of safetensors files (a JSON object with weight_map): {error!r}. "
            f"Download it again."
        ) from error
    return weight_map


def _check_index(directory: Path, held: Mapping[str, set[str]]) -> None:
    """That the tensors are in the files that the index gives, where there is one."""
    if SINGLE_FILE in held:
        return
    wrong = [
        f"{name} is not in {file}"
        for name, file in sorted(_weight_map(directory / INDEX_FILE).items())
        if name not in held[file]
    ]
    if wrong:
        raise ValueError(
            f"{directory / INDEX_FILE} does not agree with the files beside it; they belong to "
            f"different downloads:\n" + "\n".join(wrong)
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is cut short or no safetensors file: {error}. "
            f"Download it again."
        ) from error


def _as_bytes(values: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1))


def _put(file: Any, data: bytes | memoryview, digest: Any) -> None:
    digest.update(data)
    file.write(data)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
