"""The clock beside the steps, with an NVML of the test's."""

import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from esparse_jax.sparse import Algorithm, Machine, Record, TuningTable
from esparse_jax.sparse.table import LibraryTime


@pytest.fixture
def benchmark_of(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def power(benchmark_of):
    return benchmark_of("power")


@pytest.fixture
def gpu_clock(benchmark_of):
    return benchmark_of("gpu_clock")


@pytest.fixture
def products(benchmark_of):
    return benchmark_of("product_power")


@pytest.fixture
def nvml(monkeypatch):
    """A card whose clock falls by 10 MHz at every look, as far as 1000, held back from 1900 on."""
    module = types.ModuleType("pynvml")
    module.NVML_CLOCK_SM, module.opened, module.clock = 1, 0, 2000
    module.NVMLError = type("NVMLError", (Exception,), {})

    def opened(change):
        module.opened += change

    def clock(handle, kind):
        assert (handle, kind) == (("gpu", 0), 1)
        module.clock = max(module.clock - 10, 1000)  # however long a slow machine looks
        return module.clock

    module.nvmlInit, module.nvmlShutdown = lambda: opened(1), lambda: opened(-1)
    module.nvmlDeviceGetHandleByIndex = lambda index: ("gpu", index)
    module.nvmlDeviceGetClockInfo = clock
    module.nvmlDeviceGetPowerUsage = lambda handle: 650_000
    module.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: (
        0x4 if module.clock <= 1900 else 0x1
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_every_repeat_has_its_clock(power, nvml, tmp_path, capsys):
    file = tmp_path / "power.json"
    options = power.Options(shape="tiny", batch=2, context=8, new_tokens=32, repeats=3, json=file)
    power.main(options)
    assert nvml.opened == 0
    report = json.loads(file.read_text())
    assert set(report["results"]) == {"sparse", "dense"}
    for repeats in report["results"].values():
        assert len(repeats) == 3
        for repeat in repeats:
            assert len(repeat["chunks"]) == 2
            assert repeat["step"] == pytest.approx(sum(repeat["chunks"]) / 2)
            assert repeat["least_clock"] <= repeat["clock"] <= repeat["most_clock"] < 2000
            assert repeat["watts"] == 650
    lines = capsys.readouterr().out.splitlines()
    assert sum("held back by power limit" in line for line in lines) >= 3  # at the latest: dense
    assert lines[-1].startswith("dense: ")


def test_what_held_the_clock_back_is_named_once(gpu_clock):
    sample = gpu_clock.Sample
    samples = [sample(0.0, 1980, 600.0, 0x1), sample(0.01, 1410, 700.0, 0x4 | 0x20)]
    found = gpu_clock.summary([*samples, sample(0.02, 1500, 701.0, 0x4)])
    assert found == {
        "clock": 1630,
        "least_clock": 1410,
        "most_clock": 1980,
        "watts": 667,
        "held_back_by": ["power limit", "temperature, by the driver"],
    }


def test_a_time_between_two_looks_has_the_nearest(gpu_clock, nvml):
    sampler = gpu_clock.Sampler(nvml, 0)
    sampler._samples = [gpu_clock.Sample(float(at), 1000 + at, 1.0, 0) for at in range(4)]
    assert [each.clock for each in sampler.between(0.5, 2.5)] == [1001, 1002]
    assert [each.clock for each in sampler.between(2.6, 2.9)] == [1003]


def test_what_cannot_be_measured_is_said_in_a_line(power, nvml):
    with pytest.raises(SystemExit, match="batch is 0; it must be at least 1"):
        power.main(power.Options(batch=0))

    def missing():
        raise nvml.NVMLError("NVML Shared Library Not Found")

    nvml.nvmlInit = missing
    with pytest.raises(SystemExit, match="an NVIDIA GPU, number 0 of NVML's: NVML Shared Library"):
        power.main(power.Options(shape="tiny"))


def test_without_nvml_it_says_what_to_install(power, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SystemExit, match="pip install nvidia-ml-py"):
        power.main(power.Options())


# ---- of products


def test_a_product_has_its_clock(products, nvml, monkeypatch, tmp_path, capsys):
    file = tmp_path / "products.json"
    ways = ("dense", "decode", "cusparselt", "dispatch")
    options = products.Options(
        shape="64x128", rows=40, dtype="float16", ways=ways, seconds=0.01, json=file
    )
    monkeypatch.setattr(products, "multiprocessors", lambda device: 6)
    products.main(options)
    assert nvml.opened == 0
    report = json.loads(file.read_text())
    assert list(report["results"]) == ["dense", "dispatch"]  # a processor has no others
    for found in report["results"].values():
        assert found["least_clock"] <= found["clock"] <= found["most_clock"] < 2000
        stages = 40 * 64 * 128 / (128 * 256 * 64) / 6
        assert found["cycles"] == pytest.approx(found["microseconds"] * found["clock"] / stages)
    assert report["results"]["dense"]["ratio"] == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("dense ")
    assert "times as fast as the first, clock" in second


def test_zeros_are_multiplied(products, nvml, monkeypatch):
    seen = []

    def chain(product, xs, weights, **options):
        seen.extend([xs[0], *jax.tree.leaves(weights)])
        raise RuntimeError("seen")

    monkeypatch.setattr(products, "Chain", chain)
    options = products.Options(shape="64x64", rows=20, dtype="float16", ways=("dense",), zeros=True)
    with pytest.raises(RuntimeError, match="seen"):
        products.main(options)
    assert nvml.opened == 0
    assert all((array == 0).all() for array in seen)


def test_ways_are_there_where_they_apply(products, monkeypatch):
    monkeypatch.setattr(products, "this_machine", lambda: Machine("NVIDIA X", "9.0", "0.8.0"))
    monkeypatch.setattr(products.ffi, "prefill_runs", lambda capability: capability == "9.0")
    monkeypatch.setattr(products.ffi, "decode_available", lambda: True)
    best = LibraryTime(5.0, Algorithm(6, workspace_bytes=100))
    record = Record(4096, 11008, "float16", 4096, 9.0, cusparselt=best)
    table = TuningTable(products.this_machine(), "1", (record,))
    monkeypatch.setattr(products, "stored_table", lambda machine: SimpleNamespace(table=table))
    many = ["dense", "prefill", "cusparselt", "rows=64,split=2"]
    for rows, expected in ((16, [many[0], "decode", *many[1:]]), (17, many)):
        options = products.Options(rows=rows, plans=("rows=64,split=2",))
        assert list(products.products(options, (4096, 11008))) == expected
    options = products.Options(rows=3000, ways=("cusparselt",))
    (library,) = products.products(options, (4096, 11008)).values()
    assert library.keywords["algorithm"] == Algorithm(6)  # without the workspace of 4,096 rows
    options = products.Options(rows=3000, ways=("dense",), plans=("rows=64",))
    assert list(products.products(options, (64, 64))) == ["dense", "rows=64"]
    assert products.read_plan("rows=64,split=2") == {"rows": 64, "split": 2}


@pytest.mark.parametrize("text", ["rows=65", "rows", "rows=64,tiles=2"])
def test_what_is_no_plan_is_refused(products, text):
    with pytest.raises(SystemExit, match=f"--plans {text}: FIELD=NUMBER"):
        products.read_plan(text)


def test_plans_are_refused_where_their_kernel_is_not(products):
    options = products.Options(rows=40, ways=("dense",), plans=("rows=64",))
    with pytest.raises(SystemExit, match=r"--plans are the prefill kernel's.*9\.0.*name none"):
        products.main(options)


def test_a_machine_without_any_of_them_says_so(products):
    with pytest.raises(SystemExit, match="none of decode, prefill is there for 40 rows"):
        products.main(products.Options(rows=40, ways=("decode", "prefill")))
