"""What an NVIDIA GPU did, kernels and CUDA calls, by JAX's profiler: for the scripts beside this.

`prepare` comes before anything touches a device: without its flag XLA runs no CUDA graph while it
is profiled, and what would be seen is not what runs.

Kernels overlap: with programmatic dependent launch one starts before the one before has ended. So
each has an *added* time, by which it moves the end of all that came before, and a gap, from that
end to its start. Added times and gaps sum up to the time from the first start to the last end.
"""

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

_MARK = "esparse measured"
# Between what warms up and what is measured, so that the two are told apart in the profile.
_PAUSE_SECONDS = 0.1
# Of XLA's own events, those that say what happens to its CUDA graphs.
_HOST_EVENT = re.compile(r"cu[A-Z]\w*$|command_buffer::|EvictCommandBuffers|WARNING: CommandBuffer")
_GRID = re.compile(r"grid:(\d+),(\d+),(\d+)")
_BLOCK = re.compile(r"block:(\d+),(\d+),(\d+)")
# What makes a graph, or makes it anew. The updates of single nodes and the captures that CUPTI is
# not asked about happen inside XLA's command_buffer events.
_GRAPH_WORK = re.compile(
    r"command_buffer::(record|update|initialize)|cuGraph(Instantiate|ExecUpdate|Exec\w*SetParams|"
    r"Create|Clone|Add)|cuStream(Begin|End)Capture"
)


def prepare() -> None:
    """Sets what XLA reads before its first computation."""
    flag = "--xla_enable_command_buffers_during_profiling=true"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    # Else kernels are kept from overlapping.
    os.environ.setdefault("TF_GPU_CUPTI_FORCE_CONCURRENT_KERNEL", "1")


class Kernel(NamedTuple):
    """A kernel or copy on the GPU; times in nanoseconds.

    Attributes:
        graph: Number of the CUDA graph it was part of; 0 outside of any.
    """

    name: str
    start: float
    duration: float
    grid: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None
    stream: str = ""
    graph: int = 0

    @property
    def end(self) -> float:
        return self.start + self.duration

    @property
    def copies(self) -> bool:
        """Whether it is a copy or fill of the driver's and no kernel."""
        return self.name.lower().startswith(("memcpy", "memset"))


class HostEvent(NamedTuple):
    """A CUDA call, or what XLA says of its graphs; times in nanoseconds."""

    name: str
    start: float
    duration: float


class Placed(NamedTuple):
    """A kernel among the others; nanoseconds."""

    kernel: Kernel
    added: float
    gap: float


@dataclass
class Trace:
    """What was seen of the calls that were measured.

    Attributes:
        kernels: In the order of their starts.
        host: In the order of their starts.
        seen: Planes and lines of the profile, with their numbers of events.
        notes: What was not as expected.
    """

    kernels: list[Kernel]
    host: list[HostEvent]
    seen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Host events by name."""
        return Counter(event.name for event in self.host)

    @property
    def graph_work(self) -> int:
        """How often a CUDA graph was made, captured or changed."""
        return sum(number for name, number in self.counts.items() if _GRAPH_WORK.match(name))

    def count(self, prefix: str) -> int:
        """Host events whose name begins so."""
        return sum(number for name, number in self.counts.items() if name.startswith(prefix))

    def require_kernels(self) -> list[Kernel]:
        """The kernels.

        Raises:
            RuntimeError: There is none; the message has what there is.
        """
        if self.kernels:
            return self.kernels
        gpu = any(line.startswith("/device:GPU") for line in self.seen)
        what = "GPU planes hold no kernel on a line 'Stream #...'" if gpu else "it has no GPU plane"
        raise RuntimeError(
            f"nothing of a GPU is in the profile: {what}. It takes an NVIDIA GPU, and CUPTI where "
            f"JAX finds it. Seen: {'; '.join(self.seen) or 'nothing'}. "
            f"{' '.join(self.notes)}".strip()
        )


def trace(
    call: Callable[[], Any],
    *,
    calls: int,
    warm: int = 2,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Trace:
    """Profiles queued calls, after some that are profiled as well and left out.

    Where graphs were launched and none of their kernels was seen, as CUPTI may not know the nodes
    of graphs that are older than it, everything is compiled and profiled once more.
    """
    found = _trace(call, calls, warm, wait)
    launches = found.count("cuGraphLaunch")
    if launches > 0 and len(found.kernels) < launches:
        jax.clear_caches()
        again = _trace(call, calls, warm + 2, wait)
        again.notes.append(
            f"Profiled twice: {launches} launches of graphs showed {len(found.kernels)} kernels."
        )
        return again
    return found


def _trace(call: Callable, calls: int, warm: int, wait: Callable) -> Trace:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1  # the calls come from CUPTI; this is for the mark and the graphs
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for _ in range(warm):
                wait(call())
            time.sleep(_PAUSE_SECONDS)
            with jax.profiler.TraceAnnotation(_MARK):
                result = None
                for _ in range(calls):
                    result = call()
                wait(result)
        finally:
            jax.profiler.stop_trace()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            return Trace([], [], notes=["The profiler wrote no .xplane.pb file."])
        data = jax.profiler.ProfileData.from_file(str(files[-1]))
        return read_planes(data.planes)


def read_planes(planes: Iterable[Any]) -> Trace:
    """A profile's measured part; planes as `jax.profiler.ProfileData` has them."""
    kernels, host, seen, notes, mark = [], {}, [], [], None
    for plane in planes:
        for line in plane.lines:
            events = list(line.events)
            seen.append(f"{plane.name} {line.name} ({len(events)})")
            if plane.name.startswith("/device:GPU:0") and line.name.startswith("Stream #"):
                # Its other lines are made of these: steps, modules, operations.
                kernels += [_kernel(event, line.name) for event in events]
            elif plane.name.startswith("/host:"):
                for event in events:
                    name = _host_name(event.name)
                    if name == _MARK:
                        mark = event.start_ns
                    elif _HOST_EVENT.match(name):  # once, if two planes have it
                        key = (name, event.start_ns, event.duration_ns)
                        host[key] = HostEvent(*key)
    kernels.sort(key=lambda kernel: kernel.start)
    events = sorted(host.values(), key=lambda event: event.start)
    begin = _begin(kernels, mark, notes)
    return Trace(
        [kernel for kernel in kernels if kernel.start >= begin],
        [event for event in events if event.start >= begin],
        seen,
        notes,
    )


