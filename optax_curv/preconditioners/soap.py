"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg import kron_matvec
from optax_curv.linalg.roots import eigenvectors, orthogonal_iteration
from optax_curv.preconditioners._axes import axis_factors
from optax_curv.preconditioners._stacks.owners import with_sharding_types
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners.shampoo import layout_of, with_adam

METHOD = "scale_by_soap"


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      count: steps taken, int32 [].
      momentum: like the parameters, each leaf replaced by its blocks' average gradients in the
        basis, [*stack, ...].
      moments: like momentum, the average squares.
      factors: like the parameters, each leaf replaced by the tuple of its axis factors, [*stack, d,
        d] or diagonal [*stack, d] (or of its blocks' tuples).
      bases: like factors: orthonormal columns, or ones where the factor is diagonal.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    momentum: Any
    moments: Any
    factors: Any
    bases: Any
    total_notfinite: jax.Array


def scale_by_soap(
    b1: Any = 0.95,
    b2: Any = 0.95,
    *,
    eps=1e-8,
    decay=None,
    basis_every=10,
    basis="qr",
    max_dim=contracts.static(8192),
    block_size=None,
    stacked=None,
    factor_dtype="float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of the gradients' second moment along every axis.

    With Qᵢ the basis of axis i and G' = ⊗Qᵢᴴ · G, which is Q_Lᵀ G Q_R for a matrix,

        M ← b1 M + (1 - b1) G',    V ← b2 V + (1 - b2) |G'|²,    u = ⊗Qᵢ · [M / (√V + eps)],

    M and V free of the bias of their start. Then Fᵢ ← decay · Fᵢ + (1 - decay) · G₍ᵢ₎G₍ᵢ₎ᴴ, and
    every `basis_every` steps Qᵢ ← QR(Fᵢ Qᵢ), after the columns (and V with them) have been sorted
    by qᴴ Fᵢ q. M turns with the basis.

    Args:
      b1: decay of the momentum, in [0, 1]; a number or a schedule.
      b2: decay of V, in [0, 1]; a number or a schedule.
      eps: at least 0.
      decay: of the factors; None: b2, as published.
      basis_every: steps between refreshes of the basis.
      basis: how: "qr", one step of orthogonal iteration as above, or "eigh", the eigenvectors
        themselves. On CPU these take up to twice as long; on an H200, for 768 to 1024 rows, 1 ms a
        matrix, and a QR 19 ms.
      max_dim: longer axes keep their own basis, as axes of length 1 do.
      block_size: see `scale_by_shampoo`.
      stacked: see `scale_by_shampoo`.
      factor_dtype: see `scale_by_shampoo`; bases have it, too.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, sound=None)`.
      With a NaN or an infinity (or where `sound`, a bool [], is False) the update is zero and the
      state keeps its last value but for `total_notfinite`.

    Raises:
      ValueError: for a number out of range or a leaf that is not of floating point; in `update` for
        trees or shapes that differ from those of `init`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> tx = optax.chain(optax_curv.scale_by_soap(), optax.scale_by_learning_rate(3e-3))
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> [basis.shape for basis in state[0].bases["w"]]
      [(4, 4), (3, 3)]
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state)
      >>> jax.tree.map(jnp.shape, updates)
      {'b': (3,), 'w': (4, 3)}

    References:
      Vyas et al. 2024, arXiv:2409.11321, Algorithms 3 and 4. Deviations: their first step only sets
      the basis; here it is also taken, in the basis of its own factors. They keep M outside the
      basis, for two products more a step.
    """
    decay = b2 if decay is None else decay
    options = SimpleNamespace(**locals())
    contracts.require_choice(METHOD, "basis", basis, ("qr", "eigh"))
    contracts.require_numbers(METHOD, b1=b1, b2=b2, decay=decay, at_least=0, at_most=1)
    contracts.require_numbers(METHOD, eps=eps, at_least=0)
    contracts.require_numbers(
        METHOD, basis_every=basis_every, max_dim=max_dim, block_size=block_size, at_least=1
    )
    update = with_sharding_types(functools.partial(_update, options))
    return optax.GradientTransformationExtraArgs(functools.partial(_init, options), update)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.95,
    *,
    b2=0.95,
    weight_decay=0.0,
    weight_decay_mask=None,
    rms=None,
    adam_for=None,
    adam_b1=0.9,
    adam_b2=0.999,
    adam_eps=1e-8,
    eps=1e-8,
    decay=None,
    basis_every=10,
    basis="qr",
    max_dim=contracts.static(8192),
    block_size=None,
    stacked=None,
    factor_dtype="float32",
) -> optax.GradientTransformationExtraArgs:
    """SOAP for matrices, Adam for the rest, decoupled weight decay and a learning rate.

    Matrices receive `scale_by_soap`, which documents the other arguments, and, where `rms` is
    given, `normalize_by_rms(rms)`; what is not a matrix, or `adam_for` selects,
    `optax.scale_by_adam`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the matrices' momentum.
      b2: decay of their second moments.
      weight_decay: decoupled, as in AdamW. Other than the Python number 0, update needs params.
      weight_decay_mask: as in `optax.add_decayed_weights`.
      rms: root mean square of each matrix's update before decay and learning rate; None leaves
        SOAP's own.
      adam_for: which matrices Adam takes, as in `shampoo`, with "soap" for SOAP whatever the rank.
      adam_b1: Adam's b1.
      adam_b2: Adam's b2.
      adam_eps: Adam's eps.
      eps: see `scale_by_soap`, as for all that follow.
      decay: see there.
      basis_every: see there.
      basis: see there.
      max_dim: see there.
      block_size: see there.
      stacked: see there; a leaf is a matrix if it is one without these axes.
      factor_dtype: see there.

    Returns:
      A `GradientTransformationExtraArgs`. With a NaN or infinity in any gradient no leaf moves.

    Raises:
      ValueError: as `scale_by_soap`; for labels of another kind, and for labels that miss a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optax_curv.soap(3e-3, weight_decay=1e-2)
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> print(updates["bias"].round(4))
      [-0.003 -0.003 -0.003]

    References:
      See `scale_by_soap`.
    """
    return with_adam(scale_by_soap, locals())


def _init(options, params) -> Any:
    contracts.require_float_leaves(METHOD, params, complex_leaves=True)
    layout = layout_of(METHOD, options, params)
    return ScaleBySoapState(
        count=jnp.zeros([], jnp.int32),
        momentum=layout.build(lambda piece: jnp.zeros((*piece.stack, *piece.shape), piece.dtype)),
        moments=layout.build(
            lambda piece: jnp.zeros((*piece.stack, *piece.shape), piece.real_dtype)
        ),
        factors=layout.build(
            lambda piece: tuple(jnp.zeros(f.shape, f.dtype) for f in piece.factors)
        ),
        bases=layout.build(axis_factors.identities),
        total_notfinite=jnp.zeros([], jnp.int32),
    )


def _update(options, updates, state, params=None, *, sound=None, **extra_args):
    del extra_args
    likes, layout_by = (
        ("factors", "bases", "momentum", "moments"),
        functools.partial(layout_of, METHOD, options),
    )
    state, layout, good, total_notfinite = axis_factors.opened(
        METHOD, layout_by, likes, updates, state, params, sound
    )
    # Leaf by leaf: what is done alike to leaves of one shape is compiled once.
    pieces, tensors = layout.pieces, layout.blocks(updates)
    factors, old_bases, *averages = (layout.by_piece(getattr(state, name)) for name in likes)
    averages = list(zip(*averages, strict=True))
    decay, *weights = (
        _weight(x, state.count, good) for x in (options.decay, options.b1, options.b2)
    )
    factors = list(map(functools.partial(_averaged, decay), pieces, tensors, factors))

    def taken(bases):
        steps = list(
            map(functools.partial(_adam, options.eps, weights), pieces, tensors, bases, averages)
        )
        return (
            [kron_matvec(q, step) for q, (step, _) in zip(bases, steps, strict=True)],
            bases,
            [m for _, m in steps],
        )

    def first():
        return taken(_with(pieces, old_bases, _of_dense(eigenvectors, pieces, factors, old_bases)))

    def refreshed():
        directions, bases, averages = taken(old_bases)
        found = _of_dense(
            eigenvectors if options.basis == "eigh" else orthogonal_iteration,
            pieces,
            factors,
            bases,
        )
        return directions, *_turned(pieces, found, bases, averages)

    # In whole branches, so that none copies the bases.
    branches = lambda: taken(old_bases), first, refreshed
    due = jnp.where(state.count == 0, 1, jnp.where(state.count % options.basis_every == 0, 2, 0))
    directions, bases, averages = jax.lax.switch(jnp.where(good, due, 0), branches)
    directions = layout.leaves_of_blocks(directions, layout.without_pieces(updates), updates)
    new = ScaleBySoapState(
        count=jnp.where(good, optax.safe_increment(state.count), state.count),
        momentum=layout.like_factors([m for m, _ in averages], state.momentum),
        moments=layout.like_factors([v for _, v in averages], state.moments),
        factors=layout.like_factors(factors, state.factors),
        bases=layout.like_factors(bases, state.bases),
        total_notfinite=total_notfinite,
    )
    return jax.tree.map(
        lambda u: jnp.where(good & jnp.isfinite(u), u, jnp.zeros_like(u)), directions
    ), new


def _weight(decay, count, good):
    """Weight of the newest value in an average; 0 in a step that is not taken."""
    decay = contracts.value_at(decay, count, jnp.result_type(float))
    return jnp.where(good, axis_factors.running_weight(decay, count), 0)


def _averaged(weight, piece, x, factors):
    """A piece's factors with this step's second moments averaged in, as they will be kept."""
    moments = (
        axis_factors.axis_moment(x, axis, d, len(piece.stack))
        for axis, d in enumerate(piece.diagonal)
    )
    new = (axis_factors.averaged(f, weight, m) for f, m in zip(factors, moments, strict=True))
    return tuple(
        axis_factors.rounded(f, kept.dtype) for f, kept in zip(new, piece.factors, strict=True)
    )


def _adam(eps, weights, piece, x, bases, averages):
    """(a piece's direction within the basis, its averages there)."""
    inverse = [
        q if diagonal else q.mT.conj() for q, diagonal in zip(bases, piece.diagonal, strict=True)
    ]
    x = kron_matvec(inverse, x)
    new = zip(averages, weights, (x, jnp.square(jnp.abs(x))), strict=True)
    momentum, v = (axis_factors.averaged(*of_one) for of_one in new)
    scale = jnp.sqrt(v) + jnp.asarray(eps, v.dtype)
    return jnp.where(scale > 0, momentum / jnp.where(scale > 0, scale, 1), 0), (momentum, v)


def _of_dense(function, pieces, *trees):
    """`function` of the entries of every dense factor in trees by piece and axis, likewise; None for diagonal ones."""
    places = [
        (p, axis)
        for p, piece in enumerate(pieces)
        for axis, d in enumerate(piece.diagonal)
        if not d
    ]
    found = lapack.for_each(function, *([tree[p][axis] for p, axis in places] for tree in trees))
    found = dict(zip(places, found, strict=True))
    return [
        [found.get((p, axis)) for axis in range(len(piece.shape))] for p, piece in enumerate(pieces)
    ]


def _with(pieces, bases, found):
    """The bases as they will be kept, found ones in the place of the old."""
    return [
        tuple(
            old if x is None else axis_factors.rounded(x[0], piece.factor_dtype)
            for old, x in zip(*qs, strict=True)
        )
        for piece, *qs in zip(pieces, bases, found, strict=True)
    ]


def _turned(pieces, found, bases, averages):
    """The found bases, the momentum turned with them, and V in their columns' order."""
    new_bases, new = _with(pieces, bases, found), []
    for piece, (momentum, v), olds, qs, of_piece in zip(
        pieces, averages, bases, new_bases, found, strict=True
    ):
        turns = list(qs)
        for axis, x in enumerate(of_piece):
            if x is not None:
                turns[axis] = jnp.matmul(
                    qs[axis].mT.conj(), olds[axis], precision=axis_factors.HIGHEST
                )
                shape = [*piece.stack, *(d if i == axis else 1 for i, d in enumerate(piece.shape))]
                v = jnp.take_along_axis(v, x[1].reshape(shape), axis=len(piece.stack) + axis)
        new.append((kron_matvec(turns, momentum), v))
    return new_bases, new
