"""Perplexity of a causal language model: a jitted step, a Python loop outside."""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log likelihood), how many tokens were predicted, and the wall time."""

    perplexity: float
    tokens: int
    seconds: float


@partial(jax.jit, static_argnums=0)
def _negative_log_likelihood(graphdef, state, windows: Int[Array, "batch seq"]) -> Float[Array, ""]:
    logits = nnx.merge(graphdef, state)(windows)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).sum()


def perplexity(
    model: nnx.Module,
    windows: Int[np.ndarray, "sample seq"],
    *,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """How well the model predicts the windows: exp of the mean over all predicted tokens.

    The rule: a text is tokenised once, cut into consecutive windows of the sequence length, the
    remainder dropped (`files.data.evaluation_windows`). Every window starts from an empty context,
    so it holds length - 1 predictions; the mean runs over all predictions of all windows, in
    float32 within a batch and float64 over batches. How the text becomes tokens (`raw` or
    `published`) is said in `files.data.read_text_tokens`.

    Args:
        model: Any model of this package, dense, masked or sparse.
        windows: Token ids, one window a row.
        batch_size: Windows a step; the last, smaller batch is a second compilation.
        progress: Called with (windows done, windows in all).

    Raises:
        ValueError: No window, or windows too short to predict anything, or longer than the model's
            context.
        FloatingPointError: The model gave a loss that is not finite.

    Source: E-Sparse, section 5.1, perplexity on WikiText; the window rule of the published tables.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(
            f"perplexity needs windows [sample, seq] with at least one sample of two tokens; "
            f"got shape {tuple(windows.shape)}. A text shorter than one window gives none: use a "
            f"smaller sequence length or a longer text."
        )
    context = model.config.max_position_embeddings
    if windows.shape[1] > context:
        raise ValueError(
            f"The windows have {windows.shape[1]} tokens and the model's context {context}. Take "
            f"a sequence length of at most that."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    started = time.perf_counter()
    graphdef, state = nnx.split(model)
    total, samples = 0.0, windows.shape[0]
    for start in range(0, samples, batch_size):
        batch = jnp.asarray(windows[start : start + batch_size], jnp.int32)
        total += float(_negative_log_likelihood(graphdef, state, batch))
        if progress is not None:
            progress(min(start + batch_size, samples), samples)
    tokens = samples * (windows.shape[1] - 1)
    if not math.isfinite(total):
        raise FloatingPointError(
            f"The loss over {tokens} tokens is {total}: the model's logits are not finite. Look "
            f"for NaN or Inf in the weights, or evaluate in a wider dtype (dtype='float32')."
        )
    mean = total / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, tokens, time.perf_counter() - started)
