"""Solves with AᴴA + λI for a tree of rows A: through the K × K matrix, the n × n matrix, or neither."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from optax_curv import linalg

SOLVERS = ("cg", "woodbury", "cholesky", "auto")

# "auto" leaves the dense solvers beyond this: a factor of 8192 rows is 256 MiB of float32.
DENSE_UP_TO = 8192

# Each pass multiplies the error by about eps ‖AᴴA‖ / λ: 1e-4 in float64 where λ is 1e-12 of the metric.
REFINEMENTS = 3


def apply_rows(rows, x):
    """A x, [K], for a tree of rows [K, *shape] and a tree x of [*shape]."""
    products = jax.tree.map(lambda a, v: jnp.tensordot(a, v, v.ndim, precision="highest"), rows, x)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combine_rows(rows, y):
    """Aᴴ y, a tree of [*shape], for y [K]."""
    return jax.tree.map(lambda a: jnp.tensordot(y, a.conj(), 1, precision="highest"), rows)


def solve_rows(rows, b, damping, *, solver: str, max_iters, tol):
    """(AᴴA + λI)⁻¹ b.

    The dense solvers refine their solution with residuals from A itself, which makes them as accurate as A and not as
    AᴴA, in the row space and (b not in it) across it, for λ down to eps ‖AᴴA‖.

    Args:
      rows: A, a tree of [K, *shape] of one dtype, real or complex.
      b: a tree of [*shape] of that dtype.
      damping: λ, at least 0; with 0 "woodbury" gives the least-norm solution up to √eps ‖AᴴA‖.
      solver: "woodbury" costs K²n + K³/3 multiplications, "cholesky" K n² + n³/3, "auto" takes the cheaper
        by this model (`cheaper`), and "cg" where its matrix has more than 8192 rows.
      max_iters: most iterations of "cg".
      tol: absolute residual norm at which "cg" stops.
    """
    count, size = len(jax.tree.leaves(rows)[0]), optax.tree.size(b)
    if solver == "auto":
        solver = "cg" if min(count, size) > DENSE_UP_TO else cheaper(count, size)

    def operator(x):
        return optax.tree.add_scale(combine_rows(rows, apply_rows(rows, x)), damping, x)

    if solver == "cg":
        return linalg.conjugate_gradient(operator, b, max_iters=max_iters, atol=tol)[0]
    inverse = (_row_space if solver == "woodbury" else _parameter_space)(rows, damping)
    return jax.lax.fori_loop(
        0, REFINEMENTS, lambda _, x: optax.tree.add(x, inverse(optax.tree.sub(b, operator(x)))), inverse(b)
    )


def cheaper(count: int, size: int) -> str:
    """The dense solver that costs less for K rows of n parameters, K²n + K³/3 against K n² + n³/3 multiplications.

    That is the one with the smaller matrix, and at a tie, where "cholesky" would first join the leaves, "woodbury".
    Measured (benchmarks/row_solvers.py), no other term matters: where the two are close in time their matrices are
    close in size.
    """
    return "woodbury" if count <= size else "cholesky"


def _row_space(rows, damping):
    """The map b -> (b - Aᴴ (AAᴴ + λI)⁻¹ A b) / λ (Woodbury)."""

    def product(a):
        axes = tuple(range(1, a.ndim))
        return jnp.tensordot(a, a.conj(), (axes, axes), precision="highest")

    gram = functools.reduce(jnp.add, map(product, jax.tree.leaves(rows)))
    # Without damping nothing could be divided by; the refinement removes what this adds within the row space.
    least = jnp.sqrt(jnp.finfo(gram.dtype).eps) * jnp.max(jnp.abs(gram))
    factor, used = linalg.cholesky(gram, jnp.where(damping > 0, damping, least))

    def inverse(b):
        inside = combine_rows(rows, linalg.cholesky_solve(factor, apply_rows(rows, b)))
        return jax.tree.map(lambda x, y: (x - y) / used, b, inside)

    return inverse


def _parameter_space(rows, damping):
    """The map b -> (AᴴA + λI)⁻¹ b, through the n × n matrix."""
    matrix = jnp.concatenate([jnp.reshape(a, (len(a), int(np.prod(a.shape[1:])))) for a in jax.tree.leaves(rows)], 1)
    factor, _ = linalg.cholesky(jnp.matmul(matrix.conj().T, matrix, precision="highest"), damping)

    def inverse(b):
        flat, unravel = ravel_pytree(b)
        return unravel(linalg.cholesky_solve(factor, flat))

    return inverse
