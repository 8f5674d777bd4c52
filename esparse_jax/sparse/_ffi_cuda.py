"""The extension's calls for NVIDIA GPUs."""

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from esparse_jax import native

from . import _ffi

_LOGGER = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16")
MAX_ROWS = 16  # of x
# What a plan's fields may be; see ffi/cuda/decode_plan.h.
PLAN_VALUES = {
    "tiles": (1, 2, 3, 4),
    "warps": (4, 8, 16),
    "blocks": (1, 2),
    "interleave": (1, 2),
    "depth": tuple(range(1, 9)),
    "resident": (1, 2),
}
PLAN_FIELDS = tuple(PLAN_VALUES)
MOST_WARPS = 16  # of a multiprocessor

PREFILL_CAPABILITY = "9.0"  # whose instructions the prefill kernel is made of
# What the handlers take at most: rows of x of that kernel, and weights of any.
PREFILL_MAX_ROWS, MAX_WEIGHTS = 1 << 24, 1 << 31
PREFILL_FEWEST_ROWS = 16  # of its tiles
# What a plan of it may be; see ffi/cuda/prefill_plan.h.
PREFILL_PLAN_VALUES = {
    "rows": (PREFILL_FEWEST_ROWS, 64, 128, 256),
    "outputs": (128, 192),
    "cluster": (1, 2),
    "group": tuple(range(1, 65)),
    "split": tuple(range(1, 9)),
    "tail": tuple(range(1, 9)),
}
# Rows, outputs and cluster of the blocks that there are.
PREFILL_TILES = (
    *((PREFILL_FEWEST_ROWS, 128, 1), (64, 128, 1), (128, 128, 1), (128, 192, 1)),
    *((256, 128, 1), (256, 128, 2), (256, 192, 1), (256, 192, 2)),
)

# What the decode kernel does around the product, by the numbers of ffi/cuda/decode_args.h.
_NORM, _SWIGLU, _RESIDUAL, _PERMUTE, _SCATTER = 1, 2, 4, 8, 16


def decode_available() -> bool:
    """Whether this build of the extension holds the decode kernel."""
    return native.has_cuda()


def _extension() -> ModuleType:
    extension = native.extension()
    if extension is None or not extension.HAS_CUDA:
        raise RuntimeError(
            "our CUDA kernels need the compiled extension with its CUDA part, which is not in this "
            "build. Install with nvcc at hand, pip install . "
            '-C cmake.define.ESPARSE_CUDA=ON (see BUILD.md), or use backend="reference".'
        )
    return extension


def prefill_available() -> bool:
    """Whether this build of the extension holds the prefill kernel."""
    extension = native.extension()
    return extension is not None and extension.CUDA_PREFILL_TARGET is not None


def _require_fields(plan: Mapping[str, int], allowed: Mapping[str, tuple[int, ...]]) -> None:
    unknown = set(plan) - set(allowed)
    if unknown:
        raise ValueError(f"a plan has the fields {tuple(allowed)}; got {sorted(unknown)} as well.")
    for field, value in plan.items():
        if value not in allowed[field]:
            listed = ", ".join(map(str, allowed[field]))
            raise ValueError(f"{field} of a plan is {value}; it is one of {listed}, or left out.")


def require_prefill_plan(plan: Mapping[str, int]) -> None:
    """Refuses what is no plan of the prefill kernel, by ffi/cuda/prefill_plan.h."""
    _require_fields(plan, PREFILL_PLAN_VALUES)
    named = [plan.get(field) for field in ("rows", "outputs", "cluster")]
    if not any(
        all(value in (None, own) for value, own in zip(named, tile, strict=True))
        for tile in PREFILL_TILES
    ):
        listed = ", ".join(f"{rows} x {outputs} in {many}" for rows, outputs, many in PREFILL_TILES)
        raise ValueError(
            "rows x outputs of a plan and the blocks that share x, its cluster, are one of "
            f"{listed}; got {dict(plan)}."
        )
    if plan.get("cluster") == 2 and plan.get("split", 1) != 1:
        raise ValueError(f"a plan with a cluster of 2 blocks has a split of 1; got {dict(plan)}.")
    if plan.get("split", 1) > 1 and plan.get("tail", 1) > 1:
        raise ValueError(
            f"a plan splits the channels of all tiles or of its tail, not both; got {dict(plan)}."
        )


