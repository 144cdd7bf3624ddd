"""`StackRule`: a method on stacks, and what takes the leaves that the method does not take."""

import dataclasses
import functools
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

    def diagonal_axes(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which axes of a tensor have a diagonal factor."""
        return (False,) * len(shape)

    def diagonals(self, name: str, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which axes of the tensors of the stack of this name have a diagonal factor."""
        del name
        return self.diagonal_axes(shape)

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
            split = self._split(structs)
            filled = self.owners.filled_struct
            structs = {n: x if n in split else filled(x) for n, x in structs.items()}
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
        blocks = self._blocks({n: stack.struct for n, stack in view.of_kind(is_ours).items()})
        split = self._split({name: blocks.struct(name) for name in blocks.places})
        return self.with_owners(state._replace(**hidden), split)._replace(**fallback), others

    def with_owners(self, state: Any, split: Mapping[str, int]) -> Any:
        """The method's own state, where its rows are kept."""
        assert self.owners is not None
        rows, parts = (_of_stacks(state, pick, split) for pick in (_without, _alone))
        return _merged(self.owners.placed(rows), self.owners.placed_along(parts, split))

    def _split(self, structs: Mapping[str, Any]) -> dict[str, int]:
        """The stacks that are divided along an axis of their tensors, and which."""
        if self.owners is None:
            return {}
        axes = {
            name: self.owners.splits(x.shape, self.diagonals(name, x.shape[1:]))
            for name, x in structs.items()
        }
        return {name: axis for name, axis in axes.items() if axis is not None}

    def made(self, init: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Places the arrays of a state as they are made."""
        return compiled(init, self.owners)

    def _blocks(self, structs: Mapping[str, jax.ShapeDtypeStruct]) -> Blocks:
        return blocks_of(structs, self.block_size)

    def _stepped(
        self, tensors: dict[str, jax.Array], state: Any, sound: jax.Array, given: dict[str, Any]
    ) -> Step:
        """`update_stacks`, of the rows that each device owns, and of what is split otherwise."""
        owners = self.owners
        if owners is None:
            return self.update_stacks(tensors, state, sound, **given)
        structs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in tensors.items()}
        split, drawn = self._split(structs), self.drawn(structs, state)
        hidden = {"fallback": ()} if self.fallback is not None else {}
        shown = state._replace(**hidden)

        def of_own_rows(tensors, state, sound, given):
            step = self.update_stacks(tensors, state, sound, **given)
            return step._replace(sound=~owners.anywhere(~jnp.asarray(step.sound)))

        own = _without(tensors, split)
        trees = {name: owners.sent(_without(x, split)) for name, x in given.items()}
        trees |= {name: owners.handed(_without(x, split)) for name, x in drawn.items()}
        sent = owners.sent(own), _of_stacks(shown, _without, split), sound, trees
        step = owners.divided(of_own_rows, sent, Step({}, sent[1], sound))
        step = step._replace(directions=owners.returned(step.directions, own))
        if split:
            step = _joined(step, self._along(split, tensors, shown, sound, given, drawn))
        return step._replace(state=step.state._replace(**{n: getattr(state, n) for n in hidden}))

    def _along(
        self,
        split: dict[str, int],
        tensors: dict[str, jax.Array],
        state: Any,
        sound: jax.Array,
        given: dict[str, Any],
        drawn: dict[str, Any],
    ) -> Step:
        """The step of stacks that are split along an axis of their tensors, as XLA divides it."""
        owners: Any = self.owners

        def sent(stacks: Any) -> Any:
            return {name: owners.sent(stacks[name], axis) for name, axis in split.items()}

        def placed(name: str, x: jax.Array) -> jax.Array:
            """Divided as the tensors where it is like them; whole, where it is of their factors."""
            is_like = x.shape == tensors[name].shape
            return owners.sent(x, split[name]) if is_like else owners.whole(x)

        trees = {
            key: {n: jax.tree.map(functools.partial(placed, n), x[n]) for n in split}
            for key, x in given.items()
        }
        trees |= {name: _alone(x, split) for name, x in drawn.items()}
        alone = dataclasses.replace(self, owners=None)
        parts = owners.placed_along(_of_stacks(state, _alone, split), split, within=True)
        step = alone.update_stacks(sent(tensors), parts, sound, **trees)
        directions = {
            name: owners.returned(step.directions[name], tensors[name], axis)
            for name, axis in split.items()
        }
        state = owners.placed_along(step.state, split)
        return step._replace(directions=directions, state=state)


def _without(stacks: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """The stacks but those of these names."""
    return {name: x for name, x in stacks.items() if name not in names}


def _alone(stacks: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """The stacks of these names."""
    return {name: x for name, x in stacks.items() if name in names}


def _of_stacks(state: Any, pick: Callable, names: Mapping[str, Any]) -> Any:
    """A state with a part of its stacks."""
    fields = {n: x for n, x in state._asdict().items() if isinstance(x, dict)}
    return state._replace(**{name: pick(x, names) for name, x in fields.items()})


def _merged(state: Any, more: Any) -> Any:
    """A state with the stacks of another one besides."""
    fields = {n: x for n, x in state._asdict().items() if isinstance(x, dict)}
    return state._replace(**{name: x | getattr(more, name) for name, x in fields.items()})


def _joined(step: Step, more: Step) -> Step:
    """A step with that of other stacks; flags of the state are up where they are up in either."""
    sound = jnp.asarray(step.sound) & more.sound
    fields = {n: x for n, x in step.state._asdict().items() if isinstance(x, jax.Array)}
    flags = {n: x | getattr(more.state, n) for n, x in fields.items() if x.dtype == bool}
    state = _merged(step.state, more.state)._replace(**flags)
    return Step({**step.directions, **more.directions}, state, sound)
