"""Bounds on norms."""

import jax
import jax.numpy as jnp

from optax_curv.linalg.checks import widen

# In the worst case (all other eigenvalues equal, 1/n of the largest in the row) 0.83 of the norm for n = 300.
ITERATIONS = 4


@jax.jit
def spectral_norm_bound(a) -> jax.Array:
    """Lower bound on the spectral norm, from a few power iterations.

    From the row of largest norm, `x ← AᴴA x / ‖AᴴA x‖` four times; the bound is `‖A x‖`, which for any unit vector is
    at most `‖A‖₂` and here is at least the largest row norm. Nine products with a vector in all.

    Args:
      a: matrices [*batch, m, n], of any scale; float32 at least is computed and returned.

    Returns:
      The bounds, real [*batch]: 0 for a zero or an empty matrix, NaN where an entry is not finite.

    Raises:
      ValueError: if `a` has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> float(linalg.spectral_norm_bound(jnp.diag(jnp.array([1.0, -3.0]))))
      3.0

    References:
      Li, *Stochastic Hessian fittings with Lie groups*, 2024, arXiv:2402.11858: the bound by one such iteration.
    """
    a = widen(a)
    if a.ndim < 2:
        raise ValueError(f"spectral_norm_bound: expected matrices [..., m, n], got an array of shape {a.shape}.")
    limits = jnp.finfo(a.dtype)
    if 0 in a.shape[-2:]:
        return jnp.zeros(a.shape[:-2], limits.dtype)
    # Within these bounds neither the scale nor its inverse leaves the normal numbers.
    scale = jnp.clip(jnp.max(jnp.abs(a), axis=(-2, -1)), 4 * limits.tiny, limits.max / 4)
    a = a / scale[..., None, None]

    def norm(x):
        return jnp.linalg.norm(x, axis=-1, keepdims=True)

    def unit(x):
        return x / jnp.where(norm(x) == 0, 1, norm(x))

    def times(a, x):
        return jnp.matmul(a, x[..., None], precision=jax.lax.Precision.HIGHEST)[..., 0]

    longest = jnp.argmax(norm(a), axis=-2, keepdims=True)
    x = unit(jnp.take_along_axis(a, longest, axis=-2)[..., 0, :].conj())
    x = jax.lax.fori_loop(0, ITERATIONS, lambda _, x: unit(times(a.mT.conj(), times(a, x))), x)
    return norm(times(a, x))[..., 0] * scale