def require_plan(plan: Mapping[str, int]) -> None:
    """Refuses what is no plan of the decode kernel, by ffi/cuda/decode_plan.h."""
    _require_fields(plan, PLAN_VALUES)
    warps, blocks = plan.get("warps", 1), plan.get("blocks", 1)
    if warps * blocks > MOST_WARPS:
        raise ValueError(
            f"{blocks} blocks of {warps} warps of a plan are more than a multiprocessor holds, "
            f"{MOST_WARPS} warps; name fewer."
        )


def _plan(plan: Mapping[str, int] | None) -> np.ndarray:
    """How the kernel cuts its work; it chooses what is not named."""
    plan = plan or {}
    require_plan(plan)
    return np.array([plan.get(field, 0) for field in PLAN_FIELDS], np.int32)


def _require_rows(rows: int) -> None:
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(
            f"the decode kernel takes 1 to {MAX_ROWS} rows; got {rows}. sparse_matmul with "
            f"backend=None takes any number."
        )


_PREFILL_ASKED_FOR = threading.Event()
_TRACED: ContextVar[bool] = ContextVar("esparse_jax_traced_calls", default=False)


@contextlib.contextmanager
def traced_calls() -> Iterator[None]:
    """Inside, no call is one that XLA records, or that is for the GPU at hand alone."""
    token = _TRACED.set(True)
    try:
        yield
    finally:
        _TRACED.reset(token)


def prefill_runs(capability: str | None) -> bool:
    """Whether a computation that is lowered for such a GPU may hold the prefill kernel."""
    runs = capability == PREFILL_CAPABILITY and prefill_available() and not _TRACED.get()
    if runs:
        _PREFILL_ASKED_FOR.set()
    return runs


def prefill_was_asked_for() -> bool:
    """Whether any computation of this process may hold it."""
    return _PREFILL_ASKED_FOR.is_set()


def records_calls() -> bool:
    """Whether XLA records a call (a product, the attention of a decode step) as a kernel of its own
    CUDA graph, so that calls can overlap.

    It takes a GPU of compute capability 9.0 and FFI API 0.4 (jax 0.11). Elsewhere XLA traces each
    call into a graph of its own, and only the kernels inside one call overlap.
    """
    return not _TRACED.get() and _can_record()


@functools.cache
def _can_record() -> bool:
    extension = native.extension()
    if extension is None or extension.CUDA_RECORDED_TARGET is None:
        return False
    if jax.default_backend() != "gpu" or jax.devices()[0].compute_capability != "9.0":
        return False
    try:
        jax.ffi.register_ffi_target(
            extension.CUDA_RECORD_TARGET, extension.record_registration(), platform="CUDA"
        )
    except jax.errors.JaxRuntimeError as error:
        _LOGGER.info("XLA traces 2:4 products and attentions instead of recording them: %s", error)
        return False
    return True


