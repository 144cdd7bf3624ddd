"""Makers of branches against autodiff of the whole batch, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_curv
from optax_curv import testing

EXACT = 1e-12


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def problem(outputs=2, examples=7):
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "b": (4,), "v": (4, outputs)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return (
        params,
        jnp.asarray(rng.normal(size=(examples, 3))),
        jnp.asarray(rng.normal(size=(examples, outputs))),
    )


def matrix(rows):
    return np.concatenate(
        [np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(rows)], axis=1
    )


def mean_loss(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((network(params, x) - y) ** 2, axis=-1))


chunked = pytest.mark.parametrize("chunk_size", [None, 3])


@chunked
def test_per_example_gradients_equal_those_of_batches_of_one(chunk_size, x64):
    params, x, y = problem()
    rows = jax.jit(optax_curv.per_example_grads(mean_loss, chunk_size=chunk_size))(params, x, y)
    np.testing.assert_allclose(
        matrix(rows), testing.per_example_gradients(mean_loss, params, x, y), atol=EXACT
    )
    whole = jax.grad(mean_loss)(params, x, y)
    jax.tree.map(lambda row, g: np.testing.assert_allclose(row.mean(0), g, atol=EXACT), rows, whole)


@chunked
def test_jacobian_rows_equal_the_jacobian_of_the_batch(chunk_size, x64):
    params, x, _ = problem()
    rows = jax.jit(optax_curv.jacobian_rows(network, chunk_size=chunk_size))(params, x)
    whole = jax.jacobian(network)(params, x)
    expected = jax.tree.map(lambda j, leaf: j.reshape(-1, *leaf.shape), whole, params)
    jax.tree.map(lambda row, j: np.testing.assert_allclose(row, j, atol=EXACT), rows, expected)


@chunked
def test_residual_rows_give_the_weighted_loss_its_gradient_and_its_gauss_newton_matrix(
    chunk_size, x64
):
    params, x, y = problem()
    boundary, weights = x[:3] + 1, (2.0, 0.5)

    def interior(params, batch):
        return network(params, batch[0]) - batch[1]

    def edge(params, points):
        return network(params, points)[:, 0]

    def loss(params):
        inside = jnp.mean(jnp.sum(interior(params, (x, y)) ** 2, axis=-1))
        return 0.5 * (weights[0] * inside + weights[1] * jnp.mean(edge(params, boundary) ** 2))

    function = optax_curv.residual_rows(interior, edge, weights=weights, chunk_size=chunk_size)
    value, grads, rows = jax.jit(function)(params, (x, y), boundary)
    np.testing.assert_allclose(value, loss(params), rtol=EXACT)
    jax.tree.map(
        lambda g, h: np.testing.assert_allclose(g, h, atol=EXACT), grads, jax.grad(loss)(params)
    )
    inside = matrix(optax_curv.jacobian_rows(interior)(params, (x, y)))
    outside = matrix(optax_curv.jacobian_rows(edge)(params, boundary))
    gauss_newton = weights[0] * inside.T @ inside / 7 + weights[1] * outside.T @ outside / 3
    found = matrix(rows)
    np.testing.assert_allclose(found.T @ found / len(found), gauss_newton, atol=EXACT)


def test_bad_batches_are_refused():
    params, x, y = problem()
    for batch in ((x, y[:-1]), (x[:0], y[:0]), (jnp.float32(1),), ()):
        with pytest.raises(
            ValueError,
            match=r"per_example_grads: expected arrays with one leading axis of examples",
        ):
            optax_curv.per_example_grads(mean_loss)(params, *batch)
    with pytest.raises(ValueError, match=r"expected one weight a block, got 2 for 1"):
        optax_curv.residual_rows(network, weights=(1, 2))
    with pytest.raises(ValueError, match=r"expected one batch a block, got 2 batches for 1"):
        optax_curv.residual_rows(network)(params, x, x)
