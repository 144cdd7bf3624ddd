"""Branch Fisher: samples of a state, or of the parameters themselves, as the metric of a natural gradient."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from optax_curv import linalg
from optax_curv.preconditioners._stacks.owners import with_sharding_types
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners.branch_kfac import (
    covariance_rows,
    descend,
    is_array,
    is_complex,
    scale_by_state_branches,
    step,
)

COMPLEX_METRICS = (None, "real", "full")
SOLVERS = ("cg", "woodbury", "cholesky", "auto")
DENSE_UP_TO = 8192  # a factor of so many rows is 256 MiB of float32
# Each pass multiplies the error by about eps ‖AᴴA‖ / λ: 1e-4 in float64 where λ is 1e-12 of the
# metric.
REFINEMENTS = 3
CG_FLOOR = 1e-12  # the original's guard of both quotients of conjugate gradients
# Up to this D the covariance is formed for conjugate gradients too, as the original does: far from
# convergence only the same product rounds alike.
FORMED_UP_TO = 128


class ScaleByBranchFisherState(NamedTuple):
    """State of `scale_by_branch_fisher`.

    Attributes:
      count: steps taken, int32 [].
      key: raw PRNG key data, uint32 [...].
      precond_norm: Euclidean norm of the last direction, float32 [].
      previous: the last direction, a tree like the parameters (float32 at least), or None without
        momentum.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
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

    With B the branches, their mean removed, over the root of max(1, K - 1), and P a map from state
    to parameters:

    .. math::
      M = B^T B + \lambda I, \qquad d = P M^{-1} P^T g

    **Parameter space.** For a tree of branches like the parameters with a leading axis K
    (`per_example_grads`, `jacobian_rows`, `residual_rows`) P is the identity and d the natural
    gradient, or with `centered=False` the Gauss-Newton direction. Take `solver="auto"`. `momentum`
    μ is SPRING's: d = M⁻¹ (g - μ BᵀB d₋) + μ d₋ with the last direction d₋.

    Complex rows, such as derivatives of a wavefunction's logarithm, have the quantum geometric
    tensor BᴴB. `complex_metric="real"` takes its real part, for real parameters; "full" all of it,
    for complex parameters on which the rows depend holomorphically, with the *conjugate* of what
    `jax.grad` gives as g.

    **State space.** For an array [K, D] P is drawn. *The original rule (the defaults) only adds
    noise*: with a fresh Gaussian P, E[P M⁻¹ Pᵀ] = tr(M⁻¹)/D · I, a multiple of the gradient
    whatever the branches say. We recommend `complement=True`, whose direction

    .. math::
      d = \lambda (\lambda I + P B^T B P^T)^{-1} g

    is full rank: what P cannot see of g passes unchanged. A P that means something (the Jacobian of
    the state with respect to the parameters, as `projection`) makes the metric a pullback.

    `update` takes the extra arguments

    * `branches`: an array [K, D], K ≥ 0, D ≥ 1 (D = 0: a zero direction); or a tree [K,
      \*leaf.shape], K ≥ 1. With None, or an array that is not two-dimensional, the gradient passes
      unchanged and the key does not move. Where the parameters are a single array, [K, \*shape] of
      another rank than two is samples of the parameters.
    * `projection`: P itself, [n, D] over the flattened parameters in `jax.tree.leaves` order or a
      tree of [\*leaf.shape, D]; the key does not move.

    A drawn P is never whole: two passes a step (three with `complement`, one more for
    "orthonormal") draw the same rows again. K and D of an array may not change between steps; the
    transformation remembers them since `init`.

    Optax's line searches may follow it (after ``optax.scale(-1.0)``), with a `value_fn` that names
    the extra arguments, ``lambda params, branches: loss(params)``; `adapt_damping` may go before
    it.

    Args:
      damping: λ, at least 0; a number or a schedule.
      max_iters: most iterations of conjugate gradients; in state space 0 gives a zero direction.
      tol: "cg" stops when the residual's norm (absolute) is below it, in state space after one
        iteration at least.
      solver: "woodbury" factors a K × K matrix, "cholesky" D × D or n × n; both refine their
        solution to the accuracy of the branches. "auto" takes the smaller, and "cg" where that is
        beyond 8192. "cg" is matrix-free (up to D = 128 it forms the covariance as the original
        does). `complement` with [K, D] takes a singular value decomposition of min(n, D) × K
        instead, accurate for any λ.
      projection: "gaussian" (entries N(0, 1/D), new at every step), "fixed" (drawn once) or
        "orthonormal" (orthonormal columns, drawn once; D <= n).
      complement: keep what P cannot see. In parameter space that is nothing, and d is multiplied by
        λ.
      centered: remove the mean and divide by max(1, K - 1); False: divide by K.
      momentum: SPRING's decay μ, in parameter space only; None: none.
      complex_metric: "real" or "full", in parameter space only; None refuses complex rows.
      key: seed, or a PRNG key.

    Returns:
      A transformation with state `ScaleByBranchFisherState`. Arithmetic is float32 at least,
      float64 if gradients or branches are. With a NaN or infinity in gradients, branches,
      `projection` or the result the update is zero and the state keeps its last value but for
      `total_notfinite`.

    Raises:
      ValueError: unknown `solver`, `projection` or `complex_metric`, negative numbers; in `update`,
        shapes or dtypes that do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.scale_by_branch_fisher(0.1, complement=True)
      >>> params = {"w": jnp.ones(2)}
      >>> branches = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
      >>> direction, state = tx.update(params, tx.init(params), params, branches=branches, projection=jnp.eye(2))
      >>> print(direction["w"].round(4))  # 0.1 / (2 + 0.1) along the branches, unchanged across them
      [0.0476 1.    ]

    References:
      Amari 1998, doi:10.1162/089976698300017746, Theorem 1. Goldshlager, Abrahamsen and Lin 2024,
      arXiv:2401.10190, for `momentum`. Hestenes and Stiefel 1952, doi:10.6028/jres.049.044, (3:1).
      The arithmetic of `complement=False` with "cg" and "gaussian" is that of the published
      `HCNaturalGrad`.
    """
    method = "scale_by_branch_fisher"
    contracts.require_choice(method, "solver", solver, SOLVERS)
    contracts.require_choice(method, "complex_metric", complex_metric, COMPLEX_METRICS)
    contracts.require_numbers(method, max_iters=max_iters, tol=tol, momentum=momentum, at_least=0)
    state_space = scale_by_state_branches(
        method,
        functools.partial(ScaleByBranchFisherState, previous=None),
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
                raise ValueError(
                    f"{method}: momentum={momentum!r} needs branches in parameter space, got an array."
                )
            return state_space.update(updates, state, params, **extra_args)
        if projection is not None:
            raise ValueError(
                f"{method}: branches in parameter space take no projection; give one or the other."
            )
        if params is not None:
            contracts.require_same_leaves(
                method, "the gradients", updates, "the parameters", params
            )
        _require_rows(method, branches, updates)
        _require_metric(method, complex_metric, branches, updates)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((updates, branches)))
        rows = jax.tree.map(
            lambda x: covariance_rows(x, centered), optax.tree.cast(branches, dtype)
        )
        if complex_metric == "real":
            rows = jax.tree.map(
                lambda x: jnp.concatenate([x.real, x.imag]) if jnp.iscomplexobj(x) else x, rows
            )
            dtype = jnp.finfo(dtype).dtype
        gradient = optax.tree.cast(updates, dtype)
        damping_now = contracts.value_at(damping, state.count, jnp.finfo(dtype).dtype)
        solve = functools.partial(solve_rows, rows, solver=solver, max_iters=max_iters, tol=tol)
        if momentum is None:
            direction, previous = solve(gradient, damping_now), None
        else:
            start = jax.tree.map(
                lambda d: jnp.asarray(momentum, dtype) * d.astype(dtype), state.previous
            )
            residual = optax.tree.sub(gradient, combine_rows(rows, apply_rows(rows, start)))
            direction = optax.tree.add(start, solve(residual, damping_now))
            previous = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, state.previous)
        if complement:
            direction = optax.tree.scale(damping_now, direction)
        return step(updates, state, branches, direction, previous=previous)

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def _are_state_samples(branches, updates):
    """Whether `branches` is an array and not samples [K, *shape] of parameters that are a single array themselves."""
    if not is_array(branches) or jnp.ndim(branches) == 2 or not is_array(updates):
        return is_array(branches)
    return jnp.shape(branches)[1:] != jnp.shape(updates) or not jnp.ndim(branches)


def _require_rows(method, branches, updates):
    """Refuses samples of the parameters that do not fit these, or are none."""
    got, shapes = jax.tree.map(jnp.shape, branches), jax.tree.map(jnp.shape, updates)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(branches)}
    expected = jax.tree.map(lambda leaf: (*next(iter(counts), ()), *jnp.shape(leaf)), updates)
    if got != expected or len(counts) != 1 or () in counts:
        raise ValueError(
            f"{method}: branches in parameter space have the shapes {got}; expected those of the parameters with one "
            f"leading axis K in front: {shapes}."
        )
    if counts == {(0,)}:
        raise ValueError(
            f"{method}: branches in parameter space have no rows (K = 0); expected one at least."
        )


def _require_metric(method, complex_metric, branches, updates):
    """Refuses complex rows without a choice of the metric, and a metric that the gradients do not fit."""
    if complex_metric is None and is_complex(branches):
        raise ValueError(
            f'{method}: got complex branches and complex_metric=None; choose complex_metric="real" (the real part of '
            'the metric, for real parameters) or complex_metric="full" (for complex parameters).'
        )
    full, dtypes = (
        complex_metric == "full",
        [jnp.result_type(leaf) for leaf in jax.tree.leaves(updates)],
    )
    if any(jnp.issubdtype(dtype, jnp.complexfloating) != full for dtype in dtypes):
        raise ValueError(
            f"{method}: expected {'complex' if full else 'real'} gradients with {complex_metric=}, got "
            f"{list(map(str, dtypes))}."
        )


def _solve(solver, max_iters, tol, rows, b, damping):
    """(BᵀB + λI)⁻¹ b for rows B [K, D]: the original's guarded conjugate gradients, or as in parameter space."""
    if solver != "cg":
        return solve_rows(rows, b, damping, solver=solver, max_iters=max_iters, tol=tol)
    covariance = _dot(rows.T, rows) if len(b) <= FORMED_UP_TO else None

    def matvec(v):
        return (
            _dot(rows.T, _dot(rows, v)) if covariance is None else _dot(covariance, v)
        ) + damping * v

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
      learning_rate: a number or a schedule.
      damping: see `scale_by_branch_fisher`, as for all up to `key`.
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
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx, params = optax_curv.branch_fisher(0.1, damping=1.0, complement=True), jnp.ones(4)
      >>> branches = jax.random.normal(jax.random.key(0), (6, 3))
      >>> updates, state = tx.update(params, tx.init(params), params, branches=branches)
      >>> updates.shape
      (4,)
    """
    return descend(scale_by_branch_fisher, locals())


def apply_rows(rows, x):
    """A x, [K], for a tree of rows [K, *shape] and a tree x of [*shape]."""
    products = jax.tree.map(lambda a, v: jnp.tensordot(a, v, v.ndim, precision="highest"), rows, x)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combine_rows(rows, y):
    """Aᴴ y, a tree of [*shape], for y [K]."""
    return jax.tree.map(lambda a: jnp.tensordot(y, a.conj(), 1, precision="highest"), rows)


def solve_rows(rows, b, damping, *, solver: str, max_iters, tol):
    """(AᴴA + λI)⁻¹ b for trees of rows A [K, *shape] and of b [*shape], of one dtype, real or complex."""
    count, size = len(jax.tree.leaves(rows)[0]), optax.tree.size(b)
    if solver == "auto":
        solver = "cg" if min(count, size) > DENSE_UP_TO else cheaper(count, size)

    def operator(x):
        return optax.tree.add_scale(combine_rows(rows, apply_rows(rows, x)), damping, x)

    if solver == "cg":
        return linalg.conjugate_gradient(operator, b, max_iters=max_iters, atol=tol)[0]
    inverse = (_row_space if solver == "woodbury" else _parameter_space)(rows, damping)
    # Residuals from A itself make the solution as accurate as A and not as AᴴA, for λ down to eps
    # ‖AᴴA‖.
    return jax.lax.fori_loop(
        0,
        REFINEMENTS,
        lambda _, x: optax.tree.add(x, inverse(optax.tree.sub(b, operator(x)))),
        inverse(b),
    )


def cheaper(count: int, size: int) -> str:
    """The dense solver that costs less for K rows of n parameters, K²n + K³/3 against K n² + n³/3 multiplications."""
    # The one with the smaller matrix; and at a tie, where "cholesky" would first join the leaves,
    # "woodbury".
    return "woodbury" if count <= size else "cholesky"


def _row_space(rows, damping):
    """The map b -> (b - Aᴴ (AAᴴ + λI)⁻¹ A b) / λ (Woodbury)."""

    def product(a):
        axes = tuple(range(1, a.ndim))
        return jnp.tensordot(a, a.conj(), (axes, axes), precision="highest")

    gram = functools.reduce(jnp.add, map(product, jax.tree.leaves(rows)))
    # Without damping nothing could be divided by; the refinement removes what this adds within the
    # row space.
    least = jnp.sqrt(jnp.finfo(gram.dtype).eps) * jnp.max(jnp.abs(gram))
    factor, used = linalg.cholesky(gram, jnp.where(damping > 0, damping, least))

    def inverse(b):
        inside = combine_rows(rows, linalg.cholesky_solve(factor, apply_rows(rows, b)))
        return jax.tree.map(lambda x, y: (x - y) / used, b, inside)

    return inverse


def _parameter_space(rows, damping):
    """The map b -> (AᴴA + λI)⁻¹ b, through the n × n matrix."""
    matrix = jnp.concatenate(
        [jnp.reshape(a, (len(a), int(np.prod(a.shape[1:])))) for a in jax.tree.leaves(rows)], 1
    )
    factor, _ = linalg.cholesky(jnp.matmul(matrix.conj().T, matrix, precision="highest"), damping)

    def inverse(b):
        flat, unravel = ravel_pytree(b)
        return unravel(linalg.cholesky_solve(factor, flat))

    return inverse
