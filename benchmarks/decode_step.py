"""A decode step's products on an NVIDIA GPU: whole layers in one jit, 2:4 against dense.

    python benchmarks/decode_step.py                               # LLaMA-7B, rows 1 and 16
    python benchmarks/decode_step.py --rows 1 --forms mlp --json step.json

Every layer has weights of its own, so that none waits in a cache. Times are microseconds a layer of
the jitted step: many steps queued, the residual stream donated, the median over batches, all forms
taking turns in one process.

    mlp       norm, gate and up, SwiGLU, down, residual: `sparse_mlp`, one a layer
    chain     o, the MLP, next q/k/v: `sparse_chain`, one a layer; attention is a stand-in,
              v + tanh(q k) / 10, the same in both
    shuffled  as chain, gate and up and q/k/v compressed in channel orders of their own: what the
              shuffle costs where o keeps its channels inside their heads, or where the attention
              writes their order
    gathered  as shuffled, and o in a free order whose input is gathered: before Hopper

- `dense`: XLA's dots, norms and SwiGLU with the dense weights.
- `2:4`: the weights handed in as arguments of the jit, and said to be so (`prefetch`).
- `careful`: the same without `prefetch`.
- each of `--plans`: as `2:4`, the kernel cutting some products in another way than by its own rule:

    python benchmarks/decode_step.py --rows 16 --forms chain \\
        --plans gate_up:tiles=3,warps=8,blocks=2 gate_up:tiles=2+down:warps=4

- `bound`: the compressed bytes over the bandwidth of a large device copy in the same run.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from esparse_jax.atomic import write_text
from esparse_jax.sparse import (
    Blob24,
    ChainWeights,
    blob24,
    compress24,
    compressed24_of,
    decompress24,
    interleave_gate_up,
    sparse_chain,
    sparse_mlp,
)
from esparse_jax.sparse import _ffi_cuda as ffi
from esparse_jax.sparse._timing import copy_bandwidth, random_24

EPSILON = 1e-6
PRODUCTS = ("o", "gate_up", "down", "qkv")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    forms: tuple[Literal["mlp", "chain", "shuffled", "gathered"], ...] = (
        "mlp",
        "chain",
        "shuffled",
        "gathered",
    )
    rows: tuple[int, ...] = (1, 16)
    dtypes: tuple[str, ...] = ("float16",)
    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    kv_features: int = 4096
    """Key and value features: 4096 for LLaMA-7B, 1024 for Llama-3-8B."""
    steps: int = 20
    """Steps queued in a batch."""
    batches: int = 9
    plans: tuple[str, ...] = ()
    """Cuts of o, gate_up, down, qkv other than the kernel's own: PRODUCT:FIELD=NUMBER,...+..."""
    json: Path | None = None
    """Also write the figures here."""


def read_plans(text: str) -> dict[str, dict[str, int]]:
    """The plan of each product, from `gate_up:tiles=3,blocks=2+down:warps=8`."""
    plans: dict[str, dict[str, int]] = {}
    for part in text.split("+"):
        product, colon, fields = part.partition(":")
        pairs = [field.partition("=") for field in fields.split(",")]
        names = {name for name, _, _ in pairs}
        read = colon and all(value.isdecimal() for _, _, value in pairs)
        if not read or product not in PRODUCTS or product in plans or len(names) < len(pairs):
            raise SystemExit(
                f"--plans {text}: each part is PRODUCT:FIELD=NUMBER,..., every product (one of "
                f"{', '.join(PRODUCTS)}) and every field of it once."
            )
        try:
            plans[product] = {name: int(value) for name, _, value in pairs}
            ffi.require_plan(plans[product])
        except ValueError as error:
            raise SystemExit(f"--plans {text}: {error}") from None
    return plans


def _dense_norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=1, keepdims=True) + EPSILON)).astype(
        x.dtype
    )


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def _dense_mlp(x: jax.Array, layer: dict) -> jax.Array:
    gate_up = _dot(_dense_norm(x), layer["gate_up"])
    gate, up = jnp.split(gate_up, 2, axis=1)
    return x + _dot(jax.nn.silu(gate) * up, layer["down"])


