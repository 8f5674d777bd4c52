"""Tuning tables: what is looked up in them, how they are kept and checked, sparse or dense."""

import dataclasses
import inspect
import json
import logging
import math
import os
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from esparse_jax.sparse import (
    BUCKETS,
    Algorithm,
    Machine,
    Record,
    SplitKMode,
    TuningTable,
    choose_form,
    load_table,
    merge_tables,
    save_table,
    stored_table,
    table_file,
    use_table,
)
from esparse_jax.sparse import table as table_module
from esparse_jax.sparse.table import (
    KernelTime,
    LibraryTime,
    Way,
    bucket,
    resolve_table,
    table_choice,
)

ABACUS = Machine("Abacus 9 (SXM)", "9.0", "0.8.0")
PLAN = {"tiles": 2, "warps": 8, "blocks": 1, "interleave": 2, "resident": 1}
SHAPE = (4096, 1024)


def record(rows=16, *, dense=None, decode=None, library=None, shape=SHAPE, dtype="float16"):
    return Record(
        *shape,
        dtype,
        rows,
        dense,
        None if decode is None else KernelTime(decode),
        None if library is None else LibraryTime(library, Algorithm(3)),
    )


def table(*records, machine=ABACUS) -> TuningTable:
    return TuningTable(machine, "0.11.2", records)


