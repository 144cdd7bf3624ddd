"""`StackRule`: a method on stacks, and what takes the leaves that the method does not take."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._stacks.blocks import Blocks, blocks_of
from optax_curv.preconditioners._stacks.owners import Owners, compiled
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
    one step is (`update_stacks`). Its state has a field `fallback` where it may have one. What the
    state keeps of stacks are dicts, by the stacks' names.

    With `owners` each device runs `update_stacks` on the rows that it owns, within one `shard_map`.
    What is decided over all rows goes through `anywhere`, outside of any branch.

    Attributes:
      method: the name in messages.
      fallback: what takes the leaves that the method does not take.
      block_size: longer axes are cut into blocks, which are the rows of stacks of their own.
      owners: who owns the rows; None: every device does all.
      like_gradients: extra arguments of `update` that are trees like the gradients.
    """

    method: str
    fallback: Fallback | None = None
    block_size: int | None = None
    owners: Owners | None = None
    like_gradients: ClassVar[tuple[str, ...]] = ()

    def members(self, tree: Any) -> list[tuple[Member, Kind]]:
        """The members of a tree and their kinds, decided from paths and shapes."""
        raise NotImplementedError

    def init_stacks(self, structs: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
        """The state of the method's stacks; its `fallback` is replaced."""
        raise NotImplementedError

    def update_stacks(
        self, grads: Mapping[str, jax.Array], state: Any, sound: jax.Array, **extra_args: Any
    ) -> Step:
        """One step of the method's stacks; see `Rule.update`.

        The extra arguments are those `like_gradients`, as stacks, and what is `drawn`.
        """
        raise NotImplementedError

    def drawn(self, structs: Mapping[str, jax.ShapeDtypeStruct], state: Any) -> dict[str, Any]:
        """Random numbers for every row, as extra arguments of `update_stacks`: by stack [N, …].

        Owners are handed them with their rows, as they would draw others than one device does.
        """
        del structs, state
        return {}

    def anywhere(self, flag: jax.Array) -> jax.Array:
        """Whether `flag`, a bool [] of one device's rows, is true on any device."""
        return flag if self.owners is None else self.owners.anywhere(flag)

    def view(self, tree: Any) -> Stacks:
        """The stacks of a tree."""
        return Stacks(tree, self.members(tree))

    def init(self, view: Stacks, params: Any) -> Any:
        """The state of the method and of the fallback."""
        blocks = self._blocks({n: stack.struct for n, stack in view.of_kind(is_ours).items()})
        structs = {name: blocks.struct(name) for name in blocks.places}
        if self.owners is not None:
            structs = {name: self.owners.filled_struct(x) for name, x in structs.items()}
        state = self.init_stacks(structs)
        if self.fallback is not None:
            state = state._replace(fallback=self.fallback.init(view, params))
        return state

    def update(
        self, view: Stacks, grads: Any, state: Any, params: Any, sound: jax.Array, **extra_args: Any
    ) -> Step:
        """One step of the method on its stacks, and of the fallback on all others."""
        ours = {name: grads[name] for name in view.of_kind(is_ours)}
        blocks = self._blocks({n: jax.ShapeDtypeStruct(g.shape, g.dtype) for n, g in ours.items()})
        trees = {n: extra_args[n] for n in self.like_gradients if extra_args.get(n) is not None}
        given = {n: blocks.take(view.take(tree, is_ours)) for n, tree in trees.items()}
        step = self._stepped(blocks.take(ours), state, sound, given)
        step = step._replace(directions=blocks.give(step.directions))
        others = {name: grads[name] for name in view.of_kind(is_other)}
        if self.fallback is None:
            return step._replace(directions={**step.directions, **others})
        updates, fallback = self.fallback.update(view, others, state.fallback, params, **extra_args)
        directions = {**step.directions, **updates}
        return step._replace(directions=directions, state=step.state._replace(fallback=fallback))

    def placed(self, view: Stacks, params: Any, state: Any, others: Any) -> tuple[Any, Any]:
        """The state with its owners, and that of all else sharded as the parameters are."""
        owners = self.owners
        if owners is None:
            return state, others
        hidden = {"fallback": ()} if self.fallback is not None else {}
        fallback = {name: getattr(state, name) for name in hidden}
        leaves = jax.tree.leaves(params)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            trees = ()
        else:
            trees = params, view.take(params)
        fallback, others = owners.placed_like((fallback, others), *trees)
        return self.with_owners(state._replace(**hidden))._replace(**fallback), others

    def with_owners(self, state: Any) -> Any:
        """The method's own state, where its rows are kept."""
        return state if self.owners is None else self.owners.placed(state)

    def made(self, init: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Places the arrays of a state as they are made."""
        return compiled(init, self.owners)

    def _blocks(self, structs: Mapping[str, jax.ShapeDtypeStruct]) -> Blocks:
        return blocks_of(structs, self.block_size)

    def _stepped(
        self, tensors: dict[str, jax.Array], state: Any, sound: jax.Array, given: dict[str, Any]
    ) -> Step:
        """`update_stacks`, of the rows that each device owns."""
        owners = self.owners
        if owners is None:
            return self.update_stacks(tensors, state, sound, **given)
        structs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in tensors.items()}
        hidden = {"fallback": ()} if self.fallback is not None else {}

        def of_own_rows(tensors, state, sound, given):
            step = self.update_stacks(tensors, state, sound, **given)
            return step._replace(sound=~owners.anywhere(~jnp.asarray(step.sound)))

        given = owners.sent(given) | owners.handed(self.drawn(structs, state))
        sent = owners.sent(tensors), state._replace(**hidden), sound, given
        step = owners.divided(of_own_rows, sent, Step({}, sent[1], sound))
        step = step._replace(directions=owners.returned(step.directions, tensors))
        return step._replace(state=step.state._replace(**{n: getattr(state, n) for n in hidden}))
