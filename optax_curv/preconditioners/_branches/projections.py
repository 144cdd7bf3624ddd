"""Linear maps P from a D-dimensional state into parameter space: drawn, orthonormal, or given."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from optax_curv import linalg
from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._compiler import equally_varying, full_matmul

# Entries of P that exist at once while it is drawn: 16 MiB of float32, so that a chunk costs much
# more than its loop.
CHUNK_ENTRIES = 2**22
# From this many rows a column on, a Gaussian matrix has a condition number of about (1 + 1/2) / (1
# - 1/2) = 3 at most, and one Cholesky QR is orthonormal within a few roundings. Below, P is made
# whole for a Householder QR.
TALL = 4


class Projection(NamedTuple):
    """P seen from both sides, n parameters by D state dimensions.

    Attributes:
      pull: a tree g like the parameters -> Pᵀ g, [D].
      push: v, [D] or [D, k] -> P v, a tree like the parameters (each leaf with a last axis k).
      factor: () -> (Q, T) with P = Q T: Q a Projection with orthonormal columns, T [min(n, D), D].
    """

    pull: Callable[[Any], jax.Array]
    push: Callable[[jax.Array], Any]
    factor: Callable[[], tuple["Projection", jax.Array]]


def gaussian(key: jax.Array, like: Any, dimension: int, dtype: Any) -> Projection:
    """P with entries N(0, 1/D), never whole.

    Every pass draws the same chunks of rows again from the typed `key`.
    """
    drawn = _Drawn(key, like, dimension, dtype)
    return Projection(drawn.pull, drawn.push, drawn.factor)


class _Group(NamedTuple):
    """Leaves of one size, which share a loop.

    Attributes:
      size: numbers in each leaf.
      rows: rows of P in a chunk.
      members: places of the leaves.
      names: by chunk, the leaf, the number within it, and how many of the rows are inside.
    """

    size: int
    rows: int
    members: list[int]
    names: tuple[np.ndarray, np.ndarray, np.ndarray]


class _Drawn:
    """A Gaussian P, drawn anew in every pass."""

    def __init__(self, key: jax.Array, like: Any, dimension: int, dtype: Any):
        leaves, self.treedef = jax.tree.flatten(like)
        self.shapes = [jnp.shape(x) for x in leaves]
        self.key, self.like, self.dimension, self.dtype = key, like, dimension, dtype

    def groups(self) -> list[_Group]:
        """The groups of leaves that are not empty."""
        sizes = list(map(math.prod, self.shapes))
        found = []
        for size in sorted(set(sizes) - {0}):
            members = [i for i, other in enumerate(sizes) if other == size]
            chunks = -(-size * self.dimension // CHUNK_ENTRIES)
            rows = -(-size // min(chunks, size))
            chunks = -(-size // rows)
            leaf, chunk = np.repeat(members, chunks), np.tile(np.arange(chunks), len(members))
            names = leaf, chunk, np.minimum(rows, size - chunk * rows)
            found.append(_Group(size, rows, members, names))
        return found

    def draw(self, name: Any, rows: int) -> jax.Array:
        """The rows of one chunk, [rows, D]; zeros where it is filled up."""
        leaf, chunk, inside = name
        chunk_key = jax.random.fold_in(jax.random.fold_in(self.key, leaf), chunk)
        scale = np.sqrt(self.dimension).astype(self.dtype)
        entries = jax.random.normal(chunk_key, (rows, self.dimension), self.dtype) / scale
        return jnp.where(jnp.arange(rows)[:, None] < inside, entries, 0)

    def pull(self, tree: Any) -> jax.Array:
        """Pᵀ g, [D]."""
        leaves, total = jax.tree.leaves(tree), jnp.zeros(self.dimension, self.dtype)
        total, *_ = equally_varying((total, jax.random.key_data(self.key), *leaves))
        for group in self.groups():
            flat = jnp.stack([jnp.ravel(leaves[i]).astype(self.dtype) for i in group.members])
            flat = jnp.pad(flat, ((0, 0), (0, -group.size % group.rows))).reshape(-1, group.rows)

            def add(total, chunk, rows=group.rows):
                return total + full_matmul(chunk[0], self.draw(chunk[1], rows)), None

            total, _ = jax.lax.scan(add, total, (flat, group.names))
        return total

    def push(self, v: jax.Array) -> Any:
        """P v, a tree."""
        leaves = [jnp.zeros(shape + v.shape[1:], self.dtype) for shape in self.shapes]
        for group in self.groups():

            def product(name, rows=group.rows):
                return full_matmul(self.draw(name, rows), v)

            flat = jax.lax.map(product, group.names)
            flat = flat.reshape(len(group.members), -1, *v.shape[1:])[:, : group.size]
            for i, leaf in zip(group.members, flat, strict=True):
                leaves[i] = leaf.reshape(self.shapes[i] + v.shape[1:])
        return jax.tree.unflatten(self.treedef, leaves)

    def gram(self) -> jax.Array:
        """PᵀP, [D, D]."""
        total = jnp.zeros((self.dimension, self.dimension), self.dtype)
        total, _ = equally_varying((total, jax.random.key_data(self.key)))
        for group in self.groups():

            def add(total, name, rows=group.rows):
                entries = self.draw(name, rows)
                return total + full_matmul(entries.T, entries), None

            total, _ = jax.lax.scan(add, total, group.names)
        return total

    def factor(self) -> tuple[Projection, jax.Array]:
        """(Q, T) with P = Q T; see `Projection`."""
        if sum(map(math.prod, self.shapes)) < TALL * self.dimension:
            columns = jax.tree.leaves(self.push(jnp.eye(self.dimension, dtype=self.dtype)))
            columns = [jnp.reshape(leaf, (-1, self.dimension)) for leaf in columns]
            return dense(jnp.concatenate(columns), self.like).factor()
        lower, _ = linalg.cholesky(self.gram())

        def pull(tree):
            return linalg.triangular_solve(lower, self.pull(tree), lower=True)

        def push(v):
            return self.push(linalg.triangular_solve(lower, v, lower=True, transpose=True))

        return _orthonormal(pull, push, self.dimension, self.dtype), lower.T


def dense(matrix, like) -> Projection:
    """P as an array [n, D] over the leaves of `like`, whose dtype it has."""
    unravel = ravel_pytree(like)[1]

    def factor():
        q, t = lapack.qr(matrix)
        columns = dense(q, like)
        return _orthonormal(columns.pull, columns.push, q.shape[1], q.dtype), t

    return Projection(
        pull=lambda tree: full_matmul(ravel_pytree(tree)[0], matrix),
        push=lambda v: unravel(full_matmul(matrix, v)),
        factor=factor,
    )


def explicit(method: str, projection, like, dimension: int, dtype) -> Projection:
    """The map a caller gave: [n, D] over `jax.tree.leaves` order, or a tree of [*leaf.shape, D]."""
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    expected = jax.tree.map(lambda leaf: (*leaf.shape, dimension), like)
    got = jax.tree.map(jnp.shape, projection)
    if got not in ((size, dimension), expected):
        raise ValueError(
            f"{method}: projection has shape {got}; expected {(size, dimension)} (parameters, "
            f"state dimensions) or a tree like the parameters with the shapes {expected}."
        )
    rows = [
        jnp.reshape(leaf, (-1, dimension)).astype(dtype) for leaf in jax.tree.leaves(projection)
    ]
    return dense(jnp.concatenate(rows), like)


def _orthonormal(pull, push, dimension, dtype) -> Projection:
    """A map with orthonormal columns, its own factor Q."""
    columns = Projection(pull, push, lambda: (columns, jnp.eye(dimension, dtype=dtype)))
    return columns
