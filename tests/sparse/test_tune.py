"""The search's logic, with a child process that answers as a script says; and the child's, here."""

import ctypes
import dataclasses
import json
import logging
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esparse_jax.sparse import (
    BUCKETS,
    Algorithm,
    Limits,
    Machine,
    Record,
    SplitKMode,
    TuneProgress,
    TuningTable,
    _ffi_cuda,
    _ffi_cusparselt,
    blob24,
    sparse_matmul,
    tune_shape,
)
from esparse_jax.sparse import _tune_worker as worker_file
from esparse_jax.sparse import tune as tune_file
from esparse_jax.sparse._timing import (
    Chain,
    chain_inputs,
    chain_rotation,
    random_24,
    rotation,
    seconds,
)
from esparse_jax.sparse._tune_worker import Bench
from esparse_jax.sparse.compress import check24, compress24
from esparse_jax.sparse.table import KernelTime, LibraryTime
from esparse_jax.sparse.tune import decode_plans, library_algorithms, prefill_plans, rows_left

SHAPE = (512, 256)
FACTS = {
    "device": "Abacus 9",
    "capability": "9.0",
    "cusparselt": "0.8.0",
    "jax": "0.11.2",
    "decode": True,
    "algorithms": 3,
    "split_k": 1,
}
QUICK = Limits(start=60.0, candidate=0.5, dense=1.0, restarts=20)
PLAN = {"tiles": 2, "warps": 8, "blocks": 1, "interleave": 2, "resident": 1}
PLAN_NAME = "decode, tiles 2, warps 8, blocks 1, interleave 2, resident 1"


