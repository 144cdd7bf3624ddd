"""What XLA does better on CPU with a hint; elsewhere these are the plain operations."""

import math

import jax
import jax.numpy as jnp


def laid_out(x) -> jax.Array:
    """`x` by itself, in order: XLA's faster product takes no transposed matrix, and one kernel serves what follows."""
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def cut_out(x, start: int, stack: tuple) -> jax.Array:
    """[*stack, ...] out of `x` [n, ...], from `start` on, by one kernel for all places: XLA would compile each anew."""
    size = math.prod(stack)
    if jax.default_backend() == "cpu":
        # XLA builds constants into what uses them where they are scalar, all alike or evenly
        # spaced.
        place = jax.lax.optimization_barrier(jnp.array([start, start + 2, start + 1], jnp.uint32))[
            0
        ]
        found = jax.lax.dynamic_slice_in_dim(x, place, size)
    else:
        found = x[start : start + size]
    return found.reshape(*stack, *x.shape[1:])


def materialize(tree):
    """The arrays of a tree, each computed once and stored before it is used."""
    return jax.lax.optimization_barrier(tree)


def not_recomputed(flag) -> jax.Array:
    """A flag behind a conditional, so that XLA on CPU does not derive it anew in every kernel that uses it."""
    zero = jax.lax.optimization_barrier(jnp.zeros([], jnp.int32))
    return jax.lax.cond(flag, lambda n: n, lambda n: n + 1, zero) == 0
