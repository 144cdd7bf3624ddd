"""Arithmetic of one leaf: its size, free of underflow and overflow, and what bounds it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.preconditioners._transformation.trees import wide_dtype
from optax_curv.typing import Number


def real(u: jax.Array) -> jax.Array:
    """Real numbers of the magnitudes of `u`.

    It is `u` itself where that is real, so that two reductions need no array of magnitudes.
    """
    if jnp.isrealobj(u):
        return u
    magnitudes = jnp.abs(u)
    return magnitudes.astype(wide_dtype(magnitudes.dtype))


def peak_of(u: jax.Array) -> jax.Array:
    """The largest magnitude, in float32 at least; 0 of no numbers."""
    u = real(u)
    peak = jnp.maximum(jnp.max(u, initial=0), -jnp.min(u, initial=0))
    return peak.astype(wide_dtype(u.dtype))


def norm_of(u: jax.Array) -> jax.Array:
    """The Euclidean norm; no square underflows or overflows on the way."""
    peak = peak_of(u)
    return peak * jnp.sqrt(jnp.sum(jnp.square(real(u) / jnp.where(peak == 0, 1, peak))))


def scaled(u: jax.Array, numerator: Number, denominator: jax.Array) -> jax.Array:
    """Scales to u / denominator · numerator in the dtype of `u`.

    The division comes first, as numerator / denominator could overflow.
    """
    per_one = u / jnp.where(denominator == 0, 1, denominator)
    return (per_one * jnp.asarray(numerator, denominator.dtype)).astype(u.dtype)


def with_rms(u: jax.Array, target: Number) -> jax.Array:
    """Scales to u · target / rms(u); zeros stay zero."""
    return scaled(u, target, norm_of(u) / max(1, u.size) ** 0.5)


def clipped(u: jax.Array, max_abs: Number) -> jax.Array:
    """Scales to u · min(1, max_abs / max|u|); a leaf within the bound is kept bit for bit."""
    peak = peak_of(u)
    limit = jnp.asarray(max_abs, peak.dtype)
    return jnp.where(peak > limit, scaled(u, limit, peak), u)


def boxed(bound: Number, update: Any, param: Any) -> Any:
    """The update with param + update in [-bound, bound], as `optax.apply_updates` rounds it.

    An update that stays inside is returned bit for bit, and None for None.
    """
    if update is None:
        return None
    dtype = wide_dtype(jnp.promote_types(update.dtype, param.dtype))
    box = jnp.asarray(_rounded_inwards(bound, param.dtype), dtype)
    param = jnp.asarray(param, dtype)
    total = param + update.astype(dtype)
    # Compilers may keep excess precision through a cast, never through reduce_precision.
    info = jnp.finfo(update.dtype)
    step = jax.lax.reduce_precision(jnp.clip(total, -box, box) - param, info.nexp, info.nmant)
    step = step.astype(update.dtype)
    inwards = jnp.nextafter(step, jnp.where(total > 0, -jnp.inf, jnp.inf).astype(update.dtype))
    step = jnp.where(jnp.abs(param + step) > box, inwards, step)
    return jnp.where(jnp.abs(total) > box, step, update)


def boxed_tree(bound: Number, updates: Any, params: Any) -> Any:
    """`boxed` for every leaf."""
    return jax.tree.map(
        lambda u, p: boxed(bound, u, p), updates, params, is_leaf=lambda x: x is None
    )


def _rounded_inwards(bound: Any, dtype: Any) -> Any:
    """The largest number of `dtype` that is not above `bound`."""
    xp, wide = (np, np.float64) if isinstance(bound, int | float) else (jnp, jnp.float32)
    bound = xp.asarray(bound, xp.promote_types(wide, jnp.result_type(bound)))
    with np.errstate(over="ignore"):
        rounded = bound.astype(dtype)
        return xp.where(
            rounded.astype(bound.dtype) > bound,
            xp.nextafter(rounded, xp.zeros_like(rounded)),
            rounded,
        )
