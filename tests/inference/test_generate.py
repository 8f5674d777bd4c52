import importlib
import re

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
from flax import nnx

from esparse_jax import generate
from esparse_jax.inference.generate import (
    CHUNK,
    HashedOnce,
    columns_of,
    decode,
    prefill,
    sample,
    split_once,
)
from esparse_jax.models import LlamaConfig, LlamaForCausalLM

# The name of the file is that of the function in the room.
generate_file = importlib.import_module("esparse_jax.inference.generate")

FIELDS = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
PROMPTS = [[1, 2, 3], [5], [7, 8]]
COUNT = CHUNK + 4


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(LlamaConfig.from_dict(FIELDS), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=COUNT)


def assert_follows(model, prompt, tokens):
    """Each token is the likeliest one after those before it, by the model without a cache."""
    whole = [*prompt, *tokens.tolist()]
    padded = whole + [0] * (FIELDS["max_position_embeddings"] - len(whole))  # one compilation
    logits = llama_cases.run(model, jnp.asarray([padded]))[0, len(prompt) - 1 : len(whole) - 1]
    np.testing.assert_array_equal(tokens, np.asarray(logits).argmax(axis=-1))


def test_greedy_tokens_are_those_of_the_model_without_a_cache(model, greedy):
    for prompt, tokens in zip(PROMPTS, greedy, strict=True):
        assert len(tokens) == COUNT
        assert_follows(model, prompt, tokens)


def test_steps_are_compiled_once_for_prompts_of_about_one_length(model):
    generate(model, [[1, 2, 3]], max_new_tokens=COUNT)
    compiled = decode._cache_size()
    for length in (1, 4, 20):
        prompt = list(range(length))
        (tokens,) = generate(model, [prompt], max_new_tokens=COUNT)
        assert_follows(model, prompt, tokens)
    assert decode._cache_size() == compiled


def _columns(longest, config):
    tokens, _ = columns_of([[1] * longest], config)
    return tokens.shape[1]


def _assert_greedy(model, prompts, count=CHUNK + 1):
    for prompt, tokens in zip(prompts, generate(model, prompts, max_new_tokens=count), strict=True):
        assert_follows(model, prompt, tokens)


def test_prompts_of_about_one_length_are_read_by_one_function(model):
    """With tokens too many behind them, which nothing sees."""
    lengths = {longest: _columns(longest, model.config) for longest in range(1, 65)}
    assert all(lengths[n] == n for n in range(1, 17))
    assert all(n <= lengths[n] < 1.125 * n for n in lengths)
    assert len(set(lengths.values())) == 16 + 8 + 8
    random = np.random.default_rng(0)

    def prompts(*lengths):
        return [random.integers(0, 31, n).tolist() for n in lengths]

    for others in ((), (0,), (-9,)):  # a row alone, two of one length, two of different lengths
        _assert_greedy(model, prompts(33, *(33 + other for other in others)))
        compiled = prefill._cache_size()
        for longest in (34, 36):
            _assert_greedy(model, prompts(longest, *(longest + other for other in others)))
        assert prefill._cache_size() == compiled
        _assert_greedy(model, prompts(37, *(37 + other for other in others)))
        assert prefill._cache_size() == compiled + 1


def test_a_prompt_stays_inside_the_context(model):
    context = FIELDS["max_position_embeddings"]
    _assert_greedy(model, [[1] * (context - 1)], count=1)
    config = LlamaConfig.from_dict(FIELDS | {"max_position_embeddings": 61})
    assert _columns(60, config) == 60
    assert _columns(61, config) == 61
    assert _columns(70, config) == 70  # more than the context: nobody refuses it here


def test_a_prompt_keeps_the_angles_of_its_length():
    scaling = {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [8.0, 3.0],
        "original_max_position_embeddings": 33,
    }
    config = LlamaConfig.from_dict(FIELDS | {"rope_scaling": scaling})
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for longest, columns in ((33, 33), (34, 36)):  # short factors, long ones
        assert _columns(longest, config) == columns
        rows = random.integers(0, 31, (8, longest))
        expected = np.asarray(model(jnp.asarray(rows)))[:, -1].argmax(axis=-1)
        tokens = generate(model, rows.tolist(), max_new_tokens=1)
        np.testing.assert_array_equal(np.concatenate(tokens), expected)
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    config = LlamaConfig.from_dict(FIELDS | dynamic)
    assert _columns(33, config) == 36
    assert config.longest_alike(65) == 65


