"""Table 6, with a tiny shape on the CPU and with what a GPU would say."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest

from esparse_jax.inference.bench import SHAPES, BenchResult
from esparse_jax.models import model_bytes


@pytest.fixture(scope="module")
def memory():
    file = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_memory", file)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_tiny_shape_is_measured_and_the_large_ones_computed(memory, tmp_path, capsys):
    file = tmp_path / "memory.json"
    options = memory.Options(
        measure=("tiny",), fit=("llama-65b",), batch=8, context=32, new_tokens=1, json=file
    )
    assert memory.main(options) == 0
    report = json.loads(file.read_text())
    dense, sparse = report["measured"]
    assert (dense["form"], sparse["form"]) == ("dense", "sparse")
    assert dense["linear_share"] == 1
    assert sparse["linear_share"] == 0.53125  # float32
    config = SHAPES["tiny"]
    assert dense["linear_bytes"] == model_bytes(config, sparse=False, width=4).linear
    assert dense["dtype"] == "float32"
    said = capsys.readouterr().out
    assert "Measured: 8 rows of 32 tokens read, 16 generated" in said
    assert "Computed from the shapes, 16 bits" in said
    assert f"float32 on {dense['device']}" in said


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="is for a machine without a GPU")
def test_without_a_gpu_nothing_large_is_measured_unless_asked_for(memory, tmp_path, capsys):
    file = tmp_path / "memory.json"
    assert memory.main(memory.Options(fit=("llama-65b",), json=file)) == 0
    report = json.loads(file.read_text())
    assert report["measured"] == []
    assert len(report["computed"]) == 2
    assert "nothing: this is a CPU" in capsys.readouterr().out


def test_where_nothing_runs_no_large_shape_is_tried(memory, monkeypatch, capsys):
    asked = []

    def fails(options, forms):
        asked.append(options.shape)
        return [BenchResult("dense", error="the process died (SIGKILL)")]

    monkeypatch.setattr(memory, "run_bench", fails)
    assert memory.main(memory.Options(fit=("llama-65b",))) == 1
    assert asked == ["tiny"]
    assert "not even tiny runs here, so no 7B is tried: the process died" in capsys.readouterr().out


def computed(memory, **options) -> dict[tuple[str, str], dict]:
    rows = memory.computed_rows(memory.Options(**options))
    return {(row["shape"], row["form"]): row for row in rows}


def test_65b_with_its_cache_fits_one_large_device_when_it_is_sparse(memory):
    rows = computed(memory, device_gb=(141.0,), batch=8, context=2048)
    dense, sparse = (rows["llama-65b", form] for form in memory.FORMS)
    assert dense["cache"] == sparse["cache"] == 2 * 80 * 8 * 2048 * 8192 * 2
    assert sparse["linear"] == 0.5625 * dense["linear"]
    assert dense["devices"] == [{"gb": 141.0, "fits": False, "rows": 0}]
    assert sparse["devices"] == [{"gb": 141.0, "fits": True, "rows": 11}]
    assert "llama-65b   sparse" in memory.computed_line(sparse)
    assert memory.computed_line(sparse).endswith("fits, 11 rows")
    assert memory.computed_line(dense).endswith("no, 0 rows")


def test_so_many_rows_fit_and_not_one_more(memory):
    (row,) = (
        row for key, row in computed(memory, fit=("llama-30b",)).items() if key[1] == "sparse"
    )
    for device in row["devices"]:
        rows = device["rows"]
        for batch, fits in ((rows, True), (rows + 1, False)):
            again = computed(memory, fit=("llama-30b",), batch=batch, device_gb=(device["gb"],))
            assert again["llama-30b", "sparse"]["devices"][0]["fits"] is fits


@pytest.fixture
def device(memory, monkeypatch):
    """A device that says what it holds; the sparse form of 13B does not fit."""

    def measured(options, forms):
        (form,) = forms
        if (options.shape, form) == ("llama-13b", "sparse"):
            return [BenchResult(form, error="RESOURCE_EXHAUSTED", notes=("slow",))]
        scale = 1 if form == "dense" else 0.6
        return [
            BenchResult(
                form,
                device="GPU",
                dtype="float16",
                versions="jax 9",
                linear_bytes=int(13e9 * scale),
                model_bytes=int(14e9 * scale),
                resident_bytes=int(14.5e9 * scale),
                made_peak_bytes=int(15e9 * scale),
                peak_bytes=int(15e9 * scale if form == "sparse" else 20e9),
            )
        ]

    monkeypatch.setattr(memory, "run_bench", measured)


def test_savings_and_whose_peak_it_is(memory, device, tmp_path, capsys):
    file = tmp_path / "memory.json"
    assert memory.main(memory.Options(fit=(), json=file)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == [
        "llama-7b",
        "dense",
        "13.0000",
        "1.0000",
        "14.00",
        "0.0%",
        "20.00",
        "0.0%",
    ]
    assert lines[3].split() == [
        "llama-7b",
        "sparse",
        "7.8000",
        "0.6000",
        "8.40",
        "40.0%",
        "9.00*",
        "55.0%",
    ]
    assert lines[5] == "llama-13b   sparse  failed: RESOURCE_EXHAUSTED"
    assert lines[6] == "llama-13b sparse: slow"
    assert lines[7] == "float16 on GPU, jax 9"
    rows = json.loads(file.read_text())["measured"]
    assert [row["peak_is_of_making"] for row in rows] == [False, True, False, False]
    assert rows[1]["model_saved"] == pytest.approx(0.4)
    assert rows[1]["allocated_bytes"] == 8_700_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": ("llama-9b",)}, "shapes are llama-7b, .*; got llama-9b"),
        ({"fit": ("table-5",)}, "got table-5"),
        ({"reserve": 1.0}, r"reserve is 1.0; it must be in \[0, 1\)"),
        ({"device_gb": (0.0,)}, "each must be greater than 0"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(memory, options, message, capsys):
    with pytest.raises(ValueError, match=message):
        memory.Options(**options).check()
    assert memory.main(memory.Options(**options)) == 2
    assert capsys.readouterr().err.startswith("memory.py: ")
