"""The tuning table: the best way to multiply by a 2:4 weight, for one kind of GPU.

What `tune_shape` measured, one record for each shape, dtype and number of rows. `sparse_matmul`
asks it when a product is traced, `choose_form` when a model is loaded. It is kept as JSON:

    {"format_version": 1,
     "device": "NVIDIA H200", "capability": "9.0", "cusparselt": "0.8.0", "jax": "0.11.2",
     "records": [
       {"out": 4096, "channels": 4096, "dtype": "float16", "rows": 16,
        "dense": 11.1,
        "decode": {"microseconds": 7.5, "plan": {"tiles": 2, "warps": 8}, "prefetch": 7.2},
        "cusparselt": {"microseconds": 10.5, "id": 12, "split_k": 1, "workspace_bytes": 0},
        "failed": {"cusparselt, id 17, split_k 1": "no answer within 20 s"}}]}

All times are microseconds a product. `dense`, `decode`, `prefill` (as `decode`, of that kernel) and
`cusparselt` are missing where there was none; `plan` where the kernel's own rule is as good;
`prefetch`, the time of the decode kernel by that rule when told that its weight is complete, where
it was not taken; `failed` where nothing failed; `partial`, true where only some of cuSPARSELt's
algorithms were tried, elsewhere; `chained`, true where the ways from the device form were timed in
a jitted chain as `dense` is, where they were timed in CUDA graphs of their own, for a shorter time.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import logging
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from esparse_jax import atomic

from . import _ffi_cuda
from ._ffi_cusparselt import UNIT, Algorithm
from .machine import Machine, this_machine

_LOGGER = logging.getLogger(__name__)

FORMAT_VERSION = 1
# The numbers of rows that are measured.
BUCKETS = (1, 8, *(2**power for power in range(4, 15)))
DTYPES = ("float16", "bfloat16")

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """One of our kernels: microseconds, and the plan where one beats the kernel's own rule.

    `prefetch`, of the decode kernel alone: microseconds by that rule, where it fetches its weight
    before the kernel before has ended, as `sparse_matmul` has it do when told that it may.
    """

    microseconds: float
    plan: Mapping[str, int] | None = None
    prefetch: float | None = None


@dataclasses.dataclass(frozen=True)
class LibraryTime:
    """cuSPARSELt's best algorithm: microseconds, and which it is."""

    microseconds: float
    algorithm: Algorithm


