"""What XLA does better on CPU with a hint; elsewhere these are the plain operations."""

import jax
import jax.numpy as jnp


def laid_out(x) -> jax.Array:
    """`x` by itself, in order: XLA's faster product takes no transposed matrix, and one kernel serves what follows."""
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def cut_out(x, start: int, size: int) -> jax.Array:
    """`x[start : start + size]`, by one kernel for all places: XLA would compile what follows anew for each."""
    if jax.default_backend() != "cpu":
        return x[start : start + size]
    # XLA builds constants into what uses them where they are scalar, all alike or evenly spaced.
    place = jax.lax.optimization_barrier(jnp.array([start, start + 2, start + 1], jnp.uint32))[0]
    return jax.lax.dynamic_slice_in_dim(x, place, size)
