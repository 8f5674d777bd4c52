"""The search for the best way to multiply by a 2:4 weight: step (2) of the paper's section 4.

For each number of rows in `BUCKETS`: the decode kernel, the prefill kernel and their plans, every
algorithm of cuSPARSELt with every way to split the sum, and the dense product. All are whole
products, row-major x to row-major y, over more weights than a cache holds. First each candidate is
timed once, coarsely, then the best few again, in turns: in graphs of it alone, since to compile a
program for each would take too long. A candidate counts only after its numbers were compared with a
dense product in float32. The best of each kind is timed once more in a jitted chain, as the dense
product is, and that is what is kept: graphs are short, and their times up to a quarter less (H200,
whose clock falls after some milliseconds of full load). In a chain the decode kernel is also timed
by its own rule with `prefetch`, which graphs of one kernel would not show.

It is taken that no product becomes faster by more rows. So what an algorithm took for fewer rows
bounds what it takes for more, and one whose bound is a tenth behind the best so far is not asked
again; those without a bound come first, then those that were fast for fewer rows.

An algorithm may take the process with it, or never return. So candidates run in a child process,
one for each shape (`_tune_worker`), with a time limit for each candidate; this process touches no
GPU. When the child dies or does not answer, the candidate in hand is noted as failed, and a new
child goes on with the next. An algorithm that failed for one shape is not tried for others, and the
sum is not split for one that took its child with it unsplit.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _ffi_cuda
from ._ffi_cusparselt import ROW_UNIT, Algorithm, SplitKMode, why_not
from ._timing import GRAPH_START
from .machine import Machine
from .table import BUCKETS, KernelTime, LibraryTime, Record, TuningTable

_LOGGER = logging.getLogger(__name__)

WORKER = (sys.executable, "-P", "-m", "esparse_jax.sparse._tune_worker")
# How many of a kind are timed again, how often, and the least that counts as a difference.
_FINALISTS, _ROUNDS, _NOISE = 4, 3, 0.02
# How far behind the best the bound of an algorithm must be: coarse times differ by some percent.
_BEHIND = 1.1
# Errors of so many roundings are told from those of a kernel that went astray.
_ROUNDINGS = 8
_WRONG, _NOT_TRIED = "wrong numbers", "not tried, since others like it failed"
# Fewer rows are not tried with the prefill kernel, whose smallest tile has 16.
_LEAST_PREFILL_ROWS = 8
# Tiles of rows of the prefill kernel, and for how many rows each may be the best.
_FITTING_ROWS = ((16, 0, 16), (64, 16, 128), (128, 64, 1024), (256, 128, math.inf))
# Below so many outputs, segment-K was reported to hang on Hopper (vllmbench, cuSPARSELt 0.7.1).
_SEGMENT_K_OUT = 400


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a child may take, in seconds, before it is ended.

    Attributes:
        start: Until it has a GPU, a weight and the reference; and for x and copies of the weight.
        candidate: To check and time one candidate in a graph.
        dense: To time the dense product, the best of a kind, or the decode kernel with `prefetch`,
            in a chain that XLA compiles.
        restarts: So many candidates of one shape and family may cost a child; then those of the
            family that have not worked before are left out. Families are the plans of each of our
            kernels, cuSPARSELt's algorithms, and those with the sum split.
    """

    start: float = 240.0
    candidate: float = 10.0
    dense: float = 240.0
    restarts: int = 5


class TuneProgress(NamedTuple):
    """How far the search for one shape is; `rows` is the number that is being measured."""

    shape: tuple[int, int]
    rows: int
    done: int
    total: int


