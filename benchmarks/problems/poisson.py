"""Poisson's equation on the unit cube, solved by a network that is trained on its residuals."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import Problem
from benchmarks.problems.dense import init_dense, predict_dense


def poisson(
    dim: int, name: str, solution: Callable, interior: int, boundary: int, **options
) -> Problem:
    """-Δu = f in (0, 1)^dim, u = g on the boundary, with f and g from a known solution; network
    dim-64-1.

    The points are drawn once; the relative L² error is over 10000 others.
    """
    rng = np.random.default_rng(0)
    inside = jnp.asarray(rng.random((interior, dim)))
    edge = rng.random((boundary, dim))
    rows = np.arange(boundary)
    edge[rows, rows % dim] = rows // dim % 2  # each face in turn
    edge, test = jnp.asarray(edge), jnp.asarray(rng.random((10_000, dim)))

    def network(params, x):
        return predict_dense(params, x)[..., 0]

    def laplacian(function, x):
        return jnp.trace(jax.hessian(function)(x))

    def interior_residual(params, points):
        def at(x):
            return laplacian(lambda y: network(params, y), x) - laplacian(solution, x)

        return jax.vmap(at)(points)

    def boundary_residual(params, points):
        return network(params, points) - jax.vmap(solution)(points)

    def loss(params, *points):
        residuals = (interior_residual(params, points[0]), boundary_residual(params, points[1]))
        return sum(0.5 * jnp.mean(r**2) for r in residuals)

    exact = jax.vmap(solution)(test)

    def error(params):
        return jnp.linalg.norm(network(params, test) - exact) / jnp.linalg.norm(exact)

    return Problem(
        definition=f"-Δu = f on the unit {'square' if dim == 2 else 'cube'} in {dim} dimensions, "
        f"u = {name}, network "
        f"{dim}-64-1 (tanh) in float64, {interior} interior and {boundary} boundary points, the "
        f"same at every step",
        init=lambda seed: init_dense(seed, (dim, 64, 1), jnp.float64),
        loss=loss,
        batches=lambda seed, steps: ((inside, edge) for _ in range(steps)),
        metrics={"relative L2 error": error, "loss": lambda params: loss(params, inside, edge)},
        residuals=(interior_residual, boundary_residual),
        full_batch=True,
        **options,
    )
