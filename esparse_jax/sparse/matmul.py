"""The product with a 2:4 weight, chosen by platform when a computation is lowered."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from esparse_jax import platforms

from . import _ffi, _ffi_cuda, _ffi_cusparselt
from ._ffi_cusparselt import Algorithm
from .blob import Blob24, LibraryBlob24, blob24_readers, blob_bytes, compressed24_of
from .compress import Compressed24, decompress24
from .machine import Machine, this_machine
from .table import Record, TableChoice, TuningTable, Way, resolve_table, table_choice

Backend = Literal["reference", "cpu", "decode", "prefill", "cusparselt"]
BACKENDS = ("reference", "cpu", "decode", "prefill", "cusparselt")
_LOGGER = logging.getLogger(__name__)


def sparse_matmul(
    x: Float[Array, "*batch channel"],
    compressed: Compressed24 | Blob24 | LibraryBlob24,
    *,
    backend: Backend | None = None,
    algorithm: Algorithm | None = None,
    prefetch: bool = False,
) -> Float[Array, "*batch out"]:
    """`x @ weight.T` for a 2:4 weight, from its compressed form.

    Any number of leading axes; sums in float32, rounded once to the dtype of `x`. Works in `jit`,
    `scan`, `shard_map`, `vmap` (over `x` the batch becomes rows; over weights the products run one
    after the other) and `jax.export` (see `exportable`).

    On the CPU platform this is a compiled product, multithreaded and vectorised; everywhere else it
    is plain JAX (`sparse_matmul_reference`). The choice is made when the computation is lowered, so
    one traced function serves several platforms. Where the compiled product would lose it is passed
    over: without AVX-512, more than 128 rows (without AVX2 as well, 16) are multiplied with the
    dense weight, expanded for the call. float64 is always plain JAX. If the extension was not
    built, one line is logged and plain JAX is used. bfloat16 uses AMX where there is AMX, except
    for an `x` that holds Inf or NaN: that one takes several times as long with many rows.

    On NVIDIA GPUs a weight in its device form is multiplied in the way that was measured to be the
    fastest for this GPU, shape and number of rows (`esparse tune`; see `use_table`). Where nothing
    was measured, up to 16 rows are multiplied by our decode kernel; more in the way that was best
    for the nearest product that was measured, or else by our prefill kernel on GPUs of compute
    capability 9.0 and by cuSPARSELt's own choice on others, where that library is installed and
    reads the form (`library_blob_agrees`). Where it is not, and for a weight left as
    `Compressed24`, plain JAX unpacks the weight at every call; one line is logged. A weight
    that the library compressed (`LibraryBlob24`) is multiplied by it alone, with any number of
    rows. Where `x` holds Inf, cuSPARSELt 0.8.0 gives NaN for an output that is -Inf; our kernels
    and plain JAX give -Inf.

    Differentiable in `x` and in the kept values (not in a blob, which is bytes), through the dense
    weight: its transpose is not 2:4 along the axis that is summed there, so the backward pass is a
    dense product.

    Args:
        x: Activations in the order of channels the weight was compressed in, in its dtype.
        compressed: From `compress24`, or its device form from `device_blob24` or `blob24`.
        backend: None chooses as above. "reference", "cpu", "decode", "prefill" or "cusparselt"
            takes that one, whatever was measured, or raises; a computation with "cpu", "decode"
            (NVIDIA GPUs, a blob, 1 to 16 rows), "prefill" (compute capability 9.0, a blob) or
            "cusparselt" (NVIDIA GPUs, a device form) cannot be lowered for another platform.
        algorithm: Which of cuSPARSELt's algorithms is to be used, where it multiplies. None is the
            one that was measured to be the best, and with backend="cusparselt" the library's own
            choice.
        prefetch: For a blob that was complete before the computation began: an argument of the
            `jit`, neither computed, sliced nor copied inside it. The decode kernel, and from 17
            rows on the prefill kernel, may then read it before the kernel before has ended (see
            `fused_matmul`).

    Returns:
        `[..., out]` in the dtype of `x`.

    Raises:
        ValueError: `x` has another number of channels than the weight, or an unknown backend, or
            an algorithm for a backend that has none, or a table in use (`use_table`) that is for
            another GPU.
        TypeError: The weight is not compressed, `x` has another dtype than it, or the backend reads
            another form of it.
        NotImplementedError: The backend is for another platform than the one that the computation
            is compiled for.
        RuntimeError: backend="cpu" without the extension, "decode" without its CUDA part,
            "prefill" without that for Hopper, "cusparselt" without the library, or where it does
            not read the weight or refuses the product.

    Source: E-Sparse, section 4 (the product of x with the pruned weight by sparse units).
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}; got {backend!r}.")
    if algorithm is not None and backend not in (None, "cusparselt"):
        raise ValueError(
            f'an algorithm is cuSPARSELt\'s, backend="cusparselt" or None; got backend={backend!r}.'
        )
    if not isinstance(compressed, Compressed24 | Blob24 | LibraryBlob24):
        raise TypeError(
            f"sparse_matmul multiplies a compressed weight; got {type(compressed).__name__}. "
            f"Compress a dense 2:4 weight first, compress24(weight)."
        )
    if isinstance(compressed, Blob24 | LibraryBlob24):
        _require_matching_blob(x, compressed, backend)
        batch = x.shape[:-1]
        y = _blob_matmul(
            x.reshape(math.prod(batch), x.shape[-1]),
            compressed.data,
            _Choice(
                compressed.shape,
                compressed.dtype,
                getattr(compressed, "made_by", None),
                backend,
                algorithm,
                prefetch,
                table_choice() if backend is None else None,
            ),
        )
        return y.reshape(*batch, compressed.shape[0])
    if backend in ("decode", "prefill", "cusparselt"):
        raise TypeError(
            f"backend={backend!r} multiplies the device form of a weight; got a Compressed24. "
            f"Convert it once, when the model is loaded, with esparse_jax.sparse.device_blob24."
        )
    if backend is None and jax.default_backend() == "gpu":
        _log_once("a weight that is not in its device form (blob24) is unpacked at every call")
    values, indices = compressed.values, compressed.indices
    _require_matching(x, values, indices)
    batch = x.shape[:-1]
    y = _matmul(x.reshape(math.prod(batch), x.shape[-1]), values, indices, backend)
    return y.reshape(*batch, values.shape[0])


