"""Types of what a state keeps of every axis: a factor and its root, or a diagonal factor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg._checks import widen
from optax_curv.linalg.factors import Diagonal, SymmetricPair
from optax_curv.preconditioners._axes.moments import Axes, square_norms
from optax_curv.preconditioners._transformation.averages import averaged, is_silent

Kept = tuple[SymmetricPair | Diagonal, ...]


class Measured(NamedTuple):
    """A stack after this step's gradients have been averaged into its factors.

    Attributes:
      kept: factors with the roots that they had.
      energies: of every dense axis tr(M R) of the new moment M and the old root R, [N].
      squares: the square norms of the gradients, [N].
    """

    kept: Kept
    energies: tuple[jax.Array, ...]
    squares: jax.Array


def zero_pairs(axes: Axes) -> Kept:
    """Zero factors and roots of a stack, of every axis."""

    def zeros(struct, diagonal):
        if diagonal:
            return Diagonal(jnp.zeros(struct.shape, struct.dtype))
        *stack, d, _ = struct.shape
        return SymmetricPair.zeros(stack, d, struct.dtype)

    return tuple(map(zeros, axes.factors, axes.diagonal))


def wide(kept: Any) -> Any:
    """The arrays of what is kept in float32 at least."""
    return jax.tree.map(widen, kept)


def factors_of(kept: Kept) -> tuple[jax.Array, ...]:
    """The factor of every axis, dense [N, d, d] or diagonal [N, d]."""
    return tuple(x.vector if isinstance(x, Diagonal) else x.factor for x in kept)


def measured(
    x: jax.Array, kept: Kept, moments: tuple[jax.Array, ...], weight: jax.Array
) -> Measured:
    """The moments of the gradients x averaged into the factors; see `Measured`."""
    # What is not finite enters no average: the moments of the "kl" rule are products of many. No
    # entry of a moment is larger than one on its diagonal.
    diagonals = [m if m.ndim == 2 else jnp.diagonal(m, axis1=-2, axis2=-1).real for m in moments]
    fine = jnp.isfinite(sum(jnp.sum(d, axis=-1) for d in diagonals))
    weights = jnp.where(fine, weight, 0)

    def of_axis(old, moment, diagonal):
        factor = wide(old)
        if isinstance(factor, Diagonal):
            moment = _begun(factor.vector, moment, diagonal, weights)
            vector = averaged(factor.vector, weights[:, None], moment)
            return Diagonal(vector.astype(old.dtype))
        kept = jnp.diagonal(factor.lower, axis1=1, axis2=2).real
        moment = _begun(kept, moment, diagonal, weights)
        return old.replace(factor=averaged(factor.lower, weights[:, None, None], moment))

    energies = tuple(
        jnp.sum((moment * wide(old).root.conj()).real, axis=(-2, -1))
        for old, moment in zip(kept, moments, strict=True)
        if not isinstance(old, Diagonal)
    )
    factors = tuple(map(of_axis, kept, moments, diagonals))
    return Measured(factors, energies, square_norms(x))


def _begun(
    kept: jax.Array, moment: jax.Array, diagonal: jax.Array, weights: jax.Array
) -> jax.Array:
    """The moments, those of rows that wake so that their average begins with one of a diagonal.

    A row that had no gradient for as long as its average remembers begins a new one. With the
    weight w, its step would be √(1/w) times that of the others until it has been seen 1/w times;
    with a moment of rank one and the weight one, so would be its steps in all other directions.

    Args:
      kept: the diagonals of factors, [N, d].
      moment: of the gradients, [N, d, d] or [N, d].
      diagonal: that of the moment, [N, d].
      weights: w, [N].
    """
    weights = weights[:, None]
    silent = is_silent(kept)
    others = ~jnp.all(silent, axis=1, keepdims=True)  # at the start there are none
    wakes = silent & ~is_silent(diagonal) & others & (weights > 0)

    def begun(wakes, moment, diagonal):
        own = jnp.where(wakes, diagonal / jnp.where(wakes, weights, 1), 0)
        if moment.ndim == 2:
            return jnp.where(wakes, own, moment)
        eye = jnp.eye(moment.shape[-1], dtype=moment.dtype)
        return jnp.where(wakes[:, :, None] | wakes[:, None], own[:, None] * eye, moment)

    # Rows wake hardly ever; where none does, moments are neither touched nor rounded otherwise.
    return jax.lax.cond(
        jnp.any(wakes), begun, lambda _, moment, __: moment, wakes, moment, diagonal
    )


def roots_with(kept: Kept, diagonal_root: Any) -> tuple[jax.Array, ...]:
    """The root of every axis, those of diagonal factors taken anew by `diagonal_root`."""
    return tuple(diagonal_root(x.vector) if isinstance(x, Diagonal) else x.root for x in wide(kept))
