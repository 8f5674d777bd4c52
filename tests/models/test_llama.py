"""The LLaMA modules and their configuration; parity with committed logits of PyTorch."""

import json

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
from flax import nnx

from esparse_jax.models.llama import (
    PRUNED_GROUPS,
    LlamaConfig,
    LlamaForCausalLM,
    RopeConfig,
    rope_frequencies,
    rotary_angles,
    rotate,
)

SMALL = llama_cases.CASES["gqa"]


@pytest.mark.parametrize(("case", "length"), llama_cases.RUNS)
def test_logits_are_pytorchs(case, length):
    truth, error = llama_cases.torch_logits(case, length)
    ours = llama_cases.our_logits(case, length)[:, -llama_cases.STORED :]
    llama_cases.assert_rounding_only(ours, truth, error)


def test_the_pieces_are_the_model():
    graphdef, state = nnx.split(llama_cases.build(SMALL))

    @jax.jit
    def by_pieces(state, ids):
        model = nnx.merge(graphdef, state)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        hidden = model.embed(ids)
        for layer in model.model.layers:
            hidden = layer(hidden, positions)
        return model.head(hidden)

    truth, error = llama_cases.torch_logits("gqa", 12)
    logits = by_pieces(state, jnp.asarray(llama_cases.tokens("gqa", 12)))
    llama_cases.assert_rounding_only(logits[:, -llama_cases.STORED :], truth, error)


def test_left_padding_changes_nothing():
    model = llama_cases.build(SMALL)
    _, error = llama_cases.torch_logits("gqa", 12)
    long, short = llama_cases.tokens("gqa", 12)[0], llama_cases.tokens("mha", 8)[0]
    padded = np.stack([long, np.concatenate([np.zeros(4, np.int32), short])])
    positions = jnp.arange(12)[None] - jnp.array([0, 4])[:, None]
    logits = llama_cases.run(model, padded, positions=positions)
    assert bool(jnp.isfinite(logits).all())
    alone = llama_cases.run(model, short[None])[0]
    llama_cases.assert_rounding_only(logits[1, 4:], alone, error)
    llama_cases.assert_rounding_only(logits[0], llama_cases.our_logits("gqa", 12)[0], error)