def test_rows_end_before_their_stop_token_and_chunks_are_streamed(model, greedy):
    stop = int(greedy[0][5])
    chunks = []
    stopped = generate(
        model, PROMPTS, max_new_tokens=COUNT, stop_tokens=[stop], on_tokens=chunks.append
    )
    for tokens, whole in zip(stopped, greedy, strict=True):
        ends = np.flatnonzero(whole == stop)
        np.testing.assert_array_equal(tokens, whole[: ends[0]] if ends.size else whole)
    for row, tokens in enumerate(stopped):
        np.testing.assert_array_equal(np.concatenate([chunk[row] for chunk in chunks]), tokens)


def recorded(model, monkeypatch, **options) -> list[str]:
    """The order in which chunks are queued and looked at."""
    events = []
    queue = generate_file.decode

    def decode(*arguments, **options):
        events.append("queue")
        return queue(*arguments, **options)

    monkeypatch.setattr(generate_file, "decode", decode)
    generate(model, PROMPTS, on_tokens=lambda _: events.append("look"), **options)
    return events


def test_a_chunk_is_queued_before_the_one_before_is_looked_at(model, greedy, monkeypatch):
    events = recorded(model, monkeypatch, max_new_tokens=2 * CHUNK + 5)
    assert events == ["queue", "look", "queue", "look", "queue", "look", "look"]
    assert recorded(model, monkeypatch, max_new_tokens=1) == ["look"]


def test_at_most_one_chunk_is_computed_in_vain(model, greedy, monkeypatch):
    first = [int(tokens[0]) for tokens in greedy]
    events = recorded(model, monkeypatch, max_new_tokens=3 * CHUNK, stop_tokens=first)
    assert events == ["queue", "look"]


def test_one_row_does_not_wait_for_padding_of_the_others(model, greedy):
    """Rows of one length have no padding, which is another trace; the tokens are the same."""
    for prompt, together in zip(PROMPTS, greedy, strict=True):
        (alone,) = generate(model, [prompt], max_new_tokens=COUNT)
        np.testing.assert_array_equal(alone, together)


