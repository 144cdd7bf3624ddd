"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import kron_matvec, lapack
from optax_curv.linalg.roots import orthogonal_iteration
from optax_curv.preconditioners import axis_factors, contracts
from optax_curv.preconditioners.distribution import with_sharding_types
from optax_curv.preconditioners.matrices_and_adam import with_adam

METHOD = "scale_by_soap"


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      count: steps taken, int32 [].
      momentum: like the parameters, float32 at least.
      moments: like the parameters, each leaf replaced by its blocks' average squares in the basis, [*stack, ...].
      factors: like the parameters, each leaf replaced by the tuple of its axis factors, [*stack, d, d] or diagonal
        [*stack, d]; a leaf cut by `block_size` by the tuple of its blocks' tuples.
      bases: like factors: orthonormal columns, or ones where the factor is diagonal.
      total_notfinite: steps skipped for a NaN or infinity, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: Any
    moments: Any
    factors: Any
    bases: Any
    total_notfinite: jax.Array


class Options(NamedTuple):
    """The arguments of `scale_by_soap`, which documents them."""

    b1: Any
    b2: Any
    eps: Any
    decay: Any
    basis_every: Any
    max_dim: int
    block_size: int | None
    stacked: Any
    factor_dtype: Any

    def layout_of(self, tree):
        """The pieces of a tree of leaves."""
        return axis_factors.layout_of(
            METHOD,
            tree,
            max_dim=self.max_dim,
            block_size=self.block_size,
            stacked=self.stacked,
            dtype=self.factor_dtype,
        )


