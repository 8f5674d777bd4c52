"""Which product `sparse_matmul` takes, by what was measured: read off what is lowered for CUDA."""

import dataclasses
import functools
import logging
import math
import re

import jax
import pytest
from fake_cusparselt import assert_product, random_x, weight24
from lowering import lowered_for_cuda

from esparse_jax.sparse import (
    Algorithm,
    Machine,
    Record,
    TuningTable,
    _ffi,
    _ffi_cuda,
    _ffi_cusparselt,
    blob24,
    compress24,
    device_blob24,
    sparse_matmul,
    use_table,
)
from esparse_jax.sparse import matmul as matmul_file
from esparse_jax.sparse import table as table_file
from esparse_jax.sparse.matmul import _log_untuned
from esparse_jax.sparse.table import KernelTime, LibraryTime

MATMUL, DECODE = "esparse_cusparselt_matmul_cuda_v1", "esparse_decode24_cuda_v4"
PREFILL = "esparse_prefill24_cuda_v3"
H200 = Machine("NVIDIA H200", "9.0", "0.8.0")
SHAPE = (64, 128)
PLAN = {"tiles": 3, "warps": 4, "blocks": 2}
PLAN_TEXT = "plan = dense<[3, 4, 2, 0, 0, 0]>"
RULE_TEXT = "plan = dense<0>"

pytestmark = pytest.mark.skipif(
    not _ffi.cpu_product_available(), reason="the extension is not built (BUILD.md)"
)
needs_kernel = pytest.mark.skipif(
    not _ffi_cuda.decode_available(), reason="the extension was built without its CUDA part"
)


needs_prefill = pytest.mark.skipif(
    not _ffi_cuda.prefill_available(), reason="the extension was built without code for Hopper"
)


@pytest.fixture(autouse=True)
def traced_anew():
    """What was traced with another machine or table is forgotten."""
    table_file.stored_table.cache_clear()
    matmul_file._with_workspace.cache_clear()
    jax.clear_caches()
    yield
    table_file.stored_table.cache_clear()
    matmul_file._with_workspace.cache_clear()
    jax.clear_caches()


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """A machine where the library could be opened, and which has no GPU."""
    library = _ffi_cusparselt.OpenedLibrary(800, "libcusparseLt.so.0")
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: library)
    monkeypatch.setattr(_ffi_cusparselt, "device", lambda: None)


def record(rows, *, decode=None, plan=None, library=None, id=5, split_k=None, workspace=0):
    algorithm = Algorithm(id, split_k, workspace_bytes=workspace)
    return Record(
        *SHAPE,
        "float16",
        rows,
        None,
        None if decode is None else KernelTime(decode, plan),
        None if library is None else LibraryTime(library, algorithm),
    )


def table(*records, machine=H200) -> TuningTable:
    return TuningTable(machine, "0.11.2", records)


@functools.cache
def weight():
    return blob24(compress24(weight24(SHAPE, "float16")))


def lowered(rows, tuned, shape=SHAPE, **options) -> str:
    blob = weight() if shape == SHAPE else blob24(compress24(weight24(shape, "float16")))
    with use_table(tuned):
        product = functools.partial(sparse_matmul, **options)
        return lowered_for_cuda(product, random_x(rows, shape[1]), blob)


def algorithm_of(text: str) -> int:
    """Of the only product, which is the library's."""
    assert text.count(f"@{MATMUL}") == 1
    assert DECODE not in text
    return int(re.search(r"\balgorithm = (-?\d+) : i32", text).group(1))


def is_decode(text: str) -> bool:
    return f"@{DECODE}" in text and MATMUL not in text and "dot_general" not in text


# ---- the table decides


@needs_kernel
def test_the_fastest_way_is_taken():
    tuned = table(
        record(1, decode=5.0, library=9.0),
        record(8, decode=9.0, library=5.0, id=7, split_k=-1),
        record(16, decode=5.0, plan=PLAN, library=9.0),
    )
    text = lowered(1, tuned)
    assert is_decode(text)
    assert RULE_TEXT in text
    for rows in (2, 8):
        text = lowered(rows, tuned)
        assert algorithm_of(text) == 7
        assert "split_k = -1 : i32" in text
    text = lowered(9, tuned)
    assert is_decode(text)
    assert PLAN_TEXT in text


