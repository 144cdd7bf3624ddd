"""Two symmetric matrices in little more than the place of one, as a factor and its inverse are kept.

Of a pair [batch, d, d + 1] the first matrix has the lower triangle and its diagonal, the second what is above it. Two
diagonals are a pair [batch, 2, 1, d], whose rank tells it from the others.
"""

import jax
import jax.numpy as jnp


def zeros_like(matrix) -> jax.Array:
    """A pair of zeros for a stack of matrices [batch, d, d] or of diagonals [batch, d]."""
    batch, d = matrix.shape[0], matrix.shape[-1]
    return jnp.zeros((batch, d, d + 1) if matrix.ndim == 3 else (batch, 2, 1, d), matrix.dtype)


def _lower(pair):
    """Where the first matrix of a full pair lies, [d, d + 1]."""
    return jnp.tril(jnp.ones(pair.shape[-2:], bool))


def first(pair) -> jax.Array:
    """The first matrix of each pair."""
    if pair.ndim == 4:
        return pair[:, 0, 0]
    half = pair[..., :-1]
    return jnp.where(_lower(half), half, half.mT)


def second(pair) -> jax.Array:
    """The second matrix of each pair."""
    if pair.ndim == 4:
        return pair[:, 1, 0]
    half = pair[..., 1:]
    return jnp.where(_lower(half).mT, half, half.mT)


def with_first(pair, matrix) -> jax.Array:
    """The pairs with another first matrix."""
    if pair.ndim == 4:
        return pair.at[:, 0, 0].set(matrix)
    return jnp.where(_lower(pair), jnp.pad(matrix, ((0, 0), (0, 0), (0, 1))), pair)


def with_second(pair, matrix) -> jax.Array:
    """The pairs with another second matrix."""
    if pair.ndim == 4:
        return pair.at[:, 1, 0].set(matrix)
    return jnp.where(_lower(pair), pair, jnp.pad(matrix, ((0, 0), (0, 0), (1, 0))))