def _attention(qkv: jax.Array, hidden: int) -> jax.Array:
    """A stand-in with the right shapes: no history is read."""
    query, key, value = jnp.split(qkv, (hidden, (qkv.shape[1] - hidden) // 2 + hidden), axis=1)
    shared = hidden // key.shape[1]
    key, value = jnp.tile(key, (1, shared)), jnp.tile(value, (1, shared))
    return value + 0.1 * jnp.tanh(query * key)


def dense_step(state, layers, form):
    hidden, qkv = state
    for layer in layers:
        if form == "mlp":
            hidden = _dense_mlp(hidden, layer)
        else:
            hidden = hidden + _dot(_attention(qkv, hidden.shape[1]), layer["o"])
            hidden = _dense_mlp(hidden, layer)
            qkv = _dot(_dense_norm(hidden), layer["qkv"])
    return hidden, qkv


def sparse_step(
    state, layers: list[tuple[ChainWeights, jax.Array | None]], form, prefetch, plans=None
):
    hidden, qkv = state
    for layer, o_order in layers:
        if form == "mlp":
            hidden = sparse_mlp(
                hidden, layer.gate_up, layer.down, epsilon=EPSILON, prefetch=prefetch, plans=plans
            )
        else:
            attended = _attention(qkv, hidden.shape[1])
            if o_order is not None:
                attended = attended.at[:, o_order].get(mode="promise_in_bounds")
            hidden, qkv = sparse_chain(
                attended,
                hidden,
                layer,
                epsilon=EPSILON,
                prefetch=prefetch,
                plans=plans,
            )
    return hidden, qkv


def _blob(key: jax.Array, out: int, channels: int, dtype: str) -> Blob24:
    return blob24(compress24(random_24(key, out, channels, dtype)))


def sparse_layer(
    key: jax.Array, form: str, dtype: str, options: Options
) -> tuple[ChainWeights, jax.Array | None]:
    """Random weights of a layer, and the channel order of o where its input is gathered."""
    keys = jax.random.split(key, 8)
    hidden, inner = options.hidden, options.inner

    def order(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, hidden).astype(jnp.int32)

    shuffled = form in ("shuffled", "gathered")
    gate, up = (compress24(random_24(k, inner, hidden, dtype)) for k in keys[:2])
    weights = ChainWeights(
        o=_blob(keys[2], hidden, hidden, dtype),
        gate_up=blob24(interleave_gate_up(gate, up)),
        down=_blob(keys[3], hidden, inner, dtype),
        qkv=_blob(keys[4], hidden + 2 * options.kv_features, hidden, dtype),
        gate_up_places=order(keys[5]) if shuffled else None,
        qkv_places=order(keys[6]) if shuffled else None,
    )
    return weights, order(keys[7]) if form == "gathered" else None


@jax.jit
def _dense_layer(layer: ChainWeights, o_order: jax.Array | None) -> dict[str, jax.Array]:
    """The same weights, dense, in the natural order of their channels."""

    def dense(blob: Blob24, places: jax.Array | None = None) -> jax.Array:
        weight = decompress24(compressed24_of(blob))
        return weight if places is None else weight[:, places]

    pairs = dense(layer.gate_up, layer.gate_up_places).reshape(-1, 2, 8, layer.gate_up.shape[1])
    gate_up = pairs.transpose(1, 0, 2, 3).reshape(layer.gate_up.shape)
    return {
        "o": dense(layer.o, None if o_order is None else jnp.argsort(o_order)),
        "gate_up": gate_up,
        "down": dense(layer.down),
        "qkv": dense(layer.qkv, layer.qkv_places),
    }


def _copy(state: tuple) -> tuple:
    """For a step that its argument is donated to."""
    return jax.tree.map(lambda leaf: leaf + 0, state)


def _time_all(
    steps: dict[str, tuple[Callable, list]], state: tuple, layers: int, options: Options
) -> dict[str, list[float]]:
    """Microseconds a layer of each form, one figure a batch; forms take turns."""
    states = {name: _copy(state) for name in steps}
    figures: dict[str, list[float]] = {name: [] for name in steps}
    for batch in range(options.batches + 2):
        for name, (step, weights) in steps.items():
            carried = states[name]
            start = time.perf_counter()
            for _ in range(options.steps):
                carried = step(carried, weights)
            jax.block_until_ready(carried)
            seconds = time.perf_counter() - start
            states[name] = carried
            if batch > 1:
                figures[name].append(seconds / (options.steps * layers) * 1e6)
    return figures


def measure(form: str, dtype: str, bandwidth: float, options: Options) -> list[dict]:
    """All numbers of rows for one form."""
    keys = jax.random.split(jax.random.key(0), options.layers)
    layers = [sparse_layer(key, form, dtype, options) for key in keys]
    dense = [_dense_layer(*layer) for layer in layers]
    results = []
    for rows in options.rows:
        x = jax.random.normal(jax.random.key(rows), (rows, options.hidden), jnp.float32)
        qkv = jnp.tile(x, (1, 1 + 2 * options.kv_features // options.hidden + 1))
        qkv = qkv[:, : options.hidden + 2 * options.kv_features]
        state = (x.astype(dtype), qkv.astype(dtype))

        def jitted(function, **fixed):
            return jax.jit(partial(function, form=form, **fixed), donate_argnums=0)

        steps = {
            "dense": (jitted(dense_step), dense),
            "2:4": (jitted(sparse_step, prefetch=True), layers),
            "careful": (jitted(sparse_step, prefetch=False), layers),
        }
        for text in options.plans:
            steps[text] = (jitted(sparse_step, prefetch=True, plans=read_plans(text)), layers)
        outputs = {name: step(_copy(state), weights)[0] for name, (step, weights) in steps.items()}
        exact = outputs["dense"].astype(jnp.float32)
        errors = {
            name: float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))
            for name, y in outputs.items()
        }
        figures = _time_all(steps, state, options.layers, options)
        first = layers[0][0]
        blobs = [first.gate_up, first.down, *([] if form == "mlp" else [first.o, first.qkv])]
        bound = sum(blob.nbytes for blob in blobs) / bandwidth * 1e6
        median = {name: statistics.median(values) for name, values in figures.items()}
        print(
            f"{form:8s} {dtype} {rows:2d} rows: dense {median['dense']:.2f}, 2:4 "
            f"{median['2:4']:.2f}, careful {median['careful']:.2f} us a layer; bound {bound:.2f}; "
            f"{median['dense'] / median['2:4']:.3f}x, {bound / median['2:4']:.3f} of the bound; "
            f"difference to dense {errors['2:4']:.1e}",
            flush=True,
        )
        for text in options.plans:
            print(
                f"    {median[text]:.2f} ({median[text] - median['2:4']:+.2f}) {text}", flush=True
            )
        results.append(
            {
                "form": form,
                "dtype": dtype,
                "rows": rows,
                "microseconds": median,
                "batches": figures,
                "bound": bound,
                "ratio": median["dense"] / median["2:4"],
                "share": bound / median["2:4"],
                "differences": errors,
            }
        )
        assert all(math.isfinite(error) and error < 0.05 for error in errors.values()), errors
    return results


def main(options: Options) -> None:
    """Prints a line for each form and number of rows, and writes them as JSON."""
    if jax.default_backend() != "gpu":
        raise SystemExit("benchmarks/decode_step.py times an NVIDIA GPU, and JAX sees none.")
    for text in options.plans:  # before anything is timed
        products = set(read_plans(text))
        if "mlp" in options.forms and products & {"o", "qkv"}:
            raise SystemExit(
                f"--plans {text}: --forms mlp has neither o nor qkv; name other forms."
            )
    bandwidth = copy_bandwidth()
    machine = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "records calls": ffi.records_calls(),
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
    }
    print(machine, flush=True)
    results = []
    for dtype in options.dtypes:
        for form in options.forms:
            results += measure(form, dtype, bandwidth, options)
    if options.json is not None:
        report = {"machine": machine, "options": asdict(options), "results": results}
        write_text(options.json, json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
