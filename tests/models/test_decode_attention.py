"""The attention of a decode step: the CUDA kernel's own source run on the host, what XLA is given,
and on an NVIDIA GPU the kernel itself."""

import ctypes
import dataclasses
import functools
import re

import host_build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esparse_jax import native
from esparse_jax.inference.generate import CHUNK, decode, prefill
from esparse_jax.models import _ffi_attention, llama
from esparse_jax.models.cache import LayerCache
from esparse_jax.models.llama import LlamaConfig, decode_attention, rotary_angles, rotary_attention
from esparse_jax.models.random_model import random_model
from esparse_jax.sparse import exportable


def _config(kv_heads: int, shared: int, features: int) -> LlamaConfig:
    heads = kv_heads * shared
    config = LlamaConfig(64, heads * features, 64, 1, heads, num_key_value_heads=kv_heads)
    return dataclasses.replace(config, head_dim=features)


def _operands(config, batch, slots, length, start, dtype="float16", seed=0):
    """Projections, and a cache whose slots behind `length` hold nan."""
    random = np.random.default_rng(seed)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = (heads + 2 * kv_heads) * config.head_dim
    projected = random.standard_normal((batch, width)).astype(np.float32)
    held = random.standard_normal((2, batch * kv_heads, slots, config.head_dim)).astype(np.float32)
    held[:, :, length:] = np.nan
    start = None if start is None else jnp.asarray(start, jnp.int32)
    keys, values = jnp.asarray(held, dtype)
    return jnp.asarray(projected, dtype), LayerCache(keys, values, jnp.int32(length), start)


