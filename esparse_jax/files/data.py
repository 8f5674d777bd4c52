"""Token windows for calibration and evaluation: the only place that draws samples."""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

PROTOCOLS = ("raw", "published")

_ARRAYS = (".npy", ".npz")

# Files that are neither text, nor documents one a line, nor token windows.
_OTHER_FORMATS = (".json", ".gz", ".zst", ".zip", ".parquet", ".arrow", ".bin", ".safetensors")

PathLike = str | os.PathLike[str]


def calibration_windows(
    path: PathLike,
    tokenizer: Any,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    vocab_size: int | None = None,
) -> Int[np.ndarray, "sample seq"]:
    """Windows of tokens to calibrate on, drawn by numpy's PCG64 from a seed.

    - Text (any name but those below, UTF-8): tokenised as one; windows at random offsets, which
      may overlap.
    - Documents (`.jsonl`, one object with a field `text` a line): documents in random order, those
      shorter than a window left out, from each a window at a random offset; when all were used,
      again in another order.
    - Token windows (`.npy`, or `.npz` with one array or one named `tokens`), [sample, seq]: random
      rows, each at most once, in the order of the file; of a longer row a part at a random offset.

    No special tokens are added.

    Args:
        path: The file.
        tokenizer: A transformers tokenizer; None will do for token windows.
        num_samples: Windows to draw.
        sequence_length: Tokens in a window.
        seed: Of the draw; the same seed gives the same windows.
        vocab_size: The model's, to check the ids against; the tokenizer's if not given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Empty or too short a text, no document long enough, a line without the field,
            token windows of the wrong shape, ids outside the vocabulary.
        TypeError: Token windows that are not integers; text without a tokenizer.

    Source: E-Sparse, section 5.1: 128 sequences, drawn from C4.
    Paper silent: how they are drawn. Random documents and offsets are those of GPTQ and Wanda.
    """
    for name, value in (("num_samples", num_samples), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    path = _file(path)
    generator = np.random.Generator(np.random.PCG64(seed))
    if path.suffix.lower() in _ARRAYS:
        windows = _rows_of_array(path, generator, num_samples, sequence_length)
    elif path.suffix.lower() == ".jsonl":
        windows = _windows_of_documents(path, tokenizer, generator, num_samples, sequence_length)
    else:
        tokens = _encode(tokenizer, _read_text(path), path)
        _check_length(path, tokens, sequence_length)
        starts = generator.integers(0, len(tokens) - sequence_length + 1, size=num_samples)
        windows = tokens[starts[:, None] + np.arange(sequence_length)]
    _check_ids(path, windows, tokenizer, vocab_size)
    return windows.astype(np.int32)


def read_prompts(path: PathLike) -> list[str]:
    """The prompts of a text file, one a line; blank lines are passed over.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no UTF-8 text, or has blank lines only.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give a text file, one prompt a line.")
    lines = _read_text(path, otherwise="").split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def read_text_tokens(
    path: PathLike,
    tokenizer: Any,
    *,
    protocol: str = "raw",
    vocab_size: int | None = None,
) -> Int[np.ndarray, " token"]:
    """A whole file as one stream of tokens, for `evaluation_windows`.

    - `raw`: the file as it is, tokenised once, no BOS.
    - `published`: how the tables of GPTQ, Wanda and their followers read WikiText2. The rows of
      the data set are the file's lines with their line end, blank lines being empty rows; they are
      joined by a blank line ("\\n\\n"), tokenised once, with one BOS before the first.

    Documents (`.jsonl`, one object with a field `text` a line) are rows of a data set: both join
    them by a blank line, and `published` puts a BOS before the first.

    Token arrays (`.npy`, `.npz` with one array or one named `tokens`; [token], or [sample, seq],
    whose rows are taken one after the other) are what they are: `raw` only.

    Args:
        path: The file.
        tokenizer: A transformers tokenizer; None will do for token arrays.
        protocol: One of `PROTOCOLS`.
        vocab_size: The model's, to check the ids against; the tokenizer's if not given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An empty text, a line without the field, a tokenizer without BOS where one is
            needed, ids outside the vocabulary, arrays of another rank.
        TypeError: Arrays that are not integers; text without a tokenizer.

    Paper silent: how documents are evaluated.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}.")
    path = _file(path)
    if path.suffix.lower() in _ARRAYS:
        if protocol != "raw":
            raise ValueError(
                f"{path} holds tokens, so nothing is left to join: protocol {protocol!r} is for "
                f"text. Take protocol='raw'."
            )
        tokens = _read_array(path, ranks=(1, 2)).reshape(-1)
    else:
        tokens = _encode(tokenizer, _evaluated_text(path, protocol), path)
    if protocol == "published":
        bos = tokenizer.bos_token_id
        if bos is None:
            raise ValueError(
                "protocol 'published' puts a BOS before the text, and this tokenizer has none. "
                "Name it in tokenizer_config.json (bos_token) or config.json (bos_token_id), or "
                "take protocol='raw'."
            )
        tokens = np.concatenate((np.array([bos], tokens.dtype), tokens))
    _check_ids(path, tokens, tokenizer, vocab_size)
    return tokens.astype(np.int32)


