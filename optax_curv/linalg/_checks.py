"""Checks of every kernel's arguments: a float type that is wide enough, and shapes that fit."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def widen(x: ArrayLike) -> jax.Array:
    """Returns `x` as a float or complex array of at least float32, in which the kernels compute."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.result_type(x, float), jnp.float32))


def require_choice(kernel: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raises a ValueError where `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{kernel}: unknown {name}={value!r}; expected one of {tuple(choices)}.")


def require_square(kernel: str, a: jax.Array) -> None:
    """Raises a ValueError where the last two axes of `a` are not those of one square matrix."""
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(
            f"{kernel}: expected square matrices [..., n, n], got an array of shape {a.shape}."
        )


def hermitian(a: jax.Array) -> jax.Array:
    """Returns the symmetric or Hermitian part of square matrices."""
    return a / 2 + a.mT.conj() / 2  # halved first: the sum of two huge entries overflows


def symmetric_part(kernel: str, a: ArrayLike) -> jax.Array:
    """Returns the symmetric or Hermitian part of any square matrices, in float32 at least."""
    a = widen(a)
    require_square(kernel, a)
    return hermitian(a)


def per_matrix(kernel: str, name: str, value: ArrayLike, a: jax.Array) -> jax.Array:
    """Returns a number, or one for each matrix of `a`, as a real array of `a`'s batch shape."""
    value, batch = jnp.asarray(value, jnp.finfo(a.dtype).dtype), a.shape[:-2]
    try:
        return jnp.broadcast_to(value, batch)
    except ValueError:
        raise ValueError(
            f"{kernel}: {name} of shape {value.shape} does not fit the batch {batch} of matrices "
            f"of shape {a.shape}."
        ) from None
