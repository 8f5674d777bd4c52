"""Model families in Flax NNX, their caches, the drop-in layers and the surgery on them."""

from esparse_jax.models.cache import KVCache, LayerCache, init_cache
from esparse_jax.models.fusion import inference_model
from esparse_jax.models.inference import InferenceModel
from esparse_jax.models.llama import LlamaConfig, LlamaForCausalLM, RopeConfig
from esparse_jax.models.shapes import (
    PUBLISHED_MODELS,
    PUBLISHED_SHAPES,
    ModelBytes,
    model_bytes,
    product_shapes,
    published_shapes,
)

__all__ = [
    "PUBLISHED_MODELS",
    "PUBLISHED_SHAPES",
    "InferenceModel",
    "KVCache",
    "LayerCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "ModelBytes",
    "RopeConfig",
    "inference_model",
    "init_cache",
    "model_bytes",
    "product_shapes",
    "published_shapes",
]
