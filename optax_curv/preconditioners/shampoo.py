"""Shampoo: momentum multiplied on every axis of a leaf by a root of the gradients' second moment along it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import kron_matvec
from optax_curv.linalg.roots import factor_roots
from optax_curv.preconditioners import axis_factors, contracts, symmetric_pairs
from optax_curv.preconditioners.distribution import with_sharding_types
from optax_curv.preconditioners.matrices_and_adam import with_adam

METHOD = "scale_by_shampoo"


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      count: steps taken, int32 [].
      refreshed: the step of the last scheduled refresh of the roots, int32 [].
      momentum: like the parameters, float32 at least.
      factors: like the parameters, each leaf replaced by the tuple of its axes' arrays: diagonal factors [*stack, d],
        or [*stack, d, d + 1] with a factor's lower triangle and, one column on, the upper triangle of the root that
        multiplies the momentum. Both are Hermitian. A leaf cut by `block_size` has the tuple of its blocks' tuples.
      bases: with `root="qr"` like factors: orthonormal columns, or ones where the factor is diagonal; else ().
      energies: tr(F R) of all dense factors, and what it was when R was taken, [2, n].
      total_notfinite: steps skipped for a NaN or infinity, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    refreshed: jax.Array
    momentum: Any
    factors: Any
    bases: Any
    energies: jax.Array
    total_notfinite: jax.Array


class Options(NamedTuple):
    """The arguments of `scale_by_shampoo`, which documents them."""

    decay: Any
    b1: Any
    nesterov: bool
    exponent: Any
    damping: Any
    update_every: Any
    root_every: Any
    root: str
    refresh_growth: Any
    kl: bool
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


def scale_by_shampoo(
    decay: Any = 0.95,
    *,
    b1=0.95,
    nesterov=True,
    exponent=0.5,
    damping=1e-6,
    update_every=1,
    root_every=20,
    root="eigh",
    refresh_growth=20.0,
    kl=False,
    max_dim=contracts.static(8192),
    block_size=None,
    stacked=None,
    factor_dtype="float32",
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the momentum of each leaf, along every axis, by a root of the second moment of its gradients.

    With X₍ᵢ₎ the unfolding of X along axis i, e the `exponent` and δ the `damping`, the step is

        Fᵢ ← decay · Fᵢ + (1 - decay) · G₍ᵢ₎G₍ᵢ₎ᴴ,    Rᵢ = (Fᵢ + δ λ_max(Fᵢ) I)⁻ᵉ,    u = ⊗Rᵢ · m,

    for a matrix u = L⁻ᵉ m R⁻ᵉ with L the average of G Gᵀ and R that of Gᵀ G. Here m is (Nesterov) momentum; it and the
    averages are free of the bias of their start, so that the first step has G itself. With e = 1/2, L ⊗ R is up to its
    scale the best Kronecker product for the gradients' covariance (Morwani et al.), and the direction is
    (L ⊗ R)^(-1/2) vec(m). The exponent 1/4 of the first Shampoo flattens a spectrum half as much; it learns slower than
    Muon where 1/2 is faster. Because the scale of u is that of neither a gradient nor a whitened one, let
    `normalize_by_rms` follow, as `shampoo` does.

    Args:
      decay: of the factors, in [0, 1]; 1 averages all steps alike. A number or a schedule.
      b1: decay of the momentum, in [0, 1); 0 for none. A number or a schedule.
      nesterov: whether the newest gradient counts as one step more of the momentum.
      exponent: e > 0.
      damping: δ ≥ 0, relative to each factor's largest eigenvalue.
      update_every: steps between averaging gradients into the factors.
      root_every: most steps between two computations of the roots, a number or a schedule. Early in training they
        are denser, 1 + count / 4 steps apart.
      root: "eigh" or "newton", see `linalg.inverse_root`; "newton", matrix products only, needs 1/e to be whole. "qr"
        keeps a basis of each factor, as SOAP does, that one step of orthogonal iteration, Q ← QR(F Q), brings nearer to
        the eigenvectors at every refresh; R = Q (diag(Qᴴ F Q) + δ λ_max)⁻ᵉ Qᴴ.
      refresh_growth: the roots R are computed anew, out of schedule, when tr(F R) of a factor has grown by more than
        this since R was taken: gradients that grow, that turn to where there were none, a leaf's first ones. Above 1;
        `float("inf")`: for a leaf's first gradients only. Within one schedule tr(F R) easily doubles; to follow that
        costs more than it brings.
      kl: whether each factor is estimated from the gradient multiplied by the other factors' roots,
        Fᵢ = E[G₍ᵢ₎ (⊗ⱼ≠ᵢ Fⱼ)⁻¹ G₍ᵢ₎ᴴ] dᵢ/N, which minimises the Kullback-Leibler divergence of N(0, ⊗F) from the
        gradients' own covariance. It needs exponent 1/2.
      max_dim: longer axes have diagonal factors, as have axes of length 1.
      block_size: longer axes are cut into the fewest blocks of nearly equal length, each with factors of its own.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or bool for all
        leaves, a tree of them that is a prefix of the parameters', or a function of the parameters that returns one.
      factor_dtype: in which dense factors and their roots are kept for leaves up to float32. "bfloat16" halves the
        memory; the arithmetic stays float32. Leaves of float64 keep float64.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, sound=None)`. With a NaN or an
      infinity (or where `sound`, a bool [], is given and False) the update is zero and the state keeps its last value
      but for `total_notfinite`. Under `jax.vmap` over hyper-parameters `lax.cond` computes both branches, and a longer
      `root_every` saves nothing.

    Raises:
      ValueError: for an unknown choice, a number out of range, a leaf that is not of floating point; in `update` for
        trees or shapes that differ from those of `init`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> tx = optax.chain(optax_curv.scale_by_shampoo(), optax_curv.normalize_by_rms(0.2), optax.scale(-0.02))
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> [factor.shape for factor in state[0].factors["w"]]
      [(4, 5), (3, 4)]
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state)
      >>> print(updates["b"].round(4))
      [-0.004 -0.004 -0.004]

    References:
      Gupta, Koren and Singer, *Shampoo: preconditioned stochastic tensor optimization*, 2018, arXiv:1802.09568.
      Morwani et al., *A new perspective on Shampoo's preconditioner*, 2024, arXiv:2406.17748: exponent 1/2.
      Lin et al., *Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization*, 2025,
      arXiv:2509.03378: `kl`. Deviations: averages in place of sums, damping relative to the largest eigenvalue.
    """
    options = Options(
        decay=decay,
        b1=b1,
        nesterov=nesterov,
        exponent=exponent,
        damping=damping,
        update_every=update_every,
        root_every=root_every,
        root=root,
        refresh_growth=refresh_growth,
        kl=kl,
        max_dim=max_dim,
        block_size=block_size,
        stacked=stacked,
        factor_dtype=factor_dtype,
    )
    _check(options)
    update = with_sharding_types(functools.partial(_update, options))
    return optax.GradientTransformationExtraArgs(functools.partial(_init, options), update)


