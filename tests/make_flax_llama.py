"""Writes `data/flax_llama.npz`: parameters of transformers' own FlaxLlama, ids and its logits.

transformers 5 has no Flax models any more, so this runs in an environment of its own (Python 3.11):

    pip install transformers==4.46.3 jax==0.4.30 jaxlib==0.4.30 flax==0.8.5 "numpy<2" "scipy<1.13"
    python tests/make_flax_llama.py

The file holds each parameter under `params/` and its place in the pytree, `config` (the fields of
config.json, JSON as text), `input_ids` and `logits`.
"""

import json
import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import FlaxLlamaForCausalLM, LlamaConfig

FIELDS = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "initializer_range": 0.2,  # logits of ordinary size: the default's are close to 0
}


def main() -> None:
    config = LlamaConfig(**FIELDS)
    model = FlaxLlamaForCausalLM(config, seed=0)
    generator = np.random.default_rng(0)
    leaves = flatten_dict(jax.tree_util.tree_map(np.asarray, model.params), sep="/")
    for name, value in leaves.items():
        if (
            value.ndim == 1
        ):  # norms start at 1 everywhere, which would hide one put in the wrong place
            leaves[name] = generator.uniform(0.5, 1.5, value.shape).astype(np.float32)
    ids = generator.integers(0, config.vocab_size, size=(2, 24), dtype=np.int32)
    logits = model(ids, params=unflatten_dict(leaves, sep="/")).logits
    path = pathlib.Path(__file__).parent / "data" / "flax_llama.npz"
    np.savez_compressed(
        path,
        config=np.array(json.dumps(FIELDS | {"model_type": "llama"})),
        input_ids=ids,
        logits=np.asarray(logits),
        **{f"params/{name}": value for name, value in leaves.items()},
    )
    print(f"{path}: {path.stat().st_size} bytes, largest logit {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
