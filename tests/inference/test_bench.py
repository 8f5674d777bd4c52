"""What `esparse bench` measures: in child processes with a tiny model, and its parts here."""

import dataclasses
import importlib
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowering import lowered_for_cuda
from tiny import tiny_pruned

from esparse_jax import compress_checkpoint
from esparse_jax.inference import bench
from esparse_jax.inference.bench import BenchOptions, BenchResult, run_bench
from esparse_jax.inference.generate import CHUNK, decode, prefill
from esparse_jax.models import LlamaConfig, init_cache, model_bytes
from esparse_jax.models.random_model import random_model
from esparse_jax.sparse import _ffi_cuda

SMALL = {"shape": "tiny", "context": 20, "new_tokens": 17, "repeats": 2}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 64}
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
DECODE, CHAIN = "esparse_decode24_cuda_v4", "esparse_chain24_cuda_v3"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A pruned checkpoint in the hf format, and compressed."""
    directory = tmp_path_factory.mktemp("pruned")
    _, hf, _ = tiny_pruned(directory, dtype="float16", **SIZES)
    compress_checkpoint(hf, directory / "small")
    return str(hf), str(directory / "small")


def test_dense_and_sparse_are_measured_each_in_its_process():
    seen = []
    options = BenchOptions(**SMALL, batch=2)
    results = run_bench(options, on_result=lambda result: seen.append(result.form))
    assert [result.error for result in results] == [None, None]
    assert seen == ["dense", "sparse"]
    dense, sparse = results
    for result in results:
        assert result.device == jax.devices()[0].device_kind
        assert (result.dtype, result.versions) == ("float32", f"jax {jax.__version__}")
        assert len(result.times) == 2
        assert min(result.step, result.first_token, result.generate) > 0
        assert result.step == pytest.approx(np.median(result.times))
        assert result.seconds == result.step
        assert result.rate(options) == 2 / result.step
        if jax.default_backend() == "cpu":
            assert result.bandwidth is result.bound is result.share is None
        assert result.notes == ()
    assert sparse.apart(dense) < 1e-5
    config = bench.SHAPES["tiny"]
    for result in results:
        bytes_ = model_bytes(config, sparse=result.form == "sparse", width=4, batch=2, slots=36)
        assert result.linear_bytes == bytes_.linear
        assert result.cache_bytes == bytes_.cache
        embedding = 4 * config.vocab_size * config.hidden_size
        assert result.weight_bytes == bytes_.linear + bytes_.outside - embedding


def test_prompts_are_measured_without_a_step():
    options = BenchOptions(**SMALL, stage="prefill", layers=1, dtype="bfloat16")
    result = bench.measure(options, "sparse")
    assert (result.step, result.generate, result.share) == (None, None, None)
    assert result.seconds == result.first_token == pytest.approx(np.median(result.times))
    assert result.rate(options) == 20 / result.first_token
    assert result.dtype == "bfloat16"
    assert result.linear_bytes == model_bytes(options.config(), sparse=True).linear


def test_a_compressed_directory_is_measured_as_a_shape_is(directories):
    hf, small = directories
    options = {"context": 9, "new_tokens": 1, "repeats": 1}
    dense, sparse = (
        bench.measure(BenchOptions(model=small, **options), f) for f in bench.FORMS[1::-1]
    )
    assert sparse.apart(dense) < 1e-5
    assert sparse.linear_bytes < 0.54 * dense.linear_bytes
    for directory in (hf, small):
        other = bench.measure(BenchOptions(model=directory, **options), "plain")
        assert other.apart(dense) < 1e-5
        assert other.linear_bytes == dense.linear_bytes
    again = bench.measure(BenchOptions(model=hf, **options), "dense")
    assert again.logits == dense.logits


def test_torch_is_measured_on_the_same_shape():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    options = BenchOptions(**SMALL, layers=1)
    (result,) = run_bench(options, ("torch",))
    assert result.error is None
    assert result.step > 0
    assert result.generate is result.bandwidth is result.bound is None
    assert result.apart(result) is None
    assert "transformers" in result.versions
    dense = model_bytes(options.config(), sparse=False, width=4)
    assert result.linear_bytes == dense.linear
    assert result.weight_bytes == dense.linear + dense.outside - 4 * 512 * 128


CHILD = """
import logging
from esparse_jax.inference import bench
def measure(options, form):
    for _ in range(2):
        print("a library prints", flush=True)
        logging.getLogger("esparse_jax.models.fusion").warning("slow: %s", form)
    if form == "dense":
        raise RuntimeError("RESOURCE_EXHAUSTED: " + "out of\\nmemory " * 60)
    return bench.BenchResult(form, step=options.batch / 2)
