"""Packing on the host: the bytes of compress24, and what it says of weights and indices."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esparse_jax.files.compressed import (
    index_error,
    kept_places,
    order_of,
    pack_indices,
    pack_values,
    permutation_error,
    reordered,
    unpack,
)
from esparse_jax.sparse import Compressed24, compress24, decompress24

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def random_weight(seed: int, out: int, groups: int, dtype, kept: int = 2) -> np.ndarray:
    """At most `kept` numbers in each group of four, among them NaN and the least denormal."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((out, groups, 4)).astype(dtype)
    flat = bits(weight)
    flat[generator.random(flat.shape) < 0.1] = 1
    flat[generator.random(flat.shape) < 0.1] = bits(np.array(np.nan, dtype)) | 1
    scores = generator.random(weight.shape).argsort(-1).argsort(-1)
    weight[(scores >= kept) | (generator.random(weight.shape) < 0.2)] = 0
    return weight.reshape(out, 4 * groups)


@given(
    seed=st.integers(0, 10**6),
    out=st.integers(1, 9),
    groups=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    kept=st.integers(1, 2),
)
def test_packed_on_the_host_is_compress24(seed, out, groups, dtype, kept):
    weight = random_weight(seed, out, groups, dtype, kept)
    theirs = compress24(jnp.asarray(weight))
    indices, unplaced = pack_indices(weight)
    assert unplaced == 0
    np.testing.assert_array_equal(indices, theirs.indices)
    values = pack_values(weight, indices)
    np.testing.assert_array_equal(bits(values), bits(theirs.values))
    np.testing.assert_array_equal(bits(unpack(values, indices)), bits(weight))
    assert index_error(indices, 4 * groups) is None
    assert (kept_places(indices, 4 * groups).reshape(out, groups, 4).sum(axis=2) == 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_are_packed_together(dtype):
    weight = random_weight(0, 2500, 3, dtype)
    indices, _ = pack_indices(weight)
    np.testing.assert_array_equal(bits(unpack(pack_values(weight, indices), indices)), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_keeps_its_sign_as_long_as_there_is_room(dtype):
    weight = np.array([[-0.0, 0, 3, 0, 0, -0.0, 0, -0.0, 1, 2, 0, 0]], dtype)
    indices, unplaced = pack_indices(weight)
    values = pack_values(weight, indices)
    np.testing.assert_array_equal(bits(unpack(values, indices)), bits(weight))
    assert unplaced == 0
    # Both forms are the same weight to whoever computes with it.
    again = decompress24(Compressed24(jnp.asarray(values), jnp.asarray(indices), weight.shape))
    np.testing.assert_array_equal(bits(again), bits(weight))
    crowded = np.array([[-0.0, 0, 3, 4, -0.0, -0.0, -0.0, 5, 0, 0, 0, 0]], dtype)
    indices, unplaced = pack_indices(crowded)
    back = unpack(pack_values(crowded, indices), indices)
    np.testing.assert_array_equal(back, crowded)
    np.testing.assert_array_equal(np.signbit(back)[0, :8], [0, 0, 0, 0, 1, 0, 0, 0])
    assert unplaced == 3


def test_a_weight_that_is_not_two_of_four():
    weight = np.zeros((1500, 16), np.float32)
    weight[1300, 4:7] = 1, -0.0, 2  # two
    pack_indices(weight)
    weight[1400, 9:12] = 1
    weight[1450, :] = 1
    with pytest.raises(ValueError, match=r"row 1400 has 3 non-zeros in group 2 \(channels 8\.\.11"):
        pack_indices(weight)


@pytest.mark.parametrize("channels", [16, 20])
def test_indices_that_are_not_valid(channels):
    weight = random_weight(1, 6, channels // 4, np.float32)
    indices, _ = pack_indices(weight)
    valid = {0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110}
    for nibble in range(16):
        changed = indices.copy()
        changed[4, 1] = changed[4, 1] & 0b1111 | nibble << 4
        problem = index_error(changed, channels)
        if nibble in valid:
            assert problem is None
        else:
            first, second = nibble & 3, nibble >> 2
            assert problem == (
                f"row 4, group 3: the indices name positions {first} and {second}; the first must "
                f"be below the second"
            )
        changed[[4, 5], 0] = 0
        assert index_error(changed, channels).startswith("row 4, group 0: the indices name")
        assert index_error(changed, channels).endswith("index bytes are wrong")


def test_the_nibble_without_a_group_is_zero():
    indices, _ = pack_indices(random_weight(1, 3, 5, np.float32))
    assert (indices[:, -1] < 16).all()
    indices[2, -1] |= 0b0100_0000  # valid where there is a group
    assert index_error(indices[2:], 24) is None
    assert index_error(indices, 20) == (
        "row 2: the last index byte holds one group, so its high nibble must be 0; it is 4"
    )
    indices[1, -1] = 0
    assert index_error(indices, 20).startswith("row 1, group 4: the indices name positions 0 and 0")


def test_orders():
    natural = np.arange(8)
    assert order_of(None, 8) is None
    assert order_of(natural, 8) is None
    assert order_of(natural[::-1], 8).dtype == np.int32
    assert permutation_error(natural[::-1], 8) is None
    for wrong in (natural[:-1], natural * 0, natural + 1):
        assert permutation_error(wrong, 8) == "its permutation does not hold each of 0..7 once"
    weight = random_weight(2, 3, 2, ml_dtypes.bfloat16)
    order = np.array([3, 0, 7, 1, 2, 6, 5, 4])
    np.testing.assert_array_equal(bits(reordered(weight, order)), bits(weight[:, order]))
    back = reordered(reordered(weight, order), np.argsort(order))
    np.testing.assert_array_equal(bits(back), bits(weight))
