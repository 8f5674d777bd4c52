"""A tiny random LLaMA checkpoint with a tokenizer, made on the fly."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import llama_cases
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from esparse_jax.files import load_model, save_model
from esparse_jax.models.surgery import iter_linears, replace_linears, weight_of, with_weight
from esparse_jax.pruning import NMPattern

VOCAB = 128

TWO_OF_FOUR = NMPattern(2, 4)

FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

_SENTENCE = (
    "the sparse model keeps two of every four weights and reads them in order so that "
    "channels with more to say stay while others go each token passes through all blocks"
)


def text(words: int = 2000, seed: int = 0) -> str:
    """Sentences of random order, a paragraph of several on each line."""
    generator = np.random.default_rng(seed)
    drawn = generator.choice(_SENTENCE.split(), size=words)
    lines = [" ".join(drawn[start : start + 40]) for start in range(0, words, 40)]
    return "\n".join(lines) + "\n"


@functools.cache
def tokenizer_json(vocab_size: int = VOCAB) -> str:
    """A byte-pair tokenizer trained on `text`: <unk> 0, <s> 1, </s> 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([text()], trainer)
    return tokenizer.to_str()


def tiny_weights(**config_overrides) -> dict[str, np.ndarray]:
    """The float32 weights that `tiny_checkpoint` stores, by checkpoint name."""
    return llama_cases.weights(FIELDS | config_overrides)


def tiny_checkpoint(
    directory: str | Path,
    *,
    tokenizer: bool = True,
    dtype: str = "float32",
    shards: int = 1,
    extra: dict[str, np.ndarray] | None = None,
    **config_overrides,
) -> Path:
    """Writes a random LLaMA: config.json, safetensors, tokenizer.json.

    Args:
        directory: Made if it is not there.
        tokenizer: Whether to write tokenizer.json (`VOCAB` ids at most).
        dtype: What the weights are stored in, and what config.json says.
        shards: Number of safetensors files; with more than one there is an index.
        extra: Tensors to store besides the weights, in their own dtype.
        **config_overrides: Fields of config.json; sizes change the weights along.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    fields = FIELDS | {"torch_dtype": dtype} | config_overrides
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    (directory / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    if tokenizer:
        (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weights = {
        name: np.ascontiguousarray(value.astype(stored))
        for name, value in tiny_weights(**config_overrides).items()
    }
    weights |= extra or {}
    write_weights(directory, weights, shards=shards)
    return directory


def tiny_pruned(
    directory: Path,
    *,
    pattern: NMPattern = TWO_OF_FOUR,
    shuffled: bool = True,
    skip: tuple[str, ...] = (),
    **checkpoint,
) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A tiny checkpoint, and beside it the same pruned by random scores, in the hf format.

    Args:
        directory: Gets `source` and `hf`.
        pattern: What every decoder linear is pruned to.
        shuffled: In a random order of the channels; otherwise in the natural one.
        skip: Linears to leave dense, by the end of their path.
        **checkpoint: For `tiny_checkpoint`.

    Returns:
        Both directories, and the order of the channels of each pruned layer.
    """
    source = tiny_checkpoint(directory / "source", **checkpoint)
    model, _ = load_model(source)
    generator = np.random.default_rng(0)
    orders, linears = {}, {}
    for path, linear in iter_linears(model):
        if path == "lm_head" or path.endswith(skip):
            continue
        weight = np.array(weight_of(linear))
        order = np.arange(weight.shape[1], dtype=np.int32)
        if shuffled:
            order = generator.permutation(order)
        scores = generator.random((weight.shape[0], weight.shape[1] // pattern.m, pattern.m))
        pruned = np.empty(weight.shape, bool)
        pruned[:, order] = (scores.argsort(-1).argsort(-1) >= pattern.n).reshape(weight.shape)
        weight[pruned] = 0
        linears[path], orders[path] = with_weight(linear, jnp.asarray(weight)), order
    save_model(
        replace_linears(model, linears),
        directory / "hf",
        like=source,
        metadata={
            "pattern": str(pattern),
            "method": "random",
            "options": {"seed": 0},
            "layers": {path: {"kept_share": 0.5} for path in orders},
        },
        permutations=orders if shuffled else None,
    )
    return source, directory / "hf", orders


def write_weights(directory: Path, weights: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """Writes named tensors as one file, or as several with an index."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata=metadata)
        return
    weight_map = {}
    for number, names in enumerate(np.array_split(list(weights), shards), 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({str(n): weights[str(n)] for n in names}, directory / file, metadata=metadata)
        weight_map |= {str(name): file for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
