"""What a call from JAX costs on an NVIDIA GPU, beside what it computes.

    python benchmarks/call_cost.py --json call_cost.json
    python benchmarks/call_cost.py --parts device --shapes 4096x4096 --rows 16 --algorithm 1
    python benchmarks/call_cost.py --parts host graphs

Three parts, each with what it has to show; the exit status is 1 if one does not.

- `device`: cuSPARSELt's product by the same algorithm, from JAX and from PyTorch, over the same
  copies of a weight (300 MB with x and y), x first and y row by row in both. `kernel us` is the
  mean duration of the library's kernels under the profiler, a product; `chain us` the time of a
  product inside a jitted chain, and inside PyTorch's CUDA graph, without the profiler. The kernels
  must be within 2 %; where the profiler shows none, the chains.
- `host`: chains of small products without CUDA graphs; what one product more takes, when calls are
  queued. It is the larger of the host's time and the device's, so a bound from above on the host's:
  less than 10 us. `launch us` is the time between two launches, and `device us` what a product
  keeps the GPU busy for, both under the profiler.
- `graphs`: jitted chains of 32 layers. After the warm-up every product runs inside a CUDA graph, no
  graph is made, captured or changed, and the compiled HLO copies, turns and converts no weight. The
  chain with new results has no donated argument, so its results move: it is shown, not judged.
"""

import functools
import itertools
import json
import math
import platform
import re
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import kernel_trace
import tyro
from kernel_trace import Kernel, Trace, added_times, markdown, short_name

from esparse_jax.atomic import write_text
from esparse_jax.sparse import (
    Algorithm,
    Blob24,
    blob24,
    compress24,
    interleave_gate_up,
    library_facts,
    sparse_matmul,
    sparse_mlp,
)
from esparse_jax.sparse import _ffi_cuda as ffi
from esparse_jax.sparse._timing import (
    Chain,
    chain_inputs,
    chain_rotation,
    estimate,
    random_24,
    seconds,
)

try:
    import torch
except ImportError:
    torch = None
if torch is not None and not torch.cuda.is_available():  # a build for the CPU
    torch = None

