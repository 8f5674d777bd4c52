"""Decoding through the cache gives the logits of the whole sequence."""

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
from flax import nnx

from esparse_jax.models.cache import init_cache
from esparse_jax.models.llama import LlamaConfig

FIELDS = llama_cases.CASES["gqa"]
LENGTH = 12


def jitted_step(model):
    """A decode step with its weights outside and its cache donated; counts its traces."""
    graphdef, state = nnx.split(model)
    traces = []

    def step(state, ids, cache):
        traces.append(ids.shape)
        return nnx.merge(graphdef, state)(ids, cache=cache)

    return jax.jit(step, donate_argnums=2), state, traces


@pytest.mark.gpu
def test_decoding_is_the_full_forward_pass():
    model = llama_cases.build(FIELDS)
    ids = jnp.asarray(llama_cases.tokens("gqa", LENGTH))
    truth, error = llama_cases.torch_logits("gqa", LENGTH)
    step, state, traces = jitted_step(model)

    cache = init_cache(model.config, 1, LENGTH + 4, dtype=model.dtype)
    logits, cache = step(state, ids[:, :5], cache)
    collected = [logits]
    for at in range(5, LENGTH):
        before = cache
        logits, cache = step(state, ids[:, at : at + 1], cache)
        collected.append(logits)
        assert all(keys.is_deleted() for keys in before.keys)
    assert traces == [(1, 5), (1, 1)]
    assert int(cache.length) == LENGTH
    together = jnp.concatenate(collected, axis=1)
    llama_cases.assert_rounding_only(together, llama_cases.our_logits("gqa", LENGTH), error)
    llama_cases.assert_rounding_only(together[:, -llama_cases.STORED :], truth, error)


def test_a_prompt_can_be_read_in_chunks():
    model = llama_cases.build(FIELDS)
    ids = jnp.asarray(llama_cases.tokens("gqa", LENGTH))
    _, error = llama_cases.torch_logits("gqa", LENGTH)
    cache, parts = init_cache(model.config, 1, LENGTH, dtype=model.dtype), []
    for chunk in (ids[:, :4], ids[:, 4:8], ids[:, 8:]):
        logits, cache = llama_cases.run(model, chunk, cache=cache)
        parts.append(logits)
    whole = llama_cases.our_logits("gqa", LENGTH)
    llama_cases.assert_rounding_only(jnp.concatenate(parts, axis=1), whole, error)


def test_rows_of_different_lengths_decode_as_if_alone():
    model = llama_cases.build(FIELDS)
    _, error = llama_cases.torch_logits("gqa", LENGTH)
    prompts = [llama_cases.tokens(case, length)[0] for case, length in (("mha", 7), ("gqa", 3))]
    padding = jnp.array([7 - len(prompt) for prompt in prompts])
    padded = np.zeros((2, 7), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, 7 - len(prompt) :] = prompt
    following = np.array([[3, 9], [50, 1]], np.int32)  # [step, row]

    step, state, _ = jitted_step(model)
    cache = init_cache(model.config, 2, 10, dtype=model.dtype, padding=padding)
    logits, cache = step(state, jnp.asarray(padded), cache)
    last = [logits[:, -1]]
    for ids in following:
        logits, cache = step(state, jnp.asarray(ids)[:, None], cache)
        last.append(logits[:, -1])
    assert bool(jnp.isfinite(jnp.stack(last)).all())

    for row, prompt in enumerate(prompts):
        alone = np.zeros(9, np.int32)  # what stands behind is not seen
        alone[: len(prompt) + 2] = np.concatenate([prompt, following[:, row]])
        alone = llama_cases.run(model, alone[None])[0]
        for at, logits in enumerate(last):
            llama_cases.assert_rounding_only(logits[row], alone[len(prompt) - 1 + at], error)