def test_a_model_that_was_split_is_hashed_and_compared_once(monkeypatch):
    # Of a shape of its own: an equal model of another test, in the cache of `prefill`, may be
    # compared with it as well, wherever their places in that table collide.
    config = LlamaConfig.from_dict(FIELDS | {"vocab_size": 29})
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    done = {"__hash__": 0, "__eq__": 0}
    for name in done:
        true = getattr(nnx.GraphDef, name)

        def counted(*given, name=name, true=true):
            done[name] += 1
            return true(*given)

        monkeypatch.setattr(nnx.GraphDef, name, counted)
    graphdef, state = split_once(model)
    options = {"max_length": 9, "temperature": 0.0, "top_k": None, "top_p": 1.0}
    arguments = (state, jnp.ones((1, 7), jnp.int32), None, jax.random.key(0))
    compiled = prefill._cache_size()
    first, _ = prefill(graphdef, *arguments, **options)
    prefill(graphdef, *arguments, **options)
    assert done == {"__hash__": 1, "__eq__": 0}
    again, _ = split_once(model)
    assert again is not graphdef
    for _ in range(3):
        token, _ = prefill(again, *arguments, **options)
        np.testing.assert_array_equal(first, token)
    assert done == {"__hash__": 2, "__eq__": 1}
    assert prefill._cache_size() == compiled + 1
    assert (again, hash(again)) == (graphdef, hash(graphdef))
    other = LlamaForCausalLM(
        LlamaConfig.from_dict(FIELDS | {"num_hidden_layers": 1}), rngs=nnx.Rngs(0)
    )
    assert split_once(other)[0] != graphdef
    assert graphdef != graphdef.graphdef
    assert HashedOnce(nnx.split(model)[0]) == graphdef


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_decode_loop_updates_its_cache_in_place(rows, dtype):
    fields = FIELDS | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
    config = LlamaConfig.from_dict(fields | {"torch_dtype": dtype})
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    options = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
    keys = jax.random.split(jax.random.key(0), CHUNK)
    tokens = jnp.ones((rows, 8), jnp.int32)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        token, cache = prefill(graphdef, state, tokens, None, keys[0], max_length=4096, **options)
        compiled = decode.lower(graphdef, state, token, cache, keys, **options).compile()
        memory = compiled.memory_analysis()
        _, after, _ = decode(graphdef, state, token, cache, keys, **options)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert all(array.is_deleted() for array in (*cache.keys, *cache.values))
    assert memory.alias_size_in_bytes >= after.nbytes
    shape = ",".join(map(str, after.keys[0].shape))
    copies = re.findall(rf"{shape}\]\S* copy\(", compiled.as_text())
    assert copies == []
    weights = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state) if leaf.ndim == 2}
    moved = re.findall(r"\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text())
    assert not weights & set(moved)
    if dtype == "float32":
        assert memory.temp_size_in_bytes < after.keys[0].nbytes / 2


def test_draws_repeat_with_their_seed_and_differ_with_another(model):
    options = {"max_new_tokens": COUNT, "temperature": 1.5, "top_p": 0.9}
    first, again = (generate(model, PROMPTS, seed=3, **options) for _ in range(2))
    other = generate(model, PROMPTS, seed=4, **options)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    probability = np.array([0.4, 0.1, 0.3, 0.2])
    logits = jnp.tile(jnp.log(jnp.asarray(probability, jnp.float32))[None], (4000, 1))
    for top_p, allowed in ((0.35, {0}), (0.6, {0, 2}), (0.75, {0, 2, 3}), (1.0, {0, 1, 2, 3})):
        drawn = np.asarray(sample(logits, jax.random.key(0), temperature=1.0, top_p=top_p))
        assert set(drawn.tolist()) == allowed
        share = np.bincount(drawn, minlength=4) / len(drawn)
        expected = np.where(np.isin(np.arange(4), list(allowed)), probability, 0)
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
    assert (np.asarray(sample(logits, jax.random.key(0))) == 0).all()


def test_top_k_comes_after_the_temperature_and_before_top_p():
    probability = np.array([0.4, 0.1, 0.3, 0.2])
    logits = jnp.tile(jnp.log(jnp.asarray(probability, jnp.float32))[None], (4000, 1))

    def drawn(**options) -> np.ndarray:
        return np.asarray(sample(logits, jax.random.key(0), **options))

    for top_k, allowed in ((1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (4, range(4)), (9, range(4))):
        tokens = drawn(temperature=1.0, top_k=top_k)
        expected = np.where(np.isin(np.arange(4), allowed), probability, 0)
        share = np.bincount(tokens, minlength=4) / len(tokens)
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
    # The two likeliest are 0.57 and 0.43 of their sum: top-p counts those, not 0.4 and 0.3.
    assert set(drawn(temperature=1.0, top_k=2, top_p=0.5)) == {0}
    assert set(drawn(temperature=1.0, top_k=2, top_p=0.6)) == {0, 2}
    assert set(drawn(temperature=1.0, top_p=0.5)) == {0, 2}
    # At temperature 0.5 the likeliest of all four is 0.16 / 0.3 = 0.53, and 0.4 at 1.
    assert set(drawn(temperature=0.5, top_p=0.5)) == {0}
    # Without effect where nothing is drawn.
    assert set(drawn(temperature=0.0, top_k=3, top_p=0.5)) == {0}


def test_of_equal_logits_the_lower_id_is_in_top_k_and_in_the_nucleus():
    logits = jnp.tile(jnp.array([[0.0, 1.0, 1.0, 1.0, -1.0]]), (500, 1))
    for options, allowed in (({"top_k": 2}, {1, 2}), ({"top_p": 0.5}, {1, 2}), ({"top_k": 1}, {1})):
        tokens = np.asarray(sample(logits, jax.random.key(1), temperature=1.0, **options))
        assert set(tokens.tolist()) == allowed


def test_top_k_of_one_is_greedy(model, greedy):
    drawn = generate(model, PROMPTS, max_new_tokens=COUNT, temperature=2.0, top_k=1)
    for ours, expected in zip(drawn, greedy, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "Prompt 1 has no token"),
        ([[1], [1] * 60], {"max_new_tokens": 5}, "Prompt 1 has 60 tokens.*at most 4 new tokens"),
        ([[1] * 70], {}, r"Prompt 0 has 70 tokens.*Shorten the prompt\.$"),
        ([[31]], {}, r"Prompt 0 has ids from 31 to 31; .* 0 to 30"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_k": 0}, "top_k is 0; it must be a whole number of at least 1, or left out"),
        ([[1] * 60], {"max_new_tokens": 5}, "take 65 positions; .* 64.* at most 4 new"),
    ],
)
def test_bad_input_is_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **({"max_new_tokens": 4} | options))
