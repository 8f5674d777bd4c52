"""transformers' PyTorch LLaMA in float32 and, as the truth, in float64. Needs torch."""

import numpy as np
import torch
import transformers
from transformers.models.llama import modeling_llama


def torch_llama(
    fields: dict, named: dict[str, np.ndarray], dtype: torch.dtype
) -> modeling_llama.LlamaForCausalLM:
    """The model with those weights, its attention in PyTorch's own kernel.

    In float64 nothing is rounded to float32 on the way: transformers' norm and rotary embedding
    compute in float32 whatever the model's dtype, so both are replaced. The rotary frequencies
    stay the float32 numbers that they are defined as.
    """
    config = transformers.LlamaConfig(**{**fields, "dtype": "float32", "torch_dtype": "float32"})
    config._attn_implementation = "sdpa"
    model = modeling_llama.LlamaForCausalLM(config)
    state = {name: torch.tensor(value) for name, value in named.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    if dtype == torch.float64:
        model.double()
        for module in model.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm):
                module.forward = _exact_norm(module)
        model.model.rotary_emb.forward = _exact_rotary(model.model.rotary_emb)
    return model


def _exact_norm(module):
    def forward(hidden):
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return module.weight * (hidden * torch.rsqrt(variance + module.variance_epsilon))

    return forward


def _exact_rotary(module):
    original = module.forward

    def forward(x, position_ids):
        # Sets inv_freq for this length; model.double() has kept its float32 values.
        original(x, position_ids)
        angles = position_ids[..., None].double() * module.inv_freq.float().double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling

    return forward
