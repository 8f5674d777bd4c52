"""The compiled extension, loaded and registered with XLA when a room first asks for it.

Above all rooms: each may import this file, which imports none of them. The extension is optional.
Without it one line is logged, and whatever it would have computed is computed with plain JAX.
"""

import functools
import importlib
import logging
from pathlib import Path
from types import ModuleType

import jax

_LOGGER = logging.getLogger(__name__)
_EXTENSION = "esparse_jax._esparse_ffi"
# What to do where it is missing.
MEND = (
    "Build it with `pip install .` and a C++17 compiler, and run from a directory that does not "
    "hold the sources, which hide the installed package, or install with `pip install -e .` (see "
    "BUILD.md)."
)


@functools.cache
def extension() -> ModuleType | None:
    """The extension with its types and targets registered, or None; asked once per process."""
    try:
        module = importlib.import_module(_EXTENSION)
    except ImportError as error:
        _LOGGER.warning(
            "%s has no compiled extension that loads (%s): on the CPU sparse_matmul computes with "
            "plain JAX, which is right but slower than a dense product. %s",
            Path(__file__).parent,
            error,
            MEND,
        )
        return None
    for name, (platform, registration) in module.types().items():  # before who has them as state
        jax.ffi.register_ffi_type(name, registration, platform=platform)
    for name, (platform, stages) in module.registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform=platform)
    return module


def has_cuda() -> bool:
    """Whether the extension is there, with its CUDA kernels."""
    module = extension()
    return module is not None and module.HAS_CUDA
