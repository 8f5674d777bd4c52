"""A decode step taken apart: kernels as a GPU would have run them."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

from esparse_jax.inference.bench import bytes_read, linear_bytes

LAYERS, STEPS = 3, 2
STEM = "esparse_decode_float16_1_"


@pytest.fixture(scope="module")
def modules():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield tuple(map(importlib.import_module, ("decode_profile", "kernel_trace")))
    sys.path.remove(folder)


@pytest.fixture
def decode_profile(modules):
    return modules[0]


def run(kernel_trace, steps: list[list[tuple[str, int, int]]]) -> list:
    """Kernels (name, grid, microseconds) one after the other, 1 us between two."""
    kernels, now = [], 0
    for step in steps:
        for name, grid, length in step:
            kernels.append(
                kernel_trace.Kernel(name, now, length * 1000, (grid, 1, 1), (256, 1, 1), "", 1)
            )
            now += (length + 1) * 1000
    return kernels


def sparse_step() -> list[tuple[str, int, int]]:
    """As the inference model issues it, with a norm and a head at the end."""
    step = [("wrapped_gather", 1, 2)]
    for layer in range(LAYERS):
        step += [(f"{STEM}1", 96, 10)]
        step += [(f"loop_fusion_{3 * layer}", 4, 2), (f"loop_fusion_{3 * layer + 1}", 4, 5)]
        step += [(f"{STEM}1", 96, 4), (f"{STEM}2", 132, 20), (f"{STEM}1", 96, 11)]
    return [*step, ("gemv_head", 64, 30)]


def test_products_are_told_by_their_order(modules):
    decode_profile, kernel_trace = modules
    bounds = {"qkv": 24.0, "o": 9.0, "gate+up": 54.0, "down": 30.0, "head": 28.0}
    bounds[decode_profile.ATTENTION] = 3.0
    kernels = run(kernel_trace, [sparse_step()] * STEPS)
    found = decode_profile.profile(kernels, STEPS, LAYERS, bounds)
    parts = {part.name: part.added for part in found.parts}
    assert {name: parts[name] for name in decode_profile.PRODUCTS} == {
        "qkv": 30,
        "o": 12,
        "gate+up": 60,
        "down": 33,
    }
    assert parts["head"] == 30
    assert parts[decode_profile.ATTENTION] == 21
    assert parts[decode_profile.ONCE] == 2
    assert sum(parts.values()) == pytest.approx(found.wall)
    above = {part.name: part.above for part in found.parts}
    assert above["gate+up"] == 6
    assert not found.notes
    # The two fusions of a layer have one name and grid, and stand at two places of it.
    fusions = [group for group in found.groups if group.name == "loop_fusion"]
    assert sorted((group.each, group.launches) for group in fusions) == [(2, 3), (5, 3)]


def test_the_tables_show_all_of_it(modules):
    decode_profile, kernel_trace = modules
    kernels = run(kernel_trace, [sparse_step()] * STEPS)
    found = decode_profile.profile(kernels, STEPS, LAYERS, {"head": 28.0})
    lines = decode_profile.tables(found, Counter({"cuGraphLaunch": 4}), STEPS)
    assert "| `cuGraphLaunch` | 2.000 |" in lines
    (row,) = (line for line in lines if line.startswith("| gate+up | `esparse"))
    assert row.startswith(f"| gate+up | `{STEM}2` | 132 | 3 | 20.00 | 60.00 | ")
    (row,) = (line for line in lines if line.startswith("| head | 30.00"))
    assert row.endswith("| 28.00 | 2.00 |")
    (row,) = (line for line in lines if line.startswith("| the step"))
    assert "| 100.0% |" in row


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("head", ["nvjet_head", "loop_head"])
def test_dense_products_are_told_by_their_number(modules, attention, head):
    decode_profile, kernel_trace = modules
    step = []
    for _ in range(LAYERS):
        step += [("nvjet_qkv", 1, 10)]
        step += [("gemm_fusion_dot_1", 1, 1), ("gemm_fusion_dot_2", 1, 1)] if attention else []
        step += [("nvjet_o", 1, 4), ("splitKreduce", 1, 1), ("nvjet_g", 1, 20), ("nvjet_d", 1, 9)]
    kernels = run(kernel_trace, [[*step, (head, 1, 30)]] * STEPS)
    found = decode_profile.profile(kernels, STEPS, LAYERS, {"head": 28.0})
    parts = {part.name: part.added for part in found.parts}
    assert [parts[name] for name in decode_profile.PRODUCTS] == [30, 12, 60, 27]
    assert parts["head"] == 30
    assert parts[decode_profile.ATTENTION] == (9 if attention else 3)


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
@pytest.mark.parametrize("a_chunk", [0, 1], ids=["steps", "chunk"])
def test_what_is_once_a_step_belongs_to_no_layer(modules, layers, a_chunk):
    """The head least of all, which is a product; `a_chunk` of each is where 16 steps begin."""
    decode_profile, kernel_trace = modules
    step = [("wrapped_gather", 1, 2)]
    for _ in range(layers):
        step += [(f"{STEM}1", 96, 10), ("attention", 32, 5), ("add", 4, 1), ("add", 4, 2)]
        step += [(f"{STEM}1", 96, 4), (f"{STEM}2", 132, 20), (f"{STEM}1", 96, 11)]
    step += [("gemm_fusion_dot_500", 500, 100), ("argmax", 1, 3)]
    # The same kernels once more where a chunk begins: 1.0625 of each in a step.
    first = [
        ("wrapped_gather", 1, 2),
        ("gemm_fusion_dot_500", 500, 100),
        ("argmax", 1, 3),
    ] * a_chunk
    steps = 16
    kernels = run(kernel_trace, [first + step, *[step] * (steps - 1)])
    found = decode_profile.profile(kernels, steps, layers, {"head": 98.0})
    parts = {part.name: part.added for part in found.parts}
    often = 1 + a_chunk / steps
    assert parts["head"] == pytest.approx(100 * often)
    of_one_layer = 8 if layers == 1 else 0  # what cannot be told from the rest of the step
    assert parts.get(decode_profile.ATTENTION, 0) == (0 if of_one_layer else 8 * layers)
    assert parts[decode_profile.ONCE] == pytest.approx(5 * often + of_one_layer)
    assert decode_profile.SOME not in parts
    (head,) = (group for group in found.groups if group.part == "head")
    assert (head.name, head.grid, head.launches) == ("gemm_fusion_dot", "500", often)
    said = ["Not the same number in every step: argmax, gemm_fusion_dot, wrapped_gather."]
    assert found.notes == said * a_chunk
    assert sum(parts.values()) == pytest.approx(found.wall)


@pytest.mark.parametrize(
    ("a_step", "part"),
    [(1, "ONCE"), (2, "SOME"), (3, "SOME"), (4, "ATTENTION"), (7, "SOME"), (8, "ATTENTION")],
)
@pytest.mark.parametrize("a_chunk", [0, 1])
def test_a_kernel_of_all_layers_is_there_a_multiple_of_times(modules, a_step, part, a_chunk):
    decode_profile, kernel_trace = modules
    layers, steps = 4, 16
    products = [(f"{STEM}1", 96, 10)] * 4 * layers
    kernels = run(
        kernel_trace,
        [
            [("norm", 1, 1)] * (a_step + (a_chunk if number == 0 else 0)) + products
            for number in range(steps)
        ],
    )
    found = decode_profile.profile(kernels, steps, layers, {})
    (name,) = {group.part for group in found.groups if group.name == "norm"}
    assert name == getattr(decode_profile, part)
    parts = {part.name: part.added for part in found.parts}
    assert parts[name] == pytest.approx(a_step + a_chunk / steps)
    lines = decode_profile.tables(found, Counter(), steps)
    assert any(line.startswith(f"| {name} | `norm` | 1 | ") for line in lines)


def test_other_numbers_are_said(modules):
    decode_profile, kernel_trace = modules
    step = [(f"{STEM}1", 96, 10)] * 5
    kernels = run(kernel_trace, [[*step, ("copy", 1, 1)], step])
    found = decode_profile.profile(kernels, STEPS, LAYERS, {})
    assert "The products were not told apart" in found.notes[0]
    assert found.notes[1] == "Not the same number in every step: copy."
    assert sum(part.added for part in found.parts) == pytest.approx(found.wall)


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_the_bytes_of_the_parts_are_those_of_the_model(decode_profile, form):
    options = decode_profile.Options(shape="tiny", context=32, form=form).bench()
    model = decode_profile.bench_model(options, form, "float16")
    found = decode_profile.part_bytes(model, options, "float16")
    assert sum(found[name] for name in decode_profile.PRODUCTS) == linear_bytes(model)
    products_and_head = sum(found.values()) - found[decode_profile.ATTENTION]
    assert products_and_head == bytes_read(model)
    assert found["head"] >= model.lm_head.kernel[...].nbytes


def test_a_step_is_measured_and_shown(modules, tmp_path, monkeypatch, capsys):
    """On the CPU, by kernels that a GPU might have run."""
    decode_profile, kernel_trace = modules
    calls = []

    def trace(call, calls_made=calls, *, calls):
        calls_made += [call() for _ in range(calls)]
        kernels = run(kernel_trace, [sparse_step()[: 1 + 2 * 6]] * (16 * calls))
        host = [kernel_trace.HostEvent("cuGraphLaunch", 0, 1)]
        return kernel_trace.Trace(kernels, host)

    monkeypatch.setattr(decode_profile.kernel_trace, "trace", trace)
    file = tmp_path / "profile.json"
    options = decode_profile.Options(shape="tiny", context=32, chunks=2, json=file)
    decode_profile.show(options, decode_profile.measure(options))
    assert len(calls) == 2
    said = capsys.readouterr().out
    assert said.startswith("tiny, 2 layers, sparse, float32, batch 1, context 32, on cpu; jax ")
    assert "kernels outside of graphs: 0 a step" in said
    assert "| gate+up | " in said
    report = json.loads(file.read_text())
    assert report["profile"]["wall"] == pytest.approx(2 + 2 * 52 + 13, rel=0.01)
    assert report["options"]["shape"] == "tiny"


def test_a_profile_without_a_gpu_leaves_what_there_is(modules, tmp_path, monkeypatch, capsys):
    decode_profile, kernel_trace = modules
    empty = kernel_trace.Trace([], [], seen=["/host:CPU python (1)"])
    monkeypatch.setattr(decode_profile.kernel_trace, "trace", lambda call, calls: empty)
    file = tmp_path / "profile.json"
    options = decode_profile.Options(shape="tiny", context=32, json=file)
    decode_profile.show(options, decode_profile.measure(options))
    said = capsys.readouterr()
    assert said.out.startswith("step: ")
    assert "it has no GPU plane" in said.err
    assert json.loads(file.read_text())["profile"] is None


def test_what_cannot_be_profiled_is_said(decode_profile, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert decode_profile.main(decode_profile.Options(shape="huge")) == 2
    assert "shape is 'huge'" in capsys.readouterr().err
    assert decode_profile.main(decode_profile.Options(chunks=-20)) == 2
    if jax.default_backend() != "gpu":
        assert decode_profile.main(decode_profile.Options(shape="tiny")) == 1
        assert "profiles an NVIDIA GPU, and JAX sees none" in capsys.readouterr().err