FULL = table(
    Record(
        *SHAPE,
        "float16",
        16,
        11.1,
        KernelTime(7.5, PLAN, prefetch=7.25),
        LibraryTime(10.5, Algorithm(12, split_k=-1, workspace_bytes=4096)),
        {"cusparselt, id 17": "with 16 rows: no answer within 20 s"},
    ),
    Record(
        *SHAPE,
        "float16",
        64,
        12.0,
        None,
        LibraryTime(10.0, Algorithm(3, 2, SplitKMode.TWO_KERNELS, 1, 0)),
        partial=True,
        prefill=KernelTime(9.5, {"rows": 256, "cluster": 2}),
        chained=True,
    ),
    Record(80, 48, "bfloat16", 1, None, KernelTime(2.25)),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nobody's files are read or written, and nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored_table.cache_clear()
    yield
    stored_table.cache_clear()


# ---- looking up


@given(measured=st.sets(st.sampled_from(BUCKETS), min_size=1), rows=st.integers(1, 2 * BUCKETS[-1]))
def test_the_record_of_the_bucket_is_found(measured, rows):
    found = table(*map(record, measured)).find(SHAPE, np.dtype("float16"), rows)
    assert (found and found.rows) == (bucket(rows) if bucket(rows) in measured else None)


def test_only_what_was_measured_is_found():
    ours = table(record(16), record(16, dtype="bfloat16", dense=4.0))
    assert ours.find(SHAPE, "bfloat16", 9).dense == 4.0
    assert ours.find((1024, 4096), "float16", 9) is None
    assert ours.find(SHAPE, "float32", 9) is None
    assert table().find(SHAPE, "float16", 3) is None


def test_ways_are_sorted_by_their_times():
    assert [way.kind for way in record(decode=7.0, library=9.0).ways()] == ["decode", "cusparselt"]
    library, decode = record(decode=7.0, library=6.0).ways()
    assert (library.kind, library.algorithm, decode.kind) == ("cusparselt", Algorithm(3), "decode")
    assert record(decode=7.0, library=6.0).sparse == 6.0
    many = dataclasses.replace(record(64, library=9.0), prefill=KernelTime(8.0, {"rows": 128}))
    assert [way.kind for way in many.ways()] == ["prefill", "cusparselt"]
    assert many.ways()[0].plan == {"rows": 128}
    assert many.sparse == 8.0
    early = KernelTime(7.0, PLAN, prefetch=5.5)
    both = dataclasses.replace(record(library=6.0), decode=early)
    assert both.ways() == [library, Way("decode", 7.0, PLAN)]
    assert both.ways(prefetch=True) == [Way("decode", 5.5, prefetch=True), library]
    assert both.sparse == 6.0
    slower = dataclasses.replace(both, decode=KernelTime(7.0, PLAN, prefetch=7.5))
    assert slower.ways(prefetch=True) == [library, Way("decode", 7.0, PLAN)]
    untimed = dataclasses.replace(both, decode=KernelTime(7.0, PLAN))
    assert untimed.ways(prefetch=True) == [library, Way("decode", 7.0, prefetch=True)]
    assert record(dense=1.0).ways() == []
    assert record(dense=1.0).sparse is None


def test_buckets_serve_the_rows_up_to_them():
    assert [bucket(rows) for rows in (1, 2, 8, 9, 17, 16384, 10**6)] == [
        1, 8, 8, 16, 32, 16384, 16384,
    ]  # fmt: skip


def test_a_product_is_in_a_table_once():
    with pytest.raises(ValueError, match="once; 4096x1024 float16 with 16 rows is twice"):
        table(record(16), record(16, dense=3.0))


# ---- files


def test_a_table_comes_back_as_it_was(tmp_path):
    file = save_table(FULL, tmp_path / "new" / "table.json")
    again = load_table(file)
    assert (again.machine, again.jax) == (FULL.machine, FULL.jax)
    assert again.records == FULL.records
    assert not math.isnan(json.loads(file.read_text())["records"][0]["rows"])
    assert [r.key for r in again.records] == sorted(r.key for r in again.records)
    assert os.listdir(file.parent) == ["table.json"]


def test_saving_keeps_what_is_there(tmp_path):
    file = tmp_path / "table.json"
    save_table(table(record(16, dense=5.0), record(32, dense=6.0)), file)
    newer = TuningTable(ABACUS, "0.12.0", (record(32, dense=7.0), record(64, dense=8.0)))
    save_table(newer, file)
    both = load_table(file)
    assert [(r.rows, r.dense) for r in both.records] == [(16, 5.0), (32, 7.0), (64, 8.0)]
    assert both.jax == "0.12.0"


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    file = tmp_path / "table.json"
    save_table(table(record()), file)
    before = file.read_bytes()
    other = table(record(), machine=ABACUS._replace(cusparselt="0.8.1"))
    with pytest.raises(
        ValueError, match=r"0\.8\.0 and Abacus 9 \(SXM\) \(9\.0\) with cuSPARSELt 0"
    ):
        save_table(other, file)
    assert file.read_bytes() == before
    file.write_text("{}")
    with pytest.raises(ValueError, match="no tuning table"):
        save_table(table(record()), file)
    assert file.read_text() == "{}"


def test_a_file_is_replaced_in_one_go(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    save_table(table(record()), file)
    before = file.read_bytes()

    def full(self, text, encoding):
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_table(table(record(64)), file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["table.json"]


def test_where_tables_are_kept(tmp_path, monkeypatch):
    name = "abacus-9-sxm-9.0-cusparselt-0.8.0.json"
    assert table_file(ABACUS) == tmp_path / "cache" / "esparse_jax" / "tuning" / name
    assert save_table(table(record())) == table_file(ABACUS)
    assert table_file(ABACUS).exists()
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    for value in ("", "relative"):  # which the XDG specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert table_file(ABACUS) == home / ".cache" / "esparse_jax" / "tuning" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    without = table_file(ABACUS._replace(cusparselt=None))
    assert without == home / ".cache/esparse_jax/tuning/abacus-9-sxm-9.0-cusparselt-none.json"


def test_machines_are_not_mixed():
    with pytest.raises(ValueError, match="different machines cannot be merged"):
        merge_tables(table(record()), table(record(), machine=ABACUS._replace(capability="9.1")))


def test_what_some_algorithms_gave_replaces_a_full_search_only_where_it_is_faster():
    def with_library(microseconds, partial):
        time = None if microseconds is None else LibraryTime(microseconds, Algorithm(1))
        return dataclasses.replace(record(), cusparselt=time, partial=partial)

    def merged(older, newer):
        (found,) = merge_tables(table(older), table(newer)).records
        return found

    full, slower, faster = (
        with_library(*each) for each in ((9.0, False), (10.0, True), (8.0, True))
    )
    none = with_library(None, True)
    for newer, wins in ((slower, full), (none, full), (faster, faster)):
        assert merged(full, newer) is wins
    assert merged(faster, slower) is slower
    assert merged(faster, full) is full
    assert merged(with_library(None, False), slower) is slower
    kernel = KernelTime(7.0, {"rows": 128})
    library = {"cusparselt, id 3": "with 64 rows: no answer"}
    failed = dataclasses.replace(full, failed={"prefill": "with 64 rows: SIGABRT", **library})
    with_prefill = merged(failed, dataclasses.replace(slower, prefill=kernel))
    assert with_prefill == dataclasses.replace(full, prefill=kernel, failed=library)
    early = KernelTime(5.0, PLAN, prefetch=4.5)
    with_decode = merged(failed, dataclasses.replace(slower, decode=early))
    assert with_decode == dataclasses.replace(failed, decode=early)
    wrong = {"prefetch": "with 1 rows: wrong numbers", "cusparselt, id 9": "with 64 rows: SIGABRT"}
    late = KernelTime(5.0)
    found = merged(with_decode, dataclasses.replace(slower, decode=late, failed=wrong))
    assert found.decode == late
    assert found.failed == failed.failed | {"prefetch": wrong["prefetch"]}
    broken = {"decode": "with 1 rows: SIGABRT", "decode, tiles 2": "with 1 rows: not tried"}
    found = merged(found, dataclasses.replace(slower, failed=broken))
    assert (found.decode, found.failed) == (None, failed.failed | broken)
    again = dataclasses.replace(slower, prefill=KernelTime(7.5))
    assert merged(with_prefill, again) == dataclasses.replace(with_prefill, prefill=again.prefill)
    assert merged(with_prefill, slower) is with_prefill
    chained = dataclasses.replace(again, chained=True)  # slower, by another measure
    assert merged(with_prefill, chained) is chained
    assert merged(chained, with_prefill) is with_prefill


# ---- what is no table


def _changed(**changes) -> dict:
    fields = json.loads(json.dumps(table_module._to_json(FULL)))
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split("__")]
        node = fields
        for part in parents:
            node = node[part]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return fields


# Record 1 has all fields.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "the table, format_version is 2; this version of the package rea"),
        ({"format_version": ...}, "format_version is None"),
        ({"date": "today"}, "it has the unknown date"),
        ({"jax": ...}, "it lacks jax"),
        ({"device": 7}, "device is 7; it must be a text"),
        ({"capability": "9"}, "capability is '9'; it is like \"9.0\""),
        ({"cusparselt": 800}, "cusparselt is 800; it must be a version or null"),
        ({"cusparselt": "new"}, "cusparselt is 'new'; it is like \"0.8.0\""),
        ({"records": {}}, "records is {}; it must be a list"),
        ({"records__1": 5}, "record 1, it is 5; it must be an object"),
        ({"records__1__rows": 20}, "rows is 20; it is one of 1, 8, 16, 32"),
        ({"records__1__rows": True}, "rows is True; it is one of"),
        ({"records__1__rows": "16"}, "rows is '16'; it is one of"),
        ({"records__1__rows": ...}, "it lacks rows"),
        ({"records__1__speed": 5}, "it has the unknown speed"),
        ({"records__1__out": 100}, "out is 100; a 2:4 weight has multiples of 16"),
        ({"records__1__channels": 0}, "channels is 0; a 2:4 weight has"),
        ({"records__1__channels": 64.0}, "channels is 64.0; it must be a whole number"),
        ({"records__1__dtype": "float32"}, "dtype is 'float32'; it is one of float16, bfloat16"),
        ({"records__1__dense": 0}, "dense is 0; a time is a positive number of microseconds"),
        ({"records__1__dense": -3.5}, "dense is -3.5; a time is"),
        ({"records__1__dense": float("nan")}, "dense is nan; a time is"),
        ({"records__1__dense": float("inf")}, "dense is inf; a time is"),
        ({"records__1__dense": "11"}, "dense is '11'; a time is"),
        ({"records__1__decode": 7.5}, "decode is 7.5; it must be an object"),
        ({"records__1__decode": {}}, "decode lacks microseconds"),
        ({"records__1__decode__microseconds": False}, "decode's microseconds is False; a time"),
        ({"records__1__decode__prefetch": -1}, "decode's prefetch is -1; a time is a positive"),
        (
            {"records__1__prefill": {"microseconds": 5.0, "prefetch": 5.0}},
            "prefill has the unknown prefetch",
        ),
        ({"records__1__decode__plan": []}, r"plan is \[\]; it must be an object"),
        ({"records__1__decode__plan__tile": 1}, "plan has the unknown tile"),
        ({"records__1__decode__plan__warps": 5}, "warps of a plan is 5; it is one of 4, 8, 16"),
        ({"records__1__cusparselt__id": ...}, "cusparselt lacks id"),
        ({"records__1__cusparselt__id": -1}, "id of an algorithm must be a number from 0"),
        ({"records__1__cusparselt__id": 1.0}, "id is 1.0; it must be a whole number"),
        ({"records__1__cusparselt__split_k": 0}, r"split_k of an algorithm must be -1 \(segment-K"),
        ({"records__1__cusparselt__speed": 1}, "cusparselt has the unknown speed"),
        ({"records__1__failed": []}, r"failed is \[\]; it must be an object"),
        ({"records__1__failed": {"a": 1}}, r"failed\['a'\] is 1; it must be a text"),
        ({"records__2__rows": 16}, "holds a product once; 4096x1024 float16 with 16 rows"),
    ],
)
def test_every_value_is_checked(tmp_path, changes, message):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(_changed()))
    assert load_table(file).records == FULL.records
    file.write_text(json.dumps(_changed(**changes)))
    with pytest.raises(ValueError, match=f"table.json is no tuning table: in .*{message}") as error:
        load_table(file)
    assert str(error.value).endswith("another file, or remove this one.")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"table"'])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is (not valid JSON|no tuning table)"):
        load_table(tmp_path / "table.json")


