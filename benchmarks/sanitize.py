"""compute-sanitizer over the CUDA kernels of a model: memory, races, uninitialised reads, barriers.

    python benchmarks/sanitize.py [--tools memcheck racecheck] [--parts products norms]

Runs itself under each tool. `products`: every instance of a decode step's product (both dtypes,
both widths, one to four tiles), with all that can be fused to it, in calls alone and in a chain.
`attentions`, from compute capability 9.0 on: every instance of a decode step's attention (both
dtypes, both head sizes, all numbers of query heads to a key, all cluster sizes), with and without
padding, and prefetch with an order of the result. `prompts`, on compute capability 9.0: every
instance of the prefill kernel, over tiles that are not whole. `norms`: every instance of the norm
of a prompt's rows, with all that it may be given. Exit status 1 where a tool reports an error,
where a result is wrong, or where a part did not run. compute-sanitizer is part of the CUDA toolkit.
"""

import functools
import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from esparse_jax.models import _ffi_attention, _ffi_norm
from esparse_jax.sparse import _ffi_cuda as ffi
from esparse_jax.sparse import blob24, compress24, this_machine
from esparse_jax.sparse._timing import random_24

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A half unit of channels, tiles that do not divide by the blocks', more warps than units.
SHAPE = (2304, 448)
PLANS = [
    {
        "tiles": tiles,
        "warps": warps,
        "blocks": blocks,
        "resident": resident,
        "interleave": 1 + tiles % 2,
    }
    for tiles in (1, 2, 3, 4)
    for resident, warps, blocks in ((1, 8, 2), (2, 16, 1), (2, 4, 2))
]
# Rows and slots of the attention's caches. On 81 to 160 multiprocessors the rows make clusters of
# 8, 4 and 1 blocks (ClusterOf in ffi/cuda/attention.cu); a block has more slots than it reads at
# once.
KV_HEADS = 4
CACHES = ((5, 2100), (18, 1100), (72, 300))
_THETA = 10000.0
_ERRORS = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")
# What is printed inside.
_RAN = {
    "products": re.compile(r"^[1-9]\d* products compared", re.M),
    "attentions": re.compile(r"^(?:[1-9]\d* attentions compared|attention left out: .*)", re.M),
    "prompts": re.compile(r"^(?:[1-9]\d* prompts compared|prefill left out: .*)", re.M),
    "norms": re.compile(r"^[1-9]\d* norms compared", re.M),
}
PARTS = tuple(_RAN)
# Of the prefill kernel: outputs and rows that do not fill the last tile, and all its instances,
# with the channels split and not.
PROMPT_SHAPE, PROMPT_ROWS = (704, 448), 600
PROMPT_PLANS = (
    {"rows": 16, "split": 1},
    {"rows": 16, "split": 3},
    {"rows": 64, "split": 1},
    {"rows": 64, "split": 3},
    {"rows": 128, "outputs": 128, "split": 1},
    {"rows": 128, "outputs": 128, "split": 2},
    {"rows": 128, "outputs": 192, "split": 1},
    {"rows": 128, "outputs": 192, "split": 2},
    {"rows": 256, "outputs": 128, "split": 1, "cluster": 1},
    {"rows": 256, "outputs": 128, "split": 1, "cluster": 2},
    {"rows": 256, "outputs": 128, "split": 7},
    {"rows": 256, "outputs": 192, "split": 1, "cluster": 1},
    {"rows": 256, "outputs": 192, "split": 1, "cluster": 2},
    {"rows": 256, "outputs": 192, "split": 7},
)
# And with the last tiles split, which takes more of them than an H200 or H100 runs at once.
TAIL_SHAPE, TAIL_ROWS = (8512, 192), 800
TAIL_PLANS = (
    {"rows": 16, "split": 1, "tail": 3},
    {"rows": 64, "split": 1, "tail": 3},
    {"rows": 128, "outputs": 128, "split": 1, "tail": 2},
    {"rows": 128, "outputs": 192, "split": 1, "tail": 3},
    {"rows": 256, "outputs": 128, "split": 1, "tail": 3, "cluster": 1},
    {"rows": 256, "outputs": 128, "split": 1, "tail": 2, "cluster": 2},
    {"rows": 256, "outputs": 192, "split": 1, "tail": 2, "cluster": 2},
)
# Rows and channels of the norms: one to four rows share a block, and the last one is not full.
NORMS = ((6, 2056), (5, 8192), (2, 24320))


