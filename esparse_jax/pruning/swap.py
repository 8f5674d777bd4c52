"""Swap search: exchange channels between groups as long as the retained metric rises.

The layout of everything here is `[block, row, slot, group]`: blocks are independent problems,
a group holds one channel per slot, and the group axis is innermost, so that every step below is
elementwise over long contiguous runs, whatever the pattern.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num, UInt32

from esparse_jax.pruning.mask import NMPattern
from esparse_jax.pruning.max_sum import max_sum

# The first phase ends after so many rounds in a row with few swaps.
_POOR_ROUNDS = 2
# Slots of one tile of the settling phase.
_TILE_SLOTS = 128
# Rounds of mutual choice per matching; most pairs are found in the first few.
_MATCH_ROUNDS = 8


def thresholds(
    values: Num[Array, "block row slot group"], pattern: NMPattern
) -> Num[Array, "block row slot group"]:
    """What a channel put in a slot must beat to be kept: the n-th largest of the others there.

    With a the n-th and b the (n+1)-th largest of the whole group, it is b for a slot whose own
    value is at least a (it is one of the n) and a for the rest, ties included.
    """
    nth, next_largest = largest(values, pattern)[-2:]
    return jnp.where(values >= nth[:, :, None], next_largest[:, :, None], nth[:, :, None])


def largest(
    values: Num[Array, "block row slot group"], pattern: NMPattern
) -> list[Num[Array, "block row group"]]:
    """The n + 1 largest over the slots, descending, by insertion: no sort, no top_k."""
    top: list[Array] = []
    for slot in range(pattern.m):
        value = values[:, :, slot]
        for place, held in enumerate(top):
            top[place] = jnp.maximum(held, value)
            value = jnp.minimum(held, value)
        if len(top) <= pattern.n:
            top.append(value)
    return top


class Search(NamedTuple):
    """A search under way: the channels in their places, and their scores in the same places."""

    order: Int[Array, "block slot group"]
    values: Num[Array, "block row slot group"]


def _tolerance(sums, rows):
    """Gains that rounding alone can make. Integer sums are exact, so there it is 0."""
    if jnp.issubdtype(sums.dtype, jnp.integer):
        return jnp.zeros_like(sums)
    return sums * (float(jnp.finfo(sums.dtype).eps) * math.sqrt(rows))


def _match(gain: Num[Array, "block group group"]) -> Int[Array, "block group"]:
    """Pairs groups greedily by gain: each group's partner, or the group itself.

    A pair is made when each is the other's best free choice; equal gains go to the lower index,
    with which at least one pair is made as long as any gain is positive.
    """
    blocks, groups, _ = gain.shape
    own = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.int32)[None], (blocks, groups))

    def unfinished(state):
        _, _, found, round_ = state
        return found & (round_ < _MATCH_ROUNDS)

    def choose(state):
        partner, free, _, round_ = state
        open_gain = jnp.where(free[:, :, None] & free[:, None, :], gain, 0)
        best = jnp.argmax(open_gain, axis=2).astype(jnp.int32)
        wanted = jnp.max(open_gain, axis=2) > 0
        mutual = wanted & (jnp.take_along_axis(best, best, axis=1) == own)
        return jnp.where(mutual, best, partner), free & ~mutual, mutual.any(), round_ + 1

    state = (own, jnp.ones_like(own, bool), jnp.array(True), 0)
    return jax.lax.while_loop(unfinished, choose, state)[0]


def drawn_bits(round_: Int[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Random bits for a round, by an integer hash: alike on every device and in every version.

    (And `jax.random`'s own generator takes longer to compile on a CPU than the whole search.)
    The hash is lowbias32, https://nullprogram.com/blog/2018/07/31/.
    """
    place = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = place * jnp.uint32(0x9E3779B9) + round_.astype(jnp.uint32)
    for _ in range(2):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
        bits = bits ^ (bits >> 16)
    return bits


