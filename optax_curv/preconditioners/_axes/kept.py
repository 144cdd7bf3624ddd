"""What a state keeps of every axis, as types: a factor and its root, or a diagonal factor."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.linalg._checks import widen
from optax_curv.linalg.factors import Diagonal, SymmetricPair
from optax_curv.preconditioners._axes.moments import Axes
from optax_curv.preconditioners._transformation.averages import averaged

Kept = tuple[SymmetricPair | Diagonal, ...]


def zero_pairs(axes: Axes) -> Kept:
    """Zero factors and roots of a stack, of every axis."""

    def zeros(struct, diagonal):
        if diagonal:
            return Diagonal(jnp.zeros(struct.shape, struct.dtype))
        *batch, d, _ = struct.shape
        return SymmetricPair(jnp.zeros((*batch, d, d + 1), struct.dtype))

    return tuple(map(zeros, axes.factors, axes.diagonal))


def wide(tree: Any) -> Any:
    """The arrays of a tree in float32 at least."""
    return jax.tree.map(widen, tree)


def in_dtypes_of(tree: Any, like: Any) -> Any:
    """The arrays of a tree in the dtypes of those that a state has."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def factors_of(kept: Mapping[str, Kept]) -> dict[str, tuple[jax.Array, ...]]:
    """The factors of every stack and axis, dense [N, d, d] or diagonal [N, d]."""

    def factor(x):
        return x.vector if isinstance(x, Diagonal) else x.factor

    return {name: tuple(map(factor, of_stack)) for name, of_stack in kept.items()}


def roots_of(kept: Mapping[str, Kept]) -> dict[str, tuple[jax.Array, ...]]:
    """The roots of dense factors; a diagonal factor stands for its own, which is cheap to take."""

    def root(x):
        return x.vector if isinstance(x, Diagonal) else x.root

    return {name: tuple(map(root, of_stack)) for name, of_stack in kept.items()}


def renewed(
    kept: Mapping[str, Kept], moments: Mapping[str, Any], roots: Mapping[str, Any], weight: Any
) -> dict[str, Kept]:
    """What is kept, with this step's moments averaged in and with these roots."""

    def of_axis(x, moment, root):
        if isinstance(x, Diagonal):
            return Diagonal(averaged(x.vector, weight, moment))
        return x.replace(factor=averaged(x.lower, weight, moment), root=root)

    return {
        name: tuple(map(of_axis, of_stack, moments[name], roots[name]))
        for name, of_stack in kept.items()
    }
