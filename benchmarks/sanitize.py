"""compute-sanitizer over the CUDA decode kernel: memory, races, uninitialised reads, barriers.

    python benchmarks/sanitize.py [--tools memcheck racecheck] [--compute-sanitizer FILE]

Runs itself under each tool: every instance of the kernel (both dtypes, both widths, one to four
tiles), with all that can be fused to it, in calls alone and in a chain. Exit status 1 where a tool
reports an error, or where a result is wrong. compute-sanitizer is part of the CUDA toolkit.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from esparse_jax.sparse import _ffi_cuda as ffi
from esparse_jax.sparse import blob24, compress24
from esparse_jax.sparse._timing import random_24

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A half unit of channels, tiles that do not divide by the blocks', more warps than units.
SHAPE = (2304, 448)
PLANS = [
    {
        "tiles": tiles,
        "warps": warps,
        "blocks": blocks,
        "resident": resident,
        "interleave": 1 + tiles % 2,
    }
    for tiles in (1, 2, 3, 4)
    for resident, warps, blocks in ((1, 8, 2), (2, 16, 1), (2, 4, 2))
]
_ERRORS = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")


@dataclass(frozen=True)
class Arguments:
    """Which tools to run."""

    tools: tuple[str, ...] = TOOLS
    compute_sanitizer: Path | None = None
    inside: bool = False
    """Run the kernels themselves, as the tools do."""


def products() -> int:
    """Runs the kernels and compares each result with float64; how many there were."""
    out, channels = SHAPE
    compared = 0
    for dtype in ("float16", "bfloat16"):
        weight = random_24(jax.random.key(0), out, channels, dtype)
        data = blob24(compress24(weight)).data
        exact = np.asarray(weight, np.float64).T
        order = np.random.default_rng(0).permutation(channels).astype(np.int32)
        places = np.random.default_rng(1).permutation(out).astype(np.int32)
        rounding = float(jnp.finfo(dtype).eps)
        for rows in (1, 8, 9, 16):
            x = jax.random.normal(jax.random.key(rows), (rows, channels)).astype(dtype)
            residual = jax.random.normal(jax.random.key(rows), (rows, out)).astype(dtype)
            wide, added = np.asarray(x, np.float64), np.asarray(residual, np.float64)
            scale = np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5)
            silu = _swiglu(wide @ exact / scale)

            def run(x, data, residual=residual, order=order, places=places):
                def product(plan, **around):
                    return ffi.decode(x, data, out=out, plan=plan, **around)

                return [
                    (
                        product(plan, residual=residual, places=places),
                        product(plan, norm_epsilon=1e-5, swiglu=True)[0],
                        product(plan, permutation=order)[0],
                    )
                    for plan in PLANS
                ]

            for (y, strewn), fused, permuted in jax.jit(run)(x, data):
                _compare(y, wide @ exact + added, rounding)
                _compare(np.asarray(strewn)[:, places], wide @ exact + added, rounding)
                _compare(fused, silu, rounding)
                _compare(permuted, wide[:, order] @ exact, rounding)
                compared += 4
        compared += _chain(data, dtype)
    return compared


def _swiglu(y: np.ndarray) -> np.ndarray:
    pairs = y.reshape(y.shape[0], -1, 2, 8)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    return (gate / (1 + np.exp(-gate)) * up).reshape(y.shape[0], -1)


def _chain(data: jax.Array, dtype: str) -> int:
    """Products that overlap, in a graph, give the bits of products one by one."""
    out, channels = SHAPE
    x = jax.random.normal(jax.random.key(1), (16, channels)).astype(dtype)

    def step(x, data, prefetch):
        y, _ = ffi.decode(x, data, out=out, prefetch=prefetch)
        return y[:, :channels]

    overlapped, alone = x, x
    chain = jax.jit(lambda x, data: [x := step(x, data, True) for _ in range(8)])
    for overlapped in chain(x, data):
        alone = jax.jit(step, static_argnums=2)(alone, data, False)
        np.testing.assert_array_equal(overlapped, alone)
    return 8


def _compare(got: jax.Array, want: np.ndarray, rounding: float) -> None:
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    if not error < 2 * rounding:
        raise SystemExit(f"a product is {error:.1e} from float64; allowed {2 * rounding:.1e}.")


def main(arguments: Arguments) -> int:
    """Prints what each tool found; the exit status."""
    if arguments.inside:
        print(f"{products()} products compared")
        return 0
    unknown = sorted(set(arguments.tools) - set(TOOLS))
    if unknown:
        print(f"tools are {', '.join(TOOLS)}; got {', '.join(unknown)}.", file=sys.stderr)
        return 2
    sanitizer = arguments.compute_sanitizer or shutil.which("compute-sanitizer")
    if sanitizer is None:
        print(
            "compute-sanitizer is not on the PATH: it is part of the CUDA toolkit. Name it with "
            "--compute-sanitizer.",
            file=sys.stderr,
        )
        return 2
    bad = 0
    for tool in arguments.tools:
        command = [sanitizer, "--tool", tool, sys.executable, __file__, "--inside"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        text = done.stdout + done.stderr
        counts = [int(a or b) for a, b in _ERRORS.findall(text)]
        compared = re.search(r"\d+ products compared", text)
        clean = done.returncode == 0 and counts and not any(counts) and compared
        bad += not clean
        print(f"{tool}: {', '.join(map(str, counts)) or 'no'} errors, {compared and compared[0]}")
        if not clean:
            print(*text.splitlines()[-60:], sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
