"""Step size, momentum and damping from the local quadratic model of an objective: K-FAC's adaptive mode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._stacks.owners import with_sharding_types
from optax_curv.preconditioners._transformation import contracts

# Martens and Grosse 2015, §6.5: the reduction ratios below which damping grows and above which it
# falls.
POOR_RATIO, GOOD_RATIO = 0.25, 0.75


class ScaleByQuadraticModelState(NamedTuple):
    """State of `scale_by_quadratic_model`.

    Attributes:
      count: steps taken, int32 [].
      previous: the previous update, a tree like the parameters.
      coefficients: step size and momentum of the last step, float32 [2].
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    previous: optax.Updates
    coefficients: jax.Array
    total_notfinite: jax.Array


class AdaptDampingState(NamedTuple):
    """State of `adapt_damping`.

    Attributes:
      count: steps taken, int32 [].
      damping: the damping of the next step, float32 [].
      reduction_ratio: actual over predicted change of the objective when damping was last judged,
        float32 []; 1 before.
      inner: state of the damped transformation.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    damping: jax.Array
    reduction_ratio: jax.Array
    inner: optax.OptState
    total_notfinite: jax.Array


def require_objective(method, objective, batch):
    """Refuses an objective that hides its curvature, and a batch that is none."""
    if not hasattr(objective, "quadratic_model"):
        raise ValueError(
            f"{method}: expected the extra argument objective= to be an optax_curv.Objective, got {objective!r}. A "
            "plain loss hides its curvature: make optax_curv.Objective(predict_fn, likelihood) and call update(..., "
            "objective=objective, batch=(inputs, targets), value=value)."
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        given = None if batch is None else f"a {type(batch).__name__}"
        raise ValueError(
            f"{method}: expected the extra argument batch=(inputs, targets), got {given}."
        )


def refuse_weight_decay(method, weight_decay):
    """Refuses a decay where no learning rate is chosen: the quadratic model would not know of it."""
    if isinstance(weight_decay, int | float) and weight_decay:
        raise ValueError(
            f"{method}: expected no weight decay with learning_rate=None, got {weight_decay=!r}; put it into "
            "the objective, optax_curv.Objective(..., regularizer=...), where the quadratic model sees it."
        )


def _minimizer(slopes, curvature):
    """The minimiser of −cᵀ slopes + ½ cᵀ curvature c over c [2], without a direction that adds nothing to the first."""

    def quotient(x, y, floor):
        return jnp.where(y > floor, x / jnp.where(y > floor, y, 1), 0)

    (first, mixed), (_, second) = curvature
    along = quotient(mixed, first, 0)
    # What the second direction adds to the first; where that is only rounding, it is left out.
    rest = second - along * mixed
    momentum = quotient(
        slopes[1] - along * slopes[0], rest, 100 * jnp.finfo(rest.dtype).eps * second
    )
    return jnp.stack([quotient(slopes[0], first, 0) - along * momentum, momentum])


def scale_by_quadratic_model(damping=1e-3) -> optax.GradientTransformationExtraArgs:
    """Step size and momentum that minimise the damped quadratic model of the objective on the batch.

    With p the incoming direction and v the previous update, the update is α p + μ v for the (α, μ)
    that minimise

      L(θ − α p − μ v) ≈ L − ⟨∇L, α p + μ v⟩ + ½ ⟨α p + μ v, (C + λ I)(α p + μ v)⟩,

    with C the Gauss-Newton matrix of the batch (plus the regularizer's Hessian) and λ the damping,
    at the cost of a forward pass and two Jacobian products. It replaces learning rate and momentum:
    follow it with ``optax.scale_by_learning_rate(1.0)``. A first step, or a v parallel to p, has μ
    = 0.

    Args:
      damping: λ ≥ 0, a number or a schedule.

    Returns:
      A transformation whose ``update(updates, state, params, *, objective, batch)`` takes an
      `optax_curv.Objective`, ``batch=(inputs, targets)``, and a mask or weights as ``weights=``. If
      updates, slopes or curvature are not finite the update is zero and the state kept.

    Raises:
      ValueError: for a negative damping, missing parameters, and an `objective` or `batch` that is
        missing or none.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: x * w, "normal")
      >>> batch, w = (jnp.array([[2.0]]), jnp.array([[6.0]])), jnp.float32(1.0)
      >>> tx = optax.chain(optax_curv.scale_by_quadratic_model(damping=0.0), optax.scale_by_learning_rate(1.0))
      >>> grads = jax.grad(objective)(w, *batch)
      >>> updates, _ = tx.update(grads, tx.init(w), w, objective=objective, batch=batch)
      >>> float(w + updates)  # the minimum, whatever the length of the direction
      3.0

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §6.4 and §7. There slopes take the gradient; here
      the Jacobian products at hand, so that nothing but the direction has to be passed on.
    """
    method = "scale_by_quadratic_model"
    contracts.require_numbers(method, damping=damping, at_least=0)

    def init(params):
        contracts.require_float_leaves(method, params)
        return ScaleByQuadraticModelState(
            jnp.int32(0), optax.tree.zeros_like(params), jnp.zeros(2, jnp.float32), jnp.int32(0)
        )

    def update(
        updates,
        state,
        params=None,
        *,
        objective: Any = None,
        batch: Any = None,
        weights=None,
        **extra_args,
    ):
        del extra_args
        contracts.require_params(method, params)
        contracts.require_same_leaves(method, "updates", updates, "params", params)
        require_objective(method, objective, batch)
        directions = [
            jax.tree.map(lambda u, p: u.astype(p.dtype), direction, params)
            for direction in (updates, state.previous)
        ]
        slopes, curvature = objective.quadratic_model(params, *batch, directions, weights=weights)
        lam = contracts.value_at(damping, state.count, curvature.dtype)
        lengths = jnp.stack(
            [jnp.stack([optax.tree.vdot(a, b) for b in directions]) for a in directions]
        )
        step, momentum = _minimizer(slopes, curvature + lam * lengths)
        new_updates = jax.tree.map(
            lambda u, v: (step * u + momentum * v).astype(u.dtype), updates, state.previous
        )
        new_state = state._replace(
            count=state.count + 1,
            previous=jax.tree.map(lambda u, v: u.astype(v.dtype), new_updates, state.previous),
            coefficients=jnp.stack([step, momentum]).astype(jnp.float32),
        )
        good = contracts.is_finite(updates, slopes, curvature, new_updates)
        return contracts.skip_unless(good, new_updates, new_state, state)

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def _reduction_ratio(objective, batch, weights, params, step, value, damping):
    """Actual over predicted change of the objective, float32 [], and whether the step says anything, bool []."""
    delta = jax.tree.map(lambda u, p: u.astype(p.dtype), step, params)
    slopes, curvature = objective.quadratic_model(params, *batch, [delta], weights=weights)
    predicted = slopes[0] + 0.5 * (curvature[0, 0] + damping * optax.tree.norm(delta, squared=True))
    change = objective(optax.apply_updates(params, step), *batch, weights=weights) - value
    # A step that the model itself expects to climb is as poor as one into a loss that is not
    # finite.
    sound = (predicted < 0) & jnp.isfinite(change)
    ratio = jnp.where(sound, change / jnp.where(sound, predicted, 1), 0)
    return ratio.astype(jnp.float32), predicted != 0


def adapt_damping(
    damped: Callable[[jax.Array], optax.GradientTransformation],
    damping=1.0,
    *,
    adapt_every=5,
    factor=19 / 20,
    min_damping=1e-6,
    max_damping=1e4,
) -> optax.GradientTransformationExtraArgs:
    """Levenberg-Marquardt damping: it follows how well the quadratic model foretells the change of the objective.

    Every k = `adapt_every` steps, with δ the update that is about to be added to the parameters θ,

      ρ = (L(θ + δ) − L(θ)) / (⟨∇L, δ⟩ + ½ ⟨δ, (C + λ I) δ⟩),
      λ ← λ · factorᵏ where ρ > 3/4,  λ ← λ / factorᵏ where ρ < 1/4,

    on the step's own batch, C being the Gauss-Newton matrix (plus the regularizer's Hessian). A
    loss that is not finite, or a positive denominator, counts as ρ = 0. These steps (under
    `jax.vmap` all) cost two forward passes and one Jacobian product more.

    Args:
      damped: a function of the damping, an array, that returns a transformation, as
        `optax.inject_hyperparams` takes one, whose updates are the ones to be added to the
        parameters.
      damping: λ of the first step, a number, array or tracer > 0. 1.0 is safely large for a loss of
        order one.
      adapt_every: k, steps between changes; 5 in the paper.
      factor: the change of a single step, in (0, 1); 19/20 in the paper.
      min_damping: smallest λ; below 1e-6 float32 factors of order one no longer notice it.
      max_damping: largest λ; above 1e4 updates are as small as float32 rounding.

    Returns:
      A transformation whose ``update(updates, state, params, *, objective, batch, value)`` takes an
      `Objective`, ``batch=(inputs, targets)`` (and ``weights=`` if there are any) and ``value``,
      the loss already computed on it, and hands them on. If updates or value are not finite, the
      update is zero and the state kept.

    Raises:
      ValueError: for numbers out of range, missing parameters, and an `objective`, `batch` or
        `value` that is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: x @ w, "categorical")
      >>> tx = optax_curv.adapt_damping(
      ...     lambda damping: optax.chain(optax_curv.scale_by_quadratic_model(damping), optax.scale(-1.0)), damping=1.0)
      >>> w, batch = jnp.zeros((2, 2)), (jnp.eye(2), jnp.array([0, 1]))
      >>> state = tx.init(w)
      >>> for _ in range(5):
      ...     value, grads = jax.value_and_grad(objective)(w, *batch)
      ...     updates, state = tx.update(grads, state, w, objective=objective, batch=batch, value=value)
      ...     w = optax.apply_updates(w, updates)
      >>> round(float(state.damping), 3)  # the model was right: 0.95⁵
      0.774

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §6.5.
    """
    method = "adapt_damping"
    contracts.require_numbers(method, damping=damping, max_damping=max_damping, above=0)
    contracts.require_numbers(method, adapt_every=adapt_every, at_least=1)
    contracts.require_numbers(method, factor=factor, above=0, at_most=1)
    contracts.require_numbers(method, min_damping=min_damping, at_least=0)

    def init(params):
        lam = jnp.array(damping, jnp.float32)
        return AdaptDampingState(
            jnp.int32(0), lam, jnp.ones((), jnp.float32), damped(lam).init(params), jnp.int32(0)
        )

    def update(
        updates,
        state,
        params=None,
        *,
        objective: Any = None,
        batch: Any = None,
        value=None,
        weights=None,
        **extra_args,
    ):
        contracts.require_params(method, params)
        require_objective(method, objective, batch)
        if value is None:
            raise ValueError(
                f"{method}: the extra argument value= is missing; pass the loss already computed on the batch, the "
                "first result of optax_curv.value_grad_and_curvature or jax.value_and_grad."
            )
        given = {
            "objective": objective,
            "batch": batch,
            "value": value,
            "weights": weights,
            **extra_args,
        }
        inner = optax.with_extra_args_support(damped(state.damping))
        step, inner_state = inner.update(updates, state.inner, params, **given)

        def judged():
            ratio, moved = _reduction_ratio(
                objective, batch, weights, params, step, value, state.damping
            )
            change = jnp.power(factor, adapt_every)
            new_damping = jnp.select(
                [~moved, ratio > GOOD_RATIO, ratio < POOR_RATIO],
                [state.damping, state.damping * change, state.damping / change],
                state.damping,
            )
            return jnp.clip(new_damping, min_damping, max_damping).astype(jnp.float32), ratio

        due = state.count % adapt_every == adapt_every - 1
        new_damping, ratio = jax.lax.cond(
            due, judged, lambda: (state.damping, state.reduction_ratio)
        )
        new_state = AdaptDampingState(
            state.count + 1, new_damping, ratio, inner_state, state.total_notfinite
        )
        return contracts.skip_unless(contracts.is_finite(updates, value), step, new_state, state)

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))
