"""Computations as XLA gets them for a GPU, on any machine."""

import jax

from esparse_jax.sparse import exportable


def lowered_for_cuda(function, *arguments) -> str:
    """A computation traced anew, in calls of any CUDA device, on machines that record them too."""
    with exportable() as checks:
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
        return exported(*arguments).mlir_module()
