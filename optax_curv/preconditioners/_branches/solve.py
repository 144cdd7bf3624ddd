"""Solves with the metric AᴴA + λI of rows: in the space of the rows, or of the parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv import linalg
from optax_curv.preconditioners._branches.metric import Metric
from optax_curv.typing import Solver

DENSE_UP_TO = 8192  # a factor of so many rows is 256 MiB of float32
# Each pass multiplies the error by about eps ‖AᴴA‖ / λ: 1e-4 in float64 where λ is 1e-12 of the
# metric. What a pass has changed, squared, is about what the next would.
REFINEMENTS = 3
# Beyond the dense solvers "auto" iterates until the residual is this small relative to the right
# side, in at most so many iterations; what is still larger then is counted.
AUTO_TOL, AUTO_ITERS = 1e-4, 1000


class Solution(NamedTuple):
    """A solution of `solve_metric`.

    Attributes:
      x: (AᴴA + λI)⁻¹ b, a tree like b.
      converged: whether "auto" reached its tolerance, bool []; true for all other solvers, which
        do what they are told.
    """

    x: Any
    converged: jax.Array


def solve_metric(
    metric: Metric, b: Any, damping: Any, *, solver: Solver, max_iters: Any, tol: Any
) -> Solution:
    """(AᴴA + λI)⁻¹ b for a tree b of [*shape]."""
    count, size = metric.rows.count, optax.tree.size(b)

    def operator(x):
        return optax.tree.add_scale(metric.product(x), damping, x)

    if solver == "auto" and min(count, size) > DENSE_UP_TO:
        x, info = linalg.conjugate_gradient(operator, b, max_iters=AUTO_ITERS, tol=AUTO_TOL)
        return Solution(x, info.residual_norm <= AUTO_TOL * optax.tree.norm(b))
    if solver == "cg":
        x, _ = linalg.conjugate_gradient(operator, b, max_iters=max_iters, atol=tol)
        return Solution(x, jnp.bool_(True))
    solver = cheaper(count, size) if solver == "auto" else solver
    return Solution(dense_solver(metric, solver)[0](b, damping), jnp.bool_(True))


def dense_solver(metric: Metric, solver: Solver) -> tuple[Callable[[Any, Any], Any], jax.Array]:
    """The map (b, λ) -> (AᴴA + λI)⁻¹ b, of which the matrix is made once, and the trace of AᴴA."""
    rows = solver == "woodbury"
    matrix = metric.kernel() if rows else metric.matrix()
    # Without damping nothing could be divided by in row space; the refinement removes what this
    # adds.
    least = jnp.sqrt(jnp.finfo(matrix.dtype).eps) * jnp.max(jnp.abs(matrix))

    def solve(b, damping):
        if rows:
            inverse = _inverse_by_rows(metric, matrix, jnp.where(damping > 0, damping, least))
        else:
            inverse = _inverse_by_parameters(metric, matrix, damping)

        def operator(x):
            return optax.tree.add_scale(metric.product(x), damping, x)

        return _refined(inverse, operator, b)

    return solve, jnp.trace(matrix).real


def _refined(inverse: Callable[[Any], Any], operator: Callable[[Any], Any], b: Any) -> Any:
    """The solution of `operator` x = b by an approximate inverse.

    Residuals from A itself make it as accurate as A and not as AᴴA, for λ down to eps ‖AᴴA‖.
    """
    x = inverse(b)
    size = optax.tree.norm(x)
    enough = jnp.finfo(size.dtype).eps ** 0.5

    def more(carry):
        x, change, passes = carry
        return (passes < REFINEMENTS) & (change > enough * optax.tree.norm(x))

    def improve(carry):
        x, _, passes = carry
        change = inverse(optax.tree.sub(b, operator(x)))
        return optax.tree.add(x, change), optax.tree.norm(change), passes + 1

    return jax.lax.while_loop(more, improve, (x, jnp.full_like(size, jnp.inf), jnp.int32(0)))[0]


def cheaper(count: int, size: int) -> Solver:
    """The dense solver that costs less for K rows of n parameters.

    "woodbury" takes K²n + K³/3 multiplications and "cholesky" K n² + n³/3: the one with the smaller
    matrix wins, and at a tie "woodbury", because "cholesky" would first join the leaves.
    """
    return "woodbury" if count <= size else "cholesky"


def _inverse_by_rows(metric: Metric, kernel: jax.Array, damping: Any) -> Callable[[Any], Any]:
    """The map b -> (b - Aᴴ (AAᴴ + λI)⁻¹ A b) / λ (Woodbury)."""
    factor, used = linalg.cholesky(kernel, damping)
    solve = functools.partial(linalg.cholesky_solve, factor)

    def inverse(b):
        inside = metric.combine(metric.in_kernel(solve, metric.apply(b)))
        return jax.tree.map(lambda x, y: (x - y) / used, b, inside)

    return inverse


def _inverse_by_parameters(metric: Metric, matrix: jax.Array, damping: Any) -> Callable[[Any], Any]:
    """The map b -> (AᴴA + λI)⁻¹ b, through the n × n matrix."""
    factor, _ = linalg.cholesky(matrix, damping)

    def inverse(b):
        vector, unravel = metric.flat(b)
        return unravel(linalg.cholesky_solve(factor, vector))

    return inverse
