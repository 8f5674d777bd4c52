"""The portable form of a 2:4 weight: kept values and 2-bit indices.

This is what goes to disk and what every backend of `sparse_matmul` starts from; see `Compressed24`
for the layout. Pure maths: packing moves bits and never rounds.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

GROUP = 4  # channels that share two kept values
KEPT = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed24:
    """A 2:4 weight `(out, channel)` as its kept values and where they stood.

    The format, one row of the weight (rows follow each other, everything is row-major)::

        channels   c0  c1  c2  c3 | c4  c5  c6  c7 | ...
        weight      0   a   0   b |  c   d   0   0 | ...
        values      a   b  |  c   d | ...              kept values in channel order

        indices    one byte for two groups, the first group in the low nibble:

                   bit   7   6   5   4 | 3   2   1   0
                        second  first  | second first      position inside the group, 0..3
                           1      0    |   3      1        (the row above: byte 0b0100_1101)

    so the kept value j of a row sits at channel `4 * (j // 2) + position`, and its position is in
    the bits `2 j` and `2 j + 1` of the row's index bytes read as one little-endian number.

    - `first < second` in every group, always. A group with fewer than two non-zeros fills up with
      its lowest free positions, whose value is +0.0; so the form of a weight is unique.
    - Where the number of groups is odd, the last high nibble of a row is zero.
    - -0.0 is stored as +0.0. Every other value keeps its bits.
    - 1:4 is a special case of 2:4 and fits. 4:8 does not: all four kept values of eight channels
      may stand in the same group of four, for which there are only two places.

    The sizes come from the arrays: `shape` is the dense shape of the *whole* weight, and inside
    `shard_map` the arrays may be a part of it.

    Attributes:
        values: `[out, channel / 2]`, the weight's own dtype.
        indices: `uint8[out, ceil(channel / 8)]`.
        shape: `(out, channel)` of the dense weight, static.
    """

    # Any, not array types: the leaves of a pytree may be shapes, shardings or tracers as well.
    values: Any
    indices: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays: 9/16 of a dense 16-bit weight, 17/32 of a float32 one."""
        return self.values.nbytes + self.indices.nbytes


def _kept_table() -> np.ndarray:
    """For each of the 16 sets of non-zero positions, the index nibble that stores it.

    A set of more than two cannot be stored; its entry names the two lowest, and `compress24` does
    not use them as they are.
    """
    table = []
    for occupied in range(16):
        positions = [p for p in range(GROUP) if occupied >> p & 1]
        positions += [p for p in range(GROUP) if not occupied >> p & 1]
        first, second = sorted(positions[:KEPT])
        table.append(first | second << 2)
    return np.array(table, dtype=np.uint8)


NIBBLE_OF_SET = _kept_table()
_UINT_OF_SIZE = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def _bits(weight: Array) -> Array:
    """The weight as unsigned integers, so that choosing and packing move bits and nothing else.

    As floats they would not: on the CPU XLA runs with denormals flushed to zero (a denormal weight
    would compare equal to zero, and a select may write it as one), and signalling nans are quieted.
    """
    return jax.lax.bitcast_convert_type(weight, _UINT_OF_SIZE[weight.dtype.itemsize])


def _is_nonzero(bits: Array) -> Bool[Array, "*shape"]:
    """True for everything but +0.0 and -0.0: the sign is shifted out."""
    return bits << 1 != 0


def _require_weight(weight: Array) -> None:
    if weight.ndim != 2 or weight.shape[1] % GROUP:
        raise ValueError(
            f"2:4 groups 4 neighbouring input channels, so a weight must be [out, channel] with "
            f"channel a multiple of 4; got shape {tuple(weight.shape)}. Leave such a layer dense, "
            f"or pad its channels with zeros."
        )
    if not jnp.issubdtype(weight.dtype, jnp.floating) or weight.dtype.itemsize not in _UINT_OF_SIZE:
        raise TypeError(
            f"a 2:4 weight is compressed from float16, bfloat16, float32 or float64; got "
            f"{weight.dtype}. Convert it first, weight.astype(jnp.bfloat16)."
        )


def check24(
    weight: Float[Array, "out channel"], mask: Bool[Array, "out channel"] | None = None
) -> None:
    """Raises if a concrete weight is not 2:4, naming a group that is not.

    `compress24` calls this by itself wherever it can see the values, that is outside `jit`.

    Args:
        weight: The dense weight.
        mask: Where given, the weight is `where(mask, weight, 0)`.

    Raises:
        ValueError: More than two non-zeros in four neighbouring channels (a 4:8 weight, or a
            weight that was not pruned, or pruned in another channel order), or a number of
            channels that four does not divide.
    """
    _require_weight(weight)
    counts = _group_counts(weight, mask)
    if not jnp.any(counts > KEPT):
        return
    counts = np.asarray(counts)
    rows, groups = np.nonzero(counts > KEPT)
    row, group = int(rows[0]), int(groups[0])
    raise ValueError(
        f"the weight of shape {tuple(weight.shape)} is not 2:4: row {row} has "
        f"{int(counts[row, group])} non-zeros in channels {GROUP * group}..{GROUP * group + 3}, "
        f"where 2 fit, and {rows.size} of {counts.size} groups are like it. 1:4 and 2:4 can be "
        f"compressed; 4:8 cannot, as its 8 channels may keep all 4 values in one group of 4. Prune "
        f"to 2:4 first, and put the channels into the order the mask was made in "
        f"(weight[:, permutation])."
    )


