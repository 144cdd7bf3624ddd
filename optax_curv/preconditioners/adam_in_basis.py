"""Adam in the eigenbasis of K-FAC's factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import KroneckerFactors
from optax_curv.layers import Layers
from optax_curv.preconditioners import ekfac
from optax_curv.preconditioners._axes import axis_factors
from optax_curv.preconditioners._layerwise.layerwise import averaged, layerwise, zero_factors
from optax_curv.preconditioners._transformation import contracts

METHOD = "scale_by_adam_in_basis"


class ScaleByAdamInBasisState(NamedTuple):
    """State of `scale_by_adam_in_basis`.

    Attributes:
      count: steps taken, int32 [].
      factors: running averages, `KroneckerFactors` by layer.
      basis: `Eigenbasis` by layer, identities before the first step.
      momentum: average gradient by layer as a matrix, float [*stack, rows, out].
      moments: average square of the gradient in the basis by layer, float [*stack, rows, out].
      fallback: state of the transformation for uncovered leaves.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    factors: dict[str, KroneckerFactors]
    basis: dict[str, ekfac.Eigenbasis]
    momentum: dict[str, jax.Array]
    moments: dict[str, jax.Array]
    fallback: optax.OptState
    total_notfinite: jax.Array


def scale_by_adam_in_basis(
    layers: Layers,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps=1e-8,
    decay=0.95,
    update_every=1,
    basis_every=10,
    fallback=None,
    factor_sharding=None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of K-FAC's factors: SOAP with captured factors in the place of the gradients' own.

    With A = U_A S_A U_Aᵀ and G = U_G S_G U_Gᵀ the averages of the captured factors, each layer's
    gradient ∇ is seen as ∇' = U_Aᵀ ∇ U_G, where Adam's rule acts element by element:

        m ← b1 m + (1 - b1) ∇,    v ← b2 v + (1 - b2) ∇'²,    u = U_A [(U_Aᵀ m U_G) / (√v + eps)]
        U_Gᵀ,

    m and v free of the bias of their start. EKFAC's moments are *per example*, these of the batch
    gradient, whence the scale is Adam's.

    Args:
      layers: see `scale_by_kfac`.
      b1: decay of the momentum, in [0, 1]; a number or a schedule.
      b2: decay of the moments, in [0, 1]; a number or a schedule.
      eps: at least 0.
      decay: weight of the old factors, in [0, 1]; a number or a schedule.
      update_every: steps between averaging statistics in.
      basis_every: steps between eigendecompositions, after each of which the moments are carried
        into the new basis, as far as their diagonal says.
      fallback: see `scale_by_kfac`.
      factor_sharding: see `scale_by_kfac`.

    Returns:
      A transformation whose `update` needs `curvature=`, a dict from layer name to
      `KroneckerFactors`. With a gradient or statistic that is not finite it returns zeros and keeps
      its state.

    Raises:
      ValueError: as `scale_by_kfac`, and for a layer whose leaves are masked in part.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_adam_in_basis(optax_curv.Layers([layer]))
      >>> params = {"w": jnp.zeros((2, 1))}
      >>> statistic = optax_curv.KroneckerFactors(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1), jnp.int32(1))
      >>> grads = {"w": jnp.array([[5.0], [-0.1]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params, curvature={"dense": statistic})
      >>> updates["w"].ravel().round(3).tolist()
      [1.0, -1.0]

    References:
      Vyas et al. 2024, arXiv:2409.11321, Algorithm 3. George et al. 2018, arXiv:1806.03884.
    """
    contracts.require_numbers(METHOD, b1=b1, b2=b2, decay=decay, at_least=0, at_most=1)
    contracts.require_numbers(METHOD, eps=eps, at_least=0)
    contracts.require_numbers(
        METHOD, update_every=update_every, basis_every=basis_every, at_least=1
    )

    def init_rule(present):
        return {
            "factors": zero_factors(present),
            "basis": {name: ekfac.identity_basis(METHOD, x) for name, x in present.items()},
            "momentum": ekfac.zero_matrices(present),
            "moments": ekfac.zero_matrices(present),
        }

    def new_basis(present, factors, state):
        _, basis = ekfac.layer_bases(present, factors, factor_sharding)
        return basis, ekfac.carry_moments(
            present, state.moments, state.basis, basis, factor_sharding
        )

    def squares(u_a, u_g, matrix):
        return jnp.square(ekfac.into_basis((u_a, u_g), matrix))

    def update_rule(present, state, matrices, curvature, good):
        factors = averaged(METHOD, present, state, curvature, decay, update_every)
        basis, moments = jax.lax.cond(
            state.count % basis_every == 0,
            lambda: new_basis(present, factors, state),
            lambda: (state.basis, state.moments),
        )
        new = ekfac.in_bases(squares, present, (basis,), matrices, sharding=factor_sharding)
        momentum, scale = {}, {}
        for name, x in present.items():
            first, second = (
                axis_factors.running_weight(
                    contracts.value_at(b, state.count, x.dtype), state.count
                )
                for b in (b1, b2)
            )
            momentum[name] = state.momentum[name] + first * (matrices[name] - state.momentum[name])
            moments[name] = moments[name] + second * (new[name] - moments[name])
            scale[name] = jnp.sqrt(moments[name]) + eps
        directions = ekfac.in_bases(
            ekfac.divided_in_basis, present, (basis,), scale, momentum, sharding=factor_sharding
        )
        fields = {"factors": factors, "basis": basis, "momentum": momentum, "moments": moments}
        return directions, fields, {}, good & contracts.is_squarable(curvature)

    options = {"kl_clip": None, "fallback": fallback, "factor_sharding": factor_sharding}
    return layerwise(METHOD, layers, ScaleByAdamInBasisState, init_rule, update_rule, **options)
