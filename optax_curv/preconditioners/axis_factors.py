"""Second moments along every axis of a leaf, and the roots of them that precondition it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.linalg import kron_matvec
from optax_curv.linalg.checks import widen
from optax_curv.preconditioners import contracts, kron_geometries, kron_layout

HIGHEST = jax.lax.Precision.HIGHEST
# Between refreshes of the roots lie 1 + count / EARLY steps, as far as the period allows: the gradients change most
# at the start.
EARLY = 4
SMALL = 64


def layout_of(method: str, tree, *, max_dim, block_size, stacked, dtype) -> kron_layout.Layout:
    """Each leaf's pieces: an axis is dense but where its length is 1 or above `max_dim`."""
    for name, value in (("max_dim", max_dim), ("block_size", block_size), ("stacked", stacked)):
        contracts.structural(method, name, value)

    def with_kinds(piece):
        return piece._replace(diagonal=tuple(bool(d == 1 or d > max_dim) for d in piece.shape))

    leaves = zip(jax.tree.leaves(tree), kron_layout.stack_ndims(method, stacked, tree), strict=True)
    by_leaf = [
        [with_kinds(piece) for piece in kron_layout.pieces_of(position, leaf, stack, block_size, dtype)]
        for position, (leaf, stack) in enumerate(leaves)
    ]
    return kron_layout.Layout(jax.tree.structure(tree), by_leaf)


def running_weight(decay, count) -> jax.Array:
    """Weight w of the newest of count + 1 values in m ← m + w (new - m), which keeps m free of the bias of its start.

    It is (1 - decay) / (1 - decay^(count + 1)); for decay 1, a plain mean, 1 / (count + 1).
    """
    steps = jnp.asarray(count + 1, decay.dtype)
    plain = decay >= 1
    kept = jnp.where(plain, 0, decay)
    return jnp.where(plain, 1 / steps, (1 - kept) / (1 - kept**steps))


def opened(method: str, layout_of, likes, updates, state, params, sound):
    """What every update begins with: it refuses trees of other shapes, and takes a bad step for one without gradients.

    Args:
      method: name for error messages.
      layout_of: function of a tree that returns its `Layout`.
      likes: names of the state's trees like the factors.
      updates: the gradients.
      state: has momentum and total_notfinite.
      params: to compare with; or None.
      sound: see `soundness`.

    Returns:
      (state with tuples in those trees, layout, gradients or zeros, whether to take the step, total_notfinite).
    """
    if params is not None:
        contracts.require_same_leaves(method, "the gradients", updates, "the parameters", params)
    contracts.require_same_leaves(method, "the gradients", updates, "the state's momentum", state.momentum)
    state = state._replace(**{name: contracts.tuples_at_leaves(getattr(state, name), updates) for name in likes})
    good, total_notfinite = soundness(updates, sound, state.total_notfinite)
    grads = jax.tree.map(lambda g: jnp.where(good, g, 0), updates)
    return state, layout_of(updates), grads, good, total_notfinite


def soundness(grads, sound, total_notfinite):
    """(whether to take the step, the counter of those not taken): where every gradient has a finite square.

    A bad step is one of zero gradients and weights, after which no choice between old and new state is left, each of
    which would be compiled for itself.

    Args:
      grads: a tree.
      sound: bool [] to go by instead; or None.
      total_notfinite: the counter, int32 [].
    """
    if sound is None:
        squares = [jnp.sum(jnp.square(jnp.abs(widen(g)))) for g in jax.tree.leaves(grads)]
        sound = jnp.all(jnp.isfinite(jnp.stack(squares))) if squares else jnp.bool_(True)
    # By way of a conditional, behind which the compiler does not derive it anew for every use.
    total = jax.lax.cond(sound, lambda n: n, lambda n: n + 1, total_notfinite)
    return total == total_notfinite, total


def momentum_and_direction(b1, nesterov: bool, count, momentum, grads, good):
    """(new momentum, what is to be preconditioned), both free of the bias of their start; the old one unless good."""
    b1 = contracts.value_at(b1, count, jnp.result_type(float))
    weight = jnp.where(good, running_weight(b1, count), 0)
    new = jax.tree.map(lambda m, g: (m + weight * (g - m)).astype(m.dtype), momentum, grads)
    if not nesterov:
        return new, new
    ahead = running_weight(b1, count + 1)  # one more step with the same gradient
    return new, jax.tree.map(lambda m, g: (m + ahead * (g - m)).astype(m.dtype), new, grads)


def axis_moment(x, axis: int, diagonal: bool) -> jax.Array:
    """Mode moment X₍ᵢ₎X₍ᵢ₎ᴴ of each of a batch [B, ...] of tensors, [B, d, d], or its diagonal [B, d]."""
    return jax.vmap(lambda one: kron_geometries.second_moment(one, axis, diagonal))(x)


