"""Samples of a state or of the parameters: what they may be, and the rows of their covariance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_array(tree: Any) -> bool:
    """Whether the tree is one array, and not None or a tree of several."""
    return jax.tree.structure(tree) == jax.tree.structure(0)


def is_complex(tree: Any) -> bool:
    """Whether a leaf of the tree is complex."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


def require_weights(method: str, weights: Any, count: int):
    """Refuses weights that are not one number a row, and those known to be none."""
    if jnp.shape(weights) != (count,):
        raise ValueError(
            f"{method}: expected weights [K], one number for each of the K = {count} branches, got "
            f"shape {jnp.shape(weights)}."
        )
    if isinstance(weights, Tracer):
        return
    values = np.asarray(weights)
    if (values < 0).any() or (count and values.sum() == 0):
        raise ValueError(
            f"{method}: expected weights that are not negative and do not sum to zero, got "
            f"{weights!r}."
        )


def are_sound_weights(weights: Any) -> jax.Array:
    """Whether weights are not negative, and do not sum to zero: bool []."""
    if weights is None:
        return jnp.bool_(True)
    weights = jnp.asarray(weights)
    return jnp.all(weights >= 0) & ((jnp.sum(weights) > 0) | (weights.size == 0))


def covariance_rows(
    branches: jax.Array, centered: bool, ddof: int, weights: jax.Array | None = None
) -> jax.Array:
    """Rows B [max(K, 1), ...] with BᵀB = cov(branches).

    Centred, they are divided by the root of max(1, K - ddof), otherwise by the root of K. With
    weights w, w̄ = w / Σw, each row is multiplied by √w̄, the mean is the weighted one, and what
    takes the place of K / (K - ddof) is 1 / (1 - ddof Σ w̄²): a row of weight zero is as if it were
    not there, and equal weights are as none.
    """
    count = branches.shape[0]
    if not count:
        return jnp.zeros((1, *branches.shape[1:]), branches.dtype)
    if weights is None:
        if centered:
            branches = branches - jnp.mean(branches, axis=0)
        divisor = max(1, count - ddof) if centered else count
        return branches / jnp.sqrt(jnp.asarray(divisor, branches.dtype))
    share = jnp.asarray(weights, jnp.finfo(branches.dtype).dtype)
    share /= jnp.sum(share)
    if centered:
        branches = branches - jnp.tensordot(share, branches, 1, precision="highest")
        rest = 1 - ddof * jnp.sum(jnp.square(share))
        # One row is its own mean: nothing is left to be divided.
        share /= jnp.where(rest > 100 * jnp.finfo(share.dtype).eps, rest, 1)
    return branches * jnp.sqrt(share).reshape(-1, *(1,) * (branches.ndim - 1))
