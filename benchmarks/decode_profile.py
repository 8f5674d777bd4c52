"""Where the time of a decode step goes on an NVIDIA GPU, kernel by kernel.

    python benchmarks/decode_profile.py --shape llama-7b --context 1024 --json profile.json
    python benchmarks/decode_profile.py --shape llama-7b --layers 8 --form dense --batch 16

A model of random weights in the inference form decodes in chunks of 16 steps, as `generate` has
them. Some are timed without the profiler, some by it; both steps are printed, and the tables are of
the second. They are markdown.

- `us each`: from start to end. Kernels overlap, so these do not sum up.
- `added us`: by how much the kernels move the end of all that came before, a step: with the gaps
  they sum up to the step.
- `bound us`: the bytes that a part has to read, over the bandwidth of a large device copy in the
  same run; weights and head, and for what is in a layer beside its products the keys and values.
- the products of a layer are told by their order: qkv, o, gate and up, down. Another kernel belongs
  to a layer if its launches in a step are a multiple of the number of layers; if they are several
  otherwise, to `some layers`. With one layer all of them are `once a step`.
- CUDA calls: in a step, after the warm-up. `command_buffer::` are XLA's own events: `execute`
  launches a graph; `record`, `update` and `initialize` make it or make it anew.
"""

import json
import platform
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import kernel_trace
import numpy as np
import tyro
from flax import nnx
from kernel_trace import Kernel, Placed, added_times, grid_text, markdown, short_name

from esparse_jax.atomic import write_text
from esparse_jax.inference.bench import (
    SHAPES,
    BenchOptions,
    bench_model,
    bytes_read,
    cache_bytes_read,
    dtype_of,
    prompt_tokens,
    versions,
)
from esparse_jax.inference.generate import CHUNK, decode, prefill, split_once
from esparse_jax.models.layers import Permutation
from esparse_jax.sparse._timing import copy_bandwidth

PRODUCTS = ("qkv", "o", "gate+up", "down")
# A layer's products where attention is two products as well.
WITH_ATTENTION = ("qkv", "scores", "values", "o", "gate+up", "down")
ATTENTION, SOME = "attention, rest of a layer", "some layers"
ONCE, GAPS = "once a step", "gaps"
PARTS = (*PRODUCTS, ATTENTION, SOME, "head", ONCE)  # in the order of the tables
_PRODUCT = re.compile(r"gemm|gemv|nvjet|cublas|cutlass|xmma|_dot", re.IGNORECASE)
_NO_PRODUCT = re.compile(r"reduce|memcpy|memset", re.IGNORECASE)
_GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
_UNTRACED = 4  # chunks that are timed without the profiler, two of warm-up before them


@dataclass(frozen=True)
class Options:
    """What to profile."""

    shape: str = "llama-7b"
    layers: int | None = None
    """So many layers of the shape; all if not given."""
    batch: int = 1
    context: int = 1024
    form: Literal["sparse", "dense"] = "sparse"
    dtype: str = "auto"
    """auto is float16 on a GPU."""
    chunks: int = 2
    """Of 16 steps each, that are profiled."""
    json: Path | None = None
    """Also write the figures here."""

    def bench(self) -> BenchOptions:
        """The same as `esparse bench` has it; with room for all chunks, and a second try's."""
        chunks = self.chunks * 2 + _UNTRACED + 10
        return BenchOptions(
            shape=self.shape,
            layers=self.layers,
            batch=self.batch,
            context=self.context,
            new_tokens=chunks * CHUNK,
            dtype=self.dtype,
        )


@dataclass
class Group:
    """Kernels of one name and grid at one place of a layer; times in microseconds.

    Attributes:
        part: What they are, of `PARTS`.
        launches: A step.
        each: Mean duration.
        added, gap: A step, all of them; gaps are those before.
    """

    name: str
    grid: str
    part: str
    launches: float
    each: float
    added: float
    gap: float
    in_graph: bool