class Candidate(NamedTuple):
    """One way to compute a product.

    Attributes:
        kind: "dense", "decode" (up to 16 rows), "prefetch" (the decode kernel by its own rule, told
            that its weight is complete), "pieces" (the decode kernel for every 16 rows), "prefill"
            (8 rows and more) or "cusparselt".
        plan: Of one of our kernels; empty for its own rule.
        algorithm: Of cuSPARSELt.
    """

    kind: str
    plan: tuple[tuple[str, int], ...] = ()
    algorithm: Algorithm | None = None

    def __str__(self) -> str:
        return ", ".join(
            [self.kind, *(f"{name} {value}" for name, value in self._choices().items())]
        )

    @property
    def family(self) -> str:
        """Candidates that may fail for the same reason."""
        split = self.algorithm is not None and self.algorithm != Algorithm(id=self.algorithm.id)
        return f"{self.kind}, split" if split else self.kind

    def _choices(self) -> dict[str, int]:
        if self.algorithm is None:
            return dict(self.plan)
        fields = dataclasses.asdict(self.algorithm).items()
        return {name: int(value) for name, value in fields if value is not None}

    def request(self) -> dict[str, Any]:
        """What the child is told."""
        if self.kind in ("decode", "prefill"):
            return {"kind": self.kind, "plan": dict(self.plan)}
        return {"kind": self.kind, **self._choices()}


def decode_plans() -> list[dict[str, int]]:
    """All plans of the decode kernel that can differ: 80."""
    fields = ("tiles", "warps", "blocks", "interleave", "resident")
    values = itertools.product(*(_ffi_cuda.PLAN_VALUES[field] for field in fields))
    plans = [dict(zip(fields, value, strict=True)) for value in values]
    return [plan for plan in plans if plan["warps"] * plan["blocks"] <= _ffi_cuda.MOST_WARPS]


def prefill_plans(rows: int) -> list[dict[str, int]]:
    """Plans of the prefill kernel that may be the best for so many rows: 6 to 28.

    Its tiles of rows are not much larger than x nor a small part of it, the channels are split only
    where there may be fewer tiles than multiprocessors, or few more, and those of the last tiles
    where these may be a good part of all.
    """
    fitting = {tile for tile, least, most in _FITTING_ROWS if least < rows <= most}
    groups = (4, 8, 16) if rows > 2048 else ()
    tails = (1, 2, 4) if rows <= 4096 else ()
    plans = []
    for tile, outputs, cluster in _ffi_cuda.PREFILL_TILES:
        if tile not in fitting or (tile == 256 and cluster == 1 and rows > 1024):
            continue
        own = {"rows": tile, "outputs": outputs, "cluster": cluster}
        plans += [own | {"group": group, "split": 1} for group in groups]
        # Tiles of the fewest rows all run at once, but of more than 33,792 outputs on an H200.
        fitting_tails = tails[:1] if tile == _ffi_cuda.PREFILL_FEWEST_ROWS else tails
        plans += [own | {"split": 1, "tail": tail} for tail in fitting_tails]
        if cluster == 1 and outputs == 128 and rows <= 2048:
            plans += [own | {"split": split} for split in (2, 3, 4, 6, 8)]
    return plans


def library_algorithms(
    count: int, capability: str, out: int, split_k: int | None = None
) -> list[Algorithm]:
    """Every algorithm id with every way to split the sum over channels that a GPU may offer.

    The library refuses what it does not offer before anything runs, so one too many costs nothing.

    Args:
        count: The ids are 0 to `count - 1`.
        capability: Of the GPU, "9.0".
        out: Outputs of the weight.
        split_k: What the library takes where nothing is said of it, so that it is not tried twice:
            on Hopper 0.8.0 takes -1 for every algorithm.

    Source: cuSPARSELt's documentation of cusparseLtMatmulAlgAttribute_t, and the error texts of
        0.8.0: on Hopper only 1 and -1 (segment-K), before it slices and one or two kernels, after
        it modes.
    """
    major = int(capability.split(".")[0])
    splits: list[dict[str, int]] = [{}]
    if major < 9:
        modes = (SplitKMode.ONE_KERNEL, SplitKMode.TWO_KERNELS)
        splits += [
            {"split_k": slices, "split_k_mode": mode} for slices in (2, 3, 4, 8) for mode in modes
        ]
    elif major > 9:
        splits += [{"split_k_mode": mode} for mode in SplitKMode if mode >= SplitKMode.HEURISTIC]
    else:
        splits += [{"split_k": 1}] + ([{"split_k": -1}] if out >= _SEGMENT_K_OUT else [])
        splits = [split for split in splits if not split or split["split_k"] != split_k]
    return [Algorithm(id=id, **split) for split in splits for id in range(count)]


