"""The inference model computes what the masked model does, and lowers to few kernels for CUDA."""

import functools
import gc
import inspect
import logging
import re

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
from flax import nnx
from lowering import lowered_for_cuda

from esparse_jax import generate
from esparse_jax.inference.generate import CHUNK, decode, prefill
from esparse_jax.models import _ffi_attention
from esparse_jax.models.cache import init_cache
from esparse_jax.models.fusion import (
    FORMS,
    inference_model,
    order_of_values,
    with_dense_linears,
)
from esparse_jax.models.layers import CompressedWeight, DenseLinear, SparseLinear
from esparse_jax.models.surgery import (
    get_linear,
    iter_linears,
    matches_path,
    replace_linears,
    set_linear,
    sparsify_model,
    weight_of,
    with_weight,
)
from esparse_jax.sparse import Blob24, _ffi_cuda, compressed24_of, decompress24, exportable

DECODE, CHAIN = "esparse_decode24_cuda_v4", "esparse_chain24_cuda_v3"
ATTEND = "esparse_attend_cuda_v2"
LAYERS = 2
FIELDS = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
MODELS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": True},
}

needs_build = pytest.mark.skipif(
    not _ffi_cuda.decode_available(), reason="the extension was built without its CUDA part"
)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Whole models again and again: nearly all the time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def shared_input(path: str) -> str:
    """Layers that read one input have one channel order."""
    if path.endswith(("q_proj", "k_proj", "v_proj")):
        return path.rsplit(".", 1)[0] + ".qkv"
    return path.replace("up_proj", "gate_proj")


def pruned(model, heads, *, skip=()):
    """The model with random weights kept 2 of 4 in random channel orders, and those orders.

    Args:
        heads: "free", "within" (o's order can be folded), "unlike" (inside heads, but query heads
            that share a key/value head are ordered differently), or "natural" (no order at all).
    """
    generator = np.random.default_rng(3)
    config = model.config
    size, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    orders, linears = {}, {}
    for path, linear in iter_linears(model):
        if path == "lm_head" or matches_path(path, skip):
            continue
        weight = np.array(weight_of(linear))
        order = generator.permutation(weight.shape[1]).astype(np.int32)
        if path.endswith("o_proj") and heads in ("within", "unlike"):
            count = config.num_attention_heads
            if heads == "within":
                inside = [generator.permutation(size) for _ in range(count // shared)]
                inside = [one for one in inside for _ in range(shared)]
            else:
                inside = [generator.permutation(size) for _ in range(count)]
            order = np.concatenate([i * size + one for i, one in enumerate(inside)])
        if heads == "natural":
            order = np.arange(weight.shape[1])
        order = orders.setdefault(shared_input(path), order.astype(np.int32))
        scores = generator.random((weight.shape[0], weight.shape[1] // 4, 4))
        dropped = np.empty(weight.shape, bool)
        dropped[:, order] = (scores.argsort(-1).argsort(-1) >= 2).reshape(weight.shape)
        weight[dropped] = 0
        linears[path] = with_weight(linear, jnp.asarray(weight, linear.kernel[...].dtype))
    permutations = {
        path: None if heads == "natural" else orders[shared_input(path)] for path in linears
    }
    return replace_linears(model, linears), permutations


@functools.cache
def models(case, dtype, heads):
    """The masked model and the same compressed."""
    model = llama_cases.build(FIELDS | MODELS[case] | {"torch_dtype": dtype})
    masked, orders = pruned(model, heads)
    return masked, sparsify_model(masked, orders)


def widened(model):
    """The same numbers, computed in float32."""
    config = llama_cases.LlamaConfig.from_dict(model.config.to_dict() | {"torch_dtype": "float32"})
    wide = nnx.eval_shape(lambda: llama_cases.LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    return wide


def relative(ours, exact):
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def assert_same_logits(ours, masked, ids):
    """As good as the masked model: at most one and a half times as far from its float32 logits."""
    exact = llama_cases.run(widened(masked), ids)
    got = llama_cases.run(ours, ids)
    if masked.dtype == jnp.float32:
        assert relative(got, exact) < 1e-5
        return
    plain = relative(llama_cases.run(masked, ids), exact)
    assert 0 < plain < 0.1
    assert relative(got, exact) < 1.5 * plain


def tokens(rows, length, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, FIELDS["vocab_size"], size=(rows, length), dtype=np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "heads"), [
    *(("device", heads) for heads in ("free", "within", "unlike", "natural")),
    ("portable", "free"), ("portable", "within"), ("dense", "within"),
])  # fmt: skip
@pytest.mark.parametrize(("case", "dtype"), [
    ("mha", "float16"), ("gqa", "bfloat16"), ("tied", "float16"), ("gqa", "float32"),
])  # fmt: skip
def test_logits_are_those_of_the_masked_model(case, dtype, heads, form):
    masked, sparse = models(case, dtype, heads)
    ours = inference_model(sparse, form=form)
    for rows, length in ((1, 13), (3, 11)):  # up to 16 rows, and more
        assert_same_logits(ours, masked, tokens(rows, length))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", ["free", "within"])
def test_decoding_gives_the_logits_of_the_whole_sequence(heads):
    """A padded prompt of more than 16 rows, then steps of 3 rows: both paths, one cache."""
    masked, sparse = models("gqa", "float16", heads)
    ours = inference_model(sparse, form="device")
    graphdef, state = nnx.split(ours)
    prompts = [tokens(1, length, seed=length)[0] for length in (12, 7, 9)]
    padding = np.array([12 - len(prompt) for prompt in prompts])
    padded = np.zeros((3, 12), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, padding[row] :] = prompt
    following = tokens(4, 3, seed=9)  # [step, row]
    cache = init_cache(ours.config, 3, 16, dtype=ours.dtype, padding=jnp.asarray(padding))

    @jax.jit
    def step(state, ids, cache):
        return nnx.merge(graphdef, state)(ids, cache=cache)

    logits, cache = step(state, jnp.asarray(padded), cache)
    steps = [logits[:, -1]]
    for ids in following:
        logits, cache = step(state, jnp.asarray(ids)[:, None], cache)
        steps.append(logits[:, 0])
    got = np.stack(steps)
    wide = widened(masked)
    for row, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, following[:, row]])[None]
        exact, plain = (llama_cases.run(m, whole)[0, -5:] for m in (wide, masked))
        assert relative(got[:, row], exact) < 1.5 * relative(plain, exact)


@pytest.mark.gpu
def test_greedy_text_is_the_masked_models():
    """200 tokens in float32, prompts of different lengths."""
    masked, sparse = models("gqa", "float32", "within")
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 17, 1)]
    texts = [
        generate(model, prompts, max_new_tokens=200)
        for model in (
            masked,
            sparse,
            inference_model(sparse),
            inference_model(sparse, form="dense"),
        )
    ]
    for text in texts[1:]:
        for ours, expected in zip(text, texts[0], strict=True):
            np.testing.assert_array_equal(ours, expected)