bench.measure = measure
bench.main()
"""


def test_the_child_says_what_was_logged_and_what_failed(monkeypatch):
    monkeypatch.setattr(bench, "_WORKER", (sys.executable, "-P", "-c", CHILD))
    sparse, dense = run_bench(BenchOptions(**SMALL, batch=3), ("sparse", "dense"))
    assert (sparse.error, sparse.step, sparse.notes) == (None, 1.5, ("slow: sparse",))
    assert dense.error.startswith("RuntimeError: RESOURCE_EXHAUSTED: out of memory out of memory")
    assert dense.error.endswith("...")
    assert len(dense.error) < 350
    assert dense.notes == ("slow: dense",)


def test_a_form_that_fails_leaves_the_others_their_results(monkeypatch):
    words = "import sys; print('no kernel', file=sys.stderr)"
    silent = "import sys; sys.exit(4)"
    ends = {
        "dense": f"{words}; sys.exit(3)",
        "sparse": f"{words}; import os; os.kill(os.getpid(), 9)",
        "torch": silent,
    }
    runs, start = [], subprocess.run

    def run(command, **options):
        form = json.loads(options["input"])["form"]
        runs.append((command, options["env"]))
        if form == "plain":
            answer = json.dumps(dataclasses.asdict(BenchResult("plain", step=1.0)))
            return subprocess.CompletedProcess(command, 0, f"a library says hello\n{answer}\n", "")
        return start((sys.executable, "-c", ends[form]), **options)

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "find_spec", lambda name: name)  # torch, here or not
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    results = run_bench(BenchOptions(**SMALL), ("dense", "sparse", "plain", "torch"))
    assert results[0].error == "the process died (exit status 3): no kernel"
    assert results[1].error == f"the process died ({signal.Signals.SIGKILL.name}): no kernel"
    assert (results[2].error, results[2].step) == (None, 1.0)
    assert results[3].error == "the process died (exit status 4)"
    command, environment = runs[0]
    assert command[1:3] == ("-P", "-m")
    assert environment["XLA_CLIENT_MEM_FRACTION"] == "0.95"
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "bench what"),
        ({"shape": "tiny", "model": "x"}, "bench what"),
        ({"shape": "llama-8b"}, "shape is 'llama-8b'; it must be one of llama-7b, "),
        (
            {"shape": "tiny", "stage": "train"},
            "stage is 'train'; it must be one of decode, prefill",
        ),
        ({"shape": "tiny", "dtype": "int8"}, "dtype is 'int8'"),
        ({"shape": "tiny", "shuffle": "all"}, "shuffle is 'all'"),
        ({"shape": "tiny", "batch": 0}, "batch is 0; it must be at least 1"),
        ({"shape": "tiny", "repeats": -1}, "repeats is -1"),
        ({"shape": "tiny", "layers": 3}, "layers is 3; tiny has 2"),
        ({"shape": "tiny", "layers": 0}, "layers is 0; tiny has 2"),
        ({"model": "x", "layers": 1}, "layers is for a shape"),
    ],
)
def test_options_that_cannot_be_measured_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BenchOptions(**options)


def test_what_a_model_lacks_is_said_before_anything_runs(directories, monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", None)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    hf, small = directories
    for options, forms, message in (
        ({"shape": "tiny"}, (), "forms must be some of sparse, dense, plain, torch; got none"),
        ({"shape": "tiny"}, ("dense", "quick"), "got quick"),
        ({"shape": "tiny"}, ("dense", "torch"), r'not installed.*"esparse-jax\[bench\]"'),
        ({"model": hf}, ("sparse",), "20 tokens of context and 33 new ones take 53"),
        ({"model": hf, "context": 9}, ("dense", "sparse"), "holds no compressed layer.*esparse"),
        (
            {"model": small, "stage": "prefill", "context": 65},
            ("sparse",),
            "65 tokens of .* take 65",
        ),
    ):
        given = {"context": 20, "new_tokens": 18} | options
        if options.get("model") == hf and "context" not in options:
            given["context"], message = 40, "context and 33 new ones take 73 positions; .* has 64"
        with pytest.raises(ValueError, match=message):
            run_bench(BenchOptions(**given), forms)
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        run_bench(BenchOptions(model=hf + "x"))


def test_a_shape_takes_the_context_that_is_asked_for():
    options = BenchOptions(shape="llama-7b", context=5000, new_tokens=17, layers=2)
    assert (options.steps, options.slots) == (32, 5033)
    assert options.config().max_position_embeddings == 5033
    assert options.config().num_hidden_layers == 2
    assert BenchOptions(shape="llama-3-8b").config().max_position_embeddings == 8192
    assert BenchOptions(shape="tiny", stage="prefill", context=9).slots == 9


def test_a_model_has_no_longer_a_context_than_it_has_room_for(directories):
    hf, _ = directories  # 64 positions
    for stage, context, fitted in (
        ("decode", 1024, 64 - 33), ("decode", 20, 20), ("prefill", 1024, 64),
    ):  # fmt: skip
        options = BenchOptions(model=hf, stage=stage, context=context, new_tokens=18)
        assert options.fitted().context == fitted
        options.fitted().check(("dense",))
    options = BenchOptions(shape="tiny", context=5000)
    assert options.fitted() == options
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        BenchOptions(model=hf + "x").fitted()


def test_auto_is_what_the_machine_is_fast_in(directories):
    shape, model = BenchOptions(shape="tiny"), BenchOptions(model=directories[1])
    assert bench.dtype_of(shape, on_cpu=True) == bench.dtype_of(model, on_cpu=True) == "float32"
    assert bench.dtype_of(shape, on_cpu=False) == "float16"
    assert bench.dtype_of(model, on_cpu=False) == "float16"
    given = dataclasses.replace(shape, dtype="bfloat16")
    assert bench.dtype_of(given, on_cpu=True) == "bfloat16"


def test_lines_show_ratios_shares_and_whose_peak_it_is():
    options = BenchOptions(shape="llama-7b", batch=4)
    memory = {"weight_bytes": 7 * 10**9, "cache_bytes": 10**9, "bandwidth": 4e12}
    dense = BenchResult(
        "dense", first_token=0.1, step=8e-3, model_bytes=14 * 10**9, peak_bytes=16 * 10**9,
        made_peak_bytes=15 * 10**9, logits=(3.0, 4.0), **memory,
    )  # fmt: skip
    sparse = dataclasses.replace(
        dense, form="sparse", step=2.5e-3, peak_bytes=15 * 10**9, logits=(3.0, 4.5), notes=("slow",)
    )
    failed = BenchResult("plain", error="out of memory")
    assert bench.line(options, dense, dense).split() == [
        "dense", "8.000", "500.0", "1.00", "100.0", "2.000", "0.25", "14.00", "16.00", "-"
    ]  # fmt: skip
    assert bench.line(options, sparse, dense).split() == [
        "sparse", "2.500", "1600.0", "3.20", "100.0", "2.000", "0.80", "14.00", "15.00*", "1.0e-01"
    ]  # fmt: skip
    assert bench.line(options, failed, dense) == "plain   failed: out of memory"
    assert len(bench.line(options, sparse, dense)) == len(bench.HEADER)
    assert "sparse: slow" in bench.legend(options, [dense, sparse, failed])
    assert "empty on the CPU" not in " ".join(bench.legend(options, [dense, sparse, failed]))
    on_cpu = dataclasses.replace(dense, device="cpu")
    assert "empty on the CPU" in " ".join(bench.legend(options, [dense, on_cpu]))
    values = json.loads(json.dumps(bench.as_dict(options, [dense, sparse, failed])))
    assert values["options"]["steps"] == 128
    assert values["logits_apart"] == {"sparse to dense": pytest.approx(0.1)}
    assert [row["tokens_per_second"] for row in values["results"]] == [500, 1600, None]
    assert values["results"][1]["share"] == pytest.approx(0.8)
    prompts = dataclasses.replace(options, stage="prefill")
    quick = dataclasses.replace(dense, step=None)
    assert bench.line(prompts, quick, quick).split()[1:4] == ["100.000", "40960.0", "1.00"]


@pytest.mark.skipif(
    not _ffi_cuda.decode_available(), reason="the extension was built without its CUDA part"
)
@pytest.mark.parametrize("shuffle", ["within", "none"])
def test_the_jitted_steps_that_are_timed_lower_for_cuda(shuffle):
    config = dataclasses.replace(bench.SHAPES["tiny"], dtype="float16")
    graphdef, state = nnx.split(random_model(config, form="device", shuffle=shuffle))
    keys = jax.random.split(jax.random.key(0), CHUNK)

    def lowered(function, *arguments, **options) -> str:
        return lowered_for_cuda(lambda *given: function(graphdef, *given, **options), *arguments)

    for rows in (1, 16):
        cache = init_cache(config, rows, 64, dtype="float16")
        token = jnp.zeros(rows, jnp.int32)
        text = lowered(decode, state, token, cache, keys, **GREEDY)
        assert (text.count(CHAIN), text.count(DECODE)) == (config.num_hidden_layers, 1)
        assert text.count("prefetch = true") == config.num_hidden_layers + 1
    tokens = jnp.zeros((2, 32), jnp.int32)
    text = lowered(
        lambda graphdef, state, tokens, key: prefill(
            graphdef, state, tokens, None, key, max_length=64, **GREEDY
        ),
        state,
        tokens,
        keys[0],
    )
    assert CHAIN not in text
    # What is compared takes the way of what is timed: a prompt without chains, steps with them.
    text = lowered(bench._logits, state, tokens[0], tokens[0, :16])
    assert text.count(CHAIN) == config.num_hidden_layers


def test_forms_with_other_logits_fail():
    dense = BenchResult("dense", dtype="float16", logits=(3.0, 4.0))
    sparse = dataclasses.replace(dense, form="sparse")
    assert bench._compared(sparse, [dense]) is sparse
    other = bench._compared(dataclasses.replace(sparse, logits=(3.0, 4.5)), [dense])
    assert other.error == "its logits are 1.0e-01 from those of dense; allowed 6.2e-02"
    assert bench._compared(dataclasses.replace(sparse, logits=(3.0, 4.5)), []).error is None
    failed = dataclasses.replace(dense, error="out of memory")
    assert bench._compared(dataclasses.replace(sparse, logits=(3.0, 4.5)), [failed]).error is None
    broken = bench._compared(dataclasses.replace(sparse, logits=(3.0, float("nan"))), [])
    assert broken.error == "its logits are not finite"


def test_a_form_that_does_not_end_is_ended(monkeypatch):
    sleeps = (sys.executable, "-c", "import time; time.sleep(60)")
    monkeypatch.setattr(bench, "_WORKER", sleeps)
    (result,) = run_bench(BenchOptions(shape="tiny", minutes=0.01), ("dense",))
    assert result.error == "it was ended after 0.01 minutes"


def test_what_a_failed_form_said_is_shown(monkeypatch, capsys):
    says = (
        "import sys; print('a long story', file=sys.stderr); "
        'print(\'{"form": "dense", "error": "in short"}\')'
    )
    monkeypatch.setattr(bench, "_WORKER", (sys.executable, "-c", says))
    (result,) = run_bench(BenchOptions(shape="tiny"), ("dense",))
    assert result.error == "in short"
    assert "a long story" in capsys.readouterr().err


def test_the_file_in_the_room_is_the_one_the_child_runs():
    assert bench._WORKER[-1] == importlib.import_module("esparse_jax.inference.bench").__name__


def test_the_tiny_shape_is_one_the_decode_kernels_take():
    model = random_model(
        LlamaConfig(**{**vars(bench.SHAPES["tiny"]), "dtype": "float16"}), form="device"
    )
    assert all(layer.qkv_fused and layer.mlp_fused for layer in model.model.layers)
