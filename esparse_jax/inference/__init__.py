"""Running a model, dense, masked or sparse."""

from esparse_jax.inference.evaluate import Perplexity, perplexity
from esparse_jax.inference.generate import generate

__all__ = ["Perplexity", "generate", "perplexity"]
