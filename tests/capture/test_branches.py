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


def complex_problem():
    rng = np.random.default_rng(3)
    z = {"z": jnp.asarray(rng.normal(size=(4, 2)) @ [1, 1j]), "x": jnp.asarray(rng.normal(size=3))}
    return z, jnp.asarray(rng.normal(size=5))


def holomorphic(p, x):
    return jnp.sin(x[:, None] * p["z"]) @ p["z"] ** 2


def other(p, x):
    return holomorphic(p, x) + 0.3j * jnp.abs(x[:, None] * p["z"]).sum(1) ** 2


def parts(fn, params, x):
    """(∂ψ/∂Re z, ∂ψ/∂Im z) of all leaves, by forward mode over real coordinates."""

    def of_parts(real, imag):
        joined = {
            k: v + 1j * imag[k] if jnp.iscomplexobj(params[k]) else v for k, v in real.items()
        }
        return fn(joined, x)

    halves = jax.tree.map(jnp.real, params), jax.tree.map(jnp.imag, params)
    return jax.jacfwd(of_parts, (0, 1))(*halves)


@chunked
@pytest.mark.parametrize("fn", [holomorphic, other])
def test_rows_of_complex_leaves_are_both_derivatives(fn, chunk_size, x64):
    params, x = complex_problem()
    rows = jax.jit(optax_curv.jacobian_rows(fn, chunk_size=chunk_size))(params, x)
    real, imag = parts(fn, params, x)
    np.testing.assert_allclose(rows["x"], real["x"], atol=EXACT)
    found = rows["z"]  # with the real leaf in the tree the program is not asked to be holomorphic
    if not isinstance(found, optax_curv.SplitRows):
        found = optax_curv.SplitRows(found, 1j * found)
    np.testing.assert_allclose(found.real, real["z"], atol=EXACT)
    np.testing.assert_allclose(found.imag, imag["z"], atol=EXACT)
    assert (fn is other) == isinstance(rows["z"], optax_curv.SplitRows)


def test_a_promise_of_holomorphy_is_taken_where_it_can_be(x64):
    params, x = complex_problem()
    z = {"z": params["z"]}
    promised = optax_curv.jacobian_rows(holomorphic, holomorphic=True)(z, x)
    jax.tree.map(
        np.testing.assert_array_equal, promised, optax_curv.jacobian_rows(holomorphic)(z, x)
    )
    testing.check_holomorphic(holomorphic, z, x)
    with pytest.raises(ValueError, match=r"not holomorphic.*disagree"):
        testing.check_holomorphic(other, z, x)
    for fn, given in ((holomorphic, params), (lambda p, x: jnp.abs(holomorphic(p, x)), z)):
        with pytest.raises(ValueError, match=r"holomorphic=True promises complex outputs"):
            optax_curv.jacobian_rows(fn, holomorphic=True)(given, x)
    with pytest.raises(ValueError, match=r"holomorphic='yes'"):
        optax_curv.jacobian_rows(holomorphic, holomorphic="yes")


def test_complex_residuals_have_the_loss_of_their_magnitudes(x64):
    params, x = complex_problem()

    def loss(p):
        return 0.5 * jnp.mean(jnp.abs(other(p, x)) ** 2)

    value, grads, rows = jax.jit(optax_curv.residual_rows(other))(params, x)
    np.testing.assert_allclose(value, loss(params), rtol=EXACT)
    expected = jax.tree.map(jnp.conj, jax.grad(loss)(params))
    jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, atol=EXACT), grads, expected)
    assert rows["x"].shape == (10, 3) and rows["z"].real.shape == (10, 4)


def of_one(params, point):
    return jnp.tanh(point @ params["w"])[0] * jnp.sum(point)


@pytest.mark.parametrize("make", [optax_curv.jacobian_rows, optax_curv.residual_rows])
def test_functions_of_one_example_are_refused_with_advice(make):
    params, x, _ = problem()
    with pytest.raises(ValueError, match=r"expected outputs \[N, \.\.\.\].*jax\.vmap"):
        make(of_one)(params, x)
    rows = make(jax.vmap(of_one, (None, 0)))(params, x)
    assert jax.tree.leaves(rows)
    for wrong, message in (
        (lambda p, x: (x, x), "return one array, got a tree"),
        (lambda p, x: jnp.argmax(x, -1), "expected outputs of floating-point"),
        (lambda p, x: x.reshape(1, 3) @ p["w"], "fails for a batch of two examples"),
    ):
        with pytest.raises(ValueError, match=message):
            make(wrong)(params, x)


def test_a_loss_that_is_no_number_is_refused():
    params, x, y = problem()
    with pytest.raises(ValueError, match=r"a loss that is one real number, got float32\[1, 2\]"):
        optax_curv.per_example_grads(lambda p, x, y: network(p, x) - y)(params, x, y)
