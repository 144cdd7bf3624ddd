"""Factors of one axis as types: dense, diagonal, and two symmetric matrices packed as one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dense(NamedTuple):
    """A dense factor [..., d, d]."""

    matrix: jax.Array


class Diagonal(NamedTuple):
    """A diagonal factor, by its diagonal [..., d]."""

    vector: jax.Array


class SymmetricPair(NamedTuple):
    """Two Hermitian matrices in little more than the place of one, a factor and its root."""

    packed: jax.Array
