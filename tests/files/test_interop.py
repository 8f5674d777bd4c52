import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from llama_cases import run

from esparse_jax.files import flax_params_from_model, model_from_flax_params
from esparse_jax.models import LlamaConfig
from esparse_jax.models.layers import MaskedLinear
from esparse_jax.models.surgery import clone_model, get_linear, replace_linears, with_weight

FIXTURE = pathlib.Path(__file__).parents[1] / "data" / "flax_llama.npz"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def fixture():
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def params(fixture):
    leaves = {k.removeprefix("params/"): v for k, v in fixture.items() if k.startswith("params/")}
    return unflatten_dict(leaves, sep="/")


@pytest.fixture(scope="module")
def config(fixture):
    return LlamaConfig.from_dict(json.loads(str(fixture["config"])))


def replaced(params, place: str, value):
    """The pytree with one leaf replaced; None removes it."""
    leaves = flatten_dict(params, sep="/")
    leaves[place] = value
    return unflatten_dict({k: v for k, v in leaves.items() if v is not None}, sep="/")


def test_logits_are_flax_llamas_own(fixture, params, config):
    ours = np.asarray(run(model_from_flax_params(params, config), fixture["input_ids"]))
    theirs = fixture["logits"]
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("container", [dict, FrozenDict])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_back_to_the_same_pytree(params, config, container, wrapped, array):
    given = jax.tree.map(array, {"params": params} if wrapped else params)
    given = container(given)
    back = flax_params_from_model(model_from_flax_params(given, config), like=given)
    assert jax.tree.structure(back) == jax.tree.structure(given)
    assert type(back) is type(given)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(back), strict=True):
        assert isinstance(b, np.ndarray if array is np.asarray else jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_without_like_the_pytree_is_nested_dicts(params, config):
    back = flax_params_from_model(model_from_flax_params(params, config))
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_kept_weights_keep_their_bits_and_dtypes_when_the_model_is_narrower(params, config):
    # A mixed pytree through a bfloat16 model: what is kept comes back as it was given.
    mixed = replaced(
        params,
        "model/layers/0/self_attn/q_proj/kernel",
        params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"].astype(ml_dtypes.bfloat16),
    )
    model = model_from_flax_params(mixed, config, dtype=jnp.bfloat16)
    assert model.config.dtype == "bfloat16"
    assert get_linear(model, DOWN).kernel.get_value().dtype == jnp.bfloat16
    linear = get_linear(model, DOWN)
    weight = linear.kernel.get_value().T
    mask = (jnp.arange(weight.shape[1]) % 4 < 2)[None]
    pruned = replace_linears(model, {DOWN: with_weight(linear, jnp.where(mask, weight, 0))})
    back = flax_params_from_model(pruned, like=mixed)
    for place, given in flatten_dict(mixed, sep="/").items():
        got = flatten_dict(back, sep="/")[place]
        assert got.dtype == given.dtype
        if place == "model/layers/1/mlp/down_proj/kernel":
            given = np.where(np.asarray(mask).T, given, np.float32(0))
        np.testing.assert_array_equal(got, given)


def test_a_head_in_the_pytree_is_used_even_if_the_configuration_ties_it(params, config):
    fields = config.to_dict() | {"tie_word_embeddings": True}
    model = model_from_flax_params(params, LlamaConfig.from_dict(fields))
    assert not model.config.tie_word_embeddings
    headless = {"model": params["model"]}
    tied = model_from_flax_params(headless, LlamaConfig.from_dict(fields))
    assert tied.config.tie_word_embeddings
    back = flax_params_from_model(tied, like=headless)
    assert jax.tree.structure(back) == jax.tree.structure(headless)


def test_all_disagreements_are_in_one_error(params, config):
    wrong = replaced(params, "model/norm/weight", None)
    wrong = replaced(wrong, "model/layers/0/mlp/extra/kernel", np.zeros((2, 3), np.float32))
    wrong = replaced(wrong, "lm_head/kernel", np.zeros((3, 2), np.float32))
    wrong = replaced(wrong, "model/layers/0/input_layernorm/weight", np.zeros(32, np.int32))
    wrong = replaced(wrong, "model/layers/1/input_layernorm/weight", [1.0])
    with pytest.raises(ValueError, match="5 disagreements") as error:
        model_from_flax_params(wrong, config)
    for line in (
        r"missing: model/norm/weight \(32,\)",
        r"unexpected: model/layers/0/mlp/extra/kernel \(2, 3\)",
        r"wrong shape: lm_head/kernel is \(3, 2\), the model has \(32, 40\)",
        "wrong dtype: model/layers/0/input_layernorm/weight is int32, it may be float32, bfloat16",
        "no array: model/layers/1/input_layernorm/weight is a list",
    ):
        error.match(line)
    model = model_from_flax_params(params, config)
    with pytest.raises(ValueError, match="missing: model/norm/weight"):
        flax_params_from_model(model, like=replaced(params, "model/norm/weight", None))


def test_dtype_must_be_known(params, config):
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32, bfloat16"):
        model_from_flax_params(params, config, dtype="int8")


def test_only_plain_linears_go_back(params, config):
    model = clone_model(model_from_flax_params(params, config))
    linear = get_linear(model, DOWN)
    mask = jnp.ones((linear.out_features, linear.in_features), bool)
    masked = replace_linears(model, {DOWN: MaskedLinear(linear, mask)})
    with pytest.raises(TypeError, match=f"plain linear layers only(.|\n)*{DOWN}: MaskedLinear"):
        flax_params_from_model(masked, like=params)
    assert isinstance(get_linear(model, DOWN), nnx.Linear)