def decode(
    x: Float[Array, "row channel"],
    blob: UInt8[Array, " blob_byte"],
    *,
    out: int,
    residual: Float[Array, "row out"] | None = None,
    permutation: Int32[Array, " source"] | None = None,
    places: Int32[Array, " out"] | None = None,
    norm_epsilon: float | None = None,
    swiglu: bool = False,
    prefetch: bool = False,
    plan: Mapping[str, int] | None = None,
) -> tuple[Float[Array, "row column"], Float[Array, "row column"] | None]:
    """`x @ weight.T` by the decode kernel, for 1 to 16 rows; and the same in another order.

    Args:
        blob: `Blob24.data` of a weight with `out` outputs.
        residual: Added to the result.
        permutation: `x[:, permutation]` is multiplied.
        places: The second result has column c of the first at `places[c]`; None without it.
        norm_epsilon: Where given, the result is scaled to that of RMS-normalised rows of x.
        swiglu: The weight is `interleave_gate_up(gate, up)`; the result is `silu(gate) * up`.
        prefetch: The blob was complete before the computation began: it may be read before the
            kernel before has ended.
        plan: How the work is cut, where the kernel's own rule is not the best.
    """
    extension = _extension()
    _require_rows(x.shape[0])
    target = extension.CUDA_RECORDED_TARGET if records_calls() else extension.CUDA_DECODE_TARGET
    rows = x.shape[0]

    def result(columns):
        return _ffi.result_like(x, blob, (rows, columns), x.dtype)

    fusion, more, results = 0, [], [result(out // 2 if swiglu else out)]
    if norm_epsilon is not None:
        fusion |= _NORM
    if swiglu:
        fusion |= _SWIGLU
    if residual is not None:
        fusion |= _RESIDUAL
        more.append(residual)
    if permutation is not None:
        fusion |= _PERMUTE
        more.append(permutation)
        results.append(result(x.shape[1]))
    if places is not None:
        fusion |= _SCATTER
        more.append(places)
        results.append(result(out))
    computed = jax.ffi.ffi_call(target, results)(
        x,
        blob,
        *more,
        fusion=np.int32(fusion),
        epsilon=np.float32(norm_epsilon or 0.0),
        prefetch=prefetch,
        plan=_plan(plan),
    )
    return computed[0], None if places is None else computed[-1]


def decode_in_pieces(
    x: Float[Array, "row channel"],
    blob: UInt8[Array, " blob_byte"],
    *,
    out: int,
    prefetch: bool = False,
    plan: Mapping[str, int] | None = None,
) -> Float[Array, "row out"]:
    """`x @ weight.T` for any number of rows, 16 of them in a call: each reads the whole weight."""
    pieces = [
        decode(x[start : start + MAX_ROWS], blob, out=out, prefetch=prefetch, plan=plan)[0]
        for start in range(0, x.shape[0], MAX_ROWS)
    ]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def prefill(
    x: Float[Array, "row channel"],
    blob: UInt8[Array, " blob_byte"],
    *,
    out: int,
    prefetch: bool = False,
    plan: Mapping[str, int] | None = None,
) -> Float[Array, "row out"]:
    """`x @ weight.T` by the prefill kernel, for any number of rows; compute capability 9.0 only.

    Args:
        blob: `Blob24.data` of a weight with `out` outputs.
        prefetch: The blob was complete before the computation began: where XLA records calls, it
            may be read before the kernel before has ended.
        plan: How the work is cut, where the kernel's own rule is not the best: the rows of x that a
            block multiplies at a time, and the outputs; the blocks that share what they load of x,
            how many tiles of rows are walked together, how many blocks split the channels of a
            tile, and how many those of the tail: the last tiles, too few for all multiprocessors
            (the sum of the parts is rounded as any other sum in float32, so its last bits are
            others).

    Raises:
        RuntimeError: The extension was built without it.
        ValueError: No such plan.
    """
    extension = _extension()
    if extension.CUDA_PREFILL_TARGET is None:
        raise RuntimeError(
            "the prefill kernel is for compute capability 9.0, which this build of the extension "
            "was not made for: CMAKE_CUDA_ARCHITECTURES must name 90 (see BUILD.md)."
        )
    result = _ffi.result_like(x, blob, (x.shape[0], out), x.dtype)
    recorded = extension.CUDA_RECORDED_PREFILL_TARGET if records_calls() else None
    call = jax.ffi.ffi_call(recorded or extension.CUDA_PREFILL_TARGET, result)
    return call(x, blob, prefetch=prefetch, plan=prefill_plan(plan))


def prefill_plan(plan: Mapping[str, int] | None) -> np.ndarray:
    """How the prefill kernel cuts its work; it chooses what is not named."""
    plan = plan or {}
    require_prefill_plan(plan)
    return np.array([plan.get(field, 0) for field in PREFILL_PLAN_VALUES], np.int32)


class Result(NamedTuple):
    """What an earlier step of a chain computed; `scattered`: in the order of that step's places."""

    step: int
    scattered: bool = False


class Step(NamedTuple):
    """One product of a chain.

    Attributes:
        x: `[row, channel]`.
        blob: `Blob24.data` of a weight with `out` outputs.
        residual, places, swiglu: As for `decode`.
        norm: Whether x is RMS-normalised.
        plan: As for `decode`.
    """

    x: Array | Result
    blob: UInt8[Array, " blob_byte"]
    out: int
    residual: Array | Result | None = None
    places: Int32[Array, " out"] | None = None
    norm: bool = False
    swiglu: bool = False
    plan: Mapping[str, int] | None = None

    @property
    def fusion(self) -> int:
        """What stands around the product, as the kernel's number."""
        return (
            _NORM * self.norm
            | _SWIGLU * self.swiglu
            | _RESIDUAL * (self.residual is not None)
            | _SCATTER * (self.places is not None)
        )

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.out // 2 if self.swiglu else self.out


def chain(
    steps: list[Step], *, epsilon: float, prefetch: bool = False
) -> list[tuple[Float[Array, "row column"], Float[Array, "row column"] | None]]:
    """Several products, of which the later ones fetch their weights while the earlier ones run.

    Where XLA records calls there is one for each product, elsewhere one for all.

    Args:
        steps: The first one reads an array.
        epsilon: Of all norms.
        prefetch: As for `decode`.

    Returns:
        For each step its result, and that in the order of its `places`.
    """
    _require_rows(steps[0].x.shape[0])
    return (_recorded_chain if records_calls() else _traced_chain)(steps, epsilon, prefetch)


def _recorded_chain(steps, epsilon, prefetch):
    done = []

    def value(source):
        return done[source.step][source.scattered] if isinstance(source, Result) else source

    for step in steps:
        done.append(
            decode(
                value(step.x),
                step.blob,
                out=step.out,
                residual=value(step.residual),
                places=step.places,
                norm_epsilon=epsilon if step.norm else None,
                swiglu=step.swiglu,
                # The first one waits for whatever may have written the weights.
                prefetch=prefetch or bool(done),
                plan=step.plan,
            )
        )
    return done


def _traced_chain(steps, epsilon, prefetch):
    arrays = [
        operand
        for step in steps
        for operand in (step.x, step.blob, step.residual, step.places)
        if operand is not None and not isinstance(operand, Result)
    ]
    arguments = list({id(array): array for array in arrays}.values())
    numbers = {id(array): number for number, array in enumerate(arguments)}
    results, written = [], []
    first = steps[0].x

    def number(source):
        if source is None:
            return -1
        if isinstance(source, Result):
            return written[source.step][source.scattered]
        return numbers[id(source)]

    fields = []
    for step in steps:
        y = len(arguments) + len(results)
        scattered = -1 if step.places is None else y + 1
        read = [number(source) for source in (step.x, step.blob, step.residual, step.places)]
        fields += [*read, y, scattered, step.fusion, *_plan(step.plan)]
        result = _ffi.result_like(first, step.blob, (first.shape[0], step.columns), first.dtype)
        results += [result] * (1 if scattered < 0 else 2)
        written.append((y, scattered))
    computed = jax.ffi.ffi_call(_extension().CUDA_CHAIN_TARGET, results)(
        *arguments,
        epsilon=np.float32(epsilon),
        prefetch=prefetch,
        steps=np.array(fields, np.int32),
    )
    buffers = [None] * len(arguments) + list(computed) + [None]  # -1 is the last
    return [(buffers[y], buffers[scattered]) for y, scattered in written]
