"""Table 5 and decoding on an NVIDIA GPU: the 2:4 product against dense, in one run.

    python benchmarks/gemm.py                                   # all shapes, fp16 and bf16
    python benchmarks/gemm.py --shapes 4096x4096 --rows 1 16 --dtypes float16 --json gemm.json

Every figure is the time of a whole product, row-major x to row-major y, inside one jitted chain of
products over different weights (at least 300 MB of them, so that none waits in a cache), the calls
queued, the median over batches. The products run one after the other.

- `decode`: the decode kernel on the device form of the weight, the weights being arguments of the
  jit and said to be so (`prefetch`); `careful`: the same without `prefetch`.
- `xla`: `lax.dot_general` with the dense weight [out, channel], autotuned by XLA.
- `torch`: `torch.mm` by cuBLAS and cuBLASLt, x first and weight first, the fastest of the four, in
  a CUDA graph; left out where torch is not installed.
- `bound`: the compressed bytes over the bandwidth of a large device copy in the same run.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from esparse_jax.sparse import Blob24, blob24, compress24, fused_matmul, sparse_matmul

try:
    import torch
except ImportError:
    torch = None

# E-Sparse table 5: (out, channel) of the 65B and 175B layers it times, with 16,384 rows there.
TABLE5 = ("5376x14336", "14336x1792", "14336x7168", "7168x14336")
# LLaMA-7B's fused QKV, o, gate+up and down, and the down projection of 70B.
LLAMA = ("4096x4096", "12288x4096", "22016x4096", "4096x11008", "8192x28672")
SERIAL = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shapes: tuple[str, ...] = LLAMA + TABLE5
    """OUTxCHANNEL of each weight, multiples of 64."""
    rows: tuple[int, ...] = (1, 8, 16)
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    rotate_mb: int = 300
    """Bytes of weights a chain walks through before it meets one again, in MB."""
    turns: int = 8
    """How often the chain runs in a batch."""
    batches: int = 7
    dense: bool = True
    """Also time the dense products."""
    json: Path | None = None
    """Also write the figures here."""


@dataclass
class Row:
    """One line of the table; times in microseconds per product."""

    out: int
    channels: int
    rows: int
    dtype: str
    decode: float
    careful: float
    bound: float
    error: float
    dense: dict[str, float] = field(default_factory=dict)

    @property
    def best_dense(self) -> float:
        """The fastest dense product of this run, or nan."""
        return min(self.dense.values(), default=math.nan)

    def __str__(self) -> str:
        dense = " ".join(f"{self.dense.get(name, math.nan):8.2f}" for name in ("xla", "torch"))
        return (
            f"{self.out:6d} x {self.channels:5d} {self.rows:3d} {self.dtype:8s} {dense} "
            f"{self.decode:8.2f} {self.careful:8.2f} {self.bound:7.2f} "
            f"{self.best_dense / self.decode:6.2f} "
            f"{self.bound / self.decode:6.2f}  {self.error:.1e}"
        )


HEADER = (
    "   out x chan. row dtype         xla    torch   decode  careful   bound  ratio  share  error"
)


def random_24(key: jax.Array, out: int, channels: int, dtype: str) -> jax.Array:
    """A random 2:4 weight."""
    values, places = jax.random.split(key)
    weight = jax.random.normal(values, (out, channels), jnp.float32) / math.sqrt(channels / 2)
    order = jnp.argsort(jax.random.uniform(places, (out, channels // 4, 4)), axis=-1)
    mask = (order < 2).reshape(out, channels)
    return jnp.where(mask, weight, 0).astype(dtype)


random_24 = jax.jit(random_24, static_argnums=(1, 2, 3))


def _dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def _seconds(call: Callable[[], object], *, repeats: int, batches: int) -> float:
    """Median over batches of the time of one of `repeats` queued calls."""
    for _ in range(3):
        jax.block_until_ready(call())
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written bytes counted."""
    source = jnp.ones(1 << 29, jnp.int32)
    copy = jax.jit(jnp.copy)
    return 2 * source.nbytes / _seconds(lambda: copy(source), repeats=4, batches=7)


def dense_time(xs: list, weights: list, options: Options) -> float:
    """Microseconds per dense product of a chain over the weights, run in one jitted loop."""

    def chain(xs, weights):
        def once(turn, before):
            results, last = [], (turn, before[-1])
            for i, x in enumerate(xs):
                # Not before the last one, nor outside the loop, nor merged with a neighbour.
                x, last = jax.lax.optimization_barrier((x, last))
                last = _dense(x, weights[i % len(weights)])
                results.append(last)
            return results

        start = jax.eval_shape(lambda xs, w: [_dense(x, w) for x in xs], xs, weights[0])
        start = [jnp.zeros(y.shape, y.dtype) for y in start]
        return jax.lax.fori_loop(0, options.turns, once, start)

    compiled = jax.jit(chain, compiler_options=SERIAL)
    seconds = _seconds(lambda: compiled(xs, weights), repeats=3, batches=options.batches)
    return seconds / (len(xs) * options.turns) * 1e6