@needs_kernel
def test_a_weight_that_is_fetched_early_is_timed_beside():
    def texts(microseconds, prefetch):
        kernel = KernelTime(microseconds, PLAN, prefetch=prefetch)
        tuned = table(dataclasses.replace(record(16, library=6.0), decode=kernel))
        return [lowered(16, tuned, prefetch=told) for told in (True, False)]

    told, untold = texts(6.5, 5.0)
    assert is_decode(told)
    assert RULE_TEXT in told
    assert "prefetch = true" in told
    assert algorithm_of(untold) == 5
    for text in texts(5.5, 7.0):
        assert is_decode(text)
        assert PLAN_TEXT in text
        assert "prefetch = false" in text
    told, untold = texts(6.5, 6.4)
    assert algorithm_of(told) == algorithm_of(untold) == 5


@needs_kernel
def test_a_kernel_that_failed_with_prefetch_is_taken_without():
    failed = {"prefetch": "with 8 rows: wrong numbers, 40 times too far"}
    measured = dataclasses.replace(record(16, decode=5.0, plan=PLAN, library=6.0), failed=failed)
    text = lowered(16, table(measured), prefetch=True)
    assert is_decode(text)
    assert PLAN_TEXT in text
    assert "prefetch = false" in text
    without = dataclasses.replace(record(16), failed=failed)
    text = lowered(16, table(without), prefetch=True)
    assert is_decode(text)
    assert "prefetch = false" in text
    assert "prefetch = true" in lowered(8, table(without), prefetch=True)  # has no record


@needs_kernel
def test_more_than_sixteen_rows_are_decoded_as_they_were_measured():
    tuned = table(record(32, decode=5.0, library=6.0))
    text = lowered(20, tuned, prefetch=True)
    assert is_decode(text)
    assert "prefetch = true" not in text


@needs_kernel
def test_without_a_record_the_rows_decide():
    near = table(record(16, library=1.0, id=4), record(64, library=1.0, id=6))
    for tuned, algorithm in ((None, -1), (table(), -1), (near, 4)):
        other = (128, 64)
        assert is_decode(lowered(16, tuned, shape=other))
        assert algorithm_of(lowered(17, tuned, shape=other)) == algorithm
    tuned = TuningTable(H200, "1", (Record(*SHAPE, "bfloat16", 64, 1.0),))
    assert algorithm_of(lowered(64, tuned)) == -1


def test_the_record_of_the_bucket_is_taken_or_else_the_nearest():
    tuned = table(
        record(32, library=9.0, id=1), record(64, library=9.0, id=2), record(256, library=9.0, id=3)
    )
    rows = (17, 32, 33, 64, 65, 128, 129, 256, 1000, 1025)
    found = {number: algorithm_of(lowered(number, tuned)) for number in rows}
    own = -1  # the library's own choice: nothing near was measured
    assert found == {
        17: 1, 32: 1, 33: 2, 64: 2, 65: 2, 128: 2, 129: 3, 256: 3, 1000: 3, 1025: own,
    }  # fmt: skip


def test_the_nearest_product_is_of_the_nearest_rows_and_then_of_the_nearest_shape():
    def other(shape, rows, id, dtype="float16"):
        made = dataclasses.replace(record(rows, library=9.0, id=id), dtype=dtype)
        return dataclasses.replace(made, out=shape[0], channels=shape[1])

    tuned = table(
        other((64, 256), 256, 1), other((128, 128), 1024, 2), other((1024, 1024), 1024, 3),
        other(SHAPE, 1024, 4, "bfloat16"), other(SHAPE, 8192, 5),
    )  # fmt: skip

    def nearest(shape, dtype, rows):
        ways = tuned.nearest_ways(shape, dtype, rows)
        assert all(way.microseconds == math.inf for way in ways)
        return [way.algorithm for way in ways]

    assert nearest(SHAPE, "float16", 1000) == [Algorithm(2)]
    assert nearest((2048, 1024), "float16", 600) == [Algorithm(3)]
    assert nearest(SHAPE, "float16", 200) == [Algorithm(1)]
    assert nearest(SHAPE, "float16", 4096) == [Algorithm(5)]
    assert nearest(SHAPE, "float16", 32) == []
    assert nearest(SHAPE, "bfloat16", 512) == [Algorithm(4)]
    assert algorithm_of(lowered(1000, tuned)) == 2
    with_choice = lowered(1000, tuned, algorithm=Algorithm(7, workspace_bytes=0))
    assert algorithm_of(with_choice) == 7