@dataclass(frozen=True)
class Arguments:
    """Which tools to run."""

    tools: tuple[str, ...] = TOOLS
    parts: tuple[Literal["products", "attentions", "prompts", "norms"], ...] = PARTS
    compute_sanitizer: Path | None = None
    inside: bool = False
    """Run the kernels themselves, as the tools do."""


def products() -> int:
    """Runs the kernels and compares each result with float64; how many there were."""
    out, channels = SHAPE
    compared = 0
    for dtype in ("float16", "bfloat16"):
        weight = random_24(jax.random.key(0), out, channels, dtype)
        data = blob24(compress24(weight)).data
        exact = np.asarray(weight, np.float64).T
        order = np.random.default_rng(0).permutation(channels).astype(np.int32)
        places = np.random.default_rng(1).permutation(out).astype(np.int32)
        rounding = float(jnp.finfo(dtype).eps)
        for rows in (1, 8, 9, 16):
            x = jax.random.normal(jax.random.key(rows), (rows, channels)).astype(dtype)
            residual = jax.random.normal(jax.random.key(rows), (rows, out)).astype(dtype)
            wide, added = np.asarray(x, np.float64), np.asarray(residual, np.float64)
            scale = np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5)
            silu = _swiglu(wide @ exact / scale)

            def run(x, data, residual=residual, order=order, places=places):
                def product(plan, **around):
                    return ffi.decode(x, data, out=out, plan=plan, **around)

                return [
                    (
                        product(plan, residual=residual, places=places),
                        product(plan, norm_epsilon=1e-5, swiglu=True)[0],
                        product(plan, permutation=order)[0],
                    )
                    for plan in PLANS
                ]

            for (y, strewn), fused, permuted in jax.jit(run)(x, data):
                _compare(y, wide @ exact + added, rounding)
                _compare(np.asarray(strewn)[:, places], wide @ exact + added, rounding)
                _compare(fused, silu, rounding)
                _compare(permuted, wide[:, order] @ exact, rounding)
                compared += 4
        compared += _chain(data, dtype)
    return compared


def _swiglu(y: np.ndarray) -> np.ndarray:
    pairs = y.reshape(y.shape[0], -1, 2, 8)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    return (gate / (1 + np.exp(-gate)) * up).reshape(y.shape[0], -1)


def _chain(data: jax.Array, dtype: str) -> int:
    """Products that overlap, in a graph, give the bits of products one by one."""
    out, channels = SHAPE
    x = jax.random.normal(jax.random.key(1), (16, channels)).astype(dtype)

    def step(x, data, prefetch):
        y, _ = ffi.decode(x, data, out=out, prefetch=prefetch)
        return y[:, :channels]

    overlapped, alone = x, x
    chain = jax.jit(lambda x, data: [x := step(x, data, True) for _ in range(8)])
    for overlapped in chain(x, data):
        alone = jax.jit(step, static_argnums=2)(alone, data, False)
        np.testing.assert_array_equal(overlapped, alone)
    return 8


class Step(NamedTuple):
    """One call of the attention, on the host."""

    projected: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    angles: np.ndarray  # float64, one row or one for each
    length: int
    start: np.ndarray | None
    heads: int
    places: np.ndarray | None  # where the features of the result go
    prefetch: bool

    @property
    def place(self) -> int:
        """The slot that is written: the last one where none is left."""
        return min(self.length, self.keys.shape[1] - 1)


def attentions() -> int:
    """Runs the attention of decode steps and compares each with float64; how many there were."""
    compared = 0
    for dtype, features in itertools.product(_ffi_attention._DTYPES, _ffi_attention._FEATURES):
        steps = _steps(dtype, features)

        # Each has a cache of its own, donated: nothing copies it, so it may be prefetched.
        def run(given, caches, steps=steps):
            return [
                _ffi_attention.attend(
                    projected, *cache, cosines, sines, length, start, places,
                    heads=step.heads, prefetch=step.prefetch,
                )
                for step, (projected, cosines, sines, length, start, places), cache in zip(
                    steps, given, caches, strict=True
                )
            ]  # fmt: skip

        given = [
            (
                step.projected,
                np.cos(step.angles).astype(np.float32),
                np.sin(step.angles).astype(np.float32),
                np.int32(step.length),
                step.start,
                step.places,
            )
            for step in steps
        ]
        caches = [(jnp.array(step.keys), jnp.array(step.values)) for step in steps]
        results = jax.jit(run, donate_argnums=1)(given, caches)
        for step, result in zip(steps, results, strict=True):
            _compare_step(step, *map(np.asarray, result))
            compared += 1
    return compared