def _plain(config, projected, cache):
    """By XLA's products, in float32, with numbers for the nan."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    cuts = np.array([heads, heads + kv_heads]) * config.head_dim
    query, key, value = (x[:, None] for x in jnp.split(projected, cuts, axis=1))
    cache = cache._replace(
        keys=jnp.nan_to_num(cache.keys.astype(jnp.float32)),
        values=jnp.nan_to_num(cache.values.astype(jnp.float32)),
    )
    attended, cache = rotary_attention(config, query, key, value, cache=cache)
    return attended[:, 0], cache


def _check(got, written, want, wanted, length, rounding):
    error = np.linalg.norm(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    # The reference rounds its result, and the weights of the values in 16 bits.
    assert error < 2 * rounding * np.linalg.norm(np.asarray(want, np.float64))
    for mine, theirs in zip(written, (wanted.keys, wanted.values), strict=True):
        filled = min(length + 1, mine.shape[1])
        mine, theirs = (np.asarray(x, np.float32) for x in (mine, theirs))
        before, new = slice(0, filled - 1), slice(filled - 1, filled)
        np.testing.assert_array_equal(mine[:, before], theirs[:, before])
        # Rotated with or without fused multiplications, and so rounded to one number or the next.
        apart = np.abs(mine[:, new] - theirs[:, new])
        assert np.all(apart <= 2 * rounding * np.abs(theirs[:, new]) + 1e-6)
        assert np.mean(apart > 0) < 0.01
        assert np.all(np.isnan(mine[:, filled:]))


# ---- the kernel's source, on the host


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    host_build.require_float16()
    file = tmp_path_factory.mktemp("attention") / "attention.so"
    host_build.build(file, "cuda/testing/attention_on_host.cc")
    return ctypes.CDLL(str(file)).esparse_attend_on_host


@pytest.mark.parametrize(
    ("batch", "kv_heads", "shared", "features", "slots", "length", "start", "cluster"),
    [
        (1, 2, 1, 128, 300, 217, None, 1),
        (1, 1, 1, 128, 1100, 1024, None, 4),
        (1, 1, 1, 64, 700, 699, [5], 8),
        (2, 1, 2, 64, 200, 150, [3, 140], 4),
        (3, 2, 4, 64, 200, 150, [0, 149, 20], 4),
        (2, 1, 8, 128, 90, 77, [0, 76], 1),
        (2, 1, 4, 128, 40, 0, None, 4),  # nothing before the token
        (1, 2, 1, 64, 40, 40, None, 4),  # no slot left: the last one is overwritten
        (1, 2, 1, 64, 1, 7, None, 4),
        (2, 1, 1, 64, 50, 30, [-3, 0], 1),
        (1, 1, 1, 128, 1100, 1024, None, 8),
        (1, 1, 8, 128, 90, 77, [5], 4),
        (1, 1, 8, 64, 90, 77, [5], 8),
    ],
)
@pytest.mark.parametrize(("prefetch", "ordered"), [(False, False), (True, False), (True, True)])
def test_the_kernels_source_computes_the_attention(
    on_host, batch, kv_heads, shared, features, slots, length, start, cluster, prefetch, ordered
):
    """Whatever stands where its inputs will be, until the kernel before has ended."""
    config = _config(kv_heads, shared, features)
    projected, cache = _operands(config, batch, slots, length, start)
    plain_start = None if start is None else jnp.maximum(cache.start, 0)
    want, wanted = _plain(config, projected, cache._replace(start=plain_start))
    angles = rotary_angles(config.rope, features, cache._replace(start=plain_start).positions(1))
    cosines, sines = (np.array(x, np.float32).reshape(-1, features // 2) for x in angles)
    arrays = [np.array(x) for x in (projected, cache.keys, cache.values, cosines, sines)]
    arrays += [None if start is None else np.asarray(start, np.int32)]
    width = kv_heads * shared * features
    places = np.random.default_rng(1).permutation(width).astype(np.int32) if ordered else None
    arrays += [places]
    attended = np.full((batch, width), np.nan, np.float16)

    def pointer(array):
        return None if array is None else array.ctypes.data_as(ctypes.c_void_p)

    for early_length in (length, 0, -1, 10**6) if prefetch else (-1,):
        status = on_host(
            batch, kv_heads, shared, features, slots, cosines.shape[0], cluster,
            int(prefetch), length, early_length, *map(pointer, arrays), pointer(attended),
        )  # fmt: skip
        assert status == 0
        natural = attended[:, places] if ordered else attended
        _check(natural, arrays[1:3], want, wanted, length, np.finfo(np.float16).eps)
        attended[...] = np.nan


# ---- what XLA is given


def test_without_a_gpu_it_is_the_plain_attention():
    config = _config(2, 2, 64)
    projected, cache = _operands(config, 3, 20, 7, [0, 2, 5])
    cache = cache._replace(keys=jnp.nan_to_num(cache.keys), values=jnp.nan_to_num(cache.values))
    got, written = jax.jit(functools.partial(decode_attention, config))(projected, cache)
    query, key, value = (x[:, None] for x in jnp.split(projected, [256, 384], axis=1))
    want, wanted = jax.jit(functools.partial(rotary_attention, config))(
        query, key, value, cache=cache
    )
    np.testing.assert_array_equal(got, want[:, 0])
    for mine, theirs in zip(written, wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_its_result_goes_to_the_places_that_are_named():
    config = _config(2, 2, 64)
    projected, cache = _operands(config, 3, 20, 7, None)
    cache = cache._replace(keys=jnp.nan_to_num(cache.keys), values=jnp.nan_to_num(cache.values))
    natural, _ = decode_attention(config, projected, cache)
    order = jax.random.permutation(jax.random.key(1), natural.shape[1])
    got, _ = decode_attention(config, projected, cache, places=jnp.argsort(order))
    np.testing.assert_array_equal(got, natural[:, order])


@pytest.mark.skipif(not native.has_cuda(), reason="the extension has no CUDA part")
def test_it_lowers_for_cuda_to_a_call_that_writes_the_cache_in_place(monkeypatch):
    monkeypatch.setattr(_ffi_attention, "_runs", lambda: True)
    config = _config(2, 4, 128)
    for start in (None, [0, 1]):
        projected, cache = _operands(config, 2, 20, 7, start)
        places = jnp.arange(8 * 128, dtype=jnp.int32)
        step = jax.jit(functools.partial(decode_attention, config, places=places, prefetch=True))
        with exportable():
            traced = step.trace(projected, cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert native.extension().CUDA_ATTEND_TARGET in text
        assert text.count("#stablehlo.output_operand_alias<") == 2
        assert f"has_start = {str(start is not None).lower()}" in text
        assert "has_places = true" in text
        assert "dot_general" not in text
        on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "dot_general" in on_cpu


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "shared", "features", "takes"),
    [
        ("float16", 8, 4, 128, True),
        ("bfloat16", 8, 8, 64, True),
        ("float32", 8, 4, 128, False),
        ("float16", 2, 3, 128, False),
        ("float16", 2, 16, 128, False),
        ("float16", 2, 1, 80, False),
    ],
)
def test_what_the_kernel_takes(monkeypatch, dtype, kv_heads, shared, features, takes):
    monkeypatch.setattr(_ffi_attention, "_runs", lambda: True)
    heads = kv_heads * shared
    assert _ffi_attention.attend_takes(dtype, heads, kv_heads, features) == takes
    assert not _ffi_attention.attend_takes("float16", 5, 2, 128)


def test_a_cache_of_another_dtype_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(llama, "attend_takes", lambda *_: pytest.fail("it was asked"))
    config = _config(2, 1, 64)
    projected, cache = _operands(config, 1, 20, 7, None)
    decode_attention(config, projected.astype(jnp.bfloat16), cache)


# ---- on an NVIDIA GPU


needs_kernel = pytest.mark.skipif(
    not _ffi_attention._runs(), reason="no NVIDIA GPU of compute capability 9.0, or no CUDA part"
)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("shared", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "slots", "length", "start"),
    [
        (1, 2, 300, 217, None),
        (1, 8, 2100, 2048, [5]),
        (5, 32, 90, 77, [0, 1, 76, 77, 30]),
        (9, 32, 40, 33, None),
    ],
)
def test_the_kernel(batch, kv_heads, shared, features, slots, length, start, dtype):
    """In clusters of 8, 8, 4 and 1 blocks on an H200; the results of three in another order."""
    config = _config(kv_heads, shared, features)
    projected, cache = _operands(config, batch, slots, length, start, dtype)
    want, wanted = jax.jit(functools.partial(_plain, config))(projected, cache)
    places = None if kv_heads == 8 else jax.random.permutation(jax.random.key(0), want.shape[1])
    step = jax.jit(functools.partial(decode_attention, config), donate_argnums=1)
    got, written = step(projected, cache, places=places)
    if places is not None:
        got = got[:, places]
    rounding = float(jnp.finfo(dtype).eps)
    _check(got, (written.keys, written.values), want, wanted, length, rounding)
    assert int(written.length) == length + 1


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize(("kv_heads", "shuffle"), [(2, "free"), (8, "within")])
def test_a_model_decodes_the_same_with_and_without_overlap(kv_heads, shuffle):
    """A kernel that reads before the one before has written would show as other bits."""
    shape = LlamaConfig(512, 1024, 2752, 4, 8, num_key_value_heads=kv_heads)
    config = dataclasses.replace(shape, dtype="float16", max_position_embeddings=512)
    graphdef, state = nnx.split(random_model(config, form=None, shuffle=shuffle))
    greedy = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 90)), jnp.int32)
    keys = jax.random.split(jax.random.key(0), CHUNK)
    token, cache = prefill(
        graphdef, state, prompt, jnp.array([90, 83]), keys[0], max_length=300, **greedy
    )

    @jax.jit
    def step(state, token, cache):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.blocks(model.embed(token[:, None]), cache=cache)
        return jnp.argmax(model.head(hidden)[:, 0], axis=-1).astype(jnp.int32), cache

    want, alone = [], (token, jax.tree.map(jnp.copy, cache))
    for _ in range(CHUNK):
        alone = jax.block_until_ready(step(state, *alone))
        want.append(np.asarray(alone[0]))
    for _ in range(20):
        _, after, tokens = decode(
            graphdef, state, token, jax.tree.map(jnp.copy, cache), keys, **greedy
        )
        np.testing.assert_array_equal(tokens.T, want)
        for mine, theirs in zip(
            after.keys + after.values, alone[1].keys + alone[1].values, strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.gpu
@needs_kernel
def test_steps_in_a_loop_write_one_cache_in_place():
    """Recorded into a graph, with requests before the kernel before has ended."""
    config = _config(8, 1, 128)
    first, cache = _operands(config, 2, 64, 20, [0, 3])
    cache = cache._replace(keys=jnp.nan_to_num(cache.keys), values=jnp.nan_to_num(cache.values))

    def run(attention, projected, caches):
        def step(carry, _):
            projected, caches = carry
            written = []
            for one in caches:
                attended, one = attention(projected, one)
                projected = jnp.concatenate([attended, projected[:, 1024:]], axis=1)
                written.append(one)
            # Converted, since XLA would have a call write its part of a stacked result by itself,
            # and would then copy the cache for it.
            return (projected, written), attended.astype("float32")

        return jax.lax.scan(step, (projected, caches), None, length=30)

    kernel = jax.jit(
        functools.partial(run, functools.partial(decode_attention, config, prefetch=True)),
        donate_argnums=1,
    )

    def in_products(projected, cache):
        attended, written = _plain(config, projected, cache)
        as_before = (written.keys.astype("float16"), written.values.astype("float16"))
        return attended.astype("float16"), LayerCache(*as_before, *written[2:])

    plain = jax.jit(functools.partial(run, in_products))
    copies = [jax.tree.map(jnp.copy, cache) for _ in range(3)]
    (_, wanted), want = plain(first, copies)
    text = kernel.lower(first, copies).compile().as_text()
    bodies = re.findall(r"body=%?([\w.-]+)", text)
    (body,) = [
        part for part in text.split("\n\n") if part.strip().lstrip("%").startswith(bodies[0] + " ")
    ]
    assert body.count("custom-call(") == 3
    assert not [
        line for line in body.splitlines() if "= f16[16,64,128]" in line and " copy(" in line
    ]
    (_, written), got = kernel(first, copies)
    # Roundings feed the next step; 30 steps of three add up.
    for mine, theirs in zip((got, written[2].values), (want, wanted[2].values), strict=True):
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(theirs, np.float32), atol=2e-2
        )
