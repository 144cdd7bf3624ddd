"""Products with Kronecker products."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="precision")
def kron_matvec(factors, x, *, precision=jax.lax.Precision.HIGHEST) -> jax.Array:
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
            f"kron_matvec: got {len(factors)} factors for x of shape {x.shape}, which has fewer axes."
        )
    axes, leading = list(range(x.ndim)), x.shape[:batch]
    for axis, factor in enumerate(factors, start=batch):
        factor, d = jnp.asarray(factor), x.shape[axis]
        if factor.shape == (*leading, d):
            x = x * factor.reshape(*leading, *(d if i == axis else 1 for i in axes[batch:]))
        elif factor.shape == (*leading, d, d):
            out = [*axes[:axis], x.ndim, *axes[axis + 1 :]]
            x = jnp.einsum(factor, [*axes[:batch], x.ndim, axis], x, axes, out, precision=precision)
        else:
            raise ValueError(
                f"kron_matvec: factor {axis - batch} of shape {factor.shape} does not fit axis {axis} of x of shape "
                f"{x.shape}; expected {(*leading, d, d)} or the diagonal {(*leading, d)}."
            )
    return x
