"""The border to the compiled extension: what its handlers check, and what every level computes."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esparse_jax import native
from esparse_jax.sparse import _ffi as ffi
from esparse_jax.sparse import compress24, decompress24

if not ffi.cpu_product_available():
    pytest.skip("the extension is not built (BUILD.md)", allow_module_level=True)

EXTENSION = native.extension()
DTYPES = ("float32", "bfloat16", "float16")


def masked_weight(out: int, channels: int, dtype: str, seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((out, channels // 4, 4)).astype(np.float32)
    weight[random.random(weight.shape).argsort(axis=2) >= 2] = 0
    return jnp.asarray(weight.reshape(out, channels), dtype)


def random_x(rows: int, channels: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, channels)), dtype)


def assert_close_to_float64(y, x, weight) -> None:
    """One rounding to the dtype of y, and float32 sums of as many terms as there are kept."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    eps = float(jnp.finfo(y.dtype).eps)
    size = np.abs(x) @ np.abs(weight).T
    allowed = eps / 2 * np.abs(x @ weight.T) + np.finfo(np.float32).eps * 8 * size
    allowed += float(jnp.finfo(y.dtype).smallest_subnormal)
    error = np.abs(np.asarray(y, np.float64) - x @ weight.T)
    assert np.all(error <= allowed), f"off by {(error / allowed).max():.2f} of what is allowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ffi.cpu_levels())
def test_every_level_computes_the_product(level, dtype):
    product = jax.jit(lambda x, c: ffi.cpu_product(x, c.values, c.indices, level=level))
    # Odd groups, ends that no vector covers, outputs that fill no tile, more than a block of
    # channels or outputs; every number of rows and vectors of rows that has code of its own.
    for out, channels, all_rows in (
        (5, 4, (1, 17)),
        (37, 36, (2, 17, 66)),
        (70, 1500, (1, 2, 7, 16, 17, 35, 49, 66, 130)),
        (650, 512, (3, 70)),
    ):
        weight = masked_weight(out, channels, dtype)
        packed = compress24(weight)
        for rows in all_rows:
            x = random_x(rows, channels, dtype)
            y = product(x, packed)
            assert y.dtype == x.dtype
            assert_close_to_float64(y, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_large_products_are_shared_between_threads(rows, dtype):
    weight = masked_weight(1030, 1028, dtype)
    packed = compress24(weight)
    x = random_x(rows, 1028, dtype)
    product = jax.jit(ffi.cpu_product)
    first = np.asarray(product(x, packed.values, packed.indices))
    assert_close_to_float64(first, x, weight)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(product, x, packed.values, packed.indices) for _ in range(8)]
        for call in calls:
            np.testing.assert_array_equal(np.asarray(call.result()), first)


@pytest.mark.parametrize("level", ffi.cpu_levels())
def test_all_halves_pass_through_unchanged(level):
    """Widening and rounding of float16, for each of its values: one kept value times one."""
    bits = np.arange(2**16, dtype=np.uint16)
    halves = bits.view(np.float16)
    weight = np.zeros((2**16, 8), np.float16)
    weight[np.arange(2**16), bits % 8] = halves
    packed = compress24(jnp.asarray(weight))
    eye = np.eye(8, dtype=np.float16)
    for x in (eye, np.tile(eye, (3, 1))):  # permuted rows and rows in lanes
        y = np.asarray(ffi.cpu_product(jnp.asarray(x), packed.values, packed.indices, level=level))
        chosen = y[bits % 8, bits]
        finite = np.isfinite(halves)
        np.testing.assert_array_equal(chosen[finite], halves[finite])
        np.testing.assert_array_equal(np.isnan(chosen), np.isnan(halves))
        np.testing.assert_array_equal(np.isinf(chosen), np.isinf(halves))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("level", ffi.cpu_levels())
def test_results_are_rounded_to_even(level, dtype):
    random = np.random.default_rng(2)
    # Products of 16-bit floats are exact in float32, so only the last rounding is left. Powers of
    # two on the way from the largest values to the subnormals of float16.
    value = random.uniform(1, 2, 512) * 2.0 ** random.integers(-13, 8, 512)
    factor = np.asarray(random.uniform(1, 2, (1, 1)), jnp.dtype(dtype))
    weight = np.zeros((512, 4), jnp.dtype(dtype))
    weight[:, 1] = value.astype(jnp.dtype(dtype))
    packed = compress24(jnp.asarray(weight))
    x = np.zeros((1, 4), jnp.dtype(dtype))
    x[0, 1] = factor[0, 0]
    true = (weight[:, 1].astype(np.float32) * x[0, 1].astype(np.float32)).astype(jnp.dtype(dtype))
    y = ffi.cpu_product(jnp.asarray(x), packed.values, packed.indices, level=level)
    np.testing.assert_array_equal(np.asarray(y)[0].astype(np.float32), true.astype(np.float32))


