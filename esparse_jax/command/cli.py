"""The `esparse` command: one frozen dataclass per verb, a few lines each over the rooms above."""

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress as Bar

from esparse_jax import atomic, platforms
from esparse_jax.command.doctor import NO_DEVICE, examine
from esparse_jax.command.tuning import asked_for, record_lines, wanted
from esparse_jax.files import (
    Conversion,
    calibration_windows,
    check_output,
    compress_checkpoint,
    compressed_layers,
    evaluation_windows,
    expand_checkpoint,
    load_inference_model,
    load_model,
    read_esparse,
    read_prompts,
    read_text_tokens,
    save_model,
    verify_checkpoint,
    window_length,
    write_json,
)
from esparse_jax.inference import TextStream, TokenRate, bench, generate, perplexity
from esparse_jax.inference.bench import BenchOptions, BenchResult
from esparse_jax.models.surgery import require_compressible
from esparse_jax.pipeline import prune_model
from esparse_jax.pruning import NMPattern, PruneConfig
from esparse_jax.sparse import (
    BUCKETS,
    Limits,
    Machine,
    Record,
    TuningTable,
    load_table,
    rows_left,
    save_table,
    table_file,
    tune_shape,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Shuffle = Literal["none", "global", "paper", "strided", "full", "assignment"]


def compute_dtype(choice: Dtype) -> str | None:
    """`auto`: the checkpoint's own dtype on an accelerator, float32 on the CPU.

    XLA's 16-bit products on the CPU are an order of magnitude slower than its float32 ones, and
    every 16-bit weight is exact in float32, so nothing is lost when it is written back.
    """
    if choice != "auto":
        return choice
    return "float32" if jax.default_backend() == "cpu" else None


def load_to_run(path: Path, dtype: Dtype) -> tuple[Any, Any]:
    """The model and the tokenizer; a compressed directory in the form that runs fastest."""
    load = load_inference_model if compressed_layers(path) else load_model
    return load(path, dtype=compute_dtype(dtype))


def bar(title: str) -> tuple[Bar, Callable[[int, int], None]]:
    """Progress: a bar on a terminal, elsewhere a line on stderr for every tenth of the work."""
    terminal = sys.stderr.isatty()
    shown = Bar(console=Console(stderr=True), disable=not terminal, transient=True)
    task = shown.add_task(title, total=None)
    tenths = 0

    def update(done: int, total: int) -> None:
        nonlocal tenths
        shown.update(task, completed=done, total=total)
        now = 10 * done // max(1, total)
        if not terminal and now > tenths:
            tenths = now
            print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)

    return shown, update


