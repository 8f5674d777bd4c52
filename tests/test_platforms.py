"""Computations for one platform: refused in words where they are compiled for another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import random_blob, random_x
from jax.sharding import PartitionSpec

from esparse_jax.platforms import only_on
from esparse_jax.pruning.max_sum import max_sum
from esparse_jax.sparse import sparse_matmul


def _double(x):
    return x * 2


def _on(platform):
    return functools.partial(only_on, platform, _double, what="This", instead="Take that.")


def test_it_is_computed_on_its_platform():
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(_on(jax.default_backend())(x), [0, 2, 4])
    both = jax.jit(_on("cpu")).trace(x).lower(lowering_platforms=("cpu",))
    assert "esparse_refused" not in both.as_text()


@pytest.mark.parametrize("compiled_for", [("cuda",), ("cuda", "tpu"), ("cpu", "cuda")])
def test_elsewhere_it_is_refused_when_it_is_lowered(compiled_for):
    traced = jax.jit(_on("cpu")).trace(jnp.arange(3.0))
    others = " and ".join(repr(each) for each in compiled_for if each != "cpu")
    with pytest.raises(NotImplementedError) as raised:
        traced.lower(lowering_platforms=compiled_for)
    assert str(raised.value) == (
        f"This is for the platform 'cpu'; this computation is compiled for {others}. Take that."
    )


def test_inside_shard_map_it_is_still_what_is_refused():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("rows")
    sharded = jax.shard_map(_on("tpu"), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(NotImplementedError, match=r"'tpu'; .* 'cpu'\. Take that"):
        jax.jit(sharded).trace(jnp.arange(4.0)).lower(lowering_platforms=("cpu",))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU refuses")
@pytest.mark.parametrize("backend", ["decode", "prefill", "cusparselt"])
def test_products_of_a_gpu_are_refused_on_the_cpu(backend):
    with pytest.raises((NotImplementedError, RuntimeError), match=backend):
        sparse_matmul(random_x(2, 64), random_blob((64, 64)), backend=backend)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU refuses")
def test_the_shuffles_kernel_of_a_gpu_is_refused_on_the_cpu():
    x = jnp.ones((1, 4, 4), jnp.int32)
    with pytest.raises((NotImplementedError, RuntimeError), match=r'form="cuda".*form=None'):
        max_sum(x, x, form="cuda")