# ---- which table applies


def test_tables_of_the_package_are_found_by_machine(packaged):
    save_table(FULL, packaged / "any-name.json")
    other = ABACUS._replace(device="Abacus 10")
    save_table(table(record(64), machine=other), packaged / "other.json")
    (packaged / "README.md").write_text("no table")
    found = stored_table(ABACUS)
    assert found.table.records == FULL.records
    assert found.files == (str(packaged / "any-name.json"),)
    assert stored_table(other).table.records == (record(64),)
    for missing in ({"capability": "8.0"}, {"device": "Abacus 8"}):
        assert stored_table(ABACUS._replace(**missing)) == (None, (), ())


@pytest.mark.parametrize("version", ["0.8.1", None])
def test_what_it_says_of_our_kernels_holds_for_any_version_of_the_library(packaged, version):
    failed = {"prefill, rows 64": "with 16 rows: SIGABRT", "cusparselt, id 9": "with 16 rows: hung"}
    both = dataclasses.replace(record(16, dense=9.0, decode=5.0, library=4.0), failed=failed)
    save_table(table(both, record(64, library=4.0)), packaged / "a.json")
    machine = ABACUS._replace(cusparselt=version)
    found = stored_table(machine)
    assert (found.others, found.table.machine) == (("0.8.0",), machine)
    assert found.table.records == (  # nothing is known of 64 rows
        dataclasses.replace(
            record(16, dense=9.0, decode=5.0),
            failed={"prefill, rows 64": failed["prefill, rows 64"]},
            partial=True,
        ),
    )
    # What was measured with this version comes first, whatever its file is called.
    save_table(table(record(16, decode=6.0, library=7.0), machine=machine), packaged / "0.json")
    stored_table.cache_clear()
    found = stored_table(machine)
    assert found.table.records == (record(16, decode=6.0, library=7.0),)
    assert found.files == (str(packaged / "a.json"), str(packaged / "0.json"))
    assert stored_table(ABACUS).table.find(SHAPE, "float16", 16) == both


