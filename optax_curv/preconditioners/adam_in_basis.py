"""Adam in the eigenbasis of K-FAC's factors."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import KroneckerFactors
from optax_curv.layers import Layers
from optax_curv.linalg.factors import Factor
from optax_curv.preconditioners._layerwise.bases import (
    Bases,
    Eigenbasis,
    bases_of,
    carried,
    divided_in_bases,
    each,
    eigenbasis_by_layer,
    identity_bases,
    into_bases,
)
from optax_curv.preconditioners._layerwise.factors import (
    LayerFactors,
    kronecker_factors,
    spectra_of,
)
from optax_curv.preconditioners._layerwise.rule import LayerRule, fallback_of
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation import averages
from optax_curv.preconditioners._transformation.numbers import require_numbers
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.typing import Number, Schedulable, Sharding


class ScaleByAdamInBasisState(NamedTuple):
    """State of `scale_by_adam_in_basis`; layers of equal shapes share a stack of N matrices.

    Attributes:
      count: steps taken, int32 [].
      stacks: by stack the averaged factors.
      bases: by stack their eigenvectors, identities before the first step.
      momentum: by stack the average gradient, float [N, rows, out].
      moments: by stack the average square of the gradient in the basis, float [N, rows, out].
      fallback: state of the transformation for uncovered leaves.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    stacks: dict[str, LayerFactors]
    bases: dict[str, Bases]
    momentum: dict[str, jax.Array]
    moments: dict[str, jax.Array]
    fallback: Any
    total_notfinite: jax.Array

    @property
    def factors(self) -> dict[str, KroneckerFactors]:
        """The running averages by layer."""
        return kronecker_factors(self.stacks)

    @property
    def basis(self) -> dict[str, Eigenbasis]:
        """The eigenvectors by layer."""
        return eigenbasis_by_layer(self.bases)

    def spectra(self) -> dict[str, dict[str, Factor]]:
        """The factors that diagnostics read, by stack and side."""
        return spectra_of(self.stacks)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _AdamInBasis(LayerRule):
    """Adam in a basis; `scale_by_adam_in_basis` documents the options."""

    guarded = ("stacks", "bases", "momentum", "moments")  # whose averages have weight zero

    b1: Schedulable
    b2: Schedulable
    eps: Number
    basis_every: Number

    def check_options(self):
        """Refuses options that cannot be, by name."""
        betas: dict[str, Any] = {"b1": self.b1, "b2": self.b2}
        require_numbers(self.method, **betas, at_least=0, at_most=1, schedule=True)
        require_numbers(self.method, eps=self.eps, at_least=0)
        periods: dict[str, Any] = {
            "update_every": self.update_every,
            "basis_every": self.basis_every,
        }
        require_numbers(self.method, **periods, at_least=1)
        self.check_layers()

    def init_stacks(self, structs):
        """Zeros, and bases that are the identity: the first statistics set everything."""
        return ScaleByAdamInBasisState(
            **counters(),
            stacks=self.seen.zero_factors(structs),
            bases=identity_bases(self.method, self.seen, structs),
            momentum={name: jnp.zeros(x.shape, x.dtype) for name, x in structs.items()},
            moments={name: jnp.zeros(x.shape, x.dtype) for name, x in structs.items()},
            fallback=(),
        )

    def update_stacks(self, grads, state, sound, *, factors, **extra_args):
        """One step of Adam in the bases, which are renewed first where their period says so."""
        del extra_args
        factors = self.when_due(
            state,
            sound,
            lambda: self.with_statistics(state.stacks, factors, state, sound)[0],
            lambda: state.stacks,
        )

        def renewed():
            _, new = bases_of(factors)
            return new, each(carried, new, state.bases, state.moments)

        bases, moments = jax.lax.cond(
            sound & averages.is_due(state.count, self.basis_every),
            renewed,
            lambda: (state.bases, state.moments),
        )
        squares = each(lambda basis, x: jnp.square(into_bases(basis, x)), bases, grads)
        first, second = (averages.weight_at(b, state.count, sound) for b in (self.b1, self.b2))
        momentum = {
            n: averages.averaged(state.momentum[n], first, grads[n]) for n in state.momentum
        }
        moments = {n: averages.averaged(x, second, squares[n]) for n, x in moments.items()}
        scale = {n: averages.root_of_moments(x, self.eps) for n, x in moments.items()}
        directions = each(divided_in_bases, bases, scale, momentum)
        new = state._replace(stacks=factors, bases=bases, momentum=momentum, moments=moments)
        return Step(directions, new, sound)


