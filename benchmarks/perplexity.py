"""Perplexity of a LLaMA after one-shot pruning: tables 1 and 4, and what lies under them.

    python benchmarks/perplexity.py --model DIR --calibration TEXT --evaluation TEXT [TEXT ...]

Each table is a list of pruning choices; every choice is run for every seed, and its perplexity on
every text is printed as mean and standard deviation over the seeds.

    methods     magnitude, Wanda, E-Sparse without shuffle and with each shuffle (tables 1 and 4)
    alpha       E-Sparse without shuffle over `--alphas`, for each of `--kinds` of amplitude; the
                plain L2 norm over T tokens at alpha is the root mean square at alpha * sqrt(T)
    span        what the bins of the histogram span
    deal        how the global shuffle deals the sorted channels, for each shuffle
    shuffles    the default against every other shuffle, smaller blocks, other deals, heads kept
                within, and selection by the true output error: paired differences over the
                seeds, with 95 % intervals
    samples     Wanda, and E-Sparse with alpha swept, at each of `--counts` calibration windows
    batching    cells of the histograms that differ between two batch sizes

`shuffles` wants many seeds and a GPU; `--only` takes names of its rows or what they begin with:

    python benchmarks/perplexity.py --model DIR --calibration TEXT --evaluation TEXT \\
        --tables shuffles --seeds 0 1 2 3 4 5 6 7 8 9 --only shuffle=full select --json FILE
"""

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy import stats

import esparse_jax as es
from esparse_jax.models.llama import LAYERS_PATH, PRUNED_GROUPS

Table = Literal["methods", "alpha", "span", "deal", "shuffles", "samples", "batching"]

REFERENCE = "default"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prune by many choices, evaluate, and compare."""

    model: Path
    calibration: Path
    evaluation: tuple[Path, ...]
    tables: tuple[Table, ...] = ("methods",)
    patterns: tuple[str, ...] = ("2:4", "4:8")
    seeds: tuple[int, ...] = (0, 1, 2)
    alphas: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    kinds: tuple[Literal["rms", "l2", "relative"], ...] = ("rms", "relative")
    counts: tuple[int, ...] = (16, 128, 512)
    shuffles: tuple[str, ...] = es.SHUFFLES
    only: tuple[str, ...] = ()
    """Rows of the table `shuffles`: their names or beginnings of them; all if not given."""
    num_samples: int = 128
    sequence_length: int = 512
    batch_size: int = 16
    dtype: str = "float32"
    json: Path | None = None


def variants(table: Table, arguments: Arguments) -> list[dict[str, Any]]:
    """The choices that a table compares; `windows` beside PruneConfig's own fields."""
    if table == "methods":
        plain = [{"method": m, "shuffle": "none"} for m in ("magnitude", "wanda")]
        return plain + [{"method": "esparse", "shuffle": s} for s in arguments.shuffles]
    if table == "alpha":
        swept = itertools.product(arguments.kinds, arguments.alphas)
        return [{"shuffle": "none", "amplitude": kind, "alpha": alpha} for kind, alpha in swept]
    if table == "span":
        return [{"shuffle": "none", "bin_span": span} for span in ("channel", "layer", "rms")]
    if table == "deal":
        dealt = itertools.product(("global", "paper", "strided"), ("naive", "snake"))
        return [{"shuffle": shuffle, "deal": deal} for shuffle, deal in dealt]
    counts = arguments.counts
    return [{"method": "wanda", "shuffle": "none", "windows": count} for count in counts] + [
        {"shuffle": "none", "alpha": alpha, "windows": count}
        for count, alpha in itertools.product(counts, arguments.alphas)
    ]


