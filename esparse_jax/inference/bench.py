"""Decoding and reading prompts, dense against compressed: what `esparse bench` measures.

Each form runs in a process of its own, one after the other: so no two models are on the device, and
the peak of device memory is that form's. This process touches no device. In the child the model is
made (random 2:4 weights of a published shape) or read, layer by layer, and timed through the
functions that `generate` calls; as there, a prompt whose length is not round is computed with up to
an eighth more tokens, which count for nothing (`columns_of`).

    sparse   the inference model on compressed weights
    dense    its dense twin: the same code and structure, XLA's products
    plain    the model as it is loaded for pruning: dense, one product for each linear
    torch    transformers' LLaMA with a static cache, its decode step in a CUDA graph

The bound of a decode step is the time that a copy would take for the bytes it has to read: the
weights, the head, and the keys and values of the context with half of the new tokens.
"""

import dataclasses
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from esparse_jax.files.checkpoint import compressed_layers, load_inference_model, load_model
from esparse_jax.files.directory import read_config, require_directory
from esparse_jax.inference.generate import (
    CHUNK,
    columns_of,
    decode,
    generate,
    prefill,
    slots_of,
    split_once,
)
from esparse_jax.models.cache import KVCache, init_cache
from esparse_jax.models.fusion import with_dense_linears
from esparse_jax.models.layers import CompressedWeight, Permutation
from esparse_jax.models.llama import CausalLM, LlamaConfig
from esparse_jax.models.random_model import SHUFFLES, random_model
from esparse_jax.models.shapes import PUBLISHED_MODELS, model_bytes
from esparse_jax.sparse import records_calls, this_machine
from esparse_jax.sparse._timing import copy_bandwidth
from esparse_jax.sparse.table import resolve_table, table_choice

STAGES = ("decode", "prefill")
FORMS = ("sparse", "dense", "plain", "torch")
DTYPES = ("auto", "float16", "bfloat16", "float32")

# `tiny` is no published model: it is for trying the benchmark.
SHAPES: dict[str, LlamaConfig] = {
    **PUBLISHED_MODELS,
    "tiny": LlamaConfig(512, 128, 192, 2, 4, num_key_value_heads=2),
}

_LOGGER = logging.getLogger(__name__)