def whitened_moment(x, roots, axis: int, diagonal: bool) -> jax.Array:
    """The mean mode moment of x multiplied by the roots of all other axes."""
    others = [jnp.ones_like(r[..., 0]) if i == axis else r for i, r in enumerate(roots)]
    others[axis] = jnp.ones(x.shape[axis + 1], jnp.finfo(x.dtype).dtype) * jnp.ones((len(x), 1))
    rest = math.prod(x.shape[1:]) // x.shape[axis + 1]
    return axis_moment(jax.vmap(kron_matvec)(others, x), axis, diagonal) / rest


def energy(factor, root) -> jax.Array:
    """tr(F R) of each of a batch of dense factors and roots, [B]; 0 for diagonal ones."""
    return jnp.sum((factor * root.conj()).real, axis=(-2, -1)) if factor.ndim == 3 else jnp.zeros(len(factor))


def has_moved(factors, roots, reference, limit) -> jax.Array:
    """Whether tr(F R) of any of a batch of dense factors is above `limit` times its reference, or F is no longer 0."""
    wakes = (reference == 0) & (jnp.trace(factors, axis1=-2, axis2=-1).real > 0)  # the root of 0 is 0
    return jnp.any(wakes | (energy(factors, roots) > limit * reference))


def batches(groups: list[tuple], small: int = SMALL) -> dict[Any, list[tuple[int, int]]]:
    """Where the dense factors of one batch of roots stand, (group, axis), by its width and dtype.

    Widths up to `small` go with the largest of them: a larger root costs less than one more to compile.
    """
    dense = [
        (g, axis, factor.shape[-1], factor.dtype)
        for g, factors in enumerate(groups)
        for axis, factor in enumerate(factors)
        if factor.ndim == 3
    ]
    places = {}
    for g, axis, width, dtype in dense:
        close = [w for _, _, w, other in dense if w <= small and other == dtype]
        places.setdefault((max(close, default=0) if width <= small else width, dtype), []).append((g, axis))
    return places


def is_due(count, refreshed, period) -> jax.Array:
    """Whether the schedule asks for new roots: dense early, every `period` steps later."""
    gap = jnp.minimum(jnp.maximum(period, 1), 1 + count // EARLY)
    return (count == 0) | (count - refreshed >= gap)


def power(values, exponent, damping) -> jax.Array:
    """(v + damping max v)^(-exponent) of non-negative numbers [B, d], zero where all are zero."""
    damped = values + damping * jnp.max(values, axis=-1, keepdims=True)
    return jnp.where(damped > 0, jnp.where(damped > 0, damped, 1) ** -exponent, 0)


def refresh(groups: list[tuple], roots: list[tuple], energies: list[jax.Array], due, limit, root):
    """(roots, energies) with the dense factors' roots taken anew where they are due or a factor has moved.

    A factor has moved when tr(F R) has grown by more than `limit` since the root R was taken: when gradients grow, or
    turn to where there were none and R is large. All factors of one batch are refreshed together.

    Args:
      groups: factors by group.
      roots: old roots by group.
      energies: tr(F R) as of when R was taken, by group [B, axes].
      due: bool [].
      limit: see above.
      root: function of a batch of factors [B, d, d].
    """
    new_roots = [list(r) for r in roots]
    new_energies = [list(jnp.unstack(e, axis=-1)) for e in energies]
    for (width, _), places in batches(groups).items():
        factors, old, references = ([tree[g][axis] for g, axis in places] for tree in (groups, roots, new_energies))

        def fresh(factors=factors, old=old, width=width):
            padded = [jnp.pad(f, ((0, 0), *[(0, width - f.shape[-1])] * 2)) for f in factors]
            new = jnp.split(root(jnp.concatenate(padded)), np.cumsum([len(f) for f in factors])[:-1])
            new = [r[:, : f.shape[-1], : f.shape[-1]] for r, f in zip(new, factors, strict=True)]
            new = [jnp.where(jnp.all(jnp.isfinite(r)), r, o) for r, o in zip(new, old, strict=True)]
            return new, list(map(energy, factors, new))

        grown = [has_moved(*of_place, limit) for of_place in zip(factors, old, references, strict=True)]
        moved = functools.reduce(jnp.logical_or, grown)
        found = jax.lax.cond(due | moved, fresh, lambda kept=(old, references): kept)
        for (g, axis), r, e in zip(places, *found, strict=True):
            new_roots[g][axis], new_energies[g][axis] = r, e
    return [tuple(r) for r in new_roots], [jnp.stack(e, axis=-1) for e in new_energies]
