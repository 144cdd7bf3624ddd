"""A whole tree as one vector: what dense and low-rank PSGD see."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.preconditioners._stacks.owners import Owners
from optax_curv.preconditioners._stacks.rule import METHOD, StackRule
from optax_curv.preconditioners._stacks.stacks import Member
from optax_curv.preconditioners._transformation.trees import decays_of

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


def flat_members(
    method: str, tree: Any, weight_decay_mask: Any, owners: Owners | None
) -> list[tuple[Member, Any]]:
    """The vector of all leaves, in flattening order, as the only member; none for an empty tree."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return []
    decays = decays_of(method, weight_decay_mask, tree)
    shapes = [jnp.shape(x) for x in leaves]
    sizes = [math.prod(shape) for shape in shapes]
    dtype = jnp.result_type(jnp.float32, *(jnp.result_type(x) for x in leaves))

    def take(leaves):
        return jnp.concatenate([jnp.ravel(x).astype(dtype) for x in leaves])[None]

    def give(array, leaves):
        ends = np.cumsum(sizes)
        rows = zip(ends, sizes, shapes, leaves, strict=True)
        found = {
            place: array[0, end - size : end].reshape(shape).astype(jnp.result_type(like))
            for place, (end, size, shape, like) in enumerate(rows)
        }
        return found if owners is None else {i: owners.like(leaves[i], x) for i, x in found.items()}

    member = Member(WHOLE_TREE, 1, (sum(sizes),), dtype, take, give)
    return [(member, FlatKind(METHOD, tuple(zip(sizes, decays, strict=True))))]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FlatRule(StackRule):
    """A method of one vector [1, n] of all leaves, whose work has no rows to divide.

    With `owners` vector and state are divided along n, and XLA divides the step as they are.
    """

    def _split(self, structs):
        return {} if self.owners is None else dict.fromkeys(structs, 1)

    def with_owners(self, state, split):
        """The state, each array divided along the first axis that the devices divide."""
        del split
        assert self.owners is not None
        return jax.tree.map(self.owners.kept, state)

    def _stepped(self, tensors, state, sound, given):
        owners = self.owners
        if owners is None or not tensors:
            return self.update_stacks(tensors, state, sound, **given)
        alone = dataclasses.replace(self, owners=None)
        given = {key: owners.sent(trees, 1) for key, trees in given.items()}
        step = alone.update_stacks(owners.sent(tensors, 1), state, sound, **given)
        directions = owners.returned(step.directions, tensors, 1)
        return step._replace(directions=directions, state=self.with_owners(step.state, {}))
