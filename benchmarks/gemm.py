"""Table 5 on an NVIDIA GPU: the 2:4 product against dense, for decoding and for whole prompts.

    python benchmarks/gemm.py --json gemm.json                  # everything; two hours and a half
    python benchmarks/gemm.py --shapes table-5 --rows 16 16384 --dtypes float16
    python benchmarks/gemm.py --shapes 4096x4096 --columns xla dispatch --seconds 500

Every figure is the time of a whole product, row-major x to row-major y, in microseconds: inside one
jitted chain of products, or one CUDA graph, over weights that come to 300 MB with x and y (two of
them where x and y are that large), the calls queued, the median over batches. The products run one
after the other.

- `xla`: `lax.dot_general` with the dense weight [out, channel], autotuned by XLA.
- `torch`: `torch.mm` by cuBLAS and cuBLASLt, x first and weight first, the fastest of the four, in
  a CUDA graph; left out where torch is not installed.
- `cuslt`: `sparse_matmul(backend="cusparselt")`, by the library's own choice of algorithm; and
  `tuned`: by the one that the tuning table has for this product.
- `decode`: the decode kernel, up to 16 rows, the weights being arguments of the jit and said to be
  so (`prefetch`); `careful`: the same without `prefetch`.
- `prefill`: the prefill kernel, by its own rule.
- `dispatch`: `sparse_matmul(x, blob)`, by that table, and up to 16 rows with `prefetch`, as who
  calls it may whose weights are arguments of the jit.
- `bound`: the bytes of compressed weight, x and y over the bandwidth of a large device copy in the
  same run; `share`, what of `dispatch` it is. With many rows it is arithmetic that binds.
- `ratio`: the fastest dense product over `dispatch`.
- `error`: of `dispatch`, relative to float32.

Each column multiplies for `--warm` seconds before it is timed: else the first of a line would be
timed before the power limit has lowered the clock, and those behind it after.

The table is this machine's own, from `esparse tune`, or `--table FILE`. A run that comes to its
`--seconds`, or is stopped, has its figures in the JSON file.
"""

import contextlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from esparse_jax.atomic import write_text
from esparse_jax.models import PUBLISHED_SHAPES
from esparse_jax.sparse import (
    Algorithm,
    Blob24,
    blob24,
    compress24,
    fused_matmul,
    library_facts,
    load_table,
    sparse_matmul,
    stored_table,
    this_machine,
    use_table,
)
from esparse_jax.sparse._ffi_cuda import MAX_ROWS, prefill_runs
from esparse_jax.sparse._timing import (
    Chain,
    chain_inputs,
    chain_rotation,
    copy_bandwidth,
    estimate,
    exact_product,
    random_24,
    seconds,
)
from esparse_jax.sparse.table import TuningTable

try:
    import torch
except ImportError:
    torch = None
if torch is not None and not torch.cuda.is_available():  # a build for the CPU
    torch = None

COLUMNS = ("xla", "torch", "cuslt", "tuned", "decode", "careful", "prefill", "dispatch")
DENSE = ("xla", "torch")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shapes: tuple[str, ...] = tuple(PUBLISHED_SHAPES)
    """OUTxCHANNEL of each weight, multiples of 64; or a published name: table-5, llama-7b, ..."""
    rows: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 1024, 4096, 16384)
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    columns: tuple[str, ...] = COLUMNS
    """Which products to time; dispatch is timed in any case."""
    table: Path | None = None
    """Tuning table to use; the machine's own if not given."""
    batches: int = 7
    warm: float = 0.3
    """Seconds that a column multiplies before it is timed, to have the clock of a long run."""
    seconds: float | None = None
    """Begin nothing that would not end in this time, by the slowest number of rows so far."""
    json: Path | None = None
    """Also write the figures here, after every line."""