def _evaluated_text(path: Path, protocol: str) -> str:
    if path.suffix.lower() == ".jsonl":
        return "\n\n".join(_all_documents(path))
    text = _read_text(path)
    if protocol == "raw":
        return text
    rows = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)


def window_length(path: PathLike) -> int | None:
    """How many tokens the windows of a file have; None for a text or one stream of tokens.

    Raises:
        FileNotFoundError, ValueError, TypeError: As `read_text_tokens`.
    """
    path = _file(path)
    if path.suffix.lower() not in _ARRAYS:
        return None
    array = _read_array(path, ranks=(1, 2))
    return array.shape[1] if array.ndim == 2 else None


def evaluation_windows(
    tokens: Integer[np.ndarray, " token"], sequence_length: int
) -> Int[np.ndarray, "sample seq"]:
    """Consecutive windows of a stream of tokens; what is left at its end is dropped.

    Raises:
        ValueError: The stream is shorter than one window, or a window predicts nothing.
        TypeError: It is no array, but a path, say.
    """
    if not hasattr(tokens, "reshape"):
        raise TypeError(
            f"evaluation_windows takes a stream of tokens, a numpy array; got "
            f"{type(tokens).__name__}. read_text_tokens makes one of a file."
        )
    if sequence_length < 2:
        raise ValueError(
            f"sequence_length is {sequence_length}; a window needs at least 2 tokens, one to read "
            f"and one to predict."
        )
    samples = len(tokens) // sequence_length
    if samples == 0:
        raise ValueError(
            f"The text has {len(tokens)} tokens, fewer than one window of {sequence_length}. Take "
            f"a longer text, or shorter windows with sequence_length."
        )
    return tokens[: samples * sequence_length].reshape(samples, sequence_length).astype(np.int32)


def _file(path: PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        there = f"{path} is a directory" if path.is_dir() else f"There is no file {path}"
        raise FileNotFoundError(
            f"{there}. Give a text (.txt), documents (.jsonl) or token windows (.npy, .npz)."
        )
    if path.suffix.lower() in _OTHER_FORMATS:
        raise ValueError(
            f"{path} is not read here. Give a text (.txt, UTF-8), documents (.jsonl with a field "
            f"'text') or token windows (.npy, .npz)."
        )
    return path


def _read_text(
    path: Path, otherwise: str = ", or give documents (.jsonl) or token windows (.npy, .npz)"
) -> str:
    # Not read_text: that would turn "\r\n" into "\n", and the file counts as it is.
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it"
            f"{otherwise}."
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty. Give a file with text.")
    return text


def _encode(tokenizer: Any, text: str, path: Path) -> Int[np.ndarray, " token"]:
    if tokenizer is None:
        raise TypeError(
            f"{path} holds text, and the checkpoint has no tokenizer (tokenizer.json). Put it "
            f"there, or give token windows (.npy, .npz)."
        )
    ids = tokenizer(
        text,
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # texts are longer than the model's context on purpose
    )["input_ids"]
    return np.array(ids, np.int64)


def _check_length(path: Path, tokens: Int[np.ndarray, " token"], sequence_length: int) -> None:
    if len(tokens) < sequence_length:
        raise ValueError(
            f"{path} has {len(tokens)} tokens, fewer than one window of {sequence_length}. Give a "
            f"longer text, or take shorter windows with sequence_length."
        )


def _windows_of_documents(
    path: Path,
    tokenizer: Any,
    generator: np.random.Generator,
    num_samples: int,
    sequence_length: int,
) -> Int[np.ndarray, "sample seq"]:
    texts = _all_documents(path)
    encoded: dict[int, Int[np.ndarray, " token"]] = {}  # only what is drawn is tokenised
    usable = np.arange(len(texts))
    windows: list[Int[np.ndarray, " seq"]] = []
    while len(windows) < num_samples:
        long_enough = []
        for index in generator.permutation(usable):
            if index not in encoded:
                encoded[index] = _encode(tokenizer, texts[index], path)
            spare = len(encoded[index]) - sequence_length
            if spare < 0:
                continue
            long_enough.append(index)
            start = generator.integers(0, spare + 1)
            windows.append(encoded[index][start : start + sequence_length])
            if len(windows) == num_samples:
                break
        if not long_enough:
            longest = max((len(tokens) for tokens in encoded.values()), default=0)
            raise ValueError(
                f"None of the {len(texts)} documents in {path} has {sequence_length} tokens, one "
                f"window; the longest has {longest}. Give longer documents or a smaller "
                f"sequence_length."
            )
        usable = np.sort(long_enough)
    return np.stack(windows)


def _all_documents(path: Path) -> list[str]:
    texts = list(_documents(path))
    if not texts:
        raise ValueError(f"{path} is empty. Give a file with documents, one a line.")
    return texts


def _documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is not valid JSON: {error}. Each line must be one "
                    f'object like {{"text": "..."}}.'
                ) from error
            text = fields.get("text") if isinstance(fields, dict) else None
            if not isinstance(text, str):
                has = ", ".join(fields) if isinstance(fields, dict) else type(fields).__name__
                raise ValueError(
                    f"{path}, line {number} has no text in a field 'text' (it has: "
                    f'{has or "nothing"}). Each line must be one object like {{"text": "..."}}.'
                )
            yield text


