"""The product the channel shuffle is made of: sums over rows of the greater of two scores, doubled.

Doubled, because the CUDA kernel computes 2 max(a, b) = a + b + |a - b|: one instruction there adds
an absolute difference of integers, where a maximum and a sum take one and a half.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from esparse_jax import native, platforms

MAX_SUM_FORMS = ("passes", "split", "triton", "cuda")

# Rows added per pass over the accumulators. Measured on two AVX-512 cores with int32, in 10^9
# max-adds a second: 8 rows 0.4, 16 rows 23.9, 32 rows 23.3 (float32: 1.9, 11.2, 11.9).
_ROWS_PER_PASS = 16
# Outputs the split form keeps in flight.
_PARALLEL_OUTPUTS = 1 << 21
# Columns come in multiples of this to the CUDA kernel, which reads 16 bytes at a time.
_CUDA_UNIT = 4
# The Triton kernel: outputs of one program along either side, rows per step, and how many
# programs a GPU should get (132 multiprocessors on an H200, several programs on each).
_TRITON_TILE = 64
_TRITON_ROWS = 8
_TRITON_WARPS = 4
_TRITON_PROGRAMS = 4096
_TRITON_LEAST_ROWS = 128


def max_sum(
    left: Num[Array, "block row left"],
    right: Num[Array, "block row right"],
    *,
    form: Literal["passes", "split", "triton", "cuda"] | None = None,
) -> Num[Array, "block left right"]:
    """Twice the sum of max(left[r, i], right[r, j]) over the rows r, for all pairs.

    There is no matrix product behind it (up to terms in i or j alone it is an L1 distance), so
    the elementwise units bound it. Integer sums wrap modulo 2^32 and come out the same in every
    form; *differences* of such sums are exact wherever they fit, see `fixed_scores`.

    Args:
        form: "passes": XLA, a few rows at a time over all accumulators. "split": the same with
            several partial sums over the rows, for wide machines. "triton": a Pallas kernel that
            keeps a tile of accumulators in registers (on a CPU it is interpreted, slowly).
            "cuda": a kernel of the compiled extension, for int32 on NVIDIA GPUs, 3 to 8 times as
            fast as "triton" there. None: "passes" on a CPU, on an NVIDIA GPU "cuda" where it can
            be called and "triton" where not, "split" on other platforms.

    Raises:
        NotImplementedError: "cuda" in a computation that is compiled for another platform.
        RuntimeError: "cuda" without the extension's CUDA kernels.
        TypeError: "cuda" for another dtype than int32.
    """
    if form is None:
        own = left.dtype == jnp.int32 and native.has_cuda()
        on_gpu = _cuda if own else _compiled_triton
        return jax.lax.platform_dependent(left, right, cpu=_passes, cuda=on_gpu, default=_split)
    if form == "cuda":
        if not native.has_cuda():
            raise RuntimeError(
                'form="cuda" needs the compiled extension with its CUDA kernels, which is not in '
                "this build. Install with nvcc at hand, pip install . "
                "-C cmake.define.ESPARSE_CUDA=ON (see BUILD.md), or take form=None."
            )
        if left.dtype != jnp.int32:
            raise TypeError(
                f'form="cuda" adds up int32 scores; got {left.dtype}. Take fixed_scores of them, '
                f"or form=None."
            )
        return platforms.only_on(
            "cuda", _cuda, left, right, what='form="cuda"', instead="Take form=None instead."
        )
    if form == "triton":
        return jax.lax.platform_dependent(
            left, right, cpu=_interpreted_triton, default=_compiled_triton
        )
    return _passes(left, right) if form == "passes" else _split(left, right)


def _passes(left, right):
    left, right = _pad(left, 1, _ROWS_PER_PASS), _pad(right, 1, _ROWS_PER_PASS)

    def add_rows(step, total):
        a = jax.lax.dynamic_slice_in_dim(left, step * _ROWS_PER_PASS, _ROWS_PER_PASS, 1)
        b = jax.lax.dynamic_slice_in_dim(right, step * _ROWS_PER_PASS, _ROWS_PER_PASS, 1)
        # Written out, so that it is one elementwise pass that loads and stores each accumulator
        # once: XLA vectorises that, but no reduction over the leading or (float) last axis.
        for row in range(_ROWS_PER_PASS):
            total = total + jnp.maximum(a[:, row, :, None], b[:, row, None, :])
        return total

    zero = jnp.zeros((left.shape[0], left.shape[2], right.shape[2]), left.dtype)
    return 2 * jax.lax.fori_loop(0, left.shape[1] // _ROWS_PER_PASS, add_rows, zero)


def _split(left, right):
    blocks, rows, channels = left.shape
    wanted = _PARALLEL_OUTPUTS // (blocks * channels * right.shape[2])
    return _in_parts(_passes, left, right, min(wanted, rows // _ROWS_PER_PASS), _ROWS_PER_PASS)


def _cuda(
    left: Int[Array, "block row left"], right: Int[Array, "block row right"]
) -> Int[Array, "block left right"]:
    lefts, rights = left.shape[2], right.shape[2]
    left, right = _pad(left, 2, _CUDA_UNIT), _pad(right, 2, _CUDA_UNIT)
    result = jax.ShapeDtypeStruct((left.shape[0], left.shape[2], right.shape[2]), jnp.int32)
    total = jax.ffi.ffi_call(native.extension().CUDA_MAX_SUM_TARGET, result)(left, right)
    return total[:, :lefts, :rights]


def _compiled_triton(left, right, interpret=False):
    lefts, rights = left.shape[2], right.shape[2]
    left, right = _pad(left, 2, _TRITON_TILE), _pad(right, 2, _TRITON_TILE)
    programs = left.shape[0] * left.shape[2] * right.shape[2] // _TRITON_TILE**2
    parts = min(-(-_TRITON_PROGRAMS // programs), left.shape[1] // _TRITON_LEAST_ROWS)

    def product(left, right):
        return _triton(left, right, interpret)

    return 2 * _in_parts(product, left, right, parts, _TRITON_ROWS)[:, :lefts, :rights]


def _interpreted_triton(left, right):
    return _compiled_triton(left, right, interpret=True)


def _triton(left, right, interpret):
    from jax.experimental import pallas as pl  # only where it is used: slow to import
    from jax.experimental.pallas import triton

    blocks, rows, lefts = left.shape
    rights = right.shape[2]
    tile = _TRITON_TILE

    def kernel(left_ref, right_ref, total_ref):
        def add_rows(step, total):
            # Neighbouring threads hold neighbouring accumulators; a row's scores come out of the
            # first-level cache, once per thread that needs them.
            for row in range(_TRITON_ROWS):
                at = step * _TRITON_ROWS + row
                a = triton.load(left_ref.at[at, :])
                b = triton.load(right_ref.at[at, :])
                total = total + jnp.maximum(a[:, None], b[None, :])
            return total

        zero = jnp.zeros((tile, tile), left.dtype)
        total_ref[...] = jax.lax.fori_loop(0, rows // _TRITON_ROWS, add_rows, zero)

    return pl.pallas_call(
        kernel,
        grid=(rights // tile, lefts // tile, blocks),
        in_specs=[
            pl.BlockSpec((None, rows, tile), lambda j, i, block: (block, 0, i)),
            pl.BlockSpec((None, rows, tile), lambda j, i, block: (block, 0, j)),
        ],
        out_specs=pl.BlockSpec((None, tile, tile), lambda j, i, block: (block, i, j)),
        out_shape=jax.ShapeDtypeStruct((blocks, lefts, rights), left.dtype),
        compiler_params=triton.CompilerParams(num_warps=_TRITON_WARPS, num_stages=1),
        interpret=interpret,
        name="max_sum",
    )(left, right)


def _in_parts(product, left, right, parts, multiple):
    """`product` over `parts` runs of the rows, each a multiple of `multiple` rows, added up."""
    parts = max(parts, 1)
    # A few parts less, if that spares a padded copy.
    whole = [p for p in range(parts, parts // 2, -1) if left.shape[1] % (p * multiple) == 0]
    parts = whole[0] if whole else parts
    blocks = left.shape[0]
    left, right = (_pad(array, 1, parts * multiple) for array in (left, right))
    left, right = (
        array.reshape(blocks * parts, array.shape[1] // parts, array.shape[2])
        for array in (left, right)
    )
    total = product(left, right)
    return total.reshape(blocks, parts, *total.shape[1:]).sum(axis=1)


def _pad(array, axis, multiple):
    """Zeros up to a multiple: a pair of them adds nothing, further channels are cut off again."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, width)
