"""A loss as a jaxpr with the layers found in it."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.capture._graph import views
from optax_curv.capture._graph.flow import without_gradient
from optax_curv.capture._graph.jaxpr import inlined
from optax_curv.capture._graph.marks import UNKNOWN, Batch, Mark, Node
from optax_curv.capture._graph.mean import divisors, final_sums, shows_examples
from optax_curv.capture._graph.uses import Use, group
from optax_curv.capture._graph.walk import Walk
from optax_curv.layers import Layers

# Entries of a leaf up to which each example may have a copy of it, as of a token or a position.
MAX_COPIED = 2**16
FROZEN = "it is frozen: the loss depends on it through stop_gradient alone"
# Shapes and dtypes of raw keys of the generators threefry and rbg.
RAW_KEYS = {((2,), np.dtype(np.uint32)), ((4,), np.dtype(np.uint32))}


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A traced function.

    Attributes:
      layers: its layers.
      node: the function of flat parameters and array arguments.
      uses: every use of a layer that has a tap, by number.
      leaves: the parameters as given.
      arrays: the array arguments as given.
      restore: takes flat results to (the function's own result, what `update` wants).
      grads: takes the gradients of the leaves to a tree like the parameters.
      update: writes other state back into an nnx module, see `Model`.
      batch: number of examples.
    """

    layers: Layers
    node: Node
    uses: dict[int, Use]
    leaves: list
    arrays: list
    restore: Callable
    grads: Callable
    update: Callable
    batch: int


def _is_array(x) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_numeric(x) -> bool:
    return _is_array(x) or isinstance(x, bool | int | float | complex)


def trace(
    caller: str, function: Callable, params: Any, args: tuple, kwargs: dict, batch_size: Any = None
) -> Trace:
    """Traces `function(params, *args, **kwargs)`; arguments that are no arrays are static.

    Args:
      caller: name of the public function that asks, for messages.
      function: a loss, or a function of loss and outputs.
      params: parameters.
      args: further arguments.
      kwargs: further arguments by name.
      batch_size: number of examples, or None.
    """
    model = take_apart(params)
    grads_tree = jax.tree.structure(model.grads_like if model else params)
    whole = params
    if model:
        function, params = model.wrap(function), model.params
    leaves, tree = jax.tree.flatten(params)
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    for path, leaf in zip(paths, leaves, strict=True):
        _require_array(caller, whole, path, leaf)
    others, other_tree = jax.tree.flatten((args, kwargs))
    arrays = [x for x in others if _is_array(x)]

    def flat(leaves, arrays):
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            other_tree, [next(given) if _is_array(x) else x for x in others]
        )
        results, results_tree = jax.tree.flatten(
            function(jax.tree.unflatten(tree, leaves), *args, **kwargs)
        )
        static[:] = [results_tree, [None if _is_numeric(x) else x for x in results]]
        return [x for x in results if _is_numeric(x)]

    def restore(flat):
        given = iter(flat)
        result = jax.tree.unflatten(static[0], [next(given) if x is None else x for x in static[1]])
        return result if model else (result, None)

    static: list = []
    jaxpr = inlined(jax.make_jaxpr(flat)(leaves, arrays))
    shapes = [tuple(v.aval.shape) for v in jaxpr.jaxpr.invars]
    candidates = _leading_axes((args, kwargs)) if batch_size is None else [batch_size]
    for count in candidates:
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(
                f"{caller}: the number of examples (batch_size, or the leading axis of the first "
                f"array after the parameters) is {count!r}; expected at least one, known at trace "
                "time."
            )
    names = [jax.tree_util.keystr(path) for path in paths]
    walks = (_walk(jaxpr, names, shapes, int(count), set()) for count in candidates)
    if batch_size is None:
        node, walk, results = _that_shows_examples(caller, walks)
    else:
        node, walk, results = next(walks)
    batch = walk.batch
    layers, uses = _grouped(node, walk, results, paths, shapes, {})
    kernels = walk.kernels - walk.queries
    own = {leaf for leaf in _small(layers, names, shapes) if leaf not in kernels}
    if own:  # what no layer describes, with a tap at the leaf itself
        reasons = {leaf: layers.uncovered[names[leaf]] for leaf in own}
        again, walk, results = _walk(jaxpr, names, shapes, batch, own)
        more, taps = _grouped(again, walk, results, paths, shapes, reasons)
        if more.uncovered.keys() < layers.uncovered.keys():
            node, layers, uses = again, more, taps
    update = model.update if model else lambda after: None
    return Trace(layers, node, uses, leaves, arrays, restore, grads_tree.unflatten, update, batch)


