"""A compressed directory becomes an inference model layer by layer."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import tiny_pruned

from esparse_jax import (
    compress_checkpoint,
    inference_model,
    load_inference_model,
    load_model,
)
from esparse_jax.files.tensors import SINGLE_FILE

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}


@pytest.fixture(scope="module", params=[True, False], ids=["shuffled", "natural"])
def directories(request, tmp_path_factory):
    """A pruned checkpoint in the hf format, and compressed."""
    directory = tmp_path_factory.mktemp("pruned")
    _, hf, _ = tiny_pruned(directory, dtype="float16", shuffled=request.param, **SIZES)
    compress_checkpoint(hf, directory / "small")
    return hf, directory / "small"


def leaves(model):
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("device", None), ("portable", "float32"), ("dense", jnp.bfloat16), (None, None)],
)
def test_it_is_the_inference_model_of_what_load_model_reads(directories, form, dtype):
    _, small = directories
    ours, tokenizer = load_inference_model(small, dtype=dtype, form=form)
    model, theirs = load_model(small, dtype=dtype)
    expected = inference_model(model, form=form)
    assert nnx.graphdef(ours) == nnx.graphdef(expected)
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert tokenizer.get_vocab() == theirs.get_vocab()


def test_one_layer_more_is_the_most_that_is_resident(directories):
    _, small = directories
    gc.collect()
    start = sum(array.nbytes for array in jax.live_arrays())
    live, done = [], []

    def watch(layer, layers):
        gc.collect()
        done.append((layer, layers))
        live.append(sum(array.nbytes for array in jax.live_arrays()) - start)

    ours, _ = load_inference_model(small, form="device", progress=watch)
    assert done == [(1, 3), (2, 3), (3, 3)]
    layer = sum(leaf.nbytes for leaf in leaves(ours.model.layers[0]))
    assert live == [layer, 2 * layer, 3 * layer]


def test_what_is_wrong_with_a_directory_is_named(directories, tmp_path):
    hf, small = directories
    with pytest.raises(ValueError, match="holds no compressed layer"):
        load_inference_model(hf)
    with pytest.raises(ValueError, match="form is 'fast'; it must be one of device, portable"):
        load_inference_model(small, form="fast")
    twin, _ = load_inference_model(hf, form="dense")
    ids = jnp.arange(12).reshape(1, 12)
    model, _ = load_model(hf)
    exact = np.asarray(jax.jit(model.__call__)(ids))
    assert (
        np.abs(np.asarray(jax.jit(twin.__call__)(ids)) - exact).max() < 0.02 * np.abs(exact).max()
    )

    tensors = load_file(small / SINGLE_FILE)
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors["model.layers.1.mlp.up_proj.indices"][0, 0] = 0
    tensors["model.layers.0.mlp.down_proj.values"][3, 4] = np.inf
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="whose values have no place") as error:
        load_inference_model(tmp_path)
    error.match(r"model\.layers\.1\.mlp\.up_proj: row 0, group 0")
    error.match(r"model\.layers\.0\.mlp\.down_proj\.values: 1 of 16384 are NaN or Inf")
