"""N:M masks from scores, and whether something is N:M (E-Sparse, section 3.3).

The tie rule of the whole package lives here and nowhere else: of equal scores the lower channel
is kept.
"""

import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# Up to this group size ranks come from comparing all pairs (elementwise, no sort); pairs grow
# with the square of the group, so beyond it a sort is cheaper.
_MAX_COMPARED_GROUP = 16


@dataclass(frozen=True)
class NMPattern:
    """At most `n` weights of every `m` consecutive input channels stay: 2:4, 4:8, 1:4, ...

    `n` counts the *kept* weights (Zhou et al. 2021, arXiv 2102.04010, and the hardware).
    The prose of E-Sparse counts the pruned ones; its two patterns, 2:4 and 4:8, are the same
    either way.

    Args:
        n: Weights kept in a group, 1 to m.
        m: Neighbouring input channels in a group.

    Raises:
        TypeError: n or m is not an int.
        ValueError: not 1 <= n <= m.
    """

    n: int
    m: int

    def __post_init__(self):
        for name, value in (("n", self.n), ("m", self.m)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(
                    f"an N:M pattern takes two ints, for example NMPattern(2, 4); "
                    f"{name} is {value!r}, a {type(value).__name__}."
                )
        if not 1 <= self.n <= self.m:
            raise ValueError(
                f"an N:M pattern keeps N of every M weights, so 1 <= N <= M; got {self.n}:{self.m}."
            )

    @classmethod
    def parse(cls, text: str) -> "NMPattern":
        """Reads "2:4".

        Raises:
            ValueError: the text is not two positive whole numbers N <= M around a colon.
        """
        match = re.fullmatch(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*", text)
        if match is None:
            raise ValueError(
                f"an N:M pattern is written as two whole numbers with a colon between, "
                f"for example 2:4 or 4:8; got {text!r}."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def groups(self, channels: int) -> int:
        """The number of groups in `channels` input channels.

        Raises:
            ValueError: `channels` is not a multiple of m.
        """
        if channels % self.m:
            raise ValueError(
                f"{self} pruning groups {self.m} neighbouring input channels, so their number must "
                f"be a multiple of {self.m}; this one has {channels}. Leave that layer dense, or "
                f"take a pattern whose M divides {channels}."
            )
        return channels // self.m


@partial(jax.jit, static_argnames="pattern")
def nm_mask(metric: Float[Array, "out channel"], pattern: NMPattern) -> Bool[Array, "out channel"]:
    """Which weights stay: the n largest scores of every m consecutive channels of each row.

    Exactly n in every group. Of equal scores the lower channel stays; a nan ranks below
    everything, so that the mask is N:M whatever the scores are.

    Returns:
        True keeps.

    Raises:
        ValueError: the number of channels is not a multiple of m.

    Source: E-Sparse, section 3.3, the N:M constraint of equations (4) and (5).
    Paper silent: which of equal scores is kept.
    """
    out, channels = metric.shape
    grouped = metric.reshape(out, pattern.groups(channels), pattern.m)
    grouped = jnp.where(jnp.isnan(grouped), -jnp.inf, grouped)
    if pattern.m <= _MAX_COMPARED_GROUP:
        # rank_i = #{j: v_j > v_i} + #{j < i: v_j == v_i}
        this = grouped[..., :, None]
        other = grouped[..., None, :]
        position = jnp.arange(pattern.m)
        lower = (position[None, :] < position[:, None])[None, None]
        ahead = (other > this) | ((other == this) & lower)
        rank = ahead.sum(axis=-1, dtype=jnp.int32)
    else:
        order = jnp.argsort(-grouped, axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
    return (rank < pattern.n).reshape(out, channels)


@partial(jax.jit, static_argnames="pattern")
def nm_violations(
    weight: Shaped[Array, "out channel"], pattern: NMPattern
) -> Bool[Array, "out group"]:
    """The groups that hold more than n non-zeros; a nan is a non-zero, -0.0 is not.

    Args:
        weight: Weights, or a mask.

    Raises:
        ValueError: the number of channels is not a multiple of m.
    """
    out, channels = weight.shape
    nonzero = (weight != 0).reshape(out, pattern.groups(channels), pattern.m)
    return nonzero.sum(axis=-1, dtype=jnp.int32) > pattern.n


@partial(jax.jit, static_argnames="pattern")
def is_nm(weight_or_mask: Shaped[Array, "out channel"], pattern: NMPattern) -> Bool[Array, ""]:
    """Whether no group of m consecutive channels holds more than n non-zeros.

    Raises:
        ValueError: the number of channels is not a multiple of m.
    """
    return ~nm_violations(weight_or_mask, pattern).any()


@partial(jax.jit, static_argnames="pattern")
def retained_metric(
    metric: Float[Array, "out channel"],
    pattern: NMPattern,
    permutation: Int[Array, " channel"] | None = None,
) -> Float[Array, ""]:
    """What N:M pruning keeps of the metric, summed over the layer: what a shuffle maximises.

    Args:
        metric: Scores, higher keeps.
        permutation: Channel order in which the groups are formed; the given one without it.

    Returns:
        The sum in float32.

    Source: E-Sparse, section 3.3, equation (5).
    """
    if permutation is not None:
        metric = metric[:, permutation]
    return jnp.where(nm_mask(metric, pattern), metric.astype(jnp.float32), 0.0).sum()
