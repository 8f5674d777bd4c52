"""The clock beside the steps, with an NVML of the test's."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest


@pytest.fixture
def power(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("power")


@pytest.fixture
def nvml(monkeypatch):
    """A card whose clock falls by 10 MHz at every look, held back by its power limit at 1900."""
    module = types.ModuleType("pynvml")
    module.NVML_CLOCK_SM, module.opened, module.clock = 1, 0, 2000
    module.NVMLError = type("NVMLError", (Exception,), {})

    def opened(change):
        module.opened += change

    def clock(handle, kind):
        assert (handle, kind) == (("gpu", 0), 1)
        module.clock -= 10
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


def test_what_held_the_clock_back_is_named_once(power):
    samples = [power.Sample(0.0, 1980, 600.0, 0x1), power.Sample(0.01, 1410, 700.0, 0x4 | 0x20)]
    found = power.summary([*samples, power.Sample(0.02, 1500, 701.0, 0x4)])
    assert found == {
        "clock": 1630,
        "least_clock": 1410,
        "most_clock": 1980,
        "watts": 667,
        "held_back_by": ["power limit", "temperature, by the driver"],
    }


def test_a_time_between_two_looks_has_the_nearest(power, nvml):
    sampler = power.Sampler(nvml, 0)
    sampler._samples = [power.Sample(float(at), 1000 + at, 1.0, 0) for at in range(4)]
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
