import importlib.metadata
import io
import json
import runpy

import jax
import numpy as np
import pytest
from rich.console import Console
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


def test_pruning_again_is_said(pruned, text, tmp_path, capsys):
    code = run(
        "prune", pruned / "out", "--output", tmp_path / "again", "--calibration", text,
        "--num-samples", 4, "--sequence-length", 16, "--shuffle", "none", "--method", "magnitude",
        "--pattern", "1:4",
    )  # fmt: skip
    assert code == 0
    assert f"{pruned / 'out'} was pruned before, to 2:4" in capsys.readouterr().err
    assert run("verify", tmp_path / "again", "--pattern", "1:4") == 0


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


def test_eval_takes_stored_windows_as_they_are(checkpoint, tmp_path, capsys):
    rows = np.arange(480, dtype=np.int32).reshape(20, 24) % 7
    file = tmp_path / "eval.json"
    context = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
    long = rows.reshape(1, -1).repeat(2, axis=0)
    for windows, given, expected in (
        (rows, (), 24),
        (rows, ("--sequence-length", 12), 12),
        (rows, ("--sequence-length", 48), 48),
        (rows.ravel(), (), context),
        (long, (), context),
    ):
        np.save(tmp_path / "windows.npy", windows)
        arguments = ("--text", tmp_path / "windows.npy", "--json", file, *given)
        assert run("eval", checkpoint, *arguments) == 0
        assert json.loads(file.read_text())["sequence_length"] == expected
        said = "holds windows of 24 tokens; those of 48 join pieces of several"
        assert (said in capsys.readouterr().err) == (expected == 48)


@pytest.mark.parametrize("verb", ["prune", "eval", "generate"])
def test_the_help_says_what_dtype_auto_is(verb, capsys):
    assert run(verb, "--help") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "auto: the checkpoint's own on an accelerator, float32 on the CPU." in said


def test_eval_and_generate(pruned, text, tmp_path, capsys):
    arguments = ("--text", text, "--sequence-length", 16, "--json", tmp_path / "eval.json")
    assert run("eval", pruned / "out", *arguments) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert 1 < result["perplexity"] < 1e4
    assert result["tokens"] % 15 == 0
    assert result["seconds"] > 0
    options = ("--prompt", "the quick", "--max-new-tokens", 5, "--json", tmp_path / "text.json")
    assert run("generate", pruned / "out", *options) == 0
    said = json.loads((tmp_path / "text.json").read_text())
    ((prompt, text, tokens),) = (tuple(output.values()) for output in said["outputs"])
    assert (prompt, tokens) == ("the quick", said["tokens"])
    assert tokens <= 5
    assert said["tokens_per_second"] > 0
    shown = capsys.readouterr()
    assert shown.out.endswith(f"the quick{text}\n")
    assert f"{tokens} tokens in " in shown.err
    assert "tokens/s" in shown.err


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


# The compressed format


@pytest.fixture(scope="module")
def compressed(pruned, tmp_path_factory):
    directory = tmp_path_factory.mktemp("compressed") / "out"
    assert run("compress", pruned / "out", "--output", directory) == 0
    return directory


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_prune_writes_what_compress_makes_of_its_hf_output(
    checkpoint, text, compressed, tmp_path, capsys
):
    code = run(
        "prune", checkpoint, "--output", tmp_path / "out", "--calibration", text,
        "--num-samples", 4, "--sequence-length", 16, "--shuffle", "global", "--alpha", 2.5,
        "--format", "compressed",
    )  # fmt: skip
    assert code == 0
    ours, theirs = contents(tmp_path / "out"), contents(compressed)
    assert ours.keys() == theirs.keys()
    records = [json.loads(files.pop("esparse.json")) for files in (ours, theirs)]
    assert ours == theirs
    for record in records:
        assert record["format"] == "compressed"
        del record["seconds"]
        for layer in record["layers"].values():
            del layer["seconds"]
    assert records[0] == records[1]


