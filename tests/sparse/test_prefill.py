"""The prefill kernel: its lowering anywhere, its numbers on a Hopper GPU."""

import functools
import itertools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import random_blob, random_x, relative, rounding
from lowering import lowered_for_cuda

from esparse_jax.sparse import Blob24, _ffi_cuda, compressed24_of, decompress24
from esparse_jax.sparse._timing import timer_operands

needs_build = pytest.mark.skipif(
    not _ffi_cuda.prefill_available(), reason="the extension was built without code for Hopper"
)
needs_hopper = pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.devices()[0].compute_capability != "9.0",
    reason="JAX sees no GPU of compute capability 9.0",
)
TILES = [
    {"rows": rows, "outputs": outputs, "cluster": cluster}
    for rows, outputs, cluster in _ffi_cuda.PREFILL_TILES
]
PLANS = [
    tile | {"group": group, "split": 1, "tail": 1}
    for tile, group in itertools.product(TILES, (1, 3))
]
SPLIT = [
    tile | {"split": split, "group": 3}
    for tile, split in itertools.product(TILES, (2, 3, 5, 8))
    if tile["cluster"] == 1
]
TAILS = [tile | {"tail": tail} for tile, tail in itertools.product(TILES, (2, 7))]


def prefill(x, blob: Blob24, **options):
    return _ffi_cuda.prefill(x, blob.data, out=blob.shape[0], **options)


def exact(x, blob: Blob24) -> np.ndarray:
    weight = np.asarray(decompress24(compressed24_of(blob)), np.float64)
    return np.asarray(x, np.float64) @ weight.T


@needs_build
def test_a_plan_is_handed_over():
    text = lowered_for_cuda(functools.partial(prefill, plan={"group": 5, "rows": 128}),
                            random_x(40, 128), random_blob((64, 128)))  # fmt: skip
    assert "esparse_prefill24_cuda_v3" in text
    assert "plan = dense<[128, 0, 0, 5, 0, 0]>" in text


@needs_build
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("records", [False, True])
def test_xla_records_it_where_it_records_calls(monkeypatch, records, prefetch):
    monkeypatch.setattr(_ffi_cuda, "records_calls", lambda: records)
    traced = jax.jit(functools.partial(prefill, prefetch=prefetch)).trace(
        random_x(40, 128), random_blob((64, 128))
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("esparse_prefill24_recorded_v1" in text) is records
    assert ("esparse_prefill24_cuda_v3" in text) is not records
    assert f"prefetch = {str(prefetch).lower()}" in text


@needs_build
@pytest.mark.parametrize(("plan", "match"), [
    ({"rows": 96}, "rows of a plan is 96; it is one of 16, 64, 128, 256, or left out"),
    ({"cluster": 3}, "cluster of a plan is 3; it is one of 1, 2, or left out"),
    ({"cluster": 2, "split": 2}, "a cluster of 2 blocks has a split of 1"),
    ({"cluster": 2, "rows": 128}, "are one of 16 x 128 in 1, .*, 256 x 192 in 2; got"),
    ({"rows": 64, "outputs": 192}, "are one of 16 x 128 in 1, .*, 256 x 192 in 2; got"),
    ({"split": 2, "tail": 2}, "the channels of all tiles or of its tail, not both"),
    ({"tiles": 3}, r"the fields \('rows', 'outputs', .*, 'tail'\); got \['tiles'\]"),
])  # fmt: skip
def test_mistakes_are_explained(plan, match):
    with pytest.raises(ValueError, match=match):
        prefill(random_x(40, 128), random_blob((64, 128)), plan=plan)


def test_a_build_without_it_says_so(monkeypatch):
    extension = ModuleType("extension")
    extension.HAS_CUDA, extension.CUDA_PREFILL_TARGET = True, None
    monkeypatch.setattr(_ffi_cuda.native, "extension", lambda: extension)
    assert not _ffi_cuda.prefill_runs("9.0")
    with pytest.raises(RuntimeError, match=r"compute capability 9\.0.*must name 90"):
        prefill(random_x(40, 128), random_blob((64, 128)))


# ---- on a Hopper GPU


@pytest.mark.gpu
@needs_hopper
@needs_build
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (192, 192), (704, 448), (2304, 1792)])
def test_kernel_is_exact_to_the_rounding(shape, dtype):
    blob = random_blob(shape, dtype)
    for rows in (1, 17, 128, 300, 1000):
        x = random_x(rows, shape[1], dtype)
        got = jax.jit(prefill)(x, blob)
        assert relative(got, exact(x, blob)) < 1.5 * rounding(dtype), rows


@pytest.mark.gpu
@needs_hopper
@needs_build
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_every_plan_gives_the_same_bits(dtype):
    blob, x = random_blob((2112, 448), dtype), random_x(1500, 448, dtype)
    want = np.asarray(prefill(x, blob, plan=PLANS[0]))
    assert relative(want, exact(x, blob)) < 1.5 * rounding(dtype)
    for plan in PLANS[1:]:
        np.testing.assert_array_equal(prefill(x, blob, plan=plan), want, err_msg=str(plan))


