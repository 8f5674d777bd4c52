"""Settings that every test runs under."""

import importlib.resources

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# First calls compile, so no deadline; derandomised, so that a run repeats.
hypothesis.settings.register_profile(
    "esparse", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("esparse")

# Rooms whose tests drive whole models: nearly all their time is compilation, and what they check
# does not depend on how well XLA optimises.
DRIVERS = {"pipeline", "inference", "command"}


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The package's folder of tuning tables, empty."""
    folder = tmp_path / "package" / "tables"
    folder.mkdir(parents=True)
    monkeypatch.setattr(importlib.resources, "files", lambda package: folder.parent)
    return folder


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Compile fast instead of well in the tests of the drivers."""
    quick = request.path.parent.name in DRIVERS
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