class Worker:
    """The scripted child: what it was asked, and what it is to answer."""

    def __init__(self, folder):
        self.folder = folder
        self.command = (sys.executable, "-m", "fake_tune_worker", str(folder))

    def write(self, answers=None, default=20.0, **facts):
        script = {"facts": FACTS | facts, "answers": answers or {}, "default": default}
        if "error" in facts:
            script["facts"] = facts
        (self.folder / "script.json").write_text(json.dumps(script))

    def asked(self) -> list[dict]:
        lines = (self.folder / "asked.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "name" in line]

    def starts(self) -> list[dict]:
        lines = (self.folder / "asked.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "job" in line]

    def tune(self, rows, limits=QUICK, **options):
        table = tune_shape(SHAPE, rows=rows, limits=limits, worker=self.command, **options)
        return {record.rows: record for record in table.records}


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


# ---- what is asked, and what comes of it


def test_every_way_is_measured_and_the_best_again(worker):
    worker.write(
        {
            "dense": 30.0,
            "decode": 12.0,
            PLAN_NAME: 9.0,
            "prefetch": 11.0,
            "cusparselt, id 2, split_k -1": {"microseconds": 15.0, "workspace_bytes": 64},
        }
    )
    seen: list[TuneProgress] = []
    table = tune_shape(
        SHAPE, dtype="bfloat16", rows=[16], limits=QUICK, progress=seen.append,
        worker=worker.command,
    )  # fmt: skip
    assert table.machine == Machine("Abacus 9", "9.0", "0.8.0")
    assert table.jax == "0.11.2"
    (record,) = table.records
    assert (record.out, record.channels, record.dtype, record.rows) == (*SHAPE, "bfloat16", 16)
    assert record.dense == 30.0
    assert record.decode == KernelTime(9.0, PLAN, prefetch=11.0)
    assert record.cusparselt == LibraryTime(15.0, Algorithm(2, split_k=-1, workspace_bytes=64))
    assert record.failed == {}
    assert record.chained

    asked = worker.asked()
    coarse = [line["name"] for line in asked if line["effort"] == "coarse"]
    algorithms = [f"cusparselt, id {i}{split}" for split in ("", ", split_k -1") for i in range(3)]
    assert coarse[0] == "dense"
    assert coarse[1] == "decode"
    assert coarse[82] == "prefetch"
    assert len(coarse) == 2 + 80 + 1 + 6
    assert coarse[-6:] == algorithms
    finals = [line["name"] for line in asked if line["effort"] == "thorough"]
    assert finals.count("decode") == finals.count(PLAN_NAME) == 3
    assert finals.count("cusparselt, id 2, split_k -1") == 3
    assert finals[0] != finals[1]  # they take turns
    chained = [line["name"] for line in asked if line["effort"] == "chain"]
    assert chained == [PLAN_NAME, "cusparselt, id 2, split_k -1"]
    # Each is told the best so far of its kind, so that it need not be timed if it is hopeless.
    assert [line["best"] for line in asked[1:3]] == [None, 12.0]
    assert asked[-1]["best"] is None
    assert [(p.done, p.total) for p in seen] == [(i + 1, 89) for i in range(89)]
    assert {(p.shape, p.rows) for p in seen} == {(SHAPE, 16)}
    (start,) = worker.starts()
    assert start["preallocate"] == "false"
    assert start["job"] == {
        "out": 512, "channels": 256, "dtype": "bfloat16", "rows": [16], "platform": "cuda",
    }  # fmt: skip


def test_the_prefill_kernel_and_its_plans_are_for_more_than_some_rows(worker):
    def plan(rows):
        return {"rows": rows, "outputs": 128, "cluster": 1, "split": 4}

    names = [f"prefill, rows {rows}, outputs 128, cluster 1, split 4" for rows in (16, 64)]
    times = {"prefill": 18.0} | dict.fromkeys(names, 15.0)
    worker.write(times, prefill=True, decode=False, algorithms=0)
    records = worker.tune([1, 8, 64])
    assert records[1].prefill is None
    asked = worker.asked()
    assert {line["rows"] for line in asked if line["name"].startswith("prefill")} == {8, 64}
    for rows, tile in ((8, 16), (64, 64)):
        assert records[rows].prefill == KernelTime(15.0, plan(tile))
        assert records[rows].sparse == 15.0
        lines = [line for line in asked if line["rows"] == rows and line["effort"] == "coarse"]
        coarse = [line["name"] for line in lines]
        assert coarse[:2] == ["dense", "prefill"]
        assert len(coarse) == 1 + 1 + len(prefill_plans(rows)) == {8: 8, 64: 10}[rows]


def test_the_last_measurements_decide(worker):
    """The winner is the best of the thorough times, not of the coarse ones."""
    worker.write(
        {
            "cusparselt, id 0": [10.0, 18.0, 18.0, 18.0],
            "cusparselt, id 1": [12.0, 14.0, 50.0, 13.0, {"microseconds": 21.0}],
        },
        decode=False,
    )
    (record,) = worker.tune([64]).values()
    # What is kept is its time in a chain, which says nothing of its workspace.
    assert record.cusparselt == LibraryTime(21.0, Algorithm(1, workspace_bytes=0))
    assert record.decode is None


def test_who_fails_in_a_chain_gives_way_to_the_next(worker):
    workspace = {"microseconds": 11.0, "workspace_bytes": 48}
    worker.write(
        {
            PLAN_NAME: [8.0, 8.0, 8.0, 8.0, {"refused": "no memory"}],
            "decode": [10.0, 10.0, 10.0, 10.0, 12.5],
            "cusparselt, id 0": [10.0, 10.0, 10.0, 10.0, "crash"],
            "cusparselt, id 1": [workspace, workspace, workspace, workspace, 15.0],
        }
    )
    (record,) = worker.tune([16]).values()
    assert record.decode == KernelTime(12.5, prefetch=20.0)
    assert record.cusparselt == LibraryTime(15.0, Algorithm(1, workspace_bytes=48))
    assert list(record.failed) == ["cusparselt, id 0"]

    rule = [10.0, 10.0, 10.0, 10.0, {"refused": "no memory"}]
    worker.write({"decode": rule, PLAN_NAME: [10.0, 10.0, 10.0, 10.0, 11.5]}, algorithms=0)
    (record,) = worker.tune([8]).values()
    assert record.decode == KernelTime(11.5, PLAN, prefetch=20.0)
    worker.write({"decode": rule, "dense": 30.0}, default={"refused": "no"}, algorithms=0)
    (record,) = worker.tune([1]).values()
    assert (record.decode, record.failed) == (None, {})  # it computes, and may be used elsewhere


@pytest.mark.parametrize(
    ("rule", "plan", "wins"),
    [
        ([10.0, 10.0, 10.0, 10.0], [9.0, 9.7, 9.7, 9.7], True),
        ([10.0, 10.0, 10.0, 10.0], [9.0, 9.9, 9.9, 9.9], False),  # less than 2 %
        ([10.0, 9.5, 10.0, 10.1, 10.0], [9.0] + 3 * [9.5], False),  # less than the rule's spread
    ],
)
def test_a_plan_must_beat_the_rule_by_more_than_noise(worker, rule, plan, wins):
    worker.write({"decode": rule, PLAN_NAME: plan}, algorithms=0)
    (record,) = worker.tune([1]).values()
    assert record.decode == KernelTime(*((9.7, PLAN) if wins else (10.0, None)), prefetch=20.0)
    assert record.cusparselt is None


def test_a_weight_that_is_fetched_early_is_timed_beside(worker):
    worker.write({"decode": 10.0, "prefetch": {"wrong": 40.0}}, algorithms=0)
    records = worker.tune([1, 8])
    assert {rows: record.decode for rows, record in records.items()} == {
        1: KernelTime(10.0), 8: KernelTime(10.0),
    }  # fmt: skip
    failed = {"prefetch": "with 1 rows: wrong numbers, 40 times too far"}
    assert records[1].failed == records[8].failed == failed  # and is not asked again
    assert [line["name"] for line in worker.asked()].count("prefetch") == 1
    # XLA compiles a chain of it: it has as long as the dense product.
    worker.write({"decode": 10.0, "prefetch": {"microseconds": 9.0, "after": 0.7}}, algorithms=0)
    (record,) = worker.tune([1]).values()
    assert (record.decode, record.failed) == (KernelTime(10.0, prefetch=9.0), {})
    # Of a kernel that has no time itself it is not asked.
    before = len(worker.asked())
    worker.write({}, default={"refused": "no"}, algorithms=0)
    seen: list[TuneProgress] = []
    (record,) = worker.tune([1], progress=seen.append).values()
    assert record.decode is None
    names = [line["name"] for line in worker.asked()[before:]]
    assert "decode" in names
    assert "prefetch" not in names
    assert seen[-1].done == seen[-1].total  # but counted


def test_rows_ask_for_what_can_serve_them(worker):
    worker.write({"pieces": 17.5})
    records = worker.tune([1, 8, 32, 64])
    kinds = {
        rows: {line["name"].split(",")[0] for line in worker.asked() if line["rows"] == rows}
        for rows in (1, 8, 32, 64)
    }
    assert kinds[1] == {"dense", "decode", "prefetch"}  # the library is given 8 rows for one
    assert kinds[8] == {"dense", "decode", "prefetch", "cusparselt"}
    assert kinds[32] == {"dense", "pieces", "cusparselt"}
    assert kinds[64] == {"dense", "cusparselt"}
    assert records[1].cusparselt == records[8].cusparselt is not None
    assert records[32].decode == KernelTime(17.5)
    assert records[64].decode is None


def test_what_is_known_is_left_out(worker):
    worker.write(decode=False)
    first = tune_shape(SHAPE, rows=[64, 128], limits=QUICK, worker=worker.command)
    asked = []

    def known(machine):
        asked.append(machine)
        return first

    second = worker.tune([64, 256], known=known)
    assert list(second) == [256]
    assert asked == [Machine("Abacus 9", "9.0", "0.8.0")]
    assert worker.tune([64, 128], known=known) == {}
    assert list(worker.tune([64], known=lambda machine: None)) == [64]
    assert rows_left(first, SHAPE, "bfloat16", [64, 128]) == [64, 128]
    assert rows_left(first, SHAPE, "float16", [32, 64]) == [32]
    assert rows_left(None, SHAPE, "float16", [32, 64]) == [32, 64]


def test_refusals_are_no_failures(worker):
    worker.write({"cusparselt, id 1, split_k -1": {"refused": "not supported"}})
    (record,) = worker.tune([64]).values()
    assert record.failed == {}
    assert len(worker.starts()) == 1
    worker.write({"dense": {"refused": "out of memory"}, "cusparselt, id 0": 4.0})
    records = worker.tune([64, 128])
    for rows in (64, 128):
        assert records[rows].dense is None
        assert records[rows].failed == {"dense": f"with {rows} rows: out of memory"}
        assert records[rows].cusparselt.microseconds == 4.0


# ---- candidates that take the child with them


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("crash", r"the process died \(SIGSEGV\)"),
        ("exit", r"the process died \(exit status 1\): CUDA_ERROR_ILLEGAL_INSTRUCTION"),
        ("silent", r"the process died \(exit status 4\)"),
        ("hang", r"no answer within 0\.5 s"),
        ({"failed": "an illegal\n instruction"}, "an illegal instruction"),
        ({"failed": 50 * "again "}, r"(again )+(again|agai|aga|ag|a)?\.\.\."),
        ({"wrong": 812.5}, "wrong numbers, 812 times too far"),
        ({"wrong": float("nan")}, "wrong numbers, nan times too far"),
        (0.0, r"the impossible time of 0\.0 us"),
        (float("inf"), "the impossible time of inf us"),
    ],
)
def test_a_bad_candidate_costs_itself_alone(worker, answer, reason):
    bad = "cusparselt, id 1"
    worker.write({bad: answer, "cusparselt, id 2": 7.0})
    started = time.monotonic()
    records = worker.tune([64, 128])
    assert time.monotonic() - started < 30
    for record in records.values():
        assert record.cusparselt.algorithm == Algorithm(2, workspace_bytes=0)
        assert record.dense == 20.0
        (failed,) = record.failed.items()
        assert failed[0] == bad
        with pytest.raises(AssertionError, match=f"^with 64 rows: {reason}$"):
            raise AssertionError(failed[1])
    # One more child, which went on with what was left: nothing was measured twice.
    assert len(worker.starts()) == 2
    coarse = [(line["rows"], line["name"]) for line in worker.asked() if line["effort"] == "coarse"]
    # Split, it is not tried; and with 128 rows nothing whose time was longer with 64.
    assert len(coarse) == len(set(coarse)) == 6 + 4
    assert (128, "cusparselt, id 0") not in coarse
    assert (128, bad) not in coarse


