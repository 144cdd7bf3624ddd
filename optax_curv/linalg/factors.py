"""Factors of one axis as types: dense, diagonal, and two symmetric matrices packed as one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import symmetric_pairs


class Dense(NamedTuple):
    """A dense factor [..., d, d]."""

    matrix: jax.Array


class Diagonal(NamedTuple):
    """A diagonal factor, by its diagonal [..., d]."""

    vector: jax.Array


class SymmetricPair(NamedTuple):
    """Two Hermitian matrices in little more than the place of one, a factor and its root."""

    packed: jax.Array

    @property
    def factor(self) -> jax.Array:
        """The first matrix of each pair."""
        return symmetric_pairs.first(self.packed)

    @property
    def root(self) -> jax.Array:
        """The second matrix of each pair."""
        return symmetric_pairs.second(self.packed)

    def replace(self, *, factor: jax.Array, root: jax.Array) -> "SymmetricPair":
        """Pairs of other matrices."""
        packed = symmetric_pairs.with_second(self.packed, root)
        return SymmetricPair(symmetric_pairs.with_first(packed, factor))
