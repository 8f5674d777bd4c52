"""Text from a model: one jitted prefill, one jitted decode loop over the key/value cache."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from esparse_jax.models.cache import KVCache, init_cache

# Steps of the device-side loop between two looks of the host at the stop tokens.
CHUNK = 16
# A cache has a multiple of so many slots: what is compiled for one prompt then serves others, of
# about the same length, in all steps but the first. On the CPU platform, whose attention reads all
# of them, 64 took up to 6 % more time for 128 tokens than no rounding (20 million parameters), 32
# took what noise takes.
SLOTS = 32
# A prompt is computed with a multiple of a sixteenth of the next power of two tokens, so that many
# lengths share what is compiled: less than an eighth more tokens than it has, and none up to 16. On
# the CPU platform 20 prompts of 20 to 300 tokens took 20.0 s in place of 22.7 the first time, and
# 2.00 in place of 1.98 from then on (20 million parameters, 17 new tokens).
FINENESS = 16


# The choices of `sample`, static in every jitted step.
_OPTIONS = ("temperature", "top_k", "top_p")


@partial(jax.jit, static_argnames=_OPTIONS)
def sample(
    logits: Float[Array, "batch vocab"],
    key: Key[Array, ""],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Array, " batch"]:
    """One token a row: the likeliest at temperature 0, else drawn.

    The logits are divided by the temperature; of the tokens the `top_k` likeliest stay; of those
    stays the nucleus, the smallest set of likeliest tokens whose probabilities, summing to 1 over
    the `top_k`, reach `top_p`. The likeliest token is always in it. Of equal logits the lower id
    is the likelier token.

    Source: nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751); top-k, Fan et al. 2018 (arXiv
    1805.04833); the order of the three is that of transformers' generation.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0.0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / temperature
    vocab = logits.shape[-1]
    kept = vocab if top_k is None else min(top_k, vocab)
    if kept == vocab and top_p == 1.0:
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    logits, tokens = jax.lax.top_k(logits, kept)  # descending, of equal ones the lower id first
    if top_p < 1.0:
        probability = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    place = jax.random.categorical(key, logits, axis=-1)
    return jnp.take_along_axis(tokens, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


class CachedModel(Protocol):
    """What `generate` asks of a model, beside being an `nnx.Module`; see `LlamaForCausalLM`.

    Of `config` it asks what `CachedConfig` says, `vocab_size`, `max_position_embeddings`, and
    `longest_alike(length)`: how many tokens may be computed in place of so many, those behind being
    forgotten, without changing anything for these.
    """

    config: Any
    dtype: Any

    def embed(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq channel"]: ...

    def blocks(
        self, hidden: Float[Array, "batch seq channel"], *, cache: KVCache, empty: bool = False
    ) -> tuple[Float[Array, "batch seq channel"], KVCache]: ...

    def head(
        self, hidden: Float[Array, "batch seq channel"]
    ) -> Float[Array, "batch seq vocab"]: ...


class HashedOnce:
    """A graphdef for the static argument of a `jit` that is called often.

    By itself it hashes and compares all its layers whenever a `jit` is called with it: 2 ms of the
    host's for 32, before the device begins.
    """

    def __init__(self, graphdef: nnx.GraphDef):
        self.graphdef = graphdef
        self._hash = hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HashedOnce):
            return False
        if self.graphdef is other.graphdef:
            return True
        if self._hash != other._hash or self.graphdef != other.graphdef:
            return False
        self.graphdef = other.graphdef  # so that they are not compared again
        return True


def split_once(model: nnx.Module) -> tuple[HashedOnce, Any]:
    """`nnx.split`, for many calls of `prefill` and `decode`."""
    graphdef, state = nnx.split(model)
    return HashedOnce(graphdef), state


def _merge(graphdef: Any, state: Any) -> Any:
    return nnx.merge(graphdef.graphdef if isinstance(graphdef, HashedOnce) else graphdef, state)


@partial(jax.jit, static_argnames=("graphdef", "max_length", *_OPTIONS))
def prefill(
    graphdef: Any,
    state: Any,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, ""] | Int[Array, " batch"] | None,
    key: Key[Array, ""],
    *,
    max_length: int,
    **options: Any,
) -> tuple[Int[Array, " batch"], KVCache]:
    """Reads the prompts: the first new token of each row, and the cache behind them.

    Args:
        graphdef, state: `split_once` or `nnx.split` of a `CachedModel`.
        tokens: The prompts, all from the first column on. What stands behind them is computed and
            forgotten.
        lengths: Of the prompts, one number where all have the same; None where all end at the last
            column. There may be no more columns than `config.longest_alike` of the longest.
        key: Of the draw.
        max_length: Slots of the cache.
        **options: Of `sample`.
    """
    model = _merge(graphdef, state)
    rows = tokens.shape[0]
    cache = init_cache(model.config, rows, max_length, dtype=model.dtype)
    # Without padding before them the rows are read by the attention that needs no mask.
    hidden, cache = model.blocks(model.embed(tokens), cache=cache, empty=True)
    if lengths is None:
        last = hidden[:, -1:]
    elif lengths.ndim == 0:
        # The next token's key and value go where those of the first token too many are.
        cache = cache._replace(length=lengths)
        last = jax.lax.dynamic_slice_in_dim(hidden, lengths - 1, 1, axis=1)
    else:
        cache = cache.aligned(lengths)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return sample(model.head(last)[:, 0], key, **options), cache


