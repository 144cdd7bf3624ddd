"""A whole tree as one vector: what dense and low-rank PSGD see."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.preconditioners._stacks.rule import METHOD
from optax_curv.preconditioners._stacks.stacks import Member
from optax_curv.preconditioners._transformation.trees import (
    by_prefix,
    is_function,
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

    @property
    def decays(self) -> bool | np.ndarray:
        """Whether weight decay acts on the vector, or on which of its entries, bool [size]."""
        mask = np.concatenate([np.full(size, decays) for size, decays in self.parts])
        return True if mask.all() else mask


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
