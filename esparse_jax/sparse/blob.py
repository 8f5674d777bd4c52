"""The device form of a 2:4 weight on NVIDIA GPUs: one array of bytes, read by every kernel there.

It is the format cuSPARSELt itself uses on Hopper (sm_90) for 16-bit weights whose sizes are
multiples of 64, so one resident copy serves our decode kernel and that library. It is made from the
portable form at load time by moving bytes on the device, and never stored on disk: the library does
not document it.

So it is not taken on trust either. `library_blob_agrees` compares it with what the library itself
makes of a probe, on the GPU and the version at hand, before the library is given any. Where the two
differ, and for sizes that only the library takes, `device_blob24` lets the library compress: those
bytes are a `LibraryBlob24`, a class of its own that nothing but that library accepts.
"""

import concurrent.futures
import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from . import _ffi_cusparselt
from .compress import Compressed24, compress24, decompress24

_LOGGER = logging.getLogger(__name__)

UNIT = 64  # divides out and channels; other sizes are padded by cuSPARSELt, in a way not known here
BLOB_DTYPES = ("float16", "bfloat16")
# Where the layout was read out (see `Blob24`): version and architecture of cuSPARSELt. A
# computation that is lowered where no GPU can be asked may run on these.
_KNOWN_READERS = ((800, 90),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blob24:
    """A 2:4 weight `(out, channel)` of 16-bit values as one array of bytes.

    The layout, 9/16 of the dense bytes::

        byte 0                kept values, row-major [out, channel / 2], 2 bytes each
        byte out * channel    one nibble for each group of four channels: first | second << 2, the
                              positions of its two kept values; low nibble of a byte first

    The nibble of row `r` and group `g` (channels `4 g` to `4 g + 3`) is number ::

        ((r / 64) * (channel / 64) + g / 16) * 1024     tile of 64 rows and 64 channels
            + 512 * (g / 8 % 2)                         half of it: 32 channels
            + 128 * (r / 16 % 4)                        16 rows of it: 64 bytes
            +  16 * (r % 8)                             8 bytes of rows r and r + 8
            +   4 * (g % 4) + 2 * (g / 4 % 2)
            +   1 * (r / 8 % 2)                         the two rows side by side in a byte

    Inside `shard_map` a blob is the weight of one shard, compressed after sharding: the bytes of a
    whole weight cannot be cut.

    Attributes:
        data: `uint8[out * channel * 9 / 8]`.
        shape: `(out, channel)` of the dense weight, static.
        dtype: float16 or bfloat16, static.

    Source: the metadata order was read out of cuSPARSELt 0.8.0 on an H200, one bit of the group's
        number at a time, for 13 shapes per dtype from 64x64 to 8192x28672.
    """

    # Any, not array types: the leaf of a pytree may be a shape, a sharding or a tracer as well.
    data: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes on the device: 9/16 of the dense weight."""
        return blob_bytes(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LibraryBlob24:
    """A 2:4 weight `(out, channel)` of 16-bit values as cuSPARSELt itself compressed it.

    The layout is the library's own, for one version on one architecture; on any other it is refused
    when the computation starts. Nothing else reads it: not the decode kernel, not plain JAX.

    Attributes:
        data: `uint8[bytes]`.
        shape: `(out, channel)` of the dense weight, static.
        dtype: float16 or bfloat16, static.
        made_by: The version (800 for 0.8.0) and the architecture (90 for sm_90), static.
    """

    data: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    made_by: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.data.nbytes


def blob_bytes(shape: tuple[int, int]) -> int:
    """Bytes of the blob of a dense weight `(out, channel)`."""
    out, channels = shape
    return out * channels // 8 * 9


def why_no_blob(shape: tuple[int, int], dtype: Any) -> str | None:
    """Why a weight has no blob, as half a sentence, or None where it has one."""
    name = jnp.dtype(dtype).name
    if name not in BLOB_DTYPES:
        return f"it is {name}, and only {' and '.join(BLOB_DTYPES)} weights have one"
    if min(shape) < UNIT or any(size % UNIT for size in shape):
        return f"its shape {tuple(shape)} is not made of multiples of {UNIT}"
    return None


def blob24(compressed: Compressed24) -> Blob24:
    """The device form of a compressed weight. Moves bytes; works on any device and inside `jit`.

    Raises:
        ValueError: `out` or `channel` is no multiple of 64.
        TypeError: The weight is neither float16 nor bfloat16, or it is not compressed.
    """
    _require_compressed(compressed)
    out, kept = compressed.values.shape
    shape = (out, 2 * kept)
    reason = why_no_blob(shape, compressed.dtype)
    if reason is not None:
        error = ValueError if compressed.dtype.name in BLOB_DTYPES else TypeError
        raise error(
            f"the weight has no device blob: {reason}. Leave such a layer dense, pad it with "
            f"zeros, or keep it as Compressed24, which every shape and dtype can use."
        )
    return Blob24(_pack(compressed.values, compressed.indices), shape, np.dtype(compressed.dtype))


def _require_compressed(weight: object) -> None:
    if not isinstance(weight, Compressed24):
        raise TypeError(
            f"the device form is made of a Compressed24; got {type(weight).__name__}. Compress a "
            f"dense 2:4 weight first, compress24(weight)."
        )


@jax.jit
def _pack(values: Array, indices: UInt8[Array, "out byte"]) -> UInt8[Array, " blob_byte"]:
    out, kept = values.shape
    channels = 2 * kept
    value_bytes = jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(-1)
    nibbles = jnp.stack([indices & 15, indices >> 4], axis=-1)
    # rows: tile of 64, sixteen of it, half of that, row; groups: tile of 16, half, quarter, group
    nibbles = nibbles.reshape(out // 64, 4, 2, 8, channels // 64, 2, 2, 4)
    nibbles = nibbles.transpose(0, 4, 5, 1, 3, 7, 6, 2).reshape(-1, 2)
    return jnp.concatenate([value_bytes, nibbles[:, 0] | nibbles[:, 1] << 4])


def compressed24_of(blob: Blob24) -> Compressed24:
    """The portable form of a blob: the exact inverse of `blob24`."""
    return Compressed24(*_unpack(blob.data, blob.shape, blob.dtype), blob.shape)


def _unpack(data: UInt8[Array, " blob_byte"], shape: tuple[int, int], dtype: Any):
    out, channels = shape
    values = data[: out * channels].reshape(out, channels // 2, 2)
    values = jax.lax.bitcast_convert_type(values, dtype)
    nibbles = data[out * channels :]
    nibbles = jnp.stack([nibbles & 15, nibbles >> 4], axis=-1)
    nibbles = nibbles.reshape(out // 64, channels // 64, 2, 4, 8, 4, 2, 2)
    nibbles = nibbles.transpose(0, 3, 7, 4, 1, 2, 6, 5).reshape(out, -1, 2)
    return values, nibbles[..., 0] | nibbles[..., 1] << 4


_unpack = jax.jit(_unpack, static_argnums=(1, 2))


def device_blob24(compressed: Compressed24) -> Blob24 | LibraryBlob24:
    """The device form that the kernels on this machine's GPU can read; for loading a model.

    A `Blob24` for sizes that are multiples of 64, unless cuSPARSELt is there and has another layout
    on this GPU (`library_blob_agrees`). Then, and for other multiples of 16, the library compresses
    the weight, from its dense form, which takes the memory of one for the moment.

    Raises:
        ValueError: `out` or `channel` is no multiple of 16, or it is none of 64 and the library is
            not there.
        TypeError: The weight is neither float16 nor bfloat16, or it is not compressed.
        RuntimeError: The library refuses the weight.
    """
    _require_compressed(compressed)
    out, kept = compressed.values.shape
    shape, dtype = (out, 2 * kept), np.dtype(compressed.dtype)
    reason = why_no_blob(shape, dtype)
    opened, gpu = _ffi_cusparselt.opened_library(), _ffi_cusparselt.device()
    here = opened is not None and gpu is not None
    if reason is None and not (here and _library_layout_is_blob24() is False):
        return blob24(compressed)
    if dtype.name not in BLOB_DTYPES:
        return blob24(compressed)  # which says what is wrong
    refused = _ffi_cusparselt.why_not(shape, dtype)
    if refused is not None:
        raise ValueError(
            f"the weight has no device form: {refused}, which cuSPARSELt asks for. Leave such a "
            f"layer dense, pad it with zeros, or keep it as Compressed24, which takes every shape."
        )
    if not here:
        missing = _ffi_cusparselt.available() or "JAX sees no NVIDIA GPU"
        raise ValueError(
            f"the weight has no device form: {reason}. cuSPARSELt would take it, but {missing}"
            f"{'' if missing.endswith('.') else '.'} Leave such a layer dense, pad it with zeros, "
            f"or keep it as Compressed24."
        )
    data = jax.lax.platform_dependent(
        decompress24(compressed), **{opened.platform: _ffi_cusparselt.compress}
    )
    return LibraryBlob24(data, shape, dtype, (opened.version, _ffi_cusparselt.architecture(gpu)))


def library_blob_agrees() -> bool:
    """Whether cuSPARSELt on this machine's GPU reads and writes the layout of `Blob24`.

    Asked once per version and architecture: the library compresses a probe weight of each dtype,
    and the bytes are compared. False as well where there is no library or no GPU.
    """
    return _library_layout_is_blob24() is True


def blob24_readers() -> tuple[int, ...]:
    """Which cuSPARSELt a computation that is traced here may hand a `Blob24`.

    The one on this machine's GPU, if it agrees; on a machine without a GPU, those where the layout
    is known. Numbers as in `_ffi_cusparselt.reader`.
    """
    gpu = _ffi_cusparselt.device()
    if gpu is None:
        return tuple(_ffi_cusparselt.reader(*known) for known in _KNOWN_READERS)
    opened = _ffi_cusparselt.opened_library()
    if opened is None or not library_blob_agrees():
        return ()
    return (_ffi_cusparselt.reader(opened.version, _ffi_cusparselt.architecture(gpu)),)


def _library_layout_is_blob24() -> bool | None:
    """None where it cannot be found out."""
    opened, gpu = _ffi_cusparselt.opened_library(), _ffi_cusparselt.device()
    if opened is None or gpu is None:
        return None
    return _compare_layouts(opened, gpu, _ffi_cusparselt.architecture(gpu))


@functools.cache
def _compare_layouts(
    opened: _ffi_cusparselt.OpenedLibrary, gpu: jax.Device, architecture: int
) -> bool | None:
    where = f"cuSPARSELt {opened.version_name} on sm_{architecture}"

    def agrees(dtype: str) -> bool:
        weight = jax.device_put(_probe(dtype), gpu)
        ours = blob24(compress24(weight)).data
        theirs = jax.jit(_ffi_cusparselt.compress)(weight)
        return np.array_equal(np.asarray(ours), np.asarray(theirs))

    # In a thread of its own, so that it computes here and now, even where the caller is traced.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            same = all(thread.map(agrees, BLOB_DTYPES))
        except RuntimeError as error:
            _LOGGER.warning("%s could not compress a probe and is not used: %s", where, error)
            return None
    if not same:
        _LOGGER.warning(
            "%s lays 2:4 weights out in a way of its own: device_blob24 lets it compress them, and "
            "the decode kernel is not used with those.",
            where,
        )
    return same


def _probe(dtype: str) -> np.ndarray:
    """A weight of several tiles each way in which every group keeps two values."""
    random = np.random.default_rng(24)
    out, channels = 3 * UNIT, 2 * UNIT
    kept = random.permuted(np.tile([True, True, False, False], (out, channels // 4, 1)), axis=2)
    values = random.uniform(1, 2, (out, channels)).astype(jnp.dtype(dtype))
    return np.where(kept.reshape(out, channels), values, np.zeros((), values.dtype))


def interleave_gate_up(gate: Compressed24, up: Compressed24) -> Compressed24:
    """Gate and up projections as one weight for the fused SwiGLU: 8 rows of gate, 8 of up, ...

    A tile of the decode kernel is 16 outputs, so each holds 8 gates and the 8 values they scale.

    Raises:
        ValueError: The two differ in shape, or their outputs are no multiple of 8.
    """
    if gate.values.shape != up.values.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype; got {gate.values.shape} {gate.dtype} and "
            f"{up.values.shape} {up.dtype} (kept values). Prune both to the same pattern."
        )
    out, channels = gate.values.shape[0], 2 * gate.values.shape[1]
    if out % 8:
        raise ValueError(f"gate and up are interleaved by 8 rows; got {out} outputs, no multiple.")

    def merge(a: Array, b: Array) -> Array:
        pairs = jnp.stack([a.reshape(out // 8, 8, -1), b.reshape(out // 8, 8, -1)], axis=1)
        return pairs.reshape(2 * out, -1)

    return Compressed24(
        merge(gate.values, up.values), merge(gate.indices, up.indices), (2 * out, channels)
    )
