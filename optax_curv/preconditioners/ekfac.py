"""EKFAC: K-FAC's eigenbasis with the gradient's own second moments in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import KroneckerFactors
from optax_curv.layers import Layers
from optax_curv.linalg import _lapack as lapack
from optax_curv.preconditioners._layerwise.layerwise import (
    HIGHEST,
    averaged,
    is_silent,
    layerwise,
    map_grouped,
    zero_factors,
)
from optax_curv.preconditioners._transformation import contracts


class Eigenbasis(NamedTuple):
    """Eigenvectors of a layer's factors in their columns; None where the factor is diagonal.

    Attributes:
      input_basis: U_A, float [*stack, rows, rows].
      output_basis: U_G, float [*stack, out, out].
    """

    input_basis: jax.Array | None
    output_basis: jax.Array | None


class ScaleByEKFACState(NamedTuple):
    """State of `scale_by_ekfac`.

    Attributes:
      count: steps taken, int32 [].
      factors: running averages, `KroneckerFactors` by layer.
      basis: `Eigenbasis` by layer, identities before the first step.
      moments: running averages of E[(U_Aᵀ a gᵀ U_G)²] by layer, float [*stack, rows, out].
      fallback: state of the transformation for uncovered leaves.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    factors: dict[str, KroneckerFactors]
    basis: dict[str, Eigenbasis]
    moments: dict[str, jax.Array]
    fallback: optax.OptState
    total_notfinite: jax.Array


def eigenbasis(opt_state) -> dict[str, Eigenbasis]:
    """The basis in which the next step's moments are to be measured.

    Args:
      opt_state: the state of `scale_by_ekfac`, alone or anywhere within the state of a chain.

    Returns:
      `Eigenbasis` by layer, for ``value_grad_and_curvature(..., statistic="eigenbasis")(...,
      basis=...)``. Its shapes never change, so it may cross `jax.jit`.

    Raises:
      ValueError: if there is no such state, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> state = optax_curv.ekfac(0.1, optax_curv.Layers([layer])).init({"w": jnp.zeros((2, 1))})
      >>> print(optax_curv.eigenbasis(state)["dense"].input_basis)
      [[1. 0.]
       [0. 1.]]
    """

    def is_ours(x):
        return isinstance(x, ScaleByEKFACState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"eigenbasis: expected one state of scale_by_ekfac in the optimizer's state, found {len(found)}."
        )
    return found[0].basis


def rotate(basis, x, transpose=False):
    """Uᵀ x (or U x) along the rows of a batch [B, m, n]; None leaves x as it is."""
    return (
        x if basis is None else jnp.matmul(basis.mT if transpose else basis, x, precision=HIGHEST)
    )


def into_basis(basis, x):
    """U_Aᵀ X U_G."""
    u_a, u_g = basis
    return rotate(u_g, rotate(u_a, x, transpose=True).mT, transpose=True).mT


def out_of_basis(basis, x):
    """U_A X U_Gᵀ."""
    u_a, u_g = basis
    return rotate(u_g, rotate(u_a, x).mT).mT


def zero_matrices(present) -> dict[str, jax.Array]:
    """Zeros [*stack, rows, out] by layer."""
    return {
        name: jnp.zeros((*x.layer.stack, x.layer.rows_of_matrix, x.layer.out_dim), x.dtype)
        for name, x in present.items()
    }


def layer_bases(present, factors, sharding):
    """(factors' eigenvalues, `Eigenbasis`) by layer; a diagonal factor's are itself and None."""
    stacks = {(name, side): x.layer.stack for name, x in present.items() for side in (0, 1)}
    eigen = {key: (factors[key[0]][key[1]], None) for key in stacks}
    full = {key: f for key, (f, _) in eigen.items() if f.ndim == len(stacks[key]) + 2}
    eigen |= map_grouped(lapack.eigh, {key: stacks[key] for key in full}, full, sharding=sharding)
    values = {name: (eigen[name, 0][0], eigen[name, 1][0]) for name in present}
    return values, {name: Eigenbasis(eigen[name, 0][1], eigen[name, 1][1]) for name in present}


def in_bases(function, present, bases, *columns, sharding):
    """`function(u_A, u_G, …, *columns)` of every layer, with the two sides of each of the bases."""
    stacks = {name: x.layer.stack for name, x in present.items()}
    sides = [{name: basis[name][side] for name in present} for basis in bases for side in (0, 1)]
    return map_grouped(function, stacks, *sides, *columns, sharding=sharding)