@dataclass
class Row:
    """One line of the table; times in microseconds per product, by column."""

    out: int
    channels: int
    rows: int
    dtype: str
    bound: float
    error: float
    times: dict[str, float] = field(default_factory=dict)
    torch: dict[str, float] = field(default_factory=dict)
    algorithm: int | None = None
    failed: dict[str, str] = field(default_factory=dict)
    """Why a column has no time."""

    @property
    def best_dense(self) -> float:
        """The fastest dense product of this run, or nan."""
        return min((self.times[name] for name in DENSE if name in self.times), default=math.nan)

    @property
    def ratio(self) -> float:
        """How many times as fast as that the dispatched product is."""
        return self.best_dense / self.times.get("dispatch", math.nan)

    @property
    def share(self) -> float:
        """What of its time the bytes take."""
        return self.bound / self.times.get("dispatch", math.nan)

    def derived(self) -> dict[str, float | None]:
        """What follows from the times; None where a column is missing."""
        values = {"best_dense": self.best_dense, "ratio": self.ratio, "share": self.share}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def __str__(self) -> str:
        times = " ".join(f"{self.times.get(name, math.nan):9.2f}" for name in COLUMNS)
        return (
            f"{self.out:6d} x {self.channels:5d} {self.rows:5d} {self.dtype:8s} {times} "
            f"{self.bound:8.2f} {self.ratio:6.2f} {self.share:6.2f}  {self.error:.1e}"
        )


HEADER = (
    f"   out x chan.  rows dtype    {' '.join(f'{name:>9s}' for name in COLUMNS)}    bound  ratio  "
    f"share  error"
)


def wanted_shapes(names: tuple[str, ...]) -> list[tuple[int, int]]:
    """(out, channel) of each, once."""
    shapes: list[tuple[int, int]] = []
    for name in names:
        if name in PUBLISHED_SHAPES:
            shapes += PUBLISHED_SHAPES[name].values()
        else:
            out, channels = map(int, name.split("x"))
            shapes.append((out, channels))
    return list(dict.fromkeys(shapes))


def timing(options: Options) -> dict[str, Any]:
    """How a column is timed."""
    return {"batches": options.batches, "warm_seconds": options.warm}


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a dense weight [out, channel]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def decode_chain(
    xs: list[jax.Array], blobs: list[Blob24], prefetch: bool, options: Options
) -> Callable[[], float]:
    """Compiles a chain by the decode kernel over the weights, in one jit; what times a product.

    Each product has the one before as its residual: a step of a decoder has such a chain, it keeps
    the products in order without a kernel between them, and it only adds to their work.
    """

    @partial(jax.jit, donate_argnums=2)
    def chain(xs, blobs, y):
        for i, x in enumerate(xs):
            y = fused_matmul(x, blobs[i % len(blobs)], residual=y, prefetch=prefetch)
        return y

    y = jnp.zeros((xs[0].shape[0], blobs[0].shape[0]), xs[0].dtype)
    compiled = chain.lower(xs, blobs, y).compile()

    def call() -> jax.Array:
        nonlocal y
        y = compiled(xs, blobs, y)
        return y

    return lambda: seconds(call, **timing(options)) / len(xs) * 1e6


