"""The compressed form: its layout, its round trip, and what it refuses."""

import dataclasses
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esparse_jax.sparse import Compressed24, check24, compress24, decompress24
from esparse_jax.sparse.compress import kept_positions, take_kept

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def bits_of(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def random_24(seed: int, out: int, channels: int, dtype, kept=(0, 1, 2)) -> np.ndarray:
    """Every group keeps a random number of random bit patterns: nans, denormals and all."""
    random = np.random.default_rng(seed)
    unsigned = np.dtype(f"u{jnp.dtype(dtype).itemsize}")
    bits = random.integers(1, np.iinfo(unsigned).max, (out, channels // 4, 4), dtype=unsigned)
    order = random.random(bits.shape).argsort(axis=2)
    count = random.choice(kept, bits.shape[:2])
    bits[order >= count[:, :, None]] = 0
    bits[bits == 1 << (8 * unsigned.itemsize - 1)] = 0  # -0.0 has its own test
    return bits.reshape(out, channels).view(jnp.dtype(dtype))


def by_the_format(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values and indices as the docstring of Compressed24 says, one group after the other."""
    out, channels = weight.shape
    values = np.zeros((out, channels // 2), weight.dtype)
    indices = np.zeros((out, -(-channels // 8)), np.uint8)
    for row in range(out):
        for group in range(channels // 4):
            of_group = weight[row, 4 * group : 4 * group + 4]
            used = [p for p in range(4) if of_group[p] != 0]
            free = [p for p in range(4) if of_group[p] == 0]
            first, second = sorted((used + free)[:2])
            values[row, 2 * group] = of_group[first]
            values[row, 2 * group + 1] = of_group[second]
            nibble = first | second << 2
            indices[row, group // 2] |= nibble << (4 if group % 2 else 0)
    return values, indices


def test_the_example_of_the_docstring():
    weight = jnp.array([[0.0, 5.0, 0.0, 6.0, 7.0, 8.0, 0.0, 0.0]])
    packed = compress24(weight)
    np.testing.assert_array_equal(packed.values, [[5.0, 6.0, 7.0, 8.0]])
    np.testing.assert_array_equal(packed.indices, [[0b0100_1101]])
    assert packed.shape == (1, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    out=st.sampled_from([1, 5]),  # few shapes: each is compiled
    groups=st.sampled_from([1, 2, 3, 8]),
)
@hypothesis.settings(max_examples=20)
def test_round_trip_is_exact(dtype, seed, out, groups):
    weight = random_24(seed, out, 4 * groups, dtype)
    packed = compress24(jnp.asarray(weight))
    np.testing.assert_array_equal(bits_of(decompress24(packed)), bits_of(weight))
    if groups % 2:
        assert not np.any(np.asarray(packed.indices)[:, -1] >> 4)


@pytest.mark.parametrize("channels", [4, 12, 32])
def test_layout_is_the_documented_one(channels):
    weight = np.random.default_rng(0).standard_normal((16, channels)).astype(np.float32)
    weight[bits_of(random_24(1, 16, channels, jnp.float32)) == 0] = 0
    values, indices = by_the_format(weight)
    packed = compress24(jnp.asarray(weight))
    np.testing.assert_array_equal(packed.values, values)
    np.testing.assert_array_equal(packed.indices, indices)
    positions = np.asarray(kept_positions(packed.indices, channels // 2)).reshape(16, -1, 2)
    assert np.all(positions[..., 0] < positions[..., 1])


def test_negative_zero_becomes_positive():
    weight = jnp.array([[-0.0, 1.0, -0.0, -2.0], [-0.0, -0.0, -0.0, -0.0]])
    packed = compress24(weight)
    assert not np.any(np.signbit(packed.values[1]))
    np.testing.assert_array_equal(
        bits_of(decompress24(packed)),
        bits_of(np.array([[0.0, 1.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0]], np.float32)),
    )


def test_denormals_are_kept():
    tiny = np.array([[1, 0, 2, 0]], np.uint32).view(np.float32)
    packed = compress24(jnp.asarray(tiny))
    np.testing.assert_array_equal(bits_of(packed.values), [[1, 2]])
    np.testing.assert_array_equal(bits_of(decompress24(packed)), bits_of(tiny))


def test_mask_is_applied():
    weight = jax.random.normal(jax.random.key(0), (3, 8))
    mask = jnp.array([[True, False, True, False] * 2] * 3)
    masked = jnp.where(mask, weight, 0)
    with_mask, without = compress24(weight, mask), compress24(masked)
    np.testing.assert_array_equal(with_mask.values, without.values)
    np.testing.assert_array_equal(with_mask.indices, without.indices)


def test_one_of_four_is_accepted():
    weight = random_24(3, 4, 16, jnp.bfloat16, kept=(1,))
    np.testing.assert_array_equal(
        bits_of(decompress24(compress24(jnp.asarray(weight)))), bits_of(weight)
    )


def test_four_of_eight_is_refused():
    weight = jnp.tile(jnp.array([1.0, 1, 1, 1, 0, 0, 0, 0]), (2, 3))
    with pytest.raises(ValueError, match=r"row 0 has 4 non-zeros in channels 0\.\.3, where 2 fit"):
        compress24(weight)
    with pytest.raises(ValueError, match="4:8 cannot, as its 8 channels may keep all 4 values in"):
        check24(weight)


def test_the_violation_is_named():
    weight = jnp.zeros((3, 12)).at[2, 8:11].set(1.0)
    with pytest.raises(ValueError, match=r"row 2 has 3 non-zeros in channels 8\.\.11") as error:
        compress24(weight)
    assert "1 of 9 groups" in str(error.value)
    compress24(weight, jnp.ones((3, 12), bool).at[2, 9].set(False))


def test_unseen_violations_become_nan():
    weight = jnp.zeros((1, 8)).at[0, :3].set(1.0).at[0, 4:6].set(2.0)
    packed = jax.jit(compress24)(weight)
    np.testing.assert_array_equal(packed.values, [[np.nan, np.nan, 2.0, 2.0]])


def test_jit_gives_the_same():
    weight = jnp.asarray(random_24(5, 7, 20, jnp.float16))
    eager, jitted = compress24(weight), jax.jit(compress24)(weight)
    np.testing.assert_array_equal(bits_of(eager.values), bits_of(jitted.values))
    np.testing.assert_array_equal(eager.indices, jitted.indices)
    assert eager.shape == jitted.shape


@pytest.mark.parametrize("shape", [(3, 6), (3, 2)])
def test_channels_must_be_groups_of_four(shape):
    with pytest.raises(ValueError, match=rf"a multiple of 4; got shape \({shape[0]}, {shape[1]}\)"):
        compress24(jnp.zeros(shape))


def test_mask_must_have_the_shape_of_the_weight():
    unchecked = inspect.unwrap(compress24)  # the annotations refuse it first where they are checked
    with pytest.raises(ValueError, match=r"the weight's shape \(2, 8\); got \(3, 8\)"):
        unchecked(jnp.zeros((2, 8)), jnp.ones((3, 8), bool))


@pytest.mark.parametrize("dtype", ["float8_e5m2", "int32"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"float16, bfloat16, float32 or float64; got {dtype}"):
        inspect.unwrap(compress24)(jnp.zeros((1, 4), dtype))


def test_gradient_reaches_the_kept_values():
    packed = compress24(jnp.array([[0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0]]))
    slope = jnp.arange(8.0)[None, :]

    def loss(values):
        return jnp.sum(slope * decompress24(dataclasses.replace(packed, values=values)))

    # The last group keeps position 2 and, to fill up, position 0.
    np.testing.assert_array_equal(jax.grad(loss)(packed.values), [[1.0, 3.0, 4.0, 6.0]])
    np.testing.assert_array_equal(take_kept(slope, packed.indices), [[1.0, 3.0, 4.0, 6.0]])


def test_it_is_a_pytree_with_a_static_shape():
    packed = compress24(jnp.zeros((4, 8), jnp.bfloat16))
    leaves, structure = jax.tree.flatten(packed)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, leaves).shape == (4, 8)
    shapes = jax.eval_shape(compress24, jax.ShapeDtypeStruct((4, 8), jnp.bfloat16))
    assert isinstance(shapes, Compressed24)
    assert shapes.values.shape == (4, 4)
    assert shapes.indices.shape == (4, 1)


def test_size_is_nine_sixteenths():
    packed = compress24(jnp.zeros((64, 64), jnp.bfloat16))
    assert packed.nbytes * 16 == 64 * 64 * 2 * 9
    assert packed.dtype == jnp.bfloat16
