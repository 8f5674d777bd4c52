"""Table 6: the device memory of a model, dense and with 2:4 linears.

    python benchmarks/memory.py --json memory.json         # 7B and 13B, on a GPU of 80 GB or more;
                                                           # without one what is computed alone
    python benchmarks/memory.py --measure tiny --fit llama-65b --device-gb 80 141

Two tables. The first is measured: random weights of a shape in the inference form, dense and 2:4,
each in a process of its own; a prompt is read and tokens are generated.

- `linears`: bytes of the arrays that hold the linears' weights, and their share `of dense` ones.
- `model`: bytes of all its arrays, which are on the device (the JSON also has what the allocator
  took for them); `peak`: the most that ever was in the process, what XLA tries out when it compiles
  included; with a star it was that while the model was made. `saved` is the share of the dense
  form's that is not taken. A dash: the device (a CPU) does not say.

The second is computed from the shapes, and nothing of it is measured: weights, the cache of
`--batch` rows of `--context` tokens, and whether both fit into `--device-gb`, less `--reserve` of
it for activations, libraries and what an allocator cannot use; and how many rows of that context
do.
GB are 10^9 bytes.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from esparse_jax.atomic import write_text
from esparse_jax.inference.bench import SHAPES, BenchOptions, BenchResult, run_bench
from esparse_jax.models import model_bytes

FORMS = ("dense", "sparse")


@dataclass(frozen=True)
class Options:
    """What to measure and what to compute."""

    measure: tuple[str, ...] | None = None
    """Shapes that are measured, one form after the other; llama-7b and llama-13b if not given, and
    without a GPU none: they would take all memory."""
    fit: tuple[str, ...] = ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-70b")
    """Shapes of which is computed what fits."""
    device_gb: tuple[float, ...] = (80.0, 141.0)
    """Sizes of devices."""
    reserve: float = 0.05
    """Share of a device that weights and cache leave alone."""
    batch: int = 8
    context: int = 2048
    new_tokens: int = 16
    dtype: str = "auto"
    """Of what is measured; auto is float16 on a GPU. What is computed has 16 bits."""
    json: Path | None = None
    """Also write the figures here."""

    def check(self) -> None:
        """Raises a ValueError for what cannot be measured or computed."""
        unknown = sorted({*(self.measure or ()), *self.fit} - set(SHAPES))
        if unknown:
            raise ValueError(f"shapes are {', '.join(SHAPES)}; got {', '.join(unknown)}.")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve is {self.reserve}; it must be in [0, 1).")
        if not all(size > 0 for size in self.device_gb):
            raise ValueError(f"device_gb are {self.device_gb}; each must be greater than 0.")
        self.bench("tiny")

    def bench(self, shape: str) -> BenchOptions:
        """The measurement of a shape."""
        return BenchOptions(
            shape=shape,
            batch=self.batch,
            context=self.context,
            new_tokens=self.new_tokens,
            dtype=self.dtype,
            repeats=1,
        )


MEASURED = (
    f"{'shape':11} {'form':7} {'linears GB':>10} {'of dense':>8} {'model GB':>9} {'saved':>6} "
    f"{'peak GB':>9} {'saved':>6}"
)
COMPUTED = (
    f"{'shape':11} {'form':7} {'linears GB':>10} {'rest GB':>8} {'cache GB':>9} {'all GB':>7}"
)


def measured_row(result: BenchResult, dense: BenchResult | None) -> dict[str, Any]:
    """A form's figures, and what they are of the dense form's; None where there is none."""

    def saved(name: str) -> float | None:
        ours, theirs = getattr(result, name), getattr(dense, name, None)
        return None if ours is None or not theirs else 1 - ours / theirs

    share = saved("linear_bytes")
    return {
        "form": result.form,
        "error": result.error,
        "device": result.device,
        "dtype": result.dtype,
        "versions": result.versions,
        "linear_bytes": result.linear_bytes,
        "linear_share": None if share is None else 1 - share,
        "model_bytes": result.model_bytes,
        "model_saved": saved("model_bytes"),
        "allocated_bytes": result.resident_bytes,
        "allocated_saved": saved("resident_bytes"),
        "peak_bytes": result.peak_bytes,
        "peak_saved": saved("peak_bytes"),
        "peak_is_of_making": result.peak_bytes is not None
        and result.peak_bytes == result.made_peak_bytes,
    }


def measured_line(shape: str, row: dict[str, Any]) -> str:
    """That as a line."""
    if row["error"] is not None:
        return f"{shape:11} {row['form']:7} failed: {row['error']}"

    def number(name: str, factor: float, text: str) -> str:
        return "-" if row[name] is None else text.format(row[name] * factor)

    peak = number("peak_bytes", 1e-9, "{:.2f}") + "*" * row["peak_is_of_making"]
    return (
        f"{shape:11} {row['form']:7} {number('linear_bytes', 1e-9, '{:.4f}'):>10} "
        f"{number('linear_share', 1, '{:.4f}'):>8} {number('model_bytes', 1e-9, '{:.2f}'):>9} "
        f"{number('model_saved', 100, '{:.1f}%'):>6} {peak:>9} "
        f"{number('peak_saved', 100, '{:.1f}%'):>6}"
    )


def computed_rows(options: Options) -> Iterator[dict[str, Any]]:
    """What each shape takes in each form, and what of it fits."""
    for shape in options.fit:
        for form in FORMS:
            taken = model_bytes(
                SHAPES[shape], sparse=form == "sparse", batch=options.batch, slots=options.context
            )
            devices = []
            for size in options.device_gb:
                usable = (1 - options.reserve) * size * 1e9
                left = usable - taken.linear - taken.outside
                rows = max(0, int(left // (taken.cache / options.batch)))
                devices.append({"gb": size, "fits": taken.total <= usable, "rows": rows})
            yield {
                "shape": shape,
                "form": form,
                **taken._asdict(),
                "total": taken.total,
                "devices": devices,
            }


def computed_line(row: dict[str, Any]) -> str:
    """That as a line."""
    linear, outside, cache, total = (
        row[name] / 1e9 for name in ("linear", "outside", "cache", "total")
    )
    line = (
        f"{row['shape']:11} {row['form']:7} {linear:10.2f} {outside:8.2f} {cache:9.2f} {total:7.1f}"
    )
    for device in row["devices"]:
        text = f"{'fits' if device['fits'] else 'no'}, {device['rows']} rows"
        line += f" {text:>15}"
    return line


def shapes_to_measure(options: Options) -> tuple[str, ...]:
    """Those that were asked for, or what a GPU holds; a child says whether there is one.

    Raises:
        RuntimeError: It cannot say.
    """
    if options.measure is not None:
        return options.measure
    small = replace(options.bench("tiny"), batch=1, context=32, new_tokens=1)
    (tried,) = run_bench(small, ("dense",))
    if tried.error is not None:
        raise RuntimeError(f"not even tiny runs here, so no 7B is tried: {tried.error}")
    if tried.device == "cpu":
        print("nothing: this is a CPU, where 7B and 13B would take all memory (--measure NAME)")
        return ()
    return ("llama-7b", "llama-13b")


def main(options: Options) -> int:
    """Prints both tables; 1 if a form could not be measured."""
    try:
        options.check()
    except ValueError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"options": asdict(options), "measured": [], "computed": []}

    def write() -> None:
        if options.json is not None:
            write_text(options.json, json.dumps(report, indent=1, default=str) + "\n")

    work = f"{options.batch} rows of {options.context} tokens"
    print(f"Measured: {work} read, {options.bench('tiny').steps} generated", MEASURED, sep="\n")
    where, shapes, failed = set(), (), False
    try:
        shapes = shapes_to_measure(options)
    except RuntimeError as error:
        print(error)
        failed = True
    for shape in shapes:
        dense = None
        for form in FORMS:
            (result,) = run_bench(options.bench(shape), (form,))
            if form == "dense" and result.error is None:
                dense = result
            row = measured_row(result, dense)
            report["measured"].append({"shape": shape} | row)
            print(measured_line(shape, row), flush=True)
            if result.error is None:
                where.add(f"{result.dtype} on {result.device}, {result.versions}")
            for note in result.notes:
                print(f"{shape} {form}: {note}")
            write()
    print(*sorted(where), "", sep="\n")
    sizes = "".join(f" {f'{size:g} GB':>15}" for size in options.device_gb)
    print(f"Computed from the shapes, 16 bits: cache of {work}", COMPUTED + sizes, sep="\n")
    for row in computed_rows(options):
        report["computed"].append(row)
        print(computed_line(row))
    write()
    return int(failed or any(row["error"] is not None for row in report["measured"]))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