@needs_kernel
def test_few_rows_are_not_decided_by_records_of_many():
    """There the decode kernel was not in the race."""
    tuned = table(record(64, library=5.0))
    assert is_decode(lowered(16, tuned))
    assert algorithm_of(lowered(64, tuned)) == 5


@needs_kernel
def test_a_kernel_that_failed_is_not_dispatched():
    crashed = dataclasses.replace(record(16), failed={"decode": "with 16 rows: SIGSEGV"})
    assert algorithm_of(lowered(16, table(crashed))) == -1


@needs_kernel
def test_more_than_sixteen_rows_are_decoded_only_where_that_was_measured():
    tuned = table(record(16, decode=5.0), record(32, decode=6.0, library=9.0))
    text = lowered(20, tuned)
    assert text.count(f"@{DECODE}") == 2
    assert MATMUL not in text
    assert "tensor<16x128xf16>" in text
    assert "tensor<4x128xf16>" in text
    assert algorithm_of(lowered(33, tuned)) == 5  # not twice the kernel, which was measured for 32
    slower = table(record(16, decode=5.0), record(32, decode=9.0, library=6.0))
    assert algorithm_of(lowered(20, slower)) == 5
    assert algorithm_of(lowered(20, table(record(16, decode=5.0, library=None)))) == -1


@needs_kernel
def test_vmap_asks_with_all_its_rows():
    tuned = table(record(8, decode=5.0), record(64, decode=None, library=5.0, id=6))
    with use_table(tuned):
        text = lowered_for_cuda(jax.vmap(lambda x: sparse_matmul(x, weight())), random_x(5, 8, 128))
    assert algorithm_of(text) == 6


def test_without_the_kernel_the_library_is_taken(monkeypatch):
    monkeypatch.setattr(_ffi_cuda, "decode_available", lambda: False)
    tuned = table(record(16, decode=5.0, library=9.0, id=4))
    assert algorithm_of(lowered(16, tuned)) == 4
    assert algorithm_of(lowered(16, None)) == -1


@needs_kernel
def test_without_the_library_the_kernel_is_taken(monkeypatch, caplog):
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: "it is not installed.")
    tuned = table(record(16, decode=9.0, library=5.0), record(64, library=5.0))
    assert is_decode(lowered(16, tuned))
    assert "dot_general" in lowered(64, tuned)


# ---- and is overruled


@needs_kernel
def test_a_backend_is_taken_whatever_was_measured():
    tuned = table(record(16, decode=5.0, plan=PLAN, library=9.0, id=7))
    assert algorithm_of(lowered(16, tuned, backend="cusparselt")) == -1
    forced = Algorithm(2, workspace_bytes=0)
    assert algorithm_of(lowered(16, tuned, backend="cusparselt", algorithm=forced)) == 2
    text = lowered(16, table(record(16, decode=9.0, plan=PLAN, library=5.0)), backend="decode")
    assert is_decode(text)
    assert RULE_TEXT in text
    assert "dot_general" in lowered(16, tuned, backend="reference")


@needs_kernel
def test_an_algorithm_is_taken_where_the_library_multiplies():
    forced = Algorithm(2, workspace_bytes=0)
    library_wins = table(record(16, decode=9.0, library=5.0), record(32, decode=5.0, library=9.0))
    assert algorithm_of(lowered(16, library_wins, algorithm=forced)) == 2
    assert algorithm_of(lowered(20, library_wins, algorithm=forced)) == 2  # not the kernel twice
    assert is_decode(lowered(16, table(record(16, decode=5.0, library=9.0)), algorithm=forced))


@needs_kernel
def test_a_plan_is_not_for_a_kernel_that_starts_early():
    tuned = table(record(16, decode=5.0, plan=PLAN))
    assert PLAN_TEXT in lowered(16, tuned)
    assert RULE_TEXT in lowered(16, tuned, prefetch=True)


