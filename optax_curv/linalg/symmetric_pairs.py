"""Functions on the packed arrays of `linalg.factors.SymmetricPair`, which replaces them."""

import jax
import jax.numpy as jnp


def _belongs_to_first(d: int):
    return jnp.arange(d + 1) <= jnp.arange(d)[:, None]


def _whole(triangle):
    """The matrix of a lower triangle."""
    place = jnp.arange(triangle.shape[-1])
    return jnp.where(place <= place[:, None], triangle, triangle.mT.conj())


def _wide(matrix, before: int):
    return jnp.pad(matrix, [*[(0, 0)] * (matrix.ndim - 1), (before, 1 - before)])


@jax.jit
def first(pair) -> jax.Array:
    """The first matrix of each pair."""
    return _whole(pair[..., :-1])


@jax.jit
def second(pair) -> jax.Array:
    """The second matrix of each pair."""
    return _whole(pair[..., 1:].mT.conj())


def with_first(pair, matrix) -> jax.Array:
    """The pairs with another first matrix, whose lower triangle is read."""
    return jnp.where(_belongs_to_first(matrix.shape[-1]), _wide(matrix, 0), pair)


def with_second(pair, matrix) -> jax.Array:
    """The pairs with another second matrix, whose upper triangle is read."""
    return jnp.where(_belongs_to_first(matrix.shape[-1]), pair, _wide(matrix, 1))
