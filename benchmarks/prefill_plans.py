"""Every way the prefill kernel can cut its work, timed: what its rule is read off.

    python benchmarks/prefill_plans.py --shapes 5376x14336 --rows 1024 --csv prefill_plans.csv

Times are microseconds a product in a CUDA graph of products over 300 MB of weights or more, at
least 10 of them, the median over replays: some milliseconds of work, before the power limit lowers
the clock. A line for each shape and number of rows holds the kernel's own rule against the best.
"""

import csv
import functools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from esparse_jax.models import PUBLISHED_SHAPES
from esparse_jax.sparse import _ffi_cuda, blob24, compress24, this_machine
from esparse_jax.sparse._timing import ROTATED_BYTES, random_24, timer_operands
from esparse_jax.sparse.tune import prefill_plans

SHAPES = dict.fromkeys(
    f"{out}x{channels}"
    for name in ("llama-7b", "table-5", "llama-13b", "llama-3-8b", "llama-70b")
    for out, channels in PUBLISHED_SHAPES[name].values()
)


@dataclass(frozen=True)
class Options:
    """What to time."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """OUTxCHANNEL, multiples of 64."""
    rows: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    dtype: str = "float16"
    replays: int = 5
    csv: Path | None = None


def main(options: Options) -> None:
    """Prints a line for each shape and number of rows; writes all figures as CSV."""
    machine = this_machine()
    if machine is None or not _ffi_cuda.prefill_runs(machine.capability):
        raise SystemExit(
            "benchmarks/prefill_plans.py times an NVIDIA GPU of compute capability 9.0, with a "
            "build for it; `esparse doctor` says what is missing."
        )
    lines: list[dict[str, object]] = []
    losses = []
    for shape in options.shapes:
        out, channels = map(int, shape.split("x"))
        blob = blob24(compress24(random_24(jax.random.key(0), out, channels, options.dtype)))
        copies = math.ceil(ROTATED_BYTES / blob.nbytes)
        blobs = jnp.tile(blob.data, (copies, 1))
        for rows in options.rows:
            x = jax.random.normal(jax.random.key(1), (rows, channels)).astype(options.dtype)
            y = jnp.zeros((rows, out), options.dtype)
            time = functools.partial(
                _ffi_cuda._extension().prefill_time,
                **timer_operands(x, blobs, y),
                launches=max(10, copies),
                replays=options.replays,
            )

            def microseconds(plan, time=time):
                return time(plan=_ffi_cuda.prefill_plan(plan).tolist())

            figures = [(microseconds(plan), plan) for plan in prefill_plans(rows)]
            best, plan = min(figures, key=lambda figure: figure[0])
            rule = statistics.median(microseconds({}) for _ in range(3))
            best = min(best, statistics.median(microseconds(plan) for _ in range(3)))
            losses.append(rule / best)
            cut = ", ".join(f"{name} {value}" for name, value in plan.items())
            print(
                f"{shape:>12s} {rows:5d} rows: rule {rule:8.2f}, best {best:8.2f} [{cut}]",
                flush=True,
            )
            fields = {"out": out, "channels": channels, "rows_of_x": rows}
            for figure, plan in [(rule, {}), *figures]:
                named = {name: plan.get(name, "") for name in _ffi_cuda.PREFILL_PLAN_VALUES}
                lines.append(fields | named | {"microseconds": round(figure, 3)})
    mean = statistics.geometric_mean(losses)
    print(f"rule over best, geometric mean: {mean:.4f}, at most {max(losses):.3f}")
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