class Way(NamedTuple):
    """One way to compute a product.

    `plan` is of one of our kernels, `algorithm` cuSPARSELt's; `prefetch`, that the decode kernel
    fetches its weight early.
    """

    kind: Literal["decode", "prefill", "cusparselt"]
    microseconds: float
    plan: Mapping[str, int] | None = None
    algorithm: Algorithm | None = None
    prefetch: bool = False


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured for one product.

    Attributes:
        out, channels: Shape of the weight.
        dtype: Of weight and x, "float16" or "bfloat16".
        rows: Of x, one of `BUCKETS`.
        dense: Microseconds of XLA's dot with the dense weight.
        decode, cusparselt, prefill: The ways from the device form; None where there is none, or
            where no candidate came to right numbers. The library's is that of x padded to a
            multiple of 8.
        failed: Candidates that crashed, hung or computed wrong numbers, and which of these.
        partial: Only some of the library's algorithms were tried, since that was asked for.
        chained: The ways were timed as `dense` was. Else these are shorter measurements, whose
            times are not for a comparison with it, nor with those of other records.
    """

    out: int
    channels: int
    dtype: str
    rows: int
    dense: float | None = None
    decode: KernelTime | None = None
    cusparselt: LibraryTime | None = None
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    partial: bool = False
    prefill: KernelTime | None = None
    chained: bool = False

    @property
    def key(self) -> tuple[str, int, int, int]:
        """What tells records apart; tables are sorted by it."""
        return self.dtype, self.out, self.channels, self.rows

    def ways(self, *, prefetch: bool = False) -> list[Way]:
        """From the device form, the fastest first.

        Args:
            prefetch: The decode kernel may fetch its weight early. It does where that was timed and
                is no slower, and where it was not timed, for it is then taken to be as fast.
        """
        found = []
        decode = self.decode
        if decode is not None and prefetch and decode.prefetch is None:
            found.append(Way("decode", decode.microseconds, prefetch=True))
        elif decode is not None and prefetch and decode.prefetch <= decode.microseconds:
            found.append(Way("decode", decode.prefetch, prefetch=True))
        elif decode is not None:
            found.append(Way("decode", decode.microseconds, plan=decode.plan))
        if self.prefill is not None:
            found.append(Way("prefill", self.prefill.microseconds, plan=self.prefill.plan))
        if self.cusparselt is not None:
            library = self.cusparselt
            found.append(Way("cusparselt", library.microseconds, algorithm=library.algorithm))
        return sorted(found, key=lambda way: way.microseconds)

    @property
    def sparse(self) -> float | None:
        """Microseconds of the fastest way from the device form, without `prefetch`."""
        return self.ways()[0].microseconds if self.ways() else None


@dataclasses.dataclass(frozen=True, eq=False)
class TuningTable:
    """Records for one kind of GPU. Equal to itself alone: it is static where a product is traced.

    Attributes:
        machine: What it was measured on.
        jax: The version of JAX that `dense` was measured with, of the newest records.
        records: At most one for each key, sorted by it.
    """

    machine: Machine
    jax: str
    records: tuple[Record, ...] = ()

    def __post_init__(self):
        keys = [record.key for record in self.records]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"a tuning table holds a product once; {_product(*twice)} is twice.")
        ordered = tuple(sorted(self.records, key=lambda record: record.key))
        object.__setattr__(self, "records", ordered)

    @functools.cached_property
    def _by_key(self) -> dict[tuple[str, int, int, int], Record]:
        return {record.key: record for record in self.records}

    def find(self, shape: tuple[int, int], dtype: Any, rows: int) -> Record | None:
        """The record that serves a number of rows: the one of its `bucket`.

        Args:
            shape: `(out, channel)` of the weight.

        Returns:
            None where that was not measured: what is best for 16 rows says nothing of 4,096.
        """
        return self._by_key.get((np.dtype(dtype).name, *shape, bucket(rows)))

    def has_failed(self, kernel: str, dtype: Any) -> bool:
        """Whether one of our kernels crashed, hung or computed wrong numbers for any product in a
        dtype, by its own rule.

        Args:
            kernel: "decode" or "prefill".
        """
        return any(
            kernel in record.failed
            for record in self.records
            if record.dtype == np.dtype(dtype).name
        )

    def nearest_ways(self, shape: tuple[int, int], dtype: Any, rows: int) -> list[Way]:
        """How many rows of the product nearest to one that was not measured are multiplied from the
        device form, the fastest first.

        Nearness is in factors: of rows first, then of outputs and channels. Its times are those of
        another product, so they are left out, and so are what was cut for its shape: plans, and the
        workspace of an algorithm.

        Args:
            shape: `(out, channel)` of the weight.

        Returns:
            The prefill kernel, if it never failed in this dtype, and cuSPARSELt's algorithm, one or
            both; of a product that the library was measured for, if there is one. Empty where
            nothing was measured in this dtype for a quarter to four times the rows.

        Paper silent: the library's own choice was slower than dense in every product measured on an
            H200; which algorithm is best, and whether the prefill kernel is faster, follows the
            dtype and the number of rows much more than the shape.
        """

        def distance(record: Record) -> tuple[bool, float]:
            factors = (record.out / shape[0], record.channels / shape[1])
            apart = sum(abs(math.log2(factor)) for factor in factors)
            far = 4 * abs(math.log2(record.rows / bucket(rows))) + apart
            return record.cusparselt is None, far

        measured = [
            record
            for record in self.records
            if record.dtype == np.dtype(dtype).name
            and (record.cusparselt is not None or record.prefill is not None)
            and record.rows / 4 <= bucket(rows) <= 4 * record.rows
        ]
        if not measured:
            return []
        ways = []
        for way in min(measured, key=distance).ways():
            if way.kind == "prefill" and not self.has_failed("prefill", dtype):
                ways.append(Way("prefill", math.inf))
            elif way.algorithm is not None:
                algorithm = dataclasses.replace(way.algorithm, workspace_bytes=None)
                ways.append(Way("cusparselt", math.inf, algorithm=algorithm))
        return ways


def _product(dtype: str, out: int, channels: int, rows: int) -> str:
    return f"{out}x{channels} {dtype} with {rows} rows"


def merge_tables(older: TuningTable, newer: TuningTable) -> TuningTable:
    """The records of both; where both have one, the newer's.

    But what a search of some algorithms found replaces what a full one did only where it is faster;
    of our kernels, which such a search has in full, it is taken over where they ran or failed.
    Times of two kinds (`Record.chained`) are not mixed in one record.

    Raises:
        ValueError: They are for different machines.
    """
    if older.machine != newer.machine:
        raise ValueError(
            f"tables of different machines cannot be merged: {older.machine} and {newer.machine}. "
            f"Keep them in files of their own."
        )
    records = {record.key: record for record in older.records}
    for record in newer.records:
        before = records.get(record.key)
        if (
            before is None
            or not record.partial
            or before.partial
            or record.chained != before.chained
            or _faster(record, before)
        ):
            records[record.key] = record
        else:
            records[record.key] = _with_kernels(before, record)
    return TuningTable(newer.machine, newer.jax, tuple(records.values()))


def _with_kernels(before: Record, record: Record) -> Record:
    """The first record, with those of our kernels that ran or failed for the second."""
    for kernel, names in (("decode", ("decode", "prefetch")), ("prefill", ("prefill",))):
        time = getattr(record, kernel)
        if time is None and kernel not in record.failed:
            continue
        # "decode, tiles 2, ..." is a plan of the decode kernel.
        others = {k: v for k, v in before.failed.items() if k.split(",")[0] not in names}
        own = {k: v for k, v in record.failed.items() if k.split(",")[0] in names}
        before = dataclasses.replace(before, **{kernel: time}, failed=others | own)
    return before


def _faster(record: Record, other: Record) -> bool:
    """Whether the library is, in the first one."""
    if record.cusparselt is None or other.cusparselt is None:
        return other.cusparselt is None
    return record.cusparselt.microseconds < other.cusparselt.microseconds


# ---- files


def table_file(machine: Machine) -> Path:
    """Where this user's table for a machine is kept.

    `$XDG_CACHE_HOME/esparse_jax/tuning/<device>-<capability>-cusparselt-<version>.json`, with
    `~/.cache` where that variable is not set.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the XDG specification: others are to be ignored
        cache = Path.home() / ".cache"
    device = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")
    library = machine.cusparselt or "none"
    name = f"{device}-{machine.capability}-cusparselt-{library}.json"
    return cache / "esparse_jax" / "tuning" / name