def _require_array(caller: str, params: Any, path: tuple, leaf: Any):
    """Refuses a parameter that is no floating-point array, and says what to pass."""
    if _is_numeric(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return
    got = f"has dtype {leaf.dtype}" if _is_array(leaf) else f"is a {type(leaf).__name__}"
    advice = "pass what is not trained as another argument"
    equinox, nnx, linen = map(sys.modules.get, ("equinox", "flax.nnx", "flax.linen"))
    if equinox is not None and isinstance(params, equinox.Module):
        advice = (
            "take the module apart, arrays, rest = eqx.partition(model, eqx.is_inexact_array), and "
            "put it together in the loss, eqx.combine(arrays, rest)"
        )
    elif linen is not None and isinstance(params, linen.Module):
        advice = 'pass the parameters, model.init(key, x)["params"]'
    elif nnx is not None and isinstance(params, nnx.State | nnx.Module):
        advice = "pass nnx.state(model, nnx.Param), and the rest as another argument"
    raise ValueError(
        f"{caller}: the parameter {jax.tree_util.keystr(path) or 'at the root'} {got}, expected a "
        f"floating-point array; {advice}."
    )


def _leading_axes(args_and_kwargs) -> list[int]:
    """Lists the sizes of leading axes of the arguments, the likeliest number of examples first.

    Arrays in a tree of trees, such as batch statistics, come last, and raw PRNG keys are left out.
    """
    sizes: dict[bool, dict[int, None]] = {False: {}, True: {}}
    for path, x in jax.tree.leaves_with_path(args_and_kwargs):
        if _is_array(x) and x.shape and (x.shape, x.dtype) not in RAW_KEYS:
            deep = len(path) > 3  # args or kwargs, the argument, and one key into it
            sizes[deep][x.shape[0]] = None
    first, *others = dict.fromkeys([*sizes[False], *sizes[True]]) or [1]
    return [first, *(size for size in others if size > 0)]


def _walk(
    jaxpr, names: list[str], shapes: list, batch: int, own: set[int]
) -> tuple[Node, Walk, list[Mark]]:
    """Walks a loss for a number of examples, with the leaves `own` as uses of their own."""
    walk, node = Walk(names, batch), Node(jaxpr)
    constants = [*map(jnp.shape, jaxpr.consts)]
    marks, of_constants = _initial_marks(shapes, constants, len(names), batch)
    for leaf in sorted(own):
        marks[leaf] = walk.enter(node, leaf, shapes[leaf])
    return node, walk, walk.node(node, marks, of_constants)


def _grouped(
    node: Node, walk: Walk, results: list[Mark], paths: list, shapes: list, reasons: dict[int, str]
) -> tuple[Layers, dict[int, Use]]:
    """Makes the layers of a walk; leaves that it took as uses of their own have `reasons`."""
    results = results[:1]  # the loss: what comes beside it has no gradient
    walk.seeds.settle(walk.found, results)
    for number in walk.seeds.entries:
        use = walk.found[number]
        if use.untold is not None:
            use.untold = reasons[use.view.source]
    unused = {leaf: reason for mark in results for leaf, reason in mark.derived}
    unused |= dict.fromkeys(walk.stopped - unused.keys(), FROZEN)
    frozen, unseen = without_gradient(node)
    unused |= {walk.leaf_of(number): FROZEN for number in frozen - unseen}
    unused |= {leaf: reasons[leaf] for leaf in map(walk.leaf_of, frozen & walk.seeds.entries)}
    refused = {
        leaf: f"the kernel that meets the data is made of it: {reason}"
        if leaf in walk.made
        else reason
        for leaf, reason in walk.refused.items()
    }
    live = {n: use for n, use in enumerate(walk.found) if n not in frozen}
    return group(live, refused, unused, paths, shapes[: len(paths)], walk.batch)


def _small(layers: Layers, names: list[str], shapes: list) -> list[int]:
    """Uncovered leaves of which every example may have a copy."""
    return [
        leaf
        for leaf, (name, shape) in enumerate(zip(names, shapes, strict=False))
        if layers.uncovered.get(name, FROZEN) != FROZEN and math.prod(shape) <= MAX_COPIED
    ]


def _that_shows_examples(caller: str, walks: Iterator) -> tuple[Node, Walk, list[Mark]]:
    """Picks the number of examples that reaches the mean at the end of the loss.

    If several do, because an array has the length of a feature axis, the one at which most uses of
    layers see the examples is picked, and the first among equals. Where none does, the first
    stands, unless the mean is over another number.
    """
    first, means, best, most = None, set(), None, -1.0
    for node, walk, results in walks:
        sums = final_sums(node, node.jaxpr.jaxpr.outvars[0])
        if first is None:
            first, means = (node, walk, results), divisors(sums)
        seen = [use.examples is not None for use in walk.found] or [True]
        share = sum(seen) / len(seen)
        if shows_examples(sums) and share > most:
            best, most = (node, walk, results), share
            if share == 1:
                break
    if best is not None:
        return best
    assert first is not None  # there is at least one number
    count = first[1].batch
    if means and all(mean % count for mean in means):
        raise ValueError(
            f"{caller}: the leading axis of the arrays after the parameters says that the batch "
            f"has {count} examples, but the loss is a mean over {sorted(means)}; give batch_size=, "
            "the number of examples, as for a time-major batch [time, examples, ...]."
        )
    return first


def _initial_marks(shapes, constants, parameters: int, batch: int) -> tuple[list[Mark], list[Mark]]:
    """Marks of the arguments and of the constants.

    Parameters are whole leaves; arrays with a leading axis of this size hold the examples.
    Constants count only where no argument has such an axis. Where nothing has one, everything may
    depend on the examples.
    """
    leaves = [Mark(leaves=(views.whole(leaf, shapes[leaf]),)) for leaf in range(parameters)]
    given, closed_over = (
        [shape[:1] == (batch,) for shape in group] for group in (shapes[parameters:], constants)
    )
    if any(given):
        closed_over = [False] * len(constants)
    unknown = None if any(given + closed_over) else UNKNOWN
    first, second = (
        [Mark(batch=Batch(0) if holds else unknown) for holds in x] for x in (given, closed_over)
    )
    return leaves + first, second


class Model(NamedTuple):
    """An nnx module taken apart.

    Attributes:
      params: pure arrays.
      grads_like: an `nnx.State`, the structure of its gradients.
      wrap: makes a function of the module one of `params` that also returns the other state after
        the call.
      update: writes that state (batch statistics, random counters) back into the module.
    """

    params: Any
    grads_like: Any
    wrap: Callable
    update: Callable


def as_pure(tree: Any) -> Any:
    """Puts the arrays of `nnx.Variable`s in their places in a tree."""
    nnx = sys.modules["flax.nnx"]
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)  # before Flax 0.12.7


def take_apart(params: Any) -> Model | None:
    """Takes an nnx module apart; returns None for other parameters."""
    nnx = sys.modules.get("flax.nnx")  # which is not imported for others
    if nnx is None or not isinstance(params, nnx.Module):
        return None
    graph, state, rest = nnx.split(params, nnx.Param, ...)
    others = as_pure(rest)

    def wrap(function):
        def of_arrays(arrays, *args, **kwargs):
            model = nnx.merge(graph, arrays, others)
            result = function(model, *args, **kwargs)
            return result, as_pure(nnx.state(model, nnx.Not(nnx.Param)))

        return of_arrays

    return Model(as_pure(state), state, wrap, lambda after: nnx.update(params, after))
