"""`esparse tune`, with a child process that answers as a script says."""

import functools
import json
import sys

import fake_cusparselt
import pytest

from esparse_jax.command import cli
from esparse_jax.command.tuning import asked_for, parse_shape, record_lines, wanted
from esparse_jax.models import PUBLISHED_SHAPES
from esparse_jax.sparse import (
    Algorithm,
    Limits,
    Machine,
    Record,
    TuningTable,
    load_table,
    table_file,
    tune_shape,
)
from esparse_jax.sparse.table import KernelTime, LibraryTime

MACHINE = Machine("Abacus 9", "9.0", "0.8.0")
SCRIPT = {
    "facts": {**MACHINE._asdict(), "jax": "0.11.2", "decode": False, "algorithms": 2, "split_k": 1},
    "answers": {"dense": 30.0, "cusparselt, id 1": 12.5, "cusparselt, id 0": {"wrong": 9.0}},
    "default": 20.0,
}


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """The folder of a scripted child, which `esparse tune` starts."""
    folder = tmp_path / "worker"
    folder.mkdir()
    (folder / "script.json").write_text(json.dumps(SCRIPT))
    command = (sys.executable, "-m", "fake_tune_worker", str(folder))
    monkeypatch.setattr(cli, "tune_shape", functools.partial(tune_shape, worker=command))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *map(str, arguments)])
    return stopped.value.code


def starts(folder) -> list[dict]:
    lines = map(json.loads, (folder / "asked.jsonl").read_text().splitlines())
    return [line["job"] for line in lines if "job" in line]


def test_shapes_are_measured_shown_and_kept(worker, tmp_path, capsys):
    file = tmp_path / "out" / "table.json"
    arguments = ("--shape", "512x256", "128x64", "512x256", "--rows", 64, 128, "--output", file)
    assert run(*arguments) == 0
    table = load_table(file)
    assert table.machine == MACHINE
    assert [(r.out, r.channels, r.rows) for r in table.records] == [
        (128, 64, 64), (128, 64, 128), (512, 256, 64), (512, 256, 128),
    ]  # fmt: skip
    assert {r.dtype for r in table.records} == {"float16"}
    assert [(job["out"], job["rows"]) for job in starts(worker)] == [
        (512, [64, 128]), (512, [64, 128]), (128, [64, 128]), (128, [64, 128]),
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["out", "x", "channels"]
    assert lines[1].split() == ["128x64", "64", "30.00", "-", "-", "-", "12.50", "1", "2.40"]
    assert "left out: 512x256: cusparselt, id 0: with 64 rows: wrong numbers, 9 times too far" in (
        lines
    )
    assert lines[-1] == (
        "float16 on Abacus 9 (9.0) with cuSPARSELt 0.8.0, microseconds a product; * by a plan of "
        f"its own; prefetch: the decode kernel that fetches its weight early. Kept in {file}."
    )
    # What is there is not measured again, unless that is asked for.
    before = len(starts(worker))
    assert run(*arguments) == 0
    assert len(starts(worker)) == before + 1  # that says what the machine is
    assert capsys.readouterr().out.splitlines() == lines
    assert run(*arguments, "--again") == 0
    assert len(starts(worker)) == before + 5


def test_the_users_own_table_is_written_without_an_output(worker):
    assert run("--shape", "512x256", "--rows", 64, "--dtype", "bfloat16") == 0
    assert run("--shape", "512x256", "--rows", 128, "--dtype", "bfloat16") == 0
    records = load_table(table_file(MACHINE)).records
    assert [(r.dtype, r.rows) for r in records] == [("bfloat16", 64), ("bfloat16", 128)]


def test_a_shape_is_kept_before_the_next_one_is_measured(worker, tmp_path, monkeypatch, capsys):
    file = tmp_path / "table.json"
    (worker / "script.json").write_text(
        json.dumps(SCRIPT | {"facts": SCRIPT["facts"] | {"algorithms": 0}})
    )
    measured = cli.tune_shape

    def breaks(shape, **options):
        if shape == (128, 64):
            raise RuntimeError("the GPU fell off the bus")
        return measured(shape, **options)

    monkeypatch.setattr(cli, "tune_shape", breaks)
    assert run("--shape", "512x256", "128x64", "--rows", 64, "--output", file) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "esparse: the GPU fell off the bus"
    assert [record.out for record in load_table(file).records] == [512]


def test_a_machine_without_a_gpu_ends_in_one_line(worker, capsys):
    (worker / "script.json").write_text(json.dumps({"facts": {"error": "JAX sees none"}}))
    assert run("--shape", "512x256") == 2
    assert capsys.readouterr().err == "esparse: nothing can be timed here: JAX sees none\n"


def test_an_output_that_is_no_file_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert run("--shape", "64x64", "--output", tmp_path) == 2
    assert f"--output {tmp_path} is a directory. Name a file." in capsys.readouterr().err


def test_a_file_of_another_machine_is_not_touched(worker, tmp_path, capsys):
    file = tmp_path / "table.json"
    assert run("--shape", "512x256", "--rows", 64, "--output", file) == 0
    before = file.read_bytes()
    facts = SCRIPT["facts"] | {"device": "Abacus 10"}
    (worker / "script.json").write_text(json.dumps(SCRIPT | {"facts": facts}))
    assert run("--shape", "512x256", "--rows", 128, "--output", file) == 2
    assert f"{file} is the table of Abacus 9" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_the_limit_of_a_candidate_is_handed_on(monkeypatch, capsys):
    asked = {}

    def tuned(shape, **options):
        asked.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr(cli, "tune_shape", tuned)
    assert run("--shape", "512x256", "--seconds", 3, "--rows", 1, 16) == 2
    assert asked["limits"] == Limits(candidate=3.0)
    assert asked["rows"] == (1, 16)


def test_the_command_itself_touches_no_device(worker):
    """What it held of a GPU, the child that measures would lack."""
    program = f"""
        import functools, sys
        from jax._src import xla_bridge
        from esparse_jax.command import cli
        command = (sys.executable, "-m", "fake_tune_worker", {str(worker)!r})
        cli.tune_shape = functools.partial(cli.tune_shape, worker=command)
        try:
            cli.main(["tune", "--shape", "512x256", "--rows", "64"])
        except SystemExit as stopped:
            print(stopped.code, xla_bridge.backends_are_initialized())
    """
    assert fake_cusparselt.run(program).splitlines()[-1] == "0 False"


# ---- what is asked for


def test_models_and_shapes_are_put_together(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 100,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "dtype": "bfloat16",
            }
        )
    )
    model = tmp_path / "tiny"
    shapes, dtype = wanted(model, ("64x64", "256x256"), ("llama-7b",), False, "auto")
    assert dtype == "bfloat16"
    fused = [(512, 256), (1024, 256), (256, 512)]  # the output projection is 256x256
    assert shapes == [(64, 64), (256, 256), *PUBLISHED_SHAPES["llama-7b"].values(), *fused]
    shapes, dtype = wanted(model, (), (), True, "float16")
    assert dtype == "float16"
    assert set(shapes) == {*fused, (256, 256), (128, 256)}  # gate and up are as large as q, k, v
    assert wanted(None, ("64x64",), (), False, "auto") == ([(64, 64)], "float16")
    assert len(wanted(None, (), tuple(PUBLISHED_SHAPES), False, "auto")[0]) == 19  # one twice