def tune_shape(
    shape: tuple[int, int],
    *,
    dtype: Any = "float16",
    rows: Iterable[int] = BUCKETS,
    algorithms: Iterable[int] | None = None,
    splits: bool = True,
    known: Callable[[Machine], TuningTable | None] | None = None,
    limits: Limits | None = None,
    progress: Callable[[TuneProgress], None] | None = None,
    on_record: Callable[[TuningTable], None] | None = None,
    worker: Sequence[str] = WORKER,
) -> TuningTable:
    """Measures the products of one shape on this machine's GPU, in a child process.

    This process touches no device, and should not have done so before: what JAX sets aside on a GPU
    when it first uses it is most of its memory, and the child has what is left.

    Args:
        shape: `(out, channel)` of the weight, multiples of 64 (of 16: by cuSPARSELt alone).
        dtype: float16 or bfloat16.
        rows: Which of `BUCKETS`.
        algorithms: Only these of cuSPARSELt; None for all. What is found so is `Record.partial`.
        splits: Whether each is tried with the sum over channels split as well.
        known: Called when the child has said what the machine is. Numbers of rows that the table it
            returns has for this shape are left out, and so are algorithms of cuSPARSELt that failed
            for any shape in it.
        limits: None is `Limits()`.
        progress: Called before each candidate.
        on_record: Called with a table of one record whenever a number of rows is measured, so that
            it can be kept (`save_table`) whatever becomes of the rest.
        worker: The command that runs the child.

    Returns:
        A table with one record for each number of rows that was measured. `save_table` puts it
        beside what was measured before.

    Raises:
        ValueError: A shape, dtype or number of rows that no product is tuned for, or an algorithm
            that the library does not have.
        RuntimeError: There is no GPU to measure on, or the child does not start; the message has
            its last line. Where that happens later, what was measured is returned, and one line is
            logged.

    Source: E-Sparse, section 4, step (2).
    Paper silent: what is searched and how it is timed.
    """
    rows, dtype = sorted(set(rows)), np.dtype(dtype)
    asked = None if algorithms is None else set(algorithms)
    wrong = [each for each in rows if each not in BUCKETS]
    if wrong or not rows:
        raise ValueError(
            f"products are tuned for {', '.join(map(str, BUCKETS))} rows, which serve all numbers "
            f"between; got {', '.join(map(str, wrong)) or 'none'}."
        )
    refused = why_not_tuned(shape, dtype)
    if refused is not None:
        raise ValueError(f"a weight of this shape and dtype is not tuned: {refused}.")
    search = _Search(shape, dtype.name, rows, asked, splits, limits or Limits(), progress, worker)
    with contextlib.closing(search):
        return search.run(known, on_record)


def why_not_tuned(shape: tuple[int, int], dtype: Any) -> str | None:
    """Why a weight has nothing to choose from but plain JAX, as half a sentence, or None."""
    return why_not(shape, np.dtype(dtype))


def rows_left(
    table: TuningTable | None,
    shape: tuple[int, int],
    dtype: Any,
    rows: Iterable[int],
    *,
    partial: bool = False,
) -> list[int]:
    """Those numbers of rows of a product that a table does not have.

    Args:
        partial: Whether what a search of some algorithms found will do.
    """
    found = {
        record.rows
        for record in (() if table is None else table.records)
        if record.key[:3] == (np.dtype(dtype).name, *shape) and (partial or not record.partial)
    }
    return [each for each in rows if each not in found]


