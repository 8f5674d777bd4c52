"""`esparse bench`: what is shown and written, and its exit status."""

import json

import jax
import pytest
from tiny import tiny_checkpoint

from esparse_jax.command import cli
from esparse_jax.inference import bench
from esparse_jax.inference.bench import BenchResult

SMALL = ("--shape", "tiny", "--context", 20, "--new-tokens", 1, "--repeats", 1)


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *map(str, arguments)])
    return stopped.value.code


def test_a_shape_is_measured_dense_and_sparse(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert run("decode", *SMALL, "--layers", 1, "--batch", 2, "--json", file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "decode of tiny, 1 layers: batch 2, context 20, 16 steps"
    assert lines[1] == bench.HEADER
    dense, sparse = (line.split() for line in lines[2:4])
    assert (dense[0], dense[3], sparse[0]) == ("dense", "1.00", "sparse")
    if jax.default_backend() == "cpu":
        assert (dense[5], dense[6], dense[8]) == ("-", "-", "-")
        assert any("are empty on the CPU" in line for line in lines[4:])
    written = json.loads(file.read_text())
    assert [row["form"] for row in written["results"]] == ["dense", "sparse"]
    assert all(row["error"] is None for row in written["results"])
    steps = [row["step"] for row in written["results"]]
    assert float(sparse[3]) == pytest.approx(steps[0] / steps[1], abs=0.006)
    assert written["logits_apart"]["sparse to dense"] < 1e-5
    assert written["options"]["layers"] == 1


@pytest.fixture
def scripted(monkeypatch):
    """Forms that were asked for; dense fails, others take a millisecond more each."""
    asked = []

    def child(options, form):
        asked.append((options, form))
        if form == "dense":
            return BenchResult(form, error="out of memory")
        return BenchResult(form, step=1e-3 * len(asked), first_token=1.0, notes=(f"slow {form}",))

    monkeypatch.setattr(bench, "_in_child", child)
    monkeypatch.setattr(bench, "find_spec", lambda name: name)  # torch, here or not
    return asked


def test_a_form_that_fails_is_shown_and_is_the_exit_status(scripted, capsys, tmp_path):
    file = tmp_path / "bench.json"
    status = run(
        "decode", *SMALL, "--forms", "dense", "plain", "sparse", "--torch", "--dtype", "bfloat16",
        "--shuffle", "free", "--json", file,
    )  # fmt: skip
    assert status == 1
    assert [form for _, form in scripted] == ["dense", "plain", "sparse", "torch"]
    options = scripted[0][0]
    assert (options.dtype, options.shuffle, options.repeats) == ("bfloat16", "free", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "dense   failed: out of memory"
    ratios = [line.split()[3] for line in lines[3:6]]
    assert ratios == ["1.00", "0.67", "0.50"]  # to the first that there is
    assert "sparse: slow sparse" in lines
    assert json.loads(file.read_text())["results"][0]["error"] == "out of memory"


def test_each_form_is_measured_once(scripted):
    assert run("prefill", *SMALL, "--forms", "torch", "sparse", "--torch") == 0
    assert [(options.stage, form) for options, form in scripted] == [
        ("prefill", "torch"),
        ("prefill", "sparse"),
    ]


def test_what_cannot_be_measured_ends_in_one_line(scripted, capsys, tmp_path):
    directory = tmp_path / "model"
    tiny_checkpoint(directory)
    for arguments, message in (
        (("decode",), "bench what? Give a MODEL directory"),
        (("decode", directory, "--shape", "tiny"), "bench what?"),
        (("decode", tmp_path / "none"), "There is no directory"),
        (("decode", directory, "--context", 8, "--new-tokens", 1), "esparse compress"),
        (
            ("prefill", directory, "--forms", "plain", "--context", 1024),
            "1024 tokens of context take 1024 positions",
        ),
        (("decode", "--shape", "tiny", "--layers", 5), "layers is 5; tiny has 2"),
        (("decode", "--shape", "tiny", "--batch", -1), "batch is -1; it must be at least 1"),
    ):
        assert run(*arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
    assert scripted == []
    assert run("train", "--shape", "tiny") == 2
    assert run("decode", "--shape", "llama-9b") == 2


def test_the_context_is_what_there_is_room_for_unless_it_is_given(scripted, tmp_path):
    tiny_checkpoint(tmp_path / "model")
    assert run("prefill", tmp_path / "model", "--forms", "plain") == 0
    assert run("prefill", tmp_path / "model", "--forms", "plain", "--context", 9) == 0
    assert [options.context for options, _ in scripted] == [128, 9]


@pytest.mark.parametrize("asked", [("--torch",), ("--forms", "sparse", "torch")])
def test_torch_that_is_missing_is_said_in_one_line(scripted, monkeypatch, capsys, asked):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert run("decode", *SMALL, *asked) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("esparse: The form torch needs torch, which is not installed")
    assert 'pip install "esparse-jax[bench]"' in shown.err
    assert len(shown.err.splitlines()) == 1
    assert scripted == []


def test_every_shape_can_be_asked_for(scripted):
    for shape in bench.SHAPES:
        assert run("decode", "--shape", shape, "--forms", "sparse") == 0
    assert [options.shape for options, _ in scripted] == list(bench.SHAPES)