def _check(options: Options):
    require = functools.partial(contracts.require_number, METHOD)
    contracts.require_choice(METHOD, "root", options.root, ("eigh", "newton", "qr"))
    require("decay", options.decay, at_least=0, at_most=1)
    require("b1", options.b1, at_least=0, at_most=1)
    require("exponent", options.exponent, above=0)
    require("damping", options.damping, at_least=0)
    require("refresh_growth", options.refresh_growth, above=1)
    for name in ("update_every", "root_every", "max_dim", "block_size"):
        require(name, getattr(options, name), at_least=1)
    if options.kl and not contracts.is_python_number(options.exponent, 0.5):
        raise ValueError(f"{METHOD}: kl=True whitens by the roots and needs exponent=0.5, got {options.exponent}.")
    if options.root == "newton" and not (
        isinstance(options.exponent, int | float) and (1 / options.exponent).is_integer()
    ):
        raise ValueError(
            f'{METHOD}: root="newton" needs an exponent whose inverse is whole, got exponent={options.exponent}; '
            'use root="eigh".'
        )


def _init(options: Options, params) -> Any:
    contracts.require_float_leaves(METHOD, params, complex_leaves=True)
    layout = options.layout_of(params)

    def zeros(piece):
        shapes = ((*f.shape[:-1], f.shape[-1] + (not d)) for f, d in zip(piece.factors, piece.diagonal, strict=True))
        return tuple(jnp.zeros(shape, f.dtype) for shape, f in zip(shapes, piece.factors, strict=True))

    return ScaleByShampooState(
        count=jnp.zeros([], jnp.int32),
        refreshed=jnp.zeros([], jnp.int32),
        momentum=contracts.wide_zeros(params),
        factors=layout.build(zeros),
        bases=layout.build(axis_factors.identities) if options.root == "qr" else (),
        energies=axis_factors.energies(layout.pieces),
        total_notfinite=jnp.zeros([], jnp.int32),
    )


