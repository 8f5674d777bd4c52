"""The true output error of a pruned weight, from the Gram matrix of its layer's input.

The metric is a proxy: what the shuffle and the mask are meant to make small is the change of the
layer's output over the calibration tokens, equation (4). With H = X^T X it needs no second pass
over them: ||X W^T - X V^T||_F^2 = trace((W - V) H (W - V)^T). Like the other statistics H is a
monoid:

    gram = init_gram(channels)
    for activations in batches: gram = update_gram(gram, activations)
    output_error(weight, pruned, gram)

Source: E-Sparse, section 3.3, equation (4), without its factor 1/2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Differences of weights that are held in float32 at once, beside as many products.
_TILE_ELEMENTS = 1 << 22


class GramMatrix(NamedTuple):
    """The products of all pairs of input channels, summed over the tokens: H = X^T X.

    Takes channel * channel * 4 bytes. The diagonal is the `sum_of_squares` of the other
    statistics.
    """

    products: Float[Array, "channel channel"]
    tokens: Int[Array, ""]


def init_gram(channels: int) -> GramMatrix:
    """The Gram matrix of `channels` input channels before any activation was seen.

    Raises:
        ValueError: No number of channels.
    """
    if channels < 0:
        raise ValueError(f"a layer has 0 or more input channels; got channels={channels}.")
    return GramMatrix(
        products=jnp.zeros((channels, channels), jnp.float32), tokens=jnp.zeros((), jnp.int32)
    )


@jax.jit
def update_gram(gram: GramMatrix, activations: Float[Array, "token channel"]) -> GramMatrix:
    """The Gram matrix after these activations as well.

    Args:
        activations: Inputs of the layer; of any float dtype. Their products are taken at the
            highest precision and summed in float32.

    Raises:
        ValueError: another number of channels.
    """
    channels = gram.products.shape[0]
    if activations.shape[1] != channels:
        raise ValueError(
            f"this Gram matrix is of {channels} input channels; the activations [token, channel] "
            f"have the shape {activations.shape}."
        )
    # The product of two 16-bit numbers is exact in float32, so they are not widened first: an
    # accelerator then multiplies in its fast units.
    products = jax.lax.dot_general(
        activations,
        activations,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return GramMatrix(gram.products + products, gram.tokens + activations.shape[0])


@jax.jit
def merge_gram(a: GramMatrix, b: GramMatrix) -> GramMatrix:
    """The Gram matrix of a layer that saw both inputs.

    Raises:
        ValueError: the two have different numbers of channels.
    """
    if a.products.shape != b.products.shape:
        raise ValueError(
            f"Gram matrices merge when both are of the same channels; one has "
            f"{a.products.shape[0]}, the other {b.products.shape[0]}."
        )
    return GramMatrix(a.products + b.products, a.tokens + b.tokens)


@jax.jit
def row_errors(
    weight: Float[Array, "out channel"], pruned: Float[Array, "out channel"], gram: GramMatrix
) -> Float[Array, " out"]:
    """The squared error of every output, summed over the tokens that the Gram matrix saw.

    Row by row `output_error`: each output depends on its own row of the weight alone. The rows
    are taken in tiles, so beside the arguments only some ten megabytes are held.

    Args:
        weight: The dense weight, of any float dtype; flax's kernel transposed.
        pruned: What takes its place, masked or changed otherwise.

    Returns:
        In float32, never negative; exactly 0 where the two rows are the same.

    Raises:
        ValueError: weight and Gram matrix have different numbers of channels.

    Source: E-Sparse, section 3.3, equation (4).
    """
    out, channels = weight.shape
    if gram.products.shape[0] != channels:
        raise ValueError(
            f"the Gram matrix is of {gram.products.shape[0]} input channels; the weight "
            f"[out, channel] has the shape {weight.shape}. A flax kernel is [channel, out]: give "
            f"its transpose."
        )
    size = min(out, max(1, _TILE_ELEMENTS // max(channels, 1)))

    def tile(start, rows):
        def slice_rows(array):
            return jax.lax.dynamic_slice_in_dim(array, start, rows).astype(jnp.float32)

        difference = slice_rows(weight) - slice_rows(pruned)
        product = jnp.matmul(difference, gram.products, precision=jax.lax.Precision.HIGHEST)
        # The matrix is positive semidefinite but for rounding.
        return jnp.maximum((product * difference).sum(axis=1), 0.0)

    tiles, rest = divmod(out, max(size, 1))
    starts = size * jnp.arange(tiles, dtype=jnp.int32)
    whole = jax.lax.map(lambda start: tile(start, size), starts).reshape(-1)
    return jnp.concatenate([whole, tile(out - rest, rest)]) if rest else whole


@jax.jit
def output_error(
    weight: Float[Array, "out channel"], pruned: Float[Array, "out channel"], gram: GramMatrix
) -> Float[Array, ""]:
    """How far the layer's output moves: ||X W^T - X V^T||_F^2 over the calibration tokens.

    Args, Raises: as for `row_errors`, whose sum it is.

    Source: E-Sparse, section 3.3, equation (4).
    """
    return row_errors(weight, pruned, gram).sum()


@jax.jit
def relative_output_error(
    weight: Float[Array, "out channel"], pruned: Float[Array, "out channel"], gram: GramMatrix
) -> Float[Array, ""]:
    """`output_error` as a share of the dense output's ||X W^T||_F^2.

    Returns:
        0 for the dense weight itself and 1 for a weight of zeros, whatever the scale. A weight
        that moves an output of 0 has inf.

    Raises:
        ValueError: weight and Gram matrix have different numbers of channels.
    """
    dense = row_errors(weight, jnp.zeros_like(weight), gram)
    return relative_error(row_errors(weight, pruned, gram), dense)


def relative_error(
    errors: Float[Array, " out"], energies: Float[Array, " out"]
) -> Float[Array, ""]:
    """The share that these rows' errors have in their energies; nan where they are nan."""
    error = errors.sum()
    return jnp.where(error == 0, 0.0, error / energies.sum())
