"""The compressed format of a checkpoint: 2:4 values and 2-bit indices in place of pruned weights.

For every linear that `esparse.json` lists there are, instead of `<layer>.weight`,

    <layer>.values        [out, channel / 2], the weight's own dtype: what is kept
    <layer>.indices       U8 [out, ceil(channel / 8)]: where it stood
    <layer>.permutation   I32 [channel]: the order of the input channels in which the weight was
                          compressed; absent where that is the natural one

laid out as `sparse.compress.Compressed24` says. All other tensors, biases among them, are those of
the hf format. One thing differs from `compress24`: a -0.0 counts as a value as long as its group
has room for it, so that the hf weights come back byte for byte.

Packing is done on the host, on bytes: a table for the eight channels that share an index byte.

    8 channels   are not zero?  -> byte of sets   -> byte of indices -> byte of kept places
     0 a 0 b c d 0 0               0b0011_1010       0b0100_1101        0b0011_1010
"""

from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from esparse_jax.files.directory import PERMUTATION_SUFFIX, is_permutation
from esparse_jax.files.tensors import Tensors, bits_of, nonzero, row_slices
from esparse_jax.sparse.compress import GROUP, KEPT, NIBBLE_OF_SET

WEIGHT_SUFFIX = ".weight"
VALUES_SUFFIX = ".values"
INDICES_SUFFIX = ".indices"
_PARTS = (VALUES_SUFFIX, INDICES_SUFFIX, PERMUTATION_SUFFIX)


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For a byte of two sets: their indices, and whether they fit into two places each. For a byte
    of two groups' indices: the places that they keep, and whether they are valid."""
    kept, valid, fits = np.zeros(16, np.uint8), np.zeros(16, bool), np.zeros(16, bool)
    for occupied, nibble in enumerate(map(int, NIBBLE_OF_SET)):
        kept[nibble] = 1 << (nibble & 3) | 1 << (nibble >> 2)
        valid[nibble] = True
        fits[occupied] = occupied.bit_count() <= KEPT
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    return (
        NIBBLE_OF_SET[low] | NIBBLE_OF_SET[high] << 4,
        fits[low] & fits[high],
        kept[low] | kept[high] << 4,
        valid[low] & valid[high],
    )


_INDICES_OF_SETS, _SETS_FIT, _KEPT_OF_INDICES, _INDICES_VALID = _tables()


