"""The child process of `tune.tune_shape`: computes and times candidates of one shape.

    python -m esparse_jax.sparse._tune_worker

Lines of JSON on stdin and stdout. The first line in is the job; the answer is `{"ready": facts}`,
or `{"error": message}` where nothing can be measured here. Every further line in is a request, with
`rows`, a `candidate`, an `effort` (coarse or thorough: in a graph of the candidate alone; chain: in
a jitted chain, as dense, pieces and prefetch always are) and the `best` time so far. It is answered
by `{"begin": candidate}` when its operands are there and `{"end": candidate, ...}` with one of

    microseconds   of a product
    refused        why it cannot be run; nothing happened
    wrong          by how much its numbers are off, in units of what may be
    failed         what broke the GPU's context; the process ends

A candidate that takes the process with it, or never ends, is noticed by who reads this.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from . import _ffi_cuda, _ffi_cusparselt
from ._ffi_cusparselt import Algorithm
from ._timing import (
    GRAPH_START,
    Chain,
    chain_inputs,
    chain_rotation,
    estimate,
    exact_product,
    random_24,
    rotation,
    timer_operands,
)
from .blob import Blob24, device_blob24
from .compress import compress24
from .machine import this_machine
from .matmul import sparse_matmul

# Microseconds of work in a graph, and replays of it.
_COARSE, _THOROUGH = (1000, 2), (5000, 7)


@functools.partial(jax.jit, static_argnums=3)
def _worst(
    y: Float[Array, "all_rows out"],
    exact: Float[Array, "all_rows out"],
    rows: Int[Array, ""] | int,
    dtype: np.dtype,
) -> Float[Array, ""]:
    """The largest error in the first rows, in units of twice the error of rounding; inf for a nan.

    Elements smaller than their root mean square are held to that: there, sums cancel.
    """
    here = jnp.arange(y.shape[0])[:, None] < rows
    squares = jnp.sum(jnp.where(here, jnp.square(exact), 0)) / (jnp.float32(rows) * y.shape[1])
    error = jnp.abs(y.astype(jnp.float32) - exact) / (jnp.abs(exact) + jnp.sqrt(squares))
    error = jnp.where(error < jnp.inf, error, jnp.inf)  # XLA's maximum on the CPU loses a nan
    return jnp.max(jnp.where(here, error, 0)) / float(jnp.finfo(dtype).eps)


class Bench:
    """Operands of one shape's products, and what runs them.

    Args:
        job: `out`, `channels`, `dtype`, the `rows` that will be asked for, and the `platform`.
    """

    def __init__(self, job: Mapping[str, Any]):
        try:
            self._device = jax.devices(job["platform"])[0]
        except RuntimeError as error:
            raise RuntimeError(
                f"a search times products on an NVIDIA GPU, and JAX sees none ({error}). "
                f"`esparse doctor` says what is missing."
            ) from None
        self._shape = out, channels = job["out"], job["channels"]
        self._dtype = np.dtype(job["dtype"])
        on_gpu = job["platform"] == "cuda"
        # What a number of rows takes is a part of what the largest takes: XLA compiles once.
        self._most_rows = max(8, *job["rows"])
        with jax.default_device(self._device):
            self._weight = random_24(jax.random.key(0), out, channels, self._dtype)
            x = jax.random.normal(jax.random.key(1), (self._most_rows, channels), jnp.float32)
            self._x = x.astype(self._dtype)
            self._exact = exact_product(self._x, self._weight)
            self._blob = device_blob24(compress24(self._weight)) if on_gpu else None
        self._library = _ffi_cusparselt.opened_library() if on_gpu else None
        self._no_library: str | None = None
        self._split_k: int | None = None  # that the library takes by itself
        if on_gpu and self._library is None:
            try:
                _ffi_cusparselt.load_cusparselt()
            except RuntimeError as error:
                self._no_library = str(error)
        self._rows = 0
        self._weights = [self._weight]  # dense copies
        self._blobs = None if self._blob is None else self._blob.data[None]
        self._all_blobs = self._blobs
        self._search: _ffi_cusparselt.AlgorithmSearch | None = None  # of the rows at hand

    def facts(self) -> dict[str, Any]:
        """What the parent has to know before it asks."""
        machine = None if self._blob is None else this_machine()
        return {
            "device": machine.device if machine else self._device.device_kind,
            "capability": machine.capability if machine else "0.0",
            "cusparselt": machine.cusparselt if machine else None,
            "jax": jax.__version__,
            "decode": isinstance(self._blob, Blob24) and _ffi_cuda.decode_available(),
            "prefill": isinstance(self._blob, Blob24)
            and _ffi_cuda.prefill_runs(machine and machine.capability),
            "algorithms": 0 if self._library is None else self._count_algorithms(),
            "split_k": self._split_k,
            "no_library": self._no_library,
        }

    def make_operands(self, rows: int) -> None:
        """Makes x, and copies of the weight that leave the caches behind."""
        if self._rows == rows:
            return
        self._rows, self._search = 0, None
        self._operand = jax.block_until_ready(self._x[:rows])
        if self._blob is not None:
            data = self._blob.data
            copies = max(2, rotation(data.nbytes, rows, self._shape))  # of one there is no chain
            if copies > self._all_blobs.shape[0]:
                self._all_blobs = jnp.tile(data[None], (copies, 1))
            self._blobs = jax.block_until_ready(self._all_blobs[:copies])
        self._rows = rows

    def _count_algorithms(self) -> int:
        try:
            plan = self._search_of(self._most_rows).take(None)
        except RuntimeError as error:
            self._no_library = str(error)
            return 0
        self._split_k = plan.chosen.split_k
        return plan.algorithms

    def _search_of(self, rows: int) -> _ffi_cusparselt.AlgorithmSearch:
        out, channels = self._shape
        return _ffi_cusparselt.AlgorithmSearch(
            rows=rows, out=out, channels=channels, dtype=self._dtype, gpu=self._device
        )

    def run(
        self,
        rows: int,
        candidate: Mapping[str, Any],
        *,
        effort: Literal["coarse", "thorough", "chain"],
        best: float | None,
    ) -> dict[str, Any]:
        """The fields of a report's end."""
        fields = dict(candidate)
        kind = fields.pop("kind")
        if kind == "dense":
            return {"microseconds": self._time_chain(_dense, self._dense_copies())}
        if kind in ("pieces", "prefetch"):
            return self._time_rule(prefetch=kind == "prefetch")
        if effort == "chain":
            return self._time_blobs(self._product(kind, fields))
        if kind in ("decode", "prefill"):
            launch = getattr(self, f"_{kind}")
            return self._time(functools.partial(launch, fields["plan"]), effort, best)
        try:
            if self._search is None:
                self._search = self._search_of(rows)
            taken = self._search.take(Algorithm(**fields))
        except RuntimeError as error:
            return {"refused": str(error)}
        launch = functools.partial(self._by_library, self._search)
        return self._time(launch, effort, best) | {"workspace_bytes": taken.workspace_bytes}

    def _product(self, kind: str, fields: dict[str, Any]) -> Callable[[Array, Array], Array]:
        """A candidate as users compute it, of x and a blob's bytes."""
        if kind == "cusparselt":
            algorithm = Algorithm(**fields)
            return lambda x, data: sparse_matmul(
                x,
                dataclasses.replace(self._blob, data=data),
                backend="cusparselt",
                algorithm=algorithm,
            )
        call = _ffi_cuda.prefill if kind == "prefill" else _ffi_cuda.decode_in_pieces
        return functools.partial(call, out=self._shape[0], plan=fields["plan"])

    def works(self) -> bool:
        """Whether the GPU still computes, after an error."""
        try:
            return float(jnp.sum(jnp.arange(8, dtype=jnp.float32) + 1)) == 36
        except Exception:
            return False

    def _time(
        self,
        run: Callable[..., float],
        effort: Literal["coarse", "thorough"],
        best: float | None,
    ) -> dict[str, Any]:
        """One launch, whose numbers must be right, then a time; none where one launch is hopeless.

        Args:
            run: Launches the product with copies of the weight, in a graph of `launches` that is
                replayed `replays` times, and writes the first rows of y.
            best: Microseconds of the best so far.
        """
        y = jax.block_until_ready(_nans((self._most_rows, self._shape[0]), self._dtype))
        once = run(y, self._blobs[:1], launches=1, replays=1)
        worst = float(_worst(y, self._exact, self._rows, self._dtype))
        if not worst <= 1:
            return {"wrong": worst}
        # The start of a graph, some microseconds, is in this time, the way to the memory is not.
        if best is not None and once > 2 * best + GRAPH_START:
            return {"microseconds": once}
        work, replays = _THOROUGH if effort == "thorough" else _COARSE
        launches = max(self._blobs.shape[0], min(96, math.ceil(work / once)))
        if launches * once > 3 * work:  # long ones repeat well
            replays = max(1, replays // 2)
        return {"microseconds": run(y, self._blobs, launches=launches, replays=replays)}

    def _decode(
        self, plan: Mapping[str, int], y: Array, blobs: Array, *, launches: int, replays: int
    ) -> float:
        return _ffi_cuda._extension().decode_time(
            plan=_ffi_cuda._plan(plan).tolist(),
            prefetch=False,
            launches=launches,
            replays=replays,
            **timer_operands(self._operand, blobs, y),
        )

    def _prefill(
        self, plan: Mapping[str, int], y: Array, blobs: Array, *, launches: int, replays: int
    ) -> float:
        return _ffi_cuda._extension().prefill_time(
            plan=_ffi_cuda.prefill_plan(plan).tolist(),
            launches=launches,
            replays=replays,
            **timer_operands(self._operand, blobs, y),
        )

    def _by_library(
        self,
        search: _ffi_cusparselt.AlgorithmSearch,
        y: Array,
        blobs: Array,
        *,
        launches: int,
        replays: int,
    ) -> float:
        return search.time(self._operand, blobs, launches=launches, replays=replays, y=y)

    def _time_rule(self, *, prefetch: bool) -> dict[str, Any]:
        """The decode kernel by its own rule, as users compute it: checked, then in a chain."""
        product = functools.partial(
            _ffi_cuda.decode_in_pieces, out=self._shape[0], prefetch=prefetch
        )
        y = jax.jit(product)(self._operand, self._blob.data)
        unused = self._most_rows - self._rows
        worst = float(
            _worst(jnp.pad(y, ((0, unused), (0, 0))), self._exact, self._rows, self._dtype)
        )
        if not worst <= 1:
            return {"wrong": worst}
        return self._time_blobs(product)

    def _time_blobs(self, product: Callable[[Array, Array], Array]) -> dict[str, Any]:
        copies = chain_rotation(self._blob.nbytes, self._rows, self._shape)
        return {"microseconds": self._time_chain(product, list(self._blobs[:copies]))}

    def _dense_copies(self) -> list[Array]:
        copies = chain_rotation(self._weight.nbytes, self._rows, self._shape)
        self._weights += [self._weight + 0 for _ in range(copies - len(self._weights))]
        return self._weights[:copies]

    def _time_chain(self, product: Callable[[Array, Array], Array], weights: list[Array]) -> float:
        xs = [self._operand] * chain_inputs(self._rows, self._shape, len(weights))
        usual = estimate(self._rows, self._shape)
        return Chain(product, xs, weights, microseconds=usual).microseconds()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nans(shape: tuple[int, int], dtype: np.dtype) -> Array:
    return jnp.full(shape, jnp.nan, dtype)


def _dense(x: Float[Array, "row channel"], weight: Float[Array, "out channel"]) -> Array:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def main() -> None:
    """Answers requests until there are no more."""
    # What libraries print goes to stderr; stdout holds reports alone.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report(**fields: Any) -> None:
        print(json.dumps(fields), file=reports, flush=True)

    try:
        bench = Bench(json.loads(sys.stdin.readline()))
        report(ready=bench.facts())
    except Exception as error:
        name = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        report(error=f"{name}{error}")
        raise
    for line in sys.stdin:
        request = json.loads(line)
        rows, candidate = request.pop("rows"), request.pop("candidate")
        refused = None
        try:
            bench.make_operands(rows)
        except Exception as error:  # of memory that is missing, above all
            refused = error
        report(begin=candidate)
        try:
            if refused is not None:
                raise refused
            found = bench.run(rows, candidate, **request)
        except Exception as error:
            works = bench.works()
            report(end=candidate, **{"refused" if works else "failed": str(error)})
            if not works:
                os._exit(1)
            continue
        report(end=candidate, **found)
    os._exit(0)  # leaves the GPU to the driver, which is faster than to take all down in order


if __name__ == "__main__":
    main()
