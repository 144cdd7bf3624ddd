"""A whole tree as one vector: what dense and low-rank PSGD see."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_curv.preconditioners._stacks.rule import METHOD
from optax_curv.preconditioners._stacks.stacks import Member
from optax_curv.preconditioners._transformation.numbers import is_python_number
from optax_curv.preconditioners._transformation.transformation import Piece
from optax_curv.preconditioners._transformation.trees import (
    by_prefix,
    is_function,
    require_params,
)

WHOLE_TREE = "all leaves"


class FlatKind(NamedTuple):
    """The kind of the stack of the vector.

    Attributes:
      role: that of the method.
      parts: (size, whether weight decay acts on it) of every leaf, in flattening order.
    """

    role: str
    parts: tuple[tuple[int, bool], ...]


def flat_members(method: str, tree: Any, weight_decay_mask: Any) -> list[tuple[Member, Any]]:
    """The vector of all leaves, in flattening order, as the only member; none for an empty tree."""
    mask = weight_decay_mask(tree) if is_function(weight_decay_mask) else weight_decay_mask
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return []
    decays = [True] * len(leaves)
    if mask is not None:
        decays = [bool(x) for x in by_prefix(method, "weight_decay_mask", mask, tree)]
    shapes = [jnp.shape(x) for x in leaves]
    sizes = [math.prod(shape) for shape in shapes]
    dtype = jnp.result_type(jnp.float32, *(jnp.result_type(x) for x in leaves))

    def take(leaves):
        return jnp.concatenate([jnp.ravel(x).astype(dtype) for x in leaves])[None]

    def give(array, leaves):
        ends = np.cumsum(sizes)
        rows = zip(ends, sizes, shapes, leaves, strict=True)
        return {
            place: array[0, end - size : end].reshape(shape).astype(jnp.result_type(like))
            for place, (end, size, shape, like) in enumerate(rows)
        }

    member = Member(WHOLE_TREE, 1, (sum(sizes),), dtype, take, give)
    return [(member, FlatKind(METHOD, tuple(zip(sizes, decays, strict=True))))]


def flat_decayed(method: str, weight_decay: Any) -> list[Piece]:
    """Decoupled weight decay of the leaves that decay; nothing for the Python number 0."""
    if is_python_number(weight_decay, 0):
        return [optax.identity()]  # the state's structure is that of any number

    def piece_of(view: Any) -> optax.GradientTransformation:
        def decayed(name, u, p):
            parts = view[name].kind.parts
            mask = np.concatenate([np.full(size, decay) for size, decay in parts])
            return u + jnp.asarray(weight_decay, u.dtype) * jnp.where(mask, p, 0)

        def update(updates: Any, state: Any, params: Any = None):
            require_params(method, params)
            return {name: decayed(name, u, params[name]) for name, u in updates.items()}, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    return [piece_of]