def pack_indices(
    weight: Shaped[np.ndarray, "out channel"],
) -> tuple[UInt8[np.ndarray, "out byte"], int]:
    """Where the kept values of a 2:4 weight stand, and how many -0.0 found no place.

    Args:
        weight: With its channels in the order of compression, a multiple of four.

    Raises:
        ValueError: It is not 2:4. The message begins with a row; put the layer before it.
    """
    out, channels = weight.shape
    indices = np.empty((out, -(-channels // (2 * GROUP))), np.uint8)
    unplaced = 0
    for rows in row_slices(out):
        part = weight[rows]
        sets = _bytes_of(bits_of(part) != 0)
        crowded = np.flatnonzero(~_SETS_FIT[sets].all(axis=1))
        if crowded.size:
            # Some of it may be -0.0, which gives way to numbers.
            sets[crowded] = _bytes_of(nonzero(part[crowded]))
            _require_fit(part, sets, rows.start)
        indices[rows] = _INDICES_OF_SETS[sets]
        if channels // GROUP % 2:
            indices[rows, -1] &= 15  # no group there
        if crowded.size:
            places = kept_places(indices[rows][crowded], channels)
            unplaced += np.count_nonzero((bits_of(part[crowded]) != 0) & ~places)
    return indices, int(unplaced)


def pack_values(
    weight: Shaped[np.ndarray, "out channel"], indices: UInt8[np.ndarray, "out byte"]
) -> Shaped[np.ndarray, "out kept"]:
    """The values of a weight at the places that the indices name."""
    out, channels = weight.shape
    bits = bits_of(weight)
    values = np.empty((out, channels // KEPT), bits.dtype)
    for rows in row_slices(out):
        kept = kept_places(indices[rows], channels)
        values[rows] = bits[rows][kept].reshape(-1, values.shape[1])
    return values.view(weight.dtype)


def unpack(
    values: Shaped[np.ndarray, "out kept"], indices: UInt8[np.ndarray, "out byte"]
) -> Shaped[np.ndarray, "out channel"]:
    """The dense weight, its channels in the order of compression; the indices must be valid."""
    out, kept = values.shape
    bits = bits_of(values)
    weight = np.zeros((out, kept * GROUP // KEPT), bits.dtype)
    for rows in row_slices(out):
        places = kept_places(indices[rows], weight.shape[1])
        weight[rows][places] = bits[rows].reshape(-1)
    return weight.view(values.dtype)


def kept_places(
    indices: UInt8[np.ndarray, "out byte"], channels: int
) -> Bool[np.ndarray, "out channel"]:
    """True where a kept value stands: two in each group of four channels."""
    sets = _KEPT_OF_INDICES[indices]
    return np.unpackbits(sets, axis=1, count=channels, bitorder="little").view(bool)


def index_error(indices: UInt8[np.ndarray, "out byte"], channels: int) -> str | None:
    """What is wrong with the first group whose indices are not valid; None if all are."""
    single = channels // GROUP % 2 == 1  # the last byte holds one group, and zeros above it
    valid = _INDICES_VALID[indices]
    if single:
        last = indices[:, -1]
        valid[:, -1] = _INDICES_VALID[last | 0b0100_0000] & (last < 16)
    wrong = np.argwhere(~valid)
    if not len(wrong):
        return None
    row, byte = map(int, wrong[0])
    low, high = int(indices[row, byte]) & 15, int(indices[row, byte]) >> 4
    others = "" if len(wrong) == 1 else f"; {len(wrong)} of {indices.size} index bytes are wrong"
    if low & 3 >= low >> 2:
        group, nibble = 2 * byte, low
    elif single and byte == indices.shape[1] - 1:
        return (
            f"row {row}: the last index byte holds one group, so its high nibble must be 0; it is "
            f"{high}{others}"
        )
    else:
        group, nibble = 2 * byte + 1, high
    return (
        f"row {row}, group {group}: the indices name positions {nibble & 3} and {nibble >> 2}; the "
        f"first must be below the second{others}"
    )


def reordered(
    weight: Shaped[np.ndarray, "out channel"], order: Int[np.ndarray, " channel"]
) -> Shaped[np.ndarray, "out channel"]:
    """The weight with its channels in another order."""
    # On 16-bit numbers take is fifteen times as fast as weight[:, order].
    return np.take(bits_of(weight), order, axis=1).view(weight.dtype)


def split_name(name: str) -> tuple[str, str]:
    """The layer of a tensor, and the suffix that says which of its tensors it is."""
    layer, dot, last = name.rpartition(".")
    return layer, dot + last


def order_of(permutation: np.ndarray | None, channels: int) -> Int[np.ndarray, " channel"] | None:
    """The permutation; None where it is the natural order."""
    natural = permutation is None or np.array_equal(permutation, np.arange(channels))
    return None if natural else np.asarray(permutation, np.int32)


class CompressedForm:
    """Tensors of an hf checkpoint as those of a compressed one, computed when read.

    Args:
        dense: The tensors of the hf checkpoint; those to be compressed have four channels to a
            group.
        orders: The layers to compress, with the order of their channels; None for the natural one.

    Attributes:
        unplaced: How many -0.0 became +0.0 in the layers read so far, since their groups are full.
    """

    def __init__(self, dense: Tensors, orders: Mapping[str, Int[np.ndarray, " channel"] | None]):
        self._dense = dense
        self._orders = {}
        self._unplaced: dict[str, int] = {}
        self.layout = {}
        for name, (kind, shape) in dense.layout.items():
            layer, part = split_name(name)
            if layer not in orders or part != WEIGHT_SUFFIX:
                self.layout[name] = (kind, shape)
                continue
            out, channels = shape
            self._orders[layer] = order_of(orders[layer], channels)
            self.layout[layer + VALUES_SUFFIX] = (kind, (out, channels // KEPT))
            self.layout[layer + INDICES_SUFFIX] = ("U8", (out, -(-channels // (2 * GROUP))))
            if self._orders[layer] is not None:
                self.layout[layer + PERMUTATION_SUFFIX] = ("I32", (channels,))

    @property
    def unplaced(self) -> int:
        return sum(self._unplaced.values())

    def read(self, name: str) -> np.ndarray:
        """A tensor of the compressed checkpoint.

        Raises:
            ValueError: A layer that is not 2:4 in its order; it and the row are named.
        """
        layer, part = split_name(name)
        if layer not in self._orders or part not in _PARTS:
            return self._dense.read(name)
        order = self._orders[layer]
        if part == PERMUTATION_SUFFIX:
            return order
        weight = self._dense.read(layer + WEIGHT_SUFFIX)
        if order is not None:
            weight = reordered(weight, order)
        try:
            indices, self._unplaced[layer] = pack_indices(weight)
        except ValueError as error:
            named = "its natural order" if order is None else "the order of its permutation"
            raise ValueError(
                f"{layer} is not 2:4 in {named}, so it has no compressed form: {error}. Give the "
                f"order in which it was pruned; `esparse verify` names every group of every layer."
            ) from error
        return indices if part == INDICES_SUFFIX else pack_values(weight, indices)


class DenseForm:
    """Tensors of a compressed checkpoint as those of an hf one, computed when read.

    Args:
        compressed: The tensors of the compressed checkpoint, their names and shapes checked.
        layers: The compressed layers.
    """

    def __init__(self, compressed: Tensors, layers: Collection[str]):
        self._compressed = compressed
        self._layers = frozenset(layers)
        self.layout = {}
        for name, (kind, shape) in compressed.layout.items():
            layer, part = split_name(name)
            if layer not in self._layers or part not in _PARTS:
                self.layout[name] = (kind, shape)
            elif part == VALUES_SUFFIX:
                out, kept = shape
                self.layout[layer + WEIGHT_SUFFIX] = (kind, (out, kept * GROUP // KEPT))

    def read(self, name: str) -> np.ndarray:
        """A tensor of the hf checkpoint.

        Raises:
            ValueError: Indices that are not valid, or a permutation that is none, by layer.
        """
        layer, part = split_name(name)
        if layer not in self._layers or part != WEIGHT_SUFFIX:
            return self._compressed.read(name)
        order = self.order(layer)
        indices = self._compressed.read(layer + INDICES_SUFFIX)
        if problem := index_error(indices, self.layout[name][1][1]):
            raise ValueError(f"{layer}: {problem}.")
        weight = unpack(self._compressed.read(layer + VALUES_SUFFIX), indices)
        return weight if order is None else reordered(weight, np.argsort(order))

    def order(self, layer: str) -> Int[np.ndarray, " channel"] | None:
        """The order of a layer's channels, checked; None for the natural one."""
        name = layer + PERMUTATION_SUFFIX
        if name not in self._compressed.layout:
            return None
        order = self._compressed.read(name)
        channels = self.layout[layer + WEIGHT_SUFFIX][1][1]
        if problem := permutation_error(order, channels):
            raise ValueError(f"{layer}: {problem}.")
        return order


def permutation_error(order: np.ndarray, channels: int) -> str | None:
    """What is wrong with the order of a layer's channels; None if nothing is."""
    if is_permutation(order, channels):
        return None
    return f"its permutation does not hold each of 0..{channels - 1} once"


def _require_fit(
    part: Shaped[np.ndarray, "row channel"], sets: UInt8[np.ndarray, "row byte"], start: int
) -> None:
    """Raises if a group of these rows, of which `start` is the first, has too many non-zeros."""
    wrong = np.flatnonzero(~_SETS_FIT[sets].all(axis=1))
    if wrong.size:
        row = int(wrong[0])
        counts = nonzero(part[row]).reshape(-1, GROUP).sum(axis=1)
        group = int(np.argmax(counts > KEPT))
        raise ValueError(
            f"row {start + row} has {counts[group]} non-zeros in group {group} (channels "
            f"{GROUP * group}..{GROUP * group + 3} of that order), where {KEPT} fit"
        )


def _bytes_of(occupied: Bool[np.ndarray, "row channel"]) -> UInt8[np.ndarray, "row byte"]:
    return np.packbits(occupied, axis=1, bitorder="little")