def failed_algorithms(table: TuningTable | None, dtype: Any) -> dict[str, str]:
    """Algorithms of cuSPARSELt that crashed or hung for some shape in a table, and why; and those
    that were not tried there since others like them did.

    Wrong numbers are left to each shape: sums in 16 bits are worse the longer they are.

    Paper silent: one that crashed or hung once is not worth a child process for every shape.
    """
    return {
        name: f"{record.out}x{record.channels} {reason}" if reason.startswith("with ") else reason
        for record in (() if table is None else table.records)
        if record.dtype == np.dtype(dtype).name
        for name, reason in record.failed.items()
        if name.startswith("cusparselt") and _WRONG not in reason
    }


class _Search:
    """The search for one shape: what to ask next, and what came of it so far."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: str,
        rows: list[int],
        asked: set[int] | None,
        splits: bool,
        limits: Limits,
        progress: Callable[[TuneProgress], None] | None,
        worker: Sequence[str],
    ):
        self._shape, self._dtype, self._rows = shape, dtype, rows
        self._asked, self._splits = asked, splits
        self._partial = asked is not None or not splits
        self._limits, self._progress, self._worker = limits, progress, worker
        self._child: _Child | None = None
        self._facts: dict[str, Any] = {}
        # What failed once is not tried again with other rows: nothing that crashes now and then is
        # to be a winner.
        self._failed: dict[Candidate, str] = {}
        self._fatal: set[Candidate] = set()  # those of them that cost a child
        self._worked: set[Candidate] = set()
        self._left_out: dict[str, str] = {}
        self._bounds: dict[Candidate, float] = {}  # microseconds, for fewer rows
        self._libraries: dict[int, LibraryTime | None] = {}
        self._workspaces: dict[tuple[int, Candidate], int] = {}
        self._restarts: collections.Counter[str] = collections.Counter()  # by family
        self._done = self._total = 0

    def run(
        self,
        known: Callable[[Machine], TuningTable | None] | None,
        on_record: Callable[[TuningTable], None] | None,
    ) -> TuningTable:
        """All there is to measure."""
        self._facts = facts = self._running().facts
        if facts.get("no_library"):
            _LOGGER.warning(
                "%dx%d is measured without cuSPARSELt: %s", *self._shape, facts["no_library"]
            )
        unknown = sorted((self._asked or set()) - set(range(facts["algorithms"])))
        if unknown and facts["algorithms"]:
            raise ValueError(
                f"cuSPARSELt {facts['cusparselt']} has the algorithms 0 to "
                f"{facts['algorithms'] - 1} for this product; got {', '.join(map(str, unknown))}."
            )
        machine = Machine(facts["device"], facts["capability"], facts["cusparselt"])
        if known is not None:
            table = known(machine)
            self._rows = rows_left(
                table, self._shape, self._dtype, self._rows, partial=self._partial
            )
            self._left_out = failed_algorithms(table, self._dtype)
            if self._asked is not None:  # who names one wants it tried
                self._left_out = {
                    name: reason
                    for name, reason in self._left_out.items()
                    if _NOT_TRIED not in reason
                }
        self._total = sum(1 for _ in self._all_candidates())
        records = []
        for rows in self._rows:
            try:
                records.append(self._record(rows))
                if on_record is not None:
                    on_record(TuningTable(machine, facts["jax"], (records[-1],)))
            except RuntimeError as error:
                if not records:
                    raise
                _LOGGER.warning("%dx%d, from %d rows: %s", *self._shape, rows, error)
                break
        return TuningTable(machine, facts["jax"], tuple(records))

    def close(self) -> None:
        """Ends the child."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _record(self, rows: int) -> Record:
        dense = self._time(rows, Candidate("dense"))
        decode = self._decode(rows)
        prefill = self._kernel(rows, self._prefill_plans(rows))
        library = self._library(rows)
        failed = {str(candidate): reason for candidate, reason in self._failed.items()}
        failed = self._left_out | failed
        self._failed.pop(Candidate("dense"), None)  # which must not be without because of one
        return Record(
            *self._shape,
            self._dtype,
            rows,
            dense,
            decode,
            library,
            failed,
            self._partial,
            prefill,
            chained=True,
        )

    # ---- what is asked

    def _plans(self, rows: int) -> list[Candidate]:
        """The decode kernel's own rule and its plans."""
        if not self._facts["decode"] or rows > _ffi_cuda.MAX_ROWS:
            return []
        plans = [{}, *decode_plans()]
        return [Candidate("decode", plan=tuple(plan.items())) for plan in plans]

    def _prefill_plans(self, rows: int) -> list[Candidate]:
        """The prefill kernel's own rule and its plans."""
        if not self._facts.get("prefill") or rows < _LEAST_PREFILL_ROWS:
            return []
        plans = [{}, *prefill_plans(rows)]
        return [Candidate("prefill", plan=tuple(plan.items())) for plan in plans]

    def _prefetch(self, rows: int) -> list[Candidate]:
        """The decode kernel, told that its weight is complete."""
        return [Candidate("prefetch")] if self._plans(rows) else []

    def _pieces(self, rows: int) -> list[Candidate]:
        """Two calls of the decode kernel; more never won."""
        twice = self._facts["decode"] and rows == 2 * _ffi_cuda.MAX_ROWS
        return [Candidate("pieces")] if twice else []

    def _algorithms(self) -> list[Candidate]:
        facts = self._facts
        found = library_algorithms(
            facts["algorithms"], facts["capability"], self._shape[0], facts.get("split_k")
        )
        return [
            Candidate("cusparselt", algorithm=algorithm)
            for algorithm in found
            if (self._asked is None or algorithm.id in self._asked)
            and (self._splits or algorithm == Algorithm(id=algorithm.id))
        ]

    def _all_candidates(self) -> Iterable[Candidate]:
        for rows in self._rows:
            yield Candidate("dense")
            yield from self._plans(rows)
            yield from self._prefetch(rows)
            yield from self._pieces(rows)
            yield from self._prefill_plans(rows)
        for _ in {_library_rows(rows) for rows in self._rows}:
            yield from self._algorithms()

    # ---- one number of rows

    def _decode(self, rows: int) -> KernelTime | None:
        for candidate in self._pieces(rows):
            microseconds = self._time(rows, candidate)
            return None if microseconds is None else KernelTime(microseconds)
        found = self._kernel(rows, self._plans(rows))
        for candidate in self._prefetch(rows):
            if found is None:
                self._count(rows)
            else:
                found = dataclasses.replace(found, prefetch=self._time(rows, candidate))
        return found

    def _kernel(self, rows: int, plans: list[Candidate]) -> KernelTime | None:
        """The best of a kernel's own rule, which comes first, and its plans."""
        coarse = self._time_all(rows, plans)
        if not plans or plans[0] not in coarse:
            return None
        rule = plans[0]
        best = sorted(coarse, key=coarse.__getitem__)[:_FINALISTS]
        final = self._time_again(rows, [rule, *(each for each in best if each != rule)])
        if rule not in final:
            return None
        own = statistics.median(final[rule])
        noise = max(_NOISE * own, max(final[rule]) - min(final[rule]))
        winner = min(final, key=lambda each: statistics.median(final[each]))
        microseconds = statistics.median(final[winner])
        others = sorted(final, key=lambda each: statistics.median(final[each]))
        first = rule if own - microseconds <= noise else winner
        found = self._chained(rows, [first, *(each for each in others if each != first)])
        return None if found is None else KernelTime(found[1], dict(found[0].plan) or None)

    def _library(self, rows: int) -> LibraryTime | None:
        rows = _library_rows(rows)
        if rows not in self._libraries:
            algorithms = self._algorithms()
            algorithms.sort(key=lambda each: self._bounds.get(each, 0.0))
            coarse = self._time_all(rows, algorithms)
            best = sorted(coarse, key=coarse.__getitem__)[:_FINALISTS]
            final = self._time_again(rows, best)
            best = sorted(final, key=lambda each: statistics.median(final[each]))
            found = self._chained(rows, best)
            self._libraries[rows] = None
            if found is not None:
                winner, microseconds = found
                workspace = self._workspaces[rows, winner]
                self._libraries[rows] = LibraryTime(
                    microseconds, dataclasses.replace(winner.algorithm, workspace_bytes=workspace)
                )
        return self._libraries[rows]

    def _chained(self, rows: int, candidates: list[Candidate]) -> tuple[Candidate, float] | None:
        """The first of these that runs in a chain, and its time there."""
        for candidate in candidates:
            microseconds = self._time(rows, candidate, effort="chain")
            if microseconds is not None:
                return candidate, microseconds
        return None

    def _time_all(self, rows: int, candidates: list[Candidate]) -> dict[Candidate, float]:
        found: dict[Candidate, float] = {}
        for candidate in candidates:
            best = min(found.values(), default=None)
            behind = best is not None and self._bounds.get(candidate, 0.0) > _BEHIND * best
            microseconds = None if behind else self._time(rows, candidate, best=best)
            if behind:
                self._count(rows)
            if microseconds is not None:
                found[candidate] = microseconds
                if candidate.algorithm is not None:
                    hopeless = best is not None and microseconds > 2 * best
                    self._bounds[candidate] = microseconds - (GRAPH_START if hopeless else 0)
        return found

    def _time_again(self, rows: int, candidates: list[Candidate]) -> dict[Candidate, list[float]]:
        """In turns, so that none has the better moment."""
        found: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
        for _ in range(_ROUNDS):
            for candidate, times in found.items():
                microseconds = self._time(rows, candidate, effort="thorough")
                if microseconds is not None:
                    times.append(microseconds)
        return {
            candidate: times
            for candidate, times in found.items()
            if times and candidate not in self._failed
        }

    def _time(
        self,
        rows: int,
        candidate: Candidate,
        *,
        effort: Literal["coarse", "thorough", "chain"] = "coarse",
        best: float | None = None,
    ) -> float | None:
        """Microseconds, or None where the candidate has none; why is noted, if it ran."""
        if effort == "coarse":
            self._count(rows)
        if candidate in self._failed:
            return None
        if self._given_up(candidate):
            if self._restarts[candidate.family] > self._limits.restarts:
                # For those shapes as well that come after this one.
                self._failed[candidate] = _reason(rows, _NOT_TRIED)
            return None
        try:
            answer = self._running().ask(
                {
                    "rows": rows,
                    "candidate": candidate.request(),
                    "effort": effort,
                    "best": best,
                },
                self._limits.start,
                self._limits.dense
                if effort == "chain" or candidate.kind in ("dense", "pieces", "prefetch")
                else self._limits.candidate,
            )
        except _LostError as lost:
            return self._fail(rows, candidate, str(lost))
        if "wrong" in answer:
            # A few roundings too many are from sums in 16 bits. Else it is not known what it wrote
            # over: the next one gets operands of its own.
            far = float(answer["wrong"])
            reason = f"{_WRONG}, {far:.3g} times too far"
            return self._fail(rows, candidate, reason, harmless=far < _ROUNDINGS)
        if "failed" in answer:
            return self._fail(rows, candidate, answer["failed"])
        if "refused" in answer:
            # In a chain it is memory for every y that is missing, above all.
            rules = (Candidate("dense"), Candidate("decode"), Candidate("prefill"))
            if effort != "chain" and candidate in rules:
                self._failed[candidate] = _reason(rows, answer["refused"])
            return None
        microseconds = round(float(answer["microseconds"]), 3)
        if not 0 < microseconds < float("inf"):
            return self._fail(rows, candidate, f"the impossible time of {microseconds} us")
        self._worked.add(candidate)
        if effort != "chain":  # whose workspace is XLA's to find
            self._workspaces[rows, candidate] = answer.get("workspace_bytes", 0)
        return microseconds

    def _count(self, rows: int) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(TuneProgress(self._shape, rows, self._done, self._total))

    def _given_up(self, candidate: Candidate) -> bool:
        """Whether a candidate is not to be tried."""
        optional = bool(candidate.plan) or candidate.algorithm is not None
        if not optional or candidate in self._worked:
            return False
        if str(candidate) in self._left_out:
            return True
        if self._restarts[candidate.family] > self._limits.restarts:
            return True
        if candidate.algorithm is None:
            return False
        unsplit = candidate._replace(algorithm=Algorithm(id=candidate.algorithm.id))
        return unsplit != candidate and (unsplit in self._fatal or self._given_up(unsplit))

    def _fail(
        self, rows: int, candidate: Candidate, reason: str, *, harmless: bool = False
    ) -> None:
        """Notes a failure; the next candidate gets a new child, unless it was harmless."""
        self._failed[candidate] = _reason(rows, reason)
        _LOGGER.info("%dx%d: %s: %s", *self._shape, candidate, self._failed[candidate])
        if harmless:
            return
        self.close()
        self._fatal.add(candidate)
        self._restarts[candidate.family] += 1
        if self._restarts[candidate.family] == self._limits.restarts + 1:
            _LOGGER.warning(
                "%dx%d: %d candidates of %s failed and took a new child process each; those that "
                "have not worked before are not measured. The last one is %s: %s",
                *self._shape,
                self._restarts[candidate.family],
                candidate.family,
                candidate,
                self._failed[candidate],
            )

    def _running(self) -> "_Child":
        """The child, or a new one."""
        if self._child is None:
            job = {
                "out": self._shape[0],
                "channels": self._shape[1],
                "dtype": self._dtype,
                "rows": self._rows,
                "platform": "cuda",
            }
            self._child = _Child(self._worker, job, self._limits.start)
        return self._child