def _carried(new_a, new_g, old_a, old_g, moments):
    if new_a is not None:
        moments = jnp.matmul(
            jnp.square(rotate(new_a, old_a, transpose=True)), moments, precision=HIGHEST
        )
    if new_g is not None:
        moments = jnp.matmul(
            moments, jnp.square(rotate(new_g, old_g, transpose=True)).mT, precision=HIGHEST
        )
    return moments


def carry_moments(present, moments, old, new, sharding):
    """Moments in new bases, as far as a diagonal says: (R_A ∘ R_A) M (R_G ∘ R_G)ᵀ with R = U'ᵀ U."""
    return in_bases(_carried, present, (new, old), moments, sharding=sharding)


def _change_basis(present, factors, basis, moments, first, sharding):
    """The factors' eigenbasis and the moments in it; in the first step s_A s_Gᵀ."""
    values, new_basis = layer_bases(present, factors, sharding)
    moved = carry_moments(present, moments, basis, new_basis, sharding)

    def in_new_basis(name):
        values_a, values_g = (jnp.maximum(x, 0) for x in values[name])
        return jnp.where(first, values_a[..., :, None] * values_g[..., None, :], moved[name])

    return new_basis, {name: in_new_basis(name) for name in present}


def identity_basis(method: str, x) -> Eigenbasis:
    """A layer's basis before any step; refuses a layer of which a leaf is masked."""
    layer = x.layer
    if layer.rows_of_matrix != x.whole.rows_of_matrix:
        raise ValueError(
            f"{method}: layer {layer.name!r} is masked in part; mask all of {x.whole.paths} or none."
        )
    sides = [
        jnp.broadcast_to(jnp.eye(shape[-1], dtype=x.dtype), shape)
        if len(shape) == len(layer.stack) + 2
        else None
        for shape in layer.factor_shapes
    ]
    return Eigenbasis(*sides)


def divided_in_basis(u_a, u_g, divisor, matrix):
    """U_A [(U_Aᵀ ∇ U_G) / divisor] U_Gᵀ, without the coordinates whose divisor is zero."""
    inside = into_basis((u_a, u_g), matrix)
    inside = jnp.where(divisor > 0, inside / jnp.where(divisor > 0, divisor, 1), 0)
    return out_of_basis((u_a, u_g), inside)


