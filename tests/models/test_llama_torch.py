"""Module by module, and whole models, against transformers' PyTorch LLaMA (needs torch)."""

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch_llama import torch_llama  # noqa: E402

from esparse_jax.models.llama import rotary_angles, rotate  # noqa: E402

BATCH, SEQUENCE = 2, llama_cases.SEQUENCE


class Models:
    """One configuration three times: PyTorch in float32 and float64, and ours."""

    def __init__(self, case):
        fields = llama_cases.CASES[case]
        named = llama_cases.weights(fields)
        self.single = torch_llama(fields, named, torch.float32)
        self.double = torch_llama(fields, named, torch.float64)
        self.ours = llama_cases.build(fields, named)
        hidden = self.ours.config.hidden_size
        self.hidden = np.random.default_rng(4).standard_normal((BATCH, SEQUENCE, hidden))
        self.hidden = self.hidden.astype(np.float32)

    def compare(self, module, ours):
        """`module(torch model, hidden in its dtype)` in both precisions against `ours(hidden)`."""
        hidden = torch.tensor(self.hidden)
        single = module(self.single, hidden).numpy()
        double = module(self.double, hidden.double()).numpy()
        assert double.dtype == np.float64
        assert np.abs(double).max() > 0
        error = np.abs(single - double).max()
        llama_cases.assert_rounding_only(jax.jit(ours)(jnp.asarray(self.hidden)), double, error)


@pytest.fixture(scope="module", params=["gqa", "tied", "yarn"])
def models(request):
    return Models(request.param)


def embeddings(model, hidden):
    return model.model.rotary_emb(hidden, torch.arange(SEQUENCE)[None])


def causal(hidden):
    later = torch.triu(torch.full((SEQUENCE, SEQUENCE), -torch.inf, dtype=hidden.dtype), 1)
    return later[None, None]


def test_norm(models):
    models.compare(
        lambda model, hidden: model.model.layers[1].input_layernorm(hidden),
        models.ours.model.layers[1].input_layernorm,
    )


@pytest.mark.parametrize("case", llama_cases.CASES)
def test_rotation(case):
    models = Models(case)
    config = models.ours.config
    shape = (BATCH, SEQUENCE, -1, config.head_dim)

    def pytorch(model, hidden):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        heads = hidden[..., : hidden.shape[-1] // config.head_dim * config.head_dim]
        heads = heads.reshape(shape)
        return apply_rotary_pos_emb(heads, heads, *embeddings(model, hidden), unsqueeze_dim=2)[0]

    def ours(hidden):
        heads = hidden[..., : hidden.shape[-1] // config.head_dim * config.head_dim]
        angles = rotary_angles(config.rope, config.head_dim, jnp.arange(SEQUENCE)[None])
        return rotate(heads.reshape(shape), *angles)

    models.compare(pytorch, ours)


def test_attention(models):
    def pytorch(model, hidden):
        attention = model.model.layers[1].self_attn
        return attention(hidden, embeddings(model, hidden), causal(hidden))[0]

    models.compare(pytorch, lambda hidden: models.ours.model.layers[1].self_attn(hidden)[0])


def test_mlp(models):
    models.compare(
        lambda model, hidden: model.model.layers[1].mlp(hidden), models.ours.model.layers[1].mlp
    )


def test_block(models):
    def pytorch(model, hidden):
        return model.model.layers[1](
            hidden, causal(hidden), position_embeddings=embeddings(model, hidden)
        )

    models.compare(pytorch, models.ours.model.layers[1])


@pytest.mark.parametrize(("case", "length"), llama_cases.RUNS)
def test_logits_and_the_committed_ones(case, length):
    fields = llama_cases.CASES[case]
    named = llama_cases.weights(fields)
    ids = torch.tensor(llama_cases.tokens(case, length)).long()
    single = torch_llama(fields, named, torch.float32)(ids).logits.numpy()
    double = torch_llama(fields, named, torch.float64)(ids).logits.numpy()
    error = np.abs(single - double).max()
    ours = llama_cases.our_logits(case, length)
    llama_cases.assert_rounding_only(ours, double, error)
    assert np.abs(ours - single).max() <= 1e-5 * np.abs(single).max()

    committed, committed_error = llama_cases.torch_logits(case, length)
    np.testing.assert_allclose(double[:, -llama_cases.STORED :], committed, rtol=0, atol=error / 50)
    assert 0.5 * error <= committed_error <= 2 * error


def test_bfloat16_is_no_worse_than_pytorchs():
    case = "mha"
    fields = llama_cases.CASES[case]
    # Weights that bfloat16 holds exactly, so that all errors are of the computation.
    named = {
        name: np.asarray(jnp.asarray(weight, jnp.bfloat16).astype(jnp.float32))
        for name, weight in llama_cases.weights(fields).items()
    }
    ids = llama_cases.tokens(case)
    double = torch_llama(fields, named, torch.float64)(torch.tensor(ids).long()).logits.numpy()
    low = torch_llama(fields, named, torch.float32).bfloat16()
    low = low(torch.tensor(ids).long()).logits.float().numpy()
    ours = llama_cases.run(llama_cases.build(fields, named, param_dtype=jnp.bfloat16), ids)
    error, theirs = np.abs(ours - double), np.abs(low - double)
    assert float(jnp.sqrt((error**2).mean())) <= 1.1 * np.sqrt((theirs**2).mean())
    assert ours.dtype == jnp.float32