def shuffle_variants(only: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What the rows of the table `shuffles` change in the default, by name; the default first."""
    default = es.PruneConfig()
    swept = {
        "shuffle": es.SHUFFLES,
        "block_size": (256,),
        "deal": ("naive", "snake"),
        "heads": ("free", "within"),
        "select": ("metric", "error"),
    }
    changes = {
        f"{name}={value}": {name: value}
        for name, values in swept.items()
        for value in values
        if value != getattr(default, name)
    }
    unknown = [name for name in only if not any(row.startswith(name) for row in changes)]
    if unknown:
        raise ValueError(
            f"--only {' '.join(unknown)} names no row; there are {', '.join(changes)}."
        )
    kept = {row: change for row, change in changes.items() if row.startswith(only or "")}
    return {REFERENCE: {}} | kept


def paired(values: list[float], reference: list[float]) -> dict[str, float | None]:
    """Mean of the paired differences and the half width of its 95 % interval (Student's t)."""
    differences = np.subtract(values, reference)
    count = len(differences)
    if count < 2:
        return {"mean": float(differences.mean()), "half width": None}
    spread = float(differences.std(ddof=1)) / math.sqrt(count)
    return {
        "mean": float(differences.mean()),
        "half width": float(stats.t.ppf(0.975, count - 1)) * spread,
    }


def prune_and_evaluate(
    model,
    windows: np.ndarray,
    config: es.PruneConfig,
    evaluate: Callable[[Any], dict[str, float]],
    batch_size: int,
) -> dict[str, Any]:
    """One draw of the table `shuffles`."""
    pruned, report = es.prune_model(model, windows, config, batch_size=batch_size)
    return {
        "perplexity": evaluate(pruned),
        "output error": report.output_error,
        "metric kept": report.kept_share,
        "shuffles": collections.Counter(record.shuffle for record in report.layers.values()),
        "seconds": report.seconds,
    }


def summary(runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the draws, and the differences to the reference on the same draws."""

    def both(pick: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        values = [pick(run) for run in runs]
        difference = paired(values, [pick(run) for run in reference])
        return {"mean": float(np.mean(values)), "difference": difference}

    return {
        "perplexity": {
            name: both(lambda run, name=name: run["perplexity"][name])
            for name in runs[0]["perplexity"]
        },
        "output error": both(lambda run: run["output error"]),
        "metric kept": both(lambda run: run["metric kept"]),
        # The first draw compiles what the rows before it did not.
        "seconds": float(np.median([run["seconds"] for run in runs[1:] or runs])),
    }


def shuffles(
    model,
    arguments: Arguments,
    calibration: Callable[[int, int], np.ndarray],
    evaluate: Callable[[Any], dict[str, float]],
    flush: Callable[[list[dict[str, Any]]], None],
) -> None:
    """The rows of the table `shuffles`, flushed one by one, and the table as markdown."""
    rows: list[dict[str, Any]] = []
    for pattern in arguments.patterns:
        reference: list[dict[str, Any]] = []
        for name, change in shuffle_variants(arguments.only).items():
            config = es.PruneConfig(
                pattern=es.NMPattern.parse(pattern), measure_error=True, **change
            )
            runs = []
            for seed in arguments.seeds:
                windows = calibration(seed, arguments.num_samples)
                run = prune_and_evaluate(model, windows, config, evaluate, arguments.batch_size)
                runs.append({"seed": seed} | run)
            reference = reference or runs
            row = {"pattern": pattern, "row": name, "runs": runs} | summary(runs, reference)
            rows.append(row)
            flush(rows)
            print(f"shuffles {pattern} {name}: {markdown_row(row)}", flush=True)
    texts = list(rows[0]["perplexity"])
    header = ["pattern", "row"]
    header += [cell for text in texts for cell in (f"perplexity, {text}", "difference")]
    header += ["output error", "difference", "metric kept", "seconds"]
    print(
        f"\n{len(arguments.seeds)} draws of {arguments.num_samples} windows of "
        f"{arguments.sequence_length} tokens. Differences: to the default on the same draws, mean "
        f"and half width of the 95 % interval. Seconds: to prune, median after the first draw.\n"
    )
    print(f"| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    for row in rows:
        print(f"| {row['pattern']} | {row['row']} {markdown_row(row)}")


def markdown_row(row: dict[str, Any]) -> str:
    """The figures of a row of the table `shuffles`."""

    def difference(figure: dict[str, Any], scale: float, digits: int) -> str:
        if row["row"] == REFERENCE:
            return "reference"
        mean, half = figure["difference"]["mean"], figure["difference"]["half width"]
        interval = "" if half is None else f" ± {scale * half:.{digits}f}"
        return f"{scale * mean:+.{digits}f}{interval}"

    cells = []
    for figure in row["perplexity"].values():
        cells += [f"{figure['mean']:.3f}", difference(figure, 1, 3)]
    error = row["output error"]
    cells += [f"{100 * error['mean']:.3f} %", difference(error, 100, 3)]
    cells += [f"{row['metric kept']['mean']:.4f}", f"{row['seconds']:.2f}"]
    return f"| {' | '.join(cells)} |"


def batching(model, windows: np.ndarray) -> dict[str, Any]:
    """How many histogram cells of the first block's inputs two batch sizes count differently."""
    block, config = model.model.layers[0], es.PruneConfig()
    found = []
    for size in (4, 16):
        starts = range(0, len(windows), size)
        batches = [model.embed(jnp.asarray(windows[start : start + size])) for start in starts]
        found.append(es.calibrate_block(block, PRUNED_GROUPS, batches, config, name=LAYERS_PATH))
    differing = total = 0
    for path in found[0]:
        a, b = (np.asarray(stats[path].histogram) for stats in found)
        tokens = windows.size
        assert (a.sum(axis=1) == tokens).all(), path
        assert (b.sum(axis=1) == tokens).all(), path
        differing, total = differing + int((a != b).sum()), total + a.size
    return {"differing cells": differing, "cells": total, "tokens": int(windows.size)}


def save(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        es.write_json(path, results)


def main(arguments: Arguments) -> None:
    shuffle_variants(arguments.only)  # says so before anything runs if a row is unknown
    model, tokenizer = es.load_model(arguments.model, dtype=arguments.dtype)
    texts = {}
    for path in arguments.evaluation:
        tokens = es.read_text_tokens(path, tokenizer)
        texts[path.name] = es.evaluation_windows(tokens, arguments.sequence_length)

    @functools.cache
    def calibration(seed: int, count: int) -> np.ndarray:
        return es.calibration_windows(
            arguments.calibration,
            tokenizer,
            num_samples=count,
            sequence_length=arguments.sequence_length,
            seed=seed,
        )

    def evaluate(candidate) -> dict[str, float]:
        size = arguments.batch_size
        return {
            name: es.perplexity(candidate, windows, batch_size=size).perplexity
            for name, windows in texts.items()
        }

    dense = evaluate(model)
    device = jax.devices()[0].device_kind
    print(f"{arguments.model.name} on {device}, jax {jax.__version__}; dense {dense}")
    results: dict[str, Any] = {"dense": dense, "device": device, "tables": {}}
    for table in arguments.tables:
        if table == "batching":
            results["tables"][table] = batching(model, calibration(0, arguments.num_samples))
            print(table, results["tables"][table])
            continue
        if table == "shuffles":

            def flush(rows: list[dict[str, Any]], table=table) -> None:
                results["tables"][table] = rows
                save(arguments.json, results)

            shuffles(model, arguments, calibration, evaluate, flush)
            continue
        rows = []
        for pattern, choice in itertools.product(arguments.patterns, variants(table, arguments)):
            options = {key: value for key, value in choice.items() if key != "windows"}
            config = es.PruneConfig(pattern=es.NMPattern.parse(pattern), **options)
            runs = []
            for seed in arguments.seeds:
                started = time.perf_counter()
                windows = calibration(seed, choice.get("windows", arguments.num_samples))
                pruned, report = es.prune_model(
                    model, windows, config, batch_size=arguments.batch_size
                )
                runs.append(
                    {
                        "seed": seed,
                        "perplexity": evaluate(pruned),
                        "metric kept": report.kept_share,
                        "seconds": time.perf_counter() - started,
                    }
                )
            row = {"pattern": pattern, **choice, "runs": runs}
            rows.append(row)
            results["tables"][table] = rows
            save(arguments.json, results)
            figures = []
            for name in texts:
                values = [run["perplexity"][name] for run in runs]
                spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
                figures.append(f"{name} {np.mean(values):.2f} +- {spread:.2f}")
            label = " ".join(f"{key}={value}" for key, value in choice.items())
            kept = np.mean([run["metric kept"] for run in runs])
            print(f"{table} {pattern} {label}: {', '.join(figures)}; kept {kept:.4f}", flush=True)
    save(arguments.json, results)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
