"""Checkpoint directories <-> models: safetensors, configuration, tokenizer.

`files.directory` says what a pruned checkpoint holds, `files.compressed` how the compressed format
stores a layer. Whichever of the two formats a directory has, and whether a model is dense or
compressed, saving passes weights on as those of the hf format, one at a time.
"""

import contextlib
import dataclasses
import importlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from esparse_jax.files.compressed import (
    INDICES_SUFFIX,
    VALUES_SUFFIX,
    CompressedForm,
    DenseForm,
    index_error,
    order_of,
    permutation_error,
    reordered,
    split_name,
    unpack,
)
from esparse_jax.files.directory import (
    CONFIG_FILE,
    ESPARSE_FILE,
    FORMATS,
    PERMUTATION_SUFFIX,
    PERMUTATIONS_FILE,
    PERMUTATIONS_IN_TENSORS,
    TOKENIZER_FILES,
    Format,
    PathLike,
    carry_files,
    check_output,
    config_fields,
    format_of,
    is_permutation,
    listed_layers,
    read_config,
    read_esparse,
    replacing,
    require_directory,
    write_esparse,
    write_json,
    write_permutations,
)
from esparse_jax.files.tensors import (
    FLOATING_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    TensorFiles,
    Tensors,
    file_sha256,
    header_dtype,
    nonfinite_count,
    rewrite_tensors,
    write_shards,
)
from esparse_jax.models.fusion import InferenceBuilder
from esparse_jax.models.inference import InferenceModel
from esparse_jax.models.layers import (
    CompressedWeight,
    MaskedLinear,
    Permutation,
    SparseLinear,
)
from esparse_jax.models.llama import (
    DERIVED_TENSORS,
    LAYERS_PATH,
    PARAMETER_NAMES,
    TIED_TENSORS,
    TRANSPOSED,
    LlamaConfig,
    LlamaForCausalLM,
    dtype_name,
)
from esparse_jax.models.surgery import (
    get_linear,
    iter_linears,
    replace_linears,
    require_compressible,
    set_linear,
    weight_of,
    with_weight,
)
from esparse_jax.pruning.mask import NMPattern
from esparse_jax.sparse.compress import GROUP, KEPT, Compressed24

# What the tensors of a compressed layer may be; all others are floating.
_KINDS = {INDICES_SUFFIX: ("U8",), PERMUTATION_SUFFIX: ("I32",)}


def load_model(
    path: PathLike, *, dtype: DTypeLike | None = None, check_finite: bool = True
) -> tuple[LlamaForCausalLM, Any]:
    """Reads a LLaMA and its tokenizer from a checkpoint directory.

    The weights are read one tensor at a time into a model without arrays, each put on the default
    device as it is read, so no second copy of them is ever held. The pruned linears of a compressed
    checkpoint become `SparseLinear`; they are at no time dense.

    Args:
        path: Directory with `config.json` and safetensors, sharded or not, hf or compressed.
        dtype: What to hold the parameters and to compute in, a name or a dtype: "bfloat16",
            `jnp.bfloat16`. None: each parameter as it is stored, computing in the dtype that
            `config.json` names (the embedding's if it names none).
        check_finite: Look for NaN and Inf. The check reads what is read anyway.

    Returns:
        The model; and the tokenizer, None if the directory holds none.

    Raises:
        FileNotFoundError: The directory, its configuration or a weight file is missing.
        ValueError: A configuration that is not supported, a truncated file, names missing or
            unexpected, wrong shapes or dtypes (all of them in one message), a tokenizer with more
            ids than the model has embeddings, or indices and permutations that are not valid (all
            in one message).
        FloatingPointError: NaN or Inf among the weights; the tensors are named.
    """
    dtype = dtype_name(dtype)
    with _opened(path, dtype) as (files, model, tokenizer):
        reader = _Reader(files, dtype, check_finite)
        reader.fill(model)
        reader.require_sound(path)
    return model, tokenizer


