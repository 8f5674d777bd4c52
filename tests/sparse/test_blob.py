"""The device form of a 2:4 weight against a slow loop over its written-down layout."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esparse_jax.sparse import (
    Compressed24,
    blob24,
    compress24,
    compressed24_of,
    decompress24,
    device_blob24,
    interleave_gate_up,
    sparse_matmul,
    sparse_matmul_reference,
)

DTYPES = (jnp.float16, jnp.bfloat16)


def _weight(shape, dtype, seed=0):
    """A random 2:4 weight, some groups of which keep fewer than two values."""
    rng = np.random.default_rng(seed)
    out, channels = shape
    kept = rng.permuted(np.tile([True, True, False, False], (out, channels // 4, 1)), axis=2)
    kept &= rng.random(kept.shape) < 0.9
    weight = rng.standard_normal(shape) * kept.reshape(shape)
    return jnp.asarray(weight, dtype)


def _slow_blob(compressed: Compressed24) -> np.ndarray:
    """The layout of `Blob24`'s docstring, one nibble at a time."""
    values, indices = np.asarray(compressed.values), np.asarray(compressed.indices)
    out, channels = compressed.shape
    nibbles = np.zeros(out * channels // 4, np.uint8)
    for r in range(out):
        for g in range(channels // 4):
            number = (
                ((r // 64) * (channels // 64) + g // 16) * 1024
                + 512 * (g // 8 % 2)
                + 128 * (r // 16 % 4)
                + 16 * (r % 8)
                + 4 * (g % 4)
                + 2 * (g // 4 % 2)
                + r // 8 % 2
            )
            nibbles[number] = indices[r, g // 2] >> (4 * (g % 2)) & 15
    metadata = nibbles[0::2] | nibbles[1::2] << 4
    return np.concatenate([values.view(np.uint8).reshape(-1), metadata])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 192), (192, 128)])
def test_blob_has_the_written_layout(shape, dtype):
    compressed = compress24(_weight(shape, dtype))
    blob = blob24(compressed)
    assert (blob.shape, blob.dtype) == (shape, np.dtype(dtype))
    assert blob.nbytes == blob.data.nbytes == shape[0] * shape[1] * 2 * 9 // 16
    np.testing.assert_array_equal(np.asarray(blob.data), _slow_blob(compressed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blob_and_back_is_exact_inside_jit(dtype):
    weight = _weight((128, 192), dtype)
    # Bits that arithmetic would change: a denormal, an infinity, a nan with a payload.
    bits = jnp.array([1, 0x7C00, 0x7E01], jnp.uint16)
    special = jax.lax.bitcast_convert_type(bits, dtype)
    weight = weight.at[0, :12].set(0).at[0, jnp.array([0, 5, 10])].set(special)
    compressed = compress24(weight)
    back = jax.jit(lambda c: compressed24_of(blob24(c)))(compressed)
    assert back.shape == compressed.shape
    for name in ("values", "indices"):
        got, want = (np.asarray(getattr(c, name)) for c in (back, compressed))
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "match"),
    [
        ((64, 96), jnp.float16, ValueError, r"\(64, 96\) is not made of multiples of 64"),
        ((32, 64), jnp.bfloat16, ValueError, "multiples of 64"),
        ((64, 64), jnp.float32, TypeError, "float32, and only float16 and bfloat16"),
    ],
)
def test_what_has_no_blob_is_refused(shape, dtype, error, match):
    with pytest.raises(error, match=match):
        blob24(compress24(_weight(shape, dtype)))


@pytest.mark.parametrize("form", [blob24, device_blob24])
def test_a_dense_weight_is_told_to_be_compressed_first(form):
    untyped = inspect.unwrap(form)  # as users have it: the tests check types before that
    with pytest.raises(TypeError, match=r"made of a Compressed24; got .*compress24\(weight\)"):
        untyped(jnp.zeros((64, 64), jnp.float16))


def test_interleaved_gate_and_up_alternate_by_eight_rows():
    gate, up = (_weight((64, 64), jnp.float16, seed) for seed in (1, 2))
    merged = decompress24(interleave_gate_up(compress24(gate), compress24(up)))
    for i in range(8):
        np.testing.assert_array_equal(merged[16 * i : 16 * i + 8], gate[8 * i : 8 * i + 8])
        np.testing.assert_array_equal(merged[16 * i + 8 : 16 * i + 16], up[8 * i : 8 * i + 8])


def test_gate_and_up_of_different_shapes_are_refused():
    gate, up = (
        compress24(_weight((64, 64), jnp.float16)),
        compress24(_weight((128, 64), jnp.float16)),
    )
    with pytest.raises(ValueError, match="one shape and dtype"):
        interleave_gate_up(gate, up)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_product_from_a_blob_is_the_reference_on_the_cpu(rows):
    blob = blob24(compress24(_weight((64, 128), jnp.bfloat16)))
    x = jax.random.normal(jax.random.key(rows), (rows, 128), jnp.bfloat16)
    got = jax.jit(sparse_matmul)(x, blob).astype(jnp.float32)
    want = sparse_matmul_reference(x, blob).astype(jnp.float32)
    exact = x.astype(jnp.float32) @ decompress24(compressed24_of(blob)).astype(jnp.float32).T
    plain = np.abs(want - exact).max()
    assert np.abs(got - exact).max() <= 2 * plain


def test_product_from_a_blob_is_differentiable_in_x_and_batches():
    blob = blob24(compress24(_weight((64, 64), jnp.float16)))
    dense = decompress24(compressed24_of(blob))
    x = jax.random.normal(jax.random.key(0), (2, 5, 64), jnp.float16)
    gradient = jax.grad(lambda x: sparse_matmul(x, blob).astype(jnp.float32).sum())(x)
    want = jnp.broadcast_to(dense.astype(jnp.float32).sum(0), x.shape)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), want, atol=2e-2)
    batched = jax.vmap(lambda x: sparse_matmul(x, blob))(x)
    np.testing.assert_array_equal(batched, sparse_matmul(x, blob))


def test_wrong_x_for_a_blob_is_named():
    blob = blob24(compress24(_weight((64, 64), jnp.float16)))
    with pytest.raises(ValueError, match="64 input channels"):
        sparse_matmul(jnp.ones((1, 128), jnp.float16), blob)
    with pytest.raises(TypeError, match=r"x\.astype\(float16\)"):
        sparse_matmul(jnp.ones((1, 64), jnp.bfloat16), blob)