_WORKER = (sys.executable, "-P", "-m", "esparse_jax.inference.bench")
_GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
# Whose logits are compared: behind a prompt, and behind single tokens after it.
_COMPARED_PROMPT, _COMPARED_STEPS = 128, 16
# How far the logits of two forms may be apart, in units of the dtype's rounding: layers add up.
_COMPARED_ROUNDINGS = 64


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        stage: "decode": steps of one token a row. "prefill": reading the prompts.
        model: A compressed directory; for the dense forms alone an hf one as well.
        shape: Or random weights of this name in `SHAPES`; the context may be longer than that
            model's.
        layers: So many layers of the shape; None for all.
        batch: Rows.
        context: Tokens of each row's prompt.
        new_tokens: Steps of a decode measurement; rounded up to whole chunks.
        dtype: Of weights, activations and cache. "auto" is float32 on the CPU; elsewhere that of
            the model, and float16 for a shape.
        shuffle: Random channel orders of a shape's linears, see `random_model`.
        repeats: Measurements, of which the median is reported.
        minutes: A form that takes longer is ended, and has failed.

    Raises:
        ValueError: A choice that there is not, or both or none of model and shape.
    """

    stage: str = "decode"
    model: str | None = None
    shape: str | None = None
    layers: int | None = None
    batch: int = 1
    context: int = 1024
    new_tokens: int = 128
    dtype: str = "auto"
    shuffle: str = "within"
    repeats: int = 5
    minutes: float = 30.0

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ValueError(
                f"bench what? Give a MODEL directory, or random weights of a shape (--shape), not "
                f"both. The shapes are {', '.join(SHAPES)}."
            )
        for name, given, allowed in (
            ("stage", self.stage, STAGES),
            ("shape", self.shape, (*SHAPES, None)),
            ("dtype", self.dtype, DTYPES),
            ("shuffle", self.shuffle, SHUFFLES),
        ):
            if given not in allowed:
                choices = ", ".join(filter(None, allowed))
                raise ValueError(f"{name} is {given!r}; it must be one of {choices}.")
        for name in ("batch", "context", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; it must be greater than 0.")
        if self.layers is not None:
            if self.shape is None:
                raise ValueError("layers is for a shape; a model has the layers it has.")
            most = SHAPES[self.shape].num_hidden_layers
            if not 1 <= self.layers <= most:
                raise ValueError(
                    f"layers is {self.layers}; {self.shape} has {most}, of which at least 1 is "
                    f"measured."
                )

    @property
    def steps(self) -> int:
        """Decode steps of one measurement, whole chunks."""
        return -(-self.new_tokens // CHUNK) * CHUNK

    @property
    def slots(self) -> int:
        """Positions that each row needs."""
        return self.context + (self.steps + 1 if self.stage == "decode" else 0)

    def fitted(self) -> "BenchOptions":
        """With no longer a context than the model has room for.

        Raises:
            FileNotFoundError: No such model.
        """
        over = self.slots - self.config().max_position_embeddings
        return dataclasses.replace(self, context=max(1, self.context - max(0, over)))

    def config(self) -> LlamaConfig:
        """The configuration of the model; a shape's with the slots that are needed."""
        if self.model is not None:
            return read_config(require_directory(self.model))[1]
        config = SHAPES[self.shape]
        return dataclasses.replace(
            config,
            num_hidden_layers=self.layers or config.num_hidden_layers,
            max_position_embeddings=max(self.slots, config.max_position_embeddings),
        )

    def check(self, forms: Sequence[str]) -> None:
        """Raises what can be known to go wrong before anything is measured.

        Raises:
            ValueError: Unknown forms, the form torch where torch is not installed, a model without
                the forms, or a context too long for it.
            FileNotFoundError: No such model.
        """
        unknown = [form for form in forms if form not in FORMS]
        if unknown or not forms:
            raise ValueError(
                f"forms must be some of {', '.join(FORMS)}; got {', '.join(unknown) or 'none'}."
            )
        if "torch" in forms and find_spec("torch") is None:
            raise ValueError(
                "The form torch needs torch, which is not installed. Install it (pip install "
                '"esparse-jax[bench]"), or measure the other forms alone.'
            )
        if self.model is None:
            return
        context = self.config().max_position_embeddings
        if self.slots > context:
            raise ValueError(
                f"{self.context} tokens of context"
                + (f" and {self.steps + 1} new ones" if self.stage == "decode" else "")
                + f" take {self.slots} positions; {self.model} has {context}. Take fewer."
            )
        if "sparse" in forms and not compressed_layers(self.model):
            raise ValueError(
                f"{self.model} holds no compressed layer. Compress it first (esparse compress "
                f"{self.model} --output DIR; one that is not pruned: esparse prune), or measure "
                f"the forms dense and plain alone."
            )


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What one form came to; times in seconds, each the median of the repeats.

    Attributes:
        form: One of `FORMS`.
        error: Why there is no more than this, in a line; None if there is.
        device: What it ran on.
        dtype: What it computed in.
        versions: Of the libraries that computed.
        first_token: From handing over the prompts to the first new tokens on the host.
        step: Of a decode step; None for "prefill".
        generate: Of a whole `generate` call: prefill, all new tokens, the host's part; None for
            "prefill" and "torch".
        model_bytes: Arrays of the model, embedding included.
        resident_bytes: Allocated on the device once the model is made, with what the allocator
            cannot use of its pieces; None where it cannot be asked.
        peak_bytes: The most of the process so far, making the model included; None as well. What
            JAX (or torch) has not allocated itself is not in it: the context, the libraries' own.
        made_peak_bytes: The most until the model was made; None as well.
        linear_bytes: Arrays of the linears' weights.
        weight_bytes: What a step reads of linears, norms and head.
        cache_bytes: What a step reads of keys and values, in the mean over the steps.
        bandwidth: Bytes a second of a large copy, read and written bytes counted; None for "torch"
            and on the CPU.
        times: All measurements of what the stage is about.
        logits: Some of the first prompt's, to compare forms by; empty for "torch".
        notes: What was logged: slow paths, above all.
    """

    form: str
    error: str | None = None
    device: str = ""
    dtype: str = ""
    versions: str = ""
    first_token: float | None = None
    step: float | None = None
    generate: float | None = None
    model_bytes: int | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    made_peak_bytes: int | None = None
    linear_bytes: int | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    bandwidth: float | None = None
    times: tuple[float, ...] = ()
    logits: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> float | None:
        """Seconds that copying the bytes of a step would take."""
        if not self.bandwidth or self.weight_bytes is None or self.cache_bytes is None:
            return None
        return (self.weight_bytes + self.cache_bytes) / self.bandwidth

    @property
    def share(self) -> float | None:
        """How much of its time a decode step has to take by its bound, at most about 1."""
        return None if self.bound is None or self.step is None else self.bound / self.step

    @property
    def seconds(self) -> float | None:
        """What the stage is about: a decode step, or else the prompts."""
        return self.first_token if self.step is None else self.step

    def rate(self, options: BenchOptions) -> float:
        """Tokens per second."""
        tokens = 1 if options.stage == "decode" else options.context
        return options.batch * tokens / self.seconds

    def apart(self, other: "BenchResult") -> float | None:
        """How far the logits are from those of another form, relative; the weights are the same."""
        if not self.logits or not other.logits:
            return None
        return float(
            np.linalg.norm(np.subtract(self.logits, other.logits)) / np.linalg.norm(other.logits)
        )


def run_bench(
    options: BenchOptions,
    forms: Sequence[str] = ("dense", "sparse"),
    *,
    on_result: Callable[[BenchResult], None] | None = None,
) -> list[BenchResult]:
    """Measures each form in a process of its own, one after the other.

    A form that fails (its model does not fit into the memory, say, or its logits are others) has
    its error in its result.

    Raises:
        ValueError, FileNotFoundError: As `BenchOptions.check`.
    """
    options.check(forms)
    results: list[BenchResult] = []
    for form in forms:
        result = _compared(_in_child(options, form), results)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def _compared(result: BenchResult, before: Sequence[BenchResult]) -> BenchResult:
    """The result, which has failed if its logits are not those of a form before."""
    if not np.isfinite(result.logits).all():
        return dataclasses.replace(result, error="its logits are not finite")
    for other in before:
        apart = None if other.error is not None else result.apart(other)
        if apart is None:
            continue
        allowed = max(1e-4, _COMPARED_ROUNDINGS * float(jnp.finfo(result.dtype).eps))
        if apart > allowed:
            error = f"its logits are {apart:.1e} from those of {other.form}; allowed {allowed:.1e}"
            return dataclasses.replace(result, error=error)
    return result


def _in_child(options: BenchOptions, form: str) -> BenchResult:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)
    }
    # All of the device but what libraries take beside JAX, and no more of it than is used.
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:
        environment.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    try:
        child = subprocess.run(
            _WORKER,
            input=json.dumps({"form": form, "options": dataclasses.asdict(options)}),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            check=False,
            timeout=60 * options.minutes,
        )
    except subprocess.TimeoutExpired:
        return BenchResult(form, error=f"it was ended after {options.minutes:g} minutes")
    if child.returncode == 0:
        fields = json.loads(child.stdout.splitlines()[-1])
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        result = BenchResult(**fields | lists)
        if result.error is not None:  # all of what it said: the line is the end of it
            print(*child.stderr.splitlines()[-200:], sep="\n", file=sys.stderr)
        return result
    how = f"exit status {child.returncode}"
    if child.returncode < 0:
        how = signal.Signals(-child.returncode).name
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    last = f": {lines[-1]}" if lines else ""
    return BenchResult(form, error=f"the process died ({how}){last}")


def main() -> None:
    """The child: measures what stdin asks for, and writes the result to stdout."""
    # What libraries print goes to stderr; stdout holds the result alone.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.read())
    options, form = BenchOptions(**request["options"]), request["form"]
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())
    logging.getLogger("esparse_jax").addHandler(handler)
    try:
        result = measure(options, form)
    except Exception as error:  # of memory that is missing, above all
        traceback.print_exc()
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else text[:300] + " ..."
        result = BenchResult(form, error=f"{type(error).__name__}: {text}")
    result = dataclasses.replace(result, notes=tuple(dict.fromkeys(notes)))
    print(json.dumps(dataclasses.asdict(result)), file=output, flush=True)


def measure(options: BenchOptions, form: str) -> BenchResult:
    """Measures one form here, in this process."""
    if form == "torch":
        from esparse_jax.inference.bench_torch import measure_torch

        return measure_torch(options)
    dtype = dtype_of(options, on_cpu=jax.default_backend() == "cpu")
    model = bench_model(options, form, dtype)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    resident, made_peak = _memory("bytes_in_use"), _memory("peak_bytes_in_use")
    firsts, steps = _times(options, model)
    whole = _generate_times(options, model) if options.stage == "decode" else None
    peak = _memory("peak_bytes_in_use")
    prompt = prompt_tokens(options)[0]
    logits = _logits(*nnx.split(model), prompt[:_COMPARED_PROMPT], prompt[:_COMPARED_STEPS])
    facts = {
        "logits": tuple(np.asarray(logits, np.float64).tolist()),
        "linear_bytes": linear_bytes(model),
        "model_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))),
        "weight_bytes": bytes_read(model),
        "cache_bytes": cache_bytes_read(options, dtype),
    }
    del model  # before the copies are made
    return BenchResult(
        form=form,
        device=jax.devices()[0].device_kind,
        dtype=dtype,
        versions=versions(),
        first_token=statistics.median(firsts),
        step=statistics.median(steps) if steps else None,
        generate=whole,
        resident_bytes=resident,
        peak_bytes=peak,
        made_peak_bytes=made_peak,
        # On the CPU a copy goes to fresh pages and measures the operating system: no bound at all.
        bandwidth=None if jax.default_backend() == "cpu" else _bandwidth(),
        times=tuple(steps or firsts),
        **facts,
    )


def _times(options: BenchOptions, model: CausalLM) -> tuple[list[float], list[float]]:
    """Seconds to the first token, and of a decode step in the mean, one figure a repeat."""
    graphdef, state = split_once(model)
    tokens, lengths = columns_of(np.asarray(prompt_tokens(options)).tolist(), model.config)
    keys = jax.random.split(jax.random.key(0), CHUNK)
    chunks = options.steps // CHUNK if options.stage == "decode" else 0
    slots = slots_of(tokens.shape[1], chunks)
    firsts, steps = [], []
    # The first one compiles; and on a GPU what is compiled last takes the graphs of what was
    # compiled before, which the second one makes again.
    for _ in range(options.repeats + 2):
        jax.block_until_ready(state)
        started = time.perf_counter()
        token, cache = prefill(
            graphdef, state, tokens, lengths, keys[0], max_length=slots, **_GREEDY
        )
        np.asarray(token)
        firsts.append(time.perf_counter() - started)
        if chunks:
            jax.block_until_ready(cache)
            started = time.perf_counter()
            for _ in range(chunks):
                token, cache, _ = decode(graphdef, state, token, cache, keys, **_GREEDY)
            np.asarray(token)
            steps.append((time.perf_counter() - started) / options.steps)
        del cache  # before the next one is made
    return firsts[2:], steps[2:]


def _generate_times(options: BenchOptions, model: CausalLM) -> float:
    """Seconds of a `generate` call, the median."""
    prompts, times = np.asarray(prompt_tokens(options)).tolist(), []
    for _ in range(options.repeats + 1):  # the first one compiles what is around the steps
        started = time.perf_counter()
        generate(model, prompts, max_new_tokens=options.steps + 1)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


@partial(jax.jit, static_argnums=0)
def _logits(
    graphdef: Any, state: Any, prompt: Int[Array, " seq"], following: Int[Array, " step"]
) -> Float[Array, " logit"]:
    """Some of the logits behind a prompt, and of steps after it: all that is timed takes part."""
    model = nnx.merge(graphdef, state)
    slots = prompt.shape[0] + following.shape[0]
    cache = init_cache(model.config, 1, slots, dtype=model.dtype)
    hidden, cache = model.blocks(model.embed(prompt[None]), cache=cache, empty=True)
    behind = model.head(hidden[:, -1:])[:, 0, :256]

    def step(cache: KVCache, token: Int[Array, ""]) -> tuple[KVCache, Float[Array, "one logit"]]:
        hidden, cache = model.blocks(model.embed(token[None, None]), cache=cache)
        return cache, model.head(hidden)[:, 0, :256]

    _, steps = jax.lax.scan(step, cache, following)
    return jnp.concatenate([behind, steps[:, 0]]).reshape(-1)


def dtype_of(options: BenchOptions, *, on_cpu: bool) -> str:
    """What "auto" means here; or the dtype that was given."""
    if options.dtype != "auto":
        return options.dtype
    # XLA's 16-bit products on the CPU are an order of magnitude slower than its float32 ones.
    if on_cpu:
        return "float32"
    return "float16" if options.model is None else options.config().dtype


def bench_model(options: BenchOptions, form: str, dtype: str) -> CausalLM:
    """The model that is measured, made or read layer by layer."""
    if options.model is not None:
        if form == "plain":
            model, _ = load_model(options.model, dtype=dtype)
            for layer in model.model.layers:
                with_dense_linears(layer)
            return model
        kind = "dense" if form == "dense" else None
        return load_inference_model(options.model, dtype=dtype, form=kind)[0]
    config = dataclasses.replace(options.config(), dtype=dtype)
    return random_model(config, form=None if form == "sparse" else form, shuffle=options.shuffle)


def prompt_tokens(options: BenchOptions) -> Int[Array, "batch seq"]:
    """Random prompts, the same for every form."""
    shape, vocab = (options.batch, options.context), options.config().vocab_size
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab, shape, np.int32))


def linear_bytes(model: CausalLM) -> int:
    """Bytes of the weights of all linears in the layers, in whatever form they are."""
    compressed, dense = nnx.state(model.model.layers, CompressedWeight, nnx.Param)
    held = jax.tree.leaves(compressed)
    held += [leaf for leaf in jax.tree.leaves(dense) if leaf.ndim == 2]  # norms and biases are not
    return sum(leaf.nbytes for leaf in held)


def bytes_read(model: CausalLM) -> int:
    """Bytes of weights that a step reads: all but the embedding, unless that is the head."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    orders = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, Permutation)))
    embedding = model.model.embed_tokens.embedding[...].nbytes
    return total - orders - (0 if model.config.tie_word_embeddings else embedding)