# ---- where there is no GPU to ask


def test_a_given_table_is_taken_where_no_gpu_is():
    """Its workspace is that of another number of rows, so what is unknown is set aside."""
    text = lowered(20, table(record(32, library=5.0, workspace=100)))
    assert algorithm_of(text) == 5
    assert f"tensor<{8 << 20}xui8>" in text
    text = lowered(20, table(record(32, library=5.0, workspace=16 << 20)))
    assert f"tensor<{16 << 20}xui8>" in text


def test_algorithms_of_a_library_that_may_not_read_the_weight_are_not_taken():
    """What is lowered here may run on 0.8.0 on sm_90, where the layout is known."""
    for other in ({"cusparselt": "0.8.1"}, {"capability": "8.0"}, {"cusparselt": None}):
        tuned = table(record(64, library=5.0), machine=H200._replace(**other))
        assert algorithm_of(lowered(64, tuned)) == -1


def test_no_gpu_no_table(monkeypatch):
    @functools.cache
    def read(machine):
        raise AssertionError("there is no machine to read a table for")

    monkeypatch.setattr(table_file, "stored_table", read)
    assert algorithm_of(lowered_for_cuda(sparse_matmul, random_x(64, 128), weight())) == -1


# ---- where there is one


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """As on an H200 whose library answers; what it was asked."""
    asked = []

    def describe(*, rows, out, channels, dtype, algorithm):
        asked.append((rows, out, channels, dtype.name, algorithm))
        if algorithm.id == 9:
            raise RuntimeError("operation not supported")
        return _ffi_cusparselt.PlanFacts(10, algorithm, 0, 1000 + rows)

    for module in (table_file, matmul_file):
        monkeypatch.setattr(module, "this_machine", lambda: H200)
    monkeypatch.setattr(matmul_file, "blob24_readers", lambda: (800090,))
    monkeypatch.setattr(_ffi_cusparselt, "describe_plan", describe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def lowered_here(rows, **options) -> str:
    """With the table of the machine."""
    product = functools.partial(sparse_matmul, **options)
    return lowered_for_cuda(product, random_x(rows, SHAPE[1]), weight())


@pytest.fixture
def hopper(monkeypatch):
    """Where the prefill kernel is for the GPU at hand, by its capability."""
    runs = lambda capability: capability == "9.0"  # noqa: E731
    monkeypatch.setattr(_ffi_cuda, "prefill_runs", runs)


def is_prefill(text: str) -> bool:
    return f"@{PREFILL}" in text and MATMUL not in text and DECODE not in text


@needs_prefill
def test_the_prefill_kernel_is_taken_where_it_was_faster(h200, hopper, caplog, monkeypatch):
    monkeypatch.setattr(matmul_file, "_log_untuned", functools.cache(_log_untuned.__wrapped__))

    def measured(prefill, **changes):
        kernel = KernelTime(prefill, {"rows": 256, "cluster": 2})
        return table(dataclasses.replace(record(64, library=5.0), prefill=kernel, **changes))

    with use_table(measured(4.0)):
        text = lowered_here(64)
        assert is_prefill(text)
        assert "plan = dense<[256, 0, 2, 0, 0, 0]>" in text
        assert is_prefill(lowered_here(33))  # the record is of 64 rows
        assert algorithm_of(lowered_here(64, algorithm=Algorithm(3))) == 3
    no_library = record(256)
    kernel = KernelTime(4.0)
    with use_table(table(dataclasses.replace(no_library, prefill=kernel))):
        assert is_prefill(lowered_here(256))  # and nothing is said of the library
    assert not caplog.records
    with use_table(measured(6.0)):
        assert algorithm_of(lowered_here(64)) == 5


@needs_prefill
def test_few_rows_are_for_the_prefill_kernel_only_where_it_was_faster(h200, hopper):
    for microseconds, faster in ((4.0, True), (6.0, False)):
        kernel = KernelTime(microseconds)
        with use_table(table(dataclasses.replace(record(16, decode=5.0), prefill=kernel))):
            assert is_prefill(lowered_here(16)) is is_prefill(lowered_here(9)) is faster
            assert not is_prefill(lowered_here(8))


@needs_prefill
def test_the_prefill_kernel_fetches_its_weight_early_from_seventeen_rows_on(h200, hopper):
    for rows, early in ((9, "false"), (16, "false"), (17, "true"), (64, "true")):
        text = lowered_here(rows, backend="prefill", prefetch=True)
        assert is_prefill(text)
        assert f"prefetch = {early}" in text, rows


@needs_prefill
def test_the_nearest_product_decides_between_the_prefill_kernel_and_the_library(h200, hopper):
    def measured(prefill, rows=128):
        kernel = KernelTime(prefill, {"rows": 256, "group": 4})
        return dataclasses.replace(record(rows, library=5.0), prefill=kernel)

    with use_table(table(measured(4.0))):
        text = lowered_here(64)
        assert is_prefill(text)
        assert "plan = dense<0>" in text  # that one was for other rows
    with use_table(table(measured(6.0))):
        assert algorithm_of(lowered_here(64)) == 5
    with use_table(table(record(128, library=5.0))):
        assert algorithm_of(lowered_here(64)) == 5
    without = dataclasses.replace(measured(4.0, rows=64), cusparselt=None)
    with use_table(table(without, measured(6.0, rows=256))):
        assert algorithm_of(lowered_here(128)) == 5  # of 256 rows, as there both were measured
        assert is_prefill(lowered_here(64))


@needs_prefill
def test_before_the_librarys_own_choice_comes_the_prefill_kernel(h200, hopper, monkeypatch):
    for tuned in (None, table(record(4096, library=5.0))):
        with use_table(tuned):
            assert is_prefill(lowered_here(64))
            assert algorithm_of(lowered_here(64, backend="cusparselt")) == -1
    with monkeypatch.context() as small, use_table(None):
        small.setattr(_ffi_cuda, "PREFILL_MAX_ROWS", 40)
        jax.clear_caches()
        assert algorithm_of(lowered_here(64)) == -1
        small.setattr(_ffi_cuda, "PREFILL_MAX_ROWS", 64)
        small.setattr(_ffi_cuda, "MAX_WEIGHTS", math.prod(SHAPE) - 1)
        jax.clear_caches()
        assert algorithm_of(lowered_here(64)) == -1
    jax.clear_caches()
    monkeypatch.setattr(_ffi_cusparselt, "_find", lambda: "it is not installed.")
    with use_table(None):
        assert is_prefill(lowered_here(64))


@needs_prefill
def test_a_prefill_kernel_that_failed_is_taken_only_where_it_was_measured_since(h200, hopper):
    kernel, reason = KernelTime(4.0), {"prefill": "with 64 rows: SIGABRT"}
    for failed in (
        dataclasses.replace(record(64, library=5.0), failed=reason),
        dataclasses.replace(record(64), out=8192, channels=8192, failed=reason),
        dataclasses.replace(record(64, library=5.0), failed=reason, prefill=kernel),
    ):
        for rows in (64, 128, 4096):
            with use_table(table(failed)):
                assert not is_prefill(lowered_here(rows))
    measured = dataclasses.replace(record(128, library=5.0), prefill=kernel)
    with use_table(table(failed, measured)):
        assert is_prefill(lowered_here(128))
        assert not is_prefill(lowered_here(64))
        assert not is_prefill(lowered_here(256))


@needs_prefill
def test_the_prefill_kernel_is_for_hopper_alone(h200, monkeypatch):
    assert _ffi_cuda.prefill_runs("9.0")
    assert not _ffi_cuda.prefill_runs("8.0")
    assert not _ffi_cuda.prefill_runs(None)
    with _ffi_cuda.traced_calls():  # what is exported runs on other GPUs
        assert not _ffi_cuda.prefill_runs("9.0")
    assert is_prefill(lowered_here(64, backend="prefill"))


@needs_kernel
def test_the_machines_own_table_is_asked(h200):
    table_file.save_table(
        table(record(16, decode=5.0, plan=PLAN), record(64, library=5.0, workspace=7))
    )
    assert PLAN_TEXT in lowered_here(16)
    text = lowered_here(60)
    assert algorithm_of(text) == 5
    assert "tensor<1060xui8>" in text  # as the library says for these rows
    assert h200 == [(60, *SHAPE, "float16", Algorithm(5))]
    with use_table(None):
        assert algorithm_of(lowered_here(60)) == -1


def test_another_table_is_traced_anew(h200):
    """Though what is traced inside is remembered by JAX."""
    for id in (1, 2):
        tuned = table(record(64, library=5.0, id=id))
        for _ in range(2):
            with use_table(tuned):
                assert algorithm_of(lowered_here(64)) == id
    assert len(h200) == 2
    with use_table(None):
        assert algorithm_of(lowered_here(64)) == -1


def test_an_algorithm_that_the_library_refuses_is_left_to_it(h200, caplog):
    table_file.save_table(table(record(64, library=5.0, id=9)))
    with caplog.at_level(logging.WARNING):
        assert algorithm_of(lowered_here(64)) == -1
        jax.clear_caches()
        assert algorithm_of(lowered_here(64)) == -1
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("esparse_jax")]
    assert "was the best in the tuning table for 64x128, or for the product nearest to it" in line
    assert "refuses it for 64 rows and chooses itself" in line