def scale_by_ekfac(
    layers: Layers,
    damping=1e-3,
    *,
    decay=0.95,
    update_every=1,
    invert_every=1,
    kl_clip=None,
    fallback=None,
    factor_sharding=None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient by its second moments in the eigenbasis of K-FAC's factors.

    With A = U_A S_A U_Aᵀ, G = U_G S_G U_Gᵀ and M = E[(U_Aᵀ a gᵀ U_G)²], element by element, the
    direction is

        u = U_A [(U_Aᵀ ∇ U_G) / (M + λ)] U_Gᵀ.

    K-FAC has S_A S_Gᵀ in the place of M, the diagonal nearest to the Fisher block in this basis. M
    is measured by the backward pass, in the basis of the state *before* the step, and new at every
    step, so that old bases are safe:

        capture = optax_curv.value_grad_and_curvature(loss_fn, layers=layers,
        statistic="eigenbasis") value, grads, curvature = capture(params, batch,
        basis=optax_curv.eigenbasis(opt_state))

    Args:
      layers: see `scale_by_kfac`.
      damping: λ ≥ 0, added to the moments; a number or a schedule.
      decay: weight of the old factors and moments, in [0, 1]; a number or a schedule.
      update_every: steps between averaging statistics in.
      invert_every: steps between eigendecompositions, after each of which the moments are carried
        into the new basis, as far as their diagonal says. Under `jax.vmap` over a hyper-parameter
        longer periods save nothing.
      kl_clip: see `scale_by_kfac`.
      fallback: see `scale_by_kfac`.
      factor_sharding: see `scale_by_kfac`.

    Returns:
      A transformation whose `update` needs `curvature=`, a dict from layer name to
      `EigenbasisMoments`. With a gradient or statistic that is not finite it returns zeros and
      keeps its state.

    Raises:
      ValueError: as `scale_by_kfac`; for a statistic without moments; and for a layer whose leaves
        are masked in part.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_ekfac(optax_curv.Layers([layer]), damping=0.0)
      >>> params = {"w": jnp.zeros((2, 1))}
      >>> a = jnp.diag(jnp.array([4.0, 1.0]))
      >>> statistic = optax_curv.EigenbasisMoments(a, jnp.eye(1), jnp.int32(1), jnp.array([[4.0], [1.0]]))
      >>> updates, _ = tx.update({"w": jnp.ones((2, 1))}, tx.init(params), params, curvature={"dense": statistic})
      >>> updates["w"].ravel().tolist()
      [0.25, 1.0]

    References:
      George et al. 2018, arXiv:1806.03884, §3 and Algorithm 1. Deviation: moments start from the
      Kronecker product, and survive a change of basis.
    """
    method = "scale_by_ekfac"
    contracts.require_numbers(method, damping=damping, at_least=0)
    contracts.require_numbers(method, decay=decay, at_least=0, at_most=1)
    contracts.require_numbers(
        method, update_every=update_every, invert_every=invert_every, at_least=1
    )

    def init_rule(present):
        basis = {name: identity_basis(method, x) for name, x in present.items()}
        return {"factors": zero_factors(present), "basis": basis, "moments": zero_matrices(present)}

    def measured(x, value):
        """The moments of one layer's statistic."""
        name, shape = x.layer.name, (*x.layer.stack, x.layer.rows_of_matrix, x.layer.out_dim)
        if not hasattr(value, "moments"):
            raise ValueError(
                f"{method}: the statistic of layer {name!r} is a {type(value).__name__} without moments. Make it with "
                'optax_curv.value_grad_and_curvature(loss_fn, statistic="eigenbasis") and pass '
                "basis=optax_curv.eigenbasis(opt_state) to the function."
            )
        if jnp.shape(value.moments) != shape:
            raise ValueError(
                f"{method}: the moments of layer {name!r} have shape {jnp.shape(value.moments)}, expected {shape}."
            )
        return jnp.asarray(value.moments, x.dtype)

    def update_rule(present, state, matrices, curvature, good):
        new = {name: measured(x, curvature[name]) for name, x in present.items()}
        factors = averaged(method, present, state, curvature, decay, update_every)
        averaging, first = state.count % update_every == 0, state.count == 0
        moments = {}
        for name, x in present.items():
            old = state.moments[name]
            weight = jnp.where(is_silent(old), 0, contracts.value_at(decay, state.count, x.dtype))
            moments[name] = jnp.where(averaging, weight * old + (1 - weight) * new[name], old)
        basis, moments = jax.lax.cond(
            state.count % invert_every == 0,
            lambda: _change_basis(present, factors, state.basis, moments, first, factor_sharding),
            lambda: (state.basis, moments),
        )
        # Without any moments yet there is no reason to move a layer.
        damped = {
            name: jnp.where(
                is_silent(m), jnp.inf, m + contracts.value_at(damping, state.count, m.dtype)
            )
            for name, m in moments.items()
        }
        directions = in_bases(
            divided_in_basis, present, (basis,), damped, matrices, sharding=factor_sharding
        )
        fields = {"factors": factors, "basis": basis, "moments": moments}
        return directions, fields, {}, good & contracts.is_squarable(curvature)

    options = {"kl_clip": kl_clip, "fallback": fallback, "factor_sharding": factor_sharding}
    return layerwise(method, layers, ScaleByEKFACState, init_rule, update_rule, **options)


def ekfac(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    damping=1e-3,
    *,
    decay=0.95,
    update_every=1,
    invert_every=1,
    kl_clip=None,
    fallback=None,
    factor_sharding=None,
    momentum=0.9,
    weight_decay=0.0,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC with decoupled weight decay, momentum and a learning rate.

    A chain of `scale_by_ekfac`, `optax.add_decayed_weights`, `optax.trace` and
    `optax.scale_by_learning_rate`.

    Args:
      learning_rate: a number or a schedule.
      layers: see `scale_by_ekfac`, as for all up to `factor_sharding`.
      damping: see there.
      decay: see there.
      update_every: see there.
      invert_every: see there.
      kl_clip: see there.
      fallback: see there.
      factor_sharding: see there.
      momentum: decay of the heavy ball.
      weight_decay: added to the direction, times the parameters, before the momentum.

    Returns:
      A transformation whose `update` needs `curvature=`.

    Raises:
      ValueError: as `scale_by_ekfac`.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.ekfac(0.1, optax_curv.Layers([layer]), invert_every=10)
      >>> state = tx.init({"w": jnp.zeros((2, 1))})

    References:
      See `scale_by_ekfac`.
    """
    return optax.chain(
        contracts.handed_on(scale_by_ekfac, locals()),
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )
