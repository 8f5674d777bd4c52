"""What the compiler made of the CUDA kernels: a look at their machine code, which needs no GPU.

    python benchmarks/sass.py [--cuobjdump FILE]

For every architecture in the extension: how many kernels there are, how many of the decode kernels
multiply on the sparse tensor cores (HMMA.SP), how many instructions read or write local memory
(spilled registers), and the most registers a kernel takes. Exit status 1 where a decode kernel does
not use the sparse tensor cores or any kernel spills. cuobjdump is part of the CUDA toolkit.
"""

import collections
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tyro

from esparse_jax import native

_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s+([^:\s]+)")
_REGISTERS = re.compile(r"REG:(\d+)")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
_DECODE_KERNEL = "esparse_decode_"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Read the machine code of the installed extension, or of another."""

    extension: Path | None = None
    cuobjdump: Path | None = None


@dataclasses.dataclass
class Kernels:
    """Counts of one architecture's."""

    kernels: set[str] = dataclasses.field(default_factory=set)
    sparse: set[str] = dataclasses.field(default_factory=set)
    spills: int = 0
    registers: int = 0

    @property
    def decode(self) -> set[str]:
        return {name for name in self.kernels if _DECODE_KERNEL in name}


def read(cuobjdump: str, extension: Path) -> dict[str, Kernels]:
    """By architecture; those for which there is only PTX are not in it."""
    found: dict[str, Kernels] = collections.defaultdict(Kernels)
    architecture = kernel = ""
    for line in _lines(cuobjdump, "-sass", extension):
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _FUNCTION.match(line):
            kernel = match[1]
            found[architecture].kernels.add(kernel)
        elif "HMMA.SP" in line:
            found[architecture].sparse.add(kernel)
        elif _LOCAL.search(line):
            found[architecture].spills += 1
    for line in _lines(cuobjdump, "-res-usage", extension):
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _REGISTERS.search(line):
            here = found[architecture]
            here.registers = max(here.registers, int(match[1]))
    return dict(found)


def _lines(cuobjdump: str, option: str, extension: Path) -> list[str]:
    done = subprocess.run(
        [cuobjdump, option, str(extension)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{cuobjdump} {option} {extension} failed: {done.stderr.strip()}")
    return done.stdout.splitlines()


def main(arguments: Arguments) -> int:
    cuobjdump = arguments.cuobjdump or shutil.which("cuobjdump")
    if cuobjdump is None:
        raise SystemExit("cuobjdump was not found; it is in the CUDA toolkit. Name it: --cuobjdump")
    extension = arguments.extension
    if extension is None:
        module = native.extension()
        if module is None or not module.HAS_CUDA:
            raise SystemExit("The extension has no CUDA part (BUILD.md), so there is no code.")
        extension = Path(module.__file__)
    found = read(str(cuobjdump), extension)
    print("| architecture | kernels | decode kernels | with HMMA.SP | spills | most registers |")
    print("|---|---|---|---|---|---|")
    for name, kernels in sorted(found.items()):
        print(
            f"| {name} | {len(kernels.kernels)} | {len(kernels.decode)} "
            f"| {len(kernels.sparse & kernels.decode)} | {kernels.spills} | {kernels.registers} |"
        )
    good = [k.decode and k.decode <= k.sparse and not k.spills for k in found.values()]
    return 0 if good and all(good) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
