"""Model families in Flax NNX, their caches, the drop-in layers and the surgery on them."""

from esparse_jax.models.cache import KVCache, LayerCache, init_cache
from esparse_jax.models.llama import LlamaConfig, LlamaForCausalLM, RopeConfig

__all__ = [
    "KVCache",
    "LayerCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "RopeConfig",
    "init_cache",
]