def test_a_dtype_that_was_not_measured_is_said_once(h200, packaged, caplog, monkeypatch):
    monkeypatch.setattr(matmul_file, "_log_untuned", functools.cache(_log_untuned.__wrapped__))
    table_file.save_table(table(dataclasses.replace(record(64, library=5.0), dtype="bfloat16")))
    with caplog.at_level(logging.WARNING):
        lowered_here(16)
        with use_table(None):
            lowered_here(64)
        lowered_here(64, algorithm=Algorithm(3))
        assert not caplog.records
        for rows in (64, 128):
            assert algorithm_of(lowered_here(rows)) == -1
    (line,) = [r.getMessage() for r in caplog.records]
    assert "no float16 product near to one of this many rows was measured on this GPU" in line
    assert "`esparse tune --dtype float16`" in line


def test_a_table_for_another_gpu_is_an_error(h200):
    other = table(record(64, library=5.0), machine=H200._replace(device="NVIDIA H100"))
    with (
        pytest.raises(ValueError, match=r"is for NVIDIA H100 .*; here is NVIDIA H200"),
        use_table(other),
    ):
        lowered_here(64)
    with use_table(other):
        assert algorithm_of(lowered_here(64, backend="cusparselt")) == -1  # it is not asked


# ---- through the stand-in of the library, which computes


