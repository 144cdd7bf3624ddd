"""Projections: equal numbers in every pass, the right distribution, orthonormal, and small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.preconditioners._branches import projections

EXACT = 1e-12  # float64 rounding of sums of a few hundred terms
SINGLE = 5e-6  # float32: one Cholesky QR of a matrix of condition 3
FIVE_SIGMA = 5.0
GIGABYTE = 2**30

LIKE = {"a": np.zeros((8, 3)), "b": np.zeros(()), "c": np.zeros((0, 4)), "d": np.zeros((3, 8))}
SIZE = 49


def flat(tree):
    return np.concatenate(
        [np.reshape(leaf, (-1, leaf.shape[-1])) for leaf in jax.tree.leaves(tree)]
    )


@pytest.fixture(params=[2**22, 16], ids=["one chunk a leaf", "many chunks"])
def chunk_entries(request, monkeypatch):
    monkeypatch.setattr(projections, "CHUNK_ENTRIES", request.param)


def test_pull_and_push_use_the_same_numbers(chunk_entries, x64):
    basis = projections.gaussian(jax.random.key(0), LIKE, 5, jnp.float64)
    gradient = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape), LIKE)
    matrix = flat(jax.jit(basis.push)(jnp.eye(5)))
    assert matrix.shape == (SIZE, 5)
    vector = flat(jax.tree.map(lambda leaf: leaf[..., None], gradient))[:, 0]
    np.testing.assert_allclose(jax.jit(basis.pull)(gradient), matrix.T @ vector, rtol=0, atol=EXACT)
    pushed = jax.jit(basis.push)(jnp.arange(5.0))
    assert jax.tree.map(jnp.shape, pushed) == jax.tree.map(jnp.shape, LIKE)
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda x: x[..., None], pushed))[:, 0], matrix @ np.arange(5)
    )


def test_no_row_is_drawn_twice(chunk_entries):
    matrix = flat(
        jax.jit(projections.gaussian(jax.random.key(0), LIKE, 5, jnp.float32).push)(jnp.eye(5))
    )
    assert len(np.unique(matrix, axis=0)) == SIZE


def test_entries_are_normal_with_variance_one_over_d():
    like, dimension = {"w": np.zeros(4000)}, 16
    matrix = flat(
        jax.jit(projections.gaussian(jax.random.key(1), like, dimension, jnp.float32).push)(
            jnp.eye(dimension)
        )
    )
    scaled = matrix * np.sqrt(dimension)
    for moment, value, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((scaled**moment).mean() - value) < FIVE_SIGMA * np.sqrt(spread / scaled.size)


@pytest.mark.parametrize("dimension", [1, 5, 20, 60], ids=["column", "tall", "made whole", "wide"])
def test_factor_has_orthonormal_columns_and_restores_p(dimension):
    basis = projections.gaussian(jax.random.key(2), LIKE, dimension, jnp.float32)

    @jax.jit
    def matrices():
        columns, triangle = basis.factor()
        eye = jnp.eye(triangle.shape[0])
        push = jax.vmap(columns.push, in_axes=1, out_axes=-1)
        return (
            basis.push(jnp.eye(dimension)),
            push(eye),
            triangle,
            jax.vmap(columns.pull, in_axes=-1)(push(eye)),
        )

    p, q, triangle, gram = matrices()
    rank = min(SIZE, dimension)
    assert triangle.shape == (rank, dimension)
    np.testing.assert_allclose(flat(q).T @ flat(q), np.eye(rank), atol=SINGLE)
    np.testing.assert_allclose(gram, np.eye(rank), atol=SINGLE)
    np.testing.assert_allclose(flat(q) @ triangle, flat(p), atol=SINGLE)


def test_an_orthonormal_map_is_its_own_factor():
    columns, _ = projections.gaussian(jax.random.key(2), LIKE, 3, jnp.float32).factor()
    same, triangle = columns.factor()
    assert same is columns
    np.testing.assert_array_equal(triangle, np.eye(3))


def test_an_array_and_a_tree_of_the_same_numbers_agree(x64):
    like = {"b": np.zeros((2, 2)), "a": np.zeros(3)}
    matrix = np.random.default_rng(0).normal(size=(7, 4))
    tree = {"a": matrix[:3], "b": matrix[3:].reshape(2, 2, 4)}
    one, other = (projections.explicit("method", p, like, 4, jnp.float64) for p in (matrix, tree))
    v = jnp.arange(4.0)
    for x, y in zip(jax.tree.leaves(one.push(v)), jax.tree.leaves(other.push(v)), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(one.push(v)["a"], matrix[:3] @ v)
    np.testing.assert_array_equal(one.pull(like), other.pull(like))


@pytest.mark.parametrize(
    "wrong", [np.zeros((6, 4)), np.zeros((7, 5)), {"a": np.zeros((3, 4))}, np.zeros(7)]
)
def test_a_projection_of_another_shape_is_refused_by_both_shapes(wrong):
    like = {"b": np.zeros((2, 2)), "a": np.zeros(3)}
    with pytest.raises(ValueError, match=r"projection has shape .* expected \(7, 4\).*\(2, 2, 4\)"):
        projections.explicit("method", wrong, like, 4, jnp.float32)


@pytest.mark.parametrize("factored", [False, True])
def test_ten_million_parameters_take_less_than_a_gigabyte(factored):
    like = {
        "w": jax.ShapeDtypeStruct((2500, 2000), jnp.float32),
        "v": jax.ShapeDtypeStruct((5_000_000,), jnp.float32),
    }

    def through(factored, tree):
        basis = projections.gaussian(jax.random.key(0), tree, 64, jnp.float32)
        basis = basis.factor()[0] if factored else basis
        return basis.push(basis.pull(tree))

    memory = jax.jit(functools.partial(through, factored)).lower(like).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < GIGABYTE
