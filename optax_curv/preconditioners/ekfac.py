"""EKFAC: K-FAC's eigenbasis with the gradient's own second moments in it."""

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
)
from optax_curv.preconditioners._layerwise.factors import (
    LayerFactors,
    by_layer,
    by_slice,
    is_silent,
    joined,
    kronecker_factors,
    spectra_of,
)
from optax_curv.preconditioners._layerwise.rule import LayerRule, fallback_of, heavy_ball
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation import averages
from optax_curv.preconditioners._transformation.numbers import (
    require_numbers,
    value_at,
)
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.typing import Number, Schedulable, Sharding


class ScaleByEKFACState(NamedTuple):
    """State of `scale_by_ekfac`; layers of equal shapes share a stack of N matrices.

    Attributes:
      count: steps taken, int32 [].
      stacks: by stack the averaged factors.
      bases: by stack their eigenvectors, identities before the first step.
      moments_of_stacks: by stack the averages of E[(U_Aᵀ a gᵀ U_G)²], float [N, rows, out].
      fallback: state of the transformation for uncovered leaves.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    stacks: dict[str, LayerFactors]
    bases: dict[str, Bases]
    moments_of_stacks: dict[str, jax.Array]
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

    @property
    def moments(self) -> dict[str, jax.Array]:
        """The averaged moments by layer, float [*stack, rows, out]."""
        return by_layer(self.moments_of_stacks)

    def spectra(self) -> dict[str, dict[str, Factor]]:
        """The factors that diagnostics read, by stack and side."""
        return spectra_of(self.stacks)


def eigenbasis(opt_state: Any) -> dict[str, Eigenbasis]:
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

    def is_ours(x: Any) -> bool:
        return isinstance(x, ScaleByEKFACState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            "eigenbasis: expected one state of scale_by_ekfac in the optimizer's state, found "
            f"{len(found)}."
        )
    return found[0].basis


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _EKFAC(LayerRule):
    """EKFAC's mathematics; `scale_by_ekfac` documents the options."""

    guarded = ("stacks", "moments_of_stacks", "bases")  # whose averages have weight zero

    damping: Schedulable
    invert_every: Number

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_numbers(self.method, damping=self.damping, at_least=0, schedule=True)
        require_numbers(self.method, invert_every=self.invert_every, at_least=1)
        require_numbers(self.method, update_every=self.update_every, at_least=1)
        self.check_layers()

    def init_stacks(self, structs):
        """Zeros, and bases that are the identity: the first statistics set everything."""
        return ScaleByEKFACState(
            **counters(),
            stacks=self.seen.zero_factors(structs),
            bases=identity_bases(self.method, self.seen, structs),
            moments_of_stacks={n: jnp.zeros(x.shape, x.dtype) for n, x in structs.items()},
            fallback=(),
        )

    def measured(self, curvature):
        """Factors and moments of this step's statistics, by stack."""

        def of_layer(x):
            value, layer = curvature[x.whole.name], x.layer
            shape = (*layer.stack, layer.rows_of_matrix, layer.out_dim)
            if not hasattr(value, "moments"):
                raise ValueError(
                    f"{self.method}: the statistic of layer {layer.name!r} is a "
                    f"{type(value).__name__} without moments. Make it with "
                    'optax_curv.value_grad_and_curvature(loss_fn, statistic="eigenbasis") and pass '
                    "basis=optax_curv.eigenbasis(opt_state) to the function."
                )
            if jnp.shape(value.moments) != shape:
                raise ValueError(
                    f"{self.method}: the moments of layer {layer.name!r} have shape "
                    f"{jnp.shape(value.moments)}, expected {shape}."
                )
            return jnp.asarray(value.moments, x.dtype)

        stacks = self.seen.layers.items()
        moments = {n: joined(layers, list(map(of_layer, layers))) for n, layers in stacks}
        return {**super().measured(curvature), "moments": moments}

    def update_stacks(self, grads, state, sound, *, factors, moments, **extra_args):
        """One step in the bases, which are renewed where their period says so."""
        del extra_args

        def average():
            new, how = self.with_statistics(state.stacks, factors, state, sound)
            return new, each(_moved, state.moments_of_stacks, moments, how)

        kept = state.stacks, state.moments_of_stacks
        factors, moments = self.when_due(state, sound, average, lambda: kept)
        bases, moments = jax.lax.cond(
            sound & averages.is_due(state.count, self.invert_every),
            lambda: _with_new_bases(factors, state.bases, moments, state.count == 0),
            lambda: (state.bases, moments),
        )
        damping = value_at(self.damping, state.count, jnp.result_type(float))
        damped = {name: _damped(x, damping.astype(x.dtype)) for name, x in moments.items()}
        directions = each(divided_in_bases, bases, damped, grads)
        new = state._replace(stacks=factors, bases=bases, moments_of_stacks=moments)
        return Step(directions, new, sound)


