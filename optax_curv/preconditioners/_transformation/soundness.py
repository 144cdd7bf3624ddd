"""Soundness: whether the numbers of a step are fit to enter a state or a parameter.

The package has one policy, which `transformation` applies: an unsound step gives a zero update and
leaves the state as it was, but for its counter `total_notfinite`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.preconditioners._transformation.trees import wide_dtype


def is_finite(*trees: Any) -> jax.Array:
    """Whether every inexact entry of the trees is finite: bool []."""
    # 0 · ∞ is NaN. On CPU, JAX 0.10's maximum of a large array drops a NaN; a sum keeps it.
    return _all_finite([jnp.sum(0 * x) for x in _inexact_leaves(trees)])


def is_squarable(*trees: Any) -> jax.Array:
    """Whether the sum of squares of every inexact leaf is finite, in float32 at least: bool [].

    No running average of second moments would forget larger numbers.
    """

    def squares(x):
        magnitude = jnp.abs(x)
        return jnp.sum(jnp.square(magnitude.astype(wide_dtype(magnitude.dtype))))

    return _all_finite([squares(x) for x in _inexact_leaves(trees)])


def _inexact_leaves(trees: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(trees)
    return [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def _all_finite(sums: list[jax.Array]) -> jax.Array:
    if not sums:
        return jnp.bool_(True)
    return jnp.all(jnp.stack([jnp.isfinite(x) for x in sums]))


def kept_unless(sound: jax.Array, new: Any, old: Any) -> Any:
    """The new arrays where the step is sound, the old ones elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(sound, x, y), new, old)
