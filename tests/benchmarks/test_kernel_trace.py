"""What is made of a profile: by planes as a GPU writes them, and by one of this machine."""

import importlib
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

MILLISECOND = 1_000_000  # nanoseconds


@pytest.fixture(scope="module")
def kernel_trace():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("kernel_trace")
    sys.path.remove(folder)


class Space:
    """A profile in the text form of the format, with stats as the GPU's tracer writes them."""

    def __init__(self):
        self._planes: dict[str, dict[str, list[tuple]]] = {}

    def add(self, plane, line, name, start, duration, **stats):
        """An event; times in nanoseconds."""
        self._planes.setdefault(plane, {}).setdefault(line, []).append(
            (name, start, duration, stats)
        )
        return self

    def planes(self):
        # The types of jaxlib's own module lack a __module__, which Python 3.12 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(self._text())
        self._data = jax.profiler.ProfileData.from_serialized_xspace(serialized)
        return self._data.planes

    def _text(self) -> str:
        text = ""
        for plane, lines in self._planes.items():
            names: dict[str, int] = {}
            stat_names: dict[str, int] = {}
            body = ""
            for number, (line, events) in enumerate(lines.items(), 1):
                body += f'lines {{ id: {number} name: "{line}" timestamp_ns: 0\n'
                for name, start, duration, stats in events:
                    key = names.setdefault(name, len(names) + 1)
                    body += f"events {{ metadata_id: {key} offset_ps: {start * 1000} "
                    body += f"duration_ps: {duration * 1000}\n"
                    for stat, value in stats.items():
                        at = stat_names.setdefault(stat, len(stat_names) + 1)
                        if isinstance(value, int):
                            given = f"uint64_value: {value}"
                        else:  # long texts are references to the names
                            reference = stat_names.setdefault(value, len(stat_names) + 1)
                            given = f"ref_value: {reference}"
                        body += f"stats {{ metadata_id: {at} {given} }}\n"
                    body += "}\n"
                body += "}\n"
            for kind, table in (("event_metadata", names), ("stat_metadata", stat_names)):
                for name, key in table.items():
                    body += f'{kind} {{ key: {key} value {{ id: {key} name: "{name}" }} }}\n'
            text += f'planes {{ name: "{plane}"\n{body}}}\n'
        return text


GPU, HOST = "/device:GPU:0", "/host:CPU"
DETAILS = "regs:64 static_shared:0 dynamic_shared:1024 grid:132,2,1 block:256,1,1 occ_pct:50"


def test_kernels_come_from_streams_and_from_behind_the_mark(kernel_trace):
    space = Space()
    mark = 200 * MILLISECOND
    space.add(HOST, "python", "esparse measured", mark, 9 * MILLISECOND)
    space.add(HOST, "python", "cuGraphLaunch (CudaGraph:7)", MILLISECOND, 10)
    space.add(HOST, "python", "command_buffer::record", MILLISECOND, 10)
    space.add(HOST, "python", "PjitFunction(f)", mark + 5, 10)
    for number in range(3):
        space.add(HOST, "python", "cuGraphLaunch (CudaGraph:7)", mark + 100 * number, 10)
    space.add(HOST, "python", "command_buffer::update#device=0,num_commands=5#", mark + 30, 10)
    space.add("/host:CUPTI", "Host Threads/1", "cuGraphLaunch (CudaGraph:7)", mark, 10)
    for start in (MILLISECOND, mark + 300, mark + 200):
        stats = {"kernel_details": DETAILS, "cuda_graph_id": 7, "correlation_id": start}
        space.add(GPU, "Stream #13(Compute,MemcpyD2D)", "kernel_1", start, 150, **stats)
    space.add(GPU, "Stream #14(MemcpyH2D)", "MemcpyH2D", mark + 400, 5)
    space.add(GPU, "XLA Ops", "kernel_1", mark + 200, 150)
    space.add(GPU, "XLA Modules", "jit_f", mark + 200, 150)
    space.add(GPU, "Steps", "0", mark + 200, 150)
    found = kernel_trace.read_planes(space.planes())

    starts = [(kernel.name, kernel.start - mark) for kernel in found.kernels]
    assert starts == [("kernel_1", 200), ("kernel_1", 300), ("MemcpyH2D", 400)]
    first, _, copy = found.kernels
    assert (first.grid, first.block, first.graph) == ((132, 2, 1), (256, 1, 1), 7)
    assert first.stream.startswith("Stream #13")
    assert not first.copies
    assert copy.copies
    assert (copy.grid, copy.graph) == (None, 0)
    assert found.counts == {"cuGraphLaunch": 3, "command_buffer::update": 1}
    assert found.graph_work == 1
    assert found.count("cuGraph") == 3
    assert not found.notes
    assert "/device:GPU:0 XLA Ops (1)" in found.seen


def test_a_kernel_of_a_graph_may_name_its_node_alone(kernel_trace):
    space = Space()
    space.add(GPU, "Stream #1(Compute)", "inside", 0, 1, cuda_graph_node_id=40)
    space.add(GPU, "Stream #1(Compute)", "as text", 2, 1, cuda_graph_exec_id="$$12")
    space.add(GPU, "Stream #1(Compute)", "outside", 4, 1, cuda_graph_id=0)
    found = kernel_trace.read_planes(space.planes())
    assert [kernel.graph for kernel in found.kernels] == [1, 12, 0]


