"""Channel shuffles: orders of the input channels in which N:M pruning keeps more of the metric.

A permutation is the new order of channels: `x[:, permutation]` is the shuffled array, and its
groups are every m consecutive entries.

Source: E-Sparse, section 3.3 and algorithm 1.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from esparse_jax.pruning.assignment import assignment_phase
from esparse_jax.pruning.escape import escape_phase
from esparse_jax.pruning.fixed_point import fixed_scores
from esparse_jax.pruning.mask import NMPattern, retained_metric
from esparse_jax.pruning.swap import scatter_phase, settle_phase, start_search

SHUFFLES = ("none", "global", "paper", "strided", "full", "assignment")

# Channels in a block: the paper's, and those that "strided" spreads over the whole order. On scores
# like those of `benchmarks/shuffle.py`, 4,096 channels x 512 rows at 2:4, dealt "sorted", blocks of
# 256, 512, 1,024, 2,048 and all channels recover 45.0, 46.3, 47.4, 48.4 and 49.2 % at 6, 11, 18, 35
# and 62 e9 max-adds. Up to 1,024 channels the strided search is the full one.
PAPER_BLOCK = 256
STRIDED_BLOCK = 1024

Deal = Literal["naive", "snake", "sorted"]
Layout = Literal["contiguous", "strided"]
Scores = Literal["fixed", "float32"]


@partial(jax.jit, static_argnames=("pattern", "deal", "slices"))
def global_naive_shuffle(
    metric: Float[Array, "row channel"],
    pattern: NMPattern,
    *,
    deal: str = "naive",
    slices: int = 1,
) -> Int[Array, " channel"]:
    """Spreads the strong channels: every group gets one channel of each m-th of the ranking.

    Channels are ranked by their mean metric, descending (equal means: lower channel first; the
    means are exact, see `fixed_scores`, so the ranking is the same on every device). The ranking
    is cut into m parts and group g takes the g-th of each part.

    Args:
        deal: "naive" counts every part from its strong end, so the first group is the strongest
            throughout; "snake" counts every other part from its weak end, which evens that out.
            "sorted" does not deal at all: neighbours in the ranking form a group. By itself that
            is the worst order there is, but a search that starts there ends highest: its first
            swaps pair the extremes (full width, 2:4, of `benchmarks/shuffle.py`: efficacy 42.1 %,
            after "naive" 41.3 %, after "snake" 40.5 %).
        slices: That many equal slices of the channels keep their channels to themselves.

    Source: E-Sparse, section 3.3, global naive shuffle, figure 3a.
    Paper silent: how the parts are dealt out ("shuffles the channels with close means into
    different sparse groups").
    """
    _choice("deal", deal, get_args(Deal))
    channels = _slice_channels(metric.shape[1], pattern, slices)
    means = fixed_scores(metric).sum(axis=0).reshape(slices, channels)
    ranking = jnp.argsort(-means, axis=1, stable=True).astype(jnp.int32)
    if deal == "sorted":
        groups = ranking.reshape(slices, channels // pattern.m, pattern.m)
    else:
        parts = ranking.reshape(slices, pattern.m, channels // pattern.m)
        if deal == "snake":
            parts = parts.at[:, 1::2].set(parts[:, 1::2, ::-1])
        groups = parts.transpose(0, 2, 1)
    offset = channels * jnp.arange(slices, dtype=jnp.int32)
    return _permutation(groups + offset[:, None, None])


@partial(jax.jit, static_argnames=("pattern", "block_size", "layout", "scores", "slices", "escape"))
def local_block_shuffle(
    metric: Float[Array, "row channel"],
    pattern: NMPattern,
    permutation: Int[Array, " channel"],
    *,
    block_size: int | None = 256,
    layout: str = "contiguous",
    scores: str = "fixed",
    slices: int = 1,
    escape: int = 0,
) -> Int[Array, " channel"]:
    """Swaps channels between groups of a block until no swap raises the retained metric.

    Args:
        permutation: The order to start from.
        block_size: Channels in a block; swaps stay inside it. Where the channels are no multiple
            of it there are ceil(channels / block_size) nearly equal blocks of whole groups.
            None: one block of all channels.
        layout: "contiguous" blocks are runs of neighbouring groups (the paper); in "strided"
            ones block b of B takes groups b, b + B, b + 2 B, ..., so that after a global shuffle
            every block holds strong and weak groups alike.
        scores: "fixed" rounds the metric to int32 fixed point (`fixed_scores`): every swap is
            then decided exactly, alike on any device. "float32" adds as it comes, and takes
            gains beyond the rounding error of such sums. Equal gains fall to the lower group.
        slices: That many equal slices of the channels, each permuted only inside itself;
            `permutation` has to respect them.
        escape: Then so many times: disturb a few groups at random, search again, and keep the
            better (`escape.py`). On the scores of `benchmarks/shuffle.py` with 512 channels and
            1,024 rows ten times bring the efficacy of "full" from 42.9 to 43.7 %.

    Returns:
        A permutation whose retained metric is at least that of the given one. Each group lists
        its channels in ascending order, so that ties fall to the lower channel.

    Raises:
        ValueError: channels not divisible into slices of whole groups; unknown option.

    Source: E-Sparse, section 3.3, local block shuffle, algorithm 1; block_size 256 there.
    Paper silent: the search beyond "classic greedy"; ours is in `swap.py`.
    """
    _choice("layout", layout, get_args(Layout))
    _choice("scores", scores, get_args(Scores))
    channels = _slice_channels(metric.shape[1], pattern, slices)
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is a number of channels, or None for all; got {block_size}.")
    blocks = _blocks(channels // pattern.m, pattern, block_size or channels, layout, slices)
    groups = permutation.astype(jnp.int32).reshape(-1, pattern.m)
    order = jnp.where((blocks >= 0)[:, :, None], groups[np.maximum(blocks, 0)], -1)
    order = _search(_scores(metric, scores), order, pattern, scatter_phase, escape)
    block, place = np.nonzero(blocks >= 0)
    return _permutation(groups.at[blocks[block, place]].set(order[block, place]))


@partial(jax.jit, static_argnames=("pattern", "scores", "slices", "escape"))
def assignment_shuffle(
    metric: Float[Array, "row channel"],
    pattern: NMPattern,
    permutation: Int[Array, " channel"],
    *,
    scores: str = "fixed",
    slices: int = 1,
    escape: int = 0,
) -> Int[Array, " channel"]:
    """Reassigns one channel of every group at once, optimally, until little is gained; then swaps.

    It ends, like `local_block_shuffle` with block_size=None, where no swap improves. Needs scipy
    (which jax brings) and a host callback for the assignments.

    Args:
        permutation: The order to start from.
        scores: See `local_block_shuffle`.
        slices: That many equal slices of the channels, each permuted only inside itself;
            `permutation` has to respect them.
        escape: See `local_block_shuffle`.

    Returns:
        A permutation whose retained metric is at least that of the given one.

    Raises:
        ValueError: channels not divisible into slices of whole groups; unknown option.

    Source: after RIA's channel permutation (ICLR 2024); not in E-Sparse.
    """
    _choice("scores", scores, get_args(Scores))
    _slice_channels(metric.shape[1], pattern, slices)
    order = permutation.astype(jnp.int32).reshape(slices, -1, pattern.m)
    score = _scores(metric, scores)
    return _permutation(_search(score, order, pattern, _assignment_phase, escape))


@partial(
    jax.jit,
    static_argnames=("pattern", "method", "block_size", "deal", "scores", "slices", "escape"),
)
def channel_shuffle(
    metric: Float[Array, "row channel"],
    pattern: NMPattern,
    *,
    method: str = "strided",
    block_size: int | None = None,
    deal: str | None = None,
    scores: str = "fixed",
    slices: int = 1,
    escape: int = 0,
) -> Int[Array, " channel"]:
    """The channel order in which to prune, by one of `SHUFFLES`.

    Projections that read the same input share one permutation: stack their metrics as rows.

    Args:
        metric: Scores, higher keeps, one row per output.
        method: "none": the given order. "global": `global_naive_shuffle`. "paper": then
            `local_block_shuffle` in contiguous blocks (algorithm 1). "strided": in strided ones.
            "full": then in one block of all channels as well. "assignment": after the global
            shuffle, `assignment_shuffle`.
        block_size: See `local_block_shuffle`. None: 256 for "paper", 1,024 for the others.
        deal: See `global_naive_shuffle`. None: "naive" for "global" and "paper", "sorted" for
            the searches that are ours.
        scores: See `local_block_shuffle`.
        slices: That many equal slices of the channels, each permuted only inside itself.
        escape: See `local_block_shuffle`; for the methods that search.

    Returns:
        A permutation. Those of "strided", "full" and "assignment" retain at least what the given
        order does: where a search, which starts elsewhere, ends below it, that is returned.

    Raises:
        ValueError: unknown method; channels not divisible into slices of whole groups.

    Source: E-Sparse, section 3.3.
    Paper silent: everything but "global" and "paper". Starting a wide search in strided blocks
    costs less and ends higher than starting it wide (4,096 channels: 49.2 % for 62 e9 max-adds
    against 48.7 % for 94 e9).
    """
    _choice("method", method, SHUFFLES)
    channels = _slice_channels(metric.shape[1], pattern, slices)
    if method == "none":
        return jnp.arange(metric.shape[1], dtype=jnp.int32)
    if deal is None:
        deal = "naive" if method in ("global", "paper") else "sorted"
    if block_size is None:
        block_size = PAPER_BLOCK if method == "paper" else STRIDED_BLOCK
    start = global_naive_shuffle(metric, pattern, deal=deal, slices=slices)
    if method == "global":
        return start
    if method == "assignment":
        found = assignment_shuffle(
            metric, pattern, start, scores=scores, slices=slices, escape=escape
        )
        return _unless_worse(metric, pattern, found)
    search = partial(local_block_shuffle, metric, pattern, scores=scores, slices=slices)
    layout = "contiguous" if method == "paper" else "strided"
    if method != "full" or channels <= block_size:
        found = search(start, block_size=block_size, layout=layout, escape=escape)
    else:
        found = search(start, block_size=block_size, layout=layout)
        found = search(found, block_size=None, escape=escape)
    return found if method == "paper" else _unless_worse(metric, pattern, found)


def _unless_worse(metric, pattern, permutation):
    """The permutation, or the given order where that retains more."""
    given = jnp.arange(permutation.size, dtype=jnp.int32)
    return jnp.where(_gain(metric, pattern, permutation) >= 0, permutation, given)


@partial(
    jax.jit,
    static_argnames=(
        "pattern",
        "num_heads",
        "num_kv_heads",
        "method",
        "block_size",
        "deal",
        "scores",
        "slices",
        "escape",
    ),
)
def shuffle_heads(
    metric: Float[Array, "row channel"],
    pattern: NMPattern,
    *,
    num_heads: int,
    num_kv_heads: int,
    method: str = "full",
    block_size: int | None = None,
    deal: str | None = None,
    scores: str = "fixed",
    slices: int = 1,
    escape: int = 0,
) -> Int[Array, " channel"]:
    """A channel order for the attention output projection that the value projection can absorb.

    Channels stay inside their head, and the query heads that share a key/value head are permuted
    alike, so that the permutation can be folded into the rows of the value projection: see
    `channel_shuffle` for the options. One search over the key/value heads' channels, with the
    metrics of the query heads that share them stacked as rows.

    Args:
        metric: Scores of the output projection; its channels are the query heads one by one.
        slices: Equal slices of the channels that keep their channels to themselves. Channels
            inside their heads do so where every head is inside one slice, which is checked.

    Raises:
        ValueError: heads that do not divide the channels or each other, or hold no whole groups;
            slices that cut a head.
    """
    rows, channels = metric.shape
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly; "
            f"num_heads must be a multiple of num_kv_heads."
        )
    if num_heads < 1 or channels % (num_heads * pattern.m):
        raise ValueError(
            f"{channels} channels do not make {num_heads} heads of whole {pattern} groups: their "
            f"number must be a multiple of {num_heads} * {pattern.m}. Take a pattern whose M "
            f"divides the size of a head, or leave the heads free."
        )
    if slices < 1 or num_heads % slices:
        raise ValueError(
            f"{slices} slices cut through {num_heads} heads; to keep channels inside both, take "
            f"slices that divide the number of heads."
        )
    shared, size = num_heads // num_kv_heads, channels // num_heads
    stacked = metric.reshape(rows, num_kv_heads, shared, size).transpose(0, 2, 1, 3)
    permutation = channel_shuffle(
        stacked.reshape(rows * shared, num_kv_heads * size),
        pattern,
        method=method,
        block_size=block_size,
        deal=deal,
        scores=scores,
        slices=num_kv_heads,
        escape=escape,
    )
    inside = permutation.reshape(num_kv_heads, 1, size) % size
    first = size * jnp.arange(num_heads, dtype=jnp.int32).reshape(num_kv_heads, shared, 1)
    return (inside + first).reshape(-1)


def shuffle_residual(
    metrics: Sequence[Float[Array | np.ndarray, "_ channel"]],
    pattern: NMPattern,
    *,
    max_rows: int = 65536,
    method: str = "strided",
    block_size: int | None = None,
    deal: str | None = None,
    scores: str = "fixed",
    slices: int = 1,
    escape: int = 0,
) -> Int[Array, " channel"]:
    """One channel order for everything that reads the residual stream, in all layers.

    Query, key, value, gate and up of every block read the same channels, so one permutation that
    serves them all can be folded into whatever writes them, and costs nothing at inference. The
    objective is the sum of theirs: `channel_shuffle` of all rows stacked.

    Args:
        metrics: Scores of each linear (or of stacks of them), on the device or on the host.
        max_rows: Where there are more rows than that, the search sees so many of them, drawn by
            `residual_rows`. It bounds the memory: the search holds a few arrays of max_rows x
            channels, 1 GiB each for 65,536 x 4,096. The scores themselves need not be whole
            either: draw the rows first and score only those.
        method, block_size, deal, scores, slices, escape: See `channel_shuffle`.

    Returns:
        A permutation whose retained metric, summed over all rows given, is at least that of the
        given order; the given order itself where the search finds none better.

    Raises:
        ValueError: no metrics, or of different numbers of channels; else as `channel_shuffle`.

    Paper silent: that layers could share a permutation at all, and so what to do with a million
    rows (7B: 1.1 million). Of 10,496 rows of 320 channels (`examples/tiny-llama`) 4,096 bring
    71 % of what all bring, 1,024 bring 49 %; wider layers want more rows, hence the default.
    """
    if not metrics:
        raise ValueError("a shared permutation needs the metric of at least one linear; got none.")
    channels = {metric.shape[1] for metric in metrics}
    if len(channels) > 1:
        raise ValueError(
            f"linears that read one residual stream have the same input channels; got "
            f"{sorted(channels)}."
        )
    drawn = residual_rows([len(metric) for metric in metrics], max_rows)
    stack = [
        jnp.asarray(metric if len(rows) == len(metric) else metric[rows], jnp.float32)
        for metric, rows in zip(metrics, drawn, strict=True)
    ]
    permutation = channel_shuffle(
        jnp.concatenate(stack),
        pattern,
        method=method,
        block_size=block_size,
        deal=deal,
        scores=scores,
        slices=slices,
        escape=escape,
    )
    gain = sum(_gain(jnp.asarray(metric), pattern, permutation) for metric in metrics)
    return jnp.where(gain > 0, permutation, jnp.arange(permutation.size, dtype=jnp.int32))


def residual_rows(rows: Sequence[int], max_rows: int) -> list[Int[np.ndarray, " drawn"]]:
    """Which rows of each linear `shuffle_residual` looks at.

    All, where they are at most `max_rows`. Otherwise the rows of all linears in a line are cut
    into `max_rows` nearly equal runs and each run gives one row, so that every linear counts as
    much as it does in the sum. The place in the run follows the golden ratio: a fixed step would
    fall on the same few features of every head.

    Args:
        rows: The number of rows of each linear.

    Returns:
        Ascending row numbers, one array for each linear.

    Raises:
        ValueError: max_rows is not positive.

    Paper silent: all of it.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows is the number of rows to look at; got {max_rows}.")
    ends = np.cumsum([0, *rows])
    total = int(ends[-1])
    if total <= max_rows:
        return [np.arange(count) for count in rows]
    starts = np.arange(max_rows + 1) * total // max_rows
    golden = (math.sqrt(5) - 1) / 2
    place = np.arange(max_rows) * golden % 1
    drawn = starts[:-1] + (place * np.diff(starts)).astype(np.int64)
    return [
        drawn[(first <= drawn) & (drawn < end)] - first for first, end in itertools.pairwise(ends)
    ]


@partial(jax.jit, static_argnames="pattern")
def _gain(metric, pattern, permutation):
    return retained_metric(metric, pattern, permutation) - retained_metric(metric, pattern)


def _search(score, order, pattern, first_phase, kicks):
    """The search from an order [block, group, slot], in which -1 fills up short blocks."""
    if pattern.n == pattern.m:  # everything is kept whatever the order
        return order
    search, real = start_search(score, order)
    search, _ = first_phase(search, real, pattern)
    search, _ = settle_phase(search, real, pattern)
    search = escape_phase(search, real, pattern, kicks=kicks)
    return search.order.transpose(0, 2, 1)


def _assignment_phase(search, real, pattern):
    return assignment_phase(search, pattern), real


def _permutation(groups: Int[Array, "*groups slot"]) -> Int[Array, " channel"]:
    """Groups, laid out; ascending inside each, so that equal scores keep the lower channel."""
    return jnp.sort(groups, axis=-1).reshape(-1).astype(jnp.int32)


def _blocks(
    groups: int, pattern: NMPattern, block_size: int, layout: str, slices: int
) -> np.ndarray:
    """The groups of each block, [block, group], the shorter blocks filled up with -1."""
    count = min(-(-groups * pattern.m // block_size), groups)
    index = np.arange(groups)
    if layout == "contiguous":
        parts = np.array_split(index, count)
    else:
        parts = [index[block::count] for block in range(count)]
    widest = max(len(part) for part in parts)
    one = np.full((count, widest), -1, np.int32)
    for block, part in enumerate(parts):
        one[block, : len(part)] = part
    offset = groups * np.arange(slices, dtype=np.int32)[:, None, None]
    return np.where(one >= 0, one + offset, -1).reshape(slices * count, widest)


def _slice_channels(channels: int, pattern: NMPattern, slices: int) -> int:
    if slices == 1:
        pattern.groups(channels)  # says so if they do not fit
    elif slices < 1 or channels % (slices * pattern.m):
        raise ValueError(
            f"{pattern} groups do not fit: {channels} channels in {slices} equal slices of groups "
            f"of {pattern.m}. Their number must be a multiple of {slices} * {pattern.m}; take "
            f"fewer slices, a pattern whose M divides it, or leave the layer dense."
        )
    return channels // slices


def _scores(metric: Float[Array, "row channel"], scores: str) -> Num[Array, "row channel"]:
    return fixed_scores(metric) if scores == "fixed" else metric.astype(jnp.float32)


def _choice(name: str, value: str, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(allowed)}; got {value!r}.")
