"""What `esparse doctor` says of machines that have more or less than this one."""

import json
import logging
import re
from types import SimpleNamespace

import jax
import pytest

from esparse_jax import native
from esparse_jax.command import cli, doctor
from esparse_jax.sparse import Machine, Record, TuningTable, _ffi, _ffi_cusparselt, save_table
from esparse_jax.sparse import machine as machine_file
from esparse_jax.sparse.machine import Build
from esparse_jax.sparse.table import KernelTime, stored_table

H200 = Machine("NVIDIA H200", "9.0", "0.8.0")
REMEMBERED = (_ffi.cpu_levels, _ffi_cusparselt._find)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, packaged):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored_table.cache_clear()
    yield
    stored_table.cache_clear()


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", *map(str, arguments)])
    return stopped.value.code


def said(capsys) -> dict[str, str]:
    """What was printed, by the name at the start of a line."""
    lines = capsys.readouterr().out.splitlines()
    found, mends = lines, []
    if "" in lines:
        found, mends = lines[: lines.index("")], lines[lines.index("") + 1 :]
    values = dict(re.fullmatch(r"(.+?)  +(.*)", line).groups() for line in found)
    return values | {f"mend {mend.split(': ')[0]}": mend.split(": ", 1)[1] for mend in mends}


def extension(code="80-real 86-real 89-real 90", toolkit="13.0.88", prefill="prefill"):
    return SimpleNamespace(
        CUDA_ARCHITECTURES=code,
        CUDA_TOOLKIT=toolkit,
        FFI_API_VERSION="0.3",
        HAS_CUDA=bool(toolkit),
        CUDA_RECORDED_TARGET=None,
        CUDA_PREFILL_TARGET=prefill,
        __file__="/site/_esparse_ffi.so",
        cpu_levels=lambda: ("avx2", "portable"),
    )


