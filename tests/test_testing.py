"""The dense oracles against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv import Objective, testing

EXACT = 1e-12

pytestmark = pytest.mark.usefixtures("x64")


def linear(params, inputs):
    return inputs @ params["w"]


def problem(rows=6, inputs=3, outputs=4):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(inputs, outputs))}
    return params, rng.normal(size=(rows, inputs)), rng.integers(0, outputs, rows)


def test_linear_softmax_fisher_is_its_closed_form():
    params, x, classes = problem()
    objective = Objective(linear, "categorical")
    p = np.asarray(jax.nn.softmax(x @ params["w"]))
    expected = np.mean(
        [np.kron(np.outer(a, a), np.diag(q) - np.outer(q, q)) for a, q in zip(x, p, strict=True)], 0
    )
    np.testing.assert_allclose(testing.dense_fisher(objective, params, x), expected, atol=EXACT)
    np.testing.assert_allclose(
        testing.dense_gauss_newton(objective, params, x, classes), expected, atol=EXACT
    )
    # A linear model in its natural parameters: the Hessian is the Gauss-Newton matrix.
    np.testing.assert_allclose(
        testing.dense_hessian(objective, params, x, classes), expected, atol=EXACT
    )


def test_linear_gaussian_matrices_are_their_closed_forms():
    params, x, _ = problem(outputs=2)
    targets = np.ones((6, 2))
    objective = Objective(linear, "normal")
    expected = np.kron(x.T @ x / 6, np.eye(2))
    np.testing.assert_allclose(
        testing.dense_gauss_newton(objective, params, x, targets), expected, atol=EXACT
    )
    np.testing.assert_allclose(testing.dense_fisher(objective, params, x), expected, atol=EXACT)
    gradients = np.einsum("ri,rj->rij", x, x @ params["w"] - targets).reshape(6, -1)
    found = testing.per_example_gradients(objective, params, x, targets)
    np.testing.assert_allclose(found, gradients, atol=EXACT)
    empirical = testing.dense_fisher(objective, params, x, targets, "empirical")
    np.testing.assert_allclose(empirical, gradients.T @ gradients / 6, atol=EXACT)


def test_several_leading_axes_count_as_rows():
    params, x, classes = problem()
    objective = Objective(linear, "categorical")
    shaped = testing.dense_fisher(objective, params, x.reshape(2, 3, -1))
    np.testing.assert_allclose(shaped, testing.dense_fisher(objective, params, x), atol=EXACT)
    shaped = testing.dense_gauss_newton(
        objective, params, x.reshape(2, 3, -1), classes.reshape(2, 3)
    )
    np.testing.assert_allclose(shaped, testing.dense_fisher(objective, params, x), atol=EXACT)


def test_parameters_are_flattened_in_leaf_order():
    params = {"b": np.ones(2), "a": np.ones((1, 2))}
    rows = testing.per_example_gradients(
        lambda p, x, y: jnp.mean(x @ p["a"] @ p["b"] * y), params, np.ones((1, 1)), np.array([3.0])
    )
    np.testing.assert_array_equal(rows, [[3.0, 3.0, 3.0, 3.0]])
    hessian = testing.dense_hessian(
        lambda p: jnp.sum(p["a"] ** 2) + 3 * jnp.sum(p["b"] ** 2), params
    )
    np.testing.assert_array_equal(hessian, np.diag([2.0, 2.0, 6.0, 6.0]))


def test_covariance_is_numpy_covariance():
    rows = np.random.default_rng(0).normal(size=(5, 3))
    tree = {"a": rows[:, :1], "b": rows[:, 1:].reshape(5, 2, 1)}
    np.testing.assert_allclose(
        testing.dense_covariance(tree), np.cov(rows, rowvar=False), atol=EXACT
    )
    np.testing.assert_allclose(
        testing.dense_covariance(rows, centered=False), rows.T @ rows / 5, atol=EXACT
    )
    for few in (rows[:1], rows[:0]):
        np.testing.assert_array_equal(testing.dense_covariance(few), np.zeros((3, 3)))


@pytest.mark.parametrize("eigenvalues", [[3.0], [-1.0, 0.0, 2.0], [1e-6, 1.0, 1.0, 1e3], []])
def test_a_matrix_has_the_spectrum_asked_for(eigenvalues):
    matrix = testing.matrix_with_spectrum(jax.random.key(1), jnp.array(eigenvalues))
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), eigenvalues, atol=1e-12)


def test_random_spd_has_its_condition_number():
    matrix = testing.random_spd(jax.random.key(0), 6, 1e5)
    assert matrix.dtype == jnp.float64
    np.testing.assert_allclose(np.linalg.cond(matrix), 1e5, rtol=1e-9)
    assert testing.random_spd(jax.random.key(0), 2, dtype="float32").dtype == jnp.float32


def test_bad_kinds_are_refused():
    params, x, classes = problem()
    objective = Objective(linear, "categorical")
    with pytest.raises(ValueError, match="unknown kind='sampled'"):
        testing.dense_fisher(objective, params, x, classes, "sampled")
    with pytest.raises(ValueError, match="needs targets"):
        testing.dense_fisher(objective, params, x, kind="empirical")
