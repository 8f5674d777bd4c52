"""Pruning a whole model."""

from esparse_jax.pipeline.prune import (
    LayerRecord,
    PruneProgress,
    PruneReport,
    calibrate_block,
    prune_model,
    prune_params,
)

__all__ = [
    "LayerRecord",
    "PruneProgress",
    "PruneReport",
    "calibrate_block",
    "prune_model",
    "prune_params",
]