@dataclasses.dataclass(frozen=True)
class Prune:
    """Prune a LLaMA checkpoint to N:M and write it as a checkpoint that other tools open."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory: config.json, safetensors (sharded or not), tokenizer."""
    output: Path
    """Directory to write; it must be empty or absent."""
    calibration: Path
    """Text (.txt), documents (.jsonl with a field `text`) or token windows (.npy, .npz)."""
    pattern: str = "2:4"
    """N:M, N kept of every M: 2:4, 4:8, 1:4, ..."""
    method: Literal["esparse", "wanda", "magnitude"] = PruneConfig().method
    shuffle: Shuffle = PruneConfig().shuffle
    """How channels are brought into groups; `full` is one block of all channels."""
    select: Literal["metric", "error"] = PruneConfig().select
    """metric: take `--shuffle`. error: search all `--candidates` and take, for each input, the one
    of least true output error."""
    candidates: tuple[Shuffle, ...] = PruneConfig().candidates
    """Shuffles that compete under `--select error`; of equal errors the earlier is taken."""
    measure_error: bool = PruneConfig().measure_error
    """Record the true output error of every linear. It takes a Gram matrix, channels x channels
    float32, for every input of a block."""
    heads: Literal["free", "within"] = PruneConfig().heads
    """within: the channels of the attention output projection stay inside their heads, so that
    their order can be folded into the value projection."""
    slices: int = PruneConfig().slices
    """Permutations stay inside that many equal slices of the channels (tensor-parallel shards)."""
    alpha: float = PruneConfig().alpha
    """Weight of the amplitude against the information richness (equation 3)."""
    amplitude: Literal["rms", "l2", "relative"] = PruneConfig().amplitude
    """Of a channel over the calibration tokens: root mean square, L2 norm, or rms over the layer's
    mean."""
    num_bins: int = PruneConfig().num_bins
    """Of the histogram whose entropy is the information richness (equation 2)."""
    bin_span: Literal["channel", "layer", "rms"] = PruneConfig().bin_span
    """What the bins span: the channel's own range, the layer's, or four root mean squares."""
    block_size: int | None = PruneConfig().block_size
    """Channels in a block of `paper` and `strided`; 256 and 1024 if not given."""
    deal: Literal["naive", "snake", "sorted"] | None = PruneConfig().deal
    """How the sorted channels are dealt out, where every search starts; naive for `global` and
    `paper` and sorted for the others if not given."""
    scores: Literal["fixed", "float32"] = PruneConfig().scores
    """fixed: the search adds fixed-point scores, exact and alike on every device."""
    escape: int = PruneConfig().escape
    """So many times: disturb a few groups, search again, keep the better."""
    skip: tuple[str, ...] = ()
    """Linears to leave dense, by checkpoint path or its end, e.g. `down_proj`."""
    num_samples: int = 128
    """Calibration windows; the paper's 128. Fewer take less time."""
    sequence_length: int | None = None
    """Tokens a window; the least of 2048 and the model's context if not given."""
    batch_size: int = 8
    """Windows a step; counts do not depend on it."""
    seed: int = 0
    """Which windows are drawn."""
    dtype: Dtype = "auto"
    """Of the computation; auto: the checkpoint's own on an accelerator, float32 on the CPU."""
    format: Literal["hf", "compressed"] = "hf"
    """hf: zeros in place, any tool opens it. compressed: 2:4 or 1:4 as values and 2-bit indices."""
    overwrite: bool = False
    """Replace a checkpoint that is there already."""
    json: Path | None = None
    """Also write per-layer records and totals here."""

    def run(self, console: Console) -> int:
        config = PruneConfig(
            pattern=NMPattern.parse(self.pattern),
            method=self.method,
            shuffle=self.shuffle,
            alpha=self.alpha,
            amplitude=self.amplitude,
            num_bins=self.num_bins,
            bin_span=self.bin_span,
            block_size=self.block_size,
            deal=self.deal,
            scores=self.scores,
            escape=self.escape,
            slices=self.slices,
            heads=self.heads,
            select=self.select,
            candidates=self.candidates,
            measure_error=self.measure_error,
            skip=self.skip,
        )
        if self.format == "compressed":
            require_compressible(config.pattern)
        check_output(self.output, like=self.model, overwrite=self.overwrite)
        if compressed_layers(self.model):
            raise ValueError(
                f"{self.model} is a compressed checkpoint; pruning needs dense weights. Expand it "
                f"first: esparse expand {self.model} --output DIR."
            )
        recorded = read_esparse(self.model)
        if recorded is not None:
            Console(stderr=True, soft_wrap=True).print(
                f"{self.model} was pruned before, to {recorded.get('pattern')}: what is zero there "
                f"scores zero now.",
                markup=False,
                highlight=False,
            )
        model, tokenizer = load_model(self.model, dtype=compute_dtype(self.dtype))
        length = self.sequence_length
        if length is None:
            length = min(2048, model.config.max_position_embeddings)
        windows = calibration_windows(
            self.calibration,
            tokenizer,
            num_samples=self.num_samples,
            sequence_length=length,
            seed=self.seed,
            vocab_size=model.config.vocab_size,
        )
        shown, update = bar("pruning")
        with shown:
            pruned, report = prune_model(
                model,
                windows,
                config,
                batch_size=self.batch_size,
                progress=lambda step: update(step.done, step.blocks),
            )
        metadata = report.metadata() | {"seed": self.seed, "calibration": self.calibration.name}
        save_model(
            pruned,
            self.output,
            format=self.format,
            like=self.model,
            metadata=metadata,
            permutations=report.permutations,
            overwrite=self.overwrite,
        )
        shuffle = "of least error" if config.select == "error" else config.shuffle
        measured = report.output_error
        error = "" if measured is None else f"output error {100 * measured:.2f} % in the mean, "
        console.print(
            f"{len(report.layers)} linears at {config.pattern} by {config.method}, shuffle "
            f"{shuffle}: {100 * report.kept_share:.2f} % of the metric kept, {error}"
            f"{report.seconds:.1f} s. Written to {self.output}."
        )
        finish(self.json, metadata)
        return 0


