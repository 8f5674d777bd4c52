"""The clock and the power of an NVIDIA GPU while it multiplies, beside the time of a product.

    pip install nvidia-ml-py
    python benchmarks/product_power.py --shape 4096x11008 --rows 4096 --dtype bfloat16
    python benchmarks/product_power.py --shape 12288x4096 --rows 16 --plans rows=64,split=2

At full load a product may come to the power limit of the card, and the faster it would be the more
the driver lowers the clock. So times of some milliseconds promise more than a model gets. Every
product runs for `--seconds` before it is timed for as long again, one after the other:

- `dense`: XLA's dot with the dense weight.
- `decode`: the decode kernel, up to 16 rows; `prefill`: the prefill kernel by its own rule;
  `cusparselt`: the library by the algorithm of the machine's tuning table; and the prefill kernel
  by each of `--plans`.
- `dispatch`: `sparse_matmul(x, blob)`, as a model calls it.

`cycles` are those of one multiprocessor for 128 outputs x 256 rows x 64 channels, if the work were
spread evenly: the sparse tensor cores of Hopper need 512, the dense ones 1,024. With `--zeros` all
numbers are zeros, which take less power.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from gpu_clock import Sampler, opened, summary

from esparse_jax.atomic import write_text
from esparse_jax.sparse import (
    Blob24,
    blob24,
    compress24,
    sparse_matmul,
    stored_table,
    this_machine,
)
from esparse_jax.sparse import _ffi_cuda as ffi
from esparse_jax.sparse._timing import (
    Chain,
    chain_inputs,
    chain_rotation,
    estimate,
    random_24,
)

STAGE = 128 * 256 * 64
Way = Literal["dense", "decode", "prefill", "cusparselt", "dispatch"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to multiply."""

    shape: str = "4096x11008"
    """OUTxCHANNEL of the weight, multiples of 64."""
    rows: int = 4096
    dtype: str = "float16"
    ways: tuple[Way, ...] = ("dense", "decode", "prefill", "cusparselt")
    """Those that there are not for these rows, on this machine, are left out."""
    plans: tuple[str, ...] = ()
    """Of the prefill kernel: rows=64,split=2 and so on."""
    zeros: bool = False
    seconds: float = 0.5
    gpu: int = 0
    """NVML's number of the GPU that JAX computes on."""
    json: Path | None = None
    """Also write the figures here."""