def scatter_phase(
    search: Search, real: Bool[Array, "block group"], pattern: NMPattern
) -> tuple[Search, Int[Array, ""]]:
    """The first, cheap phase: one slot of every group, drawn at random, is up for exchange.

    A round looks at 1 / M^2 of all pairs and exchanges up to half of the groups, which finds
    most of the gain for a small part of the cost. It ends when rounds bring fewer swaps than
    the same work would in `settle_phase`.

    Returns:
        The search, and how many rounds it took.
    """
    blocks, rows, slots, groups = search.values.shape
    enough = groups * blocks // (4 * slots * slots)  # swaps a round
    slot_index = jnp.arange(slots, dtype=jnp.int32)[None, :, None]
    allowed = real[:, :, None] & real[:, None, :] & ~jnp.eye(groups, dtype=bool)[None]

    def unfinished(state):
        _, poor, _ = state
        return poor < _POOR_ROUNDS

    def exchange(state):
        search, poor, rounds = state
        slot = (drawn_bits(rounds, (blocks, 1, groups)) >> 16) % slots
        chosen = slot_index == slot.astype(jnp.int32)
        nth, next_largest = largest(search.values, pattern)[-2:]
        value = jnp.where(chosen[:, None], search.values, 0).sum(axis=2)
        threshold = jnp.where(value >= nth, next_largest, nth)
        own = 2 * jnp.maximum(threshold, value).sum(axis=1)  # doubled, as all sums here
        kept = max_sum(threshold, value)
        before = own[:, :, None] + own[:, None, :]
        gain = (kept + jnp.swapaxes(kept, 1, 2)) - before
        gain = jnp.where(allowed & (gain > _tolerance(before, rows)), gain, 0)
        partner = _match(gain)
        swaps = (partner != jnp.arange(groups)[None]).sum() // 2
        channel = jnp.where(chosen, search.order, 0).sum(axis=1)
        new_channel = jnp.take_along_axis(channel, partner, axis=1)
        new_value = jnp.take_along_axis(value, partner[:, None], axis=2)
        search = Search(
            jnp.where(chosen, new_channel[:, None], search.order),
            jnp.where(chosen[:, None], new_value[:, :, None], search.values),
        )
        return search, jnp.where(swaps <= enough, poor + 1, 0), rounds + 1

    state = (search, 0, jnp.int32(0))
    search, _, rounds = jax.lax.while_loop(unfinished, exchange, state)
    return search, rounds


