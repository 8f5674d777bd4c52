"""What the compiler made of the CUDA kernels: a look at their machine code, which needs no GPU.

    python benchmarks/sass.py [--cuobjdump FILE]

For every architecture in the extension and every family of kernels (the product of a decode step,
its attention, the product of prompts, and the others): how many there are, how many of them
multiply on the sparse tensor cores (HMMA.SP, HGMMA.SP), how many instructions read or write local
memory (spilled registers), and the most registers one takes. The attention needs clusters of
blocks, so below sm_90 it is not looked at; the product of prompts is for sm_90a alone. Exit status
1 where a family is missing, where a product does not use the sparse tensor cores or where any
kernel spills. cuobjdump is part of the CUDA toolkit.
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

# Of a library's parts; a cubin by itself says it where its code begins.
_ARCHITECTURE = re.compile(r"^(?:arch =|\s*code for) (sm_\w+)")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s+([^:\s]+)")
_REGISTERS = re.compile(r"REG:(\d+)")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
_SPARSE = re.compile(r"\bHG?MMA\.SP\b")
DECODE, ATTENTION, PREFILL, OTHER = "decode", "attention", "prefill", "other"
_NAMES = {"esparse_decode_": DECODE, "esparse_attend_": ATTENTION, "esparse_prefill_": PREFILL}
_LEAST_OF_ATTENTION = 90


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Read the machine code of the installed extension, or of another."""

    extension: Path | None = None
    cuobjdump: Path | None = None


@dataclasses.dataclass
class Kernel:
    """What one kernel's machine code holds."""

    sparse: bool = False
    spills: int = 0
    registers: int = 0


@dataclasses.dataclass(frozen=True)
class Family:
    """Counts of one family's kernels for one architecture."""

    kernels: int
    sparse: int
    spills: int
    registers: int


def read(cuobjdump: str, extension: Path) -> dict[str, dict[str, Kernel]]:
    """By architecture and name; architectures for which there is only PTX are not in it."""
    found: dict[str, dict[str, Kernel]] = collections.defaultdict(
        lambda: collections.defaultdict(Kernel)
    )
    architecture, kernel = "", Kernel()
    for option in ("-sass", "-res-usage"):
        for line in _lines(cuobjdump, option, extension):
            if match := _ARCHITECTURE.match(line):
                architecture = match[1]
            elif match := _FUNCTION.match(line):
                kernel = found[architecture][match[1]]
            elif match := _REGISTERS.search(line):
                kernel.registers = int(match[1])
            elif _SPARSE.search(line):
                kernel.sparse = True
            elif _LOCAL.search(line):
                kernel.spills += 1
    return {architecture: dict(kernels) for architecture, kernels in found.items()}


def families(architecture: str, kernels: dict[str, Kernel]) -> dict[str, Family]:
    """What is judged of an architecture: the families it must have, and the others it has."""
    members: dict[str, list[Kernel]] = collections.defaultdict(list)
    needed = {PREFILL} if architecture.endswith("a") else {DECODE, ATTENTION}
    for name, kernel in kernels.items():
        of = (family for part, family in _NAMES.items() if part in name)
        members[next(of, OTHER)].append(kernel)
    if int(re.sub(r"\D", "", architecture)) < _LEAST_OF_ATTENTION:
        needed.discard(ATTENTION)
        members.pop(ATTENTION, None)
    return {
        family: Family(
            len(all_of),
            sum(kernel.sparse for kernel in all_of),
            sum(kernel.spills for kernel in all_of),
            max((kernel.registers for kernel in all_of), default=0),
        )
        for family, all_of in ((family, members[family]) for family in (*_NAMES.values(), OTHER))
        if all_of or family in needed
    }


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
    print("| architecture | family | kernels | sparse | spills | most registers |")
    print("|---|---|---|---|---|---|")
    good = bool(found)
    for architecture, kernels in sorted(found.items()):
        for family, counts in families(architecture, kernels).items():
            print(
                f"| {architecture} | {family} | {counts.kernels} | {counts.sparse} "
                f"| {counts.spills} | {counts.registers} |"
            )
            good &= counts.kernels > 0 and counts.spills == 0
            good &= family not in (DECODE, PREFILL) or counts.sparse == counts.kernels
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
