"""`transformation`: the only maker of transformations, which keeps the promises of all methods.

A method is a `Rule`. It sees the tree through a `View`, as stacks or as a tree, in float32 at
least, and returns a `Step`. Around the rule, and around the whole chain of an alias, the factory

* refuses trees that do not fit each other or the state, by path;
* decides whether the step is sound, gives a zero update and the old state where it is not, and
  counts such steps in `total_notfinite`;
* counts with saturation, and keeps every dtype of the state and of the updates.

Small pieces of a chain (`PassingRule`) have none of this: they hand a NaN on to the guard of the
method before or behind them, and have no counters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg._compiler import equally_varying, materialize, not_recomputed
from optax_curv.preconditioners._stacks.owners import on_mesh_of, with_sharding_types
from optax_curv.preconditioners._transformation.numbers import is_key_data
from optax_curv.preconditioners._transformation.soundness import (
    is_finite,
    is_squarable,
    kept_unless,
)
from optax_curv.preconditioners._transformation.trees import (
    narrowed,
    path_of,
    require_parameters,
    require_same_leaves,
    widened,
)


class View(Protocol):
    """How a rule sees a tree: as arrays in float32 at least."""

    def take(self, tree: Any) -> Any:
        """The arrays of a tree."""
        ...

    def give(self, values: Any, like: Any) -> Any:
        """The tree of these arrays, in the dtypes of `like`."""
        ...


class TreeView:
    """A tree seen as a tree; it remembers the shapes and dtypes of the one it was made for."""

    def __init__(self, tree: Any = None):
        self.structs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
        )

    def take(self, tree: Any) -> Any:
        """The tree in float32 at least."""
        return widened(tree)

    def give(self, values: Any, like: Any) -> Any:
        """The tree in the dtypes of `like`."""
        return narrowed(values, like)


class Step(NamedTuple):
    """One step, as a rule hands it to the factory.

    Attributes:
      directions: as its view has them.
      state: the rule's new state; `count` and `total_notfinite` are the factory's.
      sound: bool [], whether all is that the rule looked at on its way, statistics included.
    """

    directions: Any
    state: Any
    sound: Any = True


class Rule:
    """A method: its mathematics and its options, and none of the promises.

    Attributes:
      method: the name in messages.
      complex_leaves: whether complex leaves are handled; otherwise `init` refuses them by name.
      guarded: fields of the state that `update` leaves as they were where its argument `sound` is
        False: large ones, as the factory's choice between old and new would read them once more.
    """

    method: str
    complex_leaves: ClassVar[bool] = False
    guarded: ClassVar[tuple[str, ...]] = ()

    def view(self, tree: Any) -> Any:
        """How the rule sees a tree, decided from paths and shapes."""
        return TreeView(tree)

    def require_gradients(self, updates: Any, params: Any):
        """Refuses gradients that do not fit the parameters, where these are given."""
        if params is not None:
            advice = "; take gradients of these parameters and call update(grads, state, params)"
            names = "the gradients", updates, "the parameters", params
            require_same_leaves(self.method, *names, advice)

    def check(self, updates: Any, params: Any, extra_args: Mapping[str, Any]) -> Any:
        """Refuses extra arguments that do not fit; returns those whose numbers must be sound."""
        del updates, params, extra_args
        return ()

    def init(self, view: Any, params: Any) -> Any:
        """The state, a named tuple with `count` and `total_notfinite`."""
        raise NotImplementedError

    def placed(self, view: Any, params: Any, state: Any, others: Any) -> tuple[Any, Any]:
        """The rule's state, and those of the pieces around it, where their arrays are to lie."""
        del view, params
        return state, others

    def made(self, init: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """How a whole state is made from parameters."""
        return init

    def update(
        self, view: Any, grads: Any, state: Any, params: Any, sound: jax.Array, **extra_args: Any
    ) -> Step:
        """One step. `grads` are as the view has them, `params` the tree or None."""
        raise NotImplementedError


class PassingRule:
    """A piece of a chain that passes on what is not finite, as Optax's own pieces do.

    It sees the leaves in their own dtypes. The methods around it answer a NaN with a zero update;
    a zero made of the NaN here would hide it from them.

    Attributes:
      method: the name in messages.
    """

    method: str

    def init(self, params: Any) -> Any:
        """The state; nothing by default."""
        del params
        return optax.EmptyState()

    def update(self, updates: Any, state: Any, params: Any, **extra_args: Any) -> tuple[Any, Any]:
        """(new updates, new state)."""
        raise NotImplementedError


class SeeingPiece(Protocol):
    """A piece that sees what the rule was given, as `gradients`, beside the directions."""

    def init(self, params: Any) -> Any:
        """The state."""
        ...

    def update(
        self, updates: Any, state: Any, params: Any, *, gradients: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        """(new updates, new state)."""
        ...


Piece = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation | SeeingPiece]


def counters() -> dict[str, jax.Array]:
    """The factory's own fields of a new state: two arrays, as a state may be donated."""
    return {"count": jnp.zeros([], jnp.int32), "total_notfinite": jnp.zeros([], jnp.int32)}


def transformation(
    rule: Rule | PassingRule,
    *pieces: Piece,
    first: Sequence[Piece] = (),
    last: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a rule, with Optax's own pieces around it within the same guard.

    Args:
      rule: the method, or a piece that passes on what is not finite, which takes no other.
      *pieces: transformations that follow the rule. They run on what its view shows, in float32 at
        least; or functions of the view that return such a transformation, or a `SeeingPiece`.
      first: transformations, or functions of the view, that the gradients go through before the
        rule sees them, such as `aliases.bounded`.
      last: a function (updates, params) -> updates of the finished leaves in their own dtypes, for
        what has to hold of the very numbers that are added to the parameters, as a box has.

    Returns:
      A `GradientTransformationExtraArgs`. Its state is the rule's own; with any pieces it is the
      tuple of the rule's state, those of `first` and those of `pieces`, as in `optax.chain`. A step
      with a NaN or an infinity, in gradients, in statistics, or in what is made of them, moves no
      parameter and changes no state but `total_notfinite`.
    """
    if isinstance(rule, PassingRule):
        return _passing(rule)
    around = _Stages(tuple(first), pieces)

    def all_states(params):
        view = rule.view(params)
        states = rule.init(view, params), around.init(view, params) if any(around) else []
        head, others = rule.placed(view, params, *states)
        return (head, *others) if any(around) else head

    def init(params):
        require_parameters(rule.method, params, complex_leaves=rule.complex_leaves)
        state = on_mesh_of(params, rule.made(all_states)(params))
        return state if jax.tree.leaves(params) else _with_leaves(state)

    def update(updates, state, params=None, **extra_args):
        given = updates, state, params, extra_args
        updates, state, params, extra_args = equally_varying(given)
        rule.require_gradients(updates, params)
        statistics = rule.check(updates, params, extra_args)
        head, *others = state if any(around) else (state,)
        if not jax.tree.leaves(updates):
            head = head._replace(count=jnp.asarray(optax.safe_increment(head.count)))
            return updates, (head, *others) if any(around) else head
        _require_state(rule.method, state, jax.eval_shape(all_states, updates))

        view = rule.view(updates)
        grads = view.take(updates)
        sound = not_recomputed(is_squarable(grads, statistics))
        shown = None if params is None or not any(around) else view.take(params)
        before, behind = around.of(view)
        grads, prepared = _through(before, grads, others[: len(first)], shown, extra_args)
        step = rule.update(view, grads, head, params, sound, **extra_args)
        seen = extra_args | {"gradients": grads}
        directions, after = _through(behind, step.directions, others[len(first) :], shown, seen)

        sound = not_recomputed(sound & step.sound & is_finite(directions))
        directions = jax.tree.map(lambda d: jnp.where(sound, d, jnp.zeros_like(d)), directions)
        new_head = _kept_head(rule, sound, step.state, head)
        kept = [kept_unless(sound, *pair) for pair in zip([*prepared, *after], others, strict=True)]
        new_state = (new_head, *kept) if any(around) else new_head
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        new_updates = view.give(materialize(directions), updates)
        if last is not None:
            new_updates = kept_unless(sound, last(new_updates, params), new_updates)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


class _Stages(NamedTuple):
    """The pieces before and behind a rule."""

    first: tuple[Piece, ...]
    behind: tuple[Piece, ...]

    def of(self, view: Any) -> tuple[list[Any], list[Any]]:
        """The transformations before and behind the rule, for a view."""

        def made(pieces):
            found: Any = [piece(view) if callable(piece) else piece for piece in pieces]
            return [
                optax.with_extra_args_support(piece)
                if isinstance(piece, optax.GradientTransformation)
                else piece
                for piece in found
            ]

        return made(self.first), made(self.behind)

    def init(self, view: Any, params: Any) -> list[Any]:
        """Their states."""
        arrays = jax.eval_shape(view.take, params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arrays)
        return [piece.init(zeros) for pieces in self.of(view) for piece in pieces]


def _through(pieces: Any, updates: Any, states: Any, params: Any, extra_args: Any):
    """(updates, states) behind transformations that run one after the other."""
    after = []
    for piece, old in zip(pieces, states, strict=True):
        updates, new = piece.update(updates, old, params, **extra_args)
        after.append(new)
    return updates, after


def _passing(rule: PassingRule) -> optax.GradientTransformationExtraArgs:
    """The transformation of a piece that passes on what is not finite."""

    def init(params):
        return rule.init(params)

    def update(updates, state, params=None, **extra_args):
        return rule.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _kept_head(rule: Rule, sound: jax.Array, new: Any, old: Any) -> Any:
    """The rule's state after the step, with the counters."""
    fields = {
        name: getattr(new, name)
        if name in rule.guarded
        else kept_unless(sound, getattr(new, name), getattr(old, name))
        for name in new._fields
    }
    fields["count"] = jnp.where(sound, optax.safe_increment(old.count), old.count)
    skipped = optax.safe_increment(old.total_notfinite)
    fields["total_notfinite"] = jnp.where(sound, old.total_notfinite, skipped)
    return new._replace(**fields)


def _with_leaves(state: Any) -> Any:
    """A state in which a number stands in the place of every empty dict.

    `optax.tree.map_params` compares the state with that of a tree without leaves, whose stacks it
    cannot know: at a leaf it leaves alone whatever the state has there.
    """
    is_empty = lambda x: isinstance(x, dict) and not x  # noqa: E731
    return jax.tree.map(lambda x: jnp.zeros([]) if is_empty(x) else x, state, is_leaf=is_empty)


def _require_state(method: str, state: Any, expected: Any):
    """Refuses a state of other parameters or of another method or option, and names both sides."""

    def shape(path: str, leaf: Any) -> Any:
        # A state keeps the kind of key it was made with, whatever kind is the default now.
        return "a key" if path.endswith(".key") and is_key_data(leaf) else jnp.shape(leaf)

    given, wanted = (
        {(name := path_of(path)): shape(name, x) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (state, expected)
    )
    if given != wanted:
        differing = sorted(
            path for path in given.keys() | wanted.keys() if given.get(path) != wanted.get(path)
        )
        path = differing[0]
        raise ValueError(
            f"{method}: the state does not fit the gradients: at {path} it has shape "
            f"{given.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')} "
            f"({len(differing)} such places). Make it with init from parameters of the gradients' "
            "tree and shapes, by a transformation with the same options; with sharding= it has "
            "rows for its own number of devices."
        )
