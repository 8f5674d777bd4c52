"""Drop-ins for `nnx.Linear`: one that watches its input, one that masks, one that is compressed;
and one that stands where a compressed one does in the dense twin of an inference model.

Each keeps what it adds in a Variable type of its own, so that `nnx.split(layer, CalibrationStats,
...)` separates statistics from weights and a compressed weight never passes for a parameter.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from esparse_jax.pruning.error import GramMatrix, update_gram
from esparse_jax.pruning.stats import ChannelRange, ChannelStats, update_range, update_stats
from esparse_jax.sparse.blob import Blob24, LibraryBlob24
from esparse_jax.sparse.compress import Compressed24
from esparse_jax.sparse.matmul import sparse_matmul


class Calibration(nnx.Variable):
    """What an `ObservedLinear` has seen; the base of all kinds."""


class CalibrationRange(Calibration):
    """Holds a `ChannelRange`: the first pass over the calibration data."""


class CalibrationStats(Calibration):
    """Holds a `ChannelStats`: the second pass, which needs the range."""


class CalibrationGram(Calibration):
    """Holds a `GramMatrix`, gathered beside either."""


class Mask(nnx.Variable):
    """Holds a mask `[out, channel]`; True keeps."""


class CompressedWeight(nnx.Variable):
    """Holds a `Compressed24`, or its device form."""


class Permutation(nnx.Variable):
    """Holds the channel order of a compressed weight."""


class ObservedLinear(nnx.Module):
    """A linear layer that adds every input it sees to its statistics.

    Give layers that share their input one observer among them: their statistics are the same.

    Args:
        linear: The layer to watch; it stays the same object.
        statistics: Where to start from, `init_range(channels)` or `init_stats(range)`; which one
            decides what is gathered.
        gram: Where the Gram matrix starts from, `init_gram(channels)`; None gathers none. It
            takes channels x channels x 4 bytes.
    """

    def __init__(
        self,
        linear: nnx.Linear,
        statistics: ChannelRange | ChannelStats,
        gram: GramMatrix | None = None,
    ):
        self.linear = linear
        ranged = isinstance(statistics, ChannelRange)
        self.calibration = (CalibrationRange if ranged else CalibrationStats)(statistics)
        self.gram = nnx.data(None if gram is None else CalibrationGram(gram))

    def __call__(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch out"]:
        tokens = x.reshape(-1, x.shape[-1])
        ranged = isinstance(self.calibration, CalibrationRange)
        update = update_range if ranged else update_stats
        self.calibration.set_value(update(self.calibration.get_value(), tokens))
        if self.gram is not None:
            self.gram.set_value(update_gram(self.gram.get_value(), tokens))
        return self.linear(x)


class MaskedLinear(nnx.Module):
    """A linear layer of which only the masked-in weights count, whatever the others hold.

    Args:
        linear: The dense layer; it stays the same object and keeps all its weights.
        mask: True keeps, in the weight's orientation.
    """

    def __init__(self, linear: nnx.Linear, mask: Bool[Array, "out channel"]):
        if mask.shape != (linear.out_features, linear.in_features):
            raise ValueError(
                f"The mask has shape {tuple(mask.shape)}; this layer's weight is [out, channel] = "
                f"{(linear.out_features, linear.in_features)}."
            )
        self.linear = linear
        self.mask = Mask(mask)

    def __call__(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch out"]:
        kernel = self.linear.kernel[...]
        masked = nnx.clone(self.linear)
        masked.kernel.set_value(jnp.where(self.mask[...].T, kernel, jnp.zeros((), kernel.dtype)))
        return masked(x)


class SparseLinear(nnx.Module):
    """A linear layer whose weight is held as `Compressed24` or in its device form.

    Args:
        compressed: The weight, its channels in the order of `permutation`.
        permutation: The order in which the input's channels are read; None for the natural one.
        bias: Added to the product; None for none.
        dtype: What the product is computed in; None for the weight's. A device form has its own.
    """

    def __init__(
        self,
        compressed: Compressed24 | Blob24 | LibraryBlob24,
        permutation: Int[Array, " channel"] | None = None,
        bias: Float[Array, " out"] | None = None,
        *,
        dtype: DTypeLike | None = None,
    ):
        self.out_features, self.in_features = compressed.shape
        if permutation is not None and permutation.shape != (self.in_features,):
            raise ValueError(
                f"The permutation has shape {tuple(permutation.shape)}; the compressed weight has "
                f"{self.in_features} input channels, so it must be ({self.in_features},)."
            )
        self.weight = CompressedWeight(compressed)
        self.permutation = nnx.data(
            None if permutation is None else Permutation(permutation.astype(jnp.int32))
        )
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.dtype = jnp.dtype(compressed.dtype if dtype is None else dtype)
        if not isinstance(compressed, Compressed24) and self.dtype != compressed.dtype:
            raise TypeError(
                f"The device form of a weight is multiplied in its own dtype, {compressed.dtype}; "
                f"got dtype={self.dtype}. Convert the Compressed24 that it is made from."
            )

    def ordered(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch channel"]:
        """The input in the order of channels that the weight was compressed in."""
        if self.permutation is None:
            return x
        # Permutations are checked where they are made; the default mode would fill with nan.
        return x.at[..., self.permutation[...]].get(mode="promise_in_bounds")

    def __call__(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch out"]:
        return self.multiply(self.ordered(x.astype(self.dtype)))

    def multiply(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch out"]:
        """The product with what `ordered` gives, in this layer's dtype."""
        weight = self.weight.get_value()
        if weight.dtype != self.dtype:
            weight = dataclasses.replace(weight, values=weight.values.astype(self.dtype))
        return _with_bias(sparse_matmul(x, weight), self.bias)


class DenseLinear(nnx.Module):
    """A linear layer that holds its weight as [out, channel], turned as a compressed one is.

    Args:
        weight: Of the dtype that the product is computed in; sums are in float32.
        bias: Added to the product; None for none.
    """

    def __init__(
        self, weight: Float[Array, "out channel"], bias: Float[Array, " out"] | None = None
    ):
        self.out_features, self.in_features = weight.shape
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))

    def __call__(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch out"]:
        weight = self.weight[...]
        x = x.astype(weight.dtype)
        product = jax.lax.platform_dependent(x, weight, cpu=_dense_wide, default=_dense)
        return _with_bias(product, self.bias)


def _dense(x: Float[Array, "*batch channel"], weight: Float[Array, "out channel"]) -> Array:
    """GPUs add up in float32 and round once; to ask for float32 would write it to memory."""
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _dense_wide(x: Float[Array, "*batch channel"], weight: Float[Array, "out channel"]) -> Array:
    """The same on the CPU, where XLA is asked for float32: it promises nothing of 16 bits there."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=wide).astype(x.dtype)


def _with_bias(product: Float[Array, "*batch out"], bias: nnx.Param | None) -> Array:
    if bias is None:
        return product
    return product + bias[...].astype(product.dtype).reshape((1,) * (product.ndim - 1) + (-1,))
