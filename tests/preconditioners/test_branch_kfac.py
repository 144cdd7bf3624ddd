"""Branch K-FAC's own: its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

FLOAT64 = 1e-9


@pytest.mark.parametrize(
    ("blocks", "sizes"), [(3, [3, 2, 2]), (5, [2, 2, 1, 1, 1]), (1, [7]), (99, [1] * 7), (-2, [7])]
)
@pytest.mark.parametrize("complement", [False, True])
def test_uneven_blocks_equal_dense_solves_one_by_one(blocks, sizes, complement, x64):
    rng = np.random.default_rng(0)
    branches, gradient = rng.normal(size=(20, 7)), rng.normal(size=7)
    tx = optax_curv.scale_by_branch_kfac(0.1, blocks=blocks, complement=complement)
    step = jax.jit(lambda g: tx.update(g, tx.init(g), branches=branches, projection=np.eye(7))[0])
    covariance, expected = np.cov(branches.T), []
    for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        run = slice(start, start + size)
        expected.append(np.linalg.solve(covariance[run, run] + 0.1 * np.eye(size), gradient[run]))
    expected = np.concatenate(expected) * (0.1 if complement else 1)
    np.testing.assert_allclose(step(jnp.asarray(gradient)), expected, rtol=0, atol=FLOAT64)


def test_traced_blocks_are_refused_and_the_default_may_be_injected():
    params = {"w": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r'expected a Python int for blocks.*static_args=\("blocks",\)'
    ):
        jax.jit(optax.inject_hyperparams(optax_curv.scale_by_branch_kfac)(0.1, blocks=2).init)(
            params
        )
    tx = optax.inject_hyperparams(optax_curv.scale_by_branch_kfac)(0.1, complement=False)
    updates, _ = jax.jit(tx.update)(
        params, tx.init(params), params, branches=jnp.ones((2, 3)), projection=jnp.eye(3)
    )
    np.testing.assert_allclose(updates["w"], 10, rtol=1e-6)