def _update(options: Options, updates, state, params=None, *, sound=None, **extra_args):
    del extra_args
    tracks = options.root == "qr"
    state, layout, good, total_notfinite = axis_factors.opened(
        METHOD, options.layout_of, ("factors", "bases") if tracks else ("factors",), updates, state, params, sound
    )
    momentum, direction = axis_factors.momentum_and_direction(
        options.b1, options.nesterov, state.count, state.momentum, updates, good
    )

    # Leaf by leaf: what is done alike to leaves of one shape is compiled once.
    pieces, tensors, kept = layout.pieces, layout.blocks(updates), layout.by_piece(state.factors)
    roots = [
        tuple(
            x if diagonal else symmetric_pairs.second(x) for x, diagonal in zip(of_piece, piece.diagonal, strict=True)
        )
        for piece, of_piece in zip(pieces, kept, strict=True)
    ]
    squares = [axis_factors.square_norms(x, len(p.stack)) for p, x in zip(pieces, tensors, strict=True)]
    moments = [_moments(options, *of_piece) for of_piece in zip(pieces, tensors, kept, roots, strict=True)]
    weight = _weight(options, state.count, good)
    period = contracts.value_at(options.root_every, state.count).astype(jnp.int32)
    due = good & axis_factors.is_due(state.count, state.refreshed, period)
    take_roots = functools.partial(
        factor_roots, exponent=options.exponent, damping=options.damping, method=options.root
    )
    bases = layout.by_piece(state.bases) if tracks else [(None,) * len(piece.shape) for piece in pieces]
    roots, bases, energies = axis_factors.refresh(
        pieces, kept, moments, weight, roots, bases, state.energies, squares, due, options.refresh_growth, take_roots
    )
    kept = [_renewed(weight, *of_piece) for of_piece in zip(pieces, kept, moments, roots, strict=True)]
    new = ScaleByShampooState(
        count=jnp.where(good, optax.safe_increment(state.count), state.count),
        refreshed=jnp.where(due, state.count, state.refreshed),
        momentum=momentum,
        factors=layout.like_factors(kept, state.factors),
        bases=layout.like_factors(bases, state.bases) if tracks else (),
        energies=energies,
        total_notfinite=total_notfinite,
    )
    roots = [_with_diagonal_roots(options, *of_piece) for of_piece in zip(pieces, kept, roots, strict=True)]
    directions = map(kron_matvec, roots, layout.blocks(direction))
    directions = layout.leaves_of_blocks(directions, layout.without_pieces(direction), updates)
    return jax.tree.map(lambda u: jnp.where(good & jnp.isfinite(u), u, jnp.zeros_like(u)), directions), new


