"""What calls cost: the judgements, and all parts by a GPU that is made up."""

import contextlib
import functools
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from esparse_jax.sparse import blob24, compress24
from esparse_jax.sparse._timing import random_24


@pytest.fixture(scope="module")
def modules():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield tuple(map(importlib.import_module, ("call_cost", "kernel_trace")))
    sys.path.remove(folder)


@pytest.fixture
def call_cost(modules):
    return modules[0]


HLO = """\
HloModule jit_chain, entry_computation_layout={(f16[8,64]{1,0}, u8[4608]{0})->f16[8,64]{1,0}}

%fused (param_0: u8[4608]) -> u8[4608] {
  %param_0 = u8[4608]{0} parameter(0)
  ROOT %add.1 = u8[4608]{0} add(%param_0, %param_0)
}

%moved (param_0.1: u8[9216]) -> u8[9216] {
  %param_0.1 = u8[9216]{0} parameter(0)
  ROOT %copy.9 = u8[9216]{0} copy(%param_0.1), metadata={op_name="a(b)"}
}

ENTRY %main (x: f16[8,64], w: u8[4608]) -> f16[8,64] {
  %x = f16[8,64]{1,0} parameter(0)
  %w = u8[4608]{0} parameter(1)
  %call.1 = (f16[8,64]{1,0}, u8[64]{0}) custom-call(%x, %w), custom_call_target="c", metadata={}
  %gte = f16[8,64]{1,0} get-tuple-element(%call.1), index=0
  %copy.1 = f16[8,64]{1,0} copy(%gte)
  %transpose.1 = u8[64,72]{1,0} transpose(%bits), dimensions={1,0}
  %convert.1 = f16[4608]{0} convert(%w)
  %start = (u8[4608]{0}, u8[4608]{0}, u32[]) copy-start(u8[4608]{0} %w)
  ROOT %r = f16[8,64]{1,0} add(%copy.1, %gte)
}
"""


def test_moves_of_weights_are_found_in_hlo(call_cost):
    found = [line.split(" = ")[0] for line in call_cost.weight_moves(HLO, {4608})]
    assert found == ["%convert.1", "%start"]
    found = call_cost.weight_moves(HLO, {9216})
    assert [line.split(" = ")[0] for line in found] == ["ROOT %copy.9"]
    assert call_cost.weight_moves(HLO, {1234}) == []
    assert call_cost.weight_moves("", {4608}) == []


def test_moves_of_weights_are_found_in_hlo_of_this_jax(call_cost):
    blob = blob24(compress24(random_24(jax.random.key(0), 64, 64, "float16")))

    def text(function):
        return jax.jit(function).lower(blob.data).compile().as_text()

    size = {blob.data.size}
    assert call_cost.weight_moves(text(lambda data: data.astype(jnp.float32).sum()), size)
    assert call_cost.weight_moves(text(lambda data: data[::-1]), size)
    assert not call_cost.weight_moves(text(lambda data: data.max()), size)


def test_the_librarys_kernels_are_those_in_common(modules):
    call_cost, kernel_trace = modules

    def ran(*names):
        return [kernel_trace.Kernel(name, i, 1000 * (i + 1)) for i, name in enumerate(names)]

    times = call_cost.times_of_library
    ours = ran("sparse", "fusion", "sparse", "MemcpyD2D")
    assert times(ours, 2, ran("sparse"), 1) == (2.0, 1.0, ["sparse"], None)
    *_, note = times(ours, 4, ran("sparse"), 1)
    assert note == "2 kernels of the library for 4 products"
    ours_us, theirs_us, names, note = times(ours, 2, ran("other", "MemcpyD2D"), 1)
    assert (ours_us, theirs_us, names) == (2.0, 1.0, ["sparse"])
    assert note == "no kernel in common: JAX ran ['fusion', 'sparse'], PyTorch ['other']"


@pytest.mark.parametrize(
    ("rows", "passed"),
    [
        ([(1.0, 1.5), (1.02, 1.0)], True),
        ([(1.03, 1.0)], False),
        ([(None, 1.01)], True),  # no profile
        ([(None, 1.05)], False),
        ([(1.0, 1.0), (None, None)], False),
        ([], False),
    ],
)
def test_device_time_is_judged_by_kernels(call_cost, rows, passed):
    rows = [{"kernel_ratio": kernel, "chain_ratio": chain} for kernel, chain in rows]
    assert call_cost.device_check(rows).passed is passed


