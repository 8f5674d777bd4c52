"""Attention: of tokens among themselves, and of the next tokens over a cache.

Softmax is in float32 whatever the dtype, and key/value heads that several query heads share are
never repeated.
"""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LOGGER = logging.getLogger(__name__)

_CUDNN_DTYPES = ("float16", "bfloat16")
# For fewer tokens the table of logits is small, and so is what a fused kernel could save.
_CUDNN_LEAST_TOKENS = 128


def causal_attention(
    query: Float[Array, "batch seq head feature"],
    key: Float[Array, "batch seq kv_head feature"],
    value: Float[Array, "batch seq kv_head feature"],
) -> Float[Array, "batch seq head feature"]:
    """Each token attends to itself and to those before it; no row has padding.

    On NVIDIA GPUs this is cuDNN's fused kernel, which never writes the table of logits, for 16-bit
    numbers, where cuDNN takes the shape. Elsewhere XLA's products.
    """

    def plain(query, key, value):
        positions = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
        return masked_attention(query, key, value, positions)

    if not _cudnn_takes(query, key, value):
        return plain(query, key, value)
    return jax.lax.platform_dependent(query, key, value, cuda=_cudnn, default=plain)


def _cudnn(query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def _cudnn_takes(query: Array, key: Array, value: Array) -> bool:
    """Whether this machine's cuDNN computes it."""
    if jax.default_backend() != "gpu" or query.dtype.name not in _CUDNN_DTYPES:
        return False
    if query.shape[1] < _CUDNN_LEAST_TOKENS:
        return False
    refusal = _refusal(tuple((x.shape, x.dtype.name) for x in (query, key, value)))
    if refusal is not None:
        log_once(f"attention by XLA in place of cuDNN, slower for long prompts: {refusal}")
    return refusal is None


@functools.cache
def _refusal(operands: tuple[tuple[tuple[int, ...], str], ...]) -> str | None:
    """Why cuDNN does not take these shapes and dtypes; jax refuses some, cuDNN itself others."""
    try:
        jax.jit(_cudnn).lower(*itertools.starmap(jax.ShapeDtypeStruct, operands)).compile()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error)
    return None


@functools.cache
def log_once(line: str) -> None:
    """Says why an attention takes a slower way than it might."""
    _LOGGER.warning("%s", line)


def masked_attention(
    query: Float[Array, "batch seq head feature"],
    key: Float[Array, "batch seq kv_head feature"],
    value: Float[Array, "batch seq kv_head feature"],
    positions: Int[Array, "#batch seq"],
) -> Float[Array, "batch seq head feature"]:
    """Each token attends to those at 0 <= position <= its own: rows with padding, or any order."""
    features = query.shape[3]

    def matrices(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(-1, x.shape[1], features)

    return cached_attention(query, matrices(key), matrices(value), positions, positions)


def cached_attention(
    query: Float[Array, "batch seq head feature"],
    keys: Float[Array, "batch_head slot feature"],
    values: Float[Array, "batch_head slot feature"],
    positions: Int[Array, "#batch seq"],
    key_positions: Int[Array, "#batch slot"],
) -> Float[Array, "batch seq head feature"]:
    """The next tokens attend to a cache that holds them already.

    Query heads that share a key/value head are rows of one product with it, so the cache is read
    once, as it lies.

    Args:
        query: Rotated queries.
        keys, values: Of the cache, see `KVCache`.
        positions: Of the queries.
        key_positions: Of the slots; a query sees those at 0 <= position <= its own.
    """
    batch, seq, heads, features = query.shape
    matrices, slots, _ = keys.shape
    kv_heads = matrices // batch
    shared = heads // kv_heads
    rows = query.reshape(batch, seq, kv_heads, shared, features).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(matrices, shared * seq, features)
    logits = _product(rows, keys.astype(query.dtype), contract=2)
    logits = logits * jnp.asarray(features**-0.5, logits.dtype)
    before = key_positions[:, None, :] <= positions[:, :, None]
    seen = (before & (key_positions >= 0)[:, None, :])[:, None, None]
    # A row of padding sees nothing: with the least finite number its softmax is even, not nan.
    logits = logits.reshape(batch, kv_heads, shared, seq, slots)
    logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    shares = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    shares = shares.reshape(matrices, shared * seq, slots)
    attended = _product(shares, values.astype(query.dtype), contract=1).astype(query.dtype)
    attended = attended.reshape(batch, kv_heads, shared, seq, features).transpose(0, 3, 1, 2, 4)
    return attended.reshape(query.shape)


def _product(
    rows: Float[Array, "matrix row inner"],
    matrices: Float[Array, "matrix a b"],
    *,
    contract: int,
) -> Float[Array, "matrix row outer"]:
    """A product with each matrix, summed in float32 over one of its axes."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    axes = (((2,), (contract,)), ((0,), (0,)))

    def product(rows, matrices):
        return jax.lax.dot_general(rows, matrices, axes, preferred_element_type=wide)

    def product_cpu(rows, matrices):
        # XLA's CPU backend (jax 0.10.2) compiles some 16-bit products and refuses to run them.
        return product(rows.astype(wide), matrices.astype(wide))

    return jax.lax.platform_dependent(rows, matrices, cpu=product_cpu, default=product)
