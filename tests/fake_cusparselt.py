"""Builds and drives the stand-in of cuSPARSELt, ffi/cusparselt/testing/fake_cusparselt.cc."""

import contextlib
import ctypes
import functools
import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import host_build
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esparse_jax import native
from esparse_jax.sparse import _ffi_cusparselt, blob

SOURCE = "cusparselt/testing/fake_cusparselt.cc"
HOST_SONAME = "libesparse_fake_cusparselt.so.0"
REAL_SONAME = "libcusparseLt.so.0"
NONE_ALIVE = {"handle": 0, "matrix": 0, "selection": 0, "plan": 0}


def build(folder: Path, soname: str, *defines: str) -> Path:
    """The stand-in as a shared library in a folder, which is made."""
    flags = (f"-Wl,-soname,{soname}", *(f"-D{define}" for define in defines))
    return host_build.build(folder / soname, SOURCE, flags=flags)


class Fake:
    """The opened stand-in: what was called, what is alive, and what is to fail."""

    def __init__(self, file: Path):
        self.file = file
        self._library = ctypes.CDLL(str(file))
        for name in ("calls", "at_once", "overlaps", "alive", "last"):
            getattr(self._library, f"esparse_fake_{name}").restype = ctypes.c_int64

    def calls(self, call: str) -> int:
        """How often a function was called, by its name without cusparseLt."""
        return self._library.esparse_fake_calls(call.encode())

    def at_once(self, call: str) -> int:
        """How many calls of a function were under way at once, at the most."""
        return self._library.esparse_fake_at_once(call.encode())

    def overlaps(self) -> int:
        """How many calls began inside another with the same handle, since the process began."""
        return self._library.esparse_fake_overlaps()

    def alive(self) -> dict[str, int]:
        """How many objects of each kind there are."""
        return {kind: self._library.esparse_fake_alive(kind.encode()) for kind in NONE_ALIVE}

    def last(self, name: str) -> int:
        """What the last product ran with."""
        return self._library.esparse_fake_last(name.encode())

    def use_device(self, device: int) -> None:
        """Makes a device current in this thread; 0 is to begin with."""
        self._library.esparse_fake_set_device(device)

    def set(self, name: str, value: int) -> None:
        """Changes what the stand-in is like."""
        self._library.esparse_fake_set(name.encode(), ctypes.c_int64(value))

    def slow(self, *calls: str, milliseconds: int) -> None:
        """Lets every call of the functions take so long at least."""
        for call in calls:
            self._library.esparse_fake_slow(call.encode(), ctypes.c_int64(milliseconds))

    def fail(self, call: str, status: int = 10, skip: int = 0) -> None:
        """Lets a function fail from its call number `skip` on."""
        self._library.esparse_fake_fail(call.encode(), status, ctypes.c_int64(skip))

    def reset(self) -> None:
        self._library.esparse_fake_reset()


@contextlib.contextmanager
def used_on_host(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The stand-in as the library that `_ffi_cusparselt` finds, computing on the CPU platform.

    It is as if new, and no executable that calls it is left behind.
    """
    opened, fake = open_on_host(file), Fake(file)
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: opened)
    for cached in (
        _ffi_cusparselt._workspace_bytes,
        _ffi_cusparselt._compressed_bytes,
        blob._compare_layouts,
    ):
        cached.cache_clear()
    fake.reset()
    with jax.default_device(jax.devices("cpu")[0]):
        yield fake
    fake.reset()
    gc.collect()
    if fake.alive() != NONE_ALIVE:  # what was called without a jit of its own is cached by jax
        jax.clear_caches()
        gc.collect()


@functools.cache
def open_on_host(file: Path) -> _ffi_cusparselt.OpenedLibrary:
    """The stand-in as a library of the CPU platform, whose handlers are registered."""
    extension = native.extension()
    jax.devices("cpu")  # XLA refuses handlers with a state before its CPU backend is up
    for name, (platform, registration) in extension.host_types().items():
        jax.ffi.register_ffi_type(name, registration, platform=platform)
    for name, (platform, stages) in extension.host_registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform=platform)
    return _ffi_cusparselt.OpenedLibrary(*extension.cusparselt_open(str(file), on_host=True), True)


def run(program: str, *arguments: str, first: Path | None = None, **environment: str) -> str:
    """What a Python program prints. `first` comes before all else in its import path."""
    path = [str(first)] if first else []
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path + sys.path),
            "JAX_PLATFORMS": "cpu",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def weight24(shape: tuple[int, int], dtype: str, seed: int = 0) -> jax.Array:
    """A random 2:4 weight, some groups of which keep fewer than two values."""
    random = np.random.default_rng(seed)
    out, channels = shape
    kept = random.permuted(np.tile([True, True, False, False], (out, channels // 4, 1)), axis=2)
    kept &= random.random(kept.shape) < 0.9
    values = random.standard_normal(shape) / np.sqrt(channels / 2)
    return jnp.asarray(np.where(kept.reshape(shape), values, 0), dtype)


def random_x(*shape: int, dtype: str = "float16", seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_product(y: jax.Array, x: jax.Array, weight: jax.Array) -> None:
    """One rounding to the dtype of y, and float32 sums of as many terms as there are kept."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    true = x @ weight.T
    allowed = float(jnp.finfo(y.dtype).eps) / 2 * np.abs(true)
    allowed += np.finfo(np.float32).eps * 8 * (np.abs(x) @ np.abs(weight).T)
    allowed += float(jnp.finfo(y.dtype).smallest_subnormal)
    error = np.abs(np.asarray(y, np.float64) - true)
    assert np.all(error <= allowed), f"off by {(error / allowed).max():.2f} of what is allowed"
