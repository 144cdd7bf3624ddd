"""Running averages: one rule for their weights, and when something is due."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.preconditioners._transformation.numbers import COUNTER_LIMIT, value_at


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


def weight_at(decay: Any, count: jax.Array, sound: jax.Array | bool = True) -> jax.Array:
    """The weight of this step's value, 0 where the step is unsound; see `running_weight`."""
    decay = value_at(decay, count, jnp.result_type(float))
    return jnp.where(sound, running_weight(decay, count), 0)


def averaged(old: jax.Array, weight: jax.Array, new: jax.Array) -> jax.Array:
    """The average old + weight (new - old); `old` where the weight is zero, whatever `new` is."""
    weight = jnp.asarray(weight, jnp.finfo(old.dtype).dtype)
    return jnp.where(weight > 0, old + weight * (new - old), old)


def is_due(count: jax.Array, every: Any) -> jax.Array:
    """Whether what is done every so many steps is due now; always once counters saturate."""
    return (count % every == 0) | (count >= COUNTER_LIMIT)