def torch_times(
    xs: list[jax.Array], copies: list[jax.Array], warm_seconds: float
) -> dict[str, float]:
    """Microseconds by cuBLAS and cuBLASLt, each in both orders of the operands.

    Of the very arrays that XLA multiplies: zeros take less power, so a large product of other
    numbers has another clock.
    """
    jax.block_until_ready((xs, copies))
    xs, weights = ([torch.from_dlpack(array) for array in each] for each in (xs, copies))
    (rows, channels), out = xs[0].shape, weights[0].shape[0]
    copies, count = len(weights), len(weights) * len(xs)
    orders = {
        "x first": lambda x, w: torch.mm(x, w.t()),
        "weight first": lambda x, w: torch.mm(w, x.t()),
    }
    found = {}
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        for order, multiply in orders.items():
            multiply(xs[0], weights[0])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(count):
                    multiply(xs[i // copies], weights[i % copies])
            replays = max(1, math.ceil(1e4 / (estimate(rows, (out, channels)) * count)))

            def milliseconds(graph=graph, replays=replays) -> float:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(replays):  # queued, so that the GPU never waits for the host
                    graph.replay()
                end.record()
                end.synchronize()
                return start.elapsed_time(end)

            milliseconds()
            warm = 0.0
            while warm < 1e3 * warm_seconds:
                warm += milliseconds()
            usual = statistics.median([milliseconds() for _ in range(7)])
            found[f"{library}, {order}"] = usual * 1e3 / (count * replays)
            del graph
    torch.backends.cuda.preferred_blas_library("default")
    del xs, weights
    torch.cuda.empty_cache()
    return found


class Weights:
    """Copies of one random 2:4 weight, dense and compressed; as many as were asked for so far."""

    def __init__(self, out: int, channels: int, dtype: str):
        self.shape, self.dtype = (out, channels), dtype
        self._dense = [random_24(jax.random.key(out + channels), out, channels, dtype)]
        self._blobs = [blob24(compress24(self._dense[0]))]

    @property
    def weight(self) -> jax.Array:
        return self._dense[0]

    @property
    def blob(self) -> Blob24:
        return self._blobs[0]

    def dense(self, rows: int) -> list[jax.Array]:
        copies = chain_rotation(self.weight.nbytes, rows, self.shape)
        self._dense += [self.weight + 0 for _ in range(copies - len(self._dense))]
        return self._dense[:copies]

    def blobs(self, rows: int) -> list[Blob24]:
        copies = chain_rotation(self.blob.nbytes, rows, self.shape)
        self._blobs += [
            Blob24(self.blob.data + jnp.uint8(0), self.blob.shape, self.blob.dtype)
            for _ in range(copies - len(self._blobs))
        ]
        return self._blobs[:copies]


def measure(
    weights: Weights, rows: int, bandwidth: float, table: TuningTable | None, options: Options
) -> Row:
    """All columns for one number of rows; one that fails costs itself only."""
    (out, channels), dtype = weights.shape, weights.dtype

    def chained(product: Callable, copies: list) -> Callable[[], float]:
        xs = [x] * chain_inputs(rows, weights.shape, len(copies))
        chain = Chain(product, xs, copies, microseconds=estimate(rows, weights.shape))
        return partial(chain.microseconds, **timing(options))

    x = jax.random.normal(jax.random.key(rows), (rows, channels), jnp.float32).astype(dtype)
    exact = exact_product(x, weights.weight)
    y = jax.jit(sparse_matmul)(x, weights.blob).astype(jnp.float32)
    error = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    del exact, y
    moved = weights.blob.nbytes + 2 * rows * (out + channels)
    line = Row(out, channels, rows, dtype, bound=moved / bandwidth * 1e6, error=error)
    times = line.times

    record = None if table is None else table.find(weights.shape, dtype, rows)
    if record is not None and record.cusparselt is not None:
        line.algorithm = record.cusparselt.algorithm.id

    def by_library(algorithm: Algorithm | None) -> Callable:
        return partial(sparse_matmul, backend="cusparselt", algorithm=algorithm)

    dense_copies, blobs = weights.dense(rows), weights.blobs(rows)

    def by_torch() -> float:
        xs = [x] * chain_inputs(rows, weights.shape, len(dense_copies))
        line.torch = torch_times(xs, dense_copies, options.warm)
        return min(line.torch.values())

    def compiled(column: str) -> Callable[[], float] | None:
        """What times a column, or None where it does not apply."""
        if column == "xla":
            return chained(dense, dense_copies)
        if column == "torch" and torch is not None:
            return by_torch
        if column == "cuslt" and library_facts().version is not None:
            return chained(by_library(None), blobs)
        if column == "tuned" and record is not None and record.cusparselt is not None:
            algorithm = record.cusparselt.algorithm
            if rows != record.rows:  # its workspace is that of other rows
                algorithm = Algorithm(algorithm.id, algorithm.split_k, algorithm.split_k_mode)
            return chained(by_library(algorithm), blobs)
        if column in ("decode", "careful") and rows <= MAX_ROWS:
            # So many that the start of a graph does not count.
            long = min(256, math.ceil(2000 / estimate(rows, weights.shape)))
            return decode_chain([x] * max(long, len(blobs)), blobs, column == "decode", options)
        if column == "prefill" and prefill_runs(this_machine().capability):
            return chained(partial(sparse_matmul, backend="prefill"), blobs)
        if column == "dispatch":
            return chained(partial(sparse_matmul, prefetch=rows <= MAX_ROWS), blobs)
        return None

    # Compiled at once, timed one by one.
    with ThreadPoolExecutor() as threads:
        columns = dict.fromkeys((*options.columns, "dispatch"))
        timers = {column: threads.submit(compiled, column) for column in columns}
    for column, timer in timers.items():
        try:
            run = timer.result()
            if run is not None:
                times[column] = run()
        except (RuntimeError, ValueError) as error:  # of memory that is missing, above all
            line.failed[column] = " ".join(str(error).split())[:300]
    return line


def summary(table: list[Row]) -> list[str]:
    """Geometric means for each dtype and number of rows."""
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in table):
        of_dtype = [row for row in table if row.dtype == dtype]
        for number in dict.fromkeys(row.rows for row in of_dtype):
            rows = [row for row in of_dtype if row.rows == number]
            rows = [row for row in rows if "dispatch" in row.times]
            if not rows:
                continue
            share = statistics.geometric_mean([row.share for row in rows])
            text = f"{dtype}, {number} rows, {len(rows)} shapes: share of the bound {share:.3f}"
            ratios = [row.ratio for row in rows]
            if all(map(math.isfinite, ratios)):
                mean = statistics.geometric_mean(ratios)
                text += f", dense / dispatch {mean:.3f}, {min(ratios):.2f} to {max(ratios):.2f}"
            for name in ("cuslt", "tuned", "decode", "careful", "prefill"):
                if all(name in row.times for row in rows):
                    mean = statistics.geometric_mean(
                        [row.times[name] / row.times["dispatch"] for row in rows]
                    )
                    text += f", {name} / dispatch {mean:.3f}"
            lines.append(text)
    return lines


def lines_within(
    bandwidth: float, table: TuningTable | None, options: Options, started: float
) -> Iterator[Row]:
    """A line for every product. Ends where time does."""
    slowest = 0.0
    for out, channels in wanted_shapes(options.shapes):
        for dtype in options.dtypes:
            weights = None
            for rows in options.rows:
                begun = time.monotonic()
                if options.seconds is not None and begun - started + slowest > options.seconds:
                    return
                weights = weights or Weights(out, channels, dtype)
                yield measure(weights, rows, bandwidth, table, options)
                slowest = max(slowest, time.monotonic() - begun)


def main(options: Options) -> None:
    """Prints the table and writes it as JSON."""
    started = time.monotonic()
    unknown = set(options.columns) - set(COLUMNS)
    if unknown:
        raise SystemExit(f"columns are {', '.join(COLUMNS)}; got {', '.join(sorted(unknown))}.")
    machine = this_machine()
    if machine is None:
        raise SystemExit(
            "benchmarks/gemm.py times an NVIDIA GPU and JAX sees none: install jax[cuda13], or run "
            "benchmarks/gemm_cpu.py for the processor."
        )
    given = None if options.table is None else load_table(options.table)
    table = given or stored_table(machine).table
    bandwidth = copy_bandwidth()
    facts = {
        "device": machine.device,
        "capability": machine.capability,
        "jax": jax.__version__,
        "torch": None if torch is None else torch.__version__,
        "cusparselt": machine.cusparselt,
        "python": platform.python_version(),
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "table": str(options.table) if given else list(stored_table(machine).files),
    }
    print(facts, HEADER, sep="\n", flush=True)
    measured: list[Row] = []
    asked = len(options.dtypes) * len(wanted_shapes(options.shapes)) * len(options.rows)

    def write() -> None:
        if options.json is not None:
            rows = [asdict(row) | row.derived() for row in measured]
            report = {"machine": facts, "options": asdict(options), "rows": rows}
            report |= {"asked": asked, "summary": summary(measured)}
            write_text(options.json, json.dumps(report, indent=1, default=str) + "\n")

    with use_table(given) if given else contextlib.nullcontext():
        for line in lines_within(bandwidth, table, options, started):
            print(line, flush=True)
            for column, reason in line.failed.items():
                print(f"  no {column}: {reason}")
            measured.append(line)
            write()
    print(*summary(measured), sep="\n")
    if len(measured) < asked:
        print(f"{len(measured)} of {asked} products: the {options.seconds:g} seconds are over")


if __name__ == "__main__":
    main(tyro.cli(Options))
