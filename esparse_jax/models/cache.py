"""The key/value cache: arrays in, arrays out, so that a decode step is one jitted function.

All rows of a batch write at the same slot. Prompts of different lengths are aligned at their last
token, the shorter ones padded on the left; `start` says where each row begins:

    slot      0    1    2    3    4    5    6        length = 5 (the next token goes to slot 5)
    row 0     -    -    a    b    c    .    .        start = 2, so c stands at position 2
    row 1     A    B    C    D    E    .    .        start = 0, so E stands at position 4

A position is a slot minus its row's start. Padding therefore has a negative position, which is all
the attention needs to know: a token sees the keys with 0 <= position <= its own.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """One layer's keys (already rotated) and values, and how far they are filled."""

    keys: Float[Array, "batch_head slot feature"]
    values: Float[Array, "batch_head slot feature"]
    length: Int[Array, ""]
    start: Int[Array, " batch"] | None

    def positions(self, seq: int) -> Int[Array, "#batch seq"]:
        """The positions of the next `seq` tokens; negative where they are padding."""
        return self._from_start(self.length + jnp.arange(seq, dtype=jnp.int32))

    def key_positions(self) -> Int[Array, "#batch slot"]:
        """The position of every slot; slots not yet written lie after every token so far."""
        return self._from_start(jnp.arange(self.keys.shape[1], dtype=jnp.int32))

    def _from_start(self, slots: Int[Array, " slot"]) -> Int[Array, "#batch slot"]:
        return slots[None] if self.start is None else slots[None] - self.start[:, None]

    def append(
        self,
        keys: Float[Array, "batch seq head feature"],
        values: Float[Array, "batch seq head feature"],
    ) -> "LayerCache":
        """Writes the keys and values of the next tokens.

        How far the cache is filled is known on the device only, so going past the last slot is not
        noticed here; the last slots would be overwritten. The caller makes the cache long enough.
        """
        seq, slots = keys.shape[1], self.keys.shape[1]
        if seq > slots:
            raise ValueError(
                f"The cache has {slots} slots and was given {seq} tokens at once. Make it with "
                f"max_length of at least the prompt plus the tokens to generate."
            )
        zero = jnp.zeros((), self.length.dtype)

        def write(held: Array, new: Array) -> Array:
            new = new.astype(held.dtype).swapaxes(1, 2).reshape(-1, seq, new.shape[3])
            return jax.lax.dynamic_update_slice(held, new, (zero, self.length, zero))

        written = (write(self.keys, keys), write(self.values, values))
        # Else XLA may fuse a second update into what reads the cache, and copy the cache for it in
        # every step: seen for bfloat16 on the CPU, jax 0.10.2 and 0.11.2.
        written = jax.lax.optimization_barrier(written)
        return LayerCache(*written, self.length + seq, self.start)


class KVCache(NamedTuple):
    """The whole model's cache. Donate it: each step returns one of the same shapes.

    Keys and values are one array per layer rather than one stacked array: a slice of a stacked
    array is a copy as soon as it meets a custom call. A head of a row is one matrix
    [slot, feature], and the matrices of a batch lie one after the other, row by row: what attention
    multiplies, as it lies. With slots first, or with one axis for rows and another for heads, XLA
    would turn or copy the cache in every step (seen on the CPU, with one row and with several).

    Attributes:
        keys, values: One array a layer; number `row * heads + head` is the matrix of a head.
        length: How many slots are filled, padding included.
        start: How many slots of padding each row begins with; None if no row has any.
    """

    keys: tuple[Float[Array, "batch_head slot feature"], ...]
    values: tuple[Float[Array, "batch_head slot feature"], ...]
    length: Int[Array, ""]
    start: Int[Array, " batch"] | None

    @property
    def max_length(self) -> int:
        """How many slots each row has."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def aligned(self, lengths: Int[Array, " batch"]) -> "KVCache":
        """The cache of rows that begin at their first slot, so that all end at one.

        Args:
            lengths: How many slots of each row are filled; what stands behind them is given up.
        """
        length = lengths.max()
        start = length - lengths
        slots = jnp.maximum(jnp.arange(self.max_length)[None] - start[:, None], 0)
        heads = self.keys[0].shape[0] // lengths.shape[0]
        slots = jnp.repeat(slots, heads, axis=0)

        def moved(held: Array) -> Array:
            return jax.vmap(lambda matrix, slots: matrix.at[slots].get(mode="promise_in_bounds"))(
                held, slots
            )

        keys, values = (tuple(map(moved, arrays)) for arrays in (self.keys, self.values))
        return KVCache(keys, values, length.astype(jnp.int32), start.astype(jnp.int32))

    def layer(self, index: int) -> LayerCache:
        """The view of one layer, for `LlamaDecoderLayer`."""
        return LayerCache(self.keys[index], self.values[index], self.length, self.start)


@runtime_checkable
class CachedConfig(Protocol):
    """What the cache needs to know of a model's configuration."""

    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int


def init_cache(
    config: CachedConfig,
    batch: int,
    max_length: int,
    *,
    dtype: DTypeLike,
    padding: Int[Array, " batch"] | None = None,
) -> KVCache:
    """An empty cache.

    Args:
        config: The model's configuration.
        batch: How many rows decode together.
        max_length: Slots per row: the (padded) prompt plus the tokens to generate.
        dtype: Of keys and values; the model's compute dtype.
        padding: How many tokens of padding stand left of each row's prompt; None for none, which
            is known when a step is traced and lets its attention be simpler.
    """
    if batch < 1 or max_length < 1:
        raise ValueError(
            f"A cache needs at least one row and one slot; got batch={batch}, "
            f"max_length={max_length}."
        )
    shape = (batch * config.num_key_value_heads, max_length, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        length=jnp.zeros((), jnp.int32),
        start=None if padding is None else padding.astype(jnp.int32),
    )
