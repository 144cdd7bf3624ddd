"""Damping rules that several methods share."""

import jax
import jax.numpy as jnp
import numpy as np

RULES = ("pi", "trace")
TRACE_FLOOR = 1e-10  # the original's: the least that the "trace" rule adds to a factor


def mean_diagonal(factor: jax.Array, full: bool) -> jax.Array:
    """tr(F)/dim of a full factor [..., d, d] or of a diagonal one [..., d]."""
    if not full:
        return jnp.mean(factor, axis=-1)
    return jnp.sum(factor * jnp.eye(factor.shape[-1], dtype=factor.dtype), axis=(-2, -1)) / max(1, factor.shape[-1])


def factor_damping(
    rule, damping, input_mean, output_mean, elementwise: bool | np.ndarray = False
) -> tuple[jax.Array, jax.Array]:
    """What is added to the diagonals of A and of G, given their mean diagonals tr(A)/d_A and tr(G)/d_G.

    "pi" splits the damping λ of A ⊗ G as A + π√λ I and G + √λ/π I with π² = (tr A/d_A)/(tr G/d_G) (Martens and Grosse
    2015, §6.3); π is 1 where either trace is not positive. "trace" adds max(λ · tr(F)/d, 1e-10) to each factor. An
    element-wise layer (bool, for all or for each) has the input factor [[1]] and takes all of its damping at G.
    """
    if rule == "trace":
        # fmax, as the original's max: a NaN damping counts as the floor
        input_damping = jnp.fmax(damping * input_mean, TRACE_FLOOR)
        output_damping = jnp.fmax(damping * output_mean, TRACE_FLOOR)
        return jnp.where(elementwise, 0, input_damping), output_damping
    damping = jnp.maximum(damping, 0)
    tiny = jnp.finfo(input_mean.dtype).tiny
    # the quotient of roots, as the root of the quotient would overflow sooner
    ratio = jnp.sqrt(jnp.maximum(input_mean, tiny)) / jnp.sqrt(jnp.maximum(output_mean, tiny))
    pi = jnp.where((input_mean > 0) & (output_mean > 0), ratio, 1)
    root = jnp.sqrt(damping)
    return jnp.where(elementwise, 0, pi * root), jnp.where(elementwise, damping, root / pi)
