"""`StackRule`: a method on stacks, and what takes the leaves that the method does not take."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._stacks.stacks import Member, Stacks
from optax_curv.preconditioners._transformation.transformation import Rule, Step

METHOD, FALLBACK = "method", "fallback"


class Kind(NamedTuple):
    """Properties that the members of a stack have in common besides their shape.

    Attributes:
      role: `METHOD` or `FALLBACK`.
      decays: whether weight decay acts on them.
    """

    role: str
    decays: bool = True


def is_ours(kind: Kind) -> bool:
    """Whether stacks of this kind go to the method."""
    return kind.role == METHOD


def is_other(kind: Kind) -> bool:
    """Whether stacks of this kind go to the fallback."""
    return kind.role == FALLBACK


class Fallback(NamedTuple):
    """The transformation of all leaves that the method does not take.

    Attributes:
      tx: what it is.
      by_stack: whether it may run on stacks, as what acts entry by entry may; one that users give
        runs on the tree of its leaves, as it would within `optax.masked`.
    """

    tx: optax.GradientTransformation
    by_stack: bool

    def init(self, view: Stacks, params: Any) -> Any:
        """Its state for these parameters, or for a tree of shapes, in float32 at least."""
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            stacks = view.of_kind(is_other).items()
            shown = {name: jnp.zeros(stack.struct.shape, stack.dtype) for name, stack in stacks}
        else:
            shown = view.take(params, is_other)
        return self.tx.init(shown if self.by_stack else view.alone(shown))

    def update(
        self, view: Stacks, grads: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[dict[str, jax.Array], Any]:
        """(updates by stack, new state) for gradients by stack and the tree of parameters."""
        shown = None if params is None else view.take(params, is_other)
        if self.by_stack:
            updates: Any
            updates, state = self.tx.update(grads, state, shown)
            return updates, state
        tx = optax.with_extra_args_support(self.tx)
        shown = None if shown is None else view.alone(shown)
        updates, state = tx.update(view.alone(grads), state, shown, **extra_args)
        return view.take(updates, is_other), state


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StackRule(Rule):
    """A method that works on stacks [N, *shape] of equal tensors.

    A subclass says which members it sees (`members`), how its state begins (`init_stacks`) and what
    one step is (`update_stacks`). Its state has a field `fallback`.
    """

    method: str
    fallback: Fallback | None = None

    def members(self, tree: Any) -> list[tuple[Member, Kind]]:
        """The members of a tree and their kinds, decided from paths and shapes."""
        raise NotImplementedError

    def init_stacks(self, structs: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
        """The state of the method's stacks; its `fallback` is replaced."""
        raise NotImplementedError

    def update_stacks(
        self, grads: Mapping[str, jax.Array], state: Any, sound: jax.Array, **extra_args: Any
    ) -> Step:
        """One step of the method's stacks; see `Rule.update`."""
        raise NotImplementedError

    def view(self, tree: Any) -> Stacks:
        """The stacks of a tree."""
        return Stacks(tree, self.members(tree))

    def init(self, view: Stacks, params: Any) -> Any:
        """The state of the method and of the fallback."""
        structs = {name: stack.struct for name, stack in view.of_kind(is_ours).items()}
        state = self.init_stacks(structs)
        if self.fallback is not None:
            state = state._replace(fallback=self.fallback.init(view, params))
        return state

    def update(
        self, view: Stacks, grads: Any, state: Any, params: Any, sound: jax.Array, **extra_args: Any
    ) -> Step:
        """One step of the method on its stacks, and of the fallback on all others."""
        ours = {name: grads[name] for name in view.of_kind(is_ours)}
        step = self.update_stacks(ours, state, sound, **extra_args)
        others = {name: grads[name] for name in view.of_kind(is_other)}
        if self.fallback is None:
            return step._replace(directions={**step.directions, **others})
        updates, fallback = self.fallback.update(view, others, state.fallback, params, **extra_args)
        directions = {**step.directions, **updates}
        return step._replace(directions=directions, state=step.state._replace(fallback=fallback))
