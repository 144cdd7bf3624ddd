"""Axes: which leaves are matrices, which of their axes are a stack, and who takes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from optax_curv.preconditioners._stacks.rule import FALLBACK, METHOD, Kind, StackRule
from optax_curv.preconditioners._stacks.stacks import Member, leaf_member
from optax_curv.preconditioners._transformation.trees import by_prefix, is_function, path_of


def stack_ndims(method: str, stacked: Any, tree: Any) -> list[int]:
    """How many leading axes of each leaf are a stack, from the option `stacked`."""
    stacked = stacked(tree) if is_function(stacked) else stacked
    counts = [int(count or 0) for count in by_prefix(method, "stacked", stacked or 0, tree)]
    for (path, leaf), count in zip(jax.tree.leaves_with_path(tree), counts, strict=True):
        if not 0 <= count <= len(leaf.shape):
            raise ValueError(
                f"{method}: stacked={count} leading axes at {path_of(path)}, but its shape is "
                f"{leaf.shape}; expected at most {len(leaf.shape)}."
            )
    return counts


def leaf_members(
    method: str,
    tree: Any,
    *,
    stacked: Any = None,
    roles: Sequence[str] | None = None,
    weight_decay_mask: Any = None,
) -> list[tuple[Member, Kind]]:
    """Every leaf as a member, with the role given for it and whether weight decay acts on it."""
    mask = weight_decay_mask(tree) if is_function(weight_decay_mask) else weight_decay_mask
    leaves = jax.tree.leaves_with_path(tree)
    decays = [True] * len(leaves)
    if mask is not None:
        decays = [bool(x) for x in by_prefix(method, "weight_decay_mask", mask, tree)]
    counts = stack_ndims(method, stacked, tree)
    roles = [METHOD] * len(leaves) if roles is None else roles
    return [
        (leaf_member(place, path, leaf, count if role == METHOD else 0), Kind(role, decay))
        for place, ((path, leaf), count, role, decay) in enumerate(
            zip(leaves, counts, roles, decays, strict=True)
        )
    ]


def matrix_roles(method: str, adam_for: Any, stacked: Any, tree: Any) -> list[str]:
    """The role of each leaf of a method for matrices; its alias documents `adam_for`."""
    leaves = jax.tree.leaves_with_path(tree)
    if adam_for is None:
        chosen: list[Any] = [False] * len(leaves)
    elif is_function(adam_for):
        chosen = [adam_for(path, leaf) for path, leaf in leaves]
    else:
        chosen = by_prefix(method, "adam_for", adam_for, tree)

    def role(path: Any, leaf: Any, choice: Any, count: int) -> str:
        if isinstance(choice, str) and choice in ("adam", method):
            return METHOD if choice == method else FALLBACK
        if isinstance(choice, str) or choice not in (True, False):
            raise ValueError(
                f"{method}: adam_for gives {choice!r} for the leaf {path_of(path)}; expected True "
                f"or 'adam', False, or {method!r}."
            )
        return FALLBACK if choice or len(leaf.shape) - count != 2 else METHOD

    rows = zip(leaves, chosen, stack_ndims(method, stacked, tree), strict=True)
    return [role(*path_and_leaf, choice, count) for path_and_leaf, choice, count in rows]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LeafRule(StackRule):
    """A method whose members are leaves.

    Attributes:
      stacked: how many leading axes of each leaf are a stack.
      adam_for: which leaves go to the fallback; without a fallback the method takes all.
      weight_decay_mask: which leaves decay.
    """

    stacked: Any = None
    adam_for: Any = None
    weight_decay_mask: Any = None

    def members(self, tree: Any) -> list[tuple[Member, Kind]]:
        """Every leaf, with its role."""
        roles = None
        if self.fallback is not None:
            roles = matrix_roles(self.method, self.adam_for, self.stacked, tree)
        return leaf_members(
            self.method,
            tree,
            stacked=self.stacked,
            roles=roles,
            weight_decay_mask=self.weight_decay_mask,
        )
