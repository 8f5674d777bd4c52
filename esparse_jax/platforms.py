"""Computations for one platform alone, what is said where they are compiled for another, and
whether JAX has any.

Above all rooms: each may import this file, which imports none of them. What a computation is
compiled for is known only when JAX lowers it, so that is where one is refused.
"""

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

# The value it is given; lowered nowhere.
_refused = Primitive("esparse_refused")
_refused.def_abstract_eval(lambda x, *, platform, what, instead: x)
_refused.def_impl(lambda x, **said: jax.jit(functools.partial(_refused.bind, **said))(x))


def _refuse(context, x, *, platform, what, instead):
    del x
    others = [each for each in context.module_context.platforms if each != platform]
    raise NotImplementedError(
        f"{what} is for the platform {platform!r}; this computation is compiled for "
        f"{' and '.join(map(repr, others))}. {instead}"
    )


mlir.register_lowering(_refused, _refuse)


def why_not_started() -> str | None:
    """Why JAX has no device at all; None where it has one."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a plugin is missing
        asked = os.environ.get("JAX_PLATFORMS")
        return str(error) or f"there is no plugin for JAX_PLATFORMS={asked}"
    return None


def only_on(
    platform: str, call: Callable[..., jax.Array], *operands: jax.Array, what: str, instead: str
) -> jax.Array:
    """`call(*operands)` where it is lowered for `platform`.

    Args:
        platform: "cpu", "cuda", as JAX names them.
        call: Returns one array.
        what: What is asked for, as the beginning of a sentence.
        instead: What to do elsewhere, as a sentence.

    Raises:
        NotImplementedError: When it is lowered for another platform.
    """

    def refused(*operands):
        # Of the call's own type, which a branch must have: inside `shard_map` it varies over the
        # same mesh axes as the operands.
        result = jax.eval_shape(call, *operands)
        total = sum(operand.sum().astype(result.dtype) for operand in operands)
        like = jnp.broadcast_to(total, result.shape)
        return _refused.bind(like, platform=platform, what=what, instead=instead)

    return jax.lax.platform_dependent(*operands, **{platform: call}, default=refused)