MOST_RATIO, MOST_MICROSECONDS = 1.02, 10.0
EPSILON = 1e-6
# Two ways to say it: no kind of command, and no sequence long enough.
NO_GRAPHS = {"xla_gpu_enable_command_buffer": "", "xla_gpu_graph_min_graph_size": 1 << 30}
SMALL, SMALL_ROWS = 64, 8
PARTS = ("device", "host", "graphs")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Literal["device", "host", "graphs"], ...] = PARTS
    shapes: tuple[str, ...] = ("4096x4096", "12288x4096", "22016x4096")
    """OUTxCHANNEL of each weight, for device."""
    rows: tuple[int, ...] = (16, 1024, 4096)
    """Multiples of 8, for device."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    algorithm: int = 0
    """cuSPARSELt's number of the algorithm that both call."""
    split_k: int | None = None
    """As `Algorithm`; the library's own if not given."""
    split_k_mode: int | None = None
    chain: tuple[int, int] = (16, 512)
    """Products in the short and the long chain, for host."""
    layers: int = 32
    """In a chain, for graphs."""
    hidden: int = 4096
    inner: int = 11008
    calls: int = 5
    """That are profiled, for graphs."""
    batches: int = 7
    json: Path | None = None
    """Also write the figures here."""

    def check(self) -> None:
        """Raises a ValueError for what cannot be measured."""
        wanted_shapes(self.shapes)
        if not self.chain[0] < self.chain[1] or self.chain[0] < 1:
            raise ValueError(f"chain is {self.chain}; the second must be longer than the first.")
        for name in ("layers", "calls", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if any(rows < 8 or rows % 8 for rows in self.rows):
            raise ValueError(f"rows are {self.rows}; each must be a multiple of 8.")
        self.by_library()

    def by_library(self) -> Algorithm:
        """The algorithm of JAX's calls."""
        return Algorithm(self.algorithm, self.split_k, self.split_k_mode)


@dataclass
class Check:
    """Whether something is as it must be."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}: {self.name}: {self.detail}"


def wanted_shapes(names: Sequence[str]) -> list[tuple[int, int]]:
    """(out, channel) of each."""
    shapes = []
    for name in names:
        if not re.fullmatch(r"\d+x\d+", name):
            raise ValueError(f"a shape is OUTxCHANNEL, 4096x4096 for example; got {name!r}.")
        out, channels = map(int, name.split("x"))
        if not out or not channels or out % 64 or channels % 64:
            raise ValueError(f"a shape is made of multiples of 64; got {name}.")
        shapes.append((out, channels))
    return shapes


def copied(blob: Blob24, count: int) -> list[Blob24]:
    """The blob and copies of it, `count` in all."""
    more = (blob.data + jnp.uint8(0) for _ in range(count - 1))
    return [blob, *(Blob24(data, blob.shape, blob.dtype) for data in more)]


# ---- device


class Torch:
    """The same products by PyTorch, of the very arrays."""

    def __init__(self, xs: list[jax.Array], weight: jax.Array, copies: int, options: Options):
        schema = torch.ops.aten._cslt_sparse_mm.default._schema
        known = {argument.name for argument in schema.arguments}
        self._options = {"alg_id": options.algorithm, "transpose_result": True}
        for name in ("split_k", "split_k_mode"):
            value = getattr(options, name)
            if value is not None and (name, value) != ("split_k", 1):  # which it leaves unset
                self._options[name] = value
        missing = sorted(set(self._options) - known)
        if missing:
            raise RuntimeError(f"this PyTorch's _cslt_sparse_mm has no {', '.join(missing)}")
        jax.block_until_ready((xs, weight))
        self._xs = [torch.from_dlpack(x) for x in xs]
        first = torch._cslt_compress(torch.from_dlpack(weight))
        self._weights = [first, *(first.clone() for _ in range(copies - 1))]
        self.products = len(xs) * copies
        self._graph = None
        self.why_no_graph: str | None = None
        torch.cuda.synchronize()

    def product(self, x: Any, weight: Any) -> Any:
        return torch._cslt_sparse_mm(weight, x.t(), **self._options)

    def first(self) -> Any:
        """The product of the first x."""
        return self.product(self._xs[0], self._weights[0])

    def queue(self) -> None:
        """All products, one by one."""
        for x in self._xs:
            for weight in self._weights:
                self.product(x, weight)

    def capture(self) -> None:
        """Has `call` replay a CUDA graph of them; or queue them, where that cannot be."""
        try:
            self.first()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # What JAX's threads ask of the GPU meanwhile must not break it off.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.queue()
            graph.replay()
            torch.cuda.synchronize()
            self._graph = graph
        except RuntimeError as error:
            self.why_no_graph = _line(error)

    def call(self) -> None:
        """All products, queued."""
        if self._graph is None:
            self.queue()
        else:
            self._graph.replay()

    def microseconds(self, expected: float, batches: int) -> float | None:
        """Of a product in the graph: the median over batches.

        None without a graph: there PyTorch plans each call anew, which takes 0.2 s of the host.
        """
        if self._graph is None:
            return None
        replays = max(1, math.ceil(1e4 / (expected * self.products)))
        times = []
        for _ in range(batches + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                self.call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / (self.products * replays))
        return statistics.median(times[2:])


def times_of_library(
    ours: Sequence[Kernel], products: int, theirs: Sequence[Kernel], their_products: int
) -> tuple[float, float, list[str], str | None]:
    """Microseconds of the library's kernels a product, from JAX and from PyTorch.

    Its kernels are those that both have. Where they have none in common, what PyTorch runs is the
    library's, and of JAX's the kernel that takes the most time.

    Returns:
        Ours, theirs, the names, and what was not as expected.
    """

    def total(kernels: Sequence[Kernel], names: set[str]) -> float:
        return sum(kernel.duration for kernel in kernels if kernel.name in names) / 1e3

    def names_of(kernels: Sequence[Kernel]) -> set[str]:
        return {kernel.name for kernel in kernels if not kernel.copies}

    common, note = names_of(ours) & names_of(theirs), None
    their_names = common
    if not common:
        their_names = names_of(theirs)
        common = {max(names_of(ours), key=lambda name: total(ours, {name}))} if ours else set()
        note = (
            f"no kernel in common: JAX ran {sorted(map(short_name, names_of(ours)))}, PyTorch "
            f"{sorted(map(short_name, their_names))}"
        )
    number = sum(kernel.name in common for kernel in ours)
    if number % products and note is None:
        note = f"{number} kernels of the library for {products} products"
    return (
        total(ours, common) / products,
        total(theirs, their_names) / their_products,
        sorted(common),
        note,
    )


@dataclass
class Case:
    """One product with its figures so far, ready to be profiled; None where there is none."""

    row: dict[str, Any]
    chain: Chain | None
    torch: Torch | None
    alone: Callable[[], Any] | None
    """Queues JAX's products one by one."""

    @property
    def name(self) -> str:
        return f"{self.row['out']}x{self.row['channels']}, {self.row['rows']} rows"


def device_cases(options: Options) -> Iterator[Case]:
    """The products, compiled, with their times in chains."""
    by_library = functools.partial(
        sparse_matmul, backend="cusparselt", algorithm=options.by_library()
    )
    for out, channels in wanted_shapes(options.shapes):
        weight = random_24(jax.random.key(out + channels), out, channels, options.dtype)
        blob = blob24(compress24(weight))
        for rows in options.rows:
            row: dict[str, Any] = {"out": out, "channels": channels, "rows": rows}
            copies = chain_rotation(blob.nbytes, rows, blob.shape)
            x = jax.random.normal(jax.random.key(rows), (rows, channels), jnp.float32)
            xs = [x.astype(options.dtype)] * chain_inputs(rows, blob.shape, copies)
            try:
                expected = estimate(rows, blob.shape)
                blobs = copied(blob, copies)
                chain = Chain(by_library, xs, blobs, microseconds=expected)
                row["jax_chain"] = chain.microseconds(batches=options.batches)
                theirs = Torch(xs, weight, copies, options) if torch is not None else None
                if theirs is None:
                    row["failed"] = "no PyTorch with CUDA"
                else:
                    y = torch.from_dlpack(jax.block_until_ready(by_library(xs[0], blob)))
                    bits = [tensor.contiguous().view(torch.int16) for tensor in (y, theirs.first())]
                    row["same_bits"] = bool(bits[0].shape == bits[1].shape and torch.equal(*bits))
                    theirs.capture()
                    row["torch_chain"] = theirs.microseconds(expected, options.batches)
                    row["torch_no_graph"] = theirs.why_no_graph
            except Exception as error:  # of memory that is missing, or a refused algorithm
                row["failed"] = _line(error)
                yield Case(row, None, None, None)
                continue
            alone = functools.partial(one_by_one, jax.jit(by_library), xs, blobs)
            yield Case(row, chain, theirs, alone)


def one_by_one(product: Callable, xs: Sequence[Any], weights: Sequence[Any]) -> Any:
    """All products, queued; the last."""
    return [product(x, weight) for x in xs for weight in weights][-1]


def profile_device(case: Case) -> None:
    """Adds the kernels' times."""
    if case.chain is None or case.torch is None:
        return

    def profiled(
        ways: Sequence[tuple[Callable[[], Any], int]], wait: Callable[[Any], Any]
    ) -> tuple[Trace, int]:
        """By the first way that shows all kernels: those of a graph may not be seen."""
        for call, products in ways:
            calls = max(1, math.ceil(64 / products))
            seen = kernel_trace.trace(call, calls=calls, warm=1, wait=wait)
            if len(seen.kernels) >= calls * products:
                break
        return seen, calls * products

    alone = case.torch.products
    ours, products = profiled(
        ((case.chain.call, case.chain.products), (case.alone, alone)), jax.block_until_ready
    )
    theirs, their_products = profiled(
        ((case.torch.call, alone), (case.torch.queue, alone)), lambda _: torch.cuda.synchronize()
    )
    jax_us, torch_us, names, note = times_of_library(
        ours.require_kernels(), products, theirs.require_kernels(), their_products
    )
    case.row |= {
        "jax_kernel": jax_us,
        "torch_kernel": torch_us,
        "kernels": [short_name(name) for name in names],
        "notes": [*ours.notes, *theirs.notes, *([note] if note else [])],
    }


def device_check(rows: Sequence[dict[str, Any]]) -> Check:
    """Whether JAX's calls take as long as PyTorch's."""
    ratios, missing = [], 0
    for row in rows:
        ratio = row.get("kernel_ratio") or row.get("chain_ratio")
        missing += ratio is None
        ratios += [] if ratio is None else [ratio]
    name = f"device time at most {MOST_RATIO:g} times PyTorch's"
    if not ratios:
        return Check(name, False, "nothing was measured")
    slow = sum(ratio > MOST_RATIO for ratio in ratios)
    detail = f"{min(ratios):.3f} to {max(ratios):.3f}; {slow} of {len(ratios)} above"
    if missing:
        detail += f"; {missing} not measured"
    return Check(name, not slow and not missing, detail)


def with_ratios(row: dict[str, Any]) -> dict[str, Any]:
    """The row, and JAX's times over PyTorch's."""
    for kind in ("kernel", "chain"):
        ours, theirs = row.get(f"jax_{kind}"), row.get(f"torch_{kind}")
        row[f"{kind}_ratio"] = ours / theirs if ours and theirs else None
    return row


def device_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the part, and what was not as expected."""
    header = ("shape", "rows", "JAX kernel us", "torch kernel us", "ratio", "JAX chain us")
    cells = []
    for row in rows:
        ratios = [row[f"{kind}_ratio"] for kind in ("kernel", "chain")]
        ratios = [None if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        same = {True: "yes", False: "no"}.get(row.get("same_bits"))
        cells.append(
            (
                f"{row['out']}x{row['channels']}",
                row["rows"],
                row.get("jax_kernel"),
                row.get("torch_kernel"),
                ratios[0],
                row.get("jax_chain"),
                row.get("torch_chain"),
                ratios[1],
                same,
            )
        )
    lines = markdown((*header, "torch chain us", "ratio", "same bits"), cells)
    for row in rows:
        where = f"{row['out']}x{row['channels']}, {row['rows']} rows"
        if row.get("failed"):
            lines.append(f"{where}: {row['failed']}")
        if row.get("torch_no_graph"):
            lines.append(
                f"{where}: no chain of PyTorch's, for want of a graph: {row['torch_no_graph']}"
            )
        lines += [f"{where}: {note}" for note in row.get("notes", ())]
    return lines


# ---- host


def small_chain(kind: str, count: int, dtype: str) -> tuple[Callable[[], Any], int]:
    """A jitted chain of `count` small steps without graphs, as a call."""
    x = jnp.ones((SMALL_ROWS, SMALL), dtype)
    blob = blob24(compress24(random_24(jax.random.key(0), SMALL, SMALL, dtype)))

    def step(x: jax.Array, blob: Blob24) -> jax.Array:
        if kind == "elementwise":
            return jax.lax.optimization_barrier(x * jnp.asarray(0.5, x.dtype))
        return sparse_matmul(x, blob, backend=kind)

    @functools.partial(jax.jit, compiler_options=NO_GRAPHS)
    def chain(x: jax.Array, blob: Blob24) -> jax.Array:
        for _ in range(count):
            x = step(x, blob)
        return x

    return lambda: chain(x, blob)


def host_times(kind: str, options: Options) -> dict[str, Any]:
    """What a small product adds to a queued call."""
    calls = [small_chain(kind, count, options.dtype) for count in options.chain]
    times = [seconds(call, batches=options.batches) * 1e6 for call in calls]
    short, long = options.chain
    return {
        "kind": kind,
        "microseconds": dict(zip(map(str, options.chain), times, strict=True)),
        "slope": (times[1] - times[0]) / (long - short),
        "call": calls[1],
    }


def profile_host(row: dict[str, Any], count: int) -> None:
    """Adds what the profiler says of the long chain."""
    calls = 3
    seen = kernel_trace.trace(row["call"], calls=calls, warm=1)
    starts = [event.start for event in seen.host if event.name.startswith("cuLaunchKernel")]
    between = [b - a for a, b in itertools.pairwise(starts)]
    kernels = seen.require_kernels()
    row |= {
        "launch": statistics.median(between) / 1e3 if between else None,
        "device": sum(each.added for each in added_times(kernels)) / 1e3 / (calls * count),
        "kernels_a_call": len(kernels) / calls,
        "graph_launches": seen.count("cuGraphLaunch"),
        "api_calls": dict(seen.counts),
        "notes": seen.notes,
    }


def host_check(rows: Sequence[dict[str, Any]]) -> Check:
    """Whether a call of ours costs the host little enough."""
    name = f"host cost of a call less than {MOST_MICROSECONDS:g} us"
    ours = {row["kind"]: row["slope"] for row in rows if row["kind"] != "elementwise"}
    graphs = [row["kind"] for row in rows if row.get("graph_launches")]
    detail = ", ".join(f"{kind} {slope:.2f} us" for kind, slope in ours.items())
    if graphs:
        detail += f"; in graphs all the same: {', '.join(graphs)}"
    enough = all(slope < MOST_MICROSECONDS for slope in ours.values())
    return Check(name, len(ours) == 2 and enough and not graphs, detail or "nothing was measured")


# ---- graphs

_TYPED = re.compile(r"\s*(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)")
_BYTES = re.compile(r"\bu8\[(\d+)\]")
# What would read a weight to write it elsewhere.
_MOVES = {
    "copy",
    "copy-start",
    "transpose",
    "convert",
    "concatenate",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "gather",
    "pad",
    "reverse",
}


def weight_moves(hlo: str, blob_bytes: Iterable[int]) -> list[str]:
    """The instructions, those inside fusions included, that copy, turn or convert a blob.

    Args:
        hlo: Text of a compiled module.
        blob_bytes: Sizes of the weights' blobs, u8[bytes].
    """
    sizes = set(blob_bytes)
    types: dict[str, set[int]] = {}
    found = []
    for line in hlo.splitlines():
        if line.rstrip().endswith("{") and " = " not in line.split("->")[0]:
            types = {}  # names are a computation's own
            continue
        match = _TYPED.match(line)
        if match is None:
            continue
        name, rest = match.groups()
        result, opcode, operands = _instruction(rest)
        types[name] = {int(size) for size in _BYTES.findall(result)}
        touched = set(types[name]) | {int(size) for size in _BYTES.findall(operands)}
        for operand in re.findall(r"%?([\w.\-]+)", operands):
            touched |= types.get(operand, set())
        if opcode in _MOVES and touched & sizes:
            found.append(line.strip())
    return found


def _instruction(text: str) -> tuple[str, str, str]:
    """Type, opcode and operands of what stands behind the equals sign."""
    if text.startswith("("):
        end = _closing(text, 0)
        result, rest = text[: end + 1], text[end + 1 :].lstrip()
    else:
        result, _, rest = text.partition(" ")
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return result, opcode, ""
    start = len(opcode)
    return result, opcode.strip(), rest[start + 1 : _closing(rest, start)]


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def graph_facts(seen: Trace, calls: int, layers: int) -> dict[str, Any]:
    """What of the calls ran in graphs, a call.

    Products are the kernels that there are as many of as layers, or more.
    """
    kernels = seen.require_kernels()
    numbers = Counter(kernel.name for kernel in kernels)
    products = {name for name, number in numbers.items() if number >= calls * layers and name}
    outside = Counter(short_name(k.name) for k in kernels if not k.graph)
    product_launches = sum(k.name in products and not k.graph for k in kernels)
    launches = seen.count("cuGraphLaunch")
    if launches and not any(kernel.graph for kernel in kernels):
        # The profile does not say which graph a kernel is of: what was launched alone is what was
        # launched by a call of its own.
        product_launches = min(product_launches, seen.count("cuLaunchKernel"))
        outside = Counter({"launches of unknown kernels": seen.count("cuLaunchKernel")})
    return {
        "graph_launches": launches / calls,
        "kernels": len(kernels) / calls,
        "products": sum(numbers[name] for name in products) / calls,
        "products_outside": product_launches / calls,
        "outside": {name: number / calls for name, number in outside.items() if number},
        "graph_work": seen.graph_work,
        "api_calls": dict(seen.counts),
        "notes": seen.notes,
    }


def graph_checks(
    name: str, facts: dict[str, Any], moves: Sequence[str], layers: int
) -> list[Check]:
    """What a chain of layers must be."""
    inside = facts["graph_launches"] > 0 and facts["products"] >= layers
    return [
        Check(
            f"{name}: every product in a CUDA graph",
            inside and not facts["products_outside"],
            f"{facts['graph_launches']:g} graphs and {facts['products']:g} kernels of products a "
            f"call, {facts['products_outside']:g} of them outside of graphs",
        ),
        Check(
            f"{name}: no graph made or changed after the warm-up",
            facts["graph_work"] == 0,
            f"{facts['graph_work']} times",
        ),
        Check(
            f"{name}: no copy, transpose or convert of a weight",
            not moves,
            f"{len(moves)} in the compiled HLO"
            + "".join(f"\n  {move[:200]}" for move in moves[:5]),
        ),
    ]


def graph_chains(options: Options) -> dict[str, tuple[Callable, Any, list, bool]]:
    """Function of (x, weights), x, weights, and whether x is donated, by name."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, inner, dtype = options.hidden, options.inner, options.dtype
    gate, up = (compress24(random_24(key, inner, hidden, dtype)) for key in keys[:2])
    gate_up = blob24(interleave_gate_up(gate, up))
    down = blob24(compress24(random_24(keys[2], hidden, inner, dtype)))
    square = blob24(compress24(random_24(keys[3], hidden, hidden, dtype)))
    pairs = list(zip(copied(gate_up, options.layers), copied(down, options.layers), strict=True))

    def mlp(x: jax.Array, weights: list) -> jax.Array:
        for gate_up, down in weights:
            x = sparse_mlp(x, gate_up, down, epsilon=EPSILON, prefetch=True)
        return x

    def library(x: jax.Array, weights: list) -> jax.Array:
        for blob in weights:
            x = sparse_matmul(x, blob, backend="cusparselt")
        return x

    def x(rows: int) -> jax.Array:
        return jax.random.normal(jax.random.key(rows), (rows, hidden), jnp.float32).astype(dtype)

    return {
        "mlp, 1 row": (mlp, x(1), pairs, True),
        "mlp, 16 rows": (mlp, x(16), pairs, True),
        "cusparselt, 1024 rows": (library, x(1024), copied(square, options.layers), True),
        "mlp, 16 rows, new results": (mlp, x(16), pairs, False),
    }


def measure_chain(
    function: Callable, x: jax.Array, weights: list, donated: bool, options: Options
) -> tuple[dict[str, Any], list[str]]:
    """What of a chain runs in graphs, and what its HLO does with weights."""
    jitted = jax.jit(function, donate_argnums=(0,) if donated else ())
    text = jitted.lower(x, weights).compile().as_text()
    blobs = jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, Blob24))
    moves = weight_moves(text, {blob.data.size for blob in blobs})
    carried = x + 0

    def call() -> jax.Array:
        nonlocal carried
        carried = jitted(carried, weights)
        return carried

    for _ in range(3):
        jax.block_until_ready(call())
    microseconds = seconds(call, batches=options.batches) * 1e6
    seen = kernel_trace.trace(call, calls=options.calls, warm=3)
    facts = graph_facts(seen, options.calls, options.layers)
    facts["microseconds"] = microseconds
    return facts, moves