def save_table(table: TuningTable, path: PathLike | None = None) -> Path:
    """Writes a table, together with the records that are in the file already and not in the table.

    The file is replaced in one go: whoever reads it meanwhile sees the old or the new one. Of two
    processes that save at the same moment, the later one wins.

    Args:
        path: None is `table_file` of its machine.

    Raises:
        ValueError: The file holds something else, or the table of another machine.
    """
    file = table_file(table.machine) if path is None else Path(path)
    if file.exists():
        table = merge_tables(load_table(file), table)
    text = json.dumps(_to_json(table), indent=1, allow_nan=False) + "\n"
    atomic.write_text(file, text)
    return file


def load_table(path: PathLike) -> TuningTable:
    """Reads a table and checks every value in it.

    Raises:
        ValueError: It is no table of this format; the message says which value is wrong.
        OSError: It cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no tuning table {path}. Write one with esparse tune --output {path}."
        )
    return _from_text(path.read_text(encoding="utf-8"), str(path))


def _to_json(table: TuningTable) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        **table.machine._asdict(),
        "jax": table.jax,
        "records": [_record_to_json(record) for record in table.records],
    }


def _record_to_json(record: Record) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "out": record.out,
        "channels": record.channels,
        "dtype": record.dtype,
        "rows": record.rows,
    }
    if record.dense is not None:
        fields["dense"] = record.dense
    for name, kernel in (("decode", record.decode), ("prefill", record.prefill)):
        if kernel is not None:
            fields[name] = {"microseconds": kernel.microseconds}
            if kernel.plan is not None:
                fields[name]["plan"] = dict(kernel.plan)
    if record.decode is not None and record.decode.prefetch is not None:
        fields["decode"]["prefetch"] = record.decode.prefetch
    if record.cusparselt is not None:
        algorithm = dataclasses.asdict(record.cusparselt.algorithm)
        fields["cusparselt"] = {
            "microseconds": record.cusparselt.microseconds,
            **{name: int(value) for name, value in algorithm.items() if value is not None},
        }
    if record.failed:
        fields["failed"] = dict(record.failed)
    for name in ("partial", "chained"):
        if getattr(record, name):
            fields[name] = True
    return fields


def _from_text(text: str, name: str) -> TuningTable:
    mend = "Measure again with `esparse tune --output` and another file, or remove this one."
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}. {mend}") from error
    where = "the table"
    try:
        _require_type(fields, dict, "it", "an object")
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version!r}; this version of the package reads {FORMAT_VERSION}"
            )
        _require_fields(
            fields, ("format_version", "device", "capability", "cusparselt", "jax", "records")
        )
        for field in ("device", "capability", "jax"):
            _require_type(fields[field], str, field, "a text")
        if fields["cusparselt"] is not None:
            _require_type(fields["cusparselt"], str, "cusparselt", "a version or null")
            if not re.fullmatch(r"[0-9]+(\.[0-9]+){2}", fields["cusparselt"]):
                raise ValueError(f'cusparselt is {fields["cusparselt"]!r}; it is like "0.8.0"')
        if not re.fullmatch(r"[0-9]+\.[0-9]+", fields["capability"]):
            raise ValueError(f'capability is {fields["capability"]!r}; it is like "9.0"')
        _require_type(fields["records"], list, "records", "a list")
        records = []
        for number, record in enumerate(fields["records"]):
            where = f"record {number}"
            records.append(_record_from_json(record))
        where = "the table"
        machine = Machine(fields["device"], fields["capability"], fields["cusparselt"])
        return TuningTable(machine, fields["jax"], tuple(records))
    except ValueError as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{name} is no tuning table: in {where}, {reason}. {mend}") from error


def _record_from_json(fields: Any) -> Record:
    _require_type(fields, dict, "it", "an object")
    _require_fields(
        fields,
        ("out", "channels", "dtype", "rows"),
        ("dense", "decode", "prefill", "cusparselt", "failed", "partial", "chained"),
    )
    for size in ("out", "channels"):
        _require_whole(fields[size], size)
        if fields[size] < UNIT or fields[size] % UNIT:
            raise ValueError(f"{size} is {fields[size]}; a 2:4 weight has multiples of {UNIT}")
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {fields['dtype']!r}; it is one of {', '.join(DTYPES)}")
    if fields["rows"] not in BUCKETS or isinstance(fields["rows"], bool):
        raise ValueError(f"rows is {fields['rows']!r}; it is one of {', '.join(map(str, BUCKETS))}")
    dense = _time_of(fields["dense"], "dense") if "dense" in fields else None
    failed = fields.get("failed", {})
    _require_type(failed, dict, "failed", "an object")
    for name, reason in failed.items():
        _require_type(reason, str, f"failed[{name!r}]", "a text")
    for name in ("partial", "chained"):
        _require_type(fields.get(name, False), bool, name, "true or false")
    return Record(
        fields["out"],
        fields["channels"],
        fields["dtype"],
        fields["rows"],
        dense,
        _kernel_from_json(fields, "decode", _ffi_cuda.PLAN_VALUES, _ffi_cuda.require_plan),
        _library_from_json(fields["cusparselt"]) if "cusparselt" in fields else None,
        failed,
        fields.get("partial", False),
        _kernel_from_json(
            fields, "prefill", _ffi_cuda.PREFILL_PLAN_VALUES, _ffi_cuda.require_prefill_plan
        ),
        fields.get("chained", False),
    )


def _kernel_from_json(
    record: Mapping[str, Any],
    name: str,
    plan_fields: Iterable[str],
    require_plan: Callable[[Mapping[str, int]], None],
) -> KernelTime | None:
    if name not in record:
        return None
    fields = record[name]
    _require_type(fields, dict, name, "an object")
    optional = ("plan", "prefetch") if name == "decode" else ("plan",)
    _require_fields(fields, ("microseconds",), optional, name)
    microseconds = _time_of(fields["microseconds"], f"{name}'s microseconds")
    prefetch = None
    if "prefetch" in fields:
        prefetch = _time_of(fields["prefetch"], f"{name}'s prefetch")
    plan = fields.get("plan")
    if plan is not None:
        _require_type(plan, dict, "plan", "an object")
        _require_fields(plan, (), plan_fields, "plan")
        for field, value in plan.items():
            _require_whole(value, field)
        require_plan(plan)
    return KernelTime(microseconds, plan, prefetch)


def _library_from_json(fields: Any) -> LibraryTime:
    _require_type(fields, dict, "cusparselt", "an object")
    names = tuple(field.name for field in dataclasses.fields(Algorithm))
    _require_fields(fields, ("microseconds", "id"), names, "cusparselt")
    microseconds = _time_of(fields["microseconds"], "cusparselt's microseconds")
    values = {name: fields[name] for name in names if name in fields}
    for name, value in values.items():
        _require_whole(value, name)
    return LibraryTime(microseconds, Algorithm(**values))


def _require_type(value: Any, kind: type, name: str, words: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r}; it must be {words}")


def _require_whole(value: Any, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")


def _time_of(value: Any, name: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {value!r}; a time is a positive number of microseconds")
    return float(value)


def _require_fields(
    fields: Mapping[str, Any],
    required: Iterable[str],
    optional: Iterable[str] = (),
    name: str = "it",
) -> None:
    required = set(required)
    missing, unknown = required - set(fields), set(fields) - required - set(optional)
    if missing:
        raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    if unknown:
        raise ValueError(f"{name} has the unknown {', '.join(sorted(map(str, unknown)))}")


# ---- which table is asked


class Stored(NamedTuple):
    """The table that applies to a machine, and the files it came from, the stronger ones last.

    `others` are the versions of cuSPARSELt, None for no library, of files that are not for the
    machine's own: what these say of the library is left out.
    """

    table: TuningTable | None
    files: tuple[str, ...]
    others: tuple[str | None, ...] = ()


@functools.cache
def stored_table(machine: Machine) -> Stored:
    """What was measured for a machine: the package's own table, and over it the user's.

    What a table of the package that is for the same GPU and another version of cuSPARSELt says of
    our own kernels and of dense products holds too, where nothing else is known.

    Read once per process, which is the only thing this module remembers: what is measured while a
    process runs is used by the next one, or by this one through `use_table`. A file that cannot be
    read is passed over, and one line is logged.
    """
    tables = {}
    for name, text in _candidates(machine):
        try:
            tables[name] = _from_text(text(), name)
        except (OSError, ValueError) as error:
            _LOGGER.warning("a tuning table is not used: %s", error)
    table, files, others = None, [], []
    for name, found in sorted(tables.items(), key=lambda item: item[1].machine == machine):
        if found.machine[:2] != machine[:2]:
            continue
        if found.machine != machine:
            if name == str(table_file(machine)):  # it is another one's, under this one's name
                continue
            others.append(found.machine.cusparselt)
            found = _own_kernels(found, machine)
        table = found if table is None else merge_tables(table, found)
        files.append(name)
    return Stored(table, tuple(files), tuple(others))


def _own_kernels(table: TuningTable, machine: Machine) -> TuningTable:
    """What a table says of our kernels and of dense products, for another version of the library;
    whatever is measured with that version replaces it.
    """
    records = [
        dataclasses.replace(
            record,
            cusparselt=None,
            failed={k: v for k, v in record.failed.items() if not k.startswith("cusparselt")},
            partial=True,
        )
        for record in table.records
        if record.decode is not None or record.prefill is not None
    ]
    return TuningTable(machine, table.jax, tuple(records))


def _candidates(machine: Machine):
    """(name, function that reads it) of every file that may hold the machine's table."""
    packaged = importlib.resources.files(__package__) / "tables"
    for file in sorted(packaged.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            yield str(file), functools.partial(file.read_text, encoding="utf-8")
    own = table_file(machine)
    if own.exists():
        yield str(own), functools.partial(own.read_text, encoding="utf-8")


# What `use_table` was given: a table, None for none, or the machine's own.
TableChoice = TuningTable | Literal["machine"] | None
_IN_USE: ContextVar[TableChoice] = ContextVar("esparse_jax_tuning_table", default="machine")


@contextlib.contextmanager
def use_table(table: TuningTable | None) -> Iterator[None]:
    """Inside, products are traced with this table, or with None without any.

    Otherwise they are traced with the one that belongs to the machine (`stored_table`). What was
    traced before keeps its choices; so does a jitted function that was first called elsewhere::

        with use_table(load_table("h200.json")):
            step = jax.jit(decode_step).lower(*arguments).compile()

    With a GPU at hand the table must be for that GPU and its library. Without one, a computation
    that is lowered for CUDA takes the table as it is.

    Raises:
        TypeError: `table` is none, for example the name of a file.
    """
    if table is not None and not isinstance(table, TuningTable):
        raise TypeError(
            f"use_table takes a TuningTable, such as load_table(FILE), or None; got {table!r}."
        )
    token = _IN_USE.set(table)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def table_choice() -> TableChoice:
    """What `use_table` says here, as a static value."""
    return _IN_USE.get()


def resolve_table(choice: TableChoice) -> TuningTable | None:
    """The table that a choice comes to on the machine at hand.

    Raises:
        ValueError: A table that was given is for another machine.
    """
    machine = this_machine()
    if isinstance(choice, TuningTable):
        if machine is not None and choice.machine != machine:
            raise ValueError(
                f"this tuning table is for {choice.machine}; here is {machine}, where its times "
                f"and algorithm numbers mean nothing. Run `esparse tune` here, or use_table(None)."
            )
        return choice
    if choice is None or machine is None:
        return None
    return stored_table(machine).table


# ---- sparse or dense


class FormChoice(NamedTuple):
    """Whether a layer is better held 2:4 or dense.

    Attributes:
        form: "sparse" or "dense".
        reason: Why, as a sentence without its full stop.
        sparse, dense: Microseconds of the two, geometric means over the rows; None where they were
            not measured.
    """

    form: Literal["sparse", "dense"]
    reason: str
    sparse: float | None = None
    dense: float | None = None


def choose_form(
    shape: tuple[int, int],
    dtype: Any,
    rows: tuple[int, int],
    table: TuningTable | None = None,
) -> FormChoice:
    """Whether a weight is faster dense or in its device form, for a range of rows.

    The times of all records that serve a number of rows in the range are compared by their
    geometric means: each of these numbers of rows counts the same, whatever its time. They are
    those of products that start when what is before them has ended, 2:4 and dense alike. A tie is
    sparse, which takes 9/16 of the memory; so is whatever was not measured.

    Args:
        shape: `(out, channel)` of the weight.
        rows: The smallest and the largest number of rows (tokens at once) it will see.
        table: None is the one in use here, see `use_table`.

    Raises:
        ValueError: `rows` is no range of numbers from 1.
    """
    if not isinstance(rows, Sequence) or len(rows) != 2 or not 1 <= rows[0] <= rows[1]:
        raise ValueError(
            f"rows is the smallest and the largest number of rows of x, from 1; got {rows}."
        )
    low, high = rows
    table = resolve_table(table_choice() if table is None else table)
    if table is None:
        return FormChoice("sparse", "there is no tuning table for this machine (esparse tune)")
    served = {bucket(low), bucket(high), *(size for size in BUCKETS if low <= size <= high)}
    found = {size: table.find(shape, dtype, size) for size in sorted(served)}
    missing = [
        size
        for size, record in found.items()
        if record is None or record.sparse is None or record.dense is None
    ]
    name = f"{shape[0]}x{shape[1]} {np.dtype(dtype).name}"
    if missing:
        listed = ", ".join(map(str, missing))
        return FormChoice("sparse", f"{name} was not measured at rows {listed} (esparse tune)")
    sparse, dense = (
        statistics.geometric_mean([getattr(record, form) for record in found.values()])
        for form in ("sparse", "dense")
    )
    form = "dense" if dense < sparse else "sparse"
    reason = f"{name} takes {sparse:.1f} us 2:4 and {dense:.1f} us dense for {low} to {high} rows"
    return FormChoice(form, reason, sparse, dense)


def bucket(rows: int) -> int:
    """The number of rows that is measured for this one: the next of `BUCKETS`, or the last."""
    return next((size for size in BUCKETS if size >= rows), BUCKETS[-1])
