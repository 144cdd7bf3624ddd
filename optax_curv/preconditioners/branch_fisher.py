"""Branch Fisher: samples of a state, or of the parameters themselves, as a metric."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv import linalg
from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._compiler import full_matmul
from optax_curv.preconditioners._branches.metric import Metric, StoredRows
from optax_curv.preconditioners._branches.parameter_space import (
    are_rows,
    count_of_rows,
    geometry,
    judged,
    refuse_split_gradients,
)
from optax_curv.preconditioners._branches.rows import are_sound_weights
from optax_curv.preconditioners._branches.solve import cheaper, solve_metric
from optax_curv.preconditioners._branches.state_space import StateBranches, descent
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.numbers import (
    require_choice,
    require_numbers,
    value_at,
)
from optax_curv.preconditioners._transformation.transformation import counters, transformation
from optax_curv.preconditioners._transformation.trees import wide_zeros
from optax_curv.typing import (
    COMPLEX_METRICS,
    SOLVERS,
    ComplexMetric,
    Key,
    Number,
    ProjectionKind,
    Schedulable,
    Sharding,
    Solver,
    Tree,
)

CG_FLOOR = 1e-12  # the original's guard of both quotients of conjugate gradients
# Up to this D the covariance is formed for conjugate gradients too, as the original does: far from
# convergence only the same product rounds alike.
FORMED_UP_TO = 128


class ScaleByBranchFisherState(NamedTuple):
    """State of `scale_by_branch_fisher`.

    Attributes:
      count: steps taken, int32 [].
      key: data of the PRNG key of the next drawn projection, uint32.
      precond_norm: Euclidean norm of the last direction, float32 [].
      previous: the last direction, a tree like the parameters (float32 at least), or None without
        momentum.
      unconverged: steps in which `solver="auto"` iterated and did not reach its tolerance, int32
        [].
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    precond_norm: jax.Array
    previous: Tree
    unconverged: jax.Array
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, Any]:
        """Returns no factors, as the state keeps none."""
        return {}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _BranchFisher(StateBranches):
    """Branch Fisher's mathematics; `scale_by_branch_fisher` documents the options."""

    solver: Solver
    max_iters: Number
    tol: Number
    momentum: Number | None
    complex_metric: ComplexMetric | None

    @property
    def complex_leaves(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether complex parameters are taken."""
        return self.complex_metric != "real"

    def check_options(self):
        """Refuses options that cannot be, by name."""
        super().check_options()
        require_choice(self.method, SOLVERS, solver=self.solver)
        require_choice(self.method, (None, *COMPLEX_METRICS), complex_metric=self.complex_metric)
        require_numbers(self.method, max_iters=self.max_iters, tol=self.tol, at_least=0)
        require_numbers(self.method, momentum=self.momentum, at_least=0, or_none=True)

    def init(self, view, params):
        """The first key, and no direction yet."""
        del view
        previous = None if self.momentum is None else wide_zeros(params)
        unconverged = jnp.zeros([], jnp.int32)
        return ScaleByBranchFisherState(
            **counters(), **self.numbers(), previous=previous, unconverged=unconverged
        )

    def require_gradients(self, updates, params):
        """Refuses gradients that do not fit the parameters, in other words where they are split."""
        refuse_split_gradients(self.method, updates)
        super().require_gradients(updates, params)

    def check(self, updates, params, extra_args):
        """Refuses samples that are missing or do not fit; all of them must be sound."""
        del params
        branches, projection = self.given(extra_args), extra_args.get("projection")
        if not are_rows(branches, updates, projection):
            if self.momentum is not None and branches is not None and jnp.ndim(branches) == 2:
                raise ValueError(
                    f"{self.method}: momentum={self.momentum!r} needs branches in parameter space, "
                    "got an array [K, D] of samples of a state."
                )
            return self.state_statistics(updates, extra_args)
        if projection is not None:
            raise ValueError(
                f"{self.method}: branches in parameter space take no projection; give one or the "
                "other."
            )
        count = count_of_rows(self.method, branches, updates)
        _require_metric(self.method, self.complex_metric, updates)
        return judged(self.method, branches, extra_args.get("weights"), count)

    def update(
        self,
        view,
        grads,
        state,
        params,
        sound,
        *,
        branches=None,
        projection=None,
        weights=None,
        **extra_args,
    ):
        """One step, in the space that the branches are in."""
        if are_rows(branches, grads, projection):
            return self._parameter_step(grads, state, branches, weights)
        given = {"branches": branches, "projection": projection, "weights": weights}
        return super().update(view, grads, state, params, sound, **given, **extra_args)

    def step(self, state, direction, sound=True, converged=True):
        """The step along a direction, whose norm the state notes, and what did not converge."""
        failed = optax.safe_increment(state.unconverged)
        state = state._replace(unconverged=jnp.where(converged, state.unconverged, failed))
        return super().step(state, direction, sound)

    def solve(self, rows, b, damping):
        """Solves (BᵀB + λI) x = b for rows B [K, D]; "cg" is the original's, guarded."""
        limits = {"max_iters": self.max_iters, "tol": self.tol}
        if self.solver != "cg":
            metric = Metric(StoredRows([rows], [b], jax.tree.structure(b)))
            return solve_metric(metric, b, damping, solver=self.solver, **limits)
        covariance = full_matmul(rows.T, rows) if len(b) <= FORMED_UP_TO else None

        def matvec(v):
            if covariance is not None:
                return full_matmul(covariance, v) + damping * v
            return full_matmul(rows.T, full_matmul(rows, v)) + damping * v

        x, _ = linalg.conjugate_gradient(
            matvec, b, max_iters=self.max_iters, atol=self.tol, floor=CG_FLOOR
        )
        return x, True

    def root(self, rows):
        """All of the covariance is kept."""
        return rows

    def _parameter_step(self, grads, state, branches, weights):
        """Steps along M⁻¹ (g - μ BᵀB d₋) + μ d₋ for rows of the parameters themselves."""
        gradient, metric = geometry(grads, branches, weights, self.centered, self.ddof, self.owners)
        wide = jnp.result_type(metric.scale)
        damping = value_at(self.damping, state.count, wide)
        limits = {"max_iters": self.max_iters, "tol": self.tol}
        solve = functools.partial(
            solve_metric, metric, damping=damping, solver=self.solver, **limits
        )
        if self.momentum is None:
            direction, converged = solve(gradient)
        else:
            start = jax.tree.map(
                lambda d, g: jnp.asarray(self.momentum, wide) * d.astype(g.dtype),
                state.previous,
                gradient,
            )
            rest, converged = solve(optax.tree.sub(gradient, metric.product(start)))
            direction = self.like(gradient, optax.tree.add(start, rest))
            kept = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, state.previous)
            state = state._replace(previous=kept)
        return self.step(state, direction, are_sound_weights(weights), converged)