# ---- all of it


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Run:
    """The report, and what guards a part from the failure of another."""

    def __init__(self, options: Options, facts: dict[str, Any]):
        self.options = options
        self.started = time.monotonic()
        self.checks: list[Check] = []
        self.report: dict[str, Any] = {"machine": facts, "options": asdict(options), "failed": {}}

    def guarded(self, name: str, work: Callable[[], Any]) -> Any:
        """What the work returns, or None and a line in the report."""
        try:
            result = work()
        except Exception as error:
            traceback.print_exc()
            self.report["failed"][name] = _line(error)
            print(f"{name} failed: {_line(error)}", flush=True)
            result = None
        taken = time.monotonic() - self.started
        print(f"{name}: done after {taken:.0f} s", file=sys.stderr, flush=True)
        self.write()
        return result

    def judge(self, check: Check) -> None:
        self.checks.append(check)
        print(check, flush=True)

    def write(self) -> None:
        if self.options.json is not None:
            report = self.report | {"checks": [asdict(check) for check in self.checks]}
            write_text(self.options.json, json.dumps(report, indent=1, default=str) + "\n")


def _without_call(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "call"}


def run_all(run: Run) -> None:
    """All parts; whatever is timed comes before the first profile, which may leave CUPTI behind.

    What there is so far is in the report, should a later part not end.
    """
    options = run.options
    host: list[dict[str, Any]] = []
    cases: list[Case] = []
    waiting = device_cases(options)

    def time_host(kind: str) -> None:
        host.append(host_times(kind, options))
        run.report["host"] = [_without_call(row) for row in host]

    def time_next_case() -> bool:
        case = next(waiting, None)
        if case is not None:
            cases.append(case)
            run.report["device"] = [each.row for each in cases]
        return case is not None

    if "host" in options.parts:
        for kind in ("elementwise", "decode", "cusparselt"):
            run.guarded(f"host, {kind}", functools.partial(time_host, kind))
    if "device" in options.parts:
        while run.guarded("device, chains", time_next_case):
            pass
    for row in host:
        profiled = functools.partial(profile_host, row, options.chain[1])
        run.guarded(f"host, {row['kind']}, profiled", profiled)
    if "host" in options.parts:
        rows = run.report["host"] = [_without_call(row) for row in host]
        lines = [
            (
                row["kind"],
                *(row.get(name) for name in ("slope", "launch", "device", "kernels_a_call")),
            )
            for row in rows
        ]
        header = ("chain of", "us a product", "launch us", "device us")
        header = (*header, f"kernels in a call of {options.chain[1]}")
        print(*markdown(header, lines), sep="\n")
        run.judge(host_check(rows))
        run.write()
    for case in cases:
        run.guarded(f"device, {case.name}, profiled", functools.partial(profile_device, case))
    if "device" in options.parts:
        rows = [with_ratios(case.row) for case in cases]
        cases.clear()
        run.report["device"] = rows
        print(*device_lines(rows), sep="\n")
        run.judge(device_check(rows))
        run.write()
    if "graphs" in options.parts:
        run.report["graphs"] = {}
        chains = run.guarded("graphs, weights", lambda: graph_chains(options)) or {}
        if not chains:
            run.judge(Check("graphs", False, "nothing was measured"))
        for name, (function, x, weights, donated) in chains.items():
            work = functools.partial(measure_chain, function, x, weights, donated, options)
            measured = run.guarded(f"graphs, {name}", work)
            if measured is None:
                if donated:
                    run.judge(Check(name, False, "nothing was measured"))
                continue
            facts, moves = measured
            run.report["graphs"][name] = facts | {"moves": moves}
            print(f"{name}: {facts['microseconds']:.1f} us a call; {facts['kernels']:g} kernels")
            counts = sorted(facts["api_calls"].items())
            rows = [(f"`{each}`", f"{number / options.calls:g}") for each, number in counts]
            print(*markdown(("CUDA calls and XLA's graph events", "a call"), rows), sep="\n")
            if facts["outside"]:
                listed = ", ".join(f"{each} {n:g}" for each, n in facts["outside"].items())
                print(f"outside of graphs, a call: {listed}")
            for note in facts["notes"]:
                print(note)
            if donated:
                for check in graph_checks(name, facts, moves, options.layers):
                    run.judge(check)
            run.write()


def main(options: Options) -> int:
    """Prints tables and checks; 1 if a check fails, 2 for what cannot be asked."""
    kernel_trace.prepare()
    try:
        options.check()
    except ValueError as error:
        print(f"call_cost.py: {error}", file=sys.stderr)
        return 2
    if jax.default_backend() != "gpu":
        print("benchmarks/call_cost.py times an NVIDIA GPU, and JAX sees none.", file=sys.stderr)
        return 1
    facts = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "torch": None if torch is None else torch.__version__,
        "cusparselt": library_facts().version,
        "python": platform.python_version(),
        "records calls": ffi.records_calls(),
    }
    print(facts, flush=True)
    run = Run(options, facts)
    run_all(run)
    print("", *run.checks, sep="\n")
    run.write()
    return 0 if run.checks and all(check.passed for check in run.checks) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