@dataclass
class Part:
    """A row of the second table, microseconds a step."""

    name: str
    added: float
    bound: float | None = None

    @property
    def above(self) -> float:
        """What is between it and its bound."""
        return self.added - (self.bound or 0.0)


@dataclass
class Profile:
    """A step in numbers; microseconds."""

    wall: float
    groups: list[Group]
    parts: list[Part]
    notes: list[str] = field(default_factory=list)


def product_roles(kernels: Sequence[Kernel], steps: int, layers: int) -> dict[int, str]:
    """Which of the kernels, in the order of their starts, are which products of a layer.

    Ours are told by name, four in a layer. Dense ones have names of their libraries' and are taken
    to be products if there are four or, with attention's two, six in a layer; and one more in a
    step is the head. Empty where the numbers fit nothing.
    """
    ours = [i for i, kernel in enumerate(kernels) if kernel.name.startswith("esparse_decode")]
    if ours:
        return _cycle(ours, PRODUCTS, 0, steps, layers) or {}
    dense = [
        i
        for i, kernel in enumerate(kernels)
        if _PRODUCT.search(kernel.name) and not _NO_PRODUCT.search(kernel.name)
    ]
    for names in (PRODUCTS, WITH_ATTENTION):
        for extra in (0, 1):
            found = _cycle(dense, names, extra, steps, layers)
            if found is not None:
                return found
    return {}


def _cycle(
    places: list[int], names: tuple[str, ...], extra: int, steps: int, layers: int
) -> dict[int, str] | None:
    a_step = len(names) * layers + extra
    if len(places) != a_step * steps:
        return None
    roles = {}
    for number, place in enumerate(places):
        at = number % a_step
        roles[place] = "head" if at == len(names) * layers else names[at % len(names)]
    return roles


def grouped(placed: Sequence[Placed], steps: int, layers: int) -> tuple[list[Group], list[str]]:
    """The kernels of whole steps by name, grid and place in a layer, in the order of a layer."""
    notes: list[str] = []
    kernels = [each.kernel for each in placed]
    roles = product_roles(kernels, steps, layers)
    if not roles:
        notes.append(
            f"The products were not told apart: no {len(PRODUCTS)} or {len(WITH_ATTENTION)} "
            f"products a layer in {layers} layers and {steps} steps."
        )
    keys = [(short_name(kernel.name), grid_text(kernel)) for kernel in kernels]
    numbers = Counter(keys)
    seen: Counter[tuple[str, str]] = Counter()
    members: dict[tuple[str, str, str, int], list[Placed]] = defaultdict(list)
    for i, (each, key) in enumerate(zip(placed, keys, strict=True)):
        a_step, odd = divmod(numbers[key], steps)  # odd: once a chunk, beside those of its steps
        place = 0
        if i in roles:
            part = roles[i] if roles[i] not in ("scores", "values") else ATTENTION
        elif a_step <= 1 or layers == 1:
            part = ONCE
        elif a_step % layers == 0:
            part = ATTENTION
            place = 0 if odd else seen[key] % a_step % (a_step // layers)
        else:
            part = SOME
        seen[key] += 1
        members[(*key, part, place)].append(each)
    groups = []
    for (name, grid, part, _), each in members.items():
        groups.append(
            Group(
                name,
                grid,
                part,
                launches=len(each) / steps,
                each=statistics.fmean(one.kernel.duration for one in each) / 1e3,
                added=sum(one.added for one in each) / steps / 1e3,
                gap=sum(one.gap for one in each) / steps / 1e3,
                in_graph=all(one.kernel.graph for one in each),
            )
        )
    odd = sorted({group.name for group in groups if group.launches != int(group.launches)})
    if odd:
        notes.append(f"Not the same number in every step: {', '.join(odd)}.")
    return groups, notes


def profile(
    kernels: Sequence[Kernel], steps: int, layers: int, bounds: dict[str, float]
) -> Profile:
    """What a step consists of.

    Args:
        kernels: Of whole steps.
        steps: How many those are.
        layers: Of the model.
        bounds: Microseconds a step that the bytes of a part take, by its name.
    """
    placed = added_times(kernels)
    groups, notes = grouped(placed, steps, layers)
    _name_head(groups, bounds)
    sums: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for group in groups:
        sums[group.part] += group.added
    parts = [
        Part(name, added, bounds.get(name))
        for name, added in sums.items()
        if added or name in bounds
    ]
    parts.append(Part(GAPS, sum(each.gap for each in placed) / steps / 1e3))
    return Profile(kernel_trace.wall(kernels) / steps / 1e3, groups, parts, notes)


def _name_head(groups: list[Group], bounds: dict[str, float]) -> None:
    """Calls the longest that is there once a step the head, if it takes as long as one."""
    once = [group for group in groups if group.part == ONCE and int(group.launches) == 1]
    if not once or any(group.part == "head" for group in groups):
        return
    longest = max(once, key=lambda group: group.added)
    if "head" in bounds and longest.added >= 0.7 * bounds["head"]:
        longest.part = "head"


def part_bytes(model: Any, options: BenchOptions, dtype: str) -> dict[str, int]:
    """Bytes that a step reads for each part."""

    def weight(module: Any) -> int:
        state = nnx.state(module)
        orders = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module, Permutation)))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - orders

    layers = list(model.model.layers)
    found = {
        "qkv": sum(weight(layer.qkv) for layer in layers),
        "o": sum(weight(layer.o) for layer in layers),
        "gate+up": sum(weight(layer.gate_up) for layer in layers),
        "down": sum(weight(layer.down) for layer in layers),
        ATTENTION: cache_bytes_read(options, dtype),
    }
    found["head"] = max(0, bytes_read(model) - sum(found[name] for name in PRODUCTS))
    return found


