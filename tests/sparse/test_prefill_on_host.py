"""The prefill kernel's own source, run on the host: its blocks, copies, barriers and products."""

import ctypes
import itertools

import host_build
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import random_blob, random_x, relative, rounding

from esparse_jax.sparse import compressed24_of, decompress24
from esparse_jax.sparse._ffi_cuda import PREFILL_PLAN_VALUES, require_prefill_plan

NO_INSTANCE = 1
WIDE = {"tile": 256, "outputs": 192, "stages": 4}  # one of those that multiply loads as well


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    host_build.require_float16()
    file = tmp_path_factory.mktemp("prefill") / "prefill.so"
    # Sums that a product is to set are not zero before it.
    flags = ("-O2", "-ftrivial-auto-var-init=pattern")
    host_build.build(file, "cuda/testing/prefill_on_host.cc", "cuda/prefill_plan.cc", flags=flags)
    return ctypes.CDLL(str(file))


def _run(on_host, x, blob, *, tile=128, outputs=128, stages=4, cluster=1, group=2, teams=1,
         split=1, tail=1, late=(0, 0), prefetch=False):  # fmt: skip
    """The status, and what the kernel wrote. `late`: whether copies and products take place when
    they are waited for; else when they are asked for. `teams`: that run at once.
    """
    (rows, channels), out = x.shape, blob.shape[0]
    data, x_bytes = np.array(blob.data), np.array(x)
    y = np.full((rows + 1, out), np.nan, x.dtype)  # nobody may write the last row

    def pointer(array):
        return array.ctypes.data_as(ctypes.c_void_p)

    plan = (ctypes.c_int32 * 6)(tile, outputs, cluster, group, split, tail)
    status = on_host.esparse_prefill_on_host(
        int(x.dtype == jnp.bfloat16), *map(ctypes.c_int64, (rows, out, channels)), plan, stages,
        teams, *late, int(any(late)), int(prefetch), *map(pointer, (data, x_bytes, y)),
    )  # fmt: skip
    assert np.isnan(y[rows:].astype(np.float32)).all()
    return status, y[:rows]


def _exact(x, blob) -> np.ndarray:
    weight = np.asarray(decompress24(compressed24_of(blob)), np.float64)
    return np.asarray(x, np.float64) @ weight.T


@pytest.mark.parametrize("late", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "shape", "plan"), [
    (1, (64, 64), {}),
    (40, (128, 192), {}),
    (300, (192, 128), {"teams": 2, "group": 1}),  # several tiles, the last ones not whole
    (130, (320, 192), {"cluster": 2}),  # a block with one warpgroup's outputs
    (150, (576, 128), {"cluster": 4, "group": 3}),  # and blocks with none
    (150, (192, 320), {"stages": 8}),
    (300, (192, 192), {"tile": 256, "stages": 5, "cluster": 2}),
    (200, (128, 128), {"tile": 256, "stages": 5}),  # x has fewer rows than a tile
    (16, (320, 1024), {"tile": 16, "stages": 9}),  # one tile after the other, written in turns
    (5, (320, 1024), {"tile": 16, "stages": 9, "split": 8}),  # fewer items than blocks
    (50, (192, 448), {"tile": 16, "stages": 9, "teams": 2, "tail": 3}),
    (17, (192, 448), {"tile": 64, "stages": 5, "split": 3}),  # parts of 2, 2 and 3 stages
    (40, (64, 1024), {"tile": 64, "stages": 5, "split": 2}),  # more stages than there is room for
    (100, (64, 512), {"tile": 64, "stages": 5, "split": 8}),
    (50, (192, 448), {"tile": 64, "stages": 5, "split": 7}),  # 14 items: two for each
    (140, (128, 320), {"split": 2, "group": 1}),
    (300, (128, 128), {"tile": 256, "stages": 5, "split": 2}),
    # 9 tiles: 8 for two or four blocks, and a last one, whose channels are split.
    (300, (320, 192), {"teams": 2, "tail": 3}),
    (300, (320, 320), {"teams": 4, "tail": 2, "group": 3}),
    (130, (128, 192), {"tile": 64, "stages": 5, "teams": 2, "tail": 3}),
    # 6 of clusters, the last of which has a block without outputs.
    (300, (320, 192), {"cluster": 2, "teams": 5, "tail": 2}),
    (300, (576, 128), {"tile": 256, "stages": 5, "cluster": 2, "teams": 4, "tail": 2}),
    # More outputs: a last block with those of one warpgroup, or of two, and one without.
    (150, (448, 192), {"outputs": 192, "stages": 6, "teams": 2}),
    (40, (192, 512), {"outputs": 192, "stages": 6, "split": 3}),
    (300, (320, 192), WIDE | {"teams": 3}),  # fewer stages than there is room for
    (300, (320, 576), WIDE | {"group": 1}),  # and many more
    (20, (320, 576), WIDE | {"split": 2}),
    (250, (192, 320), WIDE | {"split": 5}),  # as much memory as there is
    (300, (576, 384), WIDE | {"cluster": 2}),
    (300, (640, 64), WIDE | {"teams": 3}),
    (300, (1088, 320), WIDE | {"cluster": 2, "teams": 4, "tail": 2}),
])  # fmt: skip
def test_the_kernels_source_computes_the_product(on_host, rows, shape, plan, dtype, late):
    blob, x = random_blob(shape, dtype), random_x(rows, shape[1], dtype)
    status, got = _run(on_host, x, blob, **plan, late=late)
    assert status == 0
    assert relative(got, _exact(x, blob)) < 1.5 * rounding(dtype)


