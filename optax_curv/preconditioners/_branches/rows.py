"""Rows A [K, n] of a metric AᴴA: what is made of samples, products with them, and their solves."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from optax_curv import linalg
from optax_curv.typing import Solver

DENSE_UP_TO = 8192  # a factor of so many rows is 256 MiB of float32
# Each pass multiplies the error by about eps ‖AᴴA‖ / λ: 1e-4 in float64 where λ is 1e-12 of the
# metric.
REFINEMENTS = 3
# Beyond the dense solvers "auto" iterates until the residual is this small relative to the right
# side, in at most so many iterations; what is still larger then is counted.
AUTO_TOL, AUTO_ITERS = 1e-4, 1000


def is_array(tree: Any) -> bool:
    """Whether the tree is one array, and not None or a tree of several."""
    return jax.tree.structure(tree) == jax.tree.structure(0)


def is_complex(tree: Any) -> bool:
    """Whether a leaf of the tree is complex."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


def require_weights(method: str, weights: Any, count: int):
    """Refuses weights that are not one number a row, and those known to be none."""
    if jnp.shape(weights) != (count,):
        raise ValueError(
            f"{method}: expected weights [K], one number for each of the K = {count} branches, got "
            f"shape {jnp.shape(weights)}."
        )
    if isinstance(weights, Tracer):
        return
    values = np.asarray(weights)
    if (values < 0).any() or (count and values.sum() == 0):
        raise ValueError(
            f"{method}: expected weights that are not negative and do not sum to zero, got "
            f"{weights!r}."
        )


def are_sound_weights(weights: Any) -> jax.Array:
    """Whether weights are not negative, and do not sum to zero: bool []."""
    if weights is None:
        return jnp.bool_(True)
    weights = jnp.asarray(weights)
    return jnp.all(weights >= 0) & ((jnp.sum(weights) > 0) | (weights.size == 0))


def covariance_rows(
    branches: jax.Array, centered: bool, ddof: int, weights: jax.Array | None = None
) -> jax.Array:
    """Rows B [max(K, 1), ...] with BᵀB = cov(branches).

    Centred, they are divided by the root of max(1, K - ddof), otherwise by the root of K. With
    weights w, w̄ = w / Σw, each row is multiplied by √w̄, the mean is the weighted one, and what
    takes the place of K / (K - ddof) is 1 / (1 - ddof Σ w̄²): a row of weight zero is as if it were
    not there, and equal weights are as none.
    """
    count = branches.shape[0]
    if not count:
        return jnp.zeros((1, *branches.shape[1:]), branches.dtype)
    if weights is None:
        if centered:
            branches = branches - jnp.mean(branches, axis=0)
        divisor = max(1, count - ddof) if centered else count
        return branches / jnp.sqrt(jnp.asarray(divisor, branches.dtype))
    share = jnp.asarray(weights, jnp.finfo(branches.dtype).dtype)
    share /= jnp.sum(share)
    if centered:
        branches = branches - jnp.tensordot(share, branches, 1, precision="highest")
        rest = 1 - ddof * jnp.sum(jnp.square(share))
        # One row is its own mean: nothing is left to be divided.
        share /= jnp.where(rest > 100 * jnp.finfo(share.dtype).eps, rest, 1)
    return branches * jnp.sqrt(share).reshape(-1, *(1,) * (branches.ndim - 1))


def apply_rows(rows: Any, x: Any) -> jax.Array:
    """A x, [K], for a tree of rows [K, *shape] and a tree x of [*shape]."""
    products = jax.tree.map(lambda a, v: jnp.tensordot(a, v, v.ndim, precision="highest"), rows, x)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combine_rows(rows: Any, y: jax.Array) -> Any:
    """Aᴴ y, a tree of [*shape], for y [K]."""
    return jax.tree.map(lambda a: jnp.tensordot(y, a.conj(), 1, precision="highest"), rows)


class Solution(NamedTuple):
    """A solution of `solve_rows`.

    Attributes:
      x: (AᴴA + λI)⁻¹ b, a tree like b.
      converged: whether "auto" reached its tolerance, bool []; true for all other solvers, which
        do what they are told.
    """

    x: Any
    converged: jax.Array


def solve_rows(
    rows: Any, b: Any, damping: Any, *, solver: Solver, max_iters: Any, tol: Any
) -> Solution:
    """(AᴴA + λI)⁻¹ b for trees of rows A [K, *shape] and of b [*shape], of one dtype."""
    count, size = len(jax.tree.leaves(rows)[0]), optax.tree.size(b)

    def operator(x):
        return optax.tree.add_scale(combine_rows(rows, apply_rows(rows, x)), damping, x)

    if solver == "auto" and min(count, size) > DENSE_UP_TO:
        x, info = linalg.conjugate_gradient(operator, b, max_iters=AUTO_ITERS, tol=AUTO_TOL)
        return Solution(x, info.residual_norm <= AUTO_TOL * optax.tree.norm(b))
    if solver == "cg":
        x, _ = linalg.conjugate_gradient(operator, b, max_iters=max_iters, atol=tol)
        return Solution(x, jnp.bool_(True))
    solver = cheaper(count, size) if solver == "auto" else solver
    inverse = (_row_space if solver == "woodbury" else _parameter_space)(rows, damping)
    # Residuals from A itself make the solution as accurate as A and not as AᴴA, for λ down to eps
    # ‖AᴴA‖.
    x = jax.lax.fori_loop(
        0,
        REFINEMENTS,
        lambda _, x: optax.tree.add(x, inverse(optax.tree.sub(b, operator(x)))),
        inverse(b),
    )
    return Solution(x, jnp.bool_(True))


def cheaper(count: int, size: int) -> Solver:
    """The dense solver that costs less for K rows of n parameters.

    "woodbury" takes K²n + K³/3 multiplications and "cholesky" K n² + n³/3: the one with the smaller
    matrix wins, and at a tie "woodbury", because "cholesky" would first join the leaves.
    """
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
    flat = [jnp.reshape(a, (len(a), int(np.prod(a.shape[1:])))) for a in jax.tree.leaves(rows)]
    matrix = jnp.concatenate(flat, 1)
    factor, _ = linalg.cholesky(jnp.matmul(matrix.conj().T, matrix, precision="highest"), damping)

    def inverse(b):
        vector, unravel = ravel_pytree(b)
        return unravel(linalg.cholesky_solve(factor, vector))

    return inverse
