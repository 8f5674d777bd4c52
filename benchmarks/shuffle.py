"""The channel shuffle: how much it recovers, and how long it takes to compile and to run.

Efficacy is the share of the gap between the given channel order and unstructured pruning of every
row (at the pattern's sparsity) that an order recovers in retained metric. It judges the search,
not the model. Scores are S = exp(N(0, 1) + 0.7 N(0, 1) per channel), numpy's default_rng(7).

    python benchmarks/shuffle.py                              # efficacy on this machine's device
    python benchmarks/shuffle.py --parts efficacy products shapes model   # all of it, on a GPU

Prints one table per part.
"""

import json
import statistics
import time
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from esparse_jax.atomic import write_text
from esparse_jax.pruning import swap
from esparse_jax.pruning.fixed_point import fixed_scores
from esparse_jax.pruning.mask import NMPattern
from esparse_jax.pruning.max_sum import max_sum
from esparse_jax.pruning.shuffle import SHUFFLES, channel_shuffle

# Channels x rows of the four searches of a LLaMA-7B layer, rows of shared inputs stacked.
LLAMA_7B = {
    "q/k/v": (4096, 12288),
    "o": (4096, 4096),
    "gate/up": (4096, 22016),
    "down": (11008, 4096),
}


@dataclass
class Arguments:
    """What to measure."""

    parts: tuple[Literal["efficacy", "products", "shapes", "model"], ...] = ("efficacy",)
    """efficacy: every method on the synthetic scores. products: the rate of the max-sum product in
    each of its forms. shapes: seconds for each shape. model: all layers of a 7B model in a row."""
    pattern: str = "2:4"
    channels: int = 1024
    rows: int = 2048
    """Channels and rows of the efficacy part."""
    methods: tuple[str, ...] = SHUFFLES
    """Methods of the efficacy part."""
    deals: tuple[str, ...] = ("default", "naive", "snake", "sorted")
    """default: each method's own."""
    scores: tuple[str, ...] = ("fixed", "float32")
    escape: int = 0
    """Kicks after every search; see `local_block_shuffle`."""
    shapes: tuple[str, ...] = (*(f"{c}x{r}" for c, r in LLAMA_7B.values()), "28672x8192")
    """Channels x rows of the shapes part."""
    shape_methods: tuple[str, ...] = ("strided", "full")
    """Methods of the shapes and model parts, with their own deal and the first of `scores`."""
    layers: int = 32
    """Layers of the model part."""
    repeats: int = 3
    json: Path | None = None
    """Also write all tables here."""