def cache_bytes_read(options: BenchOptions, dtype: str) -> int:
    """Bytes of keys and values that a decode step reads, in the mean over the steps."""
    return model_bytes(
        options.config(),
        sparse=False,
        width=jnp.dtype(dtype).itemsize,
        batch=options.batch,
        slots=options.context + options.steps // 2,
    ).cache


def versions() -> str:
    """What computed: JAX, and on a GPU cuSPARSELt and what decides how the products are run."""
    text = f"jax {jax.__version__}"
    machine = this_machine()
    if machine is None:
        return text
    tuned = "no tuning table" if resolve_table(table_choice()) is None else "tuned"
    recorded = "recorded calls" if records_calls() else "traced calls"
    return f"{text}, cuSPARSELt {machine.cusparselt or 'not found'}, {tuned}, {recorded}"


def _bandwidth() -> float | None:
    """Of a large copy; None, and a note, where there is no memory left for one."""
    try:
        return copy_bandwidth()
    except RuntimeError as error:
        _LOGGER.warning("no bound: the copy that would measure it failed: %s", error)
        return None


def _memory(name: str) -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get(name)


HEADER = (
    f"{'form':7} {'ms':>9} {'tokens/s':>10} {'ratio':>6} {'first ms':>9} {'bound ms':>9} "
    f"{'share':>6} {'model GB':>9} {'peak GB':>9} {'logits':>8}"
)


