"""Shampoo: momentum multiplied on every axis of a leaf by a root of the gradients' second moment along it.

And the alias of a method for matrices, which leaves everything else to Adam: Shampoo's and SOAP's.
"""

import functools
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import kron_matvec, symmetric_pairs
from optax_curv.linalg.roots import factor_roots
from optax_curv.preconditioners._axes import axis_factors
from optax_curv.preconditioners._psgd import kron_layout
from optax_curv.preconditioners._stacks.owners import with_sharding_types
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners.chain_pieces import normalize_by_rms

METHOD = "scale_by_shampoo"


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      count: steps taken, int32 [].
      refreshed: the step of the last scheduled refresh of the roots, int32 [].
      momentum: like the parameters, float32 at least.
      factors: like the parameters, each leaf replaced by the tuple of its axes' arrays (or of its
        blocks' tuples): diagonal factors [*stack, d], or [*stack, d, d + 1], the lower triangle of
        a factor and beside it the upper one of its root; both are Hermitian.
      bases: with `root="qr"` like factors: orthonormal columns, or ones where the factor is
        diagonal; else ().
      energies: tr(F R) of all dense factors, and what it was when R was taken, [2, n].
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    refreshed: jax.Array
    momentum: Any
    factors: Any
    bases: Any
    energies: jax.Array
    total_notfinite: jax.Array


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

    for a matrix u = L⁻ᵉ m R⁻ᵉ with L the average of G Gᵀ and R that of Gᵀ G. The (Nesterov)
    momentum m and the averages are free of the bias of their start. With e = 1/2, L ⊗ R is up to
    its scale the best Kronecker product for the gradients' covariance; the 1/4 of the first Shampoo
    learns slower. As u has an arbitrary scale, let `normalize_by_rms` follow.

    Args:
      decay: of the factors, in [0, 1]; 1 averages all steps alike. A number or a schedule.
      b1: decay of the momentum, in [0, 1); 0 for none. A number or a schedule.
      nesterov: whether the newest gradient counts as one step more of the momentum.
      exponent: e > 0.
      damping: δ ≥ 0, relative to each factor's largest eigenvalue.
      update_every: steps between averaging gradients into the factors.
      root_every: most steps between two computations of the roots, a number or a schedule; early on
        1 + count / 4.
      root: "eigh" or "newton" (matrix products only, for whole 1/e), see `linalg.inverse_root`; or
        "qr", which turns a basis of each factor by one orthogonal iteration a refresh, Q ← QR(F Q),
        R = Q (diag(Qᴴ F Q) + δ λ_max)⁻ᵉ Qᴴ.
      refresh_growth: above 1; the roots R are computed out of schedule when tr(F R) of a factor has
        grown by more than this since R was taken (`float("inf")`: with a leaf's first gradients
        only). It easily doubles in between; to follow that costs more than it brings.
      kl: whether each factor is estimated from the gradient multiplied by the other factors' roots,
        Fᵢ = E[G₍ᵢ₎ (⊗ⱼ≠ᵢ Fⱼ)⁻¹ G₍ᵢ₎ᴴ] dᵢ/N, which brings N(0, ⊗F) nearest to the gradients in the
        Kullback-Leibler divergence. It needs exponent 1/2.
      max_dim: longer axes have diagonal factors, as have axes of length 1.
      block_size: longer axes are cut into the fewest blocks of nearly equal length, each with
        factors of its own.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a prefix of the parameters' tree with them, or a function of the
        parameters that returns one.
      factor_dtype: of dense factors and roots of leaves up to float32; "bfloat16" halves the
        memory, not the precision of the arithmetic.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, sound=None)`.
      With a NaN or an infinity (or where `sound`, a bool [], is False) the update is zero and the
      state keeps its last value but for `total_notfinite`. Under `jax.vmap` over hyper-parameters a
      longer `root_every` saves nothing.

    Raises:
      ValueError: for an unknown choice, a number out of range, a leaf that is not of floating
        point; in `update` for trees or shapes that differ from those of `init`.

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
      Gupta, Koren and Singer 2018, arXiv:1802.09568. Morwani et al. 2024, arXiv:2406.17748:
      exponent 1/2. Lin et al. 2025, arXiv:2509.03378: `kl`. Deviations: averages in place of sums,
      damping relative to the largest eigenvalue.
    """
    options = SimpleNamespace(**locals())
    contracts.require_choice(METHOD, "root", root, ("eigh", "newton", "qr"))
    contracts.require_numbers(METHOD, decay=decay, b1=b1, at_least=0, at_most=1)
    contracts.require_numbers(METHOD, exponent=exponent, above=0)
    contracts.require_numbers(METHOD, damping=damping, at_least=0)
    contracts.require_numbers(METHOD, refresh_growth=refresh_growth, above=1)
    contracts.require_numbers(METHOD, update_every=update_every, root_every=root_every, at_least=1)
    contracts.require_numbers(METHOD, max_dim=max_dim, block_size=block_size, at_least=1)
    if kl and not contracts.is_python_number(exponent, 0.5):
        raise ValueError(
            f"{METHOD}: kl=True whitens by the roots and needs exponent=0.5, got {exponent}."
        )
    if root == "newton" and not (isinstance(exponent, int | float) and (1 / exponent).is_integer()):
        raise ValueError(
            f'{METHOD}: root="newton" needs an exponent whose inverse is whole, got {exponent=}; use root="eigh".'
        )
    update = with_sharding_types(functools.partial(_update, options))
    return optax.GradientTransformationExtraArgs(functools.partial(_init, options), update)


def _init(options, params) -> Any:
    contracts.require_float_leaves(METHOD, params, complex_leaves=True)
    layout = layout_of(METHOD, options, params)

    def zeros(piece):
        pairs = zip(piece.factors, piece.diagonal, strict=True)
        return tuple(jnp.zeros((*f.shape[:-1], f.shape[-1] + (not d)), f.dtype) for f, d in pairs)

    return ScaleByShampooState(
        count=jnp.zeros([], jnp.int32),
        refreshed=jnp.zeros([], jnp.int32),
        momentum=contracts.wide_zeros(params),
        factors=layout.build(zeros),
        bases=layout.build(axis_factors.identities) if options.root == "qr" else (),
        energies=axis_factors.energies(layout.pieces),
        total_notfinite=jnp.zeros([], jnp.int32),
    )


def _update(options, updates, state, params=None, *, sound=None, **extra_args):
    del extra_args
    tracks = options.root == "qr"
    likes = ("factors", "bases") if tracks else ("factors",)
    layout_by = functools.partial(layout_of, METHOD, options)
    state, layout, good, total_notfinite = axis_factors.opened(
        METHOD, layout_by, likes, updates, state, params, sound
    )
    momentum, direction = axis_factors.momentum_and_direction(
        options.b1, options.nesterov, state.count, state.momentum, updates, good
    )

    # Leaf by leaf: what is done alike to leaves of one shape is compiled once.
    pieces, tensors, kept = layout.pieces, layout.blocks(updates), layout.by_piece(state.factors)
    roots = [
        tuple(
            x if diagonal else symmetric_pairs.second(x)
            for x, diagonal in zip(of_piece, p.diagonal, strict=True)
        )
        for p, of_piece in zip(pieces, kept, strict=True)
    ]
    squares = [
        axis_factors.square_norms(x, len(p.stack)) for p, x in zip(pieces, tensors, strict=True)
    ]
    moments = list(map(functools.partial(_moments, options), pieces, tensors, kept, roots))
    decay = contracts.value_at(options.decay, state.count, jnp.result_type(float))
    averages = good & (state.count % options.update_every == 0)
    weight = jnp.where(
        averages, axis_factors.running_weight(decay, state.count // options.update_every), 0
    )
    period = contracts.value_at(options.root_every, state.count).astype(jnp.int32)
    due = good & axis_factors.is_due(state.count, state.refreshed, period)
    take_roots = functools.partial(
        factor_roots, exponent=options.exponent, damping=options.damping, method=options.root
    )
    bases = (
        layout.by_piece(state.bases) if tracks else [(None,) * len(piece.shape) for piece in pieces]
    )
    roots, bases, energies = axis_factors.refresh(
        pieces,
        kept,
        moments,
        weight,
        roots,
        bases,
        state.energies,
        squares,
        due,
        options.refresh_growth,
        take_roots,
    )
    kept = list(map(functools.partial(_renewed, weight), pieces, kept, moments, roots))
    new = ScaleByShampooState(
        count=jnp.where(good, optax.safe_increment(state.count), state.count),
        refreshed=jnp.where(due, state.count, state.refreshed),
        momentum=momentum,
        factors=layout.like_factors(kept, state.factors),
        bases=layout.like_factors(bases, state.bases) if tracks else (),
        energies=energies,
        total_notfinite=total_notfinite,
    )
    roots = map(functools.partial(_with_diagonal_roots, options), pieces, kept, roots)
    directions = map(kron_matvec, roots, layout.blocks(direction))
    directions = layout.leaves_of_blocks(directions, layout.without_pieces(direction), updates)
    return jax.tree.map(
        lambda u: jnp.where(good & jnp.isfinite(u), u, jnp.zeros_like(u)), directions
    ), new


def _renewed(weight, piece, kept, moments, roots):
    """What is kept of each axis, with the moments averaged in."""
    return tuple(
        axis_factors.averaged(x, weight, m) if diagonal else axis_factors.repacked(x, weight, m, r)
        for x, m, r, diagonal in zip(kept, moments, roots, piece.diagonal, strict=True)
    )


def _moments(options, piece, x, kept, roots):
    """A piece's second moments of this step."""
    stack = len(piece.stack)
    if not options.kl:
        return tuple(
            axis_factors.axis_moment(x, axis, d, stack) for axis, d in enumerate(piece.diagonal)
        )
    roots = _with_diagonal_roots(options, piece, kept, roots)
    roots = [
        axis_factors.root_or_identity(r, d, stack)
        for r, d in zip(roots, piece.diagonal, strict=True)
    ]
    return tuple(
        axis_factors.whitened_moment(x, roots, axis, d, stack)
        for axis, d in enumerate(piece.diagonal)
    )


def _with_diagonal_roots(options, piece, kept, roots):
    """Roots of diagonal factors are cheap, and new at every step."""
    return tuple(
        axis_factors.power(x, options.exponent, options.damping) if diagonal else r
        for x, r, diagonal in zip(kept, roots, piece.diagonal, strict=True)
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
    """Shampoo for matrices, Adam for the rest, decoupled weight decay and a learning rate.

    Matrices receive `scale_by_shampoo`, which documents the other arguments, and
    `normalize_by_rms(rms)`; what is not a matrix, or `adam_for` selects, `optax.scale_by_adam`,
    whose updates, too, have a root mean square of 0.2 to 1.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the matrices' momentum.
      nesterov: see `scale_by_shampoo`.
      weight_decay: decoupled, as in AdamW. Other than the Python number 0, update needs params.
      weight_decay_mask: as in `optax.add_decayed_weights`.
      rms: root mean square of each matrix's update before decay and learning rate, a number; None
        leaves it as it is.
      adam_for: which matrices Adam takes, embeddings and the output layer above all: a function of
        a leaf's path and the leaf, or a prefix of the parameters' tree, with values True or "adam";
        False for the rule, matrices by the method and all else by Adam; or "shampoo", whatever the
        rank.
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
      ValueError: as `scale_by_shampoo`; for labels of another kind, and for labels that miss a
        leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> params = {"embedding": jnp.ones((9, 4)), "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> tx = optax_curv.shampoo(0.02, adam_for=lambda path, leaf: "embedding" in jax.tree_util.keystr(path))
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
      >>> print(updates["dense"]["kernel"][0].round(4), updates["dense"]["bias"].round(4))
      [-0.004 -0.004 -0.004] [-0.02 -0.02 -0.02]

    References:
      See `scale_by_shampoo`; Agarwal et al. 2020, arXiv:2002.11803: one method's direction, another
      one's size.
    """
    return with_adam(scale_by_shampoo, locals())


class MatricesAndAdamState(NamedTuple):
    """The method's state and Adam's, each for its own leaves, and the steps skipped for a NaN or infinity, int32 []."""

    matrices: Any
    others: Any
    total_notfinite: jax.Array


def with_adam(scale_by, given) -> optax.GradientTransformationExtraArgs:
    """The alias, of the arguments `given` by name, of a method for matrices; nothing moves on a NaN anywhere."""
    method, tx = scale_by.__name__.removeprefix("scale_by_"), contracts.handed_on(scale_by, given)
    if given["rms"] is not None:
        contracts.require_numbers(method, rms=given["rms"], above=0)
        tx = optax.chain(tx, normalize_by_rms(given["rms"]))
    is_ours = functools.partial(_is_ours, method, given["adam_for"], given["stacked"])
    matrices, adam = (
        optax.masked(tx, is_ours),
        optax.scale_by_adam(given["adam_b1"], given["adam_b2"], given["adam_eps"]),
    )
    adam = optax.masked(adam, lambda tree: jax.tree.map(operator.not_, is_ours(tree)))

    def init(params):
        contracts.require_float_leaves(method, params, complex_leaves=True)
        return MatricesAndAdamState(
            matrices.init(params), adam.init(params), jnp.zeros([], jnp.int32)
        )

    def update(updates, state, params=None, **extra_args):
        good, total_notfinite = axis_factors.soundness(updates, None, state.total_notfinite)
        new, of_matrices = matrices.update(
            updates, state.matrices, params, sound=good, **extra_args
        )
        new, of_others = adam.update(new, state.others, params)
        new = jax.tree.map(lambda u, g: jnp.where(good, u, 0).astype(g.dtype), new, updates)
        of_others = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), of_others, state.others
        )
        return new, MatricesAndAdamState(of_matrices, of_others, total_notfinite)

    decay, mask = given["weight_decay"], given["weight_decay_mask"]
    return optax.chain(
        optax.GradientTransformationExtraArgs(init, update),
        optax.identity()
        if contracts.is_python_number(decay, 0)
        else optax.add_decayed_weights(decay, mask),
        optax.scale_by_learning_rate(given["learning_rate"]),
    )


def layout_of(method: str, options, tree):
    """The pieces of a tree of leaves, by the method's options."""
    sizes = {"max_dim": options.max_dim, "block_size": options.block_size}
    return axis_factors.layout_of(
        method, tree, **sizes, stacked=options.stacked, dtype=options.factor_dtype
    )


def _is_ours(method: str, adam_for, stacked, tree):
    """Whether the method takes each leaf of a tree, and not Adam; the aliases document `adam_for`."""
    paths = jax.tree.leaves_with_path(tree)
    if adam_for is None:
        chosen = [False] * len(paths)
    elif callable(adam_for):
        chosen = [adam_for(path, leaf) for path, leaf in paths]
    else:
        chosen = _by_prefix(method, adam_for, tree)

    def ours(path, leaf, choice, stack):
        if isinstance(choice, str) and choice in ("adam", method):
            return choice == method
        if isinstance(choice, str) or choice not in (True, False):
            raise ValueError(
                f"{method}: adam_for gives {choice!r} for the leaf {jax.tree_util.keystr(path) or 'at the root'}; "
                f"expected True or 'adam', False, or {method!r}."
            )
        return not choice and len(leaf.shape) - stack == 2

    rows = zip(paths, chosen, kron_layout.stack_ndims(method, stacked, tree), strict=True)
    found = [ours(*path_and_leaf, choice, stack) for path_and_leaf, choice, stack in rows]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _by_prefix(method, adam_for, tree):
    try:
        return jax.tree.leaves(jax.tree.broadcast(adam_for, tree, is_leaf=lambda x: x is None))
    except ValueError as error:
        given = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(adam_for)]
        wanted = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
        missed = [path for path in wanted if not any(path.startswith(p) for p in given)]
        raise ValueError(
            f"{method}: adam_for must label every leaf; it misses {missed or 'none'} with labels at {given}: {error}"
        ) from None
