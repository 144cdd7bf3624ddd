"""A loss as a jaxpr with the layers found in it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.capture import layouts
from optax_curv.capture.batch import UNKNOWN
from optax_curv.capture.grouping import Use, group
from optax_curv.capture.jaxpr import inlined
from optax_curv.capture.layers import Layers
from optax_curv.capture.marks import Batch, Mark, Node
from optax_curv.capture.nnx_models import take_apart
from optax_curv.capture.tracing import Walk


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A function's jaxpr with the layers found in it.

    Attributes:
      layers: the layers.
      node: the function of parameter leaves and array arguments, flat, and where the uses are.
      uses: the uses of layers by number.
      leaves: the parameter leaves as given.
      arrays: the array arguments as given.
      restore: takes flat results to (the function's own result, what `update` wants).
      grads: takes the leaves' gradients to a tree like the parameters.
      update: writes the state of an nnx module after the call back into it.
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


def trace(function: Callable, params, args, kwargs, batch_size: int | None = None) -> Trace:
    """Traces a function of parameters and finds its layers; nothing is computed.

    Args:
      function: `function(params, *args, **kwargs)`.
      params: parameters, arrays or `jax.ShapeDtypeStruct`.
      args: positional arguments; leaves that are not arrays are static.
      kwargs: keyword arguments, likewise.
      batch_size: number of examples; None: see `value_grad_and_curvature`.

    Returns:
      The trace.

    Raises:
      ValueError: if a parameter is no floating-point array, there is no example, or a `while_loop` surrounds a layer.
    """
    model = take_apart(params)
    grads_tree = jax.tree.structure(model.grads_like if model else params)
    if model:
        function, params = model.wrap(function), model.params
    paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    paths, leaves = [path for path, _ in paths_and_leaves], [leaf for _, leaf in paths_and_leaves]
    for path, leaf in paths_and_leaves:
        if not _is_numeric(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            got = f"has dtype {jnp.result_type(leaf)}" if _is_numeric(leaf) else f"is a {type(leaf).__name__}"
            raise ValueError(
                f"value_grad_and_curvature: the parameter {jax.tree_util.keystr(path) or 'at the root'} {got}, "
                "expected a floating-point array; pass what is not trained as another argument."
            )
    others_and_paths, other_tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    others = [x for _, x in others_and_paths]
    arrays = [x for x in others if _is_array(x)]

    def flat(leaves, arrays):
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(other_tree, [next(given) if _is_array(x) else x for x in others])
        results, results_tree = jax.tree.flatten(function(jax.tree.unflatten(tree, leaves), *args, **kwargs))
        static[:] = [results_tree, [None if _is_numeric(x) else x for x in results]]
        return [x for x in results if _is_numeric(x)]

    def restore(flat):
        given = iter(flat)
        result = jax.tree.unflatten(static[0], [next(given) if x is None else x for x in static[1]])
        return result if model else (result, None)

    static: list = []
    jaxpr = inlined(jax.make_jaxpr(flat)(leaves, arrays))
    shapes = [tuple(v.aval.shape) for v in jaxpr.jaxpr.invars]
    batch = _number_of_examples(others_and_paths) if batch_size is None else batch_size
    if not isinstance(batch, int | np.integer) or batch < 1:
        raise ValueError(
            "value_grad_and_curvature: the number of examples, batch_size or the leading axis of the first array after "
            f"the parameters, is {batch!r}; expected at least one, known at trace time."
        )
    batch = int(batch)
    walk = Walk([jax.tree_util.keystr(path) for path in paths], batch)
    node = Node(jaxpr)
    results = walk.node(node, *_initial_marks(shapes, [*map(jnp.shape, jaxpr.consts)], len(leaves), batch))
    walk.seeds.settle(walk.uses, results)
    unused = {leaf: reason for mark in results for leaf, reason in mark.derived}
    layers, uses = group(walk.uses, walk.refused, unused, paths, shapes[: len(leaves)], batch)
    update = model.update if model else lambda after: None
    unflatten = functools.partial(jax.tree.unflatten, grads_tree)
    return Trace(layers, node, uses, leaves, arrays, restore, unflatten, update, batch)


def _number_of_examples(others_and_paths) -> int:
    """The leading axis of the first array, but of no PRNG key, and of no tree of trees as batch statistics are."""
    leading = [
        (len(path) > 3, x.shape[0])  # args or kwargs, the argument, and one key into it
        for path, x in others_and_paths
        if _is_array(x) and x.shape and (x.shape, x.dtype) != ((2,), np.uint32)
    ]
    return min(leading, key=lambda nested_and_size: nested_and_size[0], default=(False, 1))[1]


def _initial_marks(shapes, constants, parameters: int, batch: int) -> tuple[list[Mark], list[Mark]]:
    """Marks of the arguments and of the constants: whole leaves, and arrays whose leading axis holds the examples."""
    # Constants count only where no argument has such an axis; where nothing has, all may depend on the examples.
    leaves = [Mark(leaves=(layouts.whole(leaf, shapes[leaf]),)) for leaf in range(parameters)]
    groups = [[shape[:1] == (batch,) for shape in group] for group in (shapes[parameters:], constants)]
    if any(groups[0]) or not any(groups[1]):
        groups[1] = [False] * len(constants)
    unknown = None if any(groups[0] + groups[1]) else UNKNOWN
    marks = [[Mark(batch=Batch(0) if holds else unknown) for holds in group] for group in groups]
    return leaves + marks[0], marks[1]
