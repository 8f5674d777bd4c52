"""The stand-in of cuSPARSELt, for the tests that compute through it."""

from pathlib import Path

import fake_cusparselt
import jax
import pytest

from esparse_jax.sparse import _ffi, _ffi_cuda


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    """The stand-in as a shared library of the CPU platform."""
    if not _ffi.cpu_product_available():
        pytest.skip("the extension is not built (BUILD.md)")
    try:
        jax.devices("cpu")
    except RuntimeError:
        pytest.skip("JAX was told to do without its CPU platform")
    return fake_cusparselt.build(tmp_path_factory.mktemp("host"), fake_cusparselt.HOST_SONAME)


@pytest.fixture
def no_prefill(monkeypatch):
    """As on a GPU that the prefill kernel is not for."""
    monkeypatch.setattr(_ffi_cuda, "prefill_runs", lambda capability: False)


@pytest.fixture
def fake(stand_in, monkeypatch):
    """The stand-in in use as the library.

    What executables make of it must go with them, and no two threads may use a handle at once.
    """
    with fake_cusparselt.used_on_host(stand_in, monkeypatch) as fake:
        assert fake.alive() == fake_cusparselt.NONE_ALIVE
        overlaps = fake.overlaps()
        yield fake
    assert fake.alive() == fake_cusparselt.NONE_ALIVE, "an executable left objects behind"
    assert fake.overlaps() == overlaps, "calls with one handle ran at the same time"
