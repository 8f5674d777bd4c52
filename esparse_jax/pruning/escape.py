"""Getting out of a local optimum of the swap search: kick, search again, keep the better."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Num

from esparse_jax.pruning.mask import NMPattern
from esparse_jax.pruning.swap import Search, drawn_bits, largest, move_channels, settle_phase

# Groups of a block that a kick mixes. Of 3 to 64, measured over 40 kicks on 128 groups, 4 to 8
# gained most for the rounds of search spent; fewer are mostly undone, more rarely recovered.
_KICKED_GROUPS = 8


def escape_phase(
    search: Search, real: Bool[Array, "block group"], pattern: NMPattern, *, kicks: int
) -> Search:
    """Tries `kicks` times to better a settled search, block by block.

    A kick mixes a few groups drawn at random: each slot is rolled along them by another number
    of places, which no single swap undoes. They settle anew, and a block that ends below what
    it was goes back, so a regression never outlives its kick.

    Source: iterated local search; not in E-Sparse.
    """
    blocks, _, slots, groups = search.values.shape
    mixed = min(_KICKED_GROUPS, groups - 1)  # one group of a block may be filling
    if kicks == 0 or mixed < 2:
        return search
    block_index = jnp.arange(blocks)[:, None]
    places = jnp.arange(slots * groups, dtype=jnp.int32).reshape(slots, groups)
    roll = (jnp.arange(slots)[:, None] + jnp.arange(mixed)[None]) % mixed

    def kick(count, best):
        bits = drawn_bits(count, (blocks, groups)) >> 1
        drawn = jnp.argsort(jnp.where(real, bits, jnp.uint32(1 << 31)), axis=1)
        drawn = drawn[:, :mixed].astype(jnp.int32)
        source = jnp.tile(places[None], (blocks, 1, 1))
        moved = drawn[:, roll] + places[None, :, :1]
        source = source.at[block_index, :, drawn].set(moved.transpose(0, 2, 1))
        kicked = move_channels(best, source.reshape(blocks, slots * groups))
        waiting = jnp.zeros_like(real).at[block_index, drawn].set(True)
        settled, _ = settle_phase(kicked, real, pattern, waiting=waiting)
        better = _above(_retained(settled.values, pattern), _retained(best.values, pattern))
        return Search(
            jnp.where(better[:, None, None], settled.order, best.order),
            jnp.where(better[:, None, None, None], settled.values, best.values),
        )

    return jax.lax.fori_loop(0, kicks, kick, search)


def _retained(
    values: Num[Array, "block row slot group"], pattern: NMPattern
) -> tuple[Num[Array, " block"], Num[Array, " block"]]:
    """The retained sum of each block: a high and a low part, exact for integers.

    The low part has 12 bits; for `fixed_scores` of up to 2^17 rows and 2^15 channels no sum
    overflows uint32.
    """
    kept = largest(values, pattern)[: pattern.n]
    if not jnp.issubdtype(values.dtype, jnp.integer):
        return sum(part.sum(axis=(1, 2)) for part in kept), jnp.zeros(len(values))
    kept = [part.astype(jnp.uint32) for part in kept]
    high = sum((part >> 12).sum(axis=1) for part in kept)
    low = sum((part & 0xFFF).sum(axis=1) for part in kept)
    high, low = (high + (low >> 12)).sum(axis=1), (low & 0xFFF).sum(axis=1)
    return high + (low >> 12), low & 0xFFF


def _above(one, two):
    return (one[0] > two[0]) | ((one[0] == two[0]) & (one[1] > two[1]))