@pytest.mark.parametrize(
    ("slopes", "graphs", "passed"),
    [((9.0, 3.0), 0, True), ((10.5, 3.0), 0, False), ((9.0,), 0, False), ((9.0, 3.0), 1, False)],
)
def test_host_cost_is_judged_by_the_slopes(call_cost, slopes, graphs, passed):
    kinds = ("decode", "cusparselt")
    rows = [
        {"kind": kind, "slope": slope, "graph_launches": graphs}
        for kind, slope in zip(kinds, slopes, strict=False)
    ]
    rows.append({"kind": "elementwise", "slope": 50.0})
    assert call_cost.host_check(rows).passed is passed


def trace_of(kernel_trace, *, layers, calls, graph, host=(), more=()):
    """Calls of a product a layer, and other kernels."""
    kernels = [
        kernel_trace.Kernel("esparse_decode", i, 1, graph=graph) for i in range(layers * calls)
    ]
    kernels += [kernel_trace.Kernel(name, 10**6 + i, 1) for i, name in enumerate(more)]
    return kernel_trace.Trace(kernels, [kernel_trace.HostEvent(name, 0, 1) for name in host])


def test_graphs_are_judged(modules):
    call_cost, kernel_trace = modules

    def passed(moves=(), **facts):
        seen = trace_of(kernel_trace, layers=4, calls=2, **facts)
        found = call_cost.graph_facts(seen, 2, 4)
        return [check.passed for check in call_cost.graph_checks("mlp", found, moves, 4)], found

    launches = ("cuGraphLaunch",) * 2
    checks, facts = passed(graph=7, host=launches, more=("MemcpyD2D", "loop_fusion_1"))
    assert checks == [True] * 3
    assert facts["outside"] == {"MemcpyD2D": 0.5, "loop_fusion": 0.5}
    assert (facts["graph_launches"], facts["products"]) == (1, 4)
    assert passed(graph=0, host=("cuLaunchKernel",) * 8)[0] == [False, True, True]
    # Kernels that say nothing of graphs, and no launch but those of graphs.
    assert passed(graph=0, host=launches)[0] == [True] * 3
    assert passed(graph=0, host=(*launches, "cuLaunchKernelEx"))[0] == [False, True, True]
    for work in ("command_buffer::update", "cuGraphInstantiate_v2", "cuStreamBeginCapture"):
        assert passed(graph=7, host=(*launches, work))[0] == [True, False, True]
    assert passed(graph=7, host=launches, moves=["%copy"])[0] == [True, True, False]


def test_wrong_options_are_refused(call_cost, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "")
    for options, said in (
        ({"shapes": ("4096",)}, "a shape is OUTxCHANNEL"),
        ({"shapes": ("100x64",)}, "multiples of 64; got 100x64"),
        ({"rows": (12,)}, "each must be a multiple of 8"),
        ({"chain": (16, 16)}, "the second must be longer"),
        ({"calls": 0}, "calls is 0; it must be at least 1"),
        ({"split_k": 0}, "split_k of an algorithm must be"),
    ):
        assert call_cost.main(call_cost.Options(**options)) == 2
        assert said in capsys.readouterr().err
    if jax.default_backend() != "gpu":
        assert call_cost.main(call_cost.Options()) == 1
        assert "times an NVIDIA GPU, and JAX sees none" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["elementwise", "reference"])
def test_a_small_chain_is_one_call(call_cost, kind):
    options = call_cost.Options(chain=(1, 3), batches=1)
    row = call_cost.host_times(kind, options)
    assert row["call"]().shape == (8, 64)
    assert set(row["microseconds"]) == {"1", "3"}


class OtherLibrary:
    """What PyTorch would be."""

    def __init__(self, xs, weight, copies, options):
        self.products, self.why_no_graph = len(xs) * copies, None
        raise RuntimeError("this PyTorch's _cslt_sparse_mm has no transpose_result")


