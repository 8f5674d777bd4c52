"""Other people's parameters <-> ours: the pytree of transformers' FlaxLlamaForCausalLM.

Its leaves are named like the checkpoint's tensors:

    model/embed_tokens/embedding                     [vocab, channel]
    model/layers/0/self_attn/q_proj/kernel           [channel, out]
    model/layers/0/input_layernorm/weight            [channel]
    model/norm/weight                                [channel]
    lm_head/kernel                                   [channel, vocab]

so a kernel lies there as it does in an `nnx.Linear`, and only the norms' weight has another name.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from esparse_jax.files.checkpoint import restore_kept
from esparse_jax.models.llama import DTYPES, LlamaConfig, LlamaForCausalLM, dtype_name
from esparse_jax.models.surgery import iter_linears

# Last element of a state path -> last key in the pytree.
_LEAF_NAMES = {"scale": "weight"}

_HEAD = ("lm_head", "kernel")


def model_from_flax_params(
    params: Mapping[str, Any], config: LlamaConfig, *, dtype: DTypeLike | None = None
) -> LlamaForCausalLM:
    """A model with the parameters of transformers 4.x's `FlaxLlamaForCausalLM`.

    Positions turn as `config` says. FlaxLlama itself knows neither `rope_theta` nor scaling: it
    computes with 10000, so with a configuration that says otherwise its logits are its own.
    FlaxLlama never ties its head either: where the pytree has one, the model has one.

    Args:
        params: Nested dicts or a FrozenDict, of numpy or JAX arrays; also inside {"params": ...}.
        config: The model's configuration.
        dtype: What to hold the parameters and to compute in, a name or a dtype; None: each as it
            is, computing in the configuration's dtype.

    Raises:
        ValueError: Names missing or unexpected, wrong shapes or dtypes; all in one message.
    """
    dtype = dtype_name(dtype)
    leaves = dict(_leaves(_unwrapped(params)))
    if _HEAD in leaves:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    _check_leaves(leaves, {_place(path): variable.shape for path, variable in flat.items()})
    for path, variable in flat.items():
        variable.set_value(jnp.asarray(leaves[_place(path)], dtype))
    nnx.update(model, nnx.from_flat_state(flat.items()))
    return model


def flax_params_from_model(
    model: LlamaForCausalLM, *, like: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """The parameters of a dense model as `FlaxLlamaForCausalLM` takes them.

    Args:
        model: A dense model.
        like: The pytree that the model came from. The result has its structure, containers, array
            types and dtypes, and every weight that the model did not change has its very bits.
            Without it: nested dicts of the model's own arrays.

    Raises:
        TypeError: A layer that is masked, observed or compressed.
        ValueError: `like` has other names or shapes; all in one message.
    """
    wrong = [
        f"{path}: {type(linear).__name__}"
        for path, linear in iter_linears(model)
        if not isinstance(linear, nnx.Linear)
    ]
    if wrong:
        raise TypeError(
            "FlaxLlama has plain linear layers only; these are not:\n" + "\n".join(wrong)
        )
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    values = {_place(path): variable.get_value() for path, variable in state}
    if like is None:
        nested: dict[str, Any] = {}
        for place, value in values.items():
            node = nested
            for key in place[:-1]:
                node = node.setdefault(key, {})
            node[place[-1]] = value
        return nested
    inner = _unwrapped(like)
    _check_leaves(dict(_leaves(inner)), {place: v.shape for place, v in values.items()})
    wrapped = len(inner) != len(like) or inner is not like

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        place = tuple(str(key.key) for key in path)
        stored = np.asarray(leaf)
        value = restore_kept(stored, np.asarray(values[place[1:] if wrapped else place]))
        return jnp.asarray(value) if isinstance(leaf, jax.Array) else value

    return jax.tree_util.tree_map_with_path(convert, like)


def _unwrapped(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `model.params` is, also when given `{"params": model.params}`."""
    return params["params"] if set(params) == {"params"} else params


def _leaves(
    node: Mapping[str, Any], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, child in node.items():
        if isinstance(child, Mapping):
            yield from _leaves(child, (*place, str(key)))
        else:
            yield (*place, str(key)), child


def _place(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Where a parameter of our state lies in the pytree."""
    return (*map(str, path[:-1]), _LEAF_NAMES.get(path[-1], path[-1]))


def _check_leaves(
    leaves: Mapping[tuple[str, ...], Any], shapes: Mapping[tuple[str, ...], tuple[int, ...]]
) -> None:
    def name(place: tuple[str, ...]) -> str:
        return "/".join(place)

    wrong = [f"missing: {name(p)} {shapes[p]}" for p in sorted(set(shapes) - set(leaves))]
    wrong += [
        f"unexpected: {name(p)} {np.shape(leaves[p])}" for p in sorted(set(leaves) - set(shapes))
    ]
    for place in sorted(set(leaves) & set(shapes)):
        leaf = leaves[place]
        if not isinstance(leaf, (np.ndarray, jax.Array)):
            wrong.append(f"no array: {name(place)} is a {type(leaf).__name__}")
        elif leaf.shape != shapes[place]:
            wrong.append(
                f"wrong shape: {name(place)} is {leaf.shape}, the model has {shapes[place]}"
            )
        elif str(leaf.dtype) not in DTYPES:
            wrong.append(
                f"wrong dtype: {name(place)} is {leaf.dtype}, it may be {', '.join(DTYPES)}"
            )
    if wrong:
        raise ValueError(
            f"The parameters are not those of a FlaxLlamaForCausalLM with this configuration; "
            f"{len(wrong)} disagreements:\n" + "\n".join(wrong)
        )