@partial(jax.jit, static_argnames=("graphdef", *_OPTIONS), donate_argnames="cache")
def decode(
    graphdef: Any,
    state: Any,
    token: Int[Array, " batch"],
    cache: KVCache,
    keys: Key[Array, " step"],
    **options: Any,
) -> tuple[Int[Array, " batch"], KVCache, Int[Array, "batch step"]]:
    """One token a row for every key, in a loop on the device: the last, the cache, all of them.

    The cache is updated where it lies. The weights are arguments that nothing in the loop writes,
    so the kernels of the inference model may read them ahead.
    """
    model = _merge(graphdef, state)

    def step(carry: tuple[Int[Array, " batch"], KVCache], key: Key[Array, ""]):
        token, cache = carry
        hidden, cache = model.blocks(model.embed(token[:, None]), cache=cache, in_place=True)
        token = sample(model.head(hidden)[:, 0], key, **options)
        return (token, cache), token

    (token, cache), tokens = jax.lax.scan(step, (token, cache), keys)
    return token, cache, tokens.T


def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    on_tokens: Callable[[list[np.ndarray]], None] | None = None,
) -> list[np.ndarray]:
    """Continues every prompt by up to `max_new_tokens` tokens.

    Prompts may differ in length; lengths of about one size share what is compiled. Tokens are
    decoded in chunks on the device, and the host looks for stop tokens in a chunk when the next one
    is queued already, so the device never waits for it. At most one chunk is computed in vain, and
    none of it shows.

    Args:
        model: A model of this package, dense, masked, sparse or `inference_model`'s.
        prompts: Token ids, at least one a prompt.
        max_new_tokens: At most so many tokens a prompt.
        temperature: 0 takes the likeliest token; greater values draw.
        top_k: Draws from so many of the likeliest tokens; None from all.
        top_p: Draws from the smallest set of likeliest tokens of this probability; after `top_k`,
            see `sample`.
        seed: Of the draws.
        stop_tokens: A row ends before the first of these.
        on_tokens: Called after every chunk with each row's new tokens.

    Returns:
        For each prompt the new tokens, without prompt and without stop token.

    Raises:
        ValueError: An empty prompt, ids outside the vocabulary, options out of their range, or
            prompt and new tokens longer than the model's context.
        TypeError: Prompts that are not sequences of token ids.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    rows = len(prompts)
    tokens, lengths = columns_of(prompts, model.config)
    chunks = -(-(max_new_tokens - 1) // CHUNK)
    graphdef, state = split_once(model)
    options = {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    keys = jax.random.split(jax.random.key(seed), 1 + chunks * CHUNK)
    token, cache = prefill(
        graphdef,
        state,
        tokens,
        lengths,
        keys[0],
        max_length=slots_of(tokens.shape[1], chunks),
        **options,
    )
    stops = np.array(sorted(stop_tokens), np.int32)
    finished = np.zeros(rows, bool)
    parts: list[list[np.ndarray]] = [[] for _ in range(rows)]

    def take(new: np.ndarray) -> None:
        fresh = []
        for row in range(rows):
            kept = new[row, : 0 if finished[row] else None]
            ends = np.flatnonzero(np.isin(kept, stops))
            if ends.size:
                kept, finished[row] = kept[: ends[0]], True
            parts[row].append(kept)
            fresh.append(kept)
        if on_tokens is not None:
            on_tokens(fresh)

    queued = token[:, None]
    for chunk in range(chunks):
        some = keys[1 + chunk * CHUNK : 1 + (chunk + 1) * CHUNK]
        token, cache, new = decode(graphdef, state, token, cache, some, **options)
        take(np.asarray(queued))
        queued = new[:, : max_new_tokens - 1 - chunk * CHUNK]
        if finished.all():
            break
    else:
        take(np.asarray(queued))
    return [np.concatenate(part) for part in parts]


def columns_of(
    prompts: Sequence[Sequence[int]], config: Any
) -> tuple[Int[Array, "batch seq"], Int[Array, ""] | Int[Array, " batch"]]:
    """Prompts as `prefill` takes them: their tokens, with others behind them, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    step = max(1, (1 << (longest - 1).bit_length()) // FINENESS)
    columns = min(-(-longest // step) * step, config.longest_alike(longest))
    tokens = np.zeros((len(prompts), columns), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    one = lengths.min() == longest
    return jnp.asarray(tokens), jnp.asarray(lengths[0] if one else lengths)


def slots_of(columns: int, chunks: int) -> int:
    """Slots of a cache for a prompt of so many columns and the tokens behind it."""
    return -(-(columns + chunks * CHUNK) // SLOTS) * SLOTS


def _check(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    if not prompts:
        raise ValueError("generate needs at least one prompt.")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
            raise TypeError(
                f"Prompt {index} is {prompt!r}; each prompt is a sequence of token ids, such as "
                f"[[1, 2, 3]]. Text has to go through the tokenizer first."
            )
        if len(prompt) == 0:
            raise ValueError(
                f"Prompt {index} has no token; generate continues at least one. For an empty "
                f"prompt give the tokenizer's BOS or EOS token."
            )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if temperature < 0 or not np.isfinite(temperature):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or greater.")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k is {top_k}; it must be a whole number of at least 1, or left out.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]. 1 keeps every token.")
    vocab_size = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        least, greatest = min(prompt), max(prompt)
        if least < 0 or greatest >= vocab_size:
            raise ValueError(
                f"Prompt {index} has ids from {least} to {greatest}; the model's vocabulary has "
                f"ids 0 to {vocab_size - 1}."
            )
    context = model.config.max_position_embeddings
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    tokens = len(prompts[longest])
    if tokens + max_new_tokens > context:
        room = context - tokens
        raise ValueError(
            f"Prompt {longest} has {tokens} tokens, which with {max_new_tokens} new ones take "
            f"{tokens + max_new_tokens} positions; the model's context has {context}. Shorten the "
            f"prompt" + (f", or ask for at most {room} new tokens." if room > 0 else ".")
        )