def lowered_step(model, rows, *, slots=64) -> str:
    """A step of `rows` rows of one token each."""
    graphdef, state = nnx.split(model)
    cache = init_cache(model.config, rows, slots, dtype=model.dtype)

    def step(state, ids, cache):
        return nnx.merge(graphdef, state)(ids, cache=cache)

    return lowered_for_cuda(step, state, jnp.zeros((rows, 1), jnp.int32), cache)


@needs_build
@pytest.mark.parametrize(
    ("heads", "gathers"), [("natural", 1), ("within", 2), ("free", 2 + LAYERS)]
)
@pytest.mark.parametrize("rows", [1, 16])
def test_a_step_is_one_chain_a_layer_on_cuda(rows, heads, gathers):
    """Gathers: of the embedding, after it for the first q/k/v, and of the attentions for o."""
    _, sparse = models("gqa", "float16", heads)
    text = lowered_step(inference_model(sparse, form="device"), rows)
    assert (text.count(CHAIN), text.count(DECODE)) == (LAYERS, 1)
    assert text.count("prefetch = true") == LAYERS + 1
    assert text.count('"stablehlo.gather"(') == gathers
    assert "stablehlo.scatter" not in text
    # The weights go from the arguments into the calls, and nowhere else; the head is dense.
    readers = {
        re.search(r"= (\S+) ?@?|call @|return|func", line).group(0)
        for line in text.splitlines()
        if "xui8>" in line and "func.func" not in line
    }
    assert all("custom_call" in reader for reader in readers), readers
    assert len(re.findall(r"stablehlo\.dot_general", text)) == 2 * LAYERS + 1