def scale_by_soap(
    b1: Any = 0.95,
    b2: Any = 0.95,
    *,
    eps=1e-8,
    decay=None,
    basis_every=10,
    max_dim=contracts.static(8192),
    block_size=None,
    stacked=None,
    factor_dtype="float32",
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of the gradients' second moment along every axis.

    With Qᵢ the basis of axis i and G' = ⊗Qᵢᴴ · G, which is Q_Lᵀ G Q_R for a matrix,

        M ← b1 M + (1 - b1) G,    V ← b2 V + (1 - b2) |G'|²,    u = ⊗Qᵢ · [(⊗Qᵢᴴ · M) / (√V + eps)],

    M and V free of the bias of their start. Then Fᵢ ← decay · Fᵢ + (1 - decay) · G₍ᵢ₎G₍ᵢ₎ᴴ, and every `basis_every`
    steps one step of orthogonal iteration, Qᵢ ← QR(Fᵢ Qᵢ), after the columns (and V with them) have been sorted by
    qᴴ Fᵢ q.

    Args:
      b1: decay of the momentum, in [0, 1]; a number or a schedule.
      b2: decay of V, in [0, 1]; a number or a schedule.
      eps: at least 0.
      decay: of the factors; None: b2, as published.
      basis_every: steps between refreshes of the basis.
      max_dim: longer axes keep their own basis, as axes of length 1 do.
      block_size: longer axes are cut into the fewest blocks of nearly equal length, each with factors of its own.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or bool for all
        leaves, a tree of them that is a prefix of the parameters', or a function of the parameters that returns one.
      factor_dtype: in which dense factors and bases are kept for leaves up to float32; the arithmetic stays float32.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, sound=None)`. With a NaN or an
      infinity (or where `sound`, a bool [], is given and False) the update is zero and the state keeps its last value
      but for `total_notfinite`.

    Raises:
      ValueError: for a number out of range or a leaf that is not of floating point; in `update` for trees or shapes
        that differ from those of `init`.

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
      Vyas et al., *SOAP: improving and stabilizing Shampoo using Adam*, 2024, arXiv:2409.11321, Algorithms 3 and 4.
      Deviation: their first step only sets the basis; here it is also taken, in the basis of its own factors.
    """
    options = Options(
        b1=b1,
        b2=b2,
        eps=eps,
        decay=b2 if decay is None else decay,
        basis_every=basis_every,
        max_dim=max_dim,
        block_size=block_size,
        stacked=stacked,
        factor_dtype=factor_dtype,
    )
    for name in ("b1", "b2", "decay"):
        contracts.require_number(METHOD, name, getattr(options, name), at_least=0, at_most=1)
    contracts.require_number(METHOD, "eps", eps, at_least=0)
    for name in ("basis_every", "max_dim", "block_size"):
        contracts.require_number(METHOD, name, getattr(options, name), at_least=1)
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
    max_dim=contracts.static(8192),
    block_size=None,
    stacked=None,
    factor_dtype="float32",
) -> optax.GradientTransformationExtraArgs:
    """SOAP for matrices, Adam for the rest, decoupled weight decay and a learning rate.

    Matrices receive `scale_by_soap`, which documents the other arguments, and, where `rms` is given,
    `normalize_by_rms(rms)`; what is not a matrix, or `adam_for` selects, `optax.scale_by_adam`. Then come
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the matrices' momentum.
      b2: decay of their second moments.
      weight_decay: decoupled, as in AdamW. Other than the Python number 0, update needs params.
      weight_decay_mask: as in `optax.add_decayed_weights`.
      rms: root mean square of each matrix's update before decay and learning rate; None leaves SOAP's own.
      adam_for: which matrices Adam takes: a function of a leaf's path and the leaf, or a tree of its values that is a
        prefix of the parameters': True or "adam" for Adam; False for the rule, that matrices go to SOAP and all else
        to Adam; "soap" for SOAP whatever the rank.
      adam_b1: Adam's b1.
      adam_b2: Adam's b2.
      adam_eps: Adam's eps.
      eps: see `scale_by_soap`, as for all that follow.
      decay: see there.
      basis_every: see there.
      max_dim: see there.
      block_size: see there.
      stacked: see there; a leaf is a matrix if it is one without these axes.
      factor_dtype: see there.

    Returns:
      A `GradientTransformationExtraArgs`. With a NaN or infinity in any gradient no leaf moves.

    Raises:
      ValueError: as `scale_by_soap`; for a label that is none of the above, and for labels that miss a leaf.

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
    matrices = scale_by_soap(
        b1,
        b2,
        eps=eps,
        decay=decay,
        basis_every=basis_every,
        max_dim=max_dim,
        block_size=block_size,
        stacked=stacked,
        factor_dtype=factor_dtype,
    )
    return with_adam(
        "soap",
        matrices,
        learning_rate,
        rms=rms,
        adam_for=adam_for,
        stacked=stacked,
        adam=optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
    )


def _init(options: Options, params) -> Any:
    contracts.require_float_leaves(METHOD, params, complex_leaves=True)
    layout = options.layout_of(params)

    return ScaleBySoapState(
        count=jnp.zeros([], jnp.int32),
        momentum=contracts.wide_zeros(params),
        moments=layout.build(lambda piece: jnp.zeros((*piece.stack, *piece.shape), piece.real_dtype)),
        factors=layout.build(lambda piece: tuple(jnp.zeros(f.shape, f.dtype) for f in piece.factors)),
        bases=layout.build(axis_factors.identities),
        total_notfinite=jnp.zeros([], jnp.int32),
    )


def _update(options: Options, updates, state, params=None, *, sound=None, **extra_args):
    del extra_args
    likes = ("factors", "bases", "moments")
    state, layout, good, total_notfinite = axis_factors.opened(
        METHOD, options.layout_of, likes, updates, state, params, sound
    )
    momentum, direction = axis_factors.momentum_and_direction(
        options.b1, False, state.count, state.momentum, updates, good
    )

    # Leaf by leaf: what is done alike to leaves of one shape is compiled once.
    pieces, tensors, directions = layout.pieces, layout.blocks(updates), layout.blocks(direction)
    factors, bases, moments = (layout.by_piece(tree) for tree in (state.factors, state.bases, state.moments))
    weight = _weight(options.decay, state.count, good)
    factors = [_averaged(weight, *of_piece) for of_piece in zip(pieces, tensors, factors, strict=True)]
    first = good & (state.count == 0)
    bases = jax.lax.cond(first, lambda: _eigenvectors(pieces, factors, bases), lambda: bases)
    weight = _weight(options.b2, state.count, good)
    steps = [
        _adam(options.eps, weight, *of_piece)
        for of_piece in zip(pieces, tensors, directions, bases, moments, strict=True)
    ]
    directions = [kron_matvec(q, u) for q, (u, _) in zip(bases, steps, strict=True)]
    directions = layout.leaves_of_blocks(directions, layout.without_pieces(direction), updates)

    moments = [v for _, v in steps]
    due = good & (state.count > 0) & (state.count % options.basis_every == 0)
    bases, moments = jax.lax.cond(due, lambda: _iterated(pieces, factors, bases, moments), lambda: (bases, moments))
    new = ScaleBySoapState(
        count=jnp.where(good, optax.safe_increment(state.count), state.count),
        momentum=momentum,
        moments=layout.like_factors(moments, state.moments),
        factors=layout.like_factors(factors, state.factors),
        bases=layout.like_factors(bases, state.bases),
        total_notfinite=total_notfinite,
    )
    return jax.tree.map(lambda u: jnp.where(good & jnp.isfinite(u), u, jnp.zeros_like(u)), directions), new


def _weight(decay, count, good):
    """Weight of the newest value in an average; 0 in a step that is not taken."""
    decay = contracts.value_at(decay, count, jnp.result_type(float))
    return jnp.where(good, axis_factors.running_weight(decay, count), 0)


def _averaged(weight, piece, x, factors):
    """A piece's factors with this step's second moments averaged in, as they will be kept."""
    moments = (axis_factors.axis_moment(x, axis, d, len(piece.stack)) for axis, d in enumerate(piece.diagonal))
    new = (axis_factors.averaged(f, weight, m) for f, m in zip(factors, moments, strict=True))
    return tuple(axis_factors.rounded(f, kept.dtype) for f, kept in zip(new, piece.factors, strict=True))


def _adam(eps, weight, piece, x, momentum, bases, v):
    """(a piece's direction within the basis, its average squares there)."""
    inverse = [q if diagonal else q.mT.conj() for q, diagonal in zip(bases, piece.diagonal, strict=True)]
    x, momentum = (kron_matvec(inverse, y) for y in (x, momentum))
    v = axis_factors.averaged(v, weight, jnp.square(jnp.abs(x)))
    scale = jnp.sqrt(v) + jnp.asarray(eps, v.dtype)
    return jnp.where(scale > 0, momentum / jnp.where(scale > 0, scale, 1), 0), v


def _by_width(function, pieces, *trees):
    """`function` of every dense factor's entries in trees by piece and axis; its outputs by (piece, axis)."""
    found = {}
    for places in axis_factors.batches(pieces, small=0):
        lists = [[tree[p][axis] for p, axis in places] for tree in trees]
        found |= dict(zip(places, lapack.for_each(function, *lists), strict=True))
    return found


def _with(pieces, bases, found):
    """The bases as they will be kept, those that have been found in the place of the old ones."""
    return [
        tuple(
            axis_factors.rounded(found[p, axis][0], piece.factor_dtype) if (p, axis) in found else q
            for axis, q in enumerate(of_piece)
        )
        for p, (piece, of_piece) in enumerate(zip(pieces, bases, strict=True))
    ]


def _eigenvectors(pieces, factors, bases):
    """The bases of a first step, largest eigenvalue first."""
    return _with(pieces, bases, _by_width(lambda f: (lapack.eigh(f)[1][..., ::-1],), pieces, factors))


def _iterated(pieces, factors, bases, moments):
    """Bases after one step of orthogonal iteration, and the moments in the order of their columns."""
    found, new_moments = _by_width(orthogonal_iteration, pieces, factors, bases), []
    for p, (piece, v) in enumerate(zip(pieces, moments, strict=True)):
        for axis in range(len(piece.shape)):
            if (p, axis) in found:
                order = found[p, axis][1]
                shape = [*piece.stack, *(d if i == axis else 1 for i, d in enumerate(piece.shape))]
                v = jnp.take_along_axis(v, order.reshape(shape), axis=len(piece.stack) + axis)
        new_moments.append(v)
    return _with(pieces, bases, found), new_moments
