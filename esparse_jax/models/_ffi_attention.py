"""The extension's attention of a decode step, for NVIDIA GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from esparse_jax import native
from esparse_jax.models.attention import log_once
from esparse_jax.sparse import records_calls

_DTYPES = ("bfloat16", "float16")
_FEATURES = (64, 128)
_SHARED = (1, 2, 4, 8)  # query heads to a key
_LEAST_CAPABILITY = 9.0  # clusters of blocks


def attend_takes(dtype: DTypeLike, heads: int, kv_heads: int, features: int) -> bool:
    """Whether the kernel is there for such heads, and runs on this machine's GPUs.

    Where it would run but is not there for them, one line is logged.
    """
    if not _runs():
        return False
    shared, rest = divmod(heads, kv_heads)
    fits = jnp.dtype(dtype).name in _DTYPES and features in _FEATURES
    if fits and rest == 0 and shared in _SHARED:
        return True
    log_once(
        f"the attention of a decode step is several kernels in place of one: that is there for "
        f"16-bit numbers, {' or '.join(map(str, _FEATURES))} features and "
        f"{', '.join(map(str, _SHARED))} query heads to a key; here are {jnp.dtype(dtype).name}, "
        f"{features} features, and {heads} query heads to {kv_heads} keys."
    )
    return False


@functools.cache
def _runs() -> bool:
    if jax.default_backend() != "gpu" or not native.has_cuda():
        return False
    # "80-real 90": code, or PTX, of each.
    built = [int(name) for name in re.findall(r"\d+", native.extension().CUDA_ARCHITECTURES)]
    return max(built, default=0) >= 10 * _LEAST_CAPABILITY and all(
        _capability(device) >= _LEAST_CAPABILITY for device in jax.local_devices()
    )


def _capability(device: jax.Device) -> float:
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return 0.0 if found is None else float(found[0])


def attend(
    projected: Float[Array, "batch projected_feature"],
    keys: Float[Array, "batch_head slot feature"],
    values: Float[Array, "batch_head slot feature"],
    cosines: Float[Array, "#batch pair"],
    sines: Float[Array, "#batch pair"],
    length: Int32[Array, ""],
    start: Int32[Array, " batch"] | None,
    places: Int32[Array, " attended_feature"] | None,
    *,
    heads: int,
    prefetch: bool,
) -> tuple[Array, Array, Array]:
    """What one token a row attends to, and the cache with its key and value; see ffi/cuda.

    Args:
        projected: Queries, keys and values side by side, not rotated.
        keys, values: Of the cache; written in place, or into a copy where they are not donated.
        cosines, sines: Of the tokens' positions.
        length: How many slots are filled.
        start: The first slot of each row.
        places: Where each feature of the result goes, each of them once; None: to its own place.
        heads: Of the queries.
        prefetch: The filled slots were complete before the kernel before began, and XLA copies
            neither array: they may be read before that kernel has ended.
    """
    extension = native.extension()
    target = extension.CUDA_RECORDED_ATTEND_TARGET if records_calls() else None
    batch, features = projected.shape[0], keys.shape[2]
    results = [
        jax.ShapeDtypeStruct((batch, heads * features), projected.dtype),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        jax.ShapeDtypeStruct(values.shape, values.dtype),
    ]
    more = tuple(each for each in (start, places) if each is not None)
    call = jax.ffi.ffi_call(
        target or extension.CUDA_ATTEND_TARGET, results, input_output_aliases={1: 1, 2: 2}
    )
    return tuple(
        call(
            projected, keys, values, cosines, sines, length, *more,
            heads=np.int32(heads), has_start=start is not None, has_places=places is not None,
            prefetch=prefetch,
        )
    )  # fmt: skip
