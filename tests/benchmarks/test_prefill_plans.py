"""benchmarks/prefill_plans.py, as far as it goes without a GPU."""

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from esparse_jax.sparse.tune import prefill_plans


@pytest.fixture
def module():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("prefill_plans")
    sys.path.remove(folder)


def test_every_plan_is_timed_and_the_rule_is_told_from_the_best(
    module, monkeypatch, tmp_path, capsys
):
    def time(*, plan, rows, copies, launches, **rest):
        assert launches == max(10, copies)
        return 10.0 if plan[4] == 2 else 20.0  # where the channels are split by two

    monkeypatch.setattr(module, "this_machine", lambda: SimpleNamespace(capability="9.0"))
    monkeypatch.setattr(module, "ROTATED_BYTES", 1)
    monkeypatch.setattr(module._ffi_cuda, "prefill_runs", lambda capability: capability == "9.0")
    monkeypatch.setattr(module._ffi_cuda, "_extension", lambda: SimpleNamespace(prefill_time=time))
    file = tmp_path / "plans.csv"
    module.main(module.Options(shapes=("128x64",), rows=(40, 100), csv=file))
    with file.open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert len(lines) == sum(1 + len(prefill_plans(rows)) for rows in (40, 100))
    assert lines[0] == {
        "out": "128", "channels": "64", "rows_of_x": "40", "rows": "", "outputs": "", "cluster": "",
        "group": "", "split": "", "tail": "", "microseconds": "20.0",
    }  # fmt: skip
    text = capsys.readouterr().out
    assert (
        "128x64    40 rows: rule    20.00, best    10.00 [rows 64, outputs 128, cluster 1, split 2]"
        in text
    )
    assert "geometric mean: 2.0000, at most 2.000" in text


def test_without_a_gpu_it_says_so(module, monkeypatch):
    monkeypatch.setattr(module, "this_machine", lambda: None)
    with pytest.raises(SystemExit, match=r"compute capability 9\.0"):
        module.main(module.Options())