def test_positions_count_from_each_rows_start():
    config = LlamaConfig.from_dict(FIELDS)
    cache = init_cache(config, 2, 6, dtype=jnp.float32, padding=jnp.array([0, 2]))
    assert cache.max_length == 6
    layer = cache.layer(1)
    np.testing.assert_array_equal(layer.positions(3), [[0, 1, 2], [-2, -1, 0]])
    np.testing.assert_array_equal(layer.key_positions()[1], [-2, -1, 0, 1, 2, 3])
    new = jnp.ones((2, 3, config.num_key_value_heads, config.head_dim))
    layer = layer.append(new, 2 * new)
    np.testing.assert_array_equal(layer.positions(1), [[3], [1]])
    np.testing.assert_array_equal(layer.keys[0, :, 0], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(layer.values[-1, :, 3], [2, 2, 2, 0, 0, 0])


def test_rows_that_begin_at_one_slot_are_moved_to_end_at_one():
    config = LlamaConfig.from_dict(FIELDS)
    cache = init_cache(config, 3, 5, dtype=jnp.float32)
    numbers = jnp.arange(cache.keys[0].size, dtype=jnp.float32).reshape(cache.keys[0].shape)
    cache = cache._replace(keys=(numbers, *cache.keys[1:]), values=(-numbers, *cache.values[1:]))
    moved = jax.jit(lambda cache, lengths: cache.aligned(lengths))(cache, jnp.array([3, 1, 2]))
    assert int(moved.length) == 3
    np.testing.assert_array_equal(moved.start, [0, 2, 1])
    heads = config.num_key_value_heads
    for row, start in enumerate(moved.start):
        for head in range(row * heads, (row + 1) * heads):
            kept = slice(0, 3 - int(start))
            np.testing.assert_array_equal(moved.keys[0][head, start:3], numbers[head, kept])
            np.testing.assert_array_equal(moved.values[0][head, start:3], -numbers[head, kept])


def test_the_cache_may_be_narrower_than_the_model():
    model = llama_cases.build(FIELDS)
    cache = init_cache(model.config, 1, LENGTH, dtype=jnp.bfloat16)
    logits, cache = llama_cases.run(model, llama_cases.tokens("gqa", LENGTH), cache=cache)
    assert {keys.dtype for keys in cache.keys} == {jnp.dtype("bfloat16")}
    exact = llama_cases.our_logits("gqa", LENGTH)
    # Keys and values are rounded to eight bits; through two layers that is a few roundings.
    bound = 8 * float(jnp.finfo(jnp.bfloat16).eps) * float(jnp.abs(exact).max())
    assert float(jnp.abs(logits - exact).max()) < bound


def test_grouped_heads_are_not_repeated():
    """No array of a decode step is as large as the cache repeated for every query head."""
    model = llama_cases.build(FIELDS)
    config, slots = model.config, 512
    graphdef, state = nnx.split(model)
    cache = init_cache(config, 1, slots, dtype=model.dtype)
    jaxpr = jax.make_jaxpr(lambda state, ids, cache: nnx.merge(graphdef, state)(ids, cache=cache))(
        state, jnp.zeros((1, 1), jnp.int32), cache
    )

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for value in equation.outvars:
                yield value.aval.size
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
            ):
                if hasattr(inner, "jaxpr"):
                    yield from sizes(inner.jaxpr)

    largest = max(sizes(jaxpr.jaxpr))
    assert largest == slots * config.num_key_value_heads * config.head_dim


@pytest.mark.parametrize("padding", [None, [0, 0], [2, 0]])
def test_an_empty_cache_is_not_read(padding):
    """A prompt into an empty cache: the same tokens, cache and logits, no table over all slots."""
    model = llama_cases.build(FIELDS)
    _, error = llama_cases.torch_logits("gqa", LENGTH)
    ids = jnp.asarray(llama_cases.tokens("gqa", 6, batch=2))
    padding = None if padding is None else jnp.array(padding)
    cache = init_cache(model.config, 2, 256, dtype=model.dtype, padding=padding)
    graphdef, state = nnx.split(model)

    def read(state, ids, cache, empty):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.blocks(model.embed(ids), cache=cache, empty=empty)
        return model.head(hidden), cache

    jitted = jax.jit(read, static_argnums=3)
    (ours, written), (expected, also) = (jitted(state, ids, cache, e) for e in (True, False))
    real = np.arange(6) >= (np.zeros(2, int) if padding is None else np.asarray(padding))[:, None]
    llama_cases.assert_rounding_only(ours[real], expected[real], error)
    assert jax.tree.structure(written) == jax.tree.structure(also)
    assert int(written.length) == 6
    heads = model.config.num_key_value_heads
    for a, b in zip(written.keys, also.keys, strict=True):
        np.testing.assert_allclose(
            np.asarray(a.reshape(2, heads, 256, -1).swapaxes(1, 2)[:, :6])[real],
            np.asarray(b.reshape(2, heads, 256, -1).swapaxes(1, 2)[:, :6])[real],
            rtol=1e-4,
            atol=1e-5,
        )
    for empty in (True, False):
        text = jitted.lower(state, ids, cache, empty).as_text()
        table = "tensor<2x2x2x6x{}xf32>"  # batch, kv_head, group, query, key
        assert (table.format(6) in text) == empty
        assert (table.format(256) in text) != empty


def test_misuse_is_explained():
    model = llama_cases.build(FIELDS)
    ids = jnp.asarray(llama_cases.tokens("gqa", 6))
    cache = init_cache(model.config, 1, 4, dtype=model.dtype)
    with pytest.raises(ValueError, match="4 slots and was given 6 tokens at once"):
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="positions or a cache, not both"):
        model(ids[:, :2], positions=jnp.arange(2)[None], cache=cache)
    with pytest.raises(ValueError, match="batch=0, max_length=4"):
        init_cache(model.config, 0, 4, dtype=model.dtype)
