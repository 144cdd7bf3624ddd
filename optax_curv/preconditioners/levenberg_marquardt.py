"""Levenberg-Marquardt over rows: Gauss-Newton steps whose damping follows what they bring."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._branches.parameter_space import (
    are_rows,
    count_of_rows,
    geometry,
    judged,
    refuse_split_gradients,
)
from optax_curv.preconditioners._branches.rows import are_sound_weights
from optax_curv.preconditioners._branches.solve import cheaper, dense_solver
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.numbers import require_numbers
from optax_curv.preconditioners._transformation.objectives import require_whole
from optax_curv.preconditioners._transformation.placement import PlacedRule
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.preconditioners._transformation.trees import require_params, wide_zeros
from optax_curv.typing import Number, Sharding, Tree

FIRST_DAMPING = 1e-3  # of the trace of the metric
# Falling fast and rising slowly, the damping stays near the least that still lowers the loss, which
# is slower at first and faster in the end than what lowers the loss most in every step.
RAISED, LOWERED = 3.0, 10.0
GOOD_RATIO, POOR_RATIO = 0.1, 0.01
LEAST = 1e-3  # of the damping's unit, eps times the trace: below, it no longer changes the metric


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`.

    Attributes:
      count: steps taken, int32 [].
      damping: λ of the next step, float [], in the widest dtype of the parameters; 0 before the
        first step where it is to be chosen.
      reduction_ratio: decrease of the loss by the last step over that which the rows foretold.
      tries: dampings that the last step tried, int32 [].
      refused: steps of which every trial was refused, int32 [].
      previous: the last step, a tree like the parameters, or None without momentum.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    damping: jax.Array
    reduction_ratio: jax.Array
    tries: jax.Array
    refused: jax.Array
    previous: Tree
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, Any]:
        """Returns no factors, as the state keeps none."""
        return {}


class _Trial(NamedTuple):
    """A direction at one batch, what it was made with and what it brings."""

    direction: Any
    damping: jax.Array
    ratio: jax.Array
    accepted: jax.Array
    tries: jax.Array


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _LevenbergMarquardt(PlacedRule):
    """The steps of `levenberg_marquardt`, which documents the options."""

    complex_leaves = True  # pyright: ignore[reportAssignmentType]

    method: str
    damping: Number | None
    max_tries: Number
    max_norm: Number | None
    momentum: Number | None

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_numbers(self.method, damping=self.damping, above=0, or_none=True)
        require_numbers(self.method, max_tries=self.max_tries, at_least=1)
        require_numbers(self.method, max_norm=self.max_norm, above=0, or_none=True)
        require_numbers(self.method, momentum=self.momentum, at_least=0, or_none=True)

    def init(self, view, params):
        """The first damping, and no step yet."""
        del view
        dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
        wide = jnp.finfo(jnp.result_type(jnp.float32, *dtypes)).dtype
        return LevenbergMarquardtState(
            **counters(),
            damping=jnp.asarray(0 if self.damping is None else self.damping, wide),
            reduction_ratio=jnp.ones([], wide),
            tries=jnp.zeros([], jnp.int32),
            refused=jnp.zeros([], jnp.int32),
            previous=None if self.momentum is None else wide_zeros(params),
        )

    def require_gradients(self, updates, params):
        """Refuses gradients that do not fit the parameters, in other words where they are split."""
        refuse_split_gradients(self.method, updates)
        super().require_gradients(updates, params)

    def check(self, updates, params, extra_args):
        """Refuses rows, a value or a loss that are missing or do not fit."""
        require_params(self.method, params)
        require_whole(self.method, params)
        branches, value_fn = extra_args.get("branches"), extra_args.get("value_fn")
        if branches is None or not are_rows(branches, updates, None):
            raise ValueError(
                f"{self.method}: expected the extra argument branches= with rows in parameter "
                f"space, a tree like the parameters with a leading axis K, got "
                f"{jax.tree.map(jnp.shape, branches)}; optax_curv.residual_rows makes them."
            )
        if extra_args.get("value") is None or not callable(value_fn):
            raise ValueError(
                f"{self.method}: expected the extra arguments value=, the loss at the parameters, "
                f"and value_fn=, a function of the parameters that returns it, got "
                f"value={extra_args.get('value')!r} and {value_fn=!r}."
            )
        count = count_of_rows(self.method, branches, updates)
        return extra_args["value"], judged(self.method, branches, extra_args.get("weights"), count)

    def update(
        self,
        view,
        grads,
        state,
        params,
        sound,
        *,
        branches: Any = None,
        value: Any = None,
        value_fn: Any = None,
        weights: Any = None,
        **extra_args,
    ):
        """The best of the trials at this batch, or none; and the next damping."""
        del view, extra_args
        gradient, metric = geometry(grads, branches, weights, False, None, self.owners)
        size = optax.tree.size(gradient)
        solve, trace = dense_solver(metric, cheaper(metric.rows.count, size))
        wide = state.damping.dtype
        unit = trace.astype(wide) * jnp.finfo(wide).eps
        first = jnp.where(state.damping > 0, state.damping, FIRST_DAMPING * trace.astype(wide))
        value, start = jnp.asarray(value, wide), None
        if self.momentum is not None:
            start = jax.tree.map(lambda d: self.momentum * d, state.previous)

        def attempt(trial):
            lam = jnp.where(trial.tries == 0, first, RAISED * trial.damping)
            direction, predicted = self._direction(solve, metric, gradient, start, lam)
            moved = jax.tree.map(lambda p, d: p - d.astype(p.dtype), params, direction)
            decrease = value - jnp.asarray(value_fn(moved), wide)
            ratio = decrease / predicted.astype(wide)
            return _Trial(direction, lam, ratio, decrease > 0, trial.tries + 1)

        def refused(trial):
            return sound & ~trial.accepted & (trial.tries < self.max_tries)

        zero = optax.tree.zeros_like(gradient)
        # Made of the data, so that within a shard_map they vary as the data do.
        none = _Trial(zero, first, jnp.zeros_like(first), first < 0, jnp.int32(0))
        trial = jax.lax.while_loop(refused, attempt, none)
        poor = ~trial.accepted | (trial.ratio < POOR_RATIO)
        # After a step that needed several trials the least damping is known, and trying a lower one
        # at once would mostly cost these factorisations again.
        good = (trial.ratio > GOOD_RATIO) & (trial.tries == 1)
        factor = jnp.where(poor, RAISED, jnp.where(good, 1 / LOWERED, 1))
        step = jax.tree.map(lambda d: jnp.where(trial.accepted, d, 0), trial.direction)
        refusals = optax.safe_increment(state.refused)
        state = state._replace(
            damping=jnp.maximum(factor * trial.damping, LEAST * unit),
            reduction_ratio=jnp.where(trial.accepted, trial.ratio, 0),
            tries=trial.tries,
            refused=jnp.where(trial.accepted, state.refused, refusals),
        )
        if self.momentum is not None:
            state = state._replace(previous=step)
        step = jax.tree.map(jnp.negative, step)
        made = Step(step, state, jnp.isfinite(value) & are_sound_weights(weights))
        return self.kept(made, grads)

    def _direction(self, solve, metric, gradient, start, damping):
        """The direction, of a bounded norm, and the decrease ⟨g, d⟩ - ½⟨d, F d⟩ it foretells."""
        if start is None:
            direction = solve(gradient, damping)
        else:
            rest = solve(optax.tree.sub(gradient, metric.product(start)), damping)
            direction = optax.tree.add(start, rest)
        if self.max_norm is not None:
            longest = jnp.asarray(self.max_norm, damping.dtype)
            scale = jnp.minimum(1, longest / optax.tree.norm(direction))
            direction = jax.tree.map(lambda d: scale.astype(d.dtype) * d, direction)
        bent = metric.apply(direction)
        predicted = jnp.real(optax.tree.vdot(gradient, direction)) - 0.5 * jnp.vdot(bent, bent).real
        return direction, predicted


def levenberg_marquardt(
    damping: Number | None = None,
    *,
    max_tries: Number = 10,
    max_norm: Number | None = None,
    momentum: Number | None = None,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Least squares by Gauss-Newton steps, with nothing to tune: Levenberg and Marquardt's method.

    With rows J [K, n] of the residuals, F = JᵀJ / K and g the gradient, a step is

    .. math::
      \theta \leftarrow \theta - d, \qquad d = (F + \lambda I)^{-1} g,

    and is taken where it lowers the loss. If not, λ is tripled and d solved for again, from the
    same rows and the same matrix F, up to `max_tries` times; after that the step is refused. ρ is
    the decrease of the loss over ⟨g, d⟩ - ½⟨d, F d⟩, which the rows foretell. The next step divides
    λ by ten where ρ > 0.1 and the first trial was taken, triples it where ρ < 0.01, and begins with
    it otherwise. So λ stays near the least that still lowers the loss, at two trials a step.

    `update` takes the extra arguments

    * `branches`: rows in parameter space, a tree [K, \*leaf.shape], such as those of
      `residual_rows` or `lazy_rows`;
    * `value`: the loss at the parameters;
    * `value_fn`: params ↦ loss, *on the same points*, as Optax's line searches take it;
    * `weights`: [K], not negative, of the rows in the metric; gradient and loss have to be weighted
      likewise.

    Rows and loss need not be those of least squares: for another loss d is a damped natural
    gradient.

    Args:
      damping: λ of the first step, > 0; None: 1e-3 of the trace of F.
      max_tries: most dampings tried in one step, each of which costs a factorisation and a loss.
      max_norm: longest step in the Euclidean norm; None: no bound.
      momentum: SPRING's decay μ, for fresh points at every step: with the last step d₋ the
        direction is d = (F + λI)⁻¹ (g - μ F d₋) + μ d₋. None: none, for points that stay.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. What is kept
        like the parameters is sharded as they are. Rows in parameter space may lie on all
        devices by examples; the K × K matrix is made of them without gathering them.

    Returns:
      A `GradientTransformationExtraArgs` with state `LevenbergMarquardtState`, whose updates are
      the whole step. With a NaN or an infinity in gradients, rows, weights or the value no
      parameter moves, and the state keeps its last value but for `total_notfinite`.

    Raises:
      ValueError: for a number out of range; in `update`, where rows, value or `value_fn` are
        missing, or shapes or dtypes do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> residual = lambda p, t: p["a"] * jnp.exp(-p["b"] * t) - 2 * jnp.exp(-0.5 * t)
      >>> t, params = jnp.linspace(0.0, 4.0, 20), {"a": jnp.array(1.0), "b": jnp.array(1.0)}
      >>> rows_of = optax_curv.residual_rows(residual)
      >>> tx = optax_curv.levenberg_marquardt()
      >>> state = tx.init(params)
      >>> for _ in range(12):
      ...     value, grads, rows = rows_of(params, t)
      ...     given = {"branches": rows, "value": value, "value_fn": lambda p: rows_of(p, t)[0]}
      ...     updates, state = tx.update(grads, state, params, **given)
      ...     params = optax.apply_updates(params, updates)
      >>> print({name: round(float(x), 3) for name, x in params.items()})
      {'a': 2.0, 'b': 0.5}

    References:
      Marquardt 1963, doi:10.1137/0111030. Transtrum and Sethna 2012, arXiv:1201.5885, §3, for a
      damping that falls fast and rises slowly. Goldshlager, Abrahamsen and Lin 2024,
      arXiv:2401.10190, for `momentum`.
    """
    rule = _LevenbergMarquardt(
        method="levenberg_marquardt",
        owners=owners_of("levenberg_marquardt", sharding),
        damping=damping,
        max_tries=max_tries,
        max_norm=max_norm,
        momentum=momentum,
    )
    rule.check_options()
    return transformation(rule)