def _begin(kernels: Sequence[Kernel], mark: float | None, notes: list[str]) -> float:
    """When the measured calls began: in the pause before them."""
    half = 0.5e9 * _PAUSE_SECONDS
    if mark is not None and (not kernels or any(k.start >= mark - half for k in kernels)):
        return mark - half
    if not kernels:
        return float("-inf")
    placed = added_times(kernels)
    longest = max(placed, key=lambda each: each.gap)
    where = "The mark of the measured part is missing, or on another clock than the GPU"
    if longest.gap >= half:
        notes.append(f"{where}; it was taken to begin after the longest pause.")
        return longest.kernel.start - half
    notes.append(f"{where}, and there is no pause: the warm-up is counted as well.")
    return float("-inf")


def _host_name(name: str) -> str:
    """Without what XLA appends: #key=value# and the number of a graph."""
    return name.split("#")[0].split(" (CudaGraph")[0].strip()


def _kernel(event: Any, stream: str) -> Kernel:
    grid = block = None
    graph = 0
    for key, value in event.stats:
        if isinstance(value, str):
            if found := _GRID.search(value):
                grid = tuple(map(int, found.groups()))
            if found := _BLOCK.search(value):
                block = tuple(map(int, found.groups()))
        if key in ("cuda_graph_id", "cuda_graph_exec_id", "graph_id"):
            graph = graph or _number(value)
        elif key in ("cuda_graph_node_id", "graph_node_id"):
            graph = graph or min(1, _number(value))
    return Kernel(event.name, event.start_ns, event.duration_ns, grid, block, stream, graph)


def _number(value: Any) -> int:
    """Of a graph or node, in whatever form it is given; 1 for one that is no number."""
    digits = re.sub(r"\D", "", str(value))
    return int(digits) if digits else int(bool(value))


def added_times(kernels: Iterable[Kernel]) -> list[Placed]:
    """By how much each moves the end of what came before, and the idle time before it."""
    placed: list[Placed] = []
    last = None
    for kernel in sorted(kernels, key=lambda each: each.start):
        last = kernel.start if last is None else last
        gap = max(0.0, kernel.start - last)
        added = max(0.0, kernel.end - max(last, kernel.start))
        placed.append(Placed(kernel, added, gap))
        last = max(last, kernel.end)
    return placed


def wall(kernels: Sequence[Kernel]) -> float:
    """Nanoseconds from the first start to the last end."""
    return max(k.end for k in kernels) - min(k.start for k in kernels) if kernels else 0.0


def short_name(name: str) -> str:
    """A kernel's name without types, arguments, and the numbers that XLA gives to instructions."""
    if name.startswith("esparse_"):
        return name
    short, depth = [], 0
    for letter in name.removeprefix("void "):
        if letter == "<":
            depth += 1
        elif letter == ">":
            depth -= 1
        elif letter == "(" and depth == 0 and short:
            break
        elif depth == 0:
            short.append(letter)
    text = "".join(short).split("::")[-1].strip() or name
    text = re.sub(r"([._]\d+)+$", "", text) or text
    return text if len(text) <= 48 else f"{text[:30]}...{text[-15:]}"


def grid_text(kernel: Kernel) -> str:
    """128, or 4x32 for more than one axis."""
    if kernel.grid is None:
        return "-"
    axes = list(kernel.grid)
    while len(axes) > 1 and axes[-1] == 1:
        axes.pop()
    return "x".join(map(str, axes))


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> list[str]:
    """A table as markdown, the first `left` columns at the left."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join([":--"] * left + ["--:"] * (len(header) - left)) + "|")
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