def title(options: BenchOptions) -> str:
    """What is measured, in a line."""
    name = options.model or options.shape
    layers = "" if options.layers is None else f", {options.layers} layers"
    steps = f", {options.steps} steps" if options.stage == "decode" else ""
    return (
        f"{options.stage} of {name}{layers}: batch {options.batch}, context {options.context}"
        f"{steps}"
    )


def line(options: BenchOptions, result: BenchResult, base: BenchResult | None) -> str:
    """A result as a line under `HEADER`; ratio and logits are to those of `base`."""
    if result.error is not None:
        return f"{result.form:7} failed: {result.error}"
    peak = _scaled(result.peak_bytes, 1e-9, 2)
    if result.peak_bytes is not None and result.peak_bytes == result.made_peak_bytes:
        peak += "*"
    ratio = None if base is None else base.seconds / result.seconds
    apart = None if base is None or base is result else result.apart(base)
    bound = None if result.step is None else result.bound
    return (
        f"{result.form:7} {_scaled(result.seconds, 1e3, 3):>9} {result.rate(options):>10.1f} "
        f"{_scaled(ratio, 1, 2):>6} {_scaled(result.first_token, 1e3, 1):>9} "
        f"{_scaled(bound, 1e3, 3):>9} {_scaled(result.share, 1, 2):>6} "
        f"{_scaled(result.model_bytes, 1e-9, 2):>9} {peak:>9} "
        f"{'-' if apart is None else f'{apart:.1e}':>8}"
    )


