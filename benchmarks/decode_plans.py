"""Every way the decode kernel can cut its work, timed: what its choice of a plan is read off.

    python benchmarks/decode_plans.py --csv decode_plans.csv

Times are microseconds a product in a CUDA graph of products over 300 MB of weights or more, each
fetching its weights before the one before has ended (`prefetch`), the median over replays. A line
for each shape and number of rows holds the kernel's own choice against the best plan.
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
from esparse_jax.sparse import _ffi_cuda, blob24, compress24
from esparse_jax.sparse._timing import copy_bandwidth, random_24, timer_operands
from esparse_jax.sparse.tune import decode_plans

SHAPES = dict.fromkeys(
    f"{out}x{channels}"
    for name in ("llama-7b", "table-5", "llama-13b", "llama-3-8b", "llama-70b")
    for out, channels in PUBLISHED_SHAPES[name].values()
) | {"24576x8192": None}  # q, k, v of 65B


@dataclass(frozen=True)
class Options:
    """What to time."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """OUTxCHANNEL, multiples of 64."""
    rows: tuple[int, ...] = (1, 8, 16)
    dtype: str = "float16"
    prefetch: bool = True
    rotate_mb: int = 300
    replays: int = 3
    csv: Path | None = None


def main(options: Options) -> None:
    """Prints a line for each shape and number of rows; writes all figures as CSV."""
    if jax.default_backend() != "gpu":
        raise SystemExit("benchmarks/decode_plans.py times an NVIDIA GPU, and JAX sees none.")
    extension = _ffi_cuda._extension()
    bandwidth = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    lines, shares, losses = [], [], []
    for shape in options.shapes:
        out, channels = map(int, shape.split("x"))
        blob = blob24(compress24(random_24(jax.random.key(0), out, channels, options.dtype)))
        copies = math.ceil(options.rotate_mb * 1e6 / blob.nbytes)
        blobs = jnp.tile(blob.data, (copies, 1))
        for rows in options.rows:
            x = jax.random.normal(jax.random.key(1), (rows, channels)).astype(options.dtype)
            y = jnp.zeros((rows, out), options.dtype)
            operands = timer_operands(x, blobs, y)
            product = {name: operands[name] for name in ("rows", "out", "channels", "dtype")}
            time = functools.partial(
                extension.decode_time,
                **operands,
                launches=max(24, copies),
                replays=options.replays,
            )

            def used(plan, product=product):
                return extension.decode_used_plan(**product, plan=_ffi_cuda._plan(plan).tolist())

            def microseconds(plan, prefetch=options.prefetch, time=time):
                return time(plan=_ffi_cuda._plan(plan).tolist(), prefetch=prefetch)

            figures = []
            for plan in decode_plans():
                try:
                    # One that does not fit is cut down to another, timed by its own name.
                    if plan.items() <= used(plan).items():
                        figures.append((microseconds(plan), plan))
                except RuntimeError as error:
                    print(f"{shape} {rows} rows: {plan} failed: {error}", flush=True)
            best, plan = min(figures, key=lambda figure: figure[0])
            chosen = statistics.median(microseconds({}) for _ in range(3))
            best = min(best, statistics.median(microseconds(plan) for _ in range(3)))
            alone = statistics.median(microseconds({}, prefetch=False) for _ in range(3))
            bound = blob.nbytes / bandwidth * 1e6
            shares.append(bound / chosen)
            losses.append(chosen / best)
            cut = " ".join(f"{name[0]}{value}" for name, value in plan.items())
            print(
                f"{shape:>12s} {rows:2d} rows: chosen {chosen:6.2f} (alone {alone:6.2f}), best "
                f"{best:6.2f} [{cut}], bound {bound:6.2f}",
                flush=True,
            )
            lines += [
                {
                    "out": out,
                    "channels": channels,
                    "rows": rows,
                    **plan,
                    "microseconds": round(t, 3),
                }
                for t, plan in figures
            ]
    print(
        f"geometric means: share of the bound {statistics.geometric_mean(shares):.3f}, chosen over "
        f"best {statistics.geometric_mean(losses):.4f}, at most {max(losses):.3f}"
    )
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