def test_what_is_refused_when_it_is_measured_again_does_not_win(worker):
    worker.write({"cusparselt, id 0": [3.0, {"refused": "no room"}], "cusparselt, id 2": 7.0})
    (record,) = worker.tune([64]).values()
    assert record.cusparselt.algorithm == Algorithm(2, workspace_bytes=0)
    worker.write({"dense": 5.0}, default=[3.0, {"refused": "no room"}])
    (record,) = worker.tune([64]).values()
    assert record.cusparselt is None


def test_what_fails_when_it_is_measured_again_does_not_win(worker):
    worker.write({"cusparselt, id 0": [3.0, 3.0, "crash"], "cusparselt, id 2": 7.0})
    (record,) = worker.tune([64]).values()
    assert record.cusparselt.algorithm == Algorithm(2, workspace_bytes=0)
    assert list(record.failed) == ["cusparselt, id 0"]


def test_a_rule_that_computes_wrong_numbers_leaves_the_library(worker):
    worker.write({"decode": {"wrong": 3.0}})
    (record,) = worker.tune([8]).values()
    assert record.decode is None
    assert record.cusparselt is not None
    assert list(record.failed) == ["decode"]


def test_too_many_failures_end_the_search_of_a_family(worker, caplog):
    worker.write({"dense": 30.0, "decode": 9.0, "prefetch": 9.0}, default="exit", algorithms=40)
    with caplog.at_level(logging.WARNING):
        records = worker.tune([8, 16], dataclasses.replace(QUICK, restarts=2))
    assert len(worker.starts()) == 7
    for rows, record in records.items():
        assert (record.dense, record.decode.microseconds, record.cusparselt) == (30.0, 9.0, None)
        # The splits of algorithms that failed, and of those that were not tried, are not tried.
        tried = [name for name, why in record.failed.items() if "not tried" not in why]
        assert len(tried) == 6, rows
        assert len(record.failed) == 3 + 77 + 3 + 37, rows
    lines = [record.getMessage() for record in caplog.records]
    families = ("decode", "cusparselt")
    for line, family in zip(lines, families, strict=True):
        assert line.startswith(
            f"512x256: 3 candidates of {family} failed and took a new child process each;"
        )