@dataclasses.dataclass(frozen=True)
class Compress:
    """Write a pruned checkpoint in the compressed format, without pruning it again."""

    model: tyro.conf.Positional[Path]
    """Directory that `esparse prune` wrote, at 2:4 or 1:4."""
    output: Path
    """Directory to write; it must be empty or absent."""
    overwrite: bool = False
    json: Path | None = None

    def run(self, console: Console) -> int:
        shown, update = bar("compressing")
        with shown:
            done = compress_checkpoint(
                self.model, self.output, overwrite=self.overwrite, progress=update
            )
        signs = (
            f" {done.positive_zeros} weights that were -0.0 are +0.0 now: their groups were full."
            if done.positive_zeros
            else ""
        )
        console.print(
            f"{done.layers} linears compressed, {sizes(done)}.{signs} Written to {self.output}."
        )
        finish(self.json, dataclasses.asdict(done))
        return 0


@dataclasses.dataclass(frozen=True)
class Expand:
    """Write a compressed checkpoint as the one that other tools open, zeros in place."""

    model: tyro.conf.Positional[Path]
    """Compressed directory, of `esparse compress` or `esparse prune --format compressed`."""
    output: Path
    """Directory to write; it must be empty or absent."""
    overwrite: bool = False
    json: Path | None = None

    def run(self, console: Console) -> int:
        shown, update = bar("expanding")
        with shown:
            done = expand_checkpoint(
                self.model, self.output, overwrite=self.overwrite, progress=update
            )
        console.print(f"{done.layers} linears expanded, {sizes(done)}. Written to {self.output}.")
        finish(self.json, dataclasses.asdict(done))
        return 0


def sizes(done: Conversion) -> str:
    """What a conversion did to the tensors."""
    share = 100 * done.written_bytes / done.source_bytes
    return f"{decimal(done.source_bytes)} are {decimal(done.written_bytes)} ({share:.1f} %)"