def tile_groups(pattern: NMPattern, groups: int) -> int:
    """Groups that one round of `settle_phase` compares with their block."""
    return min(groups, max(1, _TILE_SLOTS // pattern.m))


def settle_phase(
    search: Search,
    real: Bool[Array, "block group"],
    pattern: NMPattern,
    *,
    waiting: Bool[Array, "block group"] | None = None,
) -> tuple[Search, Int[Array, ""]]:
    """The second phase: swaps until no swap between two groups of a block improves.

    Groups wait in a queue, first all of them. A tile of waiting groups is compared, slot by slot,
    with its whole block. Of the pairs that gain, the best disjoint ones are exchanged, and the
    groups touched wait again; a group that gains nowhere leaves. A pair of two groups outside the
    queue was compared after either last changed, so when the queue is empty no swap improves.

    Args:
        waiting: The groups that changed since the search last settled; None: all of them.

    Returns:
        The search, and how many rounds it took.
    """
    blocks, rows, slots, groups = search.values.shape
    tile = tile_groups(pattern, groups)
    idle = jnp.iinfo(jnp.int32).max
    block_index = jnp.arange(blocks)[:, None]
    group_index = jnp.arange(groups, dtype=jnp.int32)

    def unfinished(state):
        return (state[1] < idle).any()

    def exchange(state):
        search, waiting, round_ = state
        values = search.values
        # Those that wait longest; in ascending order, so that ties fall to the lower group.
        taken = jnp.sort(jnp.argsort(waiting, axis=1, stable=True)[:, :tile], axis=1)
        active = jnp.take_along_axis(waiting, taken, axis=1) < idle
        limit = thresholds(values, pattern)
        own = 2 * jnp.maximum(limit, values).sum(axis=1)  # [block, slot, group]

        tile_values = jnp.take_along_axis(values, taken[:, None, None], axis=3)
        tile_limit = jnp.take_along_axis(limit, taken[:, None, None], axis=3)
        flat = (blocks, rows, slots * groups)
        tile_flat = (blocks, rows, slots * tile)
        kept = max_sum(tile_limit.reshape(tile_flat), values.reshape(flat)) + max_sum(
            tile_values.reshape(tile_flat), limit.reshape(flat)
        )
        tile_own = jnp.take_along_axis(own, taken[:, None], axis=2)
        before = tile_own.reshape(blocks, -1, 1) + own.reshape(blocks, 1, -1)
        gain = jnp.where(kept - before > _tolerance(before, rows), kept - before, 0)
        # [block, tile, group, slot * slot]: the best pair of slots for each pair of groups.
        gain = gain.reshape(blocks, slots, tile, slots, groups).transpose(0, 2, 4, 1, 3)
        gain = gain.reshape(blocks, tile, groups, slots * slots)
        slot_pair = jnp.argmax(gain, axis=3).astype(jnp.int32)
        gain = gain.max(axis=3)
        allowed = (
            (active & jnp.take_along_axis(real, taken, axis=1))[:, :, None]
            & real[:, None, :]
            & (taken[:, :, None] != group_index[None, None, :])
        )
        gain = jnp.where(allowed, gain, 0)
        hopeless = gain.max(axis=2) == 0

        place = jnp.full((blocks, groups), tile, jnp.int32)
        place = place.at[block_index, taken].set(
            jnp.where(active, jnp.arange(tile, dtype=jnp.int32)[None], tile), unique_indices=True
        )
        partner = _match_tile(gain, taken, place)
        # A pair inside the tile is seen from both sides; the lower group speaks for it.
        inside = jnp.take_along_axis(place, partner, axis=1) < tile
        swapped = (partner != taken) & ~(inside & (partner < taken))
        pair = jnp.take_along_axis(slot_pair, partner[:, :, None], axis=2)[:, :, 0]
        here = taken + groups * (pair // slots)
        there = partner + groups * (pair % slots)

        waiting = waiting.at[block_index, taken].set(
            jnp.where(active & ~hopeless, round_, idle), unique_indices=True
        )
        for group in (taken, partner):
            waiting = waiting.at[block_index, jnp.where(swapped, group, groups)].set(
                round_, mode="drop"
            )
        return _swap(search, here, there, swapped), waiting, round_ + 1

    waiting = jnp.where(real if waiting is None else waiting, 0, idle).astype(jnp.int32)
    state = (search, waiting, jnp.int32(1))
    search, _, rounds = jax.lax.while_loop(unfinished, exchange, state)
    return search, rounds - 1


def _match_tile(
    gain: Num[Array, "block tile group"],
    taken: Int[Array, "block tile"],
    place: Int[Array, "block group"],
) -> Int[Array, "block tile"]:
    """`_match` where only the groups of a tile know their gains: each one's partner or itself.

    `place` gives where in the tile a group is, `tile` for groups outside it. Those choose among
    the tile's groups only, which is all they need: pairs without a tile group have no gain here.
    """
    blocks, tile, groups = gain.shape
    block_index = jnp.arange(blocks)[:, None]
    tile_index = jnp.arange(tile, dtype=jnp.int32)[None]

    def unfinished(state):
        _, _, found, round_ = state
        return found & (round_ < _MATCH_ROUNDS)

    def choose(state):
        partner, free, _, round_ = state
        tile_free = jnp.take_along_axis(free, taken, axis=1)
        open_gain = jnp.where(tile_free[:, :, None] & free[:, None, :], gain, 0)
        best = jnp.argmax(open_gain, axis=2).astype(jnp.int32)
        wanted = jnp.max(open_gain, axis=2) > 0
        outside = jnp.argmax(open_gain, axis=1).astype(jnp.int32)
        best_place = jnp.take_along_axis(place, best, axis=1)
        back = jnp.take_along_axis(best, jnp.minimum(best_place, tile - 1), axis=1)
        mutual = wanted & jnp.where(
            best_place < tile,
            back == taken,
            jnp.take_along_axis(outside, best, axis=1) == tile_index,
        )
        for group in (taken, best):
            free = free.at[block_index, jnp.where(mutual, group, groups)].set(False, mode="drop")
        return jnp.where(mutual, best, partner), free, mutual.any(), round_ + 1

    state = (taken, jnp.ones((blocks, groups), bool), jnp.array(True), 0)
    return jax.lax.while_loop(unfinished, choose, state)[0]


def _swap(search, here, there, swapped):
    """Exchanges the places `here` and `there` (slot-major), where `swapped`."""
    blocks, _, slots, groups = search.values.shape
    places = slots * groups
    block_index = jnp.arange(blocks)[:, None]
    source = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32)[None], (blocks, places))
    for to, of in ((here, there), (there, here)):
        # Out of range where nothing is swapped: such updates are dropped.
        to = jnp.where(swapped, to, places)
        source = source.at[block_index, to].set(of, mode="drop")
    return move_channels(search, source)


def move_channels(search: Search, source: Int[Array, "block place"]) -> Search:
    """Fills each place (slot-major) with the channel that is at its source."""
    order = search.order.reshape(source.shape)
    order = jnp.take_along_axis(order, source, axis=1).reshape(search.order.shape)
    # All columns, though few move: a gather of everything costs less here than a scatter.
    blocks, rows, slots, groups = search.values.shape
    values = search.values.reshape(blocks, rows, slots * groups)
    values = jnp.take_along_axis(values, source[:, None], axis=2)
    return Search(order, values.reshape(search.values.shape))


def start_search(
    scores: Num[Array, "row channel"], order: Int[Array, "block group slot"]
) -> tuple[Search, Bool[Array, "block group"]]:
    """Brings the scores into the layout of the search; which groups are no filling."""
    real = order[:, :, 0] >= 0
    places = order.transpose(0, 2, 1)
    values = jnp.where(real[:, None, None], scores[:, places].transpose(1, 0, 2, 3), 0)
    return Search(places, values), real