def test_a_table_under_anothers_name_is_not_taken_in_part(packaged):
    machine = ABACUS._replace(cusparselt="0.8.1")
    save_table(table(record(16, decode=5.0)), table_file(machine))
    assert stored_table(machine) == (None, (), ())


def test_what_is_no_table_is_not_taken_for_one():
    told = r"load_table\(FILE\), or None; got 'table\.json'"
    with pytest.raises(TypeError, match=told):
        next(inspect.unwrap(use_table)("table.json"))  # without the checks of its annotations


def test_the_users_records_come_before_those_of_the_package(packaged):
    save_table(table(record(16, dense=1.0), record(32, dense=2.0)), packaged / "t.json")
    file = save_table(table(record(32, dense=3.0)))
    found = stored_table(ABACUS)
    assert [r.dense for r in found.table.records] == [1.0, 3.0]
    assert found.files == (str(packaged / "t.json"), str(file))
    save_table(table(record(32, dense=9.0)))
    assert stored_table(ABACUS) is found  # read once


def test_a_broken_file_is_passed_over_with_one_line(packaged, caplog):
    save_table(table(record()), packaged / "t.json")
    table_file(ABACUS).parent.mkdir(parents=True)
    table_file(ABACUS).write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert stored_table(ABACUS).table.records == (record(),)
        stored_table(ABACUS)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"a tuning table is not used: {table_file(ABACUS)} is no tuning table")


def test_all_tables_that_come_with_the_package_are_tables():
    folder = Path(table_module.__file__).parent / "tables"
    for file in folder.glob("*.json"):
        assert load_table(file).records


def test_a_table_in_use_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(table_module, "this_machine", lambda: ABACUS)
    ours = save_table(table(record(64)))
    given_table = table(record(32))
    assert resolve_table(table_choice()).records == load_table(ours).records
    with use_table(given_table):
        assert resolve_table(table_choice()) is given_table
        with use_table(None):
            assert resolve_table(table_choice()) is None
        assert resolve_table(table_choice()) is given_table
    assert resolve_table(table_choice()).records == (record(64),)
    with pytest.raises(KeyError), use_table(given_table):
        raise KeyError
    assert table_choice() == "machine"