def test_the_stand_in_runs_the_algorithm_of_the_table(fake, no_prefill, monkeypatch):
    monkeypatch.setattr(_ffi_cusparselt, "device", lambda: jax.devices("cpu")[0])
    machine = Machine(jax.devices("cpu")[0].device_kind, "9.0", "0.8.0")
    dense, x = weight24(SHAPE, "float16"), random_x(20, 128)
    blob = blob24(compress24(dense))
    for id in (3, 6):
        with use_table(table(record(32, library=5.0, id=id), machine=machine)):
            assert_product(sparse_matmul(x, blob), x, dense)
        assert fake.last("algorithm") == id
    with use_table(None):
        sparse_matmul(x, blob).block_until_ready()
    assert fake.last("algorithm") == 2  # its own choice


def test_a_weight_of_the_librarys_own_form_has_its_algorithm(fake, monkeypatch):
    monkeypatch.setattr(_ffi_cusparselt, "device", lambda: jax.devices("cpu")[0])
    machine = Machine(jax.devices("cpu")[0].device_kind, "9.0", "0.8.0")
    dense = weight24((80, 48), "float16")
    blob, x = device_blob24(compress24(dense)), random_x(4, 48)
    measured = Record(80, 48, "float16", 8, None, None, LibraryTime(5.0, Algorithm(6)))
    with use_table(TuningTable(machine, "1", (measured,))):
        assert_product(sparse_matmul(x, blob), x, dense)
        assert fake.last("algorithm") == 6
        sparse_matmul(x, blob, algorithm=Algorithm(1)).block_until_ready()
        assert fake.last("algorithm") == 1
        sparse_matmul(x, blob, backend="cusparselt").block_until_ready()
        assert fake.last("algorithm") == 2