@pytest.mark.parametrize("level", ffi.cpu_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20])
def test_nan_and_inf_reach_the_outputs_that_keep_them(level, dtype, rows):
    weight = np.zeros((40, 64), np.float32)
    weight[:20, 5] = weight[20:, 6] = 2.0
    weight[:, 7] = 1.0  # a second kept value in the group, so that no place is filled up
    packed = compress24(jnp.asarray(weight, dtype))
    x = np.ones((rows, 64), np.float32)
    x[0, 5] = np.nan
    x[rows - 1, 6] = np.inf
    x = jnp.asarray(x, dtype)
    y = np.asarray(ffi.cpu_product(x, packed.values, packed.indices, level=level), np.float32)
    assert np.all(np.isnan(y[0, :20]))
    assert np.all(np.isposinf(y[rows - 1, 20:]))
    if rows > 1:
        assert np.all(y[1 : rows - 1] == 3.0)
        assert np.all(y[0, 20:] == 3.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 20, 70])
@pytest.mark.parametrize("level", ffi.cpu_levels())
def test_one_value_that_is_not_finite_stays_in_its_outputs(level, rows, value):
    """Wherever it stands: zeros that a level multiplies by must not spread it."""
    channels = 300
    weight = masked_weight(33, channels, "bfloat16")
    packed = compress24(weight)
    product = jax.jit(lambda x, c: ffi.cpu_product(x, c.values, c.indices, level=level))
    clean = random_x(rows, channels, "bfloat16")
    random = np.random.default_rng(3)
    for channel in (0, 31, 32, 255, 256, channels - 1, *random.integers(0, channels, 3)):
        row = random.integers(rows)
        y = np.asarray(product(clean.at[row, channel].set(value), packed), np.float32)
        keeps = np.asarray(weight)[:, channel] != 0
        assert not np.isfinite(y[row, keeps]).any()
        y[row, keeps] = 0
        finite = np.asarray(clean.at[row, channel].set(0), np.float64)
        finite = finite @ np.asarray(weight, np.float64).T
        finite[row, keeps] = 0
        np.testing.assert_allclose(y, finite, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("level", ffi.cpu_levels())
def test_subnormal_bfloat16_counts_or_is_zero(level, rows):
    weight = np.zeros((4, 64), jnp.bfloat16)
    weight[:, 5] = [1e-39, 1.0, 2.0**-100, 1.0]
    packed = compress24(jnp.asarray(weight))
    x = np.zeros((rows, 64), jnp.bfloat16)
    x[:, 5] = 2.0**-30
    y = ffi.cpu_product(jnp.asarray(x), packed.values, packed.indices, level=level)
    y = np.asarray(y, np.float64)
    assert np.all(y[:, [1, 3]] == 2.0**-30)
    assert np.all((y[:, 2] == 0) | (y[:, 2] == 2.0**-130))
    assert np.all(y[:, 0] == 0)


@pytest.mark.parametrize("level", ffi.cpu_levels())
def test_leaves_the_registers_to_dense_products(level):
    """XLA's own bfloat16 products use AMX on the same threads, before and after ours."""
    weight = masked_weight(512, 512, "bfloat16")
    packed = compress24(weight)

    def dense(x):
        y = jax.lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return y.astype(x.dtype)

    @jax.jit
    def both(x):
        for _ in range(2):
            x = dense(x) / 16
            x = ffi.cpu_product(x, packed.values, packed.indices, level=level) / 16
        return x

    x = random_x(70, 512, "bfloat16")
    alone = x
    for _ in range(4):
        alone = dense(alone) / 16
    with ThreadPoolExecutor(4) as threads:
        for call in [threads.submit(both, x) for _ in range(8)]:
            y = np.asarray(call.result(), np.float32)
            np.testing.assert_allclose(y, np.asarray(alone, np.float32), rtol=0, atol=0.02)


def test_no_rows_and_no_outputs():
    packed = compress24(jnp.zeros((8, 16)))
    assert ffi.cpu_product(jnp.zeros((0, 16)), packed.values, packed.indices).shape == (0, 8)
    empty = ffi.cpu_product(jnp.zeros((3, 16)), jnp.zeros((0, 8)), jnp.zeros((0, 2), jnp.uint8))
    assert empty.shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (33, 36), (600, 512)])
def test_expand_is_decompress(shape, dtype):
    packed = compress24(masked_weight(*shape, dtype))
    dense = ffi.cpu_expand(packed.values, packed.indices)
    assert dense.dtype == packed.dtype
    np.testing.assert_array_equal(np.asarray(dense), np.asarray(decompress24(packed)))


F32, U8, F16, S32 = jnp.float32, jnp.uint8, jnp.float16, jnp.int32