def test_what_worked_before_is_measured_however_many_fail(worker):
    """With more rows, where algorithms begin to fail."""
    failing = {f"16: cusparselt, id {id}": "exit" for id in range(1, 10)}
    splits = {f"cusparselt, id {id}, split_k -1": {"refused": "no"} for id in range(10)}
    worker.write({"cusparselt, id 9": 21.0} | failing | splits, algorithms=10, decode=False)
    records = worker.tune([8, 16, 32], dataclasses.replace(QUICK, restarts=2))
    assert records[8].cusparselt.microseconds == 20.0
    assert records[16].cusparselt.algorithm.id == records[32].cusparselt.algorithm.id == 0
    assert len(records[16].failed) == 9


def test_an_algorithm_that_fewer_rows_show_to_be_slow_is_not_asked_again(worker):
    worker.write(
        {
            "8: cusparselt, id 0": 150.0,
            "16: cusparselt, id 0": 300.0,
            "cusparselt, id 1": 200.0,
            "cusparselt, id 2": 240.0,
            "8: cusparselt, id 0, split_k -1": 1000.0,
            "dense": 400.0,
        },
        default={"refused": "no"},
        decode=False,
    )
    records = worker.tune([8, 16])
    assert records[8].cusparselt.algorithm.id == 0
    assert records[16].cusparselt.algorithm.id == 1
    coarse = [
        line["name"].removeprefix("cusparselt, id ")
        for line in worker.asked()
        if line["rows"] == 16 and line["effort"] == "coarse" and line["name"] != "dense"
    ]
    # First those of which nothing is known, then the fastest; 240 is behind 200 by more than noise.
    assert coarse == ["1, split_k -1", "2, split_k -1", "0", "1"]


def test_a_search_may_be_of_some_algorithms(worker):
    worker.write({}, algorithms=10, decode=False)
    (record,) = worker.tune([64], algorithms=[9, 2], splits=False).values()
    asked = {line["name"] for line in worker.asked()}
    assert asked == {"dense", "cusparselt, id 2", "cusparselt, id 9"}
    assert record.partial
    # A full search does not take it for its own; another of some algorithms does.
    found = TuningTable(Machine("Abacus 9", "9.0", "0.8.0"), "1", (record,))
    assert rows_left(found, SHAPE, "float16", [64]) == [64]
    assert rows_left(found, SHAPE, "float16", [64], partial=True) == []
    assert not worker.tune([64], known=lambda machine: found)[64].partial
    with pytest.raises(ValueError, match="has the algorithms 0 to 9 for this product; got 77"):
        worker.tune([64], algorithms=[9, 77])


def test_what_was_not_tried_is_tried_where_it_is_named(worker):
    worker.write({"cusparselt, id 2": 5.0})
    failed = {"cusparselt, id 2": f"with 64 rows: {tune_file._NOT_TRIED}"}
    before = TuningTable(
        Machine("Abacus 9", "9.0", "0.8.0"), "1", (Record(64, 64, "float16", 64, failed=failed),)
    )
    (record,) = worker.tune([64], known=lambda machine: before).values()
    assert record.cusparselt.microseconds == 20.0
    (record,) = worker.tune([64], algorithms=[2], known=lambda machine: before).values()
    assert record.cusparselt.microseconds == 5.0


