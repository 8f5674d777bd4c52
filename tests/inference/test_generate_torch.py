"""Greedy text against transformers' own (needs torch)."""

import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch_llama import torch_llama  # noqa: E402

from esparse_jax import generate, inference_model, sparsify_model  # noqa: E402
from esparse_jax.models.surgery import iter_linears, weight_of  # noqa: E402

FIELDS = llama_cases.CASES["llama3"] | {"max_position_embeddings": 512}
NEW = 200


def test_greedy_text_is_that_of_transformers():
    """Of a 2:4 model: dense here, compressed here, dense there; prompts of different lengths."""
    named = llama_cases.weights(FIELDS)
    for name, weight in named.items():
        if name.startswith("model.layers") and weight.ndim == 2:
            weight.reshape(weight.shape[0], -1, 4)[..., :2] = 0
    model = llama_cases.build(FIELDS, named)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 61, size=length).tolist() for length in (9, 4, 1)]
    theirs = torch_llama(FIELDS, named, torch.float32)
    expected = [
        theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].numpy()
        for prompt in prompts
    ]
    pruned = [path for path, _ in iter_linears(model) if path != "lm_head"]
    assert all(not jnp.any(weight_of(dict(iter_linears(model))[path])[:, :2]) for path in pruned)
    sparse = sparsify_model(model, dict.fromkeys(pruned))
    for ours in (model, inference_model(sparse)):
        for tokens, text in zip(generate(ours, prompts, max_new_tokens=NEW), expected, strict=True):
            assert len(text) == NEW
            np.testing.assert_array_equal(tokens, text)