def _reason(rows: int, text: str) -> str:
    """A failure as it is kept: on one line that can be read."""
    line = " ".join(text.split())
    return f"with {rows} rows: {line if len(line) <= 200 else line[:197] + '...'}"


def _library_rows(rows: int) -> int:
    """What the library is given: multiples of 8."""
    return -(-rows // ROW_UNIT) * ROW_UNIT


class _LostError(Exception):
    """The child died or did not answer; the message says which."""


class _Child:
    """One run of the worker.

    Attributes:
        facts: What it says of the machine.
    """

    def __init__(self, command: Sequence[str], job: Mapping[str, Any], seconds: float):
        environment = os.environ | {
            # Its GPU is for copies of weights, not for a pool that is taken before they are made.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        text = {"encoding": "utf-8", "errors": "replace"}
        self._errors = tempfile.TemporaryFile("w+", **text)  # noqa: SIM115, closed with the child
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            **text,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._send(job)
            answer = self._receive(("ready", "error"), seconds)
        except _LostError as lost:
            self.close()
            raise RuntimeError(f"the process that times products did not start: {lost}.") from None
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            self.close()
            raise RuntimeError(f"nothing can be timed here: {answer['error']}")
        self.facts = answer["ready"]

    def ask(
        self, request: Mapping[str, Any], prepare_seconds: float, seconds: float
    ) -> dict[str, Any]:
        """Sends a request and returns its end.

        Raises:
            _LostError: The operands were not made, or the candidate not measured, in time; or the
                child died over it.
        """
        self._send(request)
        self._receive(("begin",), prepare_seconds)
        return self._receive(("end",), seconds)

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"process {self._process.pid}, in which a candidate hangs, does not end when it is "
                f"killed: the GPU's driver holds it. Nothing can be measured until it is gone."
            ) from None
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def _read(self) -> None:
        try:
            with contextlib.suppress(ValueError, OSError):  # closed at the end
                for line in self._process.stdout:
                    self._lines.put(line)
        finally:
            self._lines.put(None)

    def _send(self, fields: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is dead: its output says so
            self._process.stdin.write(json.dumps(fields) + "\n")
            self._process.stdin.flush()

    def _receive(self, keys: tuple[str, ...], seconds: float) -> dict[str, Any]:
        """The next report that has one of the keys."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise _LostError(f"no answer within {seconds:g} s") from None
            if line is None:
                raise _LostError(self._last_words())
            try:
                report = json.loads(line)
            except ValueError:
                continue  # something a library printed
            if isinstance(report, dict) and any(key in report for key in keys):
                return report

    def _last_words(self) -> str:
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"the process died ({how})" + (f": {lines[-1]}" if lines else "")