def scale_by_adam_in_basis(
    layers: Layers,
    b1: Schedulable = 0.9,
    b2: Schedulable = 0.999,
    *,
    eps: Number = 1e-8,
    decay: Schedulable = 0.95,
    update_every: Number = 1,
    statistic_bound: Number | None = 10.0,
    basis_every: Number = 10,
    fallback: optax.GradientTransformation | None = None,
    sharding: Sharding = None,
    factor_sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of K-FAC's factors.

    It is SOAP with captured factors in the place of the gradients' own.

    With A = U_A S_A U_Aᵀ and G = U_G S_G U_Gᵀ the averages of the captured factors, each layer's
    gradient ∇ is seen as ∇' = U_Aᵀ ∇ U_G, where Adam's rule acts element by element:

        m ← b1 m + (1 - b1) ∇,    v ← b2 v + (1 - b2) ∇'²,
        u = U_A [(U_Aᵀ m U_G) / (√v + eps)] U_Gᵀ,

    m and v free of the bias of their start. EKFAC's moments are *per example*, these of the batch
    gradient, whence the scale is Adam's.

    Args:
      layers: the layers of the loss, from `find_layers` or made by hand.
      b1: decay of the momentum, in [0, 1]; a number or a schedule.
      b2: decay of the moments, in [0, 1]; a number or a schedule.
      eps: at least 0. Beside it stands ρ² max v / √v, with ρ of 256 roundings: what the change of
        basis leaves where a layer has no gradient is rounding, and moves nothing.
      decay: of the averages of A and G, in [0, 1]; a number or a schedule.
      update_every: steps between averaging statistics in.
      statistic_bound: b ≥ 1, or None. After a layer's first ten statistics a factor whose largest
        entry is more than b times that of its average is scaled down to that before it is averaged
        in, so that an outlier neither stalls the layer nor stays. A second one in a row
        may be b² times as large, and so on, so that growth is followed within a few steps. The
        state counts them in `held`.
      basis_every: steps between eigendecompositions, after each of which the moments are carried
        into the new basis, as far as their diagonal says.
      fallback: transformation for leaves that no layer covers, such as `optax.scale_by_adam()`. It
        sees the tree of these leaves in float32 at least. None refuses them.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many layers of every shape, keeps what belongs to them, and alone computes
        their directions.
      factor_sharding: the old name of `sharding`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `curvature=`, a dict from layer name
      to `KroneckerFactors`. With a gradient or statistic that is not finite it returns zeros and
      keeps its state but for `total_notfinite`.

    Raises:
      ValueError: for a number out of range; in `init` and `update` for layers of another model,
        uncovered leaves without `fallback`, a curvature that is missing or does not fit, and a
        layer whose leaves are masked in part.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_adam_in_basis(optax_curv.Layers([layer]))
      >>> params = {"w": jnp.zeros((2, 1))}
      >>> a, g = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1)
      >>> statistic = optax_curv.KroneckerFactors(a, g, jnp.int32(1))
      >>> grads = {"w": jnp.array([[5.0], [-0.1]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params, curvature={"dense": statistic})
      >>> updates["w"].ravel().round(3).tolist()
      [1.0, -1.0]

    References:
      Vyas et al. 2024, arXiv:2409.11321, Algorithm 3. George et al. 2018, arXiv:1806.03884.
    """
    rule = _AdamInBasis(
        method="scale_by_adam_in_basis",
        layers=layers,
        b1=b1,
        b2=b2,
        eps=eps,
        decay=decay,
        update_every=update_every,
        statistic_bound=statistic_bound,
        basis_every=basis_every,
        fallback=fallback_of(fallback),
        owners=owners_of("scale_by_adam_in_basis", sharding, factor_sharding),
    )
    rule.check_options()
    return transformation(rule)