def synthetic_scores(channels: int, rows: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.exp(rng.standard_normal((rows, channels)) + 0.7 * rng.standard_normal(channels))


def device_scores(channels: int, rows: int) -> jax.Array:
    """Scores of the same distribution, drawn on the device: for timing, not for comparison."""

    @jax.jit
    def draw(key):
        noise, scale = jax.random.split(key)
        scale = 0.7 * jax.random.normal(scale, (1, channels))
        return jnp.exp(jax.random.normal(noise, (rows, channels)) + scale)

    return jax.block_until_ready(draw(jax.random.key(7)))


class Efficacy:
    """Kept sums in float64 on the host, so that they judge every device alike."""

    def __init__(self, scores: np.ndarray, pattern: NMPattern):
        self.scores, self.pattern = scores, pattern
        kept = scores.shape[1] * pattern.n // pattern.m
        self.given = self.kept(np.arange(scores.shape[1]))
        self.unstructured = np.sort(scores, axis=1)[:, -kept:].sum(dtype=np.float64)

    def kept(self, permutation: np.ndarray) -> float:
        grouped = self.scores[:, permutation].reshape(len(self.scores), -1, self.pattern.m)
        return np.sort(grouped, axis=2)[:, :, -self.pattern.n :].sum(dtype=np.float64)

    def __call__(self, permutation: np.ndarray) -> float:
        return (self.kept(permutation) - self.given) / (self.unstructured - self.given)


def seconds(call, repeats: int) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compiled(function, *arguments):
    start = time.perf_counter()
    executable = jax.jit(function).lower(*arguments).compile()
    return executable, time.perf_counter() - start


def efficacy(arguments: Arguments, pattern: NMPattern) -> list[dict]:
    scores = synthetic_scores(arguments.channels, arguments.rows).astype(np.float32)
    judge = Efficacy(scores, pattern)
    scores = jnp.asarray(scores)
    rows = []
    print(f"{'method':<11}{'deal':<8}{'scores':<9}{'efficacy':>9}{'compile':>9}{'run':>9}  crc32")
    for method in arguments.methods:
        for deal in arguments.deals if method != "none" else arguments.deals[:1]:
            for kind in arguments.scores if method not in ("none", "global") else ("fixed",):

                def shuffle(scores, method=method, deal=deal, kind=kind):
                    return channel_shuffle(
                        scores,
                        pattern,
                        method=method,
                        deal=None if deal == "default" else deal,
                        scores=kind,
                        escape=arguments.escape,
                    )

                executable, compile_seconds = compiled(shuffle, scores)
                permutation = np.asarray(executable(scores))
                row = {
                    "method": method,
                    "deal": deal,
                    "scores": kind,
                    "efficacy": judge(permutation),
                    "compile_seconds": compile_seconds,
                    "run_seconds": seconds(partial(executable, scores), arguments.repeats),
                    # Equal on every device when the scores are fixed point.
                    "permutation_crc32": zlib.crc32(permutation.tobytes()),
                }
                rows.append(row)
                print(
                    f"{method:<11}{deal:<8}{kind:<9}{100 * row['efficacy']:>8.2f}%"
                    f"{compile_seconds:>8.2f}s{row['run_seconds']:>8.3f}s"
                    f"  {row['permutation_crc32']:08x}",
                    flush=True,
                )
    return rows


def products(arguments: Arguments) -> list[dict]:
    """The product as the two phases of the search use it, for gate/up and q/k/v."""
    tile = swap.tile_groups(NMPattern.parse(arguments.pattern), 4096) * 4
    shapes = {
        "scatter, full, gate/up": (1, 22016, 1024, 1024),
        "settle, full, gate/up": (1, 22016, tile, 4096),
        "scatter, full, down": (1, 4096, 2752, 2752),
        "settle, full, down": (1, 4096, tile, 11008),
        "scatter, strided, q/k/v": (16, 12288, 64, 64),
        "settle, strided, q/k/v": (16, 12288, tile, 256),
    }
    forms = ("triton", "cuda") if jax.default_backend() == "gpu" else ("passes", "split")
    results = []
    print(f"{'product':<26}{'form':<9}{'dtype':<9}{'compile':>9}{'run':>11}{'max-adds/s':>12}")
    for name, (blocks, rows, lefts, rights) in shapes.items():
        for dtype in (jnp.int32, jnp.float32):
            scores = device_scores(lefts + rights, blocks * rows).reshape(blocks, rows, -1)
            scores = (1000 * scores).astype(dtype)
            left, right = scores[:, :, :lefts], scores[:, :, lefts:]
            for form in forms:

                def product(left, right, form=form):
                    return max_sum(left, right, form=form)

                try:
                    executable, compile_seconds = compiled(product, left, right)
                    run = seconds(partial(executable, left, right), arguments.repeats)
                except Exception as error:  # a form this device cannot do is a result too
                    print(f"{name:<26}{form:<9}{dtype.__name__:<9} {str(error)[:200]}", flush=True)
                    results.append({"product": name, "form": form, "error": str(error)[:2000]})
                    continue
                rate = blocks * rows * lefts * rights / run
                results.append(
                    {
                        "product": name,
                        "form": form,
                        "dtype": dtype.__name__,
                        "compile_seconds": compile_seconds,
                        "run_seconds": run,
                        "max_adds_per_second": rate,
                    }
                )
                print(
                    f"{name:<26}{form:<9}{dtype.__name__:<9}{compile_seconds:>8.2f}s"
                    f"{1e3 * run:>9.3f}ms{rate / 1e9:>9.0f} G/s",
                    flush=True,
                )
    return results


def shapes(arguments: Arguments, pattern: NMPattern) -> list[dict]:
    results = []
    print(
        f"{'channels x rows':<17}{'method':<9}{'compile':>9}{'run':>9}"
        f"{'scratch':>10}{'scatter':>17}{'settle':>17}"
    )
    for shape in arguments.shapes:
        channels, rows = map(int, shape.split("x"))
        scores = device_scores(channels, rows)
        for method in arguments.shape_methods:

            def shuffle(scores, method=method):
                return channel_shuffle(
                    scores,
                    pattern,
                    method=method,
                    scores=arguments.scores[0],
                    escape=arguments.escape,
                )

            executable, compile_seconds = compiled(shuffle, scores)
            run = seconds(partial(executable, scores), arguments.repeats)
            memory = executable.memory_analysis()
            row = {
                "channels": channels,
                "rows": rows,
                "method": method,
                "compile_seconds": compile_seconds,
                "run_seconds": run,
                "scratch_bytes": getattr(memory, "temp_size_in_bytes", None),
            }
            text = ""
            if method == "full":  # where the time goes
                row |= phases(scores, pattern, arguments)
                text = "".join(
                    f"{row[f'{phase}_rounds']:>6} x {row[f'{phase}_round_ms']:>5.2f} ms"
                    for phase in ("scatter", "settle")
                )
            results.append(row)
            print(
                f"{shape:<17}{method:<9}{compile_seconds:>8.2f}s{run:>8.3f}s"
                f"{(row['scratch_bytes'] or 0) / 2**20:>7.0f}MiB{text}",
                flush=True,
            )
    return results


def phases(scores: jax.Array, pattern: NMPattern, arguments: Arguments) -> dict:
    """Rounds of the two phases of the full-width search and milliseconds for each."""
    permutation = channel_shuffle(scores, pattern, method="strided")
    fixed = jax.jit(fixed_scores)(scores)
    search, real = swap.start_search(fixed, permutation.reshape(1, -1, pattern.m))
    del fixed
    scatter = jax.jit(lambda search: swap.scatter_phase(search, real, pattern))
    settle = jax.jit(lambda search: swap.settle_phase(search, real, pattern))
    result = {}
    for name, phase in (("scatter", scatter), ("settle", settle)):
        after, rounds = phase(search)
        result[f"{name}_rounds"] = int(rounds)
        elapsed = seconds(lambda phase=phase, search=search: phase(search)[1], 1)
        result[f"{name}_round_ms"] = 1e3 * elapsed / int(rounds)
        search = after
    return result


def model(arguments: Arguments, pattern: NMPattern) -> list[dict]:
    scores = {name: device_scores(*shape) for name, shape in LLAMA_7B.items()}
    results = []
    for method in arguments.shape_methods:

        def shuffle(scores, method=method):
            return channel_shuffle(
                scores,
                pattern,
                method=method,
                scores=arguments.scores[0],
                escape=arguments.escape,
            )

        executables = {name: compiled(shuffle, array)[0] for name, array in scores.items()}
        for name, array in scores.items():
            jax.block_until_ready(executables[name](array))
        start = time.perf_counter()
        for _ in range(arguments.layers):
            for name, array in scores.items():
                last = executables[name](array)
        jax.block_until_ready(last)
        elapsed = time.perf_counter() - start
        results.append({"method": method, "layers": arguments.layers, "run_seconds": elapsed})
        print(f"{arguments.layers} layers of LLaMA-7B, {method}: {elapsed:.2f} s", flush=True)
    return results


def main(arguments: Arguments):
    pattern = NMPattern.parse(arguments.pattern)
    device = jax.devices()[0]
    report = {
        "arguments": {name: v for name, v in asdict(arguments).items() if name != "json"},
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
    }
    print(f"{device.device_kind}, jax {jax.__version__}, {pattern}", flush=True)
    for part in arguments.parts:
        start = time.perf_counter()
        if part == "efficacy":
            print(f"\n{arguments.channels} channels x {arguments.rows} rows")
            report[part] = efficacy(arguments, pattern)
        elif part == "products":
            print()
            report[part] = products(arguments)
        elif part == "shapes":
            print()
            report[part] = shapes(arguments, pattern)
        else:
            print()
            report[part] = model(arguments, pattern)
        print(f"({part}: {time.perf_counter() - start:.0f} s)", flush=True)
        if arguments.json is not None:  # what there is is kept if a part fails
            write_text(arguments.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