def test_what_failed_for_one_shape_is_not_tried_for_another(worker):
    worker.write({"cusparselt, id 0": "crash", "cusparselt, id 1": {"wrong": 3.0}})
    first = tune_shape((64, 128), rows=[64], limits=QUICK, worker=worker.command)
    starts = len(worker.starts())
    records = worker.tune([64], known=lambda machine: first)
    assert len(worker.starts()) == starts + 1
    assert records[64].cusparselt.algorithm.id == 2
    assert records[64].failed == {
        "cusparselt, id 0": "64x128 with 64 rows: the process died (SIGSEGV)",
        "cusparselt, id 1": "with 64 rows: wrong numbers, 3 times too far",  # asked again
    }
    second = dataclasses.replace(first, records=(records[64],))
    assert list(tune_file.failed_algorithms(second, "float16")) == ["cusparselt, id 0"]
    assert tune_file.failed_algorithms(first, "bfloat16") == {}


def test_splits_that_fail_leave_the_plain_algorithms(worker):
    splits = {f"cusparselt, id {id}, split_k -1": "exit" for id in range(10)}
    worker.write({"cusparselt, id 9": 3.0} | splits, algorithms=10)
    (record,) = worker.tune([64], dataclasses.replace(QUICK, restarts=2)).values()
    assert record.cusparselt.algorithm.id == 9
    assert len(record.failed) == 10


def test_a_few_roundings_too_many_cost_no_child(worker):
    worker.write({"cusparselt, id 0": {"wrong": 2.5}, "cusparselt, id 1": {"wrong": 100.0}})
    (record,) = worker.tune([64]).values()
    assert list(record.failed) == ["cusparselt, id 0", "cusparselt, id 1"]
    assert len(worker.starts()) == 2


def test_each_record_is_handed_over_when_it_is_there(worker):
    worker.write({})
    seen = []
    table = tune_shape(
        SHAPE, rows=[64, 128], limits=QUICK, worker=worker.command,
        on_record=lambda table: seen.append((len(worker.asked()), table)),
    )  # fmt: skip
    assert [part.records for _, part in seen] == [(record,) for record in table.records]
    assert seen[0][0] < seen[1][0]


def test_a_search_without_the_library_says_why(worker, caplog):
    worker.write({}, algorithms=0, no_library="cuSPARSELt cannot be called: it is hiding.")
    with caplog.at_level(logging.WARNING):
        worker.tune([64])
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        line == "512x256 is measured without cuSPARSELt: cuSPARSELt cannot be called: it is hiding."
    )


def test_a_dense_product_that_hangs_costs_itself(worker):
    worker.write({"64: dense": "hang", "128: dense": 50.0})
    records = worker.tune([64, 128])
    assert (records[64].dense, records[128].dense) == (None, 50.0)
    assert records[64].failed == {"dense": "with 64 rows: no answer within 1 s"}
    assert records[128].failed == {}
    assert records[64].cusparselt is not None


def test_what_was_measured_is_kept_when_no_child_starts_any_more(worker, caplog, monkeypatch):
    worker.write({"128: cusparselt, id 0": "crash"})
    child = tune_file._Child

    class DiesLater(child):
        def __init__(self, command, job, seconds):
            if worker.folder.joinpath("asked.jsonl").exists():
                worker.write(dies=True)
            super().__init__(command, job, seconds)

    monkeypatch.setattr(tune_file, "_Child", DiesLater)
    with caplog.at_level(logging.WARNING):
        records = worker.tune([64, 128, 256])
    assert list(records) == [64]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("512x256, from 128 rows: the process that times products did not start")


# ---- children that do not start


def test_a_machine_without_a_gpu_is_named(worker):
    worker.write(error="JAX sees no NVIDIA GPU")
    with pytest.raises(RuntimeError, match="nothing can be timed here: JAX sees no NVIDIA GPU"):
        worker.tune([64])


def test_a_child_that_dies_at_once_is_quoted(worker):
    worker.write(dies=True)
    with pytest.raises(RuntimeError, match=r"did not start: .*\(exit status 3\): no such driver\."):
        worker.tune([64])
    with pytest.raises(RuntimeError, match=r"did not start: the process died \(exit status 1\)"):
        tune_shape(SHAPE, rows=[64], worker=(sys.executable, "-c", "import no_such_module"))


def test_a_child_that_says_nothing_is_given_up(worker):
    command = (sys.executable, "-c", "import time; time.sleep(600)")
    with pytest.raises(RuntimeError, match=r"did not start: no answer within 0\.2 s"):
        tune_shape(SHAPE, rows=[64], limits=Limits(start=0.2), worker=command)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (512, 256),
            {"rows": [20, 64]},
            r"tuned for 1, 8, 16, .*16384 rows, which serve .* got 20",
        ),
        ((512, 256), {"rows": []}, "got none"),
        ((512, 250), {}, r"not tuned: its shape \(512, 250\) is not made of multiples of 16"),
        ((512, 256), {"dtype": "float32"}, "not tuned: it is float32"),
    ],
)
def test_what_is_not_tuned_is_refused_before_anything_starts(shape, options, message):
    with pytest.raises(ValueError, match=message):
        tune_shape(shape, worker=("/does/not/exist",), **options)


# ---- the lists of candidates


