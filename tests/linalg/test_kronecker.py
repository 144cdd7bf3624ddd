import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv import linalg

TOLERANCE = 1e-12


def dense(factors):
    return functools.reduce(np.kron, [f if f.ndim == 2 else np.diag(f) for f in factors], np.eye(1))


@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (2, 3, 4), (1, 2, 3, 2), (3, 0)])
@pytest.mark.parametrize("diagonal", ["none", "first", "last", "all"])
def test_product_is_that_of_the_dense_kronecker_product(x64, shape, diagonal):
    rng = np.random.default_rng(0)
    chosen = {"none": (), "first": (0,), "last": (len(shape) - 1,), "all": range(len(shape))}[
        diagonal
    ]
    factors = [rng.standard_normal((d,) if i in chosen else (d, d)) for i, d in enumerate(shape)]
    x = rng.standard_normal(shape)
    found = linalg.kron_matvec(factors, x)
    assert found.shape == shape
    np.testing.assert_allclose(
        found.ravel(), dense(factors) @ x.ravel(), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,)])
def test_leading_axes_are_a_batch(x64, batch):
    rng = np.random.default_rng(1)
    factors = [rng.standard_normal((*batch, *s)) for s in ((2, 2), (4,), (3, 3))]
    x = rng.standard_normal((*batch, 2, 4, 3))
    found = linalg.kron_matvec(factors, x)
    one_by_one = linalg.kron_matvec
    for _ in batch:
        one_by_one = jax.vmap(one_by_one)
    np.testing.assert_allclose(found, one_by_one(factors, x), rtol=TOLERANCE, atol=TOLERANCE)
    axes = string.ascii_lowercase[: len(batch)]
    expected = np.einsum(f"{axes}ij,{axes}k,{axes}lm,{axes}jkm->{axes}ikl", *factors, x)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_complex_factors_are_not_conjugated(x64):
    factors, x = [np.array([[1, 1j], [0, 2]]), np.array([1j, 1])], np.ones((2, 2)) + 0j
    np.testing.assert_allclose(linalg.kron_matvec(factors, x).ravel(), dense(factors) @ x.ravel())


def test_no_factor_is_the_identity_and_types_promote():
    x = jnp.ones((2, 2), jnp.bfloat16)
    np.testing.assert_array_equal(linalg.kron_matvec([], x), x)
    assert (
        linalg.kron_matvec([jnp.eye(2, dtype=jnp.bfloat16), jnp.ones(2, jnp.bfloat16)], x).dtype
        == jnp.bfloat16
    )
    assert linalg.kron_matvec((jnp.eye(2),), x).dtype == jnp.float32


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"factor 1 of shape \(2, 3\) .* expected \(3, 3\) or the diagonal \(3,\)"
    ):
        linalg.kron_matvec([jnp.eye(2), jnp.ones((2, 3))], jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"got 2 factors for x of shape \(2,\)"):
        linalg.kron_matvec([jnp.eye(2), jnp.eye(2)], jnp.ones(2))
