"""The pieces of the aliases: a bound on every tensor's update, decay, and a learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._transformation import bounds
from optax_curv.preconditioners._transformation.aliases import by_rows
from optax_curv.preconditioners._transformation.numbers import (
    require_learning_rate,
    require_numbers,
)
from optax_curv.preconditioners._transformation.transformation import Piece, Rule, transformation
from optax_curv.preconditioners._transformation.trees import wide_dtype

PEAK = 5  # psgd_torch bounds the root mean square by 2 and every entry by 10


def bounded(method: str, max_rms: Any) -> list[Piece]:
    """A bound on each tensor's root mean square, and one of five times it on its entries."""
    require_numbers(method, max_rms=max_rms, above=0, or_none=True)
    if max_rms is None:
        return []
    return [by_rows(lambda u: _within(u, max_rms))]


def _within(u: jax.Array, max_rms: Any) -> jax.Array:
    magnitudes = jnp.abs(u)
    magnitudes = magnitudes.astype(wide_dtype(magnitudes.dtype))
    limit = jnp.asarray(max_rms, magnitudes.dtype)
    scale = jnp.minimum(1, PEAK * limit / jnp.max(magnitudes, initial=0))
    rms = jnp.sqrt(jnp.sum(jnp.square(magnitudes * scale)) / max(1, u.size))
    return (u * (scale * jnp.minimum(1, limit / rms))).astype(u.dtype)


def descending(
    rule: Rule, learning_rate: Any, weight_decay: Any, gradient_bound: Any, *pieces: Piece
) -> optax.GradientTransformationExtraArgs:
    """The alias of a rule: bounded gradients, its directions through these pieces, and a rate.

    Weight decay is among the pieces.
    """
    require_learning_rate(rule.method, learning_rate)
    require_numbers(rule.method, weight_decay=weight_decay)
    first = bounds.bounded(rule.method, gradient_bound)
    return transformation(rule, *pieces, optax.scale_by_learning_rate(learning_rate), first=first)