def sparse_matmul_reference(
    x: Float[Array, "*batch channel"], compressed: Compressed24 | Blob24
) -> Float[Array, "*batch out"]:
    """What `sparse_matmul` computes, in plain JAX: the dense weight, then a dot in float32."""
    return sparse_matmul(x, compressed, backend="reference")


def _require_matching(x: Array, values: Array, indices: Array) -> None:
    out, kept = values.shape
    channels = 2 * kept
    if x.ndim < 1 or x.shape[-1] != channels:
        raise ValueError(
            f"x must end in the weight's {channels} input channels; got shape {tuple(x.shape)} for "
            f"a compressed weight of dense shape {(out, channels)}."
        )
    if indices.shape != (out, -(-channels // 8)) or indices.dtype != jnp.uint8:
        raise ValueError(
            f"values of shape {(out, kept)} need indices uint8{[out, -(-channels // 8)]}; got "
            f"{indices.dtype}{list(indices.shape)}. Build both with compress24."
        )
    if x.dtype != values.dtype:
        raise TypeError(
            f"x is {x.dtype} and the compressed weight {values.dtype}; sparse_matmul does not "
            f"convert. Cast x, x.astype({values.dtype}), or compress the weight in {x.dtype}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
@functools.partial(jax.jit, static_argnums=3)
def _matmul(
    x: Float[Array, "row channel"],
    values: Float[Array, "out kept"],
    indices: UInt8[Array, "out byte"],
    backend: Backend | None,
) -> Float[Array, "row out"]:
    return _batchable(backend)(x, values, indices)


def _matmul_forward(x, values, indices, backend):
    return _matmul(x, values, indices, backend), (x, values, indices)


def _matmul_backward(backend, residuals, gradient):
    x, values, indices = residuals
    # The reference's own derivative, so that inside shard_map a gradient is summed over the axes
    # that its primal does not vary over.
    _, pullback = jax.vjp(lambda x, values: _reference(x, values, indices), x, values)
    return *pullback(gradient), np.zeros(indices.shape, jax.dtypes.float0)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.cache
def _batchable(backend: Backend | None):
    """The product of one backend, with vmap taken care of so that no custom call ever meets it."""

    @jax.custom_batching.custom_vmap
    def product(x, values, indices):
        if backend == "reference":
            return _reference(x, values, indices)
        if backend == "cpu":
            return _only_on("cpu", _ffi.cpu_product, x, values, indices, backend=backend)
        if values.dtype.name in _ffi.CPU_DTYPES and _ffi.cpu_product_available():
            return jax.lax.platform_dependent(x, values, indices, cpu=_cpu, default=_reference)
        return _reference(x, values, indices)

    @product.def_vmap
    def _batched(axis_size, batched, x, values, indices):
        x_batched, values_batched, indices_batched = batched
        if not values_batched and not indices_batched:
            rows = x.reshape(-1, x.shape[-1])
            return product(rows, values, indices).reshape(axis_size, -1, values.shape[0]), True

        def one(i):
            return product(
                x[i] if x_batched else x,
                values[i] if values_batched else values,
                indices[i] if indices_batched else indices,
            )

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return product


def _only_on(
    platform: str, call: Callable[..., Array], *operands: Array, backend: Backend | None
) -> Array:
    """The product by a backend that one platform has."""
    if backend is None:  # a LibraryBlob24
        what, instead = "A LibraryBlob24", "Keep the weight as Compressed24, which all have."
    else:
        what = f"backend={backend!r}"
        instead = "Leave backend out to have the fastest that each platform has."
    return platforms.only_on(platform, call, *operands, what=what, instead=instead)


class _Choice(NamedTuple):
    """What is static about the product with a device form."""

    shape: tuple[int, int]
    dtype: np.dtype
    made_by: tuple[int, int] | None  # of a LibraryBlob24, which this tells from a Blob24
    backend: Backend | None
    algorithm: Algorithm | None
    prefetch: bool
    table: TableChoice  # None where the backend is given


def _require_matching_blob(x: Array, blob: Blob24 | LibraryBlob24, backend: Backend | None) -> None:
    if isinstance(blob, LibraryBlob24) and backend not in (None, "cusparselt"):
        raise TypeError(
            f"a LibraryBlob24 is read by cuSPARSELt alone; got backend={backend!r}. Use "
            f'backend="cusparselt" or None, or keep the weight as Compressed24.'
        )
    if x.ndim < 1 or x.shape[-1] != blob.shape[1]:
        raise ValueError(
            f"x must end in the weight's {blob.shape[1]} input channels; got shape "
            f"{tuple(x.shape)} for a blob of dense shape {blob.shape}."
        )
    if isinstance(blob, Blob24) and (
        blob.data.shape != (blob_bytes(blob.shape),) or blob.data.dtype != jnp.uint8
    ):
        raise ValueError(
            f"a weight of shape {blob.shape} is a blob of uint8[{blob_bytes(blob.shape)}]; got "
            f"{blob.data.dtype}{list(blob.data.shape)}. Build it with blob24."
        )
    if x.dtype != blob.dtype:
        raise TypeError(
            f"x is {x.dtype} and the weight {blob.dtype}; sparse_matmul does not convert. Cast x, "
            f"x.astype({blob.dtype}), or compress the weight in {x.dtype}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
def _blob_matmul(
    x: Float[Array, "row channel"], data: UInt8[Array, " blob_byte"], choice: _Choice
) -> Float[Array, "row out"]:
    return _batchable_blob(choice)(x, data)


def _blob_matmul_forward(x, data, choice):
    return _blob_matmul(x, data, choice), data


def _blob_matmul_backward(choice, data, gradient):
    if choice.made_by is None:
        dense = decompress24(compressed24_of(Blob24(data, choice.shape, choice.dtype)))
        back = _dot(gradient, dense, contract=(1, 0))
    else:  # only the library can tell what the weight is: its product with the identity
        identity = jnp.eye(choice.shape[1], dtype=choice.dtype)
        product = _batchable_blob(choice._replace(algorithm=None))
        back = _dot(gradient, product(identity, data), contract=(1, 1))
    return back, np.zeros(data.shape, jax.dtypes.float0)


_blob_matmul.defvjp(_blob_matmul_forward, _blob_matmul_backward)


@functools.cache
def _batchable_blob(choice: _Choice):
    """The product from a device form, with vmap taken care of as in `_batchable`."""
    shape, dtype, made_by, backend, algorithm, prefetch, _ = choice

    def unpacked(x, data):
        compressed = compressed24_of(Blob24(data, shape, dtype))
        other = _batchable(None if backend in ("decode", "prefill") else backend)
        return other(x, compressed.values, compressed.indices)

    def on(platform, call, x, data, default):
        if default is None:
            return _only_on(platform, call, x, data, backend=backend)
        return jax.lax.platform_dependent(x, data, **{platform: call}, default=default)

    def decode(x, data, way=None, default=None):
        """By the decode kernel on CUDA; where it is lowered for another, by the default, or refused
        if there is none.
        """

        def call(x, data):
            if way is None:  # backend="decode", which refuses more than 16 rows
                return _ffi_cuda.decode(x, data, out=shape[0], prefetch=prefetch)[0]
            return _ffi_cuda.decode_in_pieces(
                x, data, out=shape[0], prefetch=way.prefetch, plan=way.plan
            )

        return on("cuda", call, x, data, default)

    def prefilled(x, data, plan=None, default=None):
        """By the prefill kernel, in the same way."""
        # Of few rows it is slower so where no channels are split: 38 us in place of 33 (H200,
        # 14336x7168, 16 rows), presumably since its blocks crowd on the multiprocessors that have
        # room first. Where they are split it is faster so, but behind the decode kernel.
        early = prefetch and x.shape[0] > _ffi_cuda.MAX_ROWS
        call = functools.partial(_ffi_cuda.prefill, out=shape[0], prefetch=early, plan=plan)
        return on("cuda", call, x, data, default)

    def library(x, data, readers, best, default=None):
        """By cuSPARSELt on its platform, in the same way.

        By the algorithm that was asked for, by the one that was measured to be the best, or by its
        own choice.
        """
        rows = x.shape[0]
        taken = algorithm or _fitting(choice, best, rows, readers)
        if algorithm is None and best is None and choice.table is not None:
            _say_untuned(choice.dtype.name, rows)

        def call(x, data):
            return _ffi_cusparselt.matmul(x, data, out=shape[0], readers=readers, algorithm=taken)

        opened = _ffi_cusparselt.opened_library()
        platform = "cuda" if opened is None else opened.platform
        return on(platform, call, x, data, default)

    def fastest(x, data):
        """In the first of the ways that this machine has."""
        for way in _ways(choice, x.shape[0]):
            if way.kind == "decode":
                return decode(x, data, way, default=unpacked)
            if way.kind == "prefill":
                return prefilled(x, data, way.plan, default=unpacked)
            readers = blob24_readers() if _ffi_cusparselt.opened_library() else ()
            if readers:
                return library(x, data, readers, way.algorithm, default=unpacked)
        _log_unpacked(x.shape[0])
        return unpacked(x, data)

    @jax.custom_batching.custom_vmap
    def product(x, data):
        rows = x.shape[0]
        if made_by is not None:
            readers = (_ffi_cusparselt.reader(*made_by),)
            record = _measured(choice, rows)
            ways = [] if record is None else record.ways()
            ways += _nearest(choice, rows)
            best = next((way.algorithm for way in ways if way.kind == "cusparselt"), None)
            return library(x, data, readers, best)
        if backend == "decode":
            return decode(x, data)
        if backend == "prefill" and rows > 0:
            return prefilled(x, data)
        if backend == "cusparselt":
            return library(x, data, _require_readers(), None)
        if backend is None and rows > 0:
            return fastest(x, data)
        return unpacked(x, data)

    @product.def_vmap
    def _batched(axis_size, batched, x, data):
        x_batched, data_batched = batched
        if not data_batched:
            rows = x.reshape(-1, x.shape[-1])
            return product(rows, data).reshape(axis_size, -1, shape[0]), True

        def one(i):
            return product(x[i] if x_batched else x, data[i])

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return product


def _measured(choice: _Choice, rows: int) -> Record | None:
    """What the tuning table says of a product."""
    if choice.table is None or rows == 0:
        return None
    table = resolve_table(choice.table)
    return None if table is None else table.find(choice.shape, choice.dtype, rows)


def _nearest(choice: _Choice, rows: int) -> list[Way]:
    """How the product nearest to this one is multiplied, where this one was not measured."""
    if choice.table is None or rows == 0:
        return []
    table = resolve_table(choice.table)
    return [] if table is None else table.nearest_ways(choice.shape, choice.dtype, rows)


def _has_failed(choice: _Choice, kernel: str) -> bool:
    """Whether a kernel failed for any product on this GPU."""
    table = None if choice.table is None else resolve_table(choice.table)
    return table is not None and table.has_failed(kernel, choice.dtype)


def _prefill_runs(choice: _Choice, rows: int) -> bool:
    """Whether the prefill kernel is for the GPU that this is lowered for, and for this product."""
    if rows > _ffi_cuda.PREFILL_MAX_ROWS or math.prod(choice.shape) > _ffi_cuda.MAX_WEIGHTS:
        return False
    machine = this_machine()
    if machine is None and isinstance(choice.table, TuningTable):
        machine = choice.table.machine
    return _ffi_cuda.prefill_runs(machine and machine.capability)


def _ways(choice: _Choice, rows: int) -> list[Way]:
    """How a `Blob24` may be multiplied: what was measured, the fastest first; then by the decode
    kernel if there are few rows, as the nearest product, by the prefill kernel, and by the
    library's own choice.

    A decode kernel that crashed, hung or computed wrong numbers is not among them; one that did so
    when it fetched its weight early does not. A prefill kernel that did so for any product is there
    only where it was measured since. For more than 16 rows the decode kernel, which is then called
    for every 16 of them, is there only where that was measured, as it was; and an algorithm that is
    asked for decides for the library.
    """
    record, few = _measured(choice, rows), rows <= _ffi_cuda.MAX_ROWS
    failed = {} if record is None else record.failed
    early = choice.prefetch and few and "prefetch" not in failed
    ways = [] if record is None else record.ways(prefetch=early)
    if few:
        ways.append(Way("decode", math.inf, prefetch=early))
    ways += _nearest(choice, rows)
    if not _has_failed(choice, "prefill"):
        ways.append(Way("prefill", math.inf))
    ways.append(Way("cusparselt", math.inf))
    asked = choice.algorithm is not None
    pieces = record is not None and rows <= record.rows and not asked
    runs = {
        "decode": _ffi_cuda.decode_available() and (few or pieces) and "decode" not in failed,
        "prefill": _prefill_runs(choice, rows) and not asked and "prefill" not in failed,
        "cusparselt": True,
    }
    return [way for way in ways if runs[way.kind]]


def _fitting(
    choice: _Choice, algorithm: Algorithm | None, rows: int, readers: tuple[int, ...]
) -> Algorithm | None:
    """A measured algorithm as these rows need it; None, the library's own choice, where it is not
    for this library, or the library refuses it for them.
    """
    if algorithm is None:
        return None
    machine = this_machine()
    if machine is None:  # it is lowered for elsewhere, by a table that was given
        reader = choice.table.machine.reader if isinstance(choice.table, TuningTable) else None
        workspace = max(algorithm.workspace_bytes or 0, _ffi_cusparselt.WORKSPACE_UNKNOWN)
        given = dataclasses.replace(algorithm, workspace_bytes=workspace)
        return given if reader in readers else None
    if machine.reader not in readers:
        return None
    return _with_workspace(
        machine,
        choice.shape,
        choice.dtype.name,
        rows,
        dataclasses.replace(algorithm, workspace_bytes=None),
    )


@functools.cache
def _with_workspace(
    machine: Machine, shape: tuple[int, int], dtype: str, rows: int, algorithm: Algorithm
) -> Algorithm | None:
    del machine  # part of the key
    try:
        facts = _ffi_cusparselt.describe_plan(
            rows=rows, out=shape[0], channels=shape[1], dtype=np.dtype(dtype), algorithm=algorithm
        )
    except RuntimeError as error:
        _LOGGER.warning(
            "%s was the best in the tuning table for %dx%d, or for the product nearest to it, but "
            "cuSPARSELt refuses it for %d rows and chooses itself: %s",
            algorithm,
            *shape,
            rows,
            error,
        )
        return None
    return dataclasses.replace(algorithm, workspace_bytes=facts.workspace_bytes)


def decode_fits(rows: int) -> bool:
    """Whether the decode kernel takes this number of rows; on a GPU a no is logged."""
    if _decode_takes(rows):
        return True
    if jax.default_backend() == "gpu" and rows > 0:
        if rows > _ffi_cuda.MAX_ROWS:
            _log_once(
                f"the decode kernel takes up to {_ffi_cuda.MAX_ROWS} rows; for more, the weight is "
                f"unpacked at every call"
            )
        else:
            _log_once(
                "the extension was built without its CUDA part (BUILD.md), so the weight is "
                "unpacked at every call"
            )
    return False


def _decode_takes(rows: int) -> bool:
    return 1 <= rows <= _ffi_cuda.MAX_ROWS and _ffi_cuda.decode_available()


def _require_readers() -> tuple[int, ...]:
    """Which cuSPARSELt may read a `Blob24` in this computation, or an error."""
    readers = blob24_readers()
    if readers or _ffi_cusparselt.opened_library() is None:  # then its own error is the better one
        return readers
    raise RuntimeError(
        "cuSPARSELt on this GPU does not read a Blob24: its layout is another, or it could not be "
        "asked (one line was logged, which says which). Make the weight with "
        "esparse_jax.sparse.device_blob24."
    )


def _log_unpacked(rows: int) -> None:
    """On a GPU, says why a blob is unpacked for this number of rows."""
    if jax.default_backend() != "gpu":
        return
    reason = _ffi_cusparselt.available() or "it does not read the weight on this GPU"
    few = (
        f"the decode kernel takes up to {_ffi_cuda.MAX_ROWS} rows"
        if rows > _ffi_cuda.MAX_ROWS
        else "the extension was built without its CUDA part (BUILD.md)"
    )
    _log_once(
        f"{few}, and cuSPARSELt, which takes any number, is not used ({reason}), so the weight is "
        f"unpacked at every call"
    )


def _say_untuned(dtype: str, rows: int) -> None:
    """On a GPU, says that the library chooses for itself where that is its work."""
    if rows > _ffi_cuda.MAX_ROWS and this_machine() is not None:
        _log_untuned(dtype)


@functools.cache
def _log_untuned(dtype: str) -> None:
    _LOGGER.warning(
        "no %s product near to one of this many rows was measured on this GPU with this "
        "cuSPARSELt, whose own choice of algorithm may be slower than a dense product: run "
        "`esparse tune --dtype %s`, or load the model in a dtype that was measured.",
        dtype,
        dtype,
    )


@functools.cache
def _log_once(reason: str) -> None:
    _LOGGER.warning("sparse_matmul on the GPU is right but no faster than dense here: %s.", reason)


# Rows up to which the compiled product beat XLA's dense one, by the best level of the processor.
# With AVX-512 it did for any number of rows up to 2048: float32 from 256 rows on by 0 to 6 % only,
# bfloat16, with AMX on both sides, by 1.5x to 2x (4096 x 4096, one core). Measured on Sapphire
# Rapids with the product held back to the level and XLA not (it chooses its own kernels), so a
# processor of that level is better off than this.
_ROWS_WITHOUT_AVX512 = {"avx2": 128, "portable": 16}


def _cpu(
    x: Float[Array, "row channel"],
    values: Float[Array, "out kept"],
    indices: UInt8[Array, "out byte"],
) -> Float[Array, "row out"]:
    """The fastest way on this processor: the compiled product, or dense after expanding."""
    rows = _ROWS_WITHOUT_AVX512.get(_ffi.cpu_levels()[0])
    if rows is None or x.shape[0] <= rows:
        return _ffi.cpu_product(x, values, indices)
    return _dot(x, _ffi.cpu_expand(values, indices), contract=(1, 1))


def _reference(
    x: Float[Array, "row channel"],
    values: Float[Array, "out kept"],
    indices: UInt8[Array, "out byte"],
) -> Float[Array, "row out"]:
    return _dot(x, decompress24(_wrap(values, indices)), contract=(1, 1))


def _wrap(values: Array, indices: Array) -> Compressed24:
    return Compressed24(values, indices, (values.shape[0], 2 * values.shape[1]))


def _dot(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    """A matrix product summed in float32 (or wider) and rounded once, to the dtype of `a`."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide).astype(a.dtype)
