import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import esparse_jax
from esparse_jax import native


def test_every_public_name_is_there():
    assert sorted(esparse_jax.__all__) == sorted(set(esparse_jax.__all__))
    for name in esparse_jax.__all__:
        assert getattr(esparse_jax, name) is not None


def test_importing_touches_no_device_and_no_extension():
    program = (
        "import sys, esparse_jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert 'esparse_jax._esparse_ffi' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    finished = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_an_installed_extension_is_the_one_that_is_used():
    """Else the tests of the custom calls would be skipped where they matter."""
    try:
        files = importlib.metadata.files("esparse-jax") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the tests run on a package that is not installed")
    if not any("_esparse_ffi" in file.name for file in files):
        pytest.skip("the package was installed without its extension (BUILD.md)")
    assert native.extension() is not None


def test_rooms_import_only_the_rooms_above_them():
    import ast

    rooms = ["pruning", "sparse", "models", "files", "pipeline", "inference", "command"]
    root = Path(esparse_jax.__file__).parent
    for file in root.glob("*/*.py"):
        room = file.relative_to(root).parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("esparse_jax."):
                imported = node.module.split(".")[1]
                assert rooms.index(imported) <= rooms.index(room), (file, node.module)