def _steps(dtype: str, features: int) -> list[Step]:
    """All that differs inside of one dtype and head size. Slots that are not filled hold nan."""
    random = np.random.default_rng(features)
    steps = []
    for rows, slots in CACHES:
        shape = (2, rows * KV_HEADS, slots, features)
        full = random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
        some = full.copy()
        some[:, :, slots - 3 :] = np.nan
        for shared, padded, prefetch in itertools.product(
            _ffi_attention._SHARED, (False, True), (False, True)
        ):
            # A slot is left for the token, or none.
            length, held = (slots - 3, some) if padded == prefetch else (slots, full)
            last = min(length, slots - 1)
            starts = np.array([0, 1, last // 2, last - 1, last], np.int32)
            start = np.resize(starts, rows) if padded else None
            positions = length - (start if padded else np.zeros(1))
            heads = shared * KV_HEADS
            width = (heads + 2 * KV_HEADS) * features
            order = random.permutation(heads * features).astype(np.int32)
            steps.append(
                Step(
                    random.standard_normal((rows, width), np.float32).astype(jnp.dtype(dtype)),
                    *held,
                    positions[:, None] * _THETA ** (-2 * np.arange(features // 2) / features),
                    length, start, heads, order if prefetch else None, prefetch,
                )
            )  # fmt: skip
    return steps


def _exact(step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the heads of each row attend to, its new keys and its new values, in float64."""
    rows, features = len(step.projected), step.keys.shape[2]
    given = step.projected.astype(np.float64).reshape(rows, -1, features)
    turned, new_values = np.split(given, [step.heads + KV_HEADS], axis=1)
    first, second = np.split(turned, 2, axis=2)
    cosines, sines = np.cos(step.angles)[:, None], np.sin(step.angles)[:, None]
    turned = np.concatenate(
        (first * cosines - second * sines, second * cosines + first * sines), axis=2
    )
    queries, new_keys = np.split(turned, [step.heads], axis=1)
    queries = queries.reshape(rows, KV_HEADS, -1, features)
    attended = np.empty_like(queries)
    for row in range(rows):
        matrices = slice(row * KV_HEADS, (row + 1) * KV_HEADS)
        seen = slice(0 if step.start is None else step.start[row], step.place)
        keys, values = (
            np.concatenate((cache[matrices, seen].astype(np.float64), new[row, :, None]), axis=1)
            for cache, new in ((step.keys, new_keys), (step.values, new_values))
        )
        logits = queries[row] @ keys.swapaxes(1, 2) / np.sqrt(features)
        weights = np.exp(logits - logits.max(axis=2, keepdims=True))
        attended[row] = weights @ values / weights.sum(axis=2, keepdims=True)
    attended, new_keys, new_values = (
        x.reshape(-1, features) for x in (attended, new_keys, new_values)
    )
    return attended, new_keys, new_values


def _compare_step(step: Step, attended: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    """Head by head; but for the new key, which is rounded, the cache is known bit by bit."""
    rounding = float(jnp.finfo(attended.dtype).eps)
    if step.places is not None:
        attended = attended[:, step.places]
    want, new_keys, new_values = _exact(step)
    _compare(attended.reshape(want.shape), want, rounding, "an attention", axis=1)
    _compare(keys[:, step.place], new_keys, rounding, "a key in the cache", axis=1)
    want_keys, want_values = step.keys.copy(), step.values.copy()
    want_keys[:, step.place], want_values[:, step.place] = keys[:, step.place], new_values
    for name, got, cache in (("keys", keys, want_keys), ("values", values, want_values)):
        wrong = np.any(got.view(np.uint16) != cache.view(np.uint16), axis=(0, 2))
        if wrong.any():
            raise SystemExit(
                f"the attention left wrong {name} in the slots {np.flatnonzero(wrong)} of the "
                f"cache; the token's is {step.place}."
            )


def prompts() -> int:
    """Runs products of many rows and compares each with float64; how many there were."""
    compared = 0
    products = ((PROMPT_SHAPE, PROMPT_ROWS, PROMPT_PLANS), (TAIL_SHAPE, TAIL_ROWS, TAIL_PLANS))
    for dtype, ((out, channels), rows, plans) in itertools.product(ffi.DTYPES, products):
        weight = random_24(jax.random.key(0), out, channels, dtype)
        data = blob24(compress24(weight)).data
        exact = np.asarray(weight, np.float64).T
        x = jax.random.normal(jax.random.key(1), (rows, channels)).astype(dtype)
        want = np.asarray(x, np.float64) @ exact
        for plan in plans:
            product = functools.partial(ffi.prefill, out=out, plan=plan | {"group": 2})
            y = jax.jit(product)(x, data)
            _compare(y, want, float(jnp.finfo(dtype).eps), "a prompt", axis=1)
            compared += 1
    return compared


def norms() -> int:
    """Runs the norms of rows and compares each with float64; how many there were."""
    random, compared = np.random.default_rng(0), 0
    for dtype, (rows, channels) in itertools.product(_ffi_norm._DTYPES, NORMS):
        x, residual = jnp.asarray(random.standard_normal((2, rows, channels)), dtype)
        gain = jnp.asarray(random.uniform(0.5, 2, channels), dtype)
        order = jnp.asarray(random.permutation(channels), jnp.int32)
        for add, scale, permute in itertools.product((False, True), repeat=3):
            given = {
                "residual": residual if add else None,
                "gain": gain if scale else None,
                "permutation": order if permute else None,
            }
            norm = jax.jit(lambda x, given: _ffi_norm.add_norm(x, epsilon=1e-5, **given))
            total, normed = norm(x, given)
            want = np.asarray(x, np.float64) + (np.asarray(residual, np.float64) if add else 0)
            rounding = float(jnp.finfo(dtype).eps)
            _compare(total, want, rounding, "a sum", axis=1)
            want = np.asarray(total, np.float64)
            want = want / np.sqrt(np.mean(want**2, axis=1, keepdims=True) + 1e-5)
            want = want * (np.asarray(gain, np.float64) if scale else 1)
            want = want[:, np.asarray(order)] if permute else want
            _compare(normed, want, rounding, "a norm", axis=1)
            compared += 1
    return compared


def _compare(
    got: jax.typing.ArrayLike,
    want: np.ndarray,
    rounding: float,
    what: str = "a product",
    axis: int | None = None,
) -> None:
    apart = np.linalg.norm(np.asarray(got, np.float64) - want, axis=axis)
    error = np.max(apart / np.linalg.norm(want, axis=axis))
    if not error < 2 * rounding:
        raise SystemExit(f"{what} is {error:.1e} from float64; allowed {2 * rounding:.1e}.")


def main(arguments: Arguments) -> int:
    """Prints what each tool found; the exit status."""
    if arguments.inside:
        if "products" in arguments.parts:
            print(f"{products()} products compared")
        if "attentions" in arguments.parts:
            if _ffi_attention._runs():
                print(f"{attentions()} attentions compared")
            else:
                print("attention left out: its kernel needs compute capability 9.0")
        if "prompts" in arguments.parts:
            machine = this_machine()
            if ffi.prefill_runs(machine and machine.capability):
                print(f"{prompts()} prompts compared")
            else:
                print("prefill left out: its kernel is for compute capability 9.0")
        if "norms" in arguments.parts:
            print(f"{norms()} norms compared")
        return 0
    unknown = sorted(set(arguments.tools) - set(TOOLS))
    if not arguments.parts:
        print(f"there is nothing to run: give some of --parts {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    if unknown:
        print(f"tools are {', '.join(TOOLS)}; got {', '.join(unknown)}.", file=sys.stderr)
        return 2
    sanitizer = arguments.compute_sanitizer or shutil.which("compute-sanitizer")
    if sanitizer is None:
        print(
            "compute-sanitizer is not on the PATH: it is part of the CUDA toolkit. Name it with "
            "--compute-sanitizer.",
            file=sys.stderr,
        )
        return 2
    bad = 0
    for tool in arguments.tools:
        command = [sanitizer, "--tool", tool, sys.executable, __file__, "--inside"]
        command += ["--parts", *arguments.parts]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        text = done.stdout + done.stderr
        counts = [int(a or b) for a, b in _ERRORS.findall(text)]
        found = [_RAN[part].search(text) for part in arguments.parts]
        compared = [match and match[0] for match in found]
        clean = done.returncode == 0 and counts and not any(counts) and all(compared)
        bad += not clean
        ran = ", ".join(map(str, compared))
        print(f"{tool}: {', '.join(map(str, counts)) or 'no'} errors, {ran}")
        if not clean:
            print(*text.splitlines()[-60:], sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