def load_inference_model(
    path: PathLike,
    *,
    dtype: DTypeLike | None = None,
    form: str | None = None,
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[InferenceModel, Any]:
    """Reads a compressed checkpoint directory into the form that generates fastest.

    What `inference_model` makes of the model that `load_model` reads, without that model: layers
    are read and converted one by one, so the most the device holds at a time is the finished
    layers and one more.

    Args:
        path: A compressed directory; for `form="dense"` an hf one as well.
        dtype: As for `load_model`.
        form: As for `inference_model`.
        check_finite: As for `load_model`.
        progress: Called with (layers done, layers in all).

    Returns:
        The model; and the tokenizer, None if the directory holds none.

    Raises:
        ValueError: A directory that holds no compressed layer, an unknown form, or as `load_model`.
        FileNotFoundError, FloatingPointError: As `load_model`.
    """
    dtype = dtype_name(dtype)
    if form != "dense" and not compressed_layers(require_directory(path)):
        raise ValueError(
            f"{path} holds no compressed layer. Compress it first (esparse compress {path} "
            f"--output DIR), or load it dense, with load_model."
        )
    with _opened(path, dtype) as (files, model, tokenizer):
        builder = InferenceBuilder(model.config, dtype=model.dtype, form=form)
        reader = _Reader(files, dtype, check_finite)
        layers = model.model.layers
        for index in range(len(layers)):
            layer, layers[index] = layers[index], nnx.Module()
            reader.fill(layer, (*LAYERS_PATH.split("."), index))
            if reader.sound:
                builder.add(layer)
            del layer  # before the next one is read
            if progress is not None:
                progress(index + 1, len(layers))
        reader.fill(model)
        reader.require_sound(path)
    return builder.finish(model), tokenizer


@contextlib.contextmanager
def _opened(
    path: PathLike, dtype: str | None
) -> Iterator[tuple[TensorFiles, LlamaForCausalLM, Any]]:
    """A directory's tensors, the model without arrays that they fit, and the tokenizer."""
    path = require_directory(path)
    layers = compressed_layers(path)
    fields, config = read_config(path)
    tokenizer = load_tokenizer(path)
    _check_tokenizer(path, tokenizer, config)
    with TensorFiles(path) as files:
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
        elif fields.get("dtype") is None and fields.get("torch_dtype") is None:
            config = dataclasses.replace(config, dtype=_embedding_dtype(files, config.dtype))
        model = abstract_model(config)
        check_tensors(path, files, model, layers)
        for layer in layers:
            shuffled = layer + PERMUTATION_SUFFIX in files.names
            set_linear(model, layer, _abstract_sparse(get_linear(model, layer), shuffled))
        yield files, model, tokenizer


class _Reader:
    """Fills modules without arrays from a directory, and gathers what is wrong with it."""

    def __init__(self, files: TensorFiles, dtype: str | None, check_finite: bool):
        self._files, self._dtype, self._check_finite = files, dtype, check_finite
        self._broken: list[str] = []
        self._invalid: list[str] = []

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong so far."""
        return not self._broken and not self._invalid

    def fill(self, module: nnx.Module, prefix: tuple[Any, ...] = ()) -> None:
        """Reads every array of a module that stands at `prefix` in the model."""
        flat = dict(nnx.to_flat_state(nnx.state(module)))
        for place, variable in flat.items():
            self._read(prefix + place, variable)
        nnx.update(module, nnx.from_flat_state(flat.items()))

    def _read(self, place: tuple[Any, ...], variable: nnx.Variable) -> None:
        layer = ".".join(map(str, place[:-1]))
        if isinstance(variable, Permutation):
            order = self._files.read(layer + PERMUTATION_SUFFIX)
            if problem := permutation_error(order, len(order)):
                self._invalid.append(f"{layer}: {problem}")
            variable.set_value(jnp.asarray(order))
            return
        compressed = isinstance(variable, CompressedWeight)
        name = layer + VALUES_SUFFIX if compressed else _name(place)
        values, found = _read(self._files, name, self._dtype, self._check_finite)
        self._broken += found
        array = jnp.asarray(values)
        if compressed:
            shape = variable.get_value().shape
            indices = self._files.read(layer + INDICES_SUFFIX)
            if problem := index_error(indices, shape[1]):
                self._invalid.append(f"{layer}: {problem}")
            variable.set_value(Compressed24(array, jnp.asarray(indices), shape))
        else:
            variable.set_value(array.T if place[-1] in TRANSPOSED else array)

    def require_sound(self, path: PathLike) -> None:
        """Raises if anything was wrong."""
        if self._invalid:
            raise ValueError(
                f"{path} has compressed layers whose values have no place; a file was changed or "
                f"damaged. Compress the pruned checkpoint again, or download it again.\n"
                + "\n".join(self._invalid + self._broken)
            )
        if self._broken:
            raise FloatingPointError(
                f"{path} has weights that are NaN or Inf; pruning and evaluation would spread "
                f"them. Download the checkpoint again, or load it as it is with "
                f"check_finite=False.\n" + "\n".join(self._broken)
            )


def load_tokenizer(path: PathLike) -> Any:
    """The tokenizer of a checkpoint directory, by transformers; None where there is none.

    With a `tokenizer.json` alone, BOS and EOS are those that `config.json` names.

    Raises:
        ValueError: The files are there but cannot be read.
    """
    path = require_directory(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    transformers = _transformers()
    try:
        if (path / "tokenizer_config.json").is_file() or not (path / "tokenizer.json").is_file():
            return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json")
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(
            f"The tokenizer of {path} cannot be read: {error}. Download its files again; a "
            f"tokenizer.model without tokenizer.json also needs the sentencepiece package."
        ) from error
    fields = config_fields(path) if (path / CONFIG_FILE).is_file() else {}
    for role in ("bos", "eos"):
        number = fields.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        token = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
        if token is not None:
            setattr(tokenizer, f"{role}_token", token)
    return tokenizer


def _transformers() -> ModuleType:
    """The package, which takes seconds to import and is needed for text alone.

    Without torch it says that its models are not there: nobody asked for them.
    """
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before


def save_model(
    model: LlamaForCausalLM,
    directory: PathLike,
    *,
    format: Format = "hf",
    tokenizer: Any = None,
    like: PathLike | None = None,
    metadata: Mapping[str, Any] | None = None,
    permutations: Mapping[str, Int[Array, " channel"] | Int[np.ndarray, " channel"]] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint directory: tensors by checkpoint name, [out, channel].

    Everything is written to a directory beside the target, which takes the target's place at the
    very end; whatever goes wrong before leaves the target as it was.

    With `like`, the directory that the model was loaded from, the output has that checkpoint's
    tensors, dtypes and other files, as hf in the same files as well, and every weight that the
    model did not change has the very bytes it has there, also if the model computes in another
    dtype. What the model set to zero is +0.

    Args:
        model: A dense model; layers that mask their weight are written masked. The compressed
            format takes compressed layers as well.
        directory: Where to write.
        format: "hf" is what other tools open; "compressed" holds the layers that were pruned to
            2:4 or 1:4 as values and 2-bit indices, see `files.compressed`.
        tokenizer: Written as well; instead of the one beside `like`.
        like: The source directory; for the compressed format it may be compressed itself. Without
            it: the parameters as they are held, and a `config.json` from the model's configuration.
        metadata: What `esparse.json` says of the pruning; `pattern` ("2:4") is required. Beside
            it stand format and package version and the sha256 of all files of weights. Written
            compressed are the layers of its field `layers`, or without that field those with a
            permutation, or else all decoder linears. A model with compressed layers needs none.
        permutations: Channel order in which each pruned layer is N:M, by path; needs `metadata`.
            A compressed layer brings its own.
        overwrite: Take the place of an earlier checkpoint. Other files in that directory stay.

    Raises:
        FileExistsError: The directory is not empty.
        ValueError: It is the source or holds it, `like` is another model's, or permutations that
            do not fit the model; compressed, another pattern than 2:4 and 1:4, or a layer that
            does not follow it in its order.
        TypeError: A layer that the format cannot hold: observed, or as hf compressed.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}.")
    directory = Path(directory).resolve()
    check_output(directory, like=like, overwrite=overwrite)
    model = _writable(model, format)
    _check_permutations(model, metadata, permutations)
    orders: dict[str, np.ndarray | None] = {}
    if format == "compressed":
        metadata, orders = _layers_to_compress(model, metadata, permutations)
    held = _Held(model)
    with replacing(directory) as beside:
        sources: dict[str, str] = {}
        if like is None:
            stored = FLOATING_DTYPES[held.layout["model.embed_tokens.weight"][0]]
            config = dataclasses.replace(model.config, dtype=str(stored))
            write_json(beside / CONFIG_FILE, config.to_dict())
            tensors = held if format == "hf" else CompressedForm(held, orders)
            written = write_shards(beside, tensors)
        elif format == "hf":
            written, sources = _write_like(beside, Path(like), model, held)
        else:
            written, sources = _compress_like(beside, Path(like), model, held, orders)
        if tokenizer is not None:
            for name in TOKENIZER_FILES:
                (beside / name).unlink(missing_ok=True)
            tokenizer.save_pretrained(str(beside))
        if metadata is not None:
            place = None
            if format == "compressed":
                known = permutations or any(order is not None for order in orders.values())
                place = PERMUTATIONS_IN_TENSORS if known else None
            elif permutations:
                written |= write_permutations(beside, permutations)
                place = PERMUTATIONS_FILE
            write_esparse(
                beside, format, metadata, permutations=place, written=written, source=sources
            )


def compressed_layers(path: PathLike) -> tuple[str, ...]:
    """The linears that a checkpoint directory holds compressed, by path; none in the hf format.

    Raises:
        ValueError: `esparse.json` does not list them, or cannot be read.
    """
    recorded = read_esparse(path)
    if recorded is None or format_of(recorded) == "hf":
        return ()
    layers = recorded.get("layers")
    if not isinstance(layers, (dict, list)) or not all(isinstance(name, str) for name in layers):
        raise ValueError(
            f"The esparse.json of {path} does not list the compressed layers (layers: their "
            f"paths), so its tensors cannot be told apart. Download it again, or compress the "
            f"pruned checkpoint again."
        )
    return tuple(dict.fromkeys(layers))


def abstract_model(config: LlamaConfig) -> LlamaForCausalLM:
    """The model without arrays: shapes and dtypes only."""
    return nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))


def check_tensors(
    path: Path, files: TensorFiles, model: LlamaForCausalLM, layers: Collection[str] = ()
) -> None:
    """All disagreements between a directory's tensors and a model, in one error.

    Args:
        path: The directory, for the message.
        files: Its tensors.
        model: Arrays are not needed, see `abstract_model`.
        layers: Those of its linears that the directory holds compressed.
    """
    wrong = [line for _, line in tensor_problems(files, model, layers)]
    if wrong:
        lost = not layers and any(name.endswith(VALUES_SUFFIX) for name in files.names)
        hint = f", or the {ESPARSE_FILE} of a compressed checkpoint is not there" if lost else ""
        raise ValueError(
            f"The weights in {path} do not fit its {CONFIG_FILE}; {len(wrong)} disagreements. They "
            f"belong to different models, or a file was not downloaded whole{hint}:\n"
            + "\n".join(wrong)
        )


def tensor_problems(
    files: TensorFiles, model: LlamaForCausalLM, layers: Collection[str] = ()
) -> list[tuple[str, str]]:
    """What `check_tensors` reports: the tensor or the layer concerned, and a line about it."""
    shapes = _shapes(model)
    linears = dict(iter_linears(model))
    wrong = []
    for layer in layers:
        if layer not in linears:
            wrong.append((layer, f"no such linear: {layer}, listed in {ESPARSE_FILE}"))
            continue
        out, channels = shapes[f"{layer}.weight"]
        if channels % GROUP:
            line = f"not compressible: {layer} has {channels} channels, no multiple of {GROUP}"
            wrong.append((layer, line))
            continue
        del shapes[f"{layer}.weight"]
        shapes[layer + VALUES_SUFFIX] = (out, channels // KEPT)
        shapes[layer + INDICES_SUFFIX] = (out, -(-channels // (2 * GROUP)))
        if layer + PERMUTATION_SUFFIX in files.names:
            shapes[layer + PERMUTATION_SUFFIX] = (channels,)
    extra = {name for name in files.names - set(shapes) if not _derived(name)}
    tied = {name for name in extra if name in TIED_TENSORS}
    wrong += [
        (name, f"missing: {name} {shapes[name]}") for name in sorted(set(shapes) - files.names)
    ]
    wrong += [(name, f"unexpected: {name} {files.shape(name)}") for name in sorted(extra - tied)]
    for name in sorted(files.names & set(shapes)):
        if files.shape(name) != shapes[name]:
            line = f"wrong shape: {name} is {files.shape(name)}, config.json gives {shapes[name]}"
            wrong.append((name, line))
        allowed = _KINDS.get(split_name(name)[1], tuple(FLOATING_DTYPES))
        if files.dtype(name) not in allowed:
            line = f"wrong dtype: {name} is {files.dtype(name)}, it may be {', '.join(allowed)}"
            wrong.append((name, line))
    for name in sorted(tied):
        embedding = TIED_TENSORS[name]
        if embedding in files.names and not _same_bytes(files.read(name), files.read(embedding)):
            line = f"not tied: {name} differs from {embedding}, yet config.json has "
            wrong.append((name, line + "tie_word_embeddings true"))
    return wrong


def _abstract_sparse(linear: nnx.Linear, shuffled: bool) -> SparseLinear:
    """The compressed layer that takes the place of a linear, without arrays."""
    out, channels = linear.out_features, linear.in_features

    def build() -> SparseLinear:
        values = jnp.zeros((out, channels // KEPT), linear.param_dtype)
        indices = jnp.zeros((out, -(-channels // (2 * GROUP))), jnp.uint8)
        order = jnp.zeros(channels, jnp.int32) if shuffled else None
        bias = jnp.zeros(out, linear.param_dtype) if linear.use_bias else None
        compressed = Compressed24(values, indices, (out, channels))
        return SparseLinear(compressed, order, bias, dtype=linear.dtype)

    return nnx.eval_shape(build)


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


def _shapes(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors in the hf format, by name."""
    shapes = {
        _name(place): _stored_shape(place, variable)
        for place, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    for path, linear in iter_linears(model):
        shapes[f"{path}.weight"] = (linear.out_features, linear.in_features)
    return shapes


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


def _writable(model: LlamaForCausalLM, format: Format) -> LlamaForCausalLM:
    """The model with the kinds of layers that the format holds; masks are applied."""
    kinds = (nnx.Linear,) if format == "hf" else (nnx.Linear, SparseLinear)
    masked, wrong = {}, []
    for path, linear in iter_linears(model):
        if isinstance(linear, MaskedLinear):
            masked[path] = with_weight(linear.linear, weight_of(linear))
        elif not isinstance(linear, kinds):
            wrong.append(f"{path}: {type(linear).__name__}")
    if wrong:
        mend = {
            "hf": "The hf format holds dense layers; these are compressed or observed. Save the "
            "pruned model from which the compressed one was made, or give format='compressed'.",
            "compressed": "Observed layers cannot be written; take them out with unobserve.",
        }
        raise TypeError(mend[format] + "\n" + "\n".join(wrong))
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


def _layers_to_compress(
    model: LlamaForCausalLM,
    metadata: Mapping[str, Any] | None,
    permutations: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray | None]]:
    """Metadata that lists the layers to write compressed, and in which order each is 2:4."""
    linears = dict(iter_linears(model))
    brought = {
        path: None if linear.permutation is None else np.asarray(linear.permutation[...])
        for path, linear in linears.items()
        if isinstance(linear, SparseLinear)
    }
    if metadata is None:
        if not brought:
            raise ValueError(
                "The compressed format holds the pruned layers of a model; without metadata "
                "nobody can tell which they are. Give metadata={'pattern': '2:4', 'layers': [...]} "
                "or the report's, and its permutations."
            )
        metadata = {"pattern": "2:4"}
    require_compressible(NMPattern.parse(metadata["pattern"]))
    given = {path: np.asarray(order) for path, order in (permutations or {}).items()}
    layers = listed_layers(metadata, {**given, **brought}, lambda: model.config)
    orders, wrong = {}, []
    for path in sorted(set(brought) - set(layers)):
        wrong.append(f"{path}: compressed in the model, but not listed in metadata['layers']")
    for path in sorted(set(given) - set(layers)):
        wrong.append(f"{path}: has a permutation, but is not listed in metadata['layers']")
    for path in layers:
        channels = linears[path].in_features
        if channels % GROUP:
            wrong.append(f"{path}: {channels} channels are no multiple of {GROUP}")
        orders[path] = order_of(brought.get(path, given.get(path)), channels)
        if path in brought and path in given:
            ours = np.arange(channels) if orders[path] is None else orders[path]
            if not np.array_equal(ours, given[path]):
                wrong.append(f"{path}: compressed in another order than permutations gives")
    if wrong:
        raise ValueError(
            "Layers that cannot be written in the compressed format:\n" + "\n".join(wrong)
        )
    return {**metadata, "layers": metadata.get("layers") or layers}, orders


class _Held:
    """The tensors that a model holds, in the hf format."""

    def __init__(self, model: LlamaForCausalLM):
        self._parameters = {
            _name(place): (place, variable)
            for place, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }
        self._compressed = {
            f"{path}.weight": linear
            for path, linear in iter_linears(model)
            if isinstance(linear, SparseLinear)
        }
        self.layout = {}
        for name, (place, variable) in self._parameters.items():
            dtype = np.dtype(variable.get_value().dtype)
            self.layout[name] = (header_dtype(dtype), _stored_shape(place, variable))
        for name, linear in self._compressed.items():
            dtype = np.dtype(linear.weight.get_value().dtype)
            self.layout[name] = (header_dtype(dtype), (linear.out_features, linear.in_features))

    def read(self, name: str) -> np.ndarray:
        if name in self._compressed:
            return _dense_weight(name, self._compressed[name])
        place, variable = self._parameters[name]
        value = variable.get_value()
        return np.asarray(value.T) if place[-1] in TRANSPOSED else _on_host(value)


def _dense_weight(name: str, linear: SparseLinear) -> np.ndarray:
    compressed = linear.weight.get_value()
    indices = _on_host(compressed.indices)
    if problem := index_error(indices, linear.in_features):
        raise ValueError(f"{name}: {problem}. Make compressed weights with compress24.")
    weight = unpack(_on_host(compressed.values), indices)
    if linear.permutation is None:
        return weight
    return reordered(weight, np.argsort(np.asarray(linear.permutation[...])))


def _on_host(array: Array) -> np.ndarray:
    # Of a copy: an array keeps what was once fetched of it for as long as it lives.
    return np.asarray(jnp.copy(array))


class _Restored:
    """The tensors of a source checkpoint, with what a model changed in them."""

    def __init__(self, stored: Tensors, held: _Held):
        self._stored, self._held = stored, held
        self.layout = stored.layout

    def read(self, name: str) -> np.ndarray:
        stored = self._stored.read(name)
        changed = self.changed(name, stored)
        return stored if changed is None else changed

    def changed(self, name: str, stored: np.ndarray) -> np.ndarray | None:
        """What the source's tensor is to be; None for one that is not the model's."""
        held = name if name in self._held.layout else TIED_TENSORS.get(name)
        return None if held is None else restore_kept(stored, self._held.read(held))


def _write_like(
    directory: Path, source: Path, model: LlamaForCausalLM, held: _Held
) -> tuple[dict[str, str], dict[str, str]]:
    """The source's files with the model's weights; gives the sha256 of the new and old files."""
    source = _source_of(model, source)
    if compressed_layers(source):
        raise ValueError(
            f"like={source} is a compressed checkpoint; the hf format has other tensors. Expand it "
            f"first (esparse expand) and give that directory, or write format='compressed'."
        )
    carry_files(source, directory)
    with TensorFiles(source) as files:
        check_tensors(source, files, model)
        replace = _Restored(files, held).changed
    written, sources = {}, {}
    for path in files.paths:
        sources[path.name], written[path.name] = rewrite_tensors(
            path, directory / path.name, replace
        )
    if files.paths[0].name != SINGLE_FILE:
        shutil.copyfile(source / INDEX_FILE, directory / INDEX_FILE)
    return written, sources


def _compress_like(
    directory: Path,
    source: Path,
    model: LlamaForCausalLM,
    held: _Held,
    orders: Mapping[str, np.ndarray | None],
) -> tuple[dict[str, str], dict[str, str]]:
    """The source's tensors with the model's weights, compressed; gives sha256 as `_write_like`."""
    source = _source_of(model, source)
    layers = compressed_layers(source)
    carry_files(source, directory)
    with TensorFiles(source) as files:
        check_tensors(source, files, model, layers)
        dense = _Restored(DenseForm(files, layers), held)
        written = write_shards(directory, CompressedForm(dense, orders))
    return written, {path.name: file_sha256(path) for path in files.paths}


def _source_of(model: LlamaForCausalLM, source: Path) -> Path:
    """The directory, if the model may have been loaded from it."""
    source, config = require_directory(source), model.config
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
    return source


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
