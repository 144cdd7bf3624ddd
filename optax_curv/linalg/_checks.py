"""What every kernel asks of its arrays: a float type that is wide enough, and shapes that fit."""

import jax
import jax.numpy as jnp


def widen(x) -> jax.Array:
    """`x` as a float or complex array of at least float32, the narrowest type the kernels compute in."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.result_type(x, float), jnp.float32))


def require_square(kernel: str, a):
    """Refuses an array whose last two axes are not one square matrix."""
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(
            f"{kernel}: expected square matrices [..., n, n], got an array of shape {a.shape}."
        )


def hermitian(a) -> jax.Array:
    """The symmetric or Hermitian part of square matrices."""
    return a / 2 + a.mT.conj() / 2  # halved first: the sum of two huge entries overflows


def symmetric_part(kernel: str, a) -> jax.Array:
    """The same of any array, in float32 at least."""
    a = widen(a)
    require_square(kernel, a)
    return hermitian(a)


def per_matrix(kernel: str, name: str, value, a) -> jax.Array:
    """A number, or one number for each matrix of `a`, as a real array of `a`'s batch shape."""
    value, batch = jnp.asarray(value, jnp.finfo(a.dtype).dtype), a.shape[:-2]
    try:
        return jnp.broadcast_to(value, batch)
    except ValueError:
        raise ValueError(
            f"{kernel}: {name} of shape {value.shape} does not fit the batch {batch} of matrices of shape {a.shape}."
        ) from None