def _with_new_bases(factors, bases, moments, first):
    """The factors' eigenbases and the moments in them; in the first step s_A s_Gᵀ."""
    values, new = bases_of(factors)
    moved = each(carried, new, bases, moments)

    def in_new_bases(name):
        a, g = (jnp.maximum(x, 0) for x in values[name])
        return jnp.where(first, a[..., :, None] * g[..., None, :], moved[name])

    return new, {name: in_new_bases(name) for name in moments}


def _moved(old, new, how):
    """The moments with new ones averaged in, which replace those that are still zero."""
    weight = jnp.where(is_silent(old) & (how.weights > 0), 1, how.weights)
    return averages.averaged(old, by_slice(weight, old), by_slice(how.scales, new) * new)


def _damped(moments, damping):
    """Moments + damping; infinite without any moments yet, as there is no reason to move then."""
    return jnp.where(by_slice(is_silent(moments), moments), jnp.inf, moments + damping)


def scale_by_ekfac(
    layers: Layers,
    damping: Schedulable = 1e-3,
    *,
    decay: Schedulable = 0.95,
    update_every: Number = 1,
    statistic_bound: Number | None = 10.0,
    invert_every: Number = 1,
    kl_clip: Number | None = None,
    fallback: optax.GradientTransformation | None = None,
    sharding: Sharding = None,
    factor_sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient by its second moments in K-FAC's eigenbasis.

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
      layers: the layers of the loss, from `find_layers` or made by hand.
      damping: λ ≥ 0, added to the moments; a number or a schedule.
      decay: of the averages of A, G and M, in [0, 1]; a number or a schedule. The averages are free
        of the bias of their start, and A and G are those of `scale_by_kfac` with the same decay.
      update_every: steps between averaging statistics in.
      statistic_bound: b ≥ 1, or None. After a layer's first ten statistics a factor whose largest
        entry is more than b times that of its average is scaled down to that before it is averaged
        in, so that an outlier neither stalls the layer nor stays. A second one in a row
        may be b² times as large, and so on, so that growth is followed within a few steps. The
        state counts them in `held`.
      invert_every: steps between eigendecompositions, after each of which the moments are carried
        into the new basis, as far as their diagonal says. Under `jax.vmap` over a hyper-parameter
        longer periods save nothing.
      kl_clip: None, or c > 0: all directions are scaled by min(1, sqrt(c / Σ ⟨u, ∇⟩)), the sum over
        all layers.
      fallback: transformation for leaves that no layer covers, such as `optax.scale_by_adam()`. It
        sees the tree of these leaves in float32 at least. None refuses them.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many layers of every shape, keeps what belongs to them, and alone computes
        their directions.
      factor_sharding: the old name of `sharding`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `curvature=`, a dict from layer name
      to `EigenbasisMoments`. With a gradient or statistic that is not finite it returns zeros and
      keeps its state but for `total_notfinite`.

    Raises:
      ValueError: for a number out of range; in `init` and `update` for layers of another model,
        uncovered leaves without `fallback`, a curvature that is missing or does not fit, a
        statistic without moments, and a layer whose leaves are masked in part.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_ekfac(optax_curv.Layers([layer]), damping=0.0)
      >>> params = {"w": jnp.zeros((2, 1))}
      >>> a, g, moments = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1), jnp.array([[4.0], [1.0]])
      >>> curvature = {"dense": optax_curv.EigenbasisMoments(a, g, jnp.int32(1), moments)}
      >>> grads = {"w": jnp.ones((2, 1))}
      >>> updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
      >>> updates["w"].ravel().tolist()
      [0.25, 1.0]

    References:
      George et al. 2018, arXiv:1806.03884, §3 and Algorithm 1. Deviation: moments start from the
      Kronecker product, and survive a change of basis.
    """
    rule = _EKFAC(
        method="scale_by_ekfac",
        layers=layers,
        damping=damping,
        decay=decay,
        update_every=update_every,
        statistic_bound=statistic_bound,
        invert_every=invert_every,
        kl_clip=kl_clip,
        fallback=fallback_of(fallback),
        owners=owners_of("scale_by_ekfac", sharding, factor_sharding),
    )
    rule.check_options()
    return transformation(rule)


def ekfac(
    learning_rate: Schedulable,
    layers: Layers,
    damping: Schedulable = 1e-3,
    *,
    decay: Schedulable = 0.95,
    update_every: Number = 1,
    statistic_bound: Number | None = 10.0,
    invert_every: Number = 1,
    kl_clip: Number | None = 2e-3,
    fallback: optax.GradientTransformation | None = None,
    sharding: Sharding = None,
    factor_sharding: Sharding = None,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    gradient_bound: Number | None = 3.0,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC with decoupled weight decay, momentum and a learning rate.

    With a learning rate η, and u the direction of `scale_by_ekfac` for parameters θ, the step is

        m ← momentum · m + u + weight_decay · θ,    θ ← θ - η m,

    layer by layer, but m ← u + weight_decay · θ for a layer whose m would climb, ⟨m, ∇⟩ < 0.

    Args:
      learning_rate: η, a number or a schedule.
      layers: the layers of the loss, from `find_layers` or made by hand.
      damping: λ ≥ 0, added to the moments; a number or a schedule.
      decay: of the averages of A, G and M, in [0, 1]; a number or a schedule. The averages are free
        of the bias of their start, and A and G are those of `scale_by_kfac` with the same decay.
      update_every: steps between averaging statistics in.
      statistic_bound: b ≥ 1, or None. After a layer's first ten statistics a factor whose largest
        entry is more than b times that of its average is scaled down to that before it is averaged
        in, so that an outlier neither stalls the layer nor stays. A second one in a row
        may be b² times as large, and so on, so that growth is followed within a few steps. The
        state counts them in `held`.
      invert_every: steps between eigendecompositions, after each of which the moments are carried
        into the new basis, as far as their diagonal says. Under `jax.vmap` over a hyper-parameter
        longer periods save nothing.
      kl_clip: None, or c > 0: all directions are scaled down where the step -η u would exceed
        Σ ⟨ηu, F ηu⟩ = c, the sum over all layers and F the damped blocks; momentum adds to that.
        On scikit-learn's digits a network reaches its target in 90 steps at η = 0.02, in 105 with
        5e-3; at 0.1 it takes 168, and half of the runs without a bound do not get there in 300.
      fallback: transformation for leaves that no layer covers, such as `optax.scale_by_adam()`. It
        sees the tree of these leaves in float32 at least. None refuses them.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many layers of every shape, keeps what belongs to them, and alone computes
        their directions.
      factor_sharding: the old name of `sharding`.
      momentum: decay of the heavy ball, a number; `kfac` says why a layer's may start anew.
      weight_decay: decoupled, added to the direction, times the parameters, before the momentum.
        Other than the Python number 0, `update` needs `params`.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each layer's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `curvature=`, as `scale_by_ekfac`.
      With a NaN or an infinity in a gradient or statistic no leaf moves.

    Raises:
      ValueError: as `scale_by_ekfac`, and for a learning rate that is none.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.ekfac(0.1, optax_curv.Layers([layer]), invert_every=10)
      >>> state = tx.init({"w": jnp.zeros((2, 1))})

    References:
      George et al. 2018, arXiv:1806.03884, §3 and Algorithm 1. O'Donoghue and Candès 2015,
      arXiv:1204.3982, §3.2, for the restart of the momentum.
    """
    rule = _EKFAC(
        method="ekfac",
        layers=layers,
        damping=damping,
        decay=decay,
        update_every=update_every,
        statistic_bound=statistic_bound,
        invert_every=invert_every,
        kl_clip=kl_clip,
        step_rate=learning_rate,
        fallback=fallback_of(fallback),
        owners=owners_of("ekfac", sharding, factor_sharding),
    )
    rule.check_options()
    return heavy_ball(rule, learning_rate, momentum, weight_decay, gradient_bound)