def test_compress_and_expand(pruned, compressed, tmp_path, capsys):
    arguments = ("--output", tmp_path / "out", "--json", tmp_path / "done.json")
    assert run("expand", compressed, *arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("14 linears expanded, ")
    assert " kB are " in said
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["layers"] == 14
    assert done["source_bytes"] < 0.8 * done["written_bytes"]
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "out", pruned / "out"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == value.tobytes() for name, value in theirs.items())
    assert run("expand", compressed, *arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run("compress", tmp_path / "out", "--output", tmp_path / "out2") == 0
    assert contents(tmp_path / "out2") == contents(compressed)
    assert capsys.readouterr().out.startswith("14 linears compressed, ")


def test_a_minus_zero_without_a_place_is_mentioned(pruned, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in contents(pruned / "out").items():
        (copy / name).write_bytes(data)
    tensors = load_file(copy / "model.safetensors")
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    weight[weight == 0] = -0.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert run("compress", copy, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f" {weight.size // 2} weights that were -0.0 are +0.0 now: their groups" in said


def test_eval_and_generate_run_on_it(pruned, compressed, text, tmp_path, capsys):
    results = []
    for directory in (pruned / "out", compressed):
        arguments = ("--text", text, "--sequence-length", 16, "--json", tmp_path / "eval.json")
        assert run("eval", directory, *arguments) == 0
        results.append(json.loads((tmp_path / "eval.json").read_text())["perplexity"])
        capsys.readouterr()
        assert run("generate", directory, "--prompt", "the quick", "--max-new-tokens", 5) == 0
        results.append(capsys.readouterr().out)
    assert results[2] == pytest.approx(results[0], rel=1e-5)
    assert results[3] == results[1]


def test_verify_names_the_layer_and_the_row(compressed, tmp_path, capsys):
    assert run("verify", compressed) == 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, data in contents(compressed).items():
        (broken / name).write_bytes(data)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.indices"][3, 2] = 0
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run("verify", broken) == 1
    said = capsys.readouterr().out
    assert "problem: model.layers.1.mlp.down_proj: row 3, group 4: the indices name" in said
    assert run("eval", broken, "--text", tmp_path) == 2
    assert "model.layers.1.mlp.down_proj: row 3, group 4" in capsys.readouterr().err


def test_what_prune_refuses_before_any_work(checkpoint, compressed, text, tmp_path, capsys):
    common = ("--output", tmp_path / "out", "--calibration", tmp_path / "absent.txt")
    options = ("--format", "compressed", "--pattern", "4:8")
    assert run("prune", checkpoint, *common, *options) == 2
    error = capsys.readouterr().err
    assert "4:8 has no compressed form: that holds two values" in error
    assert "all four values of 8 channels in one group of 4" in error
    assert run("prune", compressed, *common) == 2
    error = capsys.readouterr().err
    assert "is a compressed checkpoint; pruning needs dense weights. Expand it first" in error
    assert f"esparse expand {compressed} --output DIR" in error
    assert run("prune", checkpoint, *common, "--json", tmp_path) == 2
    assert f"--json {tmp_path} is a directory. Name a file." in capsys.readouterr().err
    assert run("prune", checkpoint, *common, "--json", text / "a.json") == 2
    assert f"{text} is a file. Name another place." in capsys.readouterr().err
    assert run("prune", checkpoint, "--output", text / "a", *common[2:]) == 2
    assert f"{text} is a file. Name another place." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Prompts


def test_several_prompts_are_continued_as_each_alone(pruned, tmp_path, capsys):
    prompts = ["the quick", "fox", "the quick brown fox jumps"]
    options = ("--max-new-tokens", 20, "--json", tmp_path / "text.json")
    alone = []
    for prompt in prompts:
        assert run("generate", pruned / "out", "--prompt", prompt, *options) == 0
        alone += json.loads((tmp_path / "text.json").read_text())["outputs"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    capsys.readouterr()
    assert run("generate", pruned / "out", *flags, *options) == 0
    shown = capsys.readouterr().out
    said = json.loads((tmp_path / "text.json").read_text())
    assert said["outputs"] == alone
    assert [output["prompt"] for output in alone] == prompts
    assert said["tokens"] == sum(output["tokens"] for output in alone)
    assert shown == "\n".join(o["prompt"] + o["text"] + "\n" for o in alone)
    (tmp_path / "prompts.txt").write_bytes(b"the quick\r\n\nfox\n  \nthe quick brown fox jumps")
    assert run("generate", pruned / "out", "--prompt-file", tmp_path / "prompts.txt", *options) == 0
    assert json.loads((tmp_path / "text.json").read_text())["outputs"] == alone


def test_a_terminal_shows_the_text_as_it_comes(pruned, capsys):
    class Screen(io.StringIO):
        def __init__(self):
            super().__init__()
            self.parts = []

        def write(self, text):
            self.parts.append(text)
            return len(text)

        def isatty(self):
            return True

    screen = Screen()
    verb = cli.Generate(pruned / "out", prompt=("the quick",), max_new_tokens=40)
    assert verb.run(Console(file=screen, soft_wrap=True)) == 0
    assert run("generate", pruned / "out", "--prompt", "the quick", "--max-new-tokens", 40) == 0
    parts = [part for part in screen.parts if part]
    assert parts[0] == "the quick"
    assert len(parts) >= 4  # the prefill's token, three chunks
    assert "".join(parts) == capsys.readouterr().out


def test_top_k_draws_from_the_likeliest(pruned, tmp_path, capsys):
    def text(*options) -> str:
        file = tmp_path / "text.json"
        assert run("generate", pruned / "out", "--prompt", "fox", *options, "--json", file) == 0
        return json.loads(file.read_text())["outputs"][0]["text"]

    greedy = text()
    assert text("--temperature", 2.0, "--top-k", 1) == greedy
    assert text("--temperature", 2.0, "--top-k", 50) != greedy


def test_prompts_that_are_missing_or_too_many(pruned, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    model = pruned / "out"
    assert run("generate", model) == 2
    assert run("generate", model, "--prompt", "a", "--prompt-file", empty) == 2
    assert run("generate", model, "--prompt-file", empty) == 2
    assert run("generate", model, "--prompt-file", tmp_path / "absent.txt") == 2
    assert run("generate", model, "--prompt-file", tmp_path / "latin.txt") == 2
    assert run("generate", model, "--prompt", "fox", "--top-k", 0) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "generate continues --prompt TEXT, once or several times, or --prompt-file" in errors[0]
    assert errors[1] == errors[0]
    assert "is empty" in errors[2]
    assert "Give a text file, one prompt a line" in errors[3]
    assert "latin.txt is not UTF-8 text" in errors[4]
    assert errors[4].endswith("Convert it.")
    assert "top_k is 0" in errors[5]


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["esparse_jax", "--version"])
    runpy.run_module("esparse_jax", run_name="__main__")
    assert capsys.readouterr().out.startswith("esparse ")


def test_the_version_is_that_of_the_package(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"esparse {importlib.metadata.version('esparse-jax')}\n"


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(verb, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Verify, "run", interrupted)
    assert run("verify", "anything") == 130
    assert capsys.readouterr().err == "esparse: interrupted\n"


def test_jax_that_does_not_start_is_one_line(monkeypatch, capsys):
    def failed(verb, console):
        raise AssertionError

    def devices():
        raise AssertionError

    monkeypatch.setattr(cli.Verify, "run", failed)
    with pytest.raises(AssertionError):  # JAX does start: a mistake of ours
        cli.main(["verify", "anything"])
    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert run("verify", "anything") == 2
    said = capsys.readouterr().err
    assert said.startswith("esparse: there is no plugin for JAX_PLATFORMS=cuda: JAX cannot start.")


def test_progress_off_a_terminal_is_a_line_for_every_tenth(capsys):
    shown, update = cli.bar("pruning")
    with shown:
        for done in range(1, 41):
            update(done, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"pruning: {done} of 40" for done in range(4, 41, 4)]