def _rows_of_array(
    path: Path, generator: np.random.Generator, num_samples: int, sequence_length: int
) -> Integer[np.ndarray, "sample seq"]:
    array = _read_array(path, ranks=(2,))
    rows, width = array.shape
    if rows < num_samples or width < sequence_length:
        raise ValueError(
            f"{path} has {rows} windows of {width} tokens, and {num_samples} of {sequence_length} "
            f"are to be drawn. Give more or longer ones, or lower num_samples or sequence_length."
        )
    chosen = np.sort(generator.choice(rows, size=num_samples, replace=False))
    starts = generator.integers(0, width - sequence_length + 1, size=num_samples)
    return array[chosen[:, None], starts[:, None] + np.arange(sequence_length)]


def _read_array(path: Path, *, ranks: tuple[int, ...]) -> Integer[np.ndarray, "..."]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a numpy file: {error}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        with path.open("rb") as file:
            start = file.read(16)
        raise ValueError(
            f"{path} cannot be read as a numpy file: it begins with {start!r}. Write arrays of "
            f"token ids with numpy.save or numpy.savez; text goes into .txt and .jsonl files."
        ) from error
    if isinstance(loaded, np.lib.npyio.NpzFile):
        with loaded:
            name = "tokens" if "tokens" in loaded.files else None
            if name is None and len(loaded.files) == 1:
                name = loaded.files[0]
            if name is None:
                raise ValueError(
                    f"{path} holds the arrays {', '.join(loaded.files) or 'none'}; it must hold "
                    f"one array, or one named 'tokens'."
                )
            loaded = loaded[name]
    if loaded.ndim not in ranks or loaded.size == 0:
        wanted = " or ".join({1: "[token]", 2: "[sample, seq]"}[rank] for rank in ranks)
        raise ValueError(
            f"{path} holds an array of shape {tuple(loaded.shape)}; it must be {wanted} and not "
            f"empty."
        )
    if not np.issubdtype(loaded.dtype, np.integer):
        raise TypeError(f"{path} holds {loaded.dtype}; token ids must be integers.")
    return loaded


def _check_ids(
    path: Path, tokens: Integer[np.ndarray, "..."], tokenizer: Any, vocab_size: int | None
) -> None:
    if vocab_size is None:
        if tokenizer is None:
            return
        vocab_size = len(tokenizer)
    least, greatest = int(tokens.min()), int(tokens.max())
    if least < 0 or greatest >= vocab_size:
        raise ValueError(
            f"{path} has token ids from {least} to {greatest}, but the vocabulary has ids 0 to "
            f"{vocab_size - 1}. The tokens were made with another tokenizer."
        )