def test_later_tokens_do_not_reach_back():
    ids = llama_cases.tokens("gqa", 12)
    changed = ids.copy()
    changed[0, 5:] = (ids[0, 5:] + 1) % 61
    before = llama_cases.our_logits("gqa", 12)
    after = llama_cases.run(llama_cases.build(SMALL), changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert bool((before[:, 5:] != after[:, 5:]).any())


def test_permuting_hidden_channels_of_an_mlp_leaves_the_logits():
    named = llama_cases.weights(SMALL)
    order = np.random.default_rng(1).permutation(SMALL["intermediate_size"])
    for index in range(2):
        mlp = f"model.layers.{index}.mlp"
        for name in (f"{mlp}.gate_proj", f"{mlp}.up_proj"):
            named[f"{name}.weight"] = named[f"{name}.weight"][order]
            named[f"{name}.bias"] = named[f"{name}.bias"][order]
        named[f"{mlp}.down_proj.weight"] = named[f"{mlp}.down_proj.weight"][:, order]
    truth, error = llama_cases.torch_logits("gqa", 12)
    logits = llama_cases.run(llama_cases.build(SMALL, named), llama_cases.tokens("gqa", 12))
    llama_cases.assert_rounding_only(logits[:, -llama_cases.STORED :], truth, error)


def test_grouped_heads_equal_repeated_heads():
    named = llama_cases.weights(SMALL)
    for name, value in named.items():
        if "k_proj" in name or "v_proj" in name:
            heads = value.reshape(2, 16, -1)
            named[name] = np.repeat(heads, 2, axis=0).reshape(64, *value.shape[1:])
    model = llama_cases.build({**SMALL, "num_key_value_heads": 4}, named)
    truth, error = llama_cases.torch_logits("gqa", 12)
    logits = llama_cases.run(model, llama_cases.tokens("gqa", 12))
    llama_cases.assert_rounding_only(logits[:, -llama_cases.STORED :], truth, error)


def test_compute_and_parameter_dtypes_are_separate():
    model = llama_cases.build(SMALL, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    ids = jnp.asarray(llama_cases.tokens("gqa", 6))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    hidden = jax.eval_shape(model.embed, ids)
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(model.model.layers[0], hidden).dtype == jnp.bfloat16
    assert jax.eval_shape(model, ids).dtype == jnp.float32


def test_dtype_defaults_to_the_checkpoints():
    config = LlamaConfig.from_dict({**SMALL, "dtype": "bfloat16"})
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}


def test_a_model_can_be_described_without_memory():
    config = LlamaConfig(32000, 4096, 11008, 2, 32, dtype="float16")
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + (
        2 * 32000 * 4096 + 4096
    )


def test_every_decoder_linear_is_in_one_pruned_group():
    layer = llama_cases.build(SMALL).model.layers[0]
    linears = {
        f"{block}.{name}"
        for block in ("self_attn", "mlp")
        for name, child in vars(getattr(layer, block)).items()
        if isinstance(child, nnx.Linear)
    }
    named = [path for group in PRUNED_GROUPS for path in group]
    assert set(named) == linears
    assert len(named) == len(linears)


def test_rotation_keeps_lengths_and_depends_on_distance():
    rope, key = RopeConfig(), jax.random.key(0)
    query, other = jax.random.normal(key, (2, 1, 1, 1, 16))

    def turned(x, position):
        return rotate(x, *rotary_angles(rope, 16, jnp.array([[position]])))

    np.testing.assert_allclose(
        jnp.linalg.norm(turned(query, 9)), jnp.linalg.norm(query), rtol=4 * np.finfo("f").eps
    )
    near = jnp.vdot(turned(query, 5), turned(other, 2))
    far = jnp.vdot(turned(query, 25), turned(other, 22))
    bound = 30 * np.finfo("f").eps * jnp.linalg.norm(query) * jnp.linalg.norm(other)
    assert abs(near - far) <= bound
    assert abs(near - jnp.vdot(turned(query, 5), turned(other, 4))) > 1000 * bound


def test_scaled_ropes_are_the_plain_one_inside_their_first_length():
    plain = rope_frequencies(RopeConfig(), 16)
    np.testing.assert_allclose(plain, 10000.0 ** -(np.arange(8) / 8.0), rtol=2 * np.finfo("f").eps)
    dynamic = RopeConfig("dynamic", factor=4.0, original_max_position_embeddings=32)
    np.testing.assert_allclose(
        rope_frequencies(dynamic, 16, jnp.int32(32)), plain, rtol=16 * np.finfo("f").eps
    )
    assert np.all(rope_frequencies(dynamic, 16, jnp.int32(64))[1:] < plain[1:])
    long = RopeConfig(
        "longrope",
        original_max_position_embeddings=32,
        short_factor=(1.0,) * 8,
        long_factor=(4.0,) * 8,
    )
    np.testing.assert_array_equal(rope_frequencies(long, 16, jnp.int32(32)), plain)
    np.testing.assert_array_equal(rope_frequencies(long, 16, jnp.int32(33)), plain / 4)


def test_old_and_new_spellings_are_one_configuration():
    sizes = {name: SMALL[name] for name in SMALL if name not in ("rope_parameters", "dtype")}
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    old = LlamaConfig.from_dict(
        {
            **sizes,
            "rope_theta": 500000,
            "rope_scaling": {"type": "llama3", **scaling},
            "torch_dtype": "float16",
        }
    )
    new = LlamaConfig.from_dict(
        {
            **sizes,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
            "dtype": "float16",
        }
    )
    assert old == new
    assert hash(old) == hash(new)
    assert new.rope.theta == 500000.0
    assert new.dtype == "float16"


@pytest.mark.parametrize("case", llama_cases.CASES)
def test_configurations_survive_json(case):
    config = LlamaConfig.from_dict({**llama_cases.CASES[case], "eos_token_id": [2, 7]})
    assert config.eos_token_id == (2, 7)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_left_out_fields_have_transformers_defaults():
    sizes = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig.from_dict(sizes)
    assert config == LlamaConfig(8, 16, 24, 1, 2)
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (2, 8, 1e-6)
    assert config.rope == RopeConfig()


def test_harmless_fields_are_accepted():
    config = LlamaConfig.from_dict(
        {
            **SMALL,
            "pretraining_tp": 4,
            "attention_dropout": 0.1,
            "use_cache": False,
            "transformers_version": "4.31.0",
            "quantization_config": None,
            "pruned_heads": {},
            "max_length": 20,
        }
    )
    assert config == LlamaConfig.from_dict(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; .*'llama'"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"sliding_window": 4096}, r"may change its outputs: sliding_window=4096\. Remove"),
        ({"logit_scale": 0.5, "clip_qkv": 8}, "clip_qkv=8, logit_scale=0.5"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"quantization_config": {"bits": 4}}, "quantization_config: the weights are stored in"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "brings its own code"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported; it must be one of silu"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported.*float32"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads; got 4 and 3"),
        ({"hidden_size": 62}, "hidden_size 62 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim is 15; .* must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs .*factor"),
        ({"rope_parameters": {"rope_type": "default", "spin": 1}}, "Unknown rope field.* spin"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, "different rotary settings for full"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "must be positive"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 numbers; it needs one for each pair of features, 8",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                }
            },
            "needs low_freq_factor < high_freq_factor; got 4.0 and 1.0",
        ),
    ],
)
def test_configurations_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**SMALL, **change})
