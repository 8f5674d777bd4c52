"""What `esparse tune` measures, and how it shows what was found."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from esparse_jax.files.directory import read_config, require_directory
from esparse_jax.models import PUBLISHED_SHAPES, product_shapes, published_shapes
from esparse_jax.models.llama import LlamaConfig
from esparse_jax.sparse import Record, TuningTable, why_not_tuned
from esparse_jax.sparse.table import KernelTime

Shape = tuple[int, int]
DTYPES = ("float16", "bfloat16")


def parse_shape(text: str) -> Shape:
    """4096x11008 as (4096, 11008): outputs, channels.

    Raises:
        ValueError: It is written otherwise.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"a shape is OUTxCHANNEL, outputs and input channels of the weight, such as "
            f"4096x11008; got {text!r}."
        )
    return int(parts[0]), int(parts[1])


def wanted(
    model: Path | None, shapes: Sequence[str], names: Sequence[str], separate: bool, dtype: str
) -> tuple[list[Shape], str]:
    """The shapes that are asked for, each once, and their dtype.

    Args:
        model: A checkpoint whose products are among them.
        shapes: OUTxCHANNEL.
        names: Of `PUBLISHED_SHAPES`.
        separate: Whether projections that share an input are tuned one by one as well.
        dtype: "auto" is that of the model, if it has 16 bits, else float16.

    Raises:
        ValueError: Nothing is asked for, or a shape that is not tuned.
    """
    config = _config(model)
    if dtype == "auto":
        dtype = config.dtype if config is not None and config.dtype in DTYPES else "float16"
    forms = (True, False) if separate else (True,)
    found = [parse_shape(text) for text in shapes]
    for fused in forms:
        for name in names:
            found += published_shapes(name, fused=fused).values()
        if config is not None:
            found += product_shapes(config, fused=fused).values()
    if not found:
        raise ValueError(
            f"tune what? Give a MODEL directory, --shape OUTxCHANNEL, or --model-shape with one of "
            f"{', '.join(PUBLISHED_SHAPES)}."
        )
    found = list(dict.fromkeys(found))
    refused = [
        f"{out}x{channels}: {reason}"
        for out, channels in found
        if (reason := why_not_tuned((out, channels), dtype)) is not None
    ]
    if refused:
        raise ValueError(
            "products that are not tuned, because nothing but plain JAX multiplies them: "
            + "; ".join(refused)
            + ". Leave them out, with --shape for those that are left."
        )
    return found, dtype


def _config(model: Path | None) -> LlamaConfig | None:
    return None if model is None else read_config(require_directory(model))[1]


HEADER = (
    f"{'out x channels':>15s} {'rows':>6s} {'dense':>9s} {'decode':>9s} {'prefetch':>9s} "
    f"{'prefill':>9s} "
    f"{'cuSPARSELt':>11s}  "
    f"{'algorithm':<16s} {'dense / 2:4':>11s}"
)


def asked_for(
    table: TuningTable | None, shapes: Iterable[Shape], dtype: str, rows: Iterable[int]
) -> list[Record]:
    """The records of a table that are of these products."""
    shapes, rows = set(shapes), set(rows)
    return [
        record
        for record in (() if table is None else table.records)
        if record.dtype == dtype and record.key[1:3] in shapes and record.rows in rows
    ]


def record_lines(records: Sequence[Record]) -> list[str]:
    """Records, a line each below a header, and what failed in the search; nothing of none."""
    if not records:
        return []
    failed = {
        f"{record.out}x{record.channels}: {name}: {reason}"
        for record in records
        for name, reason in record.failed.items()
    }
    return [HEADER, *map(_line, records), *(f"left out: {text}" for text in sorted(failed))]


def _line(record: Record) -> str:
    library, algorithm = "-", ""
    if record.cusparselt is not None:
        library = f"{record.cusparselt.microseconds:.2f}"
        chosen = record.cusparselt.algorithm
        algorithm = f"{chosen.id}" + (f", split_k {chosen.split_k}" if chosen.split_k else "")
    dense, sparse = record.dense, record.sparse
    ratio = "-" if dense is None or sparse is None else f"{dense / sparse:.2f}"
    return (
        f"{f'{record.out}x{record.channels}':>15s} {record.rows:6d} "
        f"{_time(dense):>9s} {_kernel(record.decode):>9s} "
        f"{_time(record.decode and record.decode.prefetch):>9s} "
        f"{_kernel(record.prefill):>9s} {library:>11s}  "
        f"{algorithm:<16s} {ratio:>11s}"
    )


def _time(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:.2f}"


def _kernel(time: KernelTime | None) -> str:
    """Microseconds of one of our kernels; a star where a plan beats its own rule."""
    if time is None:
        return "-"
    return f"{time.microseconds:.2f}" + ("" if time.plan is None else "*")