def test_a_table_for_another_machine_is_refused_where_there_is_one(monkeypatch):
    monkeypatch.setattr(table_module, "this_machine", lambda: ABACUS._replace(cusparselt=None))
    with pytest.raises(ValueError, match=r"for Abacus 9 .*0\.8\.0; here is .* with no cuSPARSELt"):
        resolve_table(FULL)
    monkeypatch.setattr(table_module, "this_machine", lambda: None)
    assert resolve_table(FULL) is FULL  # for a computation that is lowered for elsewhere
    assert resolve_table("machine") is None


# ---- sparse or dense


def form(rows, *records, shape=SHAPE, dtype="float16"):
    return choose_form(shape, dtype, rows, table(*records))


def test_the_faster_form_over_the_range_is_chosen():
    records = [
        record(1, dense=10.0, decode=5.0),
        record(8, dense=10.0, decode=5.0),
        record(16, dense=10.0, decode=30.0, library=20.0),
        record(32, dense=10.0, library=20.0),
    ]
    for rows, want in (
        ((1, 1), "sparse"),
        ((1, 8), "sparse"),
        ((9, 16), "dense"),
        ((20, 30), "dense"),
        ((1, 16), "sparse"),  # 5 * 5 * 20 < 10 ** 3
        ((1, 32), "sparse"),  # a tie: 5 * 5 * 20 * 20 = 10 ** 4
        ((2, 32), "dense"),  # 5 * 20 * 20 > 10 ** 3
    ):
        choice = form(rows, *records)
        assert choice.form == want, rows
    assert form((1, 16), *records).sparse == pytest.approx(500 ** (1 / 3))
    assert form((2, 32), *records).dense == pytest.approx(10.0)
    assert form((9, 16), *records).reason == (
        "4096x1024 float16 takes 20.0 us 2:4 and 10.0 us dense for 9 to 16 rows"
    )


@given(
    times=st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)), min_size=13, max_size=13),
    bounds=st.tuples(st.integers(1, 20000), st.integers(1, 20000)),
)
def test_the_chosen_form_is_never_the_slower_one(times, bounds):
    records = [
        record(rows, dense=dense, decode=sparse)
        for rows, (dense, sparse) in zip(BUCKETS, times, strict=True)
    ]
    low, high = sorted(bounds)
    choice = form((low, high), *records)
    served = [i for i, rows in enumerate(BUCKETS) if bucket(low) <= rows <= bucket(high)]
    dense, sparse = (
        math.exp(sum(math.log(times[i][j]) for i in served) / len(served)) for j in (0, 1)
    )
    assert choice.dense == pytest.approx(dense)
    assert choice.sparse == pytest.approx(sparse)
    assert choice.form == ("dense" if choice.dense < choice.sparse else "sparse")


def test_what_was_not_measured_is_sparse():
    slow = record(16, dense=1.0, decode=50.0)
    assert form((16, 16), slow).form == "dense"
    for rows, records in (
        ((1, 16), [slow]),
        ((16, 17), [slow]),
        ((16, 64), [slow, record(32, dense=1.0, library=9.0), record(64, dense=1.0)]),
    ):
        choice = form(rows, *records)
        assert (choice.form, choice.sparse, choice.dense) == ("sparse", None, None)
        assert "was not measured at rows" in choice.reason
    assert form((16, 16), slow, shape=(64, 64)).reason == (
        "64x64 float16 was not measured at rows 16 (esparse tune)"
    )
    assert form((16, 16), slow, dtype="bfloat16").form == "sparse"


def test_the_table_in_use_is_asked(monkeypatch):
    monkeypatch.setattr(table_module, "this_machine", lambda: None)
    choice = choose_form(SHAPE, "float16", (1, 16))
    assert (choice.form, choice.reason) == (
        "sparse", "there is no tuning table for this machine (esparse tune)",
    )  # fmt: skip
    with use_table(table(record(16, dense=1.0, decode=2.0))):
        assert choose_form(SHAPE, "float16", (16, 16)).form == "dense"


@pytest.mark.parametrize("rows", [(0, 4), (8, 4), (-1, -1)])
def test_a_range_that_is_none_is_refused(rows):
    with pytest.raises(ValueError, match=r"smallest and the largest number of rows of x, from 1"):
        choose_form(SHAPE, "float16", rows)


def test_records_are_plain_values():
    one = record(16, dense=2.0)
    assert dataclasses.replace(one, dense=2.0) == one
    assert TuningTable(ABACUS, "1", (one,)) != TuningTable(ABACUS, "1", (one,))
    assert len({TuningTable(ABACUS, "1"), TuningTable(ABACUS, "1")}) == 2