def tables(found: Profile, counts: Counter[str], steps: int) -> list[str]:
    """All of it as markdown."""
    order = {name: i for i, name in enumerate(PARTS)}
    groups = sorted(found.groups, key=lambda group: (order[group.part], -group.added))
    rows = []
    for group in groups:
        launches = f"{group.launches:g}"
        share = f"{100 * group.added / found.wall:.1f}%"
        where = "" if group.in_graph else "no"
        row = (group.part, f"`{group.name}`", group.grid, launches, group.each, group.added)
        rows.append((*row, share, group.gap, where))
    header = ("part", "kernel", "grid", "a step", "us each", "added us", "of the step")
    lines = markdown((*header, "gaps before, us", "in a graph"), rows, left=3)

    rows = []
    for part in found.parts:
        share = f"{100 * part.added / found.wall:.1f}%"
        rows.append((part.name, part.added, share, part.bound, part.above))
    total = sum(part.added for part in found.parts)
    bound = sum(part.bound or 0.0 for part in found.parts)
    share = f"{100 * total / found.wall:.1f}%"
    rows.append(("the step", total, share, bound or None, total - bound))
    header = ("part", "us a step", "of the step", "bound us", "above the bound, us")
    lines += ["", *markdown(header, rows)]

    rows = [(f"`{name}`", f"{number / steps:.3f}") for name, number in sorted(counts.items())]
    return [*lines, "", *markdown(("CUDA calls and XLA's graph events", "a step"), rows)]