def _weight(options: Options, count, good):
    """Weight of this step's moments; 0 where they are not averaged in."""
    decay = contracts.value_at(options.decay, count, jnp.result_type(float))
    weight = axis_factors.running_weight(decay, count // options.update_every)
    return jnp.where(good & (count % options.update_every == 0), weight, 0)


def _renewed(weight, piece, kept, moments, roots):
    """What is kept of each axis, with the moments averaged in."""
    return tuple(
        axis_factors.averaged(x, weight, m) if diagonal else axis_factors.repacked(x, weight, m, r)
        for x, m, r, diagonal in zip(kept, moments, roots, piece.diagonal, strict=True)
    )


def _moments(options: Options, piece, x, kept, roots):
    """A piece's second moments of this step."""
    stack = len(piece.stack)
    if not options.kl:
        return tuple(axis_factors.axis_moment(x, axis, d, stack) for axis, d in enumerate(piece.diagonal))
    roots = _with_diagonal_roots(options, piece, kept, roots)
    roots = [axis_factors.root_or_identity(r, d, stack) for r, d in zip(roots, piece.diagonal, strict=True)]
    return tuple(axis_factors.whitened_moment(x, roots, axis, d, stack) for axis, d in enumerate(piece.diagonal))


def _with_diagonal_roots(options: Options, piece, kept, roots):
    """Roots of diagonal factors are cheap, and new at every step."""
    return tuple(
        axis_factors.power(f, options.exponent, options.damping) if diagonal else r
        for f, r, diagonal in zip(kept, roots, piece.diagonal, strict=True)
    )


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.95,
    *,
    nesterov=True,
    weight_decay=0.0,
    weight_decay_mask=None,
    rms=0.2,
    adam_for=None,
    adam_b1=0.9,
    adam_b2=0.999,
    adam_eps=1e-8,
    decay=0.95,
    exponent=0.5,
    damping=1e-5,
    update_every=1,
    root_every=20,
    root="eigh",
    refresh_growth=20.0,
    kl=False,
    max_dim=contracts.static(8192),
    block_size=None,
    stacked=None,
    factor_dtype="float32",
) -> optax.GradientTransformationExtraArgs:
    """Shampoo for matrices with updates of a given size, Adam for the rest, decoupled weight decay, a learning rate.

    Matrices receive `scale_by_shampoo`, which documents the other arguments, and `normalize_by_rms(rms)`; what is not
    a matrix, or `adam_for` selects, `optax.scale_by_adam`. One learning rate serves both: Adam's updates, too, have a
    root mean square of 0.2 to 1. Then come `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the matrices' momentum.
      nesterov: see `scale_by_shampoo`.
      weight_decay: decoupled, as in AdamW. Other than the Python number 0, update needs params.
      weight_decay_mask: as in `optax.add_decayed_weights`.
      rms: root mean square of each matrix's update before decay and learning rate, a number; None leaves it as it is.
      adam_for: which matrices Adam takes, embeddings and the output layer above all. A function of a leaf's path and
        the leaf, or a tree of its values that is a prefix of the parameters': True or "adam" for Adam; False for the
        rule, that matrices go to Shampoo and all else to Adam; "shampoo" for Shampoo whatever the rank.
      adam_b1: Adam's b1.
      adam_b2: Adam's b2.
      adam_eps: Adam's eps.
      decay: see `scale_by_shampoo`, as for all that follow.
      exponent: see there.
      damping: see there; ten times its default, with which training starts faster.
      update_every: see there.
      root_every: see there.
      root: see there.
      refresh_growth: see there.
      kl: see there.
      max_dim: see there.
      block_size: see there.
      stacked: see there; a leaf is a matrix if it is one without these axes.
      factor_dtype: see there.

    Returns:
      A `GradientTransformationExtraArgs`. With a NaN or infinity in any gradient no leaf moves.

    Raises:
      ValueError: as `scale_by_shampoo`; for a label that is none of the above, and for labels that miss a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> params = {"embedding": jnp.ones((9, 4)), "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> tx = optax_curv.shampoo(0.02, adam_for=lambda path, leaf: "embedding" in jax.tree_util.keystr(path))
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
      >>> print(updates["dense"]["kernel"][0].round(4), updates["dense"]["bias"].round(4))
      [-0.004 -0.004 -0.004] [-0.02 -0.02 -0.02]

    References:
      See `scale_by_shampoo`; Agarwal et al., *Disentangling adaptive gradient methods from learning rates*, 2020,
      arXiv:2002.11803: the direction of one method with the size of another.
    """
    matrices = scale_by_shampoo(
        decay,
        b1=b1,
        nesterov=nesterov,
        exponent=exponent,
        damping=damping,
        update_every=update_every,
        root_every=root_every,
        root=root,
        refresh_growth=refresh_growth,
        kl=kl,
        max_dim=max_dim,
        block_size=block_size,
        stacked=stacked,
        factor_dtype=factor_dtype,
    )
    return with_adam(
        "shampoo",
        matrices,
        learning_rate,
        rms=rms,
        adam_for=adam_for,
        stacked=stacked,
        adam=optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
    )