def test_without_a_mark_the_longest_pause_is_where_it_begins(kernel_trace):
    space = Space()
    for start in (0, 200, 200 * MILLISECOND, 200 * MILLISECOND + 300):
        space.add(GPU, "Stream #1(Compute)", "kernel", start, 100)
    found = kernel_trace.read_planes(space.planes())
    assert [kernel.start for kernel in found.kernels] == [
        200 * MILLISECOND,
        200 * MILLISECOND + 300,
    ]
    assert "longest pause" in found.notes[0]


def test_a_mark_on_another_clock_is_not_believed(kernel_trace):
    space = Space()
    space.add(HOST, "python", "esparse measured", 10**15, 5)
    space.add(GPU, "Stream #1(Compute)", "kernel", 100, 100)
    found = kernel_trace.read_planes(space.planes())
    assert len(found.kernels) == 1
    assert "the warm-up is counted as well" in found.notes[0]


def kernels(kernel_trace, *times):
    return [kernel_trace.Kernel(f"k{i}", start, length) for i, (start, length) in enumerate(times)]


def test_added_times_and_gaps_sum_up_to_the_whole(kernel_trace):
    # The second starts early, the third is inside the second, the fourth comes late.
    ran = kernels(kernel_trace, (100, 50), (140, 60), (150, 10), (230, 20))
    placed = kernel_trace.added_times(reversed(ran))
    assert [(each.added, each.gap) for each in placed] == [(50, 0), (50, 0), (0, 0), (20, 30)]
    assert kernel_trace.wall(ran) == sum(each.added + each.gap for each in placed) == 150
    assert kernel_trace.added_times([]) == []
    assert kernel_trace.wall([]) == 0


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("loop_add_fusion_12", "loop_add_fusion"),
        ("gemm_fusion_dot_12_0", "gemm_fusion_dot"),
        ("wrapped_tanh.3", "wrapped_tanh"),
        ("esparse_decode_float16_1_2", "esparse_decode_float16_1_2"),
        ("void cutlass::device_kernel<a::B<(c)1, d<2>>>(a::Params)", "device_kernel"),
        ("void (anonymous namespace)::run<int>(int*)", "run"),
        ("MemcpyD2D", "MemcpyD2D"),
        ("7", "7"),
    ],
)
def test_names_are_shortened_to_what_a_group_has_in_common(kernel_trace, name, short):
    assert kernel_trace.short_name(name) == short


def test_a_long_name_keeps_both_ends(kernel_trace):
    name = "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x32x64_warpgroupsize1x1x1_cublas"
    short = kernel_trace.short_name(name)
    assert len(short) == 48
    assert (short[:4], short[-6:]) == ("sm90", "cublas")


def test_tables_are_markdown(kernel_trace):
    lines = kernel_trace.markdown(("a", "b", "c"), [("x|y", 1.234, None)])
    assert lines == ["| a | b | c |", "|:--|--:|--:|", "| x\\|y | 1.23 |  |"]


def test_a_profile_of_the_cpu_says_that_it_has_no_gpu(kernel_trace):
    call = jax.jit(lambda x: jnp.sin(x @ x))
    x = jnp.ones((8, 8))
    found = kernel_trace.trace(lambda: call(x), calls=2, warm=1)
    assert found.kernels == []
    assert any(line.startswith("/host:CPU") for line in found.seen)
    with pytest.raises(RuntimeError, match="it has no GPU plane"):
        found.require_kernels()


def test_a_gpu_without_streams_says_which_lines_there_are(kernel_trace):
    space = Space().add(GPU, "XLA Ops", "kernel", 0, 1)
    found = kernel_trace.read_planes(space.planes())
    with pytest.raises(RuntimeError, match=r"no kernel on a line.*XLA Ops \(1\)"):
        found.require_kernels()


def test_graphs_that_show_no_kernels_are_profiled_again(kernel_trace, monkeypatch):
    host = [kernel_trace.HostEvent("cuGraphLaunch", i, 1) for i in range(3)]
    ran = kernels(kernel_trace, (0, 1), (2, 1), (4, 1))
    found = iter([kernel_trace.Trace([], host), kernel_trace.Trace(ran, host)])
    asked, cleared = [], []

    def fake(call, calls, warm, wait):
        asked.append(warm)
        return next(found)

    monkeypatch.setattr(kernel_trace, "_trace", fake)
    monkeypatch.setattr(kernel_trace.jax, "clear_caches", lambda: cleared.append(True))
    again = kernel_trace.trace(lambda: None, calls=3)
    assert len(again.kernels) == 3
    assert (asked, cleared) == ([2, 4], [True])
    assert again.notes == ["Profiled twice: 3 launches of graphs showed 0 kernels."]


def test_xla_is_told_to_keep_its_graphs(kernel_trace, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("TF_GPU_CUPTI_FORCE_CONCURRENT_KERNEL", "0")
    kernel_trace.prepare()
    kernel_trace.prepare()
    flags = kernel_trace.os.environ["XLA_FLAGS"]
    assert flags == "--xla_a=1 --xla_enable_command_buffers_during_profiling=true"
    assert kernel_trace.os.environ["TF_GPU_CUPTI_FORCE_CONCURRENT_KERNEL"] == "0"
