"""Products with Kronecker products."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_curv.linalg.factors import Dense, Diagonal, Factor


@functools.partial(jax.jit, static_argnames="precision")
def kron_matvec(
    factors: Sequence[ArrayLike | Factor],
    x: ArrayLike,
    *,
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST,
) -> jax.Array:
    """Multiplies `x` by a Kronecker product, one factor for each of its trailing axes.

    With row-major `vec`, `vec(y) = (F_1 ⊗ F_2 ⊗ …) vec(x)`; for a matrix, `y = F_1 x F_2ᵀ`. Nothing
    larger than the factors and `x` is formed.

    Args:
      factors: arrays, each dense [*batch, d, d] or a diagonal [*batch, d], for the last axes of `x`
        in order.
      x: array [*batch, d_1, d_2, …].
      precision: of the matrix products.

    Returns:
      The product, of the shape of `x`, in the type to which all promote.

    Raises:
      ValueError: if a factor does not fit its axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> linalg.kron_matvec([2 * jnp.eye(2), jnp.array([1.0, 3.0])], jnp.ones((2, 2))).tolist()
      [[2.0, 6.0], [2.0, 6.0]]
    """
    x = jnp.asarray(x)
    batch = x.ndim - len(factors)
    if batch < 0:
        raise ValueError(
            f"kron_matvec: got {len(factors)} factors for x of shape {x.shape}, which has fewer "
            "axes."
        )
    leading = x.shape[:batch]
    for axis, given in enumerate(factors):
        d = x.shape[batch + axis]
        if isinstance(given, Dense | Diagonal):
            factor = given
        else:
            array = jnp.asarray(given)
            factor = Diagonal(array) if array.ndim == batch + 1 else Dense(array)
        (array,) = factor
        expected = (*leading, d, d) if isinstance(factor, Dense) else (*leading, d)
        if array.shape != expected:
            raise ValueError(
                f"kron_matvec: factor {axis} of shape {array.shape} does not fit axis {axis} of x "
                f"of shape {x.shape}; expected {(*leading, d, d)} or the diagonal {(*leading, d)}."
            )
        x = factor.apply_along(x, axis, precision=precision)
    return x
