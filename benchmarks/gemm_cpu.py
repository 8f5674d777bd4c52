"""The 2:4 product on the CPU against every dense form XLA has, in one run.

Times `sparse_matmul` through XLA FFI and the dense products under `jax.jit`, each rotating over
weights of its own, so that none is found in a cache by the next call; all methods take turns within
a pass, and a figure is the median over passes. Ratios are formed within a pass (both sides share
that moment's clock and neighbours) and then their median is taken, with the smallest and largest.

    python benchmarks/gemm_cpu.py                        # the table below, some minutes
    python benchmarks/gemm_cpu.py --rows 1 --dtypes float32 --json gemm_cpu.json

Dense forms: `dot` is lax.dot_general(x, w[out, channel]), `dot32` the same with a float32 result
that is then rounded, `x@w.T` what a user writes, `mulsum` a multiply and a sum in float32, for one
row only.
`x@wT` and `x@wT32` keep the weight transposed, [channel, out]: another layout than a checkpoint's,
shown beside and counted among the best as well, so that no layout is left out.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from esparse_jax.atomic import write_text
from esparse_jax.sparse import _ffi as ffi
from esparse_jax.sparse import compress24, decompress24, sparse_matmul


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shapes: tuple[str, ...] = ("4096x4096", "11008x4096")
    """OUTxCHANNEL of each weight."""
    rows: tuple[int, ...] = (1, 8, 64, 256)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    passes: int = 7
    rotate_mb: int = 320
    """Bytes of weights each method walks through before it meets one again, in MB. More than the
    last-level cache this process can have to itself."""
    levels: tuple[str, ...] = ()
    """Instruction-set levels to time beside the best one, such as avx2; they call the product
    directly."""
    json: Path | None = None
    """Also write the figures here."""


def _dense_forms(rows: int, dtype: jnp.dtype) -> dict[str, tuple[bool, Callable]]:
    """Name -> (whether the weight is stored transposed, the product)."""
    by_channel = (((1,), (1,)), ((), ()))

    def dot32(x, w):
        y = jax.lax.dot_general(x, w, by_channel, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    def transposed32(x, w):
        return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)

    def mulsum(x, w):
        wide = w.astype(jnp.float32) * x.astype(jnp.float32)
        return jnp.sum(wide, axis=1)[None, :].astype(x.dtype)

    forms = {
        "dot": (False, lambda x, w: jax.lax.dot_general(x, w, by_channel)),
        "x@w.T": (False, lambda x, w: x @ w.T),
        "x@wT": (True, lambda x, w: x @ w),
    }
    if dtype != jnp.float32:
        forms["dot32"] = (False, dot32)
        forms["x@wT32"] = (True, transposed32)
    if rows == 1:
        forms["mulsum"] = (False, mulsum)
    return forms


def _weight(key: jax.Array, out: int, channel: int, dtype: jnp.dtype) -> jax.Array:
    """A random 2:4 weight, made on the device."""

    def make(key):
        weight_key, mask_key = jax.random.split(key)
        weight = jax.random.normal(weight_key, (out, channel // 4, 4), jnp.float32)
        score = jax.random.uniform(mask_key, weight.shape)
        keep = jnp.argsort(jnp.argsort(score, axis=2), axis=2) < 2
        return jnp.where(keep, weight, 0).reshape(out, channel).astype(dtype)

    return jax.jit(make)(key)


@dataclass(frozen=True)
class Method:
    name: str
    call: Callable
    weights: list


def _methods(rows: int, out: int, channel: int, dtype: jnp.dtype, options: Options) -> list[Method]:
    """All contestants, each with weights enough to leave the caches behind."""
    dense_bytes = out * channel * dtype.itemsize
    dense_count = max(2, -(-options.rotate_mb * 2**20 // dense_bytes))
    sparse_bytes = dense_bytes // 2 + out * channel // 8
    sparse_count = max(2, -(-options.rotate_mb * 2**20 // sparse_bytes))
    weight = _weight(jax.random.key(0), out, channel, dtype)
    packed = compress24(weight)

    def copies(array, count: int) -> list:
        return [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), array) for _ in range(count)]

    packed_copies = copies(packed, sparse_count)
    methods = [Method("sparse", jax.jit(sparse_matmul), packed_copies)]
    for level in options.levels:
        call = jax.jit(
            lambda x, c, level=level: ffi.cpu_product(x, c.values, c.indices, level=level)
        )
        methods.append(Method(level, call, packed_copies))
    straight = copies(weight, dense_count)
    transposed = copies(weight.T, dense_count)
    for name, (turned, function) in _dense_forms(rows, dtype).items():
        methods.append(Method(name, jax.jit(function), transposed if turned else straight))
    return methods


def _seconds_per_call(method: Method, x: jax.Array, weights: list) -> float:
    begin = time.perf_counter()
    for weight in weights:
        y = method.call(x, weight)
    y.block_until_ready()
    return (time.perf_counter() - begin) / len(weights)


def _time_all(methods: list[Method], x: jax.Array, passes: int) -> dict[str, list[float]]:
    """Microseconds a call of each method, one figure a pass.

    A method more than four times as slow as the best one in a first trial is timed on two weights a
    pass: it decides nothing, and would take nearly all of the time.
    """
    trial = {}
    for method in methods:  # compiled already, by the check
        trial[method.name] = _seconds_per_call(method, x, method.weights[:2])
    fastest = min(trial.values())
    figures = {method.name: [] for method in methods}
    for _ in range(passes):
        for method in methods:
            slow = trial[method.name] > 4 * fastest
            weights = method.weights[:2] if slow else method.weights
            figures[method.name].append(1e6 * _seconds_per_call(method, x, weights))
    return figures


def _check(methods: list[Method], x: jax.Array) -> None:
    """Every contestant must compute the same product."""
    weight = np.asarray(decompress24(methods[0].weights[0]), np.float64)
    true = np.asarray(x, np.float64) @ weight.T
    scale = np.abs(true).max()
    for method in methods:
        error = np.abs(np.asarray(method.call(x, method.weights[0]), np.float64) - true).max()
        # XLA's own low-precision dots round products or partial sums as well: a few per cent.
        if error > 0.05 * scale:
            raise AssertionError(f"{method.name} is off by {error:.3g} where |y| <= {scale:.3g}")


def main(options: Options) -> None:
    header = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "levels": list(ffi.cpu_levels()),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "options": {name: v for name, v in asdict(options).items() if name != "json"},
        "load_average": os.getloadavg(),
        "commit": _commit(),
    }
    print(
        f"{header['processor']}, {header['cpus']} CPUs, levels {', '.join(header['levels'])}, "
        f"jax {header['jax']}, load {header['load_average'][0]:.1f}"
    )
    results = []
    for dtype_name in options.dtypes:
        dtype = jnp.dtype(dtype_name)
        for shape in options.shapes:
            out, channel = (int(size) for size in shape.split("x"))
            for rows in options.rows:
                methods = _methods(rows, out, channel, dtype, options)
                x = jax.random.normal(jax.random.key(1), (rows, channel), jnp.float32).astype(dtype)
                _check(methods, x)
                figures = _time_all(methods, x, options.passes)
                results.append(_report(dtype_name, shape, rows, methods, figures, options))
                del methods
    if options.json is not None:
        write_text(options.json, json.dumps({**header, "results": results}, indent=1) + "\n")


def _report(dtype, shape, rows, methods, figures, options) -> dict:
    median = {name: statistics.median(values) for name, values in figures.items()}
    dense = [name for name in median if name not in ("sparse", *options.levels)]
    best = min(dense, key=median.get)
    ratios = sorted(
        min(figures[name][i] for name in dense) / sparse
        for i, sparse in enumerate(figures["sparse"])
    )
    rate = methods[0].weights[0].nbytes / median["sparse"] / 1e3
    others = ", ".join(f"{name} {value:.0f}" for name, value in median.items() if name != "sparse")
    ratio = statistics.median(ratios)
    print(
        f"{dtype:9s}{shape:>11s} rows {rows:3d}: sparse {median['sparse']:7.0f} us "
        f"({rate:4.1f} GB/s), {ratio:4.2f}x [{ratios[0]:.2f}-{ratios[-1]:.2f}] of the best dense, "
        f"{best} | {others}",
        flush=True,
    )
    return {
        "dtype": dtype,
        "shape": shape,
        "rows": rows,
        "microseconds": median,
        "best_dense": best,
        "ratio": ratio,
        "ratio_range": [ratios[0], ratios[-1]],
        "sparse_gb_per_s": rate,
    }


def _commit() -> str | None:
    """The checkout this runs in, with "-dirty" where it differs from its commit."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git += ["--exclude=*", "--abbrev=40"]  # the commit itself, not the tag before it
    try:
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Options))