@needs_build
@pytest.mark.parametrize("heads", ["within", "free"])
def test_a_step_where_clusters_are_has_one_kernel_an_attention(monkeypatch, heads):
    """Which writes the order that o reads, so that nothing is gathered for it."""
    monkeypatch.setattr(_ffi_attention, "_runs", lambda: True)
    _, sparse = models("tied", "float16", heads)
    model = inference_model(sparse, form="device")
    text = lowered_step(model, 3)
    assert text.count("has_places = true") == (LAYERS if heads == "free" else 0)
    assert text.count('"stablehlo.gather"(') == 2
    assert "stablehlo.scatter" not in text
    assert (text.count(CHAIN), text.count(DECODE), text.count(ATTEND)) == (LAYERS, 1, LAYERS)
    assert len(re.findall(r"stablehlo\.dot_general", text)) == 1  # the head's
    # Only the weights may be read early: of the cache it is not known who wrote it.
    assert text.count("prefetch = true") == LAYERS + 1
    # In generate's loop nothing writes the cache but the attentions themselves.
    graphdef, state = nnx.split(model)
    cache = init_cache(model.config, 3, 64, dtype=model.dtype)
    keys = jax.random.split(jax.random.key(0), CHUNK)
    with exportable():
        traced = decode.trace(
            graphdef, state, jnp.zeros(3, jnp.int32), cache, keys,
            temperature=0.0, top_k=None, top_p=1.0,
        )  # fmt: skip
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{ATTEND}") == LAYERS
    assert text.count("prefetch = true") == 2 * LAYERS + 1


@needs_build
def test_more_rows_take_the_same_weights_one_product_at_a_time():
    _, sparse = models("gqa", "float16", "free")
    text = lowered_step(inference_model(sparse, form="device"), 17)
    assert CHAIN not in text
    assert DECODE not in text


FALLBACKS = {
    # name: (fields, what is not pruned, chains, decode calls, what the line says)
    "q dense": (
        {},
        ("q_proj",),
        LAYERS,
        0,
        r"2 of 2 layers .*: q_proj not compressed \(layers 0-1\)",
    ),
    "q of one layer dense": (
        {},
        ("model.layers.1.self_attn.q_proj",),
        LAYERS,
        1,
        r"1 of 2 layers .*: q_proj not compressed \(layers 1\)",
    ),
    "down dense": ({}, ("down_proj",), 0, LAYERS, r"down_proj not compressed"),
    "gate and o dense": ({}, ("gate_proj", "o_proj"), 0, LAYERS, r"gate_proj not compressed"),
    "biases": (
        {"attention_bias": True, "mlp_bias": True},
        (),
        0,
        0,
        r"q_proj, k_proj and v_proj with a bias .*; gate_proj with a bias",
    ),
    "gelu": ({"hidden_act": "gelu"}, (), 0, LAYERS, r"activation is gelu"),
    "sizes": (
        {"intermediate_size": 96},
        (),
        0,
        LAYERS,
        r"gate_proj has no device form \(its shape \(96, 128\) is not made of multiples of 64\)",
    ),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_cannot_be_fused_is_left_out_layer_by_layer(name, caplog):
    fields, skip, chains, calls, line = FALLBACKS[name]
    model = llama_cases.build(FIELDS | MODELS["gqa"] | {"torch_dtype": "float16"} | fields)
    masked, orders = pruned(model, "within", skip=skip)
    sparse = sparsify_model(masked, orders)
    with caplog.at_level(logging.WARNING, "esparse_jax.models.fusion"):
        ours = inference_model(sparse, form="device")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert re.search(line, lines[0]), lines
    for rows, length in ((1, 13), (2, 11)):
        assert_same_logits(ours, masked, tokens(rows, length))
    for form in ("portable", "dense"):
        assert_same_logits(inference_model(sparse, form=form), masked, tokens(2, 11))
    if _ffi_cuda.decode_available():
        text = lowered_step(ours, 1)
        assert text.count(CHAIN) == chains
        # Linears that are no part of a chain, but have a device form, are products of their own.
        assert text.count(DECODE) >= calls


def test_orders_that_differ_keep_q_k_v_apart(caplog):
    model = llama_cases.build(FIELDS | {"torch_dtype": "float16"})
    masked, orders = pruned(model, "natural")
    _, others = pruned(model, "free")
    path = "model.layers.1.self_attn.k_proj"
    weight = np.zeros((128, 128), np.float32)
    weight[:, others[path][::2]] = np.asarray(weight_of(get_linear(model, path)))[:, ::2]
    masked = replace_linears(
        masked, {path: with_weight(get_linear(model, path), jnp.asarray(weight, jnp.float16))}
    )
    ours = inference_model(sparsify_model(masked, orders | {path: others[path]}), form="device")
    assert "q_proj and k_proj and v_proj compressed in different channel orders (layers 1)" in (
        caplog.text
    )
    assert_same_logits(ours, masked, tokens(1, 13))


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (1e-5, False), (1e7, False)])
def test_gains_that_float16_has_no_room_for_stay_in_the_norm(scale, fits, caplog):
    model = llama_cases.build(FIELDS | {"torch_dtype": "float16"})
    norm = model.model.layers[1].input_layernorm
    norm.scale.set_value((norm.scale[...].astype(jnp.float32) * scale).astype(jnp.float32))
    masked, orders = pruned(model, "free")
    ours = inference_model(sparsify_model(masked, orders), form="device")
    kept = [layer.input_norm is not None for layer in ours.model.layers]
    assert kept == [False, not fits]
    assert ("gain of input_layernorm does not fit" in caplog.text) != fits
    if scale < 1e6:  # beyond, the masked model itself overflows
        assert_same_logits(ours, masked, tokens(1, 13))


