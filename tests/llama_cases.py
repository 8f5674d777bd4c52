"""Small LLaMA configurations and their weights, made the same way on every machine.

Shared by the parity tests and by `make_llama_logits.py`, which writes what PyTorch computes for
them to `data/llama_logits.npz` for machines without PyTorch.
"""

import functools
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esparse_jax.models.llama import (
    PARAMETER_NAMES,
    TRANSPOSED,
    LlamaConfig,
    LlamaForCausalLM,
)

LOGITS = pathlib.Path(__file__).parent / "data" / "llama_logits.npz"

_BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}

# name -> the contents of a config.json, in the old and the new spelling
CASES = {
    "mha": {**_BASE, "rope_theta": 10000.0, "torch_dtype": "float32", "pretraining_tp": 2},
    "gqa": {
        **_GROUPED,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "dtype": "float32",
    },
    "tied": {
        **_BASE,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "dtype": "float32",
    },
    "linear": {**_GROUPED, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {
        **_GROUPED,
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "llama3": {
        **_GROUPED,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn": {
        **_GROUPED,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
        },
    },
    "yarn_mscale": {
        **_GROUPED,
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "truncate": False,
        },
    },
    "longrope": {
        **_GROUPED,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
            "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}

SEQUENCE = 40
SHORT_SEQUENCE = 12  # within the original length of every scaled case
STORED = 8  # last tokens whose logits are committed

# The scalings that look at the sequence's length run inside their first length as well.
RUNS = (
    *((case, SEQUENCE) for case in CASES),
    *((case, SHORT_SEQUENCE) for case in ("gqa", "dynamic", "longrope")),
)


def tokens(case: str, length: int = SEQUENCE, batch: int = 1) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(case.encode()))
    return generator.integers(0, CASES[case]["vocab_size"], size=(batch, length), dtype=np.int32)


def weights(fields: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by checkpoint name, [out, channel]; each name has its own stream."""
    shapes = _shapes(LlamaConfig.from_dict(fields))
    result = {}
    for name, shape in shapes.items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = generator.standard_normal(shape)
        if name.endswith("norm.weight"):
            drawn = 1.0 + 0.2 * drawn
        else:
            drawn = drawn * (0.1 if name.endswith("bias") else 1.2 / np.sqrt(shape[-1]))
        result[name] = drawn.astype(np.float32)
    return result


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        linears = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if config.mlp_bias if name.startswith("mlp") else config.attention_bias:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def build(fields: dict, named: dict[str, np.ndarray] | None = None, **kinds) -> LlamaForCausalLM:
    """Our model with those weights (drawn by `weights` when not given)."""
    named = weights(fields) if named is None else named
    config = LlamaConfig.from_dict(fields)
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), **kinds))
    unused = set(named)
    flat = nnx.to_flat_state(nnx.state(model))
    for path, variable in flat:
        name = ".".join(map(str, (*path[:-1], PARAMETER_NAMES[path[-1]])))
        value = named[name].T if path[-1] in TRANSPOSED else named[name]
        assert variable.shape == value.shape, name
        variable.set_value(jnp.asarray(value, variable.dtype))
        unused.remove(name)
    assert not unused
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, ids, **options):
    return nnx.merge(graphdef, state)(ids, **options)


def run(model: nnx.Module, ids, **options):
    """`model(ids, **options)`, jitted; models of one configuration share the compilation."""
    return _forward(*nnx.split(model), jnp.asarray(ids), **options)


@functools.cache
def our_logits(case: str, length: int = SEQUENCE) -> np.ndarray:
    return np.asarray(run(build(CASES[case]), tokens(case, length)))


@functools.cache
def torch_logits(case: str, length: int = SEQUENCE) -> tuple[np.ndarray, float]:
    """PyTorch's float64 logits of the last `STORED` tokens, and its float32 rounding error."""
    with np.load(LOGITS) as arrays:
        return arrays[f"{case}/{length}/float64"], float(arrays[f"{case}/{length}/error"])


def assert_rounding_only(ours, truth, error: float) -> None:
    """Our float32 numbers are as good as PyTorch's: within three times its error of the truth."""
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    assert ours.shape == truth.shape
    difference = np.abs(ours - truth).max()
    assert difference <= 3 * error, (difference, error)
    assert difference <= 1e-5 * np.abs(truth).max(), (difference, np.abs(truth).max())