def measure(options: Options) -> dict[str, Any]:
    """Runs the model and returns all figures."""
    bench = options.bench()
    dtype = dtype_of(bench, on_cpu=jax.default_backend() == "cpu")
    began = time.perf_counter()
    model = bench_model(bench, options.form, dtype)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    part = part_bytes(model, bench, dtype)
    layers = bench.config().num_hidden_layers
    graphdef, state = split_once(model)
    del model
    keys = jax.random.split(jax.random.key(0), CHUNK)
    print(f"made after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    slots = bench.context + bench.steps
    token, cache = prefill(
        graphdef, state, prompt_tokens(bench), None, keys[0], max_length=slots, **_GREEDY
    )

    def chunk() -> Any:
        nonlocal token, cache
        token, cache, _ = decode(graphdef, state, token, cache, keys, **_GREEDY)
        return token

    for _ in range(3):
        jax.block_until_ready(chunk())
    started = time.perf_counter()
    for _ in range(_UNTRACED):
        last = chunk()
    np.asarray(last)
    untraced = (time.perf_counter() - started) / (_UNTRACED * CHUNK) * 1e6
    print(f"timed after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    try:
        bandwidth = copy_bandwidth() if jax.default_backend() == "gpu" else None
    except RuntimeError as error:  # no memory left for a copy
        print(f"no bound: {error}", file=sys.stderr)
        bandwidth = None
    seen = kernel_trace.trace(chunk, calls=options.chunks)
    print(f"profiled after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    bounds = {name: size / bandwidth * 1e6 for name, size in part.items()} if bandwidth else {}
    report = {
        "device": jax.devices()[0].device_kind,
        "dtype": dtype,
        "versions": versions(),
        "python": platform.python_version(),
        "copy_gb_per_second": None if bandwidth is None else round(bandwidth / 1e9, 1),
        "layers": layers,
        "steps": options.chunks * CHUNK,
        "untraced": untraced,
        "bytes": part,
        "seen": seen.seen,
        "calls": dict(seen.counts),
        "graph_work": seen.graph_work,
    }
    try:
        kernels = seen.require_kernels()
    except RuntimeError as error:
        return report | {"profile": None, "error": str(error)}
    report["profile"] = profile(kernels, report["steps"], layers, bounds)
    report["profile"].notes += seen.notes
    report["outside_graphs"] = sum(not kernel.graph for kernel in kernels) / report["steps"]
    return report


def main(options: Options) -> int:
    """Prints the tables; 1 if nothing could be profiled, 2 for what cannot be asked."""
    kernel_trace.prepare()
    try:
        options.bench()
        if options.chunks < 1:
            raise ValueError(f"chunks is {options.chunks}; it must be at least 1.")
    except ValueError as error:
        print(f"decode_profile.py: {error} Shapes are {', '.join(SHAPES)}.", file=sys.stderr)
        return 2
    if jax.default_backend() != "gpu":
        print(
            "benchmarks/decode_profile.py profiles an NVIDIA GPU, and JAX sees none.",
            file=sys.stderr,
        )
        return 1
    report = measure(options)
    show(options, report)
    return 1 if report["profile"] is None else 0


def show(options: Options, report: dict[str, Any]) -> None:
    """Prints what was measured, and writes it."""
    found: Profile | None = report["profile"]
    if found is None:  # what there is
        print(f"step: {report['untraced']:.1f} us; CUDA calls: {report['calls']}")
        print(f"decode_profile.py: {report['error']}", file=sys.stderr)
        _write(options, report)
        return
    bound = sum(part.bound or 0.0 for part in found.parts)
    title = (
        f"{options.shape}, {report['layers']} layers, {options.form}, {report['dtype']}, batch "
        f"{options.batch}, context {options.context}, on {report['device']}; {report['versions']}"
    )
    if report["copy_gb_per_second"] is not None:
        title += f", copies {report['copy_gb_per_second']:.0f} GB/s"
    print(title)
    print(
        f"step: {report['untraced']:.1f} us without the profiler, {found.wall:.1f} us with it"
        + (f"; bound {bound:.1f} us" if bound else "")
        + f"; kernels outside of graphs: {report['outside_graphs']:g} a step; graphs made or "
        f"changed: {report['graph_work']} times in {report['steps']} steps\n"
    )
    print(*tables(found, Counter(report["calls"]), report["steps"]), sep="\n")
    print(*(f"\n{note}" for note in found.notes), sep="", flush=True)
    _write(options, report | {"profile": asdict(found)})


def _write(options: Options, report: dict[str, Any]) -> None:
    if options.json is not None:
        plain = report | {"options": asdict(options)}
        write_text(options.json, json.dumps(plain, indent=1, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