def test_plans_are_all_that_can_differ():
    plans = decode_plans()
    assert len(plans) == len({tuple(plan.items()) for plan in plans}) == 80
    assert all(plan["warps"] * plan["blocks"] <= 16 for plan in plans)


def test_algorithms_follow_the_architecture():
    plain, whole, segments = (
        [Algorithm(id, split_k=split_k) for id in (0, 1)] for split_k in (None, 1, -1)
    )
    assert library_algorithms(2, "9.0", 4096) == plain + whole + segments
    # What the library does by itself is not tried twice.
    assert library_algorithms(2, "9.0", 4096, -1) == plain + whole
    assert library_algorithms(2, "9.0", 4096, 1) == plain + segments
    # Segment-K was reported to hang for so few outputs.
    assert library_algorithms(2, "9.0", 384) == plain + whole
    ampere = library_algorithms(1, "8.0", 4096)
    assert ampere[0] == Algorithm(0)
    assert {a.split_k_mode for a in ampere[1:]} == {SplitKMode.ONE_KERNEL, SplitKMode.TWO_KERNELS}
    assert all(a.split_k >= 2 for a in ampere[1:])
    later = library_algorithms(1, "10.0", 4096)
    assert [a.split_k_mode for a in later] == [None, 3, 4, 5, 6]


def test_buckets():
    assert BUCKETS == (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


# ---- the chain that is timed


@pytest.mark.parametrize(("inputs", "weights"), [(1, 2), (3, 4)])
def test_a_chain_runs_every_product(inputs, weights):
    """None is dropped, or merged with another."""
    calls = []

    def multiply(x, weight):
        calls.append(1)
        return np.asarray(x) @ np.asarray(weight).T

    def product(x, weight):
        shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
        return jax.pure_callback(multiply, shape, x, weight)

    xs = [jnp.ones((2, 8)) + i for i in range(inputs)]
    chain = Chain(product, xs, [jnp.ones((4, 8)) + i for i in range(weights)], microseconds=2e3)
    jax.block_until_ready(chain.call())
    assert len(calls) == chain.products == inputs * weights
    assert chain.microseconds(batches=3, least_seconds=1e-4) > 0


def test_a_chain_merges_no_products_of_one_x():
    """Given three times it is three arguments, which XLA does not know to be the same."""

    def product(x, weight):
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))

    weights = [jnp.ones((4, 8)) + i for i in range(4)]
    chain = Chain(product, [jnp.ones((2, 8))] * 3, weights, microseconds=2e3)
    assert len(re.findall(r" dot\(", chain._compiled.as_text())) == chain.products == 12


def test_a_long_run_comes_before_what_is_timed():
    calls = []

    def call():
        calls.append(time.perf_counter())
        time.sleep(0.001)
        return jnp.zeros(())

    seconds(call, batches=1, least_seconds=1e-6, warm_seconds=0.05)
    assert calls[-1] - calls[2] > 0.04
    calls.clear()
    seconds(call, batches=1, least_seconds=1e-6)
    assert len(calls) == 3


def test_rotation_leaves_the_caches_behind():
    shape = (4096, 4096)
    blob = 4096 * 4096 * 9 // 8
    assert rotation(blob, 1, shape) == 16
    assert rotation(blob, 4096, shape) * blob + 2 * 4096 * 8192 >= 300e6
    assert rotation(blob, 16384, shape) == 2
    assert rotation(blob, 16384, (22016, 4096)) == 1
    assert chain_rotation(blob, 16384, (22016, 4096)) == 2
    assert chain_rotation(1024, 1, (16, 32)) == 128


def test_a_turn_of_a_chain_is_long_or_has_many_products():
    def products(rows, shape, copies):
        return copies * chain_inputs(rows, shape, copies)

    assert products(1, (14336, 7168), 3) == 21  # of 51 us dense
    assert products(8, (4096, 4096), 16) == 64  # of 8
    assert products(1024, (22016, 4096), 2) == 4  # of 308
    assert products(16384, (22016, 4096), 2) == 2  # of 4,925
    assert products(1, (16, 32), 128) == 128


def test_random_weights_keep_two_of_four():
    weight = random_24(jax.random.key(3), 64, 128, "float16")
    check24(weight)
    kept = (np.asarray(weight) != 0).reshape(-1, 4)
    assert (kept.sum(axis=1) == 2).mean() > 0.99
    patterns = {tuple(group) for group in kept.tolist() if sum(group) == 2}
    assert len(patterns) == 6


# ---- the child itself, as far as it goes without a GPU


