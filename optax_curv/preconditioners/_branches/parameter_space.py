"""Branches that are rows of the parameters: what is refused, and the metric that they make."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.preconditioners._branches.metric import (
    Metric,
    StoredRows,
    has_split,
    is_split,
    metric_of,
)
from optax_curv.preconditioners._branches.rows import is_array, require_weights
from optax_curv.preconditioners._stacks.owners import Owners
from optax_curv.preconditioners._transformation.trees import require_same_leaves
from optax_curv.rows import LazyRows


def geometry(
    grads: Any,
    branches: Any,
    weights: Any,
    centered: bool,
    ddof: int | None,
    owners: Owners | None = None,
) -> tuple[Any, Metric]:
    """The gradient and the metric, in one precision."""
    lazy = isinstance(branches, LazyRows)
    given = branches.params if lazy else branches
    wide = jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves((grads, given)))).dtype

    def cast(x):
        return x.astype(jnp.promote_types(wide, jnp.result_type(x)))

    gradient = jax.tree.map(cast, grads)
    rows = branches
    if not lazy:
        leaves, treedef = jax.tree.flatten(gradient)
        entries = treedef.flatten_up_to(jax.tree.map(lambda x: cast(jnp.asarray(x)), branches))
        rows = StoredRows(entries, leaves, treedef, owners)
    return gradient, metric_of(rows, centered, ddof or 0, weights, wide)


def judged(method: str, branches: Any, weights: Any, count: int) -> Any:
    """The weights, which are checked, and all of the rows that can be looked at beforehand."""
    if weights is not None:
        require_weights(method, weights, count)
    return (None if isinstance(branches, LazyRows) else branches), weights


def refuse_split_gradients(method: str, updates: Any):
    """Refuses gradients that are rows, with what to make of them."""
    if has_split(updates):
        raise ValueError(
            f"{method}: the gradients hold optax_curv.SplitRows, which jacobian_rows "
            "makes of a function that is not holomorphic in a complex leaf. Make the gradient "
            "of such a leaf from its two halves, Re Σ f* ∂ψ/∂Re z + i Re Σ f* ∂ψ/∂Im z, or "
            "take the conjugate of jax.grad's."
        )


def are_rows(branches: Any, updates: Any, projection: Any) -> bool:
    """Tells whether branches are samples of the parameters themselves, and not of a state."""
    # An array is that where the parameters are a single array as well and it has their shape behind
    # K; for vectors [n] and branches [K, n], which may be either, a projection tells.
    if branches is None or not is_array(branches):
        return branches is not None
    if not is_array(updates) or not jnp.ndim(branches):
        return False
    fits = jnp.shape(branches)[1:] == jnp.shape(updates)
    return fits and (projection is None or jnp.ndim(branches) != 2)


def count_of_rows(method: str, branches: Any, updates: Any) -> int:
    """Returns K of samples of the parameters; refuses those that do not fit or are none."""
    if isinstance(branches, LazyRows):
        return _count_of_lazy_rows(method, branches, updates)
    halves = jax.tree.leaves(branches, is_leaf=is_split)
    for x in halves:
        if is_split(x):
            require_same_leaves(method, "real halves of rows", [x.real], "imaginary ones", [x.imag])
    one_half = jax.tree.map(lambda x: x.real if is_split(x) else x, branches, is_leaf=is_split)
    given, wanted = jax.tree.structure(one_half), jax.tree.structure(updates)
    if given != wanted:
        raise ValueError(
            f"{method}: branches in parameter space are the tree {given}; expected that of the "
            f"gradients, {wanted}, each leaf with one leading axis K in front."
        )
    got, shapes = jax.tree.map(jnp.shape, one_half), jax.tree.map(jnp.shape, updates)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(one_half)}
    expected = jax.tree.map(lambda leaf: (*next(iter(counts), ()), *jnp.shape(leaf)), updates)
    if got != expected or len(counts) != 1 or () in counts:
        raise ValueError(
            f"{method}: branches in parameter space have the shapes {got}; expected those of the "
            f"parameters with one leading axis K in front: {shapes}."
        )
    if counts == {(0,)}:
        raise ValueError(
            f"{method}: branches in parameter space have no rows (K = 0); expected one at least."
        )
    return counts.pop()[0]


def _count_of_lazy_rows(method: str, rows: LazyRows, updates: Any) -> int:
    """Returns K of rows that are never stored; refuses those of other parameters."""
    require_same_leaves(
        method, "the gradients", updates, "the parameters of lazy rows", rows.params
    )
    return rows.count
