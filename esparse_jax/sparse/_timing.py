"""Times whole products inside a jitted chain, for the search of the best and for `benchmarks/`.

A product alone would mostly be the time to start it, and its weight would still be in the cache
from the time before. So a chain walks through copies of the weight that come to 300 MB with x and
y, more than the caches of any GPU hold, one product after the other.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

ROTATED_BYTES = 300_000_000
# Microseconds until a CUDA graph has started: a part of the time of a single launch.
GRAPH_START = 20.0
# The graphs that XLA makes of a chain keep its order.
_SERIAL = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
# The six ways to keep two of four.
_PATTERNS = tuple(
    tuple(p in (first, second) for p in range(4)) for second in range(4) for first in range(second)
)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_24(key: Array, out: int, channels: int, dtype: Any) -> Float[Array, "{out} {channels}"]:
    """A random 2:4 weight, scaled so that a product with it is about as large as x."""
    values, places = jax.random.split(key)
    weight = jax.random.normal(values, (out, channels), jnp.float32) / math.sqrt(channels / 2)
    pattern = jax.random.randint(places, (out, channels // 4), 0, len(_PATTERNS))
    mask = jnp.asarray(_PATTERNS)[pattern].reshape(out, channels)
    return jnp.where(mask, weight, 0).astype(dtype)


def exact_product(
    x: Float[Array, "row channel"], weight: Float[Array, "out channel"]
) -> Float[Array, "row out"]:
    """The dense product in float32, to compare with."""
    return _exact_product()(x, weight)


@functools.cache
def _exact_product() -> Callable[[Array, Array], Array]:
    def product(x, weight):
        return jax.lax.dot_general(
            x.astype(jnp.float32),
            weight.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )

    # To find the best kernel for it would take XLA ten seconds, and it runs once.
    return jax.jit(product, compiler_options={"xla_gpu_enable_triton_gemm": False})


def rotation(weight_bytes: int, rows: int, shape: tuple[int, int]) -> int:
    """Copies of a 16-bit product's weight that leave the caches behind.

    Between two uses of one copy, the others, x and y go through the cache.
    """
    around = 2 * rows * sum(shape)
    return max(1, math.ceil((ROTATED_BYTES - around) / weight_bytes))


def timer_operands(
    x: Float[Array, "row channel"],
    blobs: UInt8[Array, "copy blob_byte"],
    y: Float[Array, "all_rows out"],
) -> dict[str, Any]:
    """What the extension's timers of our kernels are told of a product, when it is all there.

    Args:
        blobs: Copies of one weight, for one launch after the other.
        y: Written over, its first rows; there may be more of them than x has.
    """
    jax.block_until_ready((x, blobs, y))
    return {
        "rows": x.shape[0],
        "out": y.shape[1],
        "channels": x.shape[1],
        "dtype": x.dtype.name,
        "x": x.unsafe_buffer_pointer(),
        "blobs": blobs.unsafe_buffer_pointer(),
        "blob_bytes": blobs.shape[1],
        "copies": blobs.shape[0],
        "y": y.unsafe_buffer_pointer(),
    }


def chain_rotation(weight_bytes: int, rows: int, shape: tuple[int, int]) -> int:
    """The same for a `Chain`: two at least, so that it is one; and no more than compile quickly.

    So weights below 2.3 MB are timed from a cache.
    """
    return min(128, max(2, rotation(weight_bytes, rows, shape)))


def estimate(rows: int, shape: tuple[int, int]) -> float:
    """Microseconds that a dense 16-bit product takes on a large GPU, to size a measurement."""
    out, channels = shape
    moved = 2 * (out * channels + rows * (out + channels))
    return max(moved / 4e6, 2 * rows * out * channels / 6e8)


def chain_inputs(rows: int, shape: tuple[int, int], copies: int) -> int:
    """How many x a `Chain` over `copies` weights takes, so that neither its start nor the turns of
    its loop count, and no more products are in a turn than compile quickly.

    One x will do, so many times: it is in the cache, as what the kernel before wrote is in a model.
    """
    long = math.ceil(1000 / (estimate(rows, shape) * copies))
    return max(1, min(long, 64 // copies))


class Chain:
    """A jitted chain of products, `product(x, weight)`, over all pairs of the given x and weights.

    Making one compiles it; `call` queues it, and `microseconds` times it. On NVIDIA GPUs the
    products run one after the other, all of them in every turn of a loop; on the CPU XLA drops the
    barriers that see to this before it optimises loops, so there a chain is good for tests only.

    Args:
        xs: Matrices `[row, channel]`, of which some may be the same array: each is an argument of
            its own, so that XLA does not know.
        weights: Copies of one weight, in whatever form the product takes.
        microseconds: What a product may take, to size the measurement.
    """

    def __init__(
        self,
        product: Callable[[Any, Any], Any],
        xs: Sequence[Any],
        weights: Sequence[Any],
        *,
        microseconds: float,
    ):
        self._arguments = (list(xs), list(weights))
        count = len(xs) * len(weights)
        self._turns = min(16, max(1, math.ceil(2000 / (microseconds * count))))
        self.products = count * self._turns

        def once(xs, weights, last):
            results = []
            for x in xs:  # a pair of arguments occurs once, so that no two products can be merged
                for weight in weights:
                    # Not before the last one, nor outside the loop.
                    x_now, last = jax.lax.optimization_barrier((x, last))
                    last = product(x_now, weight)
                    results.append(last)
            return results

        def chain(xs, weights, start):
            return jax.lax.fori_loop(
                0,
                self._turns,
                # The turn, which the loop itself needs, keeps XLA from dropping the barrier.
                lambda turn, before: once(xs, weights, (turn, before[-1])),
                start,
            )

        y = jax.eval_shape(product, xs[0], weights[0])
        (where,) = jax.tree.leaves(weights)[0].devices()
        with jax.default_device(where):
            # What a call returns is written over by the next one: nothing is set aside or cleared.
            self._results = [jnp.zeros(y.shape, y.dtype) for _ in range(count)]
        jitted = jax.jit(chain, donate_argnums=2, compiler_options=_SERIAL)
        self._compiled = jitted.lower(*self._arguments, self._results).compile()

    def call(self) -> list[Array]:
        """Queues all `products` once; the results are those of the last turn."""
        self._results = self._compiled(*self._arguments, self._results)
        return self._results

    def microseconds(
        self, batches: int = 5, least_seconds: float = 0.01, warm_seconds: float = 0.0
    ) -> float:
        """Of a product: the median over batches of queued chains, each of `least_seconds`."""
        return 1e6 / self.products * seconds(
            self.call, batches=batches, least_seconds=least_seconds, warm_seconds=warm_seconds
        )  # fmt: skip


def seconds(
    call: Callable[[], object],
    *,
    batches: int = 7,
    least_seconds: float = 0.01,
    warm_seconds: float = 0.0,
) -> float:
    """Of one of several queued calls: the median over batches, each of `least_seconds` at least.

    Args:
        warm_seconds: Calls follow each other for so long before they are timed. At the power limit
            a GPU's clock falls within some tenths of a second, and how far depends on the calls.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    repeats = math.ceil(least_seconds / (time.perf_counter() - start))

    def batch() -> float:
        start, result = time.perf_counter(), None
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    warm = 0.0
    while warm < warm_seconds:
        warm += batch()
    return statistics.median([batch() / repeats for _ in range(batches)])


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, read and written bytes counted."""
    source = jnp.ones(1 << 29, jnp.int32)
    copy = jax.jit(jnp.copy)
    return 2 * source.nbytes / seconds(lambda: copy(source))
