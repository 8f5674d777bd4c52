"""The decode kernel's own source, run on the host in the cuts it makes for several devices."""

import ctypes
from typing import NamedTuple

import host_build
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import random_blob, random_x, relative, rounding, slow_product, variants

from esparse_jax.sparse import _ffi_cuda, compressed24_of, decompress24

NO_CUT = 1


class Multiprocessors(NamedTuple):
    """How many there are, and bytes of shared memory: a block's, a multiprocessor's, reserved."""

    count: int
    per_block: int
    per_multiprocessor: int
    reserved: int


# With the shared memory of Hopper, of Ampere's and Ada's smaller chips, and with hardly any.
HOPPER = Multiprocessors(3, 232448, 233472, 1024)
SMALL = Multiprocessors(2, 101376, 102400, 1024)
SCARCE = Multiprocessors(2, 30000, 31024, 1024)


class Used(NamedTuple):
    """The cut that was made."""

    tiles: int
    warps: int
    grid: int
    depth: int
    resident: int


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    host_build.require_float16()
    file = tmp_path_factory.mktemp("decode") / "decode.so"
    host_build.build(file, "cuda/testing/decode_on_host.cc", "cuda/decode_plan.cc")
    return ctypes.CDLL(str(file)).esparse_decode_on_host


def _run(on_host, x, blob, plan, device, *, prefetch=True, late=True, **variant):
    """The status, what the kernel wrote, and its cut."""
    rows, channels = x.shape
    out = blob.shape[0]
    swiglu, residual, places = (variant.get(name) for name in ("swiglu", "residual", "places"))
    norm_epsilon = variant.get("norm_epsilon")
    fusion = sum(
        bit
        for bit, asked in (
            (_ffi_cuda._NORM, norm_epsilon is not None),
            (_ffi_cuda._SWIGLU, swiglu),
            (_ffi_cuda._RESIDUAL, residual is not None),
            (_ffi_cuda._SCATTER, places is not None),
        )
        if asked
    )
    arrays = [None if a is None else np.array(a) for a in (blob.data, x, residual, places)]
    # Rows of y are followed by some that nobody may write.
    width = out // 2 if swiglu else out
    written = [np.full((rows + 1, width), np.nan, x.dtype) for _ in range(2)]

    def pointer(array):
        return None if array is None else array.ctypes.data_as(ctypes.c_void_p)

    def numbers(values):
        return (ctypes.c_int32 * len(values))(*values)

    used = numbers([0] * len(Used._fields))
    status = on_host(
        int(x.dtype == jnp.bfloat16), *map(ctypes.c_int64, (rows, out, channels)), fusion,
        ctypes.c_float(norm_epsilon or 0), numbers(_ffi_cuda._plan(plan).tolist()),
        numbers(device), int(prefetch), int(late), *map(pointer, (*arrays, *written)), used,
    )  # fmt: skip
    assert all(np.isnan(y[rows:].astype(np.float32)).all() for y in written)
    y, scattered = (y[:rows] for y in written)
    if places is None:
        assert np.isnan(scattered.astype(np.float32)).all()
    return status, y if places is None else np.stack([y, scattered]), Used(*used)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (128, 192), (64, 1344)])
@pytest.mark.parametrize("rows", [1, 8, 11, 16])
def test_the_kernels_source_computes_the_product(on_host, shape, dtype, rows):
    blob, x = random_blob(shape, dtype), random_x(rows, shape[1], dtype)
    for number, variant in enumerate(variants(rows, shape, dtype)):
        if "permutation" in variant:  # another kernel has put x in order
            continue
        status, got, _ = _run(
            on_host, x, blob, {}, HOPPER, prefetch=number % 2 == 0, late=number < 2, **variant
        )
        assert status == 0
        assert relative(got, slow_product(x, blob, **variant)) < 1.5 * rounding(dtype)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