def read_plan(text: str) -> dict[str, int]:
    """The plan that an option names."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        plan = {name: int(value) for name, value in pairs}
        ffi.require_prefill_plan(plan)
    except ValueError as error:
        raise SystemExit(
            f"--plans {text}: FIELD=NUMBER,... of the prefill kernel: {error}"
        ) from None
    return plan


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a dense weight [out, channel]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def products(options: Options, shape: tuple[int, int]) -> dict[str, Callable]:
    """What is asked for and there is, by name; all but `dense` take the compressed weight."""
    machine, few = this_machine(), options.rows <= ffi.MAX_ROWS
    plans = {text: read_plan(text) for text in options.plans}
    has_prefill = ffi.prefill_runs(machine and machine.capability)
    if plans and not has_prefill:
        raise SystemExit(
            "benchmarks/product_power.py: --plans are the prefill kernel's, which takes a GPU of "
            f"compute capability {ffi.PREFILL_CAPABILITY} and a build for it (BUILD.md); name none."
        )
    found: dict[str, Callable] = {}
    for way in options.ways:
        if way == "dense":
            found[way] = dense
        elif way == "dispatch":
            found[way] = sparse_matmul
        elif way == "decode" and few and ffi.decode_available():
            found[way] = functools.partial(sparse_matmul, backend="decode")
        elif way == "prefill" and has_prefill:
            found[way] = functools.partial(sparse_matmul, backend="prefill")
        elif way == "cusparselt" and machine is not None and machine.cusparselt is not None:
            table = stored_table(machine).table
            record = None if table is None else table.find(shape, options.dtype, options.rows)
            algorithm = None  # the library's own choice
            if record is not None and record.cusparselt is not None:  # a workspace is for its rows
                algorithm = dataclasses.replace(record.cusparselt.algorithm, workspace_bytes=None)
            found[way] = functools.partial(sparse_matmul, backend="cusparselt", algorithm=algorithm)
    for text, plan in plans.items():
        found[text] = functools.partial(_by_plan, plan=plan)
    return found


def _by_plan(x: jax.Array, blob: Blob24, plan: dict[str, int]) -> jax.Array:
    return ffi.prefill(x, blob.data, out=blob.shape[0], plan=plan)


def measure(chain: Chain, seconds: float, sampler: Sampler) -> dict[str, Any]:
    """Microseconds a product in a long run that follows one as long, the clock and the power."""
    jax.block_until_ready(chain.call())
    start = time.perf_counter()
    jax.block_until_ready(chain.call())
    calls = math.ceil(seconds / (time.perf_counter() - start))
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(calls):
            result = chain.call()
        jax.block_until_ready(result)
        end = time.perf_counter()
    return {"microseconds": (end - start) / (calls * chain.products) * 1e6} | summary(
        sampler.between(start, end)
    )


def multiprocessors(device: jax.Device) -> int:
    """Of a GPU; 0 where JAX does not say."""
    return getattr(device, "core_count", 0)


def line(way: str, found: dict[str, Any]) -> str:
    """A product in words."""
    held = ", ".join(found["held_back_by"]) or "nothing"
    cycles = "" if found["cycles"] is None else f"{found['cycles']:.0f} cycles, "
    return (
        f"{way:24s} {found['microseconds']:9.1f} us, {found['ratio']:5.2f} times as fast as the "
        f"first, clock {found['clock']} MHz ({found['least_clock']} to {found['most_clock']}), "
        f"{found['watts']} W, {cycles}held back by {held}"
    )


def main(options: Options) -> None:
    """Prints a line for each product, and writes all of them as JSON."""
    out, channels = shape = tuple(map(int, options.shape.split("x")))
    ways = products(options, shape)
    if not ways:
        raise SystemExit(
            f"benchmarks/product_power.py: none of {', '.join(options.ways)} is there for "
            f"{options.rows} rows on this machine."
        )
    sampler = opened("benchmarks/product_power.py", options.gpu)
    weight = random_24(jax.random.key(0), out, channels, options.dtype)
    x = jax.random.normal(jax.random.key(1), (options.rows, channels)).astype(options.dtype)
    if options.zeros:
        weight, x = weight * 0, x * 0
    blob = blob24(compress24(weight))
    device = jax.devices()[0]
    stages = options.rows * out * channels / STAGE
    results: dict[str, dict[str, Any]] = {}
    with sampler:
        for way, product in ways.items():
            one = weight if way == "dense" else blob
            size = weight.nbytes if way == "dense" else blob.nbytes
            copies = chain_rotation(size, options.rows, shape)
            weights = [
                jax.tree.map(lambda leaf: leaf + leaf.dtype.type(0), one) for _ in range(copies)
            ]
            xs = [x] * chain_inputs(options.rows, shape, copies)
            chain = Chain(product, xs, weights, microseconds=estimate(options.rows, shape))
            found = measure(chain, options.seconds, sampler)
            cycles = found["microseconds"] * found["clock"] * multiprocessors(device) / stages
            found["cycles"] = cycles or None
            first = next(iter(results.values()), found)
            found["ratio"] = first["microseconds"] / found["microseconds"]
            results[way] = found
            print(line(way, found), flush=True)
            del chain, weights
    if options.json is not None:
        report = {
            "device": device.device_kind,
            "options": dataclasses.asdict(options),
            "results": results,
        }
        write_text(options.json, json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