@pytest.mark.gpu
@needs_hopper
@needs_build
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("rows", [17, 64, 100, 700])
def test_split_channels_are_added_up(dtype, rows):
    blob, x = random_blob((1088, 832), dtype), random_x(rows, 832, dtype)
    want = exact(x, blob)
    for plan in SPLIT:
        assert relative(prefill(x, blob, plan=plan), want) < 1.5 * rounding(dtype), plan
    short = random_blob((64, 128), dtype)  # of two stages: no more can be split
    got = prefill(x[:, :128], short, plan={"split": 8})
    assert relative(got, exact(x[:, :128], short)) < 1.5 * rounding(dtype)


@pytest.mark.gpu
@needs_hopper
@needs_build
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_last_tiles_are_split(dtype):
    """More tiles of each size than an H200 or H100 runs at once, and an odd number of blocks."""
    blob, x = random_blob((8512, 832), dtype), random_x(800, 832, dtype)
    want = exact(x, blob)
    whole = np.asarray(prefill(x, blob, plan=PLANS[0]))
    for plan in TAILS:
        got = np.asarray(prefill(x, blob, plan=plan))
        assert relative(got, want) < 1.5 * rounding(dtype), plan
        assert np.isfinite(got).all(), plan
        differ = got != whole  # other bits, where the sums of parts were added up
        assert 0 < differ.mean() < 0.1, plan
    # Who comes next sees both launches' results.
    doubled = jax.jit(lambda x, blob: prefill(x, blob, plan=TAILS[-1]) * 2)
    np.testing.assert_array_equal(doubled(x, blob), 2 * got)


@pytest.mark.gpu
@needs_hopper
@needs_build
def test_the_timer_runs_the_plan_that_it_is_given():
    """Sums of split channels have bits of their own, which tell the plans apart."""
    blob, x = random_blob((256, 4096)), random_x(64, 4096)
    bits = set()
    for split in (1, 2, 5):
        plan = {"rows": 64, "cluster": 1, "group": 8, "split": split}
        want = np.asarray(prefill(x, blob, plan=plan))
        y = jnp.full_like(want, jnp.nan)
        blobs = blob.data[None]
        _ffi_cuda._extension().prefill_time(
            plan=_ffi_cuda.prefill_plan(plan).tolist(), launches=1, replays=1,
            **timer_operands(x, blobs, y),
        )  # fmt: skip
        np.testing.assert_array_equal(y, want, err_msg=str(plan))
        bits.add(want.tobytes())
    assert len(bits) == 3


@pytest.mark.gpu
@needs_hopper
@needs_build
def test_a_long_run_gives_the_same_bits_again():
    """A race between copies and products would show as other bits in some run."""
    blob, x = random_blob((4352, 4096)), random_x(3000, 4096)
    first_rows = exact(x[:64], blob)
    same = jax.jit(lambda y, want: (y == want).all())  # there: copies to the host take far longer
    for plan in PLANS + SPLIT + TAILS:
        run = jax.jit(functools.partial(prefill, plan=plan))
        want = run(x, blob)
        assert relative(want[:64], first_rows) < 1.5 * rounding(x.dtype), plan
        assert all([same(run(x, blob), want) for _ in range(20)]), plan


@pytest.mark.gpu
@needs_hopper
@needs_build
def test_infinity_and_nan_reach_the_outputs_that_keep_their_channel():
    blob = random_blob((64, 64))
    dense = np.asarray(decompress24(compressed24_of(blob)))
    x = random_x(40, 64).at[0, 3].set(jnp.inf).at[33, 5].set(jnp.nan)
    y = np.asarray(prefill(x, blob))
    np.testing.assert_array_equal(np.isinf(y[0]), dense[:, 3] != 0)
    np.testing.assert_array_equal(np.isnan(y[33]), dense[:, 5] != 0)
    assert np.isfinite(np.delete(y, (0, 33), axis=0)).all()


@pytest.mark.gpu
@needs_hopper
@needs_build
def test_in_a_scan_it_is_captured():
    blobs = jnp.stack([random_blob((128, 128), seed=seed).data for seed in range(4)])
    x = random_x(200, 128)

    @jax.jit
    def run(x, blobs):
        def layer(x, data):
            return _ffi_cuda.prefill(x, data, out=128) / 8, None

        return jax.lax.scan(layer, x, blobs)[0]

    want = x
    for data in blobs:
        want = _ffi_cuda.prefill(want, data, out=128) / 8
    np.testing.assert_array_equal(run(x, blobs), want)


@pytest.mark.gpu
@needs_hopper
@needs_build
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("plan", [{}, *PLANS[::2], *SPLIT[::4], *TAILS[::6]], ids=str)
def test_it_waits_for_its_x_and_nothing_else_is_read_early(plan, prefetch):
    """Each product of a loop reads what the one before wrote just then, or what XLA did to it."""
    blobs = [random_blob((8512, 512)), random_blob((512, 8512), seed=1)]
    x = random_x(200, 512)

    @jax.jit
    def run(x, data):
        def turn(_, x):
            wide = _ffi_cuda.prefill(x, data[0], out=8512, prefetch=prefetch, plan=plan)
            return _ffi_cuda.prefill(wide, data[1], out=512, prefetch=prefetch, plan=plan) / 2

        return jax.lax.fori_loop(0, 50, turn, x)

    data = [blob.data for blob in blobs]
    want = x
    for _ in range(50):
        for blob in blobs:
            want = jax.block_until_ready(functools.partial(prefill, plan=plan)(want, blob))
        want = want / 2
    for _ in range(5):
        np.testing.assert_array_equal(run(x, data), want)