@pytest.mark.parametrize("text", ["4096", "4096x", "x4096", "4096x4096x2", "axb", "-1x64", ""])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"a shape is OUTxCHANNEL, .* got "):
        parse_shape(text)


def test_what_cannot_be_tuned_is_named(tmp_path):
    assert parse_shape("4096X64") == (4096, 64)
    with pytest.raises(ValueError, match=r"tune what\? Give a MODEL .*table-5, llama-7b"):
        wanted(None, (), (), False, "auto")
    with pytest.raises(ValueError, match=r"not tuned.*100x64: its shape \(100, 64\) is not made"):
        wanted(None, ("64x64", "100x64"), (), False, "auto")
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        wanted(tmp_path / "absent", (), (), False, "auto")


def test_lines_show_what_there_is():
    records = (
        Record(64, 128, "float16", 1, 10.0, KernelTime(4.0, {"tiles": 1}, prefetch=3.5)),
        Record(64, 128, "float16", 8, None, KernelTime(4.0)),
        Record(64, 128, "float16", 16, 10.0, None, LibraryTime(8.0, Algorithm(7, split_k=-1))),
        Record(64, 128, "float16", 32, 10.0, prefill=KernelTime(5.0, {"rows": 128})),
        Record(64, 128, "bfloat16", 16, 10.0),
        Record(64, 64, "float16", 16, 10.0),
    )
    table = TuningTable(MACHINE, "1", records)
    asked = asked_for(table, [(64, 128)], "float16", (1, 8, 16, 32))
    assert asked == list(records[:4])
    assert asked_for(None, [(64, 128)], "float16", (1,)) == record_lines([]) == []
    lines = [line.split() for line in record_lines(asked)]
    assert lines[1:] == [
        ["64x128", "1", "10.00", "4.00*", "3.50", "-", "-", "2.50"],
        ["64x128", "8", "-", "4.00", "-", "-", "-", "-"],
        ["64x128", "16", "10.00", "-", "-", "-", "8.00", "7,", "split_k", "-1", "1.25"],
        ["64x128", "32", "10.00", "-", "-", "5.00*", "-", "2.00"],
    ]
