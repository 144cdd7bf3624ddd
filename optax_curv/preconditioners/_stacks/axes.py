"""`LeafRule`: a method whose members are leaves, as matrices or as tensors of any rank."""

import dataclasses
from typing import Any

import jax

from optax_curv.layers import Layers
from optax_curv.preconditioners._stacks.matrices import axes_of_leaves, stack_ndims
from optax_curv.preconditioners._stacks.rule import FALLBACK, METHOD, Kind, StackRule
from optax_curv.preconditioners._stacks.stacks import Member, leaf_member
from optax_curv.preconditioners._transformation.trees import decays_of


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LeafRule(StackRule):
    """A method whose members are leaves.

    With a fallback the method takes what is a matrix, by `optax_curv.matrix_axes`. Without one it
    takes every leaf: kernels of `layers` as matrices, all others as tensors of their own rank.

    Attributes:
      layers: from `find_layers`, which say what of a kernel is a matrix; or None.
      stacked: how many leading axes of each leaf are a stack.
      adam_for: which leaves go to the fallback.
      weight_decay_mask: which leaves decay.
    """

    layers: Layers | None = None
    stacked: Any = None
    adam_for: Any = None
    weight_decay_mask: Any = None

    def members(self, tree: Any) -> list[tuple[Member, Kind]]:
        """Every leaf, with its role and whether it decays."""
        leaves = jax.tree.leaves_with_path(tree)
        counts = stack_ndims(self.method, self.stacked, tree)
        table = axes_of_leaves(
            self.method,
            tree,
            layers=self.layers,
            adam_for=self.adam_for,
            stacked=self.stacked,
        )
        takes_all = self.fallback is None
        found = []
        mask = decays_of(self.method, self.weight_decay_mask, tree)
        rows = zip(leaves, table, counts, mask, strict=True)
        for place, ((path, leaf), axes, count, decays) in enumerate(rows):
            if takes_all and not (axes.is_matrix and self.layers is not None):
                member, role = leaf_member(place, path, leaf, count), METHOD
            elif takes_all or axes.by_method:
                member, role = axes.member(place, path, leaf), METHOD
            else:
                member, role = leaf_member(place, path, leaf), FALLBACK
            found.append((member, Kind(role, decays)))
        return found
