"""Branch Fisher's own: its solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

FLOAT64 = 1e-9


@pytest.mark.parametrize("solver", ["cg", "woodbury", "cholesky", "auto"])
@pytest.mark.parametrize(("count", "dimension"), [(3, 7), (12, 7), (5, 150)])
def test_every_solver_equals_the_dense_solve(solver, count, dimension, x64):
    rng = np.random.default_rng(count)
    branches, gradient = rng.normal(size=(count, dimension)), rng.normal(size=dimension)
    tx = optax_curv.scale_by_branch_fisher(
        0.01, solver=solver, max_iters=200, tol=1e-12, complement=False
    )
    step = jax.jit(
        lambda g: tx.update(g, tx.init(g), branches=branches, projection=np.eye(dimension))[0]
    )
    dense = np.linalg.solve(np.cov(branches.T) + 0.01 * np.eye(dimension), gradient)
    np.testing.assert_allclose(
        step(jnp.asarray(gradient)), dense, rtol=0, atol=FLOAT64 * np.abs(dense).max()
    )


def test_max_iters_may_be_injected():
    tx = optax.inject_hyperparams(optax_curv.scale_by_branch_fisher)(
        0.1, max_iters=0, complement=False
    )
    params = {"w": jnp.ones(3)}
    state, step = tx.init(params), jax.jit(tx.update)
    extra = {
        "branches": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3))),
        "projection": jnp.eye(3),
    }
    updates, state = step(params, state, params, **extra)
    np.testing.assert_array_equal(updates["w"], 0)
    state.hyperparams["max_iters"] = jnp.int32(8)
    updates, _ = step(params, state, params, **extra)
    assert np.all(updates["w"] != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "lu"}, r"unknown solver='lu'; expected one of"),
        ({"max_iters": -1}, r"max_iters >= 0, got max_iters=-1"),
        ({"tol": -1.0}, r"tol >= 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optax_curv.scale_by_branch_fisher(**options)


def test_momentum_needs_samples_of_the_parameters():
    tx = optax_curv.scale_by_branch_fisher(momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum.*parameter space"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), branches=jnp.ones((4, 2)))
