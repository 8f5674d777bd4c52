import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_checkpoint

from esparse_jax.command import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tiny_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module")
def pruned(checkpoint, text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pruned")
    code = run(
        "prune", checkpoint, "--output", directory / "out", "--calibration", text,
        "--num-samples", 4, "--sequence-length", 16, "--shuffle", "global", "--alpha", 2.5,
        "--json", directory / "prune.json",
    )  # fmt: skip
    assert code == 0
    return directory


def test_prune_writes_a_checkpoint_that_verifies(pruned, checkpoint, capsys):
    records = json.loads((pruned / "prune.json").read_text())
    assert records["pattern"] == "2:4"
    assert records["options"]["alpha"] == 2.5
    assert records["options"]["shuffle"] == "global"
    assert len(records["layers"]) == 14
    said = json.loads((pruned / "out" / "esparse.json").read_text())
    assert said["options"] == records["options"]
    assert run("verify", pruned / "out", "--json", pruned / "verify.json") == 0
    assert json.loads((pruned / "verify.json").read_text())["ok"] is True
    source = load_file(checkpoint / "model.safetensors")
    for name, written in load_file(pruned / "out" / "model.safetensors").items():
        kept = written != 0
        assert written.dtype == source[name].dtype
        assert (written[kept] == source[name][kept]).all(), name
    capsys.readouterr()
    assert run("verify", pruned / "out", "--pattern", "1:4") == 1
    assert "model.layers.0" in capsys.readouterr().out


def test_prune_selects_by_the_error_inside_heads_and_slices(checkpoint, text, tmp_path, capsys):
    code = run(
        "prune", checkpoint, "--output", tmp_path / "out", "--calibration", text,
        "--num-samples", 4, "--sequence-length", 16, "--select", "error",
        "--candidates", "global", "none", "--heads", "within", "--slices", 2,
        "--deal", "sorted", "--scores", "float32", "--escape", 1,
        "--json", tmp_path / "prune.json",
    )  # fmt: skip
    assert code == 0
    said = " ".join(capsys.readouterr().out.split())
    records = json.loads((tmp_path / "prune.json").read_text())
    assert f"output error {100 * records['output_error']:.2f} %" in said
    assert "shuffle of least error" in said
    options = records["options"]
    assert options["select"] == "error"
    assert options["candidates"] == ["global", "none"]
    assert (options["heads"], options["slices"], options["escape"]) == ("within", 2, 1)
    assert (options["deal"], options["scores"]) == ("sorted", "float32")
    for record in records["layers"].values():
        assert record["shuffle"] in ("none", "global")
        assert 0 < record["output_error"] < 1
        assert 0 < record["natural_output_error"] < 1
    assert run("verify", tmp_path / "out") == 0
    orders = load_file(tmp_path / "out" / "esparse_permutations.safetensors")
    order = orders["model.layers.0.self_attn.o_proj.permutation"]
    np.testing.assert_array_equal(order // 8, np.repeat(np.arange(4), 8))
    order = orders["model.layers.1.mlp.down_proj.permutation"]
    np.testing.assert_array_equal(order // 32, np.repeat([0, 1], 32))


def test_prune_measures_the_error_where_asked(pruned, checkpoint, text, tmp_path):
    records = json.loads((pruned / "prune.json").read_text())
    assert records["output_error"] is None
    assert {record["output_error"] for record in records["layers"].values()} == {None}
    code = run(
        "prune", checkpoint, "--output", tmp_path / "out", "--calibration", text,
        "--num-samples", 4, "--sequence-length", 16, "--shuffle", "global", "--alpha", 2.5,
        "--measure-error", "--json", tmp_path / "prune.json",
    )  # fmt: skip
    assert code == 0
    measured = json.loads((tmp_path / "prune.json").read_text())
    assert measured["kept_share"] == records["kept_share"]
    assert all(record["output_error"] > 0 for record in measured["layers"].values())


def test_verify_names_the_one_weight_that_was_put_back(pruned, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (pruned / "out").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = tensors[name]
    column = int(np.flatnonzero(weight[3] == 0)[0])
    weight[3, column] = 0.5
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert run("verify", broken, "--json", tmp_path / "verify.json") == 1
    violations = json.loads((tmp_path / "verify.json").read_text())["violations"]
    assert [(v["layer"], v["row"]) for v in violations] == [(name.removesuffix(".weight"), 3)]
    assert column in violations[0]["channels"]
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out
    assert f"group {violations[0]['group']}" in out


def test_eval_and_generate(pruned, text, tmp_path, capsys):
    arguments = ("--text", text, "--sequence-length", 16, "--json", tmp_path / "eval.json")
    assert run("eval", pruned / "out", *arguments) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert 1 < result["perplexity"] < 1e4
    assert result["tokens"] % 15 == 0
    assert result["seconds"] > 0
    options = ("--prompt", "the quick", "--max-new-tokens", 5, "--json", tmp_path / "text.json")
    assert run("generate", pruned / "out", *options) == 0
    assert json.loads((tmp_path / "text.json").read_text())["tokens"] <= 5
    assert "the quick" in capsys.readouterr().out


def test_mistakes_end_in_one_line_and_status_2(checkpoint, text, tmp_path, capsys):
    output = tmp_path / "out"
    common = ("--output", output, "--calibration", text, "--sequence-length", 16)
    assert run("prune", tmp_path / "absent", *common) == 2
    assert run("prune", checkpoint, *common, "--pattern", "four") == 2
    assert run("prune", checkpoint, *common, "--alpha", -1) == 2
    assert run("prune", checkpoint, *common[:-1], 10**6) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith("esparse: ") for line in errors] == [True] * 4
    assert "There is no directory" in errors[0]
    assert "'four'" in errors[1]
    assert "alpha" in errors[2]
    assert "fewer than one window of 1000000" in errors[3]
    assert not output.exists()
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert run("prune", checkpoint, *common) == 2
    assert "overwrite" in capsys.readouterr().err
    assert [file.name for file in output.iterdir()] == ["notes.txt"]


def test_an_unknown_choice_is_refused_with_the_allowed_ones(checkpoint, text, tmp_path, capsys):
    code = run(
        "prune", checkpoint, "--output", tmp_path / "out", "--calibration", text,
        "--shuffle", "random",
    )  # fmt: skip
    assert code == 2
    assert "strided" in capsys.readouterr().err