@pytest.fixture
def built(monkeypatch):
    """Puts another extension, or none, in the place of this one."""

    def put(module):
        monkeypatch.setattr(native, "extension", lambda: module)
        for remembered in REMEMBERED:
            remembered.cache_clear()

    yield put
    for remembered in REMEMBERED:
        remembered.cache_clear()


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine with a GPU and the library, whose answers are made up."""

    def put(capability="9.0", *, agrees=True, records=False, library=True, prefill=False):
        gpu = SimpleNamespace(
            platform="gpu",
            device_kind="NVIDIA H200",
            compute_capability=capability,
            memory_stats=lambda: {"bytes_limit": 10**11},
        )
        opened = _ffi_cusparselt.OpenedLibrary(800, "/site/libcusparseLt.so.0")
        monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: opened if library else "no file.")
        machine = H200._replace(cusparselt="0.8.0" if library else None)
        for module, name, value in (
            (jax, "devices", lambda platform=None: [gpu, gpu]),
            (doctor, "gpus", lambda: [gpu, gpu]),
            (doctor, "library_blob_agrees", lambda: agrees),
            (doctor, "records_calls", lambda: records),
            (doctor, "has_prefill", lambda: prefill),
            (doctor, "this_machine", lambda: machine),
        ):
            monkeypatch.setattr(module, name, value)

    return put


def test_this_machine(tmp_path, capsys):
    assert run("--json", tmp_path / "doctor.json") == 0
    found = said(capsys)
    assert f"jax {jax.__version__}" in found["versions"]
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["versions"]["jax"] == jax.__version__
    assert report["platform"] == jax.devices()[0].platform
    assert {"devices", "cuda", "cusparselt", "blob_agrees", "tuning", "missing"} <= set(report)
    for missing in report["missing"]:
        assert missing["mend"].endswith(".")
        assert found[f"mend {missing['what']}"] == missing["mend"]


def test_without_the_extension(built, capsys, caplog, monkeypatch):
    built(None)
    monkeypatch.setattr(doctor, "gpus", lambda: [])
    with caplog.at_level(logging.INFO):
        assert run() == 0
    found = said(capsys)
    assert found["extension"] == "not built"
    assert "Build it with `pip install .`" in found["mend extension"]
    assert found["CPU levels"] == "no compiled product: plain JAX"
    assert found["CUDA part"] == "not in this build"
    assert "ESPARSE_CUDA=ON" in found["mend CUDA part"]
    assert "the compiled extension is missing" in found["cuSPARSELt"]
    assert "'.[cuda13,cusparselt]'" in found["mend cuSPARSELt"]
    assert caplog.records == []  # it is said once


def test_with_a_gpu_and_everything(built, with_gpu, tmp_path, capsys):
    built(extension())
    with_gpu(records=True)
    file = save_table(
        TuningTable(H200, "1", tuple(Record(64, 64, "float16", r, 1.0) for r in (1, 8)))
    )
    assert run("--json", tmp_path / "doctor.json") == 0
    found = said(capsys)
    assert found["devices"] == "2 x gpu NVIDIA H200 (compute capability 9.0)"
    assert found["extension"] == "/site/_esparse_ffi.so, for XLA's FFI 0.3"
    assert found["CPU levels"] == "avx2, portable"
    assert found["CUDA part"] == (
        "CUDA 13.0.88, for sm_80, sm_86, sm_89, sm_90, PTX of sm_90, with the prefill kernel "
        "(sm_90a); compiled, not run: sm_80, sm_86, sm_89, PTX of sm_90"
    )
    assert found["cuSPARSELt"] == "0.8.0, /site/libcusparseLt.so.0"
    assert found["weight layout"].startswith("cuSPARSELt reads and writes Blob24")
    assert found["products in graphs"].startswith("recorded by XLA")
    assert found["tuning table"] == f"2 records of 1 products, {file}"
    assert not any(name.startswith("mend") or name == "NVIDIA GPUs" for name in found)
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["missing"] == []
    assert report["cuda"]["serves_this_gpu"] is True
    assert report["cuda"]["prefill"] is True
    assert report["devices"][1]["bytes"] == 10**11
    tuning = {"files": [str(file)], "own_file": str(file), "records": 2, "of_other_libraries": []}
    assert report["tuning"] == tuning
    assert (report["blob_agrees"], report["records_calls"]) == (True, True)


def test_a_table_that_cannot_be_used_is_named(built, with_gpu, capsys):
    built(extension())
    with_gpu(records=True)
    file = save_table(TuningTable(H200, "1", (Record(64, 64, "float16", 1, 1.0),)))
    file.write_text("{}")
    stored_table.cache_clear()
    assert run() == 0
    found = said(capsys)
    assert found["tuning table"] == f"{file} is not used"
    assert "format_version is None" in found["mend tuning table"]


def test_a_table_of_another_version_of_the_library(built, with_gpu, packaged, capsys):
    built(extension())
    with_gpu(records=True)
    ours = KernelTime(1.0)
    there = TuningTable(
        H200._replace(cusparselt="0.8.1"), "1", (Record(64, 64, "float16", 1, 1.0, ours),)
    )
    file = save_table(there, packaged / "t.json")
    stored_table.cache_clear()
    assert run() == 0
    found = said(capsys)
    assert found["tuning table"] == f"1 records of 1 products, {file}"
    assert "another cuSPARSELt (0.8.1)" in found["mend tuning table"]
    own = save_table(TuningTable(H200, "1", (Record(64, 64, "float16", 8, 1.0),)))
    stored_table.cache_clear()
    assert run() == 0
    found = said(capsys)
    assert found["tuning table"] == f"2 records of 1 products, {file}, {own}"
    assert "mend tuning table" not in found


def test_with_a_gpu_that_lacks_things(built, with_gpu, capsys):
    built(extension("80-real", prefill=None))
    with_gpu(agrees=False)
    assert run() == 0
    found = said(capsys)
    assert "prefill" not in found["CUDA part"]
    assert "no code for compute capability 9.0" in found["mend CUDA part"]
    assert "CMAKE_CUDA_ARCHITECTURES=90" in found["mend CUDA part"]
    assert found["weight layout"] == "cuSPARSELt has one of its own"
    assert "the decode kernels do not read them" in found["mend weight layout"]
    assert found["products in graphs"].startswith("traced by XLA")
    assert found["tuning table"] == "none for NVIDIA H200 (9.0) with cuSPARSELt 0.8.0"
    assert "esparse tune MODEL, which writes" in found["mend tuning table"]
    assert "cuSPARSELt chooses its algorithm" in found["mend tuning table"]
    with_gpu(library=False)
    assert run() == 0
    found = said(capsys)
    assert found["cuSPARSELt"] == "not used: no file."
    assert "other than Hopper products of more than 16 rows need it" in found["mend cuSPARSELt"]
    with_gpu(library=False, prefill=True)
    assert run() == 0
    found = said(capsys)
    assert "many rows are faster with it where it was measured so" in found["mend cuSPARSELt"]
    assert "our own kernels multiply" in found["mend tuning table"]
    assert found["weight layout"].startswith("not compared")
    assert "mend weight layout" not in found


@pytest.mark.parametrize(
    ("installed", "mend"),
    [
        ({}, r"install JAX's CUDA plugin: pip install '\.\[cuda13\]'"),
        ({"jax-cuda12-plugin": "0.10.2"}, "jax-cuda12-plugin 0.10.2 is installed: check the driv"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, capsys, installed, mend):
    monkeypatch.setattr(doctor, "gpus", lambda: [])
    monkeypatch.setattr(doctor, "_version", installed.get)
    assert run() == 0
    found = said(capsys)
    assert found["NVIDIA GPUs"] == "JAX sees none"
    with pytest.raises(AssertionError, match=mend):
        raise AssertionError(found["mend NVIDIA GPUs"])
    assert "jax not found" in found["versions"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            RuntimeError("Unable to initialize backend 'cuda'"),
            "Unable to initialize backend 'cuda'",
        ),
        (AssertionError(), "there is no plugin for JAX_PLATFORMS=cuda"),
    ],
)
def test_jax_that_does_not_start_is_a_finding(error, why, monkeypatch, tmp_path, capsys):
    def devices(platform=None):
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert run("--json", tmp_path / "doctor.json") == 0
    found = said(capsys)
    assert found["devices"] == why
    assert "JAX_PLATFORMS=cpu" in found["mend devices"]
    assert json.loads((tmp_path / "doctor.json").read_text())["devices"] == []


@pytest.mark.parametrize(
    ("code", "runs", "does_not"),
    [
        (("sm_80", "sm_90", "PTX of sm_90"), ("8.0", "8.9", "9.0", "10.0", "12.1"), ("7.5",)),
        (("sm_80",), ("8.0", "8.6"), ("9.0", "7.0")),
        (("sm_86",), ("8.6", "8.9"), ("8.0", "9.0")),
        (("sm_90a",), ("9.0",), ("9.1", "10.0")),
        (("PTX of sm_120",), ("12.0", "12.1", "13.0"), ("9.0",)),
        ((), (), ("9.0",)),
    ],
)
def test_which_gpus_a_build_runs_on(code, runs, does_not):
    build = Build("file", "0.3", (), "13.0", code)
    assert all(build.runs_on(capability) for capability in runs)
    assert not any(build.runs_on(capability) for capability in does_not)


def test_code_is_read_as_cmake_names_it(built):
    built(extension("80-real 86 90-virtual 90a-real"))
    code = machine_file.build().cuda_code
    assert code == ("sm_80", "sm_86", "PTX of sm_86", "PTX of sm_90", "sm_90a")
    assert machine_file.build().prefill
    built(extension("", "", prefill=None))
    assert machine_file.build() == Build(
        "/site/_esparse_ffi.so", "0.3", ("avx2", "portable"), None, ()
    )
