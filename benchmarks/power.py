"""The clock and the power of an NVIDIA GPU while a model decodes, beside the time of its steps.

    pip install nvidia-ml-py
    python benchmarks/power.py --shape llama-7b --batch 16 --context 128 --json power.json

A kernel that reads memory as fast as it can, and multiplies meanwhile, may come to the power limit
of the card: then the driver lowers the clock of the multiprocessors, and the same step takes
longer, by more or less as the clock swings. A line for each repeat says the mean time of a step,
the fastest and the slowest chunk of 16, the clock, the power, and what held the clock back. The
forms do not take turns: each has the GPU for all of its repeats.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from gpu_clock import Sampler, opened, summary

from esparse_jax.atomic import write_text
from esparse_jax.inference.bench import (
    BenchOptions,
    bench_model,
    dtype_of,
    prompt_tokens,
    versions,
)
from esparse_jax.inference.generate import (
    CHUNK,
    columns_of,
    decode,
    prefill,
    slots_of,
    split_once,
)

_GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
_WARM_UP = 2  # repeats that are not reported: the first one compiles


@dataclass(frozen=True)
class Options:
    """What to decode."""

    shape: str = "llama-7b"
    layers: int | None = None
    """So many layers of the shape; all if not given."""
    forms: tuple[Literal["sparse", "dense"], ...] = ("sparse", "dense")
    batch: int = 16
    context: int = 128
    new_tokens: int = 128
    repeats: int = 8
    gpu: int = 0
    """NVML's number of the GPU that JAX computes on."""
    json: Path | None = None
    """Also write the figures here."""

    def bench(self) -> BenchOptions:
        """The same as `esparse bench` has it; it refuses what there is not."""
        try:
            return BenchOptions(
                shape=self.shape,
                layers=self.layers,
                batch=self.batch,
                context=self.context,
                new_tokens=self.new_tokens,
                repeats=self.repeats,
            )
        except ValueError as error:
            raise SystemExit(f"benchmarks/power.py: {error}") from None


def measure(
    options: Options, bench: BenchOptions, form: str, sampler: Sampler
) -> list[dict[str, Any]]:
    """All repeats of one form; times are milliseconds a step."""
    dtype = dtype_of(bench, on_cpu=jax.default_backend() == "cpu")
    model = bench_model(bench, form, dtype)
    tokens, lengths = columns_of(np.asarray(prompt_tokens(bench)).tolist(), model.config)
    graphdef, state = split_once(model)
    keys = jax.random.split(jax.random.key(0), CHUNK)
    chunks = bench.steps // CHUNK
    slots = slots_of(tokens.shape[1], chunks)
    repeats = []
    for repeat in range(options.repeats + _WARM_UP):
        token, cache = prefill(
            graphdef, state, tokens, lengths, keys[0], max_length=slots, **_GREEDY
        )
        jax.block_until_ready((token, cache))
        marks, before = [time.perf_counter()], None
        for _ in range(chunks):
            token, cache, new = decode(graphdef, state, token, cache, keys, **_GREEDY)
            if before is not None:  # the next chunk is queued: the GPU never waits for this
                np.asarray(before)
                marks.append(time.perf_counter())
            before = new
        np.asarray(before)
        marks.append(time.perf_counter())
        del cache, before, new
        if repeat < _WARM_UP:
            continue
        times = [(b - a) / CHUNK * 1e3 for a, b in pairwise(marks)]
        found = summary(sampler.between(marks[0], marks[-1]))
        repeats.append({"step": statistics.fmean(times), "chunks": times} | found)
        print(line(form, repeats[-1]), flush=True)
    return repeats


def line(form: str, repeat: dict[str, Any]) -> str:
    """A repeat in words."""
    held = ", ".join(repeat["held_back_by"]) or "nothing"
    return (
        f"{form:6s} {repeat['step']:.3f} ms a step ({min(repeat['chunks']):.3f} to "
        f"{max(repeat['chunks']):.3f}), clock {repeat['clock']} MHz ({repeat['least_clock']} to "
        f"{repeat['most_clock']}), {repeat['watts']} W, held back by {held}"
    )


def main(options: Options) -> None:
    """Prints a line for each repeat, then the medians, and writes all of it as JSON."""
    bench = options.bench()
    sampler = opened("benchmarks/power.py", options.gpu)
    print(versions(), flush=True)
    with sampler:
        results = {form: measure(options, bench, form, sampler) for form in options.forms}
    steps = {
        form: statistics.median(each["step"] for each in found) for form, found in results.items()
    }
    for form, step in steps.items():
        print(f"{form}: {step:.3f} ms a step, the median")
    if options.json is not None:
        report = {"versions": versions(), "options": asdict(options), "results": results}
        write_text(options.json, json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
