"""Attention against the formula, in every dtype; cuDNN's kernel where it may be taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esparse_jax.models import attention
from esparse_jax.models.attention import cached_attention, causal_attention, masked_attention

BATCH, SEQ, HEADS, KV_HEADS, FEATURES = 2, 7, 6, 2, 16


def operands(dtype, seq=SEQ, keys=SEQ):
    generator = np.random.default_rng(0)
    shapes = ((seq, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    return tuple(
        jnp.asarray(generator.standard_normal((BATCH, *shape, FEATURES)), dtype) for shape in shapes
    )


def matrices(x):
    """As a cache has them."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], FEATURES)


def slow(query, key, value, seen):
    """Float64, one query at a time. `seen`: [batch, query, key]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    result = np.zeros(query.shape)
    for batch, at, head in np.ndindex(query.shape[:3]):
        shared = head // (HEADS // KV_HEADS)
        places = np.flatnonzero(seen[batch, at])
        if not places.size:
            continue
        logits = key[batch, places, shared] @ query[batch, at, head] / np.sqrt(FEATURES)
        shares = np.exp(logits - logits.max())
        result[batch, at, head] = shares / shares.sum() @ value[batch, places, shared]
    return result


def assert_close(ours, exact, dtype):
    """Shares and result are rounded once each; inputs are exact."""
    bound = 4 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()
    assert np.abs(np.asarray(ours, np.float64) - exact).max() < bound


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("jitted", [False, True])
def test_each_form_follows_the_formula(dtype, jitted):
    wrap = jax.jit if jitted else lambda function: function
    query, key, value = operands(dtype)
    causal = np.tril(np.ones((SEQ, SEQ), bool))[None].repeat(BATCH, 0)
    assert_close(wrap(causal_attention)(query, key, value), slow(query, key, value, causal), dtype)

    padding = np.array([0, 3])
    positions = np.arange(SEQ)[None] - padding[:, None]
    seen = causal & (positions >= 0)[:, None]
    ours = wrap(masked_attention)(query, key, value, jnp.asarray(positions))
    assert bool(jnp.isfinite(ours).all())
    exact = slow(query, key, value, seen)
    real = positions >= 0
    assert_close(np.asarray(ours, np.float64)[real], exact[real], dtype)

    query, keys, values = operands(dtype, seq=2, keys=9)
    positions, slots = np.array([[5, 6], [3, 4]]), np.arange(9)[None] - np.array([[0], [2]])
    seen = (slots[:, None] <= positions[:, :, None]) & (slots >= 0)[:, None]
    ours = wrap(cached_attention)(
        query,
        matrices(keys),
        matrices(values),
        jnp.asarray(positions),
        jnp.asarray(slots),
    )
    assert_close(ours, slow(query, keys, values, seen), dtype)


@pytest.fixture
def asked_anew():
    """What is known of cuDNN is of this machine's, before and afterwards."""
    for known in (attention._refusal, attention.log_once):
        known.cache_clear()
    yield
    for known in (attention._refusal, attention.log_once):
        known.cache_clear()


def test_cudnn_is_for_cuda_alone_and_16_bit_prompts(monkeypatch, caplog, asked_anew):
    """The choice is made as if JAX ran on a GPU whose cuDNN takes every shape."""
    asked = []

    def stand_in(query, key, value):
        asked.append(query.shape)
        return jnp.tanh(query)

    monkeypatch.setattr(attention, "_cudnn", stand_in)
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")

    def lowered(dtype, seq, platform):
        traced = jax.jit(lambda *x: causal_attention(*x)).trace(*operands(dtype, seq, seq))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    least = attention._CUDNN_LEAST_TOKENS
    for dtype in (jnp.float16, jnp.bfloat16):
        assert "tanh" in lowered(dtype, least, "cuda")
        assert "dot_general" not in lowered(dtype, least, "cuda")
        assert "tanh" not in lowered(dtype, least, "cpu")
        assert "tanh" not in lowered(dtype, least - 1, "cuda")
    assert "tanh" not in lowered(jnp.float32, least, "cuda")
    assert set(asked) == {(BATCH, least, HEADS, FEATURES)}

    def refusing(query, key, value):
        raise NotImplementedError("The head dim must be <= 128")

    monkeypatch.setattr(attention, "_cudnn", refusing)
    attention._refusal.cache_clear()
    for _ in range(2):
        assert "dot_general" in lowered(jnp.float16, least, "cuda")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "The head dim must be <= 128" in lines[0]
