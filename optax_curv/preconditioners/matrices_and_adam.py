"""Matrices by one method and everything else by Adam, as one transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners import axis_factors, contracts, kron_layout
from optax_curv.preconditioners.chain_pieces import normalize_by_rms


class MatricesAndAdamState(NamedTuple):
    """State of `shampoo` and `soap` before decay and learning rate.

    Attributes:
      matrices: the method's state, for its leaves only.
      others: Adam's state, for its leaves only.
      total_notfinite: steps skipped for a NaN or infinity, int32 [].
    """

    matrices: Any
    others: Any
    total_notfinite: jax.Array


def with_adam(
    method: str, tx, learning_rate, *, rms, adam_for, stacked, adam, weight_decay, weight_decay_mask
) -> optax.GradientTransformationExtraArgs:
    """The alias of a method for matrices: its updates of one RMS, Adam's, decoupled weight decay, a learning rate."""
    if rms is not None:
        contracts.require_number(method, "rms", rms, above=0)
        tx = optax.chain(tx, normalize_by_rms(rms))
    decays = not contracts.is_python_number(weight_decay, 0)
    return optax.chain(
        matrices_and_adam(method, tx, adam, adam_for, stacked),
        optax.add_decayed_weights(weight_decay, weight_decay_mask) if decays else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def matrices_and_adam(method: str, tx, adam, adam_for, stacked) -> optax.GradientTransformationExtraArgs:
    """`tx` for matrices and Adam for what is none or what `adam_for` selects; nothing moves on a NaN anywhere.

    Args:
      method: the alias, whose name is also the label of its own leaves.
      tx: the method's transformation.
      adam: Adam's.
      adam_for: see `labels`.
      stacked: leading axes that count layers, as the method takes them; the leaf without them is to be a matrix.
    """

    def ours(tree):
        return jax.tree.map(lambda label: label == method, labels(method, adam_for, stacked, tree))

    def others(tree):
        return jax.tree.map(lambda label: label != method, labels(method, adam_for, stacked, tree))

    matrices = optax.masked(tx, ours)
    adam = optax.masked(adam, others)

    def init(params):
        contracts.require_float_leaves(method, params, complex_leaves=True)
        return MatricesAndAdamState(matrices.init(params), adam.init(params), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        good, total_notfinite = axis_factors.soundness(updates, None, state.total_notfinite)
        new, of_matrices = matrices.update(updates, state.matrices, params, sound=good, **extra_args)
        new, of_others = adam.update(new, state.others, params)
        new = jax.tree.map(lambda u, g: jnp.where(good, u, 0).astype(g.dtype), new, updates)
        of_others = jax.tree.map(lambda new, old: jnp.where(good, new, old), of_others, state.others)
        return new, MatricesAndAdamState(of_matrices, of_others, total_notfinite)

    return optax.GradientTransformationExtraArgs(init, update)


def labels(method: str, adam_for, stacked, tree):
    """`method` or "adam" for each leaf.

    Args:
      method: name of the method.
      adam_for: None; a function of a leaf's path (as `jax.tree_util.keystr` takes it) and the leaf; or a tree that is
        like the parameters or a prefix of theirs. Its values: True or "adam" for Adam, the method's name for the
        method whatever the leaf's rank, False for the rule: matrices by the method, everything else by Adam.
      stacked: leading axes that count layers.
      tree: of parameters or gradients.
    """
    paths = jax.tree.leaves_with_path(tree)
    ranks = [
        len(leaf.shape) - stack
        for (_, leaf), stack in zip(paths, kron_layout.stack_ndims(method, stacked, tree), strict=True)
    ]
    if adam_for is None:
        chosen = [False] * len(paths)
    elif callable(adam_for):
        chosen = [adam_for(path, leaf) for path, leaf in paths]
    else:
        chosen = _by_prefix(method, adam_for, tree)

    def label(path, choice, rank):
        if isinstance(choice, str) and choice in ("adam", method):
            return choice
        if isinstance(choice, str) or choice not in (True, False):
            raise ValueError(
                f"{method}: adam_for gives {choice!r} for the leaf {jax.tree_util.keystr(path) or 'at the root'}; "
                f"expected True or 'adam', False, or {method!r}."
            )
        return "adam" if choice or rank != 2 else method

    found = [label(path, choice, rank) for (path, _), choice, rank in zip(paths, chosen, ranks, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _by_prefix(method, adam_for, tree):
    try:
        return jax.tree.leaves(jax.tree.broadcast(adam_for, tree, is_leaf=lambda x: x is None))
    except ValueError as error:
        given = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(adam_for)]
        wanted = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
        missed = [path for path in wanted if not any(path.startswith(p) for p in given)]
        raise ValueError(
            f"{method}: adam_for must label every leaf; it misses {missed or 'none'}, its labels are at {given}: "
            f"{error}"
        ) from None
