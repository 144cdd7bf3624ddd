"""Step size, momentum and damping from the local quadratic model of an objective.

They are the adaptive mode of K-FAC and of Hessian-free optimisation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._transformation.numbers import require_numbers, value_at
from optax_curv.preconditioners._transformation.objectives import (
    refuse_weight_decay as refuse_weight_decay,
)
from optax_curv.preconditioners._transformation.objectives import require_batch, require_objective
from optax_curv.preconditioners._transformation.soundness import is_finite
from optax_curv.preconditioners._transformation.transformation import (
    Rule,
    Step,
    counters,
    transformation,
)
from optax_curv.preconditioners._transformation.trees import require_params, wide_zeros, widened
from optax_curv.typing import Number, Schedulable, Tree

# Martens and Grosse 2015, §6.5: the reduction ratios below which damping grows and above which it
# falls.
POOR_RATIO, GOOD_RATIO = 0.25, 0.75
# Two programs that evaluate one loss differ by a few roundings, which are no rise.
ROUNDINGS = 8


class ScaleByQuadraticModelState(NamedTuple):
    """State of `scale_by_quadratic_model`.

    Attributes:
      count: steps taken, int32 [].
      previous: the previous update, a tree like the parameters, float32 at least.
      coefficients: step size and momentum of the last step, float32 [2].
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    previous: Tree
    coefficients: jax.Array
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, Any]:
        """Returns no factors, as the state keeps none."""
        return {}


