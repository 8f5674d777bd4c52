"""E-Sparse end to end: load, calibrate, prune, evaluate, run the sparse model, save.

With no argument it runs on the small LLaMA beside it; any LLaMA directory works as well:

    python examples/prune_llama_flax.py --model DIR --calibration TEXT --evaluation TEXT
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import esparse_jax as es

HERE = Path(__file__).parent / "tiny-llama"

HEADER = ("pattern", "method", "perplexity", "metric kept", "seconds")
METHODS = {
    "magnitude": {"method": "magnitude", "shuffle": "none"},
    "Wanda": {"method": "wanda", "shuffle": "none"},
    "E-Sparse": {"method": "esparse", "shuffle": "none"},
    "E-Sparse + global": {"method": "esparse", "shuffle": "global"},
    "E-Sparse + paper": {"method": "esparse", "shuffle": "paper"},
    "E-Sparse + strided": {"method": "esparse", "shuffle": "strided"},
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prune a LLaMA by magnitude, Wanda and E-Sparse at 2:4 and 4:8, and compare."""

    model: Path = HERE
    calibration: Path = HERE / "calibration.npz"
    evaluation: Path = HERE / "evaluation.npz"
    output: Path = Path("pruned-2of4")
    prompt: str = "class Thread(object)\nA class that represents a thread of control.\n"
    num_samples: int = 32
    sequence_length: int = 256
    new_tokens: int = 64
    dtype: str = "float32"
    seed: int = 0
    overwrite: bool = True
    json: Path | None = None


def greedy(models: dict, prompt: list[int], count: int) -> dict[str, tuple[np.ndarray, float]]:
    """Each model's greedy continuation and its tokens per second, compilation left out.

    The models take turns, so that whatever else the machine does slows all of them.
    """
    tokens, times = {}, {name: [] for name in models}
    for _ in range(10):
        for name, model in models.items():
            started = time.perf_counter()
            (tokens[name],) = es.generate(model, [prompt], max_new_tokens=count)
            times[name].append(time.perf_counter() - started)
    return {name: (tokens[name], count / float(np.median(times[name][1:]))) for name in models}


def main(args: Arguments) -> None:
    target = {"like": args.model, "overwrite": args.overwrite}
    es.check_output(args.output, **target)
    model, tokenizer = es.load_model(args.model, dtype=args.dtype)
    draw = {"num_samples": args.num_samples, "sequence_length": args.sequence_length}
    windows = es.calibration_windows(args.calibration, tokenizer, seed=args.seed, **draw)
    text = es.read_text_tokens(args.evaluation, tokenizer)
    text = es.evaluation_windows(text, args.sequence_length)
    rows = []

    def show(pattern: str, method: str, candidate, kept: float, seconds: float) -> None:
        perplexity = es.perplexity(candidate, text).perplexity
        print(f"{pattern:7} {method:19} {perplexity:10.2f} {kept:11.4f} {seconds:7.1f}", flush=True)
        rows.append(dict(zip(HEADER, (pattern, method, perplexity, kept, seconds), strict=True)))

    print("{:7} {:19} {:>10} {:>11} {:>7}".format(*HEADER))
    show("dense", "dense", model, 1.0, 0.0)
    for pattern in ("4:8", "2:4"):
        for method, options in METHODS.items():
            config = es.PruneConfig(pattern=es.NMPattern.parse(pattern), **options)
            pruned, report = es.prune_model(model, windows, config)
            show(pattern, method, pruned, report.kept_share, report.seconds)

    sparse = es.sparsify_model(pruned, report.permutations)  # the last one: E-Sparse at 2:4
    masked, ours = (np.asarray(jax.jit(m.__call__)(text[:1])) for m in (pruned, sparse))
    difference = float(np.abs(ours - masked).max() / np.abs(masked).max())
    print(f"\nsparse against masked dense logits: {difference:.1e} of the largest")
    results = {"rows": rows, "logit difference": difference}
    models = {"dense": model, "2:4 sparse": es.inference_model(sparse)}
    texts = greedy(models, tokenizer(args.prompt)["input_ids"], args.new_tokens)
    for name, (new, rate) in texts.items():
        results[f"{name} tokens per second"] = rate
        print(f"\n== {name}, {rate:.0f} tokens/s\n{args.prompt}{tokenizer.decode(new)}")
    target |= {"metadata": report.metadata(), "permutations": report.permutations}
    es.save_model(pruned, args.output, **target)
    print(f"\nE-Sparse 2:4 checkpoint: {args.output.resolve()}")
    if args.json:
        es.write_json(args.json, results)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