def test_all_parts_run_and_a_failure_costs_itself_only(modules, tmp_path, monkeypatch, capsys):
    call_cost, kernel_trace = modules
    options = call_cost.Options(
        shapes=("128x128",),
        rows=(8,),
        chain=(1, 3),
        layers=3,
        hidden=128,
        inner=192,
        calls=2,
        batches=1,
        json=tmp_path / "call_cost.json",
    )
    profiled = []

    def trace(call, *, calls, warm, wait=jax.block_until_ready):
        wait(call())
        profiled.append(calls)
        launches = ("cuGraphLaunch",) * calls
        return trace_of(kernel_trace, layers=3, calls=calls, graph=7, host=launches)

    def product(x, blob, *, backend=None, algorithm=None):
        if backend == "decode":
            raise ValueError("no decode kernel here")
        return call_cost_matmul(x, blob, backend="reference")

    call_cost_matmul = call_cost.sparse_matmul
    monkeypatch.setattr(call_cost.kernel_trace, "trace", trace)
    monkeypatch.setattr(call_cost, "sparse_matmul", product)
    monkeypatch.setattr(call_cost, "torch", object())
    monkeypatch.setattr(call_cost, "Torch", OtherLibrary)
    monkeypatch.setattr(call_cost, "chain_rotation", lambda *_: 2)
    monkeypatch.setattr(call_cost, "chain_inputs", lambda *_: 1)
    run = call_cost.Run(options, {"device": "made up"})
    call_cost.run_all(run)
    report = json.loads(options.json.read_text())
    assert report["failed"] == {"host, decode": "ValueError: no decode kernel here"}
    assert [row["kind"] for row in report["host"]] == ["elementwise", "cusparselt"]
    assert report["device"][0]["failed"].startswith("RuntimeError: this PyTorch's")
    assert report["device"][0]["jax_chain"] > 0
    assert len(report["graphs"]) == 4
    assert report["graphs"]["mlp, 1 row"]["products"] == 3
    assert {check["name"]: check["passed"] for check in report["checks"]}.items() >= {
        "host cost of a call less than 10 us": False,
        "device time at most 1.02 times PyTorch's": False,
        "mlp, 1 row: every product in a CUDA graph": True,
        "cusparselt, 1024 rows: no graph made or changed after the warm-up": True,
    }.items()
    assert len(report["checks"]) == 2 + 3 * 3
    said = capsys.readouterr().out
    assert "| 128x128 | 8 |" in said
    assert "FAIL: host cost of a call" in said
    assert profiled == [3, 3, 2, 2, 2, 2]


def test_a_product_is_profiled_in_the_way_that_shows_its_kernels(modules, monkeypatch):
    call_cost, kernel_trace = modules
    synchronized, asked = [], []

    class Cuda:
        @staticmethod
        def synchronize():
            synchronized.append(True)

    class FakeTorch:
        cuda = Cuda

    class Side:
        products = 4

        def call(self):
            return "graph"

        def queue(self):
            return "queue"

    def trace(call, *, calls, warm, wait):
        what = call()
        wait(what)
        asked.append(what)
        seen = [] if what == "graph" else range(calls * 4)
        return kernel_trace.Trace([kernel_trace.Kernel("k", i, 2000) for i in seen], [])

    monkeypatch.setattr(call_cost.kernel_trace, "trace", trace)
    monkeypatch.setattr(call_cost, "torch", FakeTorch)
    row = {"out": 64, "channels": 64, "rows": 8}
    case = call_cost.Case(row, Side(), Side(), functools.partial(str, "alone"))
    call_cost.profile_device(case)
    assert asked == ["graph", "alone", "graph", "queue"]
    assert (row["jax_kernel"], row["torch_kernel"]) == (2.0, 2.0)
    assert len(synchronized) == 2
    assert call_cost.with_ratios(row)["kernel_ratio"] == 1
    assert "| 64x64 | 8 | 2.00 | 2.00 | 1.000 |" in "\n".join(call_cost.device_lines([row]))


@pytest.mark.parametrize("refusal", [None, "an operation is not permitted"])
def test_pytorchs_calls_are_timed_in_a_graph_or_not_at_all(modules, monkeypatch, refusal):
    call_cost, _ = modules
    modes, replays = [], []

    class Graph:
        def replay(self):
            replays.append(True)

    class Cuda:
        CUDAGraph = Graph

        @staticmethod
        def synchronize():
            pass

        @staticmethod
        @contextlib.contextmanager
        def graph(graph, capture_error_mode):
            modes.append(capture_error_mode)
            if refusal is not None:
                raise RuntimeError(refusal)
            yield

    class FakeTorch:
        cuda = Cuda

    monkeypatch.setattr(call_cost, "torch", FakeTorch)
    side = object.__new__(call_cost.Torch)
    side._xs, side._weights, side._graph, side.why_no_graph = ["x"], ["a", "b"], None, None
    products = []
    monkeypatch.setattr(side, "product", lambda x, weight: products.append((x, weight)))
    side.capture()
    products.clear()
    side.call()
    assert modes == ["thread_local"]  # JAX's threads ask the GPU meanwhile
    if refusal is None:
        assert (side.why_no_graph, len(replays), products) == (None, 2, [])
        return
    assert products == [("x", "a"), ("x", "b")]
    assert side.microseconds(1.0, batches=1) is None
    row = {"out": 64, "channels": 64, "rows": 8, "jax_chain": 2.0, "torch_chain": None}
    row = call_cost.with_ratios(row | {"torch_no_graph": side.why_no_graph})
    assert row["chain_ratio"] is None
    said = "\n".join(call_cost.device_lines([row]))
    assert f"no chain of PyTorch's, for want of a graph: RuntimeError: {refusal}" in said
