"""`jax.export` of computations that hold this package's products."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from esparse_jax import native

from . import _ffi_cuda
from .blob import Blob24, LibraryBlob24
from .compress import Compressed24


@contextlib.contextmanager
def exportable() -> Iterator[list[jax.export.DisabledSafetyCheck]]:
    """Inside, computations are traced so that `jax.export` takes them and other processes run
    them::

        with exportable() as checks:
            exported = jax.export.export(jax.jit(step), disabled_checks=checks)(*arguments)

    JAX exports a custom call only if it is told that the call's target stays what it is: these are
    the checks, for all targets of this build. A target that is to be given something else gets
    another name, so what an older version exported is refused, not computed wrongly. Compressed
    weights may be arguments. To serialise what is exported, JAX needs flatbuffers installed. The
    process that runs it calls `build()` first, which registers the targets there, and
    `load_cusparselt()` where products of many rows run on a GPU.

    On Hopper, or by a table for such a GPU, products of many rows are otherwise traced into a
    kernel that is for it alone; and on Hopper, from jax 0.11 on, products and attentions of a
    decode step into calls that XLA records (`records_calls`), by targets that a process registers
    when it finds such a GPU. Then JAX's caches are emptied on the way in and out: what was traced
    before is traced anew.

    Yields:
        What `jax.export.export` takes as `disabled_checks`; empty where nothing is compiled.
    """
    extension = native.extension()
    names = [] if extension is None else sorted(extension.registrations())
    others = _ffi_cuda.records_calls() or _ffi_cuda.prefill_was_asked_for()
    if others:
        jax.clear_caches()
    try:
        with _ffi_cuda.traced_calls():
            yield [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    finally:
        if others:
            jax.clear_caches()


def _serialisable(weight: type) -> None:
    """Lets a weight be among the arguments and results of what is serialised."""
    static = [field.name for field in dataclasses.fields(weight) if field.metadata.get("static")]

    def to_bytes(values: Any) -> bytes:
        plain = (
            value.name if name == "dtype" else value
            for name, value in zip(static, values, strict=True)
        )
        return json.dumps(dict(zip(static, plain, strict=True))).encode()

    def from_bytes(data: bytes | bytearray) -> tuple[Any, ...]:
        found = json.loads(bytes(data))
        return tuple(
            jnp.dtype(found[name]) if name == "dtype" else tuple(found[name]) for name in static
        )

    jax.export.register_pytree_node_serialization(
        weight,
        serialized_name=f"esparse_jax.sparse.{weight.__name__}",
        serialize_auxdata=to_bytes,
        deserialize_auxdata=from_bytes,
    )


for _weight in (Compressed24, Blob24, LibraryBlob24):
    _serialisable(_weight)