@dataclasses.dataclass(frozen=True)
class Eval:
    """Perplexity of a checkpoint on a text."""

    model: tyro.conf.Positional[Path]
    text: Path
    """Text (.txt), documents (.jsonl with a field `text`) or token windows (.npy, .npz)."""
    sequence_length: int | None = None
    """Tokens a window; if not given, those of a window in the file, for a text 2048, and never more
    than the model's context."""
    protocol: Literal["raw", "published"] = "raw"
    """raw: the file as it is, no BOS. published: rows joined by a blank line, one BOS."""
    batch_size: int = 4
    dtype: Dtype = "auto"
    """Of the computation; auto: the checkpoint's own on an accelerator, float32 on the CPU."""
    json: Path | None = None

    def run(self, console: Console) -> int:
        model, tokenizer = load_to_run(self.model, self.dtype)
        tokens = read_text_tokens(
            self.text, tokenizer, protocol=self.protocol, vocab_size=model.config.vocab_size
        )
        stored = window_length(self.text)
        length = self.sequence_length
        if length is None:
            length = min(stored or 2048, model.config.max_position_embeddings)
        if stored is not None and length > stored:
            Console(stderr=True, soft_wrap=True).print(
                f"{self.text} holds windows of {stored} tokens; those of {length} join pieces of "
                f"several. Leave --sequence-length out to take them as they are.",
                markup=False,
                highlight=False,
            )
        shown, update = bar("evaluating")
        with shown:
            result = perplexity(
                model,
                evaluation_windows(tokens, length),
                batch_size=self.batch_size,
                progress=update,
            )
        console.print(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in windows of "
            f"{length}, protocol {self.protocol}, {result.seconds:.1f} s"
        )
        finish(self.json, dataclasses.asdict(result) | {"sequence_length": length})
        return 0


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue prompts; on a terminal one prompt's text appears as it is made."""

    model: tyro.conf.Positional[Path]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Several times for several prompts, which are continued together."""
    prompt_file: Path | None = None
    """A text file with one prompt a line, instead; blank lines are passed over."""
    max_new_tokens: int = 100
    temperature: float = 0.0
    """0 is greedy, whatever top-k and top-p are; greater values draw."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens of this probability; after top-k."""
    seed: int = 0
    dtype: Dtype = "auto"
    """Of the computation; auto: the checkpoint's own on an accelerator, float32 on the CPU."""
    json: Path | None = None
    """Also write prompts, texts and times here."""

    def run(self, console: Console) -> int:
        if bool(self.prompt) == (self.prompt_file is not None):
            raise ValueError(
                "generate continues --prompt TEXT, once or several times, or --prompt-file FILE "
                "with one prompt a line. Give one of the two."
            )
        prompts = self.prompt or read_prompts(self.prompt_file)
        model, tokenizer = load_to_run(self.model, self.dtype)
        if tokenizer is None:
            raise ValueError(f"{self.model} has no tokenizer (tokenizer.json), which text needs.")
        texts = [TextStream(tokenizer, prompt) for prompt in prompts]
        live = console.is_terminal and len(texts) == 1

        def show(text: str, end: str = "") -> None:
            console.out(text, end=end, highlight=False)

        def take(new: list[np.ndarray]) -> None:
            rate.add(sum(map(len, new)))
            for text, tokens in zip(texts, new, strict=True):
                more = text.add(tokens)
                if live:
                    show(more)

        if live:
            show(texts[0].prompt)
        rate = TokenRate()
        generate(
            model,
            [text.prompt_tokens for text in texts],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop_tokens=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
            on_tokens=take,
        )
        for number, text in enumerate(texts):
            rest = text.finish()
            if number:
                show("", end="\n")
            show(rest if live else text.prompt + text.text, end="\n")
        # On stdout is the text alone.
        Console(stderr=True, soft_wrap=True).print(rate.summary(), highlight=False)
        outputs = [
            {"prompt": text.prompt, "text": text.text, "tokens": len(text.tokens)} for text in texts
        ]
        finish(self.json, {"outputs": outputs} | rate.as_dict())
        return 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure tokens per second, time to the first token and memory, dense against compressed.

    Each form runs in a process of its own, so dense and compressed model are never on the device
    together. Exit status 1 if one of them fails, for want of memory, say.
    """

    stage: tyro.conf.Positional[Literal["decode", "prefill"]]
    """decode: steps of one token a row. prefill: reading the prompts."""
    model: tyro.conf.Positional[Path | None] = None
    """A compressed directory; for `--forms dense plain` an hf one as well."""
    shape: (
        Literal[
            "llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-70b", "llama-3-8b", "tiny"
        ]
        | None
    ) = None
    """Or random 2:4 weights of a published shape; tiny is for trying it."""
    layers: int | None = None
    """Only so many layers of the shape: 8 of llama-70b fit where all 80 do not."""
    batch: int = BenchOptions.batch
    context: int | None = None
    """Tokens of each prompt; 1,024, or as many as the model has room for, if not given."""
    new_tokens: int = BenchOptions.new_tokens
    """Decode steps of a measurement, rounded up to a multiple of 16."""
    forms: tuple[Literal["dense", "sparse", "plain", "torch"], ...] = ("dense", "sparse")
    """dense: the same code with XLA's dense products. plain: one product for each linear, as for
    pruning. torch: transformers' model of random weights, with CUDA graphs. Ratios are to the first
    form."""
    torch: bool = False
    """Also the form torch."""
    dtype: Dtype = "auto"
    """auto: float32 on the CPU; else the model's own, and float16 for a shape."""
    shuffle: Literal["none", "within", "free"] = BenchOptions.shuffle
    """Channel orders of a shape; free: that of the attention output leaves its heads."""
    repeats: int = BenchOptions.repeats
    minutes: float = BenchOptions.minutes
    """A form that takes longer is given up."""
    json: Path | None = None
    """Also write all that was measured here, after each form."""

    def run(self, console: Console) -> int:
        options = BenchOptions(
            stage=self.stage,
            model=None if self.model is None else str(self.model),
            shape=self.shape,
            layers=self.layers,
            batch=self.batch,
            context=BenchOptions.context if self.context is None else self.context,
            new_tokens=self.new_tokens,
            dtype=self.dtype,
            shuffle=self.shuffle,
            repeats=self.repeats,
            minutes=self.minutes,
        )
        if self.context is None:
            options = options.fitted()
        forms = tuple(dict.fromkeys((*self.forms, "torch") if self.torch else self.forms))
        options.check(forms)
        base: list[BenchResult] = []
        results: list[BenchResult] = []

        def show(text: str) -> None:
            console.print(text, markup=False, highlight=False)

        def take(result: BenchResult) -> None:
            if result.error is None:
                base.append(result)
            show(bench.line(options, result, base[0] if base else None))
            results.append(result)
            finish(self.json, bench.as_dict(options, results))

        show(bench.title(options))
        show(bench.HEADER)
        bench.run_bench(options, forms, on_result=take)
        for text in bench.legend(options, results):
            show(text)
        return 1 if any(result.error is not None for result in results) else 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check every pruned layer of a checkpoint group by group; exit status 1 on any violation."""

    model: tyro.conf.Positional[Path]
    pattern: str | None = None
    """N:M; what esparse.json says if not given."""
    json: Path | None = None
    """Also write what was found here, up to 1,000 groups by name in place of 20."""

    def run(self, console: Console) -> int:
        pattern = None if self.pattern is None else NMPattern.parse(self.pattern)
        named = 20 if self.json is None else 1000
        result = verify_checkpoint(self.model, pattern, max_violations=named)
        for violation in result.violations:
            console.print(str(violation), markup=False, highlight=False)
        console.print(result.summary(), markup=False, highlight=False)
        finish(self.json, result.as_dict())
        return 0 if result.ok else 1


@dataclasses.dataclass(frozen=True)
class Tune:
    """Measure the fastest 2:4 product for each shape and number of rows on this NVIDIA GPU.

    What is found is kept for this GPU and version of cuSPARSELt, and used from then on. A LLaMA-7B
    takes some minutes; what is measured already is left out.
    """

    model: tyro.conf.Positional[Path | None] = None
    """Checkpoint directory whose products are tuned; only its config.json is read."""
    shape: tuple[str, ...] = ()
    """OUTxCHANNEL of further weights, such as 4096x11008."""
    model_shape: tuple[
        Literal["table-5", "llama-7b", "llama-13b", "llama-70b", "llama-3-8b"], ...
    ] = ()
    """Published models, and table 5 of the E-Sparse paper."""
    separate: bool = False
    """Also tune q, k, v, gate and up one by one, not only fused."""
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    """auto: the model's own, if it has 16 bits, else float16."""
    rows: tuple[int, ...] = BUCKETS
    """Numbers of rows (tokens at once), some of the default."""
    algorithms: tuple[int, ...] | None = None
    """Only these of cuSPARSELt's algorithms, by number; all that it has if not given."""
    splits: bool = True
    """Try each of them with the sum over channels split as well."""
    again: bool = False
    """Also measure what that file has already. (The package's own table is used without this
    command, which does not look at it.)"""
    json: Path | None = None
    """Also write the records of these products here."""
    output: Path | None = None
    """File of the table; if not given, the user's own in ~/.cache/esparse_jax/tuning (or below
    $XDG_CACHE_HOME), which is used without being named."""
    seconds: float = Limits().candidate
    """A candidate that takes longer than this is given up; the best of a kind, which is then
    compiled into a chain, has longer."""

    def run(self, console: Console) -> int:
        check_file("--output", self.output)
        shapes, dtype = wanted(self.model, self.shape, self.model_shape, self.separate, self.dtype)
        machine: Machine | None = None
        measured: list[Record] = []

        def stored(machine: Machine) -> TuningTable | None:
            file = self.output or table_file(machine)
            table = load_table(file) if file.exists() else None
            if table is not None and table.machine != machine:
                raise ValueError(
                    f"{file} is the table of {table.machine}; here is {machine}. Give another file."
                )
            return table

        def known(machine: Machine) -> TuningTable | None:
            table = stored(machine)
            if self.again and table is not None:  # what was measured now alone
                return dataclasses.replace(table, records=tuple(measured))
            return table

        for shape in shapes:
            partial = self.algorithms is not None or not self.splits
            if machine and not rows_left(known(machine), shape, dtype, self.rows, partial=partial):
                continue
            shown, update = bar(f"tuning {shape[0]}x{shape[1]} {dtype}")
            with shown:
                try:
                    found = tune_shape(
                        shape,
                        dtype=dtype,
                        rows=self.rows,
                        algorithms=self.algorithms,
                        splits=self.splits,
                        known=known,
                        limits=Limits(candidate=self.seconds),
                        progress=lambda step, update=update: update(step.done, step.total),
                        on_record=lambda table: save_table(table, self.output),
                    )
                except RuntimeError as error:  # no GPU, or none that answers
                    raise ValueError(str(error)) from error
            machine = found.machine
            measured += found.records
        table = stored(machine)
        records = asked_for(table, shapes, dtype, self.rows)
        for line in record_lines(records):
            console.print(line, markup=False, highlight=False)
        written = self.output or table_file(machine)
        console.print(
            f"{dtype} on {machine}, microseconds a product; * by a plan of its own; prefetch: the "
            f"decode kernel that fetches its weight early. Kept in {written}.",
            markup=False,
            highlight=False,
        )
        finish(self.json, machine._asdict() | {"records": records})
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what this machine can run, and how to mend what is missing; exit status 0 either way."""

    json: Path | None = None
    """Also write what was found here."""

    def run(self, console: Console) -> int:
        report = examine()
        for line in report.lines():
            console.print(line, markup=False, highlight=False)
        finish(self.json, report.as_dict())
        return 0


Verb = (
    Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Expand, tyro.conf.subcommand("expand")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def check_file(option: str, path: Path | None) -> None:
    """Whether the file of an option can be written, before the work is done."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a directory. Name a file.")
    atomic.check_place(path)


def finish(path: Path | None, values: dict[str, Any]) -> None:
    """Write what `--json` asked for."""
    if path is not None:
        write_json(path, values)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a caller's mistake ends in one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"esparse {importlib.metadata.version('esparse-jax')}")
        return
    verb = tyro.cli(
        Verb,
        args=arguments,
        prog="esparse",
        description="One-shot N:M pruning of LLaMA checkpoints; 2:4 models run compressed.",
    )
    console = Console(soft_wrap=True)
    try:
        check_file("--json", getattr(verb, "json", None))
        status = verb.run(console)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        Console(stderr=True, soft_wrap=True).print(
            f"esparse: {error}", markup=False, highlight=False
        )
        status = 2
    except (RuntimeError, AssertionError):
        why = platforms.why_not_started()
        if why is None:
            raise
        print(f"esparse: {why}: {NO_DEVICE}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # outputs take their place at the very end, so none is half-written
        print("esparse: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