class Timers:
    """Stand for the extension's timers: write a product over y, and say how long it took."""

    def __init__(self, bench, times, product=lambda x, weight: x @ weight.T):
        self.calls, self._bench, self._times, self._product = [], bench, iter(times), product

    def write(self, rows, y, launches, replays, copies) -> float:
        self.calls.append((copies, launches, replays))
        x, weight = (
            np.asarray(a, np.float32) for a in (self._bench._x[:rows], self._bench._weight)
        )
        product = np.asarray(self._product(x, weight)).astype(self._bench._dtype)
        memory = (ctypes.c_uint16 * product.size).from_address(y)
        np.ctypeslib.as_array(memory)[:] = product.view(np.uint16).reshape(-1)
        return next(self._times)

    def decode_time(self, *, rows, y, launches, replays, copies, **rest):
        assert (rest["plan"], rest["prefetch"]) == ([3, 0, 0, 0, 0, 0], False)
        return self.write(rows, y, launches, replays, copies)

    def prefill_time(self, *, rows, y, launches, replays, copies, **rest):
        assert rest["plan"] == [256, 0, 0, 0, 0, 0]
        assert {"out", "channels", "dtype", "x", "blobs", "blob_bytes", "plan"} == set(rest)
        return self.write(rows, y, launches, replays, copies)

    def time(self, x, blobs, *, y, launches, replays):
        rows, copies = x.shape[0], blobs.shape[0]
        return self.write(rows, y.unsafe_buffer_pointer(), launches, replays, copies)


@pytest.fixture(scope="module")
def bench():
    """On the CPU, where the timers have to be replaced."""
    job = {"out": 4096, "channels": 8192, "dtype": "bfloat16", "rows": [1, 16], "platform": "cpu"}
    bench = Bench(job)
    bench._blob = blob24(compress24(bench._weight))
    bench._all_blobs = bench._blobs = bench._blob.data[None]
    return bench


DECODE = {"kind": "decode", "plan": {"tiles": 3}}


def test_a_candidate_is_checked_and_then_timed(bench, monkeypatch):
    for rows, best in ((1, None), (16, 40.0)):
        timers = Timers(bench, [50.0, 12.0])
        monkeypatch.setattr(_ffi_cuda, "_extension", lambda: timers)  # noqa: B023
        bench.make_operands(rows)
        answer = bench.run(rows, DECODE, effort="coarse", best=best)
        assert answer == {"microseconds": 12.0}
        # A launch on one copy, whose numbers count; then 1 ms of them on copies of 300 MB.
        assert timers.calls == [(1, 1, 1), (8, 20, 2)]
    timers = Timers(bench, [50.0, 12.0])
    assert bench.run(16, DECODE, effort="thorough", best=None) == {"microseconds": 12.0}
    assert timers.calls[1] == (8, 96, 7)
    timers = Timers(bench, [50.0, 11.0])
    prefill = {"kind": "prefill", "plan": {"rows": 256}}
    assert bench.run(16, prefill, effort="coarse", best=None) == {"microseconds": 11.0}
    timers = Timers(bench, [20000.0, 19000.0])
    bench.run(16, DECODE, effort="thorough", best=None)
    assert timers.calls[1] == (8, 8, 3)


def test_the_best_is_timed_as_the_dense_product_is(monkeypatch):
    job = {"out": 512, "channels": 1024, "dtype": "float16", "rows": [40], "platform": "cpu"}
    bench = Bench(job)
    bench._blob = blob24(compress24(bench._weight))
    bench._all_blobs = bench._blobs = bench._blob.data[None]
    asked = []

    def kernel(x, data, **options):
        asked.append(options)
        return sparse_matmul(x, dataclasses.replace(bench._blob, data=data), backend="reference")

    def library(x, blob, **options):
        asked.append(options)
        return sparse_matmul(x, blob, backend="reference")

    monkeypatch.setattr(_ffi_cuda, "prefill", kernel)
    monkeypatch.setattr(_ffi_cuda, "decode_in_pieces", kernel)
    monkeypatch.setattr(worker_file, "sparse_matmul", library)
    monkeypatch.setattr(worker_file, "chain_rotation", lambda *a: 2)
    monkeypatch.setattr(worker_file, "chain_inputs", lambda *a: 1)
    bench.make_operands(40)
    for candidate, options in (
        ({"kind": "prefill", "plan": {"rows": 64}}, {"out": 512, "plan": {"rows": 64}}),
        (DECODE, {"out": 512, "plan": {"tiles": 3}}),
        ({"kind": "prefetch"}, {"out": 512, "prefetch": True}),
        ({"kind": "pieces"}, {"out": 512, "prefetch": False}),
        (
            {"kind": "cusparselt", "id": 3, "split_k": -1},
            {"backend": "cusparselt", "algorithm": Algorithm(3, split_k=-1)},
        ),
    ):
        asked.clear()
        answer = bench.run(40, candidate, effort="chain", best=None)
        assert list(answer) == ["microseconds"]
        assert answer["microseconds"] > 0
        assert options in asked


@pytest.mark.parametrize("kind", ["prefetch", "pieces"])
def test_what_is_in_no_graph_is_checked_before_its_chain(bench, monkeypatch, kind):
    bench._blob = blob24(compress24(bench._weight))
    bench._all_blobs = bench._blobs = bench._blob.data[None]

    def off(x, data, *, out, prefetch):
        exact = sparse_matmul(x, dataclasses.replace(bench._blob, data=data), backend="reference")
        return exact.at[-1, 77].add(5.0)

    monkeypatch.setattr(_ffi_cuda, "decode_in_pieces", off)
    bench.make_operands(16)
    (answer,) = bench.run(16, {"kind": kind}, effort="coarse", best=None).items()
    assert answer[0] == "wrong"
    assert answer[1] > 1