def test_the_gain_is_folded_with_one_rounding():
    _, sparse = models("gqa", "float16", "free")
    ours = inference_model(sparse, form="device")
    layer = sparse.model.layers[0]
    linear = layer.self_attn.k_proj
    weight = np.asarray(decompress24(linear.weight.get_value()), np.float32)
    gain = np.asarray(layer.input_layernorm.scale[...], np.float32)[
        np.asarray(linear.permutation[...])
    ]
    qkv = ours.model.layers[0].qkv[0].weight.get_value()
    got = np.asarray(decompress24(compressed24_of(qkv)))[128 : 128 + 64]
    np.testing.assert_array_equal(got, (weight * gain).astype(np.float16))


def arrays(model):
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize("form", ["device", "portable"])
def test_no_weight_is_resident_twice(form):
    model = llama_cases.build(FIELDS | {"torch_dtype": "float16"})
    sparse = sparsify_model(*pruned(model, "within"))
    del model
    # Arrays of their own, so that what is dropped is gone.
    nnx.update(sparse, jax.tree.map(jnp.copy, nnx.state(sparse)))

    def live_bytes():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    compressed = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(sparse, CompressedWeight)))
    embedding = sparse.model.embed_tokens.embedding.get_value()
    start, live = live_bytes(), []
    ours = inference_model(
        sparse, form=form, consume=True, progress=lambda *_: live.append(live_bytes())
    )
    assert ours.model.embed_tokens.embedding.get_value() is embedding
    assert ours.lm_head is sparse.lm_head
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(ours, CompressedWeight)))
    assert weights == compressed  # 9/16 of the dense bytes, in either form
    assert weights == sum(
        linear.in_features * linear.out_features * 2 * 9 // 16
        for _, linear in iter_linears(ours)
        if isinstance(linear, SparseLinear)
    )
    # What each step takes it gives back, but for orders.
    assert len(live) == LAYERS
    assert max(live) < start + compressed // LAYERS // 4
    assert [type(layer) for layer in sparse.model.layers] == [nnx.Module] * LAYERS


def test_without_consume_the_given_model_stays():
    masked, sparse = models("gqa", "float16", "within")
    inference_model(sparse, form="device")
    assert_same_logits(sparse, masked, tokens(1, 13))
    ours = inference_model(sparse, form="device")
    blobs = [
        linear.weight.get_value() for _, linear in iter_linears(ours) if hasattr(linear, "weight")
    ]
    assert all(isinstance(blob, Blob24) for blob in blobs)
    assert len(blobs) == 4 * LAYERS


def test_the_dense_twin_takes_any_model():
    masked, sparse = models("gqa", "float16", "free")
    for model in (masked, sparse):
        twin = inference_model(model, form="dense")
        kinds = {type(linear) for layer in twin.model.layers for linear in (*layer.qkv, layer.o)}
        assert kinds == {DenseLinear}
        ids = tokens(1, 5)
        np.testing.assert_array_equal(
            llama_cases.run(twin, ids), llama_cases.run(inference_model(masked, form="dense"), ids)
        )


