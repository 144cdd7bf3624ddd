"""`PlacedRule`: a method without stacks, whose state is divided as the parameters are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from optax_curv.preconditioners._stacks.owners import Owners, compiled
from optax_curv.preconditioners._transformation.transformation import Rule, Step


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PlacedRule(Rule):
    """A method whose state has trees like the parameters, and numbers.

    Attributes:
      owners: the devices; None: the state lies where JAX makes it.
    """

    owners: Owners | None = None

    def placed(self, view: Any, params: Any, state: Any, others: Any) -> tuple[Any, Any]:
        """The states, sharded as the parameters are and else whole."""
        del view
        return self._like(params, (state, others))

    def made(self, init: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Places the arrays of a state as they are made."""
        return compiled(init, self.owners)

    def kept(self, step: Step, grads: Any) -> Step:
        """A step whose state lies where `placed` has put it, for gradients as the parameters."""
        return step._replace(state=self._like(grads, step.state))

    def like(self, grads: Any, directions: Any) -> Any:
        """Directions that are sharded as the gradients are."""
        if self.owners is None:
            return directions
        return jax.tree.map(self.owners.like, grads, directions)

    def _like(self, tree: Any, state: Any) -> Any:
        if self.owners is None:
            return state
        shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
        return self.owners.placed_like(state, *(() if shapes else (tree,)))
