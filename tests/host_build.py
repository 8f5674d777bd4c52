"""Builds C++ sources of the checkout for tests that call them on the host."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

FFI = Path(__file__).parents[1] / "ffi"


def compiler() -> str:
    """A C++ compiler, or the test is skipped: also where there are no sources."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None or not (FFI / "CMakeLists.txt").is_file():
        pytest.skip("this is built from the checkout with a C++ compiler")
    return found


def require_float16() -> None:
    """Skips the test where the compiler has no 16-bit numbers."""
    if not _has_float16():
        pytest.skip("the C++ compiler has no _Float16")


@functools.cache
def _has_float16() -> bool:
    command = [compiler(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    source = "_Float16 twice(_Float16 x) { return x + x; }"
    done = subprocess.run(command, input=source, capture_output=True, encoding="utf-8", timeout=60)
    return done.returncode == 0


def build(file: Path, *sources: str, flags: tuple[str, ...] = ()) -> Path:
    """A shared library of sources that are named from ffi/ on; its folder is made."""
    command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{FFI}", *flags]
    file.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*command, *(str(FFI / source) for source in sources), "-o", str(file)],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return file
