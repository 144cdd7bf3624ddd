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


def gaussian(key, like, dimension: int, dtype) -> Projection:
    """P with entries N(0, 1/D), never whole.

    Every pass draws the same chunks of rows again from the typed `key`.
    """
    leaves, treedef = jax.tree.flatten(like)
    shapes = list(map(jnp.shape, leaves))
    sizes = list(map(math.prod, shapes))

    def groups():
        """For leaves of one size, which share a loop: their places, and what names each chunk."""
        for size in sorted(set(sizes) - {0}):
            members = [i for i, other in enumerate(sizes) if other == size]
            chunks = -(-size * dimension // CHUNK_ENTRIES)
            rows = -(-size // min(chunks, size))
            chunks = -(-size // rows)
            leaf, chunk = np.repeat(members, chunks), np.tile(np.arange(chunks), len(members))
            yield size, rows, members, (leaf, chunk, np.minimum(rows, size - chunk * rows))

    def draw(name, rows):
        leaf, chunk, inside = name
        chunk_key = jax.random.fold_in(jax.random.fold_in(key, leaf), chunk)
        entries = jax.random.normal(chunk_key, (rows, dimension), dtype) / np.sqrt(
            dimension
        ).astype(dtype)
        return jnp.where(jnp.arange(rows)[:, None] < inside, entries, 0)

    def pull(tree):
        leaves, total = jax.tree.leaves(tree), jnp.zeros(dimension, dtype)
        for size, rows, members, names in groups():
            flat = jnp.stack([jnp.ravel(leaves[i]).astype(dtype) for i in members])
            flat = jnp.pad(flat, ((0, 0), (0, -size % rows))).reshape(-1, rows)
            total, _ = jax.lax.scan(
                lambda sum_, chunk: (sum_ + _dot(chunk[0], draw(chunk[1], rows)), None),  # noqa: B023
                total,
                (flat, names),
            )
        return total

    def push(v):
        leaves = [jnp.zeros(shape + v.shape[1:], dtype) for shape in shapes]
        for size, rows, members, names in groups():
            flat = jax.lax.map(lambda name: _dot(draw(name, rows), v), names)  # noqa: B023
            flat = flat.reshape(len(members), -1, *v.shape[1:])[:, :size]
            for i, leaf in zip(members, flat, strict=True):
                leaves[i] = leaf.reshape(shapes[i] + v.shape[1:])
        return jax.tree.unflatten(treedef, leaves)

    def gram():
        total = jnp.zeros((dimension, dimension), dtype)
        for _, rows, _, names in groups():

            def add(sum_, name):
                entries = draw(name, rows)  # noqa: B023
                return sum_ + _dot(entries.T, entries), None

            total, _ = jax.lax.scan(add, total, names)
        return total

    def factor():
        if sum(sizes) < TALL * dimension:
            columns = jax.tree.leaves(push(jnp.eye(dimension, dtype=dtype)))
            return dense(
                jnp.concatenate([jnp.reshape(leaf, (-1, dimension)) for leaf in columns]), like
            ).factor()
        lower, _ = linalg.cholesky(gram())
        return _orthonormal(
            lambda tree: linalg.triangular_solve(lower, pull(tree), lower=True),
            lambda v: push(linalg.triangular_solve(lower, v, lower=True, transpose=True)),
            dimension,
            dtype,
        ), lower.T

    return Projection(pull, push, factor)


def dense(matrix, like) -> Projection:
    """P as an array [n, D] over the leaves of `like`, whose dtype it has."""
    unravel = ravel_pytree(like)[1]

    def factor():
        q, t = lapack.qr(matrix)
        columns = dense(q, like)
        return _orthonormal(columns.pull, columns.push, q.shape[1], q.dtype), t

    return Projection(
        pull=lambda tree: _dot(ravel_pytree(tree)[0], matrix),
        push=lambda v: unravel(_dot(matrix, v)),
        factor=factor,
    )


def explicit(method: str, projection, like, dimension: int, dtype) -> Projection:
    """The map a caller gave: [n, D] over `jax.tree.leaves` order, or a tree of [*leaf.shape, D]."""
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    expected = jax.tree.map(lambda leaf: (*leaf.shape, dimension), like)
    got = jax.tree.map(jnp.shape, projection)
    if got not in ((size, dimension), expected):
        raise ValueError(
            f"{method}: projection has shape {got}; expected {(size, dimension)} (parameters, state dimensions) or a "
            f"tree like the parameters with the shapes {expected}."
        )
    rows = [
        jnp.reshape(leaf, (-1, dimension)).astype(dtype) for leaf in jax.tree.leaves(projection)
    ]
    return dense(jnp.concatenate(rows), like)


def _orthonormal(pull, push, dimension, dtype) -> Projection:
    """A map with orthonormal columns, its own factor Q."""
    columns = Projection(pull, push, lambda: (columns, jnp.eye(dimension, dtype=dtype)))
    return columns


def _dot(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
