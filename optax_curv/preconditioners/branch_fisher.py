"""Branch Fisher: samples of a state, or of the parameters themselves, as the metric of a natural gradient."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from optax_curv import linalg
from optax_curv.preconditioners import contracts, state_branches
from optax_curv.preconditioners.distribution import with_sharding_types
from optax_curv.preconditioners.row_solvers import SOLVERS, apply_rows, combine_rows, solve_rows

COMPLEX_METRICS = (None, "real", "full")

# The original's guard of both quotients of conjugate gradients.
CG_FLOOR = 1e-12

# Up to this D the covariance is formed for conjugate gradients too, as the original does: it costs nothing there, and
# far from convergence only the same product rounds alike.
FORMED_UP_TO = 128


class ScaleByBranchFisherState(NamedTuple):
    """State of `scale_by_branch_fisher`.

    Attributes:
      count: steps taken, int32 [].
      key: raw PRNG key data, uint32 [...].
      precond_norm: Euclidean norm of the last direction, float32 [].
      previous: the last direction, a tree like the parameters (float32 at least), or None without momentum.
      total_notfinite: steps skipped for a NaN or an infinity, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    precond_norm: jax.Array
    previous: Any
    total_notfinite: jax.Array


def scale_by_branch_fisher(
    damping=1e-3,
    *,
    max_iters=8,
    tol=1e-6,
    solver: str = "cg",
    projection: str = "gaussian",
    complement: bool = False,
    centered: bool = True,
    momentum=None,
    complex_metric: str | None = None,
    key=0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient in the metric of K samples ("branches") of a state, or of the parameters themselves.

    With B the branches, their mean removed, over the root of max(1, K - 1), and P a map from state to parameters:

    .. math::
      M = B^T B + \lambda I, \qquad d = P M^{-1} P^T g

    **Parameter space.** With a tree of branches like the parameters with a leading axis K (per-example gradients,
    Jacobian rows: `per_example_grads`, `jacobian_rows`, `residual_rows`) P is the identity and d the natural gradient,
    or with `centered=False` the Gauss-Newton direction. Take `solver="auto"`. With `momentum` μ and the last direction
    d₋ it is SPRING's: d = M⁻¹ (g - μ BᵀB d₋) + μ d₋.

    Rows may be complex, such as the derivatives of a wavefunction's logarithm, of which BᴴB is the quantum geometric
    tensor. `complex_metric="real"` takes its real part, for real parameters; "full" all of it, for complex parameters
    on which the rows depend holomorphically. There g is the direction of steepest ascent, which is the *conjugate* of
    what `jax.grad` gives.

    **State space.** With an array [K, D] P is drawn. *The original rule (the defaults) only adds noise*: a fresh
    Gaussian P knows nothing of the parameters, and E[P M⁻¹ Pᵀ] = tr(M⁻¹)/D · I, so that the expected direction is a
    multiple of the gradient, whatever the branches say. `complement=True` is what we recommend. Its direction

    .. math::
      d = \lambda (\lambda I + P B^T B P^T)^{-1} g

    is full rank: the part of g which P cannot see passes unchanged. And a P that means something (the Jacobian of the
    state with respect to the parameters, as the extra argument `projection`) makes the metric a pullback.

    `update` takes the extra arguments

    * `branches`: an array [K, D], K from 0 up (no metric but the damping), D from 1 up (D = 0: a zero direction); a
      tree [K, \*leaf.shape], K from 1 up; with None, or an array that is not two-dimensional, the gradient passes
      through unchanged and the key does not move. Where the parameters are a single array, a two-dimensional array is
      samples of a state and [K, \*shape] of another rank samples of the parameters.
    * `projection`: P itself, [n, D] over the flattened parameters in `jax.tree.leaves` order or a tree of
      [\*leaf.shape, D]; it replaces the drawn one, and the key does not move.

    A drawn P is never whole: each pass draws the same chunks of rows again, so it costs no memory and two passes of
    random numbers a step (three with `complement`, and one more for "orthonormal").

    K and D of an array may not change between steps: the transformation remembers the shape (only that) of the first
    branches since `init`, and raises when it traces another.

    Optax's line searches may follow it (after ``optax.scale(-1.0)``); they hand each extra argument of `update` on to
    `value_fn`, so that it has to name it: ``value_fn=lambda params, branches: loss(params)``. And `adapt_damping` may
    go before it.

    Args:
      damping: λ, at least 0; a number or a schedule of the step count.
      max_iters: most iterations of conjugate gradients; in state space 0 gives a zero direction.
      tol: "cg" stops when the residual's norm (absolute) is below it, in state space after one iteration at least.
      solver: exact but for "cg". "woodbury" factors a K × K matrix, "cholesky" D × D or n × n; both refine their
        solution until it is as accurate as the branches are. "auto" takes the smaller, and "cg" where that is beyond
        8192. "cg" is matrix-free (in state space up to D = 128 it forms the covariance as the original does).
        `complement` with [K, D] uses none of them but one singular value decomposition of min(n, D) × K, accurate for
        any λ.
      projection: "gaussian" (entries N(0, 1/D), new at every step), "fixed" (drawn once) or "orthonormal"
        (orthonormal columns, drawn once; D <= n).
      complement: keep what P cannot see. In parameter space that is nothing, and d is multiplied by λ.
      centered: remove the mean and divide by max(1, K - 1); False: divide by K.
      momentum: SPRING's decay μ, in parameter space only; None: none.
      complex_metric: "real" or "full", in parameter space only; None refuses complex rows.
      key: seed, or a PRNG key.

    Returns:
      A transformation with state `ScaleByBranchFisherState`. Arithmetic is float32 at least, float64 if gradients or
      branches are. A NaN or infinity in gradients, branches, `projection` or the result gives a zero update, leaves
      the state as it was and adds one to `total_notfinite`.

    Raises:
      ValueError: unknown `solver`, `projection` or `complex_metric`, negative numbers; in `update`, shapes or dtypes
        that do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.scale_by_branch_fisher(0.1, complement=True)
      >>> params = {"w": jnp.ones(2)}
      >>> branches = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
      >>> direction, state = tx.update(params, tx.init(params), params, branches=branches, projection=jnp.eye(2))
      >>> print(direction["w"].round(4))  # 0.1 / (2 + 0.1) along the branches, unchanged across them
      [0.0476 1.    ]

    References:
      Amari, `Natural Gradient Works Efficiently in Learning
      <https://doi.org/10.1162/089976698300017746>`_, 1998, Theorem 1.
      Goldshlager, Abrahamsen & Lin, `A Kaczmarz-inspired approach to accelerate the optimization of neural network
      wavefunctions <https://arxiv.org/abs/2401.10190>`_, 2024, the SPRING update, for `momentum`.
      Hestenes & Stiefel, `Methods of Conjugate Gradients <https://doi.org/10.6028/jres.049.044>`_, 1952, (3:1).
      The arithmetic of `complement=False` with "cg" and "gaussian" is that of the published `HCNaturalGrad`.
    """
    method = "scale_by_branch_fisher"
    contracts.require_choice(method, "solver", solver, SOLVERS)
    contracts.require_choice(method, "complex_metric", complex_metric, COMPLEX_METRICS)
    for name, value in (("max_iters", max_iters), ("tol", tol), ("momentum", momentum)):
        contracts.require_number(method, name, value, at_least=0)
    empty_state = functools.partial(ScaleByBranchFisherState, previous=None)
    state_space = state_branches.scale_by_state_branches(
        method,
        empty_state,
        functools.partial(_solve, solver, max_iters, tol),
        lambda rows: rows,
        damping=damping,
        projection=projection,
        complement=complement,
        centered=centered,
        key=key,
        complex_leaves=complex_metric == "full",
    )

    def init(params):
        previous = None if momentum is None else contracts.wide_zeros(params)
        return cast(ScaleByBranchFisherState, state_space.init(params))._replace(previous=previous)

    def update(updates, state, params=None, *, branches=None, projection=None, **extra_args):
        extra_args = {"branches": branches, "projection": projection, **extra_args}
        if branches is None or _are_state_samples(branches, updates):
            if branches is not None and momentum is not None and jnp.ndim(branches) == 2:
                raise ValueError(f"{method}: momentum={momentum!r} needs branches in parameter space, got an array.")
            return state_space.update(updates, state, params, **extra_args)
        if projection is not None:
            raise ValueError(f"{method}: branches in parameter space take no projection; give one or the other.")
        if params is not None:
            contracts.require_same_leaves(method, "the gradients", updates, "the parameters", params)
        _require_rows(method, branches, updates)
        _require_metric(method, complex_metric, branches, updates)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((updates, branches)))
        rows = optax.tree.cast(branches, dtype)
        rows = jax.tree.map(lambda x: state_branches.covariance_rows(x, centered), rows)
        if complex_metric == "real":
            rows = jax.tree.map(lambda x: jnp.concatenate([x.real, x.imag]) if jnp.iscomplexobj(x) else x, rows)
            dtype = jnp.finfo(dtype).dtype
        gradient = optax.tree.cast(updates, dtype)
        damping_now = contracts.value_at(damping, state.count, jnp.finfo(dtype).dtype)
        solve = functools.partial(solve_rows, rows, solver=solver, max_iters=max_iters, tol=tol)
        if momentum is None:
            direction, previous = solve(gradient, damping_now), None
        else:
            start = jax.tree.map(lambda d: jnp.asarray(momentum, dtype) * d.astype(dtype), state.previous)
            residual = optax.tree.sub(gradient, combine_rows(rows, apply_rows(rows, start)))
            direction = optax.tree.add(start, solve(residual, damping_now))
            previous = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, state.previous)
        if complement:
            direction = optax.tree.scale(damping_now, direction)
        return state_branches.step(updates, state, branches, direction, previous=previous)

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def _are_state_samples(branches, updates):
    """Whether `branches` is an array and not samples [K, *shape] of parameters that are a single array themselves."""
    if not state_branches.is_array(branches) or jnp.ndim(branches) == 2 or not state_branches.is_array(updates):
        return state_branches.is_array(branches)
    return jnp.shape(branches)[1:] != jnp.shape(updates) or not jnp.ndim(branches)


def _require_rows(method, branches, updates):
    """Refuses samples of the parameters that do not fit these, or are none."""
    got, shapes = jax.tree.map(jnp.shape, branches), jax.tree.map(jnp.shape, updates)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(branches)}
    count = next(iter(counts), ())
    expected = jax.tree.map(lambda leaf: (*count, *jnp.shape(leaf)), updates)
    if got != expected or len(counts) != 1 or () in counts:
        raise ValueError(
            f"{method}: branches in parameter space have the shapes {got}; expected those of the parameters with one "
            f"leading axis K in front: {shapes}."
        )
    if counts == {(0,)}:
        raise ValueError(f"{method}: branches in parameter space have no rows (K = 0); expected one at least.")


def _require_metric(method, complex_metric, branches, updates):
    """Refuses complex rows without a choice of the metric, and a metric that the gradients do not fit."""
    if complex_metric is None and state_branches.is_complex(branches):
        raise ValueError(
            f'{method}: got complex branches and complex_metric=None; choose complex_metric="real" (the real part of '
            'the metric, for real parameters) or complex_metric="full" (for complex parameters).'
        )
    complex_leaves = [state_branches.is_complex(leaf) for leaf in jax.tree.leaves(updates)]
    if any(complex_leaves) if complex_metric != "full" else not all(complex_leaves):
        wanted = "complex" if complex_metric == "full" else "real"
        raise ValueError(
            f"{method}: expected {wanted} gradients with {complex_metric=}, got "
            f"{[str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(updates)]}."
        )


def _solve(solver, max_iters, tol, rows, b, damping):
    """(BᵀB + λI)⁻¹ b for rows B [K, D]: the original's guarded conjugate gradients, or as in parameter space."""
    if solver != "cg":
        return solve_rows(rows, b, damping, solver=solver, max_iters=max_iters, tol=tol)
    covariance = _dot(rows.T, rows) if len(b) <= FORMED_UP_TO else None

    def matvec(v):
        return (_dot(rows.T, _dot(rows, v)) if covariance is None else _dot(covariance, v)) + damping * v

    return linalg.conjugate_gradient(matvec, b, max_iters=max_iters, atol=tol, floor=CG_FLOOR)[0]


_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def branch_fisher(
    learning_rate: optax.ScalarOrSchedule,
    damping=1e-3,
    *,
    max_iters=8,
    tol=1e-6,
    solver: str = "cg",
    projection: str = "gaussian",
    complement: bool = False,
    centered: bool = True,
    momentum=None,
    complex_metric: str | None = None,
    key=0,
    weight_decay=0.0,
    param_bound=None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent in the metric of branches, see `scale_by_branch_fisher`.

    θ ← θ - lr (d + weight_decay θ), then limited to [-param_bound, param_bound].

    Args:
      learning_rate: number or schedule.
      damping: this and the next up to `key`: see `scale_by_branch_fisher`.
      max_iters: see there.
      tol: see there.
      solver: see there.
      projection: see there.
      complement: see there; True is recommended.
      centered: see there.
      momentum: see there.
      complex_metric: see there.
      key: see there.
      weight_decay: decoupled weight decay, added after preconditioning.
      param_bound: half-width of a box which the *parameters* stay in; None: none.

    Returns:
      A chain; its `update` needs `params` and takes `branches=` and `projection=`.

    Raises:
      ValueError: as `scale_by_branch_fisher`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> tx = optax_curv.branch_fisher(0.1, damping=1.0, complement=True)
      >>> params = {"w": jnp.ones(4)}
      >>> state = tx.init(params)
      >>> branches = jax.random.normal(jax.random.key(0), (6, 3))
      >>> updates, state = tx.update(params, state, params, branches=branches)
      >>> optax.apply_updates(params, updates)["w"].shape
      (4,)
    """
    return state_branches.descend(
        scale_by_branch_fisher(
            damping,
            max_iters=max_iters,
            tol=tol,
            solver=solver,
            projection=projection,
            complement=complement,
            centered=centered,
            momentum=momentum,
            complex_metric=complex_metric,
            key=key,
        ),
        learning_rate,
        weight_decay,
        param_bound,
    )