def scale_by_branch_fisher(
    damping: Schedulable = 1e-3,
    *,
    max_iters: Number = 8,
    tol: Number = 1e-6,
    solver: Solver = "cg",
    projection: ProjectionKind = "gaussian",
    complement: bool = True,
    centered: bool = True,
    ddof: int | None = None,
    momentum: Number | None = None,
    complex_metric: ComplexMetric | None = None,
    key: Key = 0,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient in the metric of K samples ("branches") of a state, or of the parameters.

    With B the branches, their mean removed, over the root of K - `ddof`, and P a map from state to
    parameters:

    .. math::
      M = B^T B + \lambda I, \qquad d = P M^{-1} P^T g

    **Parameter space.** For a tree of branches like the parameters with a leading axis K
    (`per_example_grads`, `jacobian_rows`, `residual_rows`) P is the identity and d the natural
    gradient, or with `centered=False` the Gauss-Newton direction. Take `solver="auto"`. `momentum`
    μ is SPRING's: d = M⁻¹ (g - μ BᵀB d₋) + μ d₋ with the last direction d₋. With K < n rows of n
    parameters the metric is singular, and along all it does not see the direction is g / λ: choose
    λ for that, by `row_diagnostics`.

    Complex rows, such as derivatives of a wavefunction's logarithm, have the quantum geometric
    tensor. For real parameters it is the real part of BᴴB, and for complex ones all of it where the
    rows are those of a holomorphic function; `SplitRows`, which `jacobian_rows` makes of others,
    and trees with real and complex leaves are solved over real and imaginary parts. Gradients and
    directions of complex leaves are steepest ascents ∂L/∂Re + i ∂L/∂Im, the *conjugate* of what
    `jax.grad` gives.

    **State space.** For an array [K, D] of samples of a state P is drawn, and the direction is

    .. math::
      d = \lambda (\lambda I + P B^T B P^T)^{-1} g,

    which is full rank: what P cannot see of g passes unchanged. `complement=False` is the original
    rule d = P M⁻¹ Pᵀ g, which *only adds noise*: with a fresh Gaussian P, E[P M⁻¹ Pᵀ] =
    tr(M⁻¹)/D · I, a multiple of the gradient whatever the branches say. A P that means something
    (the Jacobian of the state with respect to the parameters, as `projection`) makes the metric a
    pullback.

    `update` takes the extra arguments

    * `branches`: an array [K, D], K ≥ 0, D ≥ 1 (D = 0: a zero direction, or with `complement` the
      gradient); or a tree [K, \*leaf.shape], K ≥ 1. K and D may change from step to step. With
      None, said on purpose, or an array that is not two-dimensional, the gradient passes unchanged
      and the key does not move. Where the parameters are a single array, branches [K, \*shape] are
      rows in parameter space, unless `projection` is given;
    * `projection`: P itself, [n, D] over the flattened parameters in `jax.tree.leaves` order or a
      tree of [\*leaf.shape, D]; the key does not move;
    * `weights`: [K], not negative, for the mean and the metric (importance sampling, quadrature, a
      full summation); a branch of weight zero is as if it were not there. The gradient is taken as
      it is given, and has to be weighted likewise.

    A drawn P is never whole: two passes a step (three with `complement`, one more for
    "orthonormal") draw the same rows again.

    Optax's line searches may follow it (after ``optax.scale(-1.0)``), with a `value_fn` that names
    the extra arguments, ``lambda params, branches: loss(params)``; `adapt_damping` may go before
    it.

    Args:
      damping: λ, at least 0; a number or a schedule.
      max_iters: most iterations of conjugate gradients for `solver="cg"`; in state space 0 gives a
        zero solution.
      tol: "cg" stops when the residual's norm (absolute) is below it, in state space after one
        iteration at least.
      solver: "woodbury" factors a K × K matrix, "cholesky" D × D or n × n; both refine their
        solution to the accuracy of the branches. "auto" takes the smaller; where that is beyond
        8192 it iterates without a matrix until the residual is 1e-4 of the gradient, in at most
        1000 iterations, and counts in `unconverged` where it is not. "cg" is matrix-free (up to D =
        128 it forms the covariance as the original does). `complement` with [K, D] takes a singular
        value decomposition of min(n, D) × K instead, accurate for any λ.
      projection: "gaussian" (entries N(0, 1/D), new at every step), "fixed" (drawn once) or
        "orthonormal" (orthonormal columns, drawn once; D <= n).
      complement: whether what P cannot see of the gradient passes; False is the original rule. In
        parameter space, where P is the identity, it changes nothing.
      centered: whether the mean of the branches is removed; False divides by K.
      ddof: centred branches are divided by max(1, K - ddof). None: 0 in parameter space, the metric
        of stochastic reconfiguration, and 1 for samples of a state, as the original.
      momentum: SPRING's decay μ, in parameter space only; None: none.
      complex_metric: None chooses as above; "real" refuses complex parameters and "full" real ones.
      key: a seed from 0 to 2⁶⁴ - 1, or a PRNG key.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. What is kept
        like the parameters is sharded as they are. Rows in parameter space may lie on all
        devices by examples; the K × K matrix is made of them without gathering them.

    Returns:
      A transformation with state `ScaleByBranchFisherState`. Arithmetic is float32 at least,
      float64 if gradients or branches are. With a NaN or an infinity in gradients, branches,
      `projection`, `weights` or the result the update is zero and the state keeps its last value
      but for `total_notfinite`.

    Raises:
      ValueError: for an unknown `solver`, `projection` or `complex_metric`, a number out of range;
        in `update`, where `branches` is missing, or shapes or dtypes do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.scale_by_branch_fisher(0.1)
      >>> params = {"w": jnp.ones(2)}
      >>> given = {"branches": jnp.array([[1.0, 0.0], [-1.0, 0.0]]), "projection": jnp.eye(2)}
      >>> direction, state = tx.update(params, tx.init(params), params, **given)
      >>> print(direction["w"].round(4))  # 0.1 / (2 + 0.1) along the branches, unchanged across
      [0.0476 1.    ]

    References:
      Amari 1998, doi:10.1162/089976698300017746, Theorem 1. Goldshlager, Abrahamsen and Lin 2024,
      arXiv:2401.10190, for `momentum`. Sorella 1998, doi:10.1103/PhysRevLett.80.4558, for
      stochastic reconfiguration. Hestenes and Stiefel 1952, doi:10.6028/jres.049.044, (3:1). The
      arithmetic of `complement=False` with "cg" and "gaussian" is that of the published
      `HCNaturalGrad`.
    """
    rule = _BranchFisher(
        method="scale_by_branch_fisher",
        owners=owners_of("scale_by_branch_fisher", sharding),
        damping=damping,
        max_iters=max_iters,
        tol=tol,
        solver=solver,
        projection=projection,
        complement=complement,
        centered=centered,
        ddof=ddof,
        momentum=momentum,
        complex_metric=complex_metric,
        key=key,
    )
    rule.check_options()
    return transformation(rule)


def branch_fisher(
    learning_rate: Schedulable,
    damping: Schedulable = 1e-3,
    *,
    max_iters: Number = 8,
    tol: Number = 1e-6,
    solver: Solver = "cg",
    projection: ProjectionKind = "gaussian",
    complement: bool = True,
    centered: bool = True,
    ddof: int | None = None,
    momentum: Number | None = None,
    complex_metric: ComplexMetric | None = None,
    key: Key = 0,
    sharding: Sharding = None,
    weight_decay: Number = 0.0,
    gradient_bound: Number | None = 3.0,
    param_bound: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent in the metric of branches of a state or of the parameters.

    With d the direction of `scale_by_branch_fisher`, θ ← θ - lr (d + weight_decay θ), then limited
    to [-param_bound, param_bound].

    Args:
      learning_rate: a number or a schedule.
      damping: λ, at least 0; a number or a schedule.
      max_iters: most iterations of conjugate gradients for `solver="cg"`; in state space 0 gives a
        zero solution.
      tol: "cg" stops when the residual's norm (absolute) is below it, in state space after one
        iteration at least.
      solver: "woodbury" factors a K × K matrix, "cholesky" D × D or n × n; both refine their
        solution to the accuracy of the branches. "auto" takes the smaller; where that is beyond
        8192 it iterates without a matrix until the residual is 1e-4 of the gradient, in at most
        1000 iterations, and counts in `unconverged` where it is not. "cg" is matrix-free (up to D =
        128 it forms the covariance as the original does). `complement` with [K, D] takes a singular
        value decomposition of min(n, D) × K instead, accurate for any λ.
      projection: "gaussian" (entries N(0, 1/D), new at every step), "fixed" (drawn once) or
        "orthonormal" (orthonormal columns, drawn once; D <= n).
      complement: whether what P cannot see of the gradient passes; False is the original rule. In
        parameter space, where P is the identity, it changes nothing.
      centered: whether the mean of the branches is removed; False divides by K.
      ddof: centred branches are divided by max(1, K - ddof). None: 0 in parameter space, the metric
        of stochastic reconfiguration, and 1 for samples of a state, as the original.
      momentum: SPRING's decay μ, in parameter space only; None: none.
      complex_metric: None chooses as above; "real" refuses complex parameters and "full" real ones.
      key: a seed from 0 to 2⁶⁴ - 1, or a PRNG key.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. What is kept
        like the parameters is sharded as they are. Rows in parameter space may lie on all
        devices by examples; the K × K matrix is made of them without gathering them.
      weight_decay: decoupled weight decay, added after preconditioning.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each leaf's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
      param_bound: half-width of a box in which the *parameters* stay; None: no box.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` takes `branches=` (an array [K, D], a tree
      of rows, or None), `projection=` and `weights=`, and needs `params` for a decay or a box. With
      a NaN or an infinity no parameter moves.

    Raises:
      ValueError: for a learning rate that is none, an unknown `solver`, `projection` or
        `complex_metric`, a number out of range; in `update`, where `branches` is missing, or shapes
        or dtypes do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx, params = optax_curv.branch_fisher(0.1, damping=1.0), jnp.ones(4)
      >>> branches = jax.random.normal(jax.random.key(0), (6, 3))
      >>> updates, state = tx.update(params, tx.init(params), params, branches=branches)
      >>> updates.shape
      (4,)

    References:
      Amari 1998, doi:10.1162/089976698300017746, Theorem 1. Goldshlager, Abrahamsen and Lin 2024,
      arXiv:2401.10190, for `momentum`.
    """
    rule = _BranchFisher(
        method="branch_fisher",
        owners=owners_of("branch_fisher", sharding),
        damping=damping,
        max_iters=max_iters,
        tol=tol,
        solver=solver,
        projection=projection,
        complement=complement,
        centered=centered,
        ddof=ddof,
        momentum=momentum,
        complex_metric=complex_metric,
        key=key,
    )
    return descent(rule, learning_rate, weight_decay, gradient_bound, param_bound)


class RowDiagnostics(NamedTuple):
    """The spectrum of a metric of rows beside a solve with it; made by `row_diagnostics`.

    Attributes:
      rank: eigenvalues of BᵀB above its rounding, eps times its size times the largest, int32 [].
      largest: eigenvalue of BᵀB.
      smallest: eigenvalue of the smaller of BBᵀ and BᵀB.
      residual: ‖(BᵀB + λI) d - g‖ / ‖g‖ of the direction that `solver="auto"` finds.
    """

    rank: jax.Array
    largest: jax.Array
    smallest: jax.Array
    residual: jax.Array


def row_diagnostics(
    grads: Tree,
    damping: Number,
    *,
    branches: Tree,
    weights: Any = None,
    centered: bool = True,
    ddof: int | None = None,
) -> RowDiagnostics:
    """Computes the spectrum of the metric of rows, and how exactly a direction solves with it.

    Where the rank is less than the number of parameters, a part of g that the rows do not see is
    divided by λ alone: compare λ with `smallest` and `largest`. It costs an eigenvalue
    decomposition of the smaller of K × K and n × n, so that it is for looking now and then.

    Args:
      grads: g, a tree.
      damping: λ.
      branches: rows in parameter space, as in `scale_by_branch_fisher`, as are all that follow.
      weights: None, or [K].
      centered: whether the mean of the rows is removed.
      ddof: centred rows are divided by K - ddof; None: 0.

    Returns:
      A `RowDiagnostics`.

    Raises:
      ValueError: where the rows are none of these gradients.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> rows = jnp.diag(jnp.array([3.0, 1.0, 0.0]))[:2] * 2**0.5
      >>> found = optax_curv.row_diagnostics(jnp.ones(3), 0.1, branches=rows, centered=False)
      >>> int(found.rank), float(found.largest.round(3)), float(found.smallest.round(3))
      (2, 9.0, 1.0)
    """
    method = "row_diagnostics"
    refuse_split_gradients(method, grads)
    judged(method, branches, weights, count_of_rows(method, branches, grads))
    gradient, metric = geometry(grads, branches, weights, centered, ddof)
    size = optax.tree.size(gradient)
    fewer_rows = cheaper(metric.rows.count, size) == "woodbury"
    matrix = metric.kernel() if fewer_rows else metric.matrix()
    values = lapack.eigh(matrix)[0]
    floor = len(values) * jnp.finfo(values.dtype).eps * values[-1]
    x, _ = solve_metric(metric, gradient, damping, solver="auto", max_iters=0, tol=0.0)
    left = optax.tree.sub(optax.tree.add_scale(metric.product(x), damping, x), gradient)
    residual = optax.tree.norm(left) / optax.tree.norm(gradient)
    return RowDiagnostics(jnp.sum(values > floor), values[-1], values[0], residual)


def _require_metric(method: str, complex_metric: ComplexMetric | None, updates: Any):
    """Refuses a metric that the gradients do not fit."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(updates)]
    full = complex_metric == "full"
    wrong = [str(x) for x in dtypes if jnp.issubdtype(x, jnp.complexfloating) != full]
    if complex_metric is not None and wrong:
        raise ValueError(
            f"{method}: expected {'complex' if full else 'real'} gradients with "
            f"{complex_metric=}, got {list(map(str, dtypes))}."
        )