def decode_time(xs: list, blobs: list, prefetch: bool, options: Options) -> float:
    """Microseconds per product of a chain by the decode kernel over the weights, in one jit.

    Each product has the one before as its residual: a step of a decoder has such a chain, it keeps
    the products in order without a kernel between them, and it only adds to their work.
    """

    @partial(jax.jit, donate_argnums=2)
    def chain(xs, blobs, y):
        for i, x in enumerate(xs):
            y = fused_matmul(x, blobs[i % len(blobs)], residual=y, prefetch=prefetch)
        return y

    y = jnp.zeros((xs[0].shape[0], blobs[0].shape[0]), xs[0].dtype)
    times = []
    for batch in range(options.batches + 2):
        start = time.perf_counter()
        for _ in range(options.turns):
            y = chain(xs, blobs, y)
        jax.block_until_ready(y)
        if batch > 1:
            times.append((time.perf_counter() - start) / (options.turns * len(xs)))
    return statistics.median(times) * 1e6


def torch_time(rows: int, out: int, channels: int, dtype: str, count: int, copies: int) -> float:
    """Microseconds of the fastest of cuBLAS and cuBLASLt, in both orders of the operands."""
    kind = getattr(torch, dtype)
    xs = [torch.randn(rows, channels, device="cuda", dtype=kind) for _ in range(count)]
    weights = [torch.randn(out, channels, device="cuda", dtype=kind) for _ in range(copies)]
    best = math.inf
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        for multiply in (lambda x, w: torch.mm(x, w.t()), lambda x, w: torch.mm(w, x.t())):
            multiply(xs[0], weights[0])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i, x in enumerate(xs):
                    multiply(x, weights[i % copies])
            times = []
            for _ in range(9):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3 / count)
            best = min(best, statistics.median(times[2:]))
    torch.backends.cuda.preferred_blas_library("default")
    return best


def measure(out: int, channels: int, dtype: str, bandwidth: float, options: Options) -> list[Row]:
    """All numbers of rows for one weight shape."""
    dense_bytes = 2 * out * channels
    copies = math.ceil(options.rotate_mb * 1e6 / (dense_bytes * 9 / 16))
    dense_copies = math.ceil(options.rotate_mb * 1e6 / dense_bytes)
    count = max(48, copies)
    weight = random_24(jax.random.key(out + channels), out, channels, dtype)
    blob = blob24(compress24(weight))
    blobs = [Blob24(blob.data + jnp.uint8(0), blob.shape, blob.dtype) for _ in range(copies)]
    weights = [weight + 0 for _ in range(dense_copies)]
    table = []
    for rows in options.rows:
        keys = jax.random.split(jax.random.key(rows), count)
        xs = [jax.random.normal(key, (rows, channels), jnp.float32).astype(dtype) for key in keys]
        y = sparse_matmul(xs[0], blob).astype(jnp.float32)
        exact = jax.lax.dot_general(
            xs[0].astype(jnp.float32),
            weight.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision="highest",
        )
        error = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
        line = Row(
            out,
            channels,
            rows,
            dtype,
            decode=decode_time(xs, blobs, True, options),
            careful=decode_time(xs, blobs, False, options),
            bound=blob.nbytes / bandwidth * 1e6,
            error=error,
        )
        if options.dense:
            line.dense["xla"] = dense_time(xs, weights, options)
            if torch is not None:
                line.dense["torch"] = torch_time(
                    rows, out, channels, dtype, max(48, dense_copies), dense_copies
                )
        print(line, flush=True)
        table.append(line)
    return table


def summary(table: list[Row]) -> list[str]:
    """Geometric means for each dtype and number of rows, and for all rows together."""

    def mean(values: list[float]) -> float:
        return math.exp(statistics.fmean(math.log(value) for value in values))

    lines = []
    for dtype in dict.fromkeys(row.dtype for row in table):
        of_dtype = [row for row in table if row.dtype == dtype]
        groups = [
            (str(n), [r for r in of_dtype if r.rows == n]) for n in {r.rows for r in of_dtype}
        ]
        for name, rows in [*groups, ("all", of_dtype)]:
            share = mean([row.bound / row.decode for row in rows])
            text = f"{dtype}, {name} rows: share of the bound {share:.3f}"
            if all(row.dense for row in rows):
                ratios = [row.best_dense / row.decode for row in rows]
                text += f", dense / decode {mean(ratios):.3f}, smallest {min(ratios):.2f}"
            lines.append(text)
    return lines


def main(options: Options) -> None:
    """Prints the table and writes it as JSON."""
    if jax.default_backend() != "gpu":
        raise SystemExit(
            "benchmarks/gemm.py times an NVIDIA GPU and JAX sees none: install jax[cuda13], or run "
            "benchmarks/gemm_cpu.py for the processor."
        )
    bandwidth = copy_bandwidth()
    machine = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "torch": None if torch is None else torch.__version__,
        "python": platform.python_version(),
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
    }
    print(machine, HEADER, sep="\n", flush=True)
    table, lines = [], []
    for dtype in options.dtypes:
        for shape in options.shapes:
            out, channels = map(int, shape.split("x"))
            table += measure(out, channels, dtype, bandwidth, options)
            lines = summary(table)
            if (
                options.json is not None
            ):  # after every shape: a run that is cut short keeps its part
                rows = [asdict(row) | {"best_dense": row.best_dense} for row in table]
                report = {"machine": machine, "options": asdict(options), "rows": rows}
                options.json.write_text(
                    json.dumps(report | {"summary": lines}, indent=1, default=str)
                )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
