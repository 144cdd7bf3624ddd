"""Factors as types: what they do is what their dense matrices do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from optax_curv.linalg import kron_matvec
from optax_curv.linalg.factors import Dense, Diagonal, DiagonalPair, SymmetricPair

STACKS = [(), (4,), (2, 3)]
TYPES = [Dense, Diagonal]


def example(kind, stack, d, key=0):
    """A positive definite factor."""
    if kind is Diagonal:
        return Diagonal(jax.random.uniform(jax.random.key(key), (*stack, d), minval=0.1))
    x = jax.random.normal(jax.random.key(key), (*stack, d, d))
    return Dense(x @ x.mT + 0.1 * jnp.eye(d))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64():
        yield


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("d", "stack"), [(5, ()), (1, (4,)), (5, (2, 3))])
def test_every_method_is_that_of_the_matrix(kind, stack, d):
    factor, other = example(kind, stack, d), example(kind, stack, d, key=1)
    f, eye = np.asarray(factor.dense()), np.eye(d)
    assert (factor.size, factor.stack, factor.dtype) == (d, stack, jnp.float64)
    assert factor.astype("float32").dtype == jnp.float32
    x = jax.random.normal(jax.random.key(2), (*stack, d, 3))
    close(factor.matmul(x), f @ x)
    close(factor.matmul(x.mT, side="right"), np.asarray(x.mT) @ f)
    for h in (other, Dense(other.dense()), Diagonal(other.diagonal())):
        close(factor.compose(h).dense(), f @ h.dense())
    close(factor.adjoint().dense(), f.swapaxes(-1, -2))
    close(factor.diagonal(), np.diagonal(f, axis1=-2, axis2=-1))
    close(factor.mean_diagonal(), np.trace(f, axis1=-2, axis2=-1) / d)
    close(factor.eigenvalues(), np.linalg.eigvalsh(f))
    damping = jnp.broadcast_to(jnp.float64(0.3), stack)
    inverse = factor.inverse(damping)
    close(inverse.factor.dense() @ (f + 0.3 * eye), np.broadcast_to(eye, f.shape))
    close(inverse.damping, damping)
    condition = np.linalg.cond(f + 0.3 * eye)
    assert inverse.condition.shape == stack
    assert np.all(inverse.condition <= condition * (1 + 1e-9))
    if kind is Diagonal:
        close(inverse.condition, condition)
    largest = np.linalg.eigvalsh(f)[..., -1][..., None, None]
    close(
        factor.power(-0.5, 0.1).compose(factor.power(-0.5, 0.1)).dense()
        @ (f + 0.1 * largest * eye),
        eye + 0 * f,
    )


@pytest.mark.parametrize("kind", TYPES)
def test_zeros_identity_and_moments_of_both_kinds(kind):
    assert not np.any(kind.zeros((2,), 3).dense())
    close(kind.identity((2,), 3).dense(), np.broadcast_to(np.eye(3), (2, 3, 3)))
    assert kind.zeros((2,), 3, jnp.bfloat16).dtype == jnp.bfloat16
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 4, 5), jnp.complex128))
    expected = np.einsum("nabc,ndbc->nad", x, x.conj())
    found = kind.moment(jnp.asarray(x), 0, 1)
    close(found.diagonal(), np.diagonal(expected, axis1=-2, axis2=-1))
    if kind is Dense:
        close(found.matrix, expected)
        close(kind.moment(jnp.asarray(x[0]), 2).matrix, np.einsum("abc,abd->cd", x[0], x[0].conj()))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("stack", STACKS)
def test_a_factor_along_an_axis_is_a_kronecker_factor(kind, stack):
    x = jax.random.normal(jax.random.key(1), (*stack, 2, 5, 3))
    factor = example(kind, stack, 5)
    others = [Diagonal.identity(stack, 2), factor, Dense.identity(stack, 3)]
    expected = np.einsum("...ij,...ajb->...aib", factor.dense(), x)
    close(factor.apply_along(x, 1), expected)
    close(factor.apply_along(x, -2), expected)
    close(kron_matvec(others, x), expected)
    close(kron_matvec([factor.dense() if f is factor else f.dense() for f in others], x), expected)
    with pytest.raises(ValueError, match=r"does not fit axis 0 of x of shape"):
        factor.apply_along(x, 0)
    with pytest.raises(ValueError, match=r"unknown side='up'; expected one of \('left', 'right'\)"):
        factor.matmul(x, side="up")


def test_what_is_zero_stays_zero_without_damping():
    for factor in (Dense.zeros((2,), 3), Diagonal.zeros((2,), 3)):
        assert not np.any(factor.power(-0.5).dense())
    found = Diagonal(jnp.array([0.0, 2.0])).inverse()
    close(found.factor.vector, [0, 0.5])
    found = Dense(jnp.zeros((3, 3))).inverse()
    assert np.all(np.isfinite(found.factor.matrix)) and found.damping > 0


def test_complex_factors_are_hermitian():
    x = jax.random.normal(jax.random.key(0), (4, 4), jnp.complex128)
    factor = Dense(x @ x.mT.conj())
    close(factor.adjoint().matrix, factor.matrix)
    inverse = factor.inverse(0.1).factor.matrix
    close(inverse @ (factor.matrix + 0.1 * jnp.eye(4)), np.eye(4))
    assert jnp.isrealobj(factor.mean_diagonal()) and jnp.isrealobj(Dense.moment(x, 0).eigenvalues())


@pytest.mark.parametrize(("d", "stack"), [(1, (4,)), (2, ()), (7, (2, 3))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_what_is_put_into_a_pair_comes_out_whatever_the_order(d, stack, dtype):
    x = jax.random.normal(jax.random.key(0), (2, *stack, d, d), dtype)
    a, b = x + x.mT.conj()
    empty = SymmetricPair.zeros(stack, d, dtype)
    for pair in (
        empty.replace(factor=a).replace(root=b),
        empty.replace(factor=b).replace(root=b).replace(factor=a),
        empty.replace(factor=a, root=b),
        empty.replace(factor=jnp.tril(a), root=jnp.triu(b)),
    ):
        np.testing.assert_array_equal(pair.factor, a)
        np.testing.assert_array_equal(pair.root, b)
        np.testing.assert_array_equal(jnp.tril(pair.lower), jnp.tril(a))
    assert (empty.size, empty.stack, empty.dtype) == (d, stack, dtype)
    assert SymmetricPair.zeros(stack, d, jnp.bfloat16).replace(factor=a.real).dtype == jnp.bfloat16


def test_pairs_of_diagonals_have_the_same_interface():
    pair = DiagonalPair.zeros((2,), 3).replace(factor=jnp.ones((2, 3)))
    np.testing.assert_array_equal(pair.factor, 1)
    np.testing.assert_array_equal(pair.replace(root=2 * pair.factor).root, 2)
    np.testing.assert_array_equal(pair.root, 0)
    assert (pair.size, pair.stack, pair.dtype) == (3, (2,), jnp.float32)
    assert pair.astype(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "tree",
    [
        Dense.zeros((2,), 3),
        Diagonal.zeros((), 3),
        SymmetricPair.zeros((2,), 3),
        DiagonalPair.zeros((2,), 3),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_flax_saves_and_restores_every_type(tree):
    tree = jax.tree.map(lambda x: x + 1, tree)
    restored = serialization.from_bytes(tree, serialization.to_bytes(tree))
    assert type(restored) is type(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