@jax.jit
def _group_counts(
    weight: Float[Array, "out channel"], mask: Bool[Array, "out channel"] | None
) -> Int[Array, "out group"]:
    nonzero = _is_nonzero(_bits(weight))
    if mask is not None:
        nonzero = nonzero & mask
    return nonzero.reshape(weight.shape[0], -1, GROUP).sum(axis=2, dtype=jnp.int32)


def compress24(
    weight: Float[Array, "out channel"], mask: Bool[Array, "out channel"] | None = None
) -> Compressed24:
    """Packs a 2:4 weight; `decompress24` gives it back bit for bit (with -0.0 as +0.0).

    Works on any device and inside `jit`. There values cannot be looked at, so a group that is not
    2:4 comes out as two nan: nothing that uses it can go unnoticed.

    Not differentiable (integers are moved, so a gradient through here is zero): differentiate in
    the packed values.

    Args:
        weight: The weight with its zeros in place, or any weight together with a mask. Channels
            stand in the order the product will see them in (`weight[:, permutation]`).
        mask: Where given, `where(mask, weight, 0)` is packed.

    Returns:
        The weight in the format written down in `Compressed24`.

    Raises:
        ValueError: Outside `jit`, a weight that is not 2:4 (see `check24`); always, a number of
            channels that is not a multiple of 4.
        TypeError: Not a float dtype of 2, 4 or 8 bytes.

    Source: E-Sparse, section 4 (values and 2-bit indices, after NVIDIA's sparse tensor cores).
    Paper silent: everything about the byte layout, and what groups with fewer than two non-zeros
        keep.
    """
    _require_weight(weight)
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(
            f"the mask must have the weight's shape {tuple(weight.shape)}; got {tuple(mask.shape)}."
        )
    if not isinstance(weight, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        check24(weight, mask)
    return _compress24(weight, mask)


@jax.jit
def _compress24(
    weight: Float[Array, "out channel"], mask: Bool[Array, "out channel"] | None
) -> Compressed24:
    out, channels = weight.shape
    bits = _bits(weight)
    nonzero = _is_nonzero(bits)
    if mask is not None:
        nonzero = nonzero & mask
    bits = jnp.where(nonzero, bits, 0).reshape(out, -1, GROUP)
    nonzero = nonzero.reshape(out, -1, GROUP)

    occupied = sum(nonzero[..., p].astype(jnp.uint8) << p for p in range(GROUP))
    nibble = jnp.asarray(NIBBLE_OF_SET)[occupied]
    first, second = nibble & 3, nibble >> 2
    b0, b1, b2, b3 = (bits[..., p] for p in range(GROUP))
    kept = jnp.stack(
        [
            jnp.where(first == 0, b0, jnp.where(first == 1, b1, b2)),
            jnp.where(second == 1, b1, jnp.where(second == 2, b2, b3)),
        ],
        axis=-1,
    )
    fits = nonzero.sum(axis=-1, dtype=jnp.int32) <= KEPT
    kept = jnp.where(fits[..., None], kept, _bits(jnp.array(jnp.nan, weight.dtype)))
    values = jax.lax.bitcast_convert_type(kept.reshape(out, -1), weight.dtype)

    nibble = jnp.pad(nibble, ((0, 0), (0, nibble.shape[1] % 2))).reshape(out, -1, 2)
    indices = nibble[..., 0] | nibble[..., 1] << 4
    return Compressed24(values, indices, (out, channels))


def kept_positions(indices: UInt8[Array, "out byte"], kept: int) -> UInt8[Array, "out kept"]:
    """The position inside its group, 0..3, of each of the `kept` values of a row.

    Kept value `j` of a row stands at channel `4 * (j // 2) + positions[row, j]`.
    """
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)
    positions = indices[..., None] >> shifts[None, None, :] & 3
    return positions.reshape(indices.shape[0], -1)[:, :kept]


def take_kept(
    dense: Float[Array, "out channel"], indices: UInt8[Array, "out byte"]
) -> Float[Array, "out kept"]:
    """The entries of a dense matrix that stand where the kept values stand."""
    kept = dense.shape[1] // KEPT
    group_start = jnp.arange(kept, dtype=jnp.int32) // KEPT * GROUP
    channel = group_start[None, :] + kept_positions(indices, kept).astype(jnp.int32)
    return jnp.take_along_axis(dense, channel, axis=1)


@jax.jit
def decompress24(compressed: Compressed24) -> Float[Array, "out channel"]:
    """The dense weight; the exact inverse of `compress24`.

    Differentiable in the values: the gradient of a kept value is the gradient at its channel.
    """
    return _decompress(compressed.values, compressed.indices)


@jax.custom_vjp
def _decompress(
    values: Float[Array, "out kept"], indices: UInt8[Array, "out byte"]
) -> Float[Array, "out channel"]:
    out, kept = values.shape
    bits = _bits(values).reshape(out, -1, KEPT)
    positions = kept_positions(indices, kept).reshape(out, -1, KEPT)
    # A choice per place, not a scatter: it fuses with whatever reads the weight, on every platform.
    dense = [
        jnp.where(
            positions[..., 0] == p,
            bits[..., 0],
            jnp.where(positions[..., 1] == p, bits[..., 1], 0),
        )
        for p in range(GROUP)
    ]
    dense = jnp.stack(dense, axis=-1).reshape(out, KEPT * kept)
    return jax.lax.bitcast_convert_type(dense, values.dtype)


def _decompress_forward(values, indices):
    return _decompress(values, indices), indices


def _decompress_backward(indices, gradient):
    return take_kept(gradient, indices), np.zeros(indices.shape, jax.dtypes.float0)


_decompress.defvjp(_decompress_forward, _decompress_backward)
