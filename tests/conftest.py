"""Settings that every test runs under."""

import importlib.resources
import os
import shutil
import tempfile

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# First calls compile, so no deadline; derandomised, so that a run repeats.
hypothesis.settings.register_profile(
    "esparse", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("esparse")

SHARED_SECONDS = 0.2  # what compiles faster is not worth a file


def pytest_configure(config):
    """The suite is for the CPU, also where there is a GPU; `-m gpu` is for the GPU.

    JAX_PLATFORMS decides otherwise.
    """
    for_gpu = "gpu" in config.option.markexpr.replace("not gpu", "")
    if not for_gpu and "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
        jax.config.update("jax_platforms", "cpu")
        _share_compilations(config)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the workers share its memory
    if jax.default_backend() == "gpu":
        # Products of float32 in full, not of its first 10 bits: what the tolerances are made for.
        jax.config.update("jax_default_matmul_precision", "highest")


def _share_compilations(config):
    """What one process of the suite compiled, the others and those that tests start load.

    Compilations are most of its time. Nothing is kept for the next run.
    """
    # The user's own, or that of the process that started this one.
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="esparse-jax-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(SHARED_SECONDS)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHARED_SECONDS)


# Rooms whose tests compile whole models and searches, and check what does not depend on how well
# XLA optimises.
QUICK = {"command", "inference", "pipeline", "pruning"}


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The package's folder of tuning tables, empty."""
    folder = tmp_path / "package" / "tables"
    folder.mkdir(parents=True)
    monkeypatch.setattr(importlib.resources, "files", lambda package: folder.parent)
    return folder


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Compile fast instead of well, on a processor."""
    quick = request.path.parent.name in QUICK and jax.default_backend() == "cpu"
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