def test_a_hopeless_candidate_is_not_timed_twice(bench, monkeypatch):
    timers = Timers(bench, [101.0, 99.0])
    monkeypatch.setattr(_ffi_cuda, "_extension", lambda: timers)
    bench.make_operands(1)
    assert bench.run(1, DECODE, effort="coarse", best=40.0) == {"microseconds": 101.0}
    assert timers.calls == [(1, 1, 1)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: np.full_like(y, np.nan),
        lambda y: np.zeros_like(y),
        lambda y: y * 1.02,
        lambda y: np.where(np.arange(y.shape[1]) == 77, y + 0.5, y),  # one column
        lambda y: np.where(np.arange(y.shape[0])[:, None] == 9, np.inf, y),  # one row
        lambda y: y[::-1],
        lambda y: y[:15],  # the last row is not written
    ],
)
def test_wrong_numbers_are_found(bench, monkeypatch, wrong):
    timers = Timers(bench, [50.0, 12.0], lambda x, weight: wrong(x @ weight.T))
    monkeypatch.setattr(_ffi_cuda, "_extension", lambda: timers)
    bench.make_operands(16)
    answer = bench.run(16, DECODE, effort="coarse", best=None)
    assert list(answer) == ["wrong"]
    assert not answer["wrong"] <= 1
    assert len(timers.calls) == 1


def test_sums_in_another_order_are_no_wrong_numbers(bench, monkeypatch):
    def in_slices(x, weight):
        return sum(x[:, i::8] @ weight[:, i::8].T for i in range(8))

    timers = Timers(bench, [50.0, 12.0], in_slices)
    monkeypatch.setattr(_ffi_cuda, "_extension", lambda: timers)
    bench.make_operands(16)
    assert bench.run(16, DECODE, effort="coarse", best=None) == {"microseconds": 12.0}


def test_an_algorithm_is_taken_and_then_timed(bench, monkeypatch):
    made = []

    class Search(Timers, _ffi_cusparselt.AlgorithmSearch):
        def __init__(self, *, rows, out, channels, dtype, gpu):
            assert gpu == jax.devices("cpu")[0]
            Timers.__init__(self, bench, [50.0, 12.0, 49.0, 11.0])
            made.append((rows, out, channels, dtype.name))

        def take(self, algorithm):
            if algorithm.id == 9:
                raise RuntimeError("operation not supported")
            return _ffi_cusparselt.PlanFacts(4, algorithm, 0, 48)

    monkeypatch.setattr(_ffi_cusparselt, "AlgorithmSearch", Search)
    bench.make_operands(1)
    bench.make_operands(16)
    options = {"effort": "coarse", "best": None}
    candidate = {"kind": "cusparselt", "id": 3, "split_k": -1}
    assert bench.run(16, candidate, **options) == {"microseconds": 12.0, "workspace_bytes": 48}
    refused = bench.run(16, candidate | {"id": 9}, **options)
    assert refused == {"refused": "operation not supported"}
    assert bench.run(16, candidate, **options) == {"microseconds": 11.0, "workspace_bytes": 48}
    assert made == [(16, 4096, 8192, "bfloat16")]
    assert bench.works()
    bench.make_operands(1)
    assert bench._search is None


def _run_worker(*lines) -> tuple[list[dict], str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "esparse_jax.sparse._tune_worker"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr, done.returncode


def test_the_child_reports_before_and_after(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    job = {"out": 64, "channels": 128, "dtype": "float16", "rows": [1, 32], "platform": "cpu"}
    dense = {"candidate": {"kind": "dense"}, "effort": "coarse", "best": None}
    decode = dense | {"candidate": {"kind": "decode", "plan": {"tiles": 1}}}
    reports, _, status = _run_worker(job, decode | {"rows": 32}, dense | {"rows": 1})
    assert status == 0
    assert [next(iter(line)) for line in reports] == ["ready", *["begin", "end"] * 2]
    facts = reports[0]["ready"]
    assert (facts["decode"], facts["cusparselt"], facts["algorithms"]) == (False, None, 0)
    assert reports[1]["begin"] == reports[2]["end"] == decode["candidate"]
    assert "refused" in reports[2]  # there are no blobs, and the process goes on
    assert reports[4]["microseconds"] > 0


def test_operands_that_do_not_fit_are_a_refusal(bench, monkeypatch):
    """So that the next number of rows is measured by the same child."""
    monkeypatch.setattr(worker_file, "rotation", lambda *_: 10**9)
    bench._rows = 0
    with pytest.raises(Exception, match=r"(?i)out of memory|resource|overflow|too large"):
        bench.make_operands(16)
    assert bench.works()
    monkeypatch.undo()
    bench.make_operands(16)
    assert bench._blobs.shape[0] == 8


def test_the_child_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    job = {"out": 64, "channels": 128, "dtype": "float16", "rows": [1], "platform": "cuda"}
    ((report,), _, status) = _run_worker(job)
    assert status == 1
    assert "a search times products on an NVIDIA GPU, and JAX sees none" in report["error"]
