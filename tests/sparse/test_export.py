"""Computations that are exported: what they call, and that another process runs them."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import random_blob, random_x

from esparse_jax import native
from esparse_jax.sparse import (
    LibraryBlob24,
    Machine,
    TuningTable,
    _ffi_cuda,
    compress24,
    compressed24_of,
    exportable,
    records_calls,
    sparse_matmul,
    sparse_matmul_reference,
    use_table,
)

_RUN = """
import sys, jax, numpy as np
from esparse_jax.sparse import Compressed24, build
build()
with open(sys.argv[1], "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
given = np.load(sys.argv[2])
weight = Compressed24(given["values"], given["indices"], (64, 64))
np.save(sys.argv[3], exported.call(given["x"], weight))
"""

needs_extension = pytest.mark.skipif(native.extension() is None, reason="there is no extension")


@needs_extension
def test_another_process_runs_what_was_exported(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it")
    x = random_x(3, 64, jnp.float32)
    weight = compress24(jnp.tile(jnp.asarray([1.5, 0.0, -2.0, 0.0], jnp.float32), (64, 16)))

    with exportable() as checks:
        exported = jax.export.export(
            jax.jit(sparse_matmul), platforms=["cpu"], disabled_checks=checks
        )(x, weight)
    assert native.extension().PRODUCT24_CPU in exported.mlir_module()
    files = [tmp_path / name for name in ("exported", "operands.npz", "result.npy")]
    files[0].write_bytes(exported.serialize())
    np.savez(files[1], x=x, values=weight.values, indices=weight.indices)
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    # Not from the sources, which a folder that is searched before that path may hold.
    command = [sys.executable, "-P", "-c", _RUN, *map(str, files)]
    subprocess.run(command, check=True, env=os.environ | path)
    expected = sparse_matmul_reference(x, weight)
    np.testing.assert_allclose(np.load(files[2]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [
        random_blob((64, 128), jnp.bfloat16),
        LibraryBlob24(jnp.zeros(64, jnp.uint8), (16, 48), jnp.dtype("float16"), (800, 90)),
    ],
    ids=lambda weight: type(weight).__name__,
)
def test_weights_of_any_form_are_arguments_of_what_is_serialised(weight):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it")
    exported = jax.export.export(jax.jit(lambda weight: weight))(weight)
    read = jax.export.deserialize(exported.serialize())
    assert read.in_tree == exported.in_tree == jax.tree.structure(((weight,), {}))
    again = read.call(weight)
    assert dataclasses.replace(again, data=None) == dataclasses.replace(weight, data=None)


@pytest.fixture
def recording(monkeypatch):
    """As on Hopper with jax 0.11: the name of the target that XLA records."""
    target = None if native.extension() is None else native.extension().CUDA_RECORDED_TARGET
    if target is None:
        pytest.skip("the extension was built without code for Hopper")
    monkeypatch.setattr(_ffi_cuda, "_can_record", lambda: True)
    jax.clear_caches()
    yield target
    jax.clear_caches()


def test_what_is_exported_is_traced_where_calls_are_recorded(recording):
    blob, x = random_blob((64, 64)), random_x(2, 64)
    jitted = jax.jit(sparse_matmul)

    def lowered() -> str:
        return jitted.trace(x, blob).lower(lowering_platforms=("cuda",)).as_text()

    assert recording in lowered()
    with exportable() as checks:
        exported = jax.export.export(jitted, platforms=["cuda"], disabled_checks=checks)(x, blob)
    text = exported.mlir_module()
    assert recording not in text
    assert native.extension().CUDA_DECODE_TARGET in text
    assert recording in lowered()


@pytest.mark.skipif(
    not _ffi_cuda.prefill_available(), reason="the extension was built without code for Hopper"
)
def test_what_a_table_chose_for_one_gpu_is_traced_anew():
    """Also where no GPU is at hand, only its table."""
    blob, x = random_blob((64, 64)), random_x(40, 64)
    jitted = jax.jit(sparse_matmul)
    target = native.extension().CUDA_PREFILL_TARGET

    def lowered() -> str:
        return jitted.trace(x, blob).lower(lowering_platforms=("cuda",)).as_text()

    with use_table(TuningTable(Machine("NVIDIA H200", "9.0", "0.8.0"), jax.__version__)):
        assert target in lowered()
        with exportable() as checks:
            exported = jax.export.export(jitted, platforms=["cuda"], disabled_checks=checks)
            assert target not in exported(x, blob).mlir_module()
        assert target in lowered()
    jax.clear_caches()


def test_an_error_inside_leaves_things_as_they_were(recording):
    context = exportable()
    context.__enter__()
    assert not _ffi_cuda.records_calls()
    assert context.__exit__(RuntimeError, RuntimeError("inside"), None) is False
    assert _ffi_cuda.records_calls()
    assert records_calls() is bool(jax.default_backend() == "gpu")


def test_without_an_extension_there_is_nothing_to_check(monkeypatch):
    monkeypatch.setattr(native, "extension", lambda: None)
    with exportable() as checks:
        assert checks == []
    weight = compressed24_of(random_blob((64, 64)))
    with exportable():
        jax.export.export(jax.jit(sparse_matmul), platforms=["cuda"])(random_x(2, 64), weight)