@pytest.mark.parametrize("late", [(0, 0), (1, 1)])
@pytest.mark.parametrize(("rows", "shape", "plan"), [
    (40, (128, 128), {}),  # fewer stages than there is room for
    (300, (192, 448), {"teams": 2, "group": 1}),
    (300, (192, 320), {"tile": 256, "stages": 5, "cluster": 2}),
    (17, (192, 448), {"tile": 64, "stages": 5, "split": 3}),
    (16, (192, 832), {"tile": 16, "stages": 9, "split": 2}),
    (300, (320, 192), {"teams": 4, "tail": 2}),
    (300, (576, 320), WIDE | {"cluster": 2, "teams": 2}),
    (300, (320, 64), WIDE | {"teams": 2}),
])  # fmt: skip
def test_the_weight_may_come_before_the_kernel_before_has_ended(on_host, rows, shape, plan, late):
    blob, x = random_blob(shape), random_x(rows, shape[1])
    _, want = _run(on_host, x, blob, **plan)
    status, got = _run(on_host, x, blob, **plan, late=late, prefetch=True)
    assert status == 0
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("rows", "shape", "plan", "want"), [
    # rows, outputs, cluster, group, split, tail; teams of both launches, where the second begins
    (1024, (12288, 4096), {}, (256, 192, 2, 8, 1, 1, 66, 0, 0)),  # 128 clusters leave 62: too many
    (1024, (12288, 4096), {"outputs": 128}, (256, 128, 2, 8, 1, 1, 66, 0, 0)),
    (1024, (5376, 14336), {}, (256, 128, 2, 8, 1, 3, 66, 36, 132)),
    (1024, (5376, 14336), {"outputs": 192}, (256, 192, 2, 8, 1, 1, 56, 0, 0)),  # in one round
    (1024, (7168, 14336), {}, (256, 192, 2, 8, 1, 4, 66, 20, 132)),
    (1024, (22016, 4096), {"outputs": 128}, (256, 128, 2, 8, 1, 4, 66, 28, 660)),
    (1024, (22016, 4096), {"outputs": 128, "tail": 1}, (256, 128, 2, 8, 1, 1, 66, 0, 0)),
    (1024, (22016, 4096), {"outputs": 128, "cluster": 1}, (256, 128, 1, 8, 1, 4, 132, 28, 660)),
    (512, (12288, 4096), {}, (256, 192, 1, 8, 1, 1, 128, 0, 0)),
    (512, (12288, 4096), {"outputs": 128}, (256, 128, 1, 8, 1, 2, 132, 60, 132)),
    (128, (22016, 4096), {}, (128, 192, 1, 8, 1, 1, 115, 0, 0)),
    # 40 clusters of 3 find no place.
    (128, (22016, 4096), {"outputs": 128}, (128, 128, 1, 8, 1, 2, 132, 40, 132)),
    # Too short to gain by a second launch.
    (256, (22016, 1024), {"outputs": 128}, (256, 128, 1, 8, 1, 1, 132, 0, 0)),
    (16, (28672, 8192), {}, (16, 128, 1, 8, 1, 1, 224, 0, 0)),  # two blocks a multiprocessor
    (16, (28672, 8192), {"outputs": 192}, (128, 192, 1, 8, 1, 4, 132, 18, 132)),
    (16, (34816, 8192), {}, (16, 128, 1, 8, 1, 6, 264, 8, 264)),
    (16, (14336, 1792), {}, (16, 128, 1, 8, 1, 1, 112, 0, 0)),  # in two parts as much of W
    (16, (7168, 14336), {}, (16, 128, 1, 8, 2, 1, 56, 0, 0)),  # of four parts one has two as well
    (16, (5376, 14336), {}, (16, 128, 1, 8, 3, 1, 42, 0, 0)),
    (16, (4096, 11008), {}, (16, 128, 1, 8, 4, 1, 32, 0, 0)),
    (16, (4096, 1024), {}, (16, 128, 1, 8, 2, 1, 32, 0, 0)),  # eight stages a part
    (17, (14336, 1792), {}, (64, 128, 1, 8, 2, 1, 112, 0, 0)),
    (32, (4096, 4096), {}, (64, 128, 1, 8, 6, 1, 32, 0, 0)),
    (32, (5120, 4096), {}, (64, 128, 1, 8, 6, 1, 40, 0, 0)),
    (32, (5120, 2560), {}, (64, 128, 1, 8, 5, 1, 40, 0, 0)),  # eight stages a part
    (32, (5376, 4096), {}, (64, 128, 1, 8, 5, 1, 42, 0, 0)),  # 42 clusters of 6 find no place
    (1024, (4096, 4096), {}, (256, 128, 2, 8, 1, 1, 64, 0, 0)),  # fewer tiles than blocks
    (128, (4096, 4096), {}, (128, 128, 1, 8, 3, 1, 32, 0, 0)),
    (128, (4096, 4096), {"outputs": 192}, (128, 192, 1, 8, 4, 1, 22, 0, 0)),
    (128, (4096, 4096), {"outputs": 128, "tail": 4}, (128, 128, 1, 8, 1, 4, 32, 0, 0)),
])  # fmt: skip
def test_the_work_is_cut_for_all_multiprocessors(on_host, rows, shape, plan, want):
    given = (ctypes.c_int32 * 6)(*(plan.get(field, 0) for field in PREFILL_PLAN_VALUES))
    clusters, result = (ctypes.c_int32 * 5)(66, 38, 30, 24, 20), (ctypes.c_int32 * 9)()
    sizes = map(ctypes.c_int64, (rows, *shape))
    on_host.esparse_prefill_cut(*sizes, given, 132, clusters, result)
    assert tuple(result) == want


def test_what_a_plan_is_both_sides_agree_on(on_host):
    values = ((0, 16, 64, 96, 128, 256), (0, 64, 128, 192, 256), (0, 1, 2, 3), (0, 1, 64, 65),
              (0, 1, 2, 8, 9), (0, 1, 2, 8, 9))  # fmt: skip
    for plan in itertools.product(*values):
        fields = {
            name: value for name, value in zip(PREFILL_PLAN_VALUES, plan, strict=True) if value
        }
        try:
            require_prefill_plan(fields)
            allowed = True
        except ValueError:
            allowed = False
        given = (ctypes.c_int32 * 6)(*plan)
        assert bool(on_host.esparse_prefill_is_plan(given)) is allowed, fields


def test_instances_that_are_not_there_are_refused(on_host):
    blob, x = random_blob((64, 64)), random_x(1, 64)
    for plan in ({"tile": 64}, {"stages": 3}, {"cluster": 3}):
        assert _run(on_host, x, blob, **plan)[0] == NO_INSTANCE