@pytest.mark.parametrize(("warps", "blocks"), [(4, 2), (8, 1), (8, 2), (16, 1)])
@pytest.mark.parametrize("interleave", [1, 2])
@pytest.mark.parametrize("resident", [1, 2])
def test_every_plan_gives_the_same_product(on_host, tiles, warps, blocks, interleave, resident):
    shape = (320, 448)
    blob = random_blob(shape)
    plan = dict(
        zip(
            ("tiles", "warps", "blocks", "interleave", "resident"),
            (tiles, warps, blocks, interleave, resident),
            strict=True,
        )
    )
    for rows, late in ((1, False), (16, True)):
        x = random_x(rows, shape[1])
        prefetch = (tiles + rows + resident) % 2 == 0
        status, got, used = _run(on_host, x, blob, plan, HOPPER, late=late, prefetch=prefetch)
        assert status == 0
        assert relative(got, slow_product(x, blob)) < 1.5 * rounding(x.dtype)
        if (tiles, warps * blocks, rows) != (4, 16, 16):  # may be too large for a block
            assert (used.tiles, used.warps, used.resident) == (tiles, warps, int(resident == 1))
        assert used.grid == min(HOPPER.count * blocks, shape[0] // 16)


@pytest.mark.parametrize("warps", [4, 16])
@pytest.mark.parametrize("rows", [3, 9, 16])
def test_several_passes_over_the_tiles_fuse_all_the_same(on_host, warps, rows):
    """Of the 16 warps most have no channels."""
    shape, dtype = (448, 704), jnp.bfloat16
    device = HOPPER._replace(count=5)
    blob, x = random_blob(shape, dtype), random_x(rows, shape[1], dtype)
    for at, variant in enumerate(variants(rows, shape, dtype)):
        if "permutation" in variant:
            continue
        plan = {"tiles": 1, "warps": warps, "blocks": 1, "resident": 1 + at % 2}
        timing = {"late": at % 3 > 0, "prefetch": at % 4 > 1}
        status, got, used = _run(on_host, x, blob, plan, device, **timing, **variant)
        assert (status, used.tiles, used.warps, used.grid) == (0, 1, warps, device.count)
        assert relative(got, slow_product(x, blob, **variant)) < 1.5 * rounding(dtype)


def test_the_rule_gives_way_to_the_blocks_that_are_asked_for(on_host):
    """Its 16 warps, for long rows, would not run twice at once."""
    blob, x = random_blob((64, 7168)), random_x(1, 7168)
    for plan, warps in (({}, 16), ({"blocks": 2}, 8)):
        status, got, used = _run(on_host, x, blob, plan, HOPPER._replace(count=2))
        assert (status, used.warps) == (0, warps)
        assert relative(got, slow_product(x, blob)) < 1.5 * rounding(x.dtype)


@pytest.mark.parametrize("depth", range(1, 9))
def test_a_ring_of_any_depth_gives_the_same_product(on_host, depth):
    shape, plan = (192, 1344), {"tiles": 1, "warps": 4, "blocks": 1, "depth": depth}
    blob, x = random_blob(shape), random_x(9, shape[1])
    for late in (False, True):
        status, got, used = _run(on_host, x, blob, plan, HOPPER, late=late)
        assert (status, used.depth) == (0, depth)
        assert relative(got, slow_product(x, blob)) < 1.5 * rounding(x.dtype)


def test_a_plan_shrinks_where_shared_memory_is_short(on_host):
    shape = (128, 448)
    blob, x = random_blob(shape), random_x(16, shape[1])
    for device in (SMALL, SCARCE):
        plan = {"tiles": 4, "warps": 16, "blocks": 1, "resident": 1}
        status, got, used = _run(on_host, x, blob, plan, device)
        assert status == 0
        assert relative(got, slow_product(x, blob)) < 1.5 * rounding(x.dtype)
        assert used.warps * used.tiles < 64
    status, _, _ = _run(on_host, x, blob, {}, SCARCE._replace(per_block=9000))
    assert status == NO_CUT


def test_infinity_and_nan_reach_the_outputs_that_keep_their_channel(on_host):
    shape = (64, 128)
    blob = random_blob(shape)
    x = random_x(2, shape[1]).at[0, 5].set(jnp.inf).at[1, 9].set(jnp.nan)
    status, got, _ = _run(on_host, x, blob, {}, HOPPER)
    assert status == 0
    # A channel that is not kept is not read: there the slow product, of the dense weight, is wrong.
    kept = np.asarray(decompress24(compressed24_of(blob)))[:, [5, 9]] != 0
    np.testing.assert_array_equal(np.isfinite(got[0].astype(np.float32)), ~kept[:, 0])
    np.testing.assert_array_equal(np.isnan(got[1].astype(np.float32)), kept[:, 1])