@pytest.mark.parametrize(
    ("x", "values", "indices", "y", "message"),
    [
        (
            ((8,), F32),
            ((4, 4), F32),
            ((4, 1), U8),
            ((1, 4), F32),
            r"takes matrices.*got x F32\[8\]",
        ),
        (
            ((1, 8), S32),
            ((4, 4), S32),
            ((4, 1), U8),
            ((1, 4), S32),
            r"F32, BF16 and F16; got x S32",
        ),
        (
            ((1, 8), F32),
            ((4, 4), F16),
            ((4, 1), U8),
            ((1, 4), F32),
            r"one dtype.*values F16\[4, 4\]",
        ),
        (
            ((1, 8), F32),
            ((4, 4), F32),
            ((4, 1), S32),
            ((1, 4), F32),
            r"indices U8; got.*S32\[4, 1\]",
        ),
        (
            ((1, 6), F32),
            ((4, 3), F32),
            ((4, 1), U8),
            ((1, 4), F32),
            r"multiple of 4; got x F32\[1, 6",
        ),
        (
            ((1, 8), F32),
            ((4, 2), F32),
            ((4, 1), U8),
            ((1, 4), F32),
            r"needs values \[4, 4\].*\[4, 2\]",
        ),
        (((1, 8), F32), ((4, 4), F32), ((4, 2), U8), ((1, 4), F32), r"U8\[4, 1\]; got.*U8\[4, 2\]"),
        (((1, 8), F32), ((4, 4), F32), ((3, 1), U8), ((1, 4), F32), r"U8\[4, 1\]; got.*U8\[3, 1\]"),
        (
            ((1, 8), F32),
            ((4, 4), F32),
            ((4, 1), U8),
            ((2, 4), F32),
            r"make y \[1, 4\]; got y F32\[2",
        ),
    ],
)
def test_the_handler_says_what_was_given(x, values, indices, y, message):
    call = jax.ffi.ffi_call(EXTENSION.PRODUCT24_CPU, jax.ShapeDtypeStruct(*y))
    arguments = [jnp.zeros(shape, dtype) for shape, dtype in (x, values, indices)]
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*{message}"):
        call(*arguments, level=np.int32(-1)).block_until_ready()


@pytest.mark.parametrize(
    ("values", "indices", "dense", "message"),
    [
        (((4,), F32), ((4, 1), U8), ((4, 8), F32), r"values F32\[4\]"),
        (((4, 4), F32), ((4, 2), U8), ((4, 8), F32), r"U8\[4, 1\]; got indices U8\[4, 2\]"),
        (
            ((4, 4), F32),
            ((4, 1), U8),
            ((4, 16), F32),
            r"dense weight F32\[4, 8\]; got F32\[4, 16\]",
        ),
        (((4, 4), U8), ((4, 1), U8), ((4, 8), U8), r"2 and 4 bytes.*got values U8\[4, 4\]"),
    ],
)
def test_expand_says_what_was_given(values, indices, dense, message):
    call = jax.ffi.ffi_call(EXTENSION.EXPAND24_CPU, jax.ShapeDtypeStruct(*dense))
    arguments = [jnp.zeros(shape, dtype) for shape, dtype in (values, indices)]
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*{message}"):
        call(*arguments).block_until_ready()


def test_unknown_levels_are_refused():
    packed = compress24(jnp.zeros((4, 8)))
    with pytest.raises(ValueError, match=r"runs the levels .*'portable'.*; got 'mmx'"):
        ffi.cpu_product(jnp.zeros((1, 8)), packed.values, packed.indices, level="mmx")
    call = jax.ffi.ffi_call(EXTENSION.PRODUCT24_CPU, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"level 99 .* does not run on this proc"):
        call(
            jnp.zeros((1, 8)), packed.values, packed.indices, level=np.int32(99)
        ).block_until_ready()


def test_levels_end_with_the_portable_one():
    assert ffi.cpu_levels()[-1] == "portable"
    assert EXTENSION.cpu_level_code("mmx") == -1


def test_level_codes_stay_as_exported_computations_hold_them():
    names = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    assert [EXTENSION.cpu_level_code(name) for name in names] == [0, 1, 2, 3, 4]


def test_unsupported_dtypes_are_refused_before_the_call():
    with pytest.raises(
        TypeError, match=r'float32, bfloat16, float16; got float8_e5m2.*"reference"'
    ):
        ffi.cpu_product(
            jnp.zeros((1, 8), jnp.float8_e5m2),
            jnp.zeros((4, 4), jnp.float8_e5m2),
            jnp.zeros((4, 1), jnp.uint8),
        )


def test_targets_carry_an_interface_number():
    for name, (platform, stages) in EXTENSION.registrations().items():
        assert name.rsplit("_v", 1)[1].isdigit()
        assert platform in ("cpu", "CUDA")
        assert "execute" in stages