class AdaptDampingState(NamedTuple):
    """State of `adapt_damping`.

    Attributes:
      count: steps judged, whether taken or refused, int32 [].
      damping: the damping of the next step, float32 [].
      reduction_ratio: actual over predicted change of the objective when damping was last judged,
        float32 []; 1 before.
      refused: steps not taken because the loss would have risen or not been finite, int32 [].
      inner: state of the damped transformation.
      total_notfinite: steps skipped because of a NaN or an infinity in gradients or loss, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    damping: jax.Array
    reduction_ratio: jax.Array
    refused: jax.Array
    inner: optax.OptState
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, Any]:
        """Returns no factors, as only the state within keeps some."""
        return {}


def _minimizer(slopes, curvature):
    """Returns the minimiser of −cᵀ slopes + ½ cᵀ curvature c over c [2].

    A second direction that adds nothing to the first is left out.
    """

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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _QuadraticModel(Rule):
    """The step of `scale_by_quadratic_model`."""

    method: str
    damping: Schedulable

    def check(self, updates, params, extra_args):
        """Refuses an objective or a batch that is missing, and parameters that are."""
        require_params(self.method, params)
        require_objective(self.method, extra_args.get("objective"), extra_args.get("batch"), params)
        return ()

    def init(self, view, params):
        """No previous update, and coefficients of zero."""
        del view
        return ScaleByQuadraticModelState(
            **counters(), previous=wide_zeros(params), coefficients=jnp.zeros(2, jnp.float32)
        )

    def update(
        self,
        view,
        grads,
        state,
        params,
        sound,
        *,
        objective: Any = None,
        batch: Any = None,
        weights=None,
        **extra_args,
    ):
        """α p + μ v for the incoming direction p and the previous update v."""
        del view, sound, extra_args
        directions = [_like(direction, params) for direction in (grads, state.previous)]
        slopes, curvature = objective.quadratic_model(params, *batch, directions, weights=weights)
        lam = value_at(self.damping, state.count, curvature.dtype)
        lengths = jnp.stack(
            [jnp.stack([optax.tree.vdot(a, b) for b in directions]) for a in directions]
        )
        size, momentum = _minimizer(slopes, curvature + lam * lengths)
        new = jax.tree.map(
            lambda u, v: (size * u + momentum * v).astype(v.dtype), grads, state.previous
        )
        coefficients = jnp.stack([size, momentum]).astype(jnp.float32)
        state = state._replace(previous=new, coefficients=coefficients)
        return Step(new, state, is_finite(slopes, curvature))


def scale_by_quadratic_model(
    damping: Schedulable = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Step size and momentum that minimise the damped quadratic model of the objective.

    The model is that of the batch. With p the incoming direction and v the previous update, the
    update is α p + μ v for the (α, μ) that minimise

      L(θ − α p − μ v) ≈ L − ⟨∇L, α p + μ v⟩ + ½ ⟨α p + μ v, (C + λ I)(α p + μ v)⟩,

    with C the Gauss-Newton matrix of the batch (plus the regularizer's Hessian) and λ the damping,
    at the cost of a forward pass and two Jacobian products. It replaces learning rate and momentum:
    follow it with ``optax.scale_by_learning_rate(1.0)``. A first step, or a v parallel to p, has μ
    = 0.

    Args:
      damping: λ ≥ 0, a number or a schedule.

    Returns:
      A transformation with state `ScaleByQuadraticModelState`, whose ``update(updates, state,
      params, *, objective, batch)`` takes an `optax_curv.Objective`, ``batch=(inputs, targets)``,
      and a mask or weights as ``weights=``. If updates, slopes or curvature are not finite the
      update is zero and the state kept but for `total_notfinite`.

    Raises:
      ValueError: for a negative damping, missing or masked parameters, and an `objective` or
        `batch` that is missing or none.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: x * w, "normal")
      >>> batch, w = (jnp.array([[2.0]]), jnp.array([[6.0]])), jnp.float32(1.0)
      >>> model = optax_curv.scale_by_quadratic_model(damping=0.0)
      >>> tx = optax.chain(model, optax.scale_by_learning_rate(1.0))
      >>> grads = jax.grad(objective)(w, *batch)
      >>> updates, _ = tx.update(grads, tx.init(w), w, objective=objective, batch=batch)
      >>> float(w + updates)  # the minimum, whatever the length of the direction
      3.0

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §6.4 and §7. There slopes take the gradient; here
      the Jacobian products at hand, so that nothing but the direction has to be passed on.
    """
    rule = _QuadraticModel(method="scale_by_quadratic_model", damping=damping)
    require_numbers(rule.method, damping=damping, at_least=0, schedule=True)
    return transformation(rule)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _AdaptDamping(Rule):
    """The damping of `adapt_damping`, around the transformation that it damps."""

    guarded = ("inner",)  # it is kept here, as it has counters of its own
    complex_leaves = True  # what is damped decides

    method: str
    damped: Callable[[jax.Array], optax.GradientTransformation]
    damping: Number
    adapt_every: Number
    factor: Number
    min_damping: Number
    max_damping: Number

    def check_options(self):
        """Refuses numbers out of range, and what makes no transformation."""
        if not callable(self.damped):
            raise ValueError(
                f"{self.method}: expected damped to be a function of the damping that returns a "
                f"transformation, got damped={self.damped!r}."
            )
        require_numbers(self.method, damping=self.damping, max_damping=self.max_damping, above=0)
        require_numbers(self.method, adapt_every=self.adapt_every, at_least=1)
        require_numbers(self.method, factor=self.factor, above=0, at_most=1)
        require_numbers(self.method, min_damping=self.min_damping, at_least=0)

    def check(self, updates, params, extra_args):
        """Refuses an objective, batch or value that is missing."""
        require_params(self.method, params)
        require_objective(self.method, extra_args.get("objective"), extra_args.get("batch"), params)
        if extra_args.get("judge_batch") is not None:
            require_batch(self.method, "judge_batch", extra_args["judge_batch"])
        if extra_args.get("value") is None:
            raise ValueError(
                f"{self.method}: the extra argument value= is missing; pass the loss already "
                "computed on the batch, the first result of optax_curv.value_grad_and_curvature or "
                "jax.value_and_grad."
            )
        return ()

    def init(self, view, params):
        """The first damping, and the state of what it damps."""
        del view
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
        shown = wide_zeros(params) if abstract else widened(params)
        lam = jnp.array(self.damping, jnp.float32)
        return AdaptDampingState(
            **counters(),
            damping=lam,
            reduction_ratio=jnp.ones((), jnp.float32),
            refused=jnp.zeros([], jnp.int32),
            inner=self.damped(lam).init(shown),
        )

    def update(
        self,
        view,
        grads,
        state,
        params,
        sound,
        *,
        value: Any = None,
        judge_batch=None,
        **extra_args,
    ):
        """The step of what is damped, or none where the loss would rise; and the next damping."""
        del view
        inner = optax.with_extra_args_support(self.damped(state.damping))
        step, new = inner.update(grads, state.inner, params, value=value, **extra_args)
        objective, weights = extra_args["objective"], extra_args.get("weights")
        batch, before = extra_args["batch"], value
        if judge_batch is not None:
            batch, weights, before = judge_batch, None, objective(params, *judge_batch)
        sound &= is_finite(step, before)
        change = objective(optax.apply_updates(params, step), *batch, weights=weights) - before
        rounding = ROUNDINGS * jnp.finfo(change.dtype).eps * jnp.abs(before)
        refused = ~(change <= rounding)  # a NaN is refused, too
        period = jnp.asarray(self.adapt_every, jnp.int32)
        change_of_damping = jnp.power(self.factor, period)
        grown = (state.damping / change_of_damping).astype(jnp.float32)

        def judged():
            ratio, moved = _reduction_ratio(
                objective, batch, weights, params, step, change, state.damping
            )
            fallen = (state.damping * change_of_damping).astype(jnp.float32)
            cases = [~moved, ratio > GOOD_RATIO, ratio < POOR_RATIO]
            return jnp.select(cases, [state.damping, fallen, grown], state.damping), ratio

        due = state.count % period == period - 1
        damping, ratio = jax.lax.cond(due, judged, lambda: (state.damping, state.reduction_ratio))
        damping = jnp.where(refused, grown, damping)
        state = state._replace(
            damping=jnp.clip(damping, self.min_damping, self.max_damping).astype(jnp.float32),
            reduction_ratio=ratio,
            refused=jnp.where(refused, optax.safe_increment(state.refused), state.refused),
            inner=_kept_inner(sound, _with_momentum_restarted(refused, new), state.inner),
        )
        step = jax.tree.map(lambda u: jnp.where(refused, jnp.zeros_like(u), u), step)
        return Step(step, state, sound)


