"""Running averages: one rule for their weights, and when something is due."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.preconditioners._transformation.numbers import COUNTER_LIMIT, value_at

# What is this many roundings smaller than the whole is no signal of its own: of a gradient, and of
# the root of a moment, where the bound is no step but a slope.
ROUNDINGS, MOMENT_ROUNDINGS = 2**10, 2**8


def running_weight(decay: jax.Array, count: jax.Array) -> jax.Array:
    """The weight w of the newest of count + 1 values in m ← m + w (new - m).

    It is w = (1 - decay) / (1 - decay^(count + 1)), which keeps m free of the bias of its start: a
    first value is no heavier than any other of its age. For decay 1 it is 1 / (count + 1), that of
    a plain mean.
    """
    steps = jnp.asarray(count, decay.dtype) + 1  # in floating point, where the counter cannot wrap
    plain = decay >= 1
    kept = jnp.where(plain, 0, decay)
    return jnp.where(plain, 1 / steps, (1 - kept) / (1 - kept**steps))


def weight_at(
    decay: Any, count: jax.Array, sound: jax.Array | bool = True, seen: jax.Array | None = None
) -> jax.Array:
    """The weight of this step's value, 0 where the step is unsound; see `running_weight`.

    The average is of as many values as there were steps, or of as many as it has `seen`.
    """
    decay = value_at(decay, count, jnp.result_type(float))
    return jnp.where(sound, running_weight(decay, count if seen is None else seen), 0)


def averaged(old: jax.Array, weight: jax.Array, new: jax.Array) -> jax.Array:
    """The average old + weight (new - old); `old` where the weight is zero, whatever `new` is."""
    weight = jnp.asarray(weight, jnp.finfo(old.dtype).dtype)
    return jnp.where(weight > 0, old + weight * (new - old), old)


def is_silent(energies: jax.Array) -> jax.Array:
    """Which rows, of sums of squares [N, d], have only rounding of the whole, bool [N, d]."""
    rounding = jnp.square(ROUNDINGS * jnp.finfo(energies.dtype).eps)
    return energies <= rounding * jnp.mean(energies, axis=1, keepdims=True)


def root_of_moments(moments: jax.Array, eps: Any) -> jax.Array:
    """The divisor of Adam's rule for a stack of moments v [N, *shape]: √v + eps + ρ² max v / √v.

    The maximum is each tensor's own. With ρ of 2⁸ roundings, what a change of basis leaves where
    there is no gradient moves nothing; a moment a hundred times ρ is changed by 1e-4 of it.
    """
    root = jnp.sqrt(moments)
    peak = jnp.max(root, axis=tuple(range(1, root.ndim)), keepdims=True, initial=0)
    floor = jnp.square(MOMENT_ROUNDINGS * jnp.finfo(root.dtype).eps * peak)
    floor = jnp.where(root > 0, floor / jnp.where(root > 0, root, 1), 0)
    return root + jnp.asarray(eps, root.dtype) + floor


def is_due(count: jax.Array, every: Any) -> jax.Array:
    """Whether what is done every so many steps is due now; always once counters saturate."""
    return (count % every == 0) | (count >= COUNTER_LIMIT)
