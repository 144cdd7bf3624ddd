"""Second moments along every axis of a leaf, and the roots of them that precondition it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.linalg import inverse_root, kron_matvec
from optax_curv.linalg.checks import widen
from optax_curv.preconditioners import contracts, kron_layout

HIGHEST = jax.lax.Precision.HIGHEST
# Between refreshes of the roots lie 1 + count / EARLY steps, as far as the period allows: the gradients change most
# at the start. On the character transformer 8 instead of 4 costs twice the roots and gains nothing.
EARLY = 4


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


def momentum_of(params):
    """Zeros like the parameters, in float32 at least."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)


def running_weight(decay, count) -> jax.Array:
    """Weight w of the newest of count + 1 values in m ← m + w (new - m), which keeps m free of the bias of its start.

    It is (1 - decay) / (1 - decay^(count + 1)); for decay 1, a plain mean, 1 / (count + 1).
    """
    steps = jnp.asarray(count + 1, decay.dtype)
    plain = decay >= 1
    kept = jnp.where(plain, 0, decay)
    return jnp.where(plain, 1 / steps, (1 - kept) / (1 - kept**steps))


def soundness(grads, total_notfinite):
    """(whether every gradient's square is finite, the counter of those that were not).

    A bad step is one of zero gradients and weights: then nothing that follows needs a choice between old and new, of
    which each would be compiled for itself.
    """
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
    if diagonal:
        others = [i for i in range(1, x.ndim) if i != axis + 1]
        return jnp.sum(jnp.square(jnp.abs(x)), axis=others)
    unfolded = jnp.moveaxis(x, axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)
    return jnp.matmul(unfolded, unfolded.mT.conj(), precision=HIGHEST)


def whitened_moment(x, roots, axis: int, diagonal: bool) -> jax.Array:
    """The mean mode moment of x multiplied by the roots of all other axes."""
    others = [jnp.ones_like(r[..., 0]) if i == axis else r for i, r in enumerate(roots)]
    others[axis] = jnp.ones(x.shape[axis + 1], jnp.finfo(x.dtype).dtype) * jnp.ones((len(x), 1))
    rest = math.prod(x.shape[1:]) // x.shape[axis + 1]
    return axis_moment(jax.vmap(kron_matvec)(others, x), axis, diagonal) / rest


def signs(length: int):
    """A fixed vector of random signs: the squared norm of A times it is an estimate of ‖A‖_F² without bias."""
    return np.random.default_rng(length).choice(np.array([-1, 1], np.float32), length)


def sketch(factor: jax.Array) -> jax.Array:
    """One product of each dense factor [B, d, d] with fixed signs, [B, d]; a diagonal factor [B, d] is its own."""
    return factor if factor.ndim == 2 else jnp.sum(factor * signs(factor.shape[-1]), axis=-1)


def by_width(groups: list[tuple]) -> dict[Any, list[tuple[int, int]]]:
    """Where the dense factors of each width and dtype stand: (group, axis)."""
    places = {}
    for g, factors in enumerate(groups):
        for axis, factor in enumerate(factors):
            if factor.ndim == 3:
                places.setdefault((factor.shape[-1], factor.dtype), []).append((g, axis))
    return places


def is_due(count, refreshed, period) -> jax.Array:
    """Whether the schedule asks for new roots: dense early, every `period` steps later."""
    gap = jnp.minimum(jnp.maximum(period, 1), 1 + count // EARLY)
    return (count == 0) | (count - refreshed >= gap)


def has_moved(factors, sketches, limit) -> jax.Array:
    """Whether any factor has changed by more than `limit` of its Frobenius norm since its sketch was taken."""

    def moved(factor, old):
        change, norm = (jnp.sum(jnp.square(jnp.abs(x)), axis=-1) for x in (sketch(factor) - old, old))
        return jnp.any(change > limit**2 * norm)

    return jnp.any(jnp.stack([moved(*pair) for pair in zip(factors, sketches, strict=True)]))


def power(values, exponent, damping) -> jax.Array:
    """(v + damping max v)^(-exponent) of non-negative numbers [B, d], zero where all are zero."""
    damped = values + damping * jnp.max(values, axis=-1, keepdims=True)
    return jnp.where(damped > 0, jnp.where(damped > 0, damped, 1) ** -exponent, 0)


def refresh(groups: list[tuple], roots: list[tuple], sketches: list[tuple], due, limit, root):
    """(roots, sketches) with the dense factors' roots taken anew where they are due or a factor has moved.

    All factors of one width are one batch and are refreshed together.

    Args:
      groups: factors by group.
      roots: old roots by group.
      sketches: of the factors that have these roots, by group.
      due: bool [].
      limit: see `has_moved`.
      root: function of a batch of factors [B, d, d] and of their old roots.
    """
    new_roots, new_sketches = [list(r) for r in roots], [list(s) for s in sketches]
    for places in by_width(groups).values():
        factors, old, old_sketches = ([tree[g][axis] for g, axis in places] for tree in (groups, roots, sketches))
        sizes = np.cumsum([len(f) for f in factors])[:-1]

        def fresh(factors=factors, old=old, sizes=sizes):
            new, kept = root(jnp.concatenate(factors), jnp.concatenate(old)), jnp.concatenate(old)
            sound = jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
            return jnp.split(jnp.where(sound, new, kept), sizes), [sketch(f) for f in factors]

        now = due | has_moved(factors, old_sketches, limit)
        found = jax.lax.cond(now, fresh, lambda kept=(old, old_sketches): kept)
        for (g, axis), r, s in zip(places, *found, strict=True):
            new_roots[g][axis], new_sketches[g][axis] = r, s
    return [tuple(r) for r in new_roots], [tuple(s) for s in new_sketches]


def relative_root(exponent, damping, method: str):
    """Function of a batch of factors that returns (F + damping λ_max I)^(-exponent)."""

    def root(factors, old):
        del old
        return inverse_root(factors, 1 / exponent, damping=damping, relative=True, method=method)

    return root