def adapt_damping(
    damped: Callable[[jax.Array], optax.GradientTransformation],
    damping: Number = 1.0,
    *,
    adapt_every: Number = 5,
    factor: Number = 19 / 20,
    min_damping: Number = 1e-6,
    max_damping: Number = 1e4,
) -> optax.GradientTransformationExtraArgs:
    """Levenberg-Marquardt damping, which refuses a step that would raise the loss.

    The damping follows how well the quadratic model foretells the change of the objective. With δ
    the update that is about to be added to the parameters θ, every k = `adapt_every` steps

      ρ = (L(θ + δ) − L(θ)) / (⟨∇L, δ⟩ + ½ ⟨δ, (C + λ I) δ⟩),
      λ ← λ · factorᵏ where ρ > 3/4,  λ ← λ / factorᵏ where ρ < 1/4,

    on the step's own batch, C being the Gauss-Newton matrix (plus the regularizer's Hessian). A
    loss that is not finite, or a positive denominator, counts as ρ = 0.

    At every step L(θ + δ) is evaluated. Where it is not finite, or above L(θ) by more than
    rounding, the step is not taken: the update is zero, λ ← λ / factorᵏ, a
    `scale_by_quadratic_model` within `damped` forgets its momentum, and `refused` in the state
    counts it. A batch that a step was fitted to flatters it; `judge_batch` judges on another one.

    A step costs one forward pass more, and every k-th step (under `jax.vmap` each) another one and
    a Jacobian product.

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
      the loss already computed on it, and hands them on. With ``judge_batch=(inputs, targets)``
      the ratio, and whether a step is taken, are judged on that batch, which costs a forward pass
      more. If gradients or value are not finite, the update is zero and the state kept but for
      `total_notfinite`.

    Raises:
      ValueError: for numbers out of range, missing or masked parameters, and an `objective`,
        `batch` or `value` that is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: x @ w, "categorical")
      >>> def damped(damping):
      ...     model = optax_curv.scale_by_quadratic_model(damping)
      ...     return optax.chain(model, optax.scale(-1.0))
      >>> tx = optax_curv.adapt_damping(damped, damping=1.0)
      >>> w, batch = jnp.zeros((2, 2)), (jnp.eye(2), jnp.array([0, 1]))
      >>> state = tx.init(w)
      >>> for _ in range(5):
      ...     value, grads = jax.value_and_grad(objective)(w, *batch)
      ...     given = {"objective": objective, "batch": batch, "value": value}
      ...     updates, state = tx.update(grads, state, w, **given)
      ...     w = optax.apply_updates(w, updates)
      >>> round(float(state.damping), 3)  # the model was right: 0.95⁵
      0.774

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §6.5, where no step is refused. Moré 1978,
      doi:10.1007/BFb0067700, refuses those with ρ < 0.
    """
    rule = _AdaptDamping(
        method="adapt_damping",
        damped=damped,
        damping=damping,
        adapt_every=adapt_every,
        factor=factor,
        min_damping=min_damping,
        max_damping=max_damping,
    )
    rule.check_options()
    return transformation(rule)


def _like(tree: Any, params: Any) -> Any:
    """The leaves of a direction in the dtypes of the parameters."""
    return jax.tree.map(lambda u, p: u.astype(p.dtype), tree, params)


def _reduction_ratio(objective, batch, weights, params, step, change, damping):
    """Actual over predicted change of the objective, float32 [], and whether it says anything."""
    delta = _like(step, params)
    slopes, curvature = objective.quadratic_model(params, *batch, [delta], weights=weights)
    predicted = slopes[0] + 0.5 * (curvature[0, 0] + damping * optax.tree.norm(delta, squared=True))
    # A step that the model itself expects to climb is as poor as one into a loss that is not
    # finite.
    sound = (predicted < 0) & jnp.isfinite(change)
    ratio = jnp.where(sound, change / jnp.where(sound, predicted, 1), 0)
    return ratio.astype(jnp.float32), predicted != 0


def _kept_inner(sound: jax.Array, new: Any, old: Any) -> Any:
    """The inner state after a step; after an unsound one the old state, whose counters go on."""

    def kept(path, x, y):
        counts = getattr(path[-1], "name", "") == "total_notfinite" if path else False
        return jnp.where(sound, x, optax.safe_increment(y) if counts else y).astype(y.dtype)

    return jax.tree.map_with_path(kept, new, old)


def _with_momentum_restarted(refused: jax.Array, inner: Any) -> Any:
    """The inner state in which the quadratic model has forgotten an update that was refused."""

    def is_model(x):
        return isinstance(x, ScaleByQuadraticModelState)

    def restarted(x):
        if not is_model(x):
            return x
        previous = jax.tree.map(lambda v: jnp.where(refused, jnp.zeros_like(v), v), x.previous)
        return x._replace(previous=previous)

    return jax.tree.map(restarted, inner, is_leaf=is_model)