def test_an_inference_model_stays_what_it_is():
    _, sparse = models("gqa", "float16", "free")
    for form in FORMS:
        ours = inference_model(sparse, form=form)
        assert inference_model(ours, consume=True) is inference_model(ours, form=form) is ours
        assert len(ours.model.layers[0].qkv) > 0
    with pytest.raises(ValueError, match=r"of form 'dense' already, .* none of form 'portable'"):
        inference_model(ours, form="portable")
    with pytest.raises(ValueError, match="form is 'blob'"):
        inference_model(ours, form="blob")


def test_the_decode_loop_holds_no_weight_a_second_time():
    _, sparse = models("gqa", "float32", "free")
    ours = inference_model(sparse, form="portable")
    graphdef, state = nnx.split(ours)
    options = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
    keys = jax.random.split(jax.random.key(0), CHUNK)
    ids = jnp.ones((2, 8), jnp.int32)
    jax.config.update("jax_disable_most_optimizations", False)
    token, cache = prefill(graphdef, state, ids, None, keys[0], max_length=64, **options)
    compiled = decode.lower(graphdef, state, token, cache, keys, **options).compile()
    jax.config.update("jax_disable_most_optimizations", True)
    memory = compiled.memory_analysis()
    weights = [linear.weight.get_value().nbytes for _, linear in iter_linears(ours.model)]
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < min(weights)
    held = {tuple(leaf.shape) for leaf in jax.tree.leaves(state) if leaf.ndim == 2}
    held |= {tuple(leaf.shape) for leaf in cache.keys}
    moved = re.findall(r"\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text())
    assert not held & {tuple(map(int, shape.split(","))) for shape in moved}


@pytest.mark.parametrize(("order", "expected"), [
    ([1, 0, 3, 2, 4, 5, 6, 7], [1, 0, 2, 3]),
    ([0, 1, 2, 3, 5, 4, 7, 6], [0, 1, 3, 2]),
    ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3]),
    ([1, 0, 2, 3, 4, 5, 6, 7], None),  # heads that share keys and values ordered differently
    ([0, 2, 1, 3, 4, 5, 6, 7], None),  # a channel leaves its head
    ([2, 3, 0, 1, 4, 5, 6, 7], None),  # heads change places
])  # fmt: skip
def test_the_order_of_heads_is_told_from_the_permutation(order, expected):
    """Four query heads of two features; the first two share keys and values, and the others."""
    got = order_of_values(np.array(order), num_heads=4, num_kv_heads=2)
    assert (None if got is None else got.tolist()) == expected


def test_mistakes_are_explained():
    masked, sparse = models("gqa", "float16", "free")
    with pytest.raises(ValueError, match="no compressed layer, so there is nothing to gain"):
        inference_model(masked)
    with pytest.raises(ValueError, match="form is 'blob'; it must be one of device, portable"):
        inference_model(sparse, form="blob")
    device = inference_model(sparse, form="device")
    linear = device.model.layers[0].o
    with pytest.raises(TypeError, match="multiplied in its own dtype, float16; got dtype=float32"):
        SparseLinear(linear.weight.get_value(), dtype=jnp.float32)
    blobs = nnx.clone(sparse)
    set_linear(blobs.model.layers[0], "self_attn.o_proj", SparseLinear(linear.weight.get_value()))
    with pytest.raises(TypeError, match=r"self_attn\.o_proj holds a Blob24; .* Compressed24"):
        inference_model(blobs)


@pytest.mark.parametrize("biased", [False, True])
def test_compressed_linears_become_dense_as_they_were(biased):
    fields = FIELDS | MODELS["gqa"] | {"torch_dtype": "float32", "attention_bias": biased}
    masked, orders = pruned(llama_cases.build(fields), "free", skip=("up_proj",))
    sparse = sparsify_model(masked, orders)
    for ours, theirs in zip(sparse.model.layers, masked.model.layers, strict=True):
        assert with_dense_linears(ours) is ours
        assert nnx.graphdef(ours) == nnx.graphdef(theirs)
        for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (ours, theirs)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_path_is_told_to_be_loaded_first():
    untyped = inspect.unwrap(inference_model)  # the annotations refuse it first
    with pytest.raises(TypeError, match=r"takes a model; got str\. Load it first, with load_model"):
        untyped("small")
