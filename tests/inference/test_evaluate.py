import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esparse_jax import perplexity
from esparse_jax.models import LlamaConfig, LlamaForCausalLM

FIELDS = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}
WINDOWS = np.random.default_rng(0).integers(0, 31, size=(5, 9), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(LlamaConfig.from_dict(FIELDS), rngs=nnx.Rngs(0))


def test_perplexity_is_exp_of_the_mean_over_all_predictions(model):
    logits = np.asarray(model(jnp.asarray(WINDOWS)), np.float64)[:, :-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_probability, WINDOWS[:, 1:, None], axis=-1)
    seen = []
    result = perplexity(model, WINDOWS, batch_size=2, progress=lambda *step: seen.append(step))
    assert result.tokens == 5 * 8
    assert result.perplexity == pytest.approx(math.exp(-chosen.mean()), rel=1e-5)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert perplexity(model, WINDOWS, batch_size=5).perplexity == pytest.approx(
        result.perplexity, rel=1e-5
    )


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model):
    ignorant = nnx.clone(model)
    ignorant.lm_head.kernel.set_value(jnp.zeros_like(ignorant.lm_head.kernel[...]))
    assert perplexity(ignorant, WINDOWS).perplexity == pytest.approx(31, rel=1e-5)


def test_bad_input_is_named(model):
    context = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"{context + 1} tokens and .* context {context}"):
        perplexity(model, np.zeros((1, context + 1), np.int32))
    with pytest.raises(ValueError, match=r"two tokens; got shape \(0, 9\)"):
        perplexity(model, WINDOWS[:0])
    with pytest.raises(ValueError, match=r"got shape \(5, 1\)"):
        perplexity(model, WINDOWS[:, :1])
    with pytest.raises(ValueError, match="batch_size is 0"):
        perplexity(model, WINDOWS, batch_size=0)
    broken = nnx.clone(model)
    broken.lm_head.kernel.set_value(jnp.full_like(broken.lm_head.kernel[...], jnp.nan))
    with pytest.raises(FloatingPointError, match="over 40 tokens is nan"):
        perplexity(broken, WINDOWS)