def legend(options: BenchOptions, results: Sequence[BenchResult]) -> list[str]:
    """What the columns are, where it was measured, and what was logged."""
    what = "of a decode step" if options.stage == "decode" else "of the prompts"
    lines = [
        f"ms: {what}, median of {options.repeats}. ratio: of the first measured form's ms to it. "
        f"bound ms: copying the bytes that a step reads. model GB: its arrays. peak GB: of the "
        f"process; *: while the model was made. logits: relative difference to that form's."
    ]
    if any(result.error is None and result.device == "cpu" for result in results):
        lines.append(
            "bound ms, share and peak GB are empty on the CPU: neither the bandwidth of a copy nor "
            "the memory taken is measured there."
        )
    for result in results:
        if result.error is None:
            copy = "" if result.bandwidth is None else f", copies {result.bandwidth / 1e9:.0f} GB/s"
            lines.append(
                f"{result.form}: {result.dtype} on {result.device}, {result.versions}{copy}"
            )
        lines += [f"{result.form}: {note}" for note in result.notes]
    return lines


def _scaled(value: float | int | None, factor: float | int, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def as_dict(options: BenchOptions, results: Sequence[BenchResult]) -> dict[str, Any]:
    """Plain values, for JSON."""
    rows = []
    for result in results:
        row = {key: value for key, value in vars(result).items() if key != "logits"}
        rate = None if result.error is not None else result.rate(options)
        derived = {"bound": result.bound, "share": result.share, "tokens_per_second": rate}
        rows.append(row | derived)
    measured = [result for result in results if result.error is None]
    compared = {
        f"{a.form} to {b.form}": a.apart(b)
        for place, b in enumerate(measured)
        for a in measured[place + 1 :]
        if a.logits and b.logits
    }
    return {
        "options": dataclasses.asdict(options) | {"steps": options.steps},
        "results": rows,
        "logits_apart": compared,
    }


if __name__ == "__main__":
    main()
