"""Running a model, dense, masked or sparse."""

from esparse_jax.inference.evaluate import Perplexity, perplexity
from esparse_jax.inference.generate import generate
from esparse_jax.inference.stream import TextStream, TokenRate

__all__ = ["Perplexity", "TextStream", "TokenRate", "generate", "perplexity"]
