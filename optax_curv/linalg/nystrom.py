"""A randomised Nyström approximation of a positive semi-definite matrix, for preconditioning."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._compiler import full_matmul
from optax_curv.linalg.cholesky import cholesky, triangular_solve


class NystromSketch(NamedTuple):
    """The approximation U diag(s) Uᵀ of rank r.

    Attributes:
      basis: U, orthonormal columns, [n, r].
      values: s in falling order, [r]; zero where nothing was sketched yet.
    """

    basis: jax.Array
    values: jax.Array


def zero_sketch(size: int, rank: int, dtype: jax.typing.DTypeLike) -> NystromSketch:
    """Returns a sketch of nothing, whose basis is random: where the first one starts from."""
    rank = min(size, rank)
    start = jax.random.normal(jax.random.key(0), (size, rank), dtype)
    return NystromSketch(lapack.qr(start)[0], jnp.zeros([rank], dtype))


def refreshed_sketch(
    matvec: Callable[[jax.Array], jax.Array], sketch: NystromSketch
) -> NystromSketch:
    """Sketches A anew from the last basis, by r products v ↦ A v of vectors [n].

    With Y = A Ω for the old basis Ω the approximation is Y (Ωᵀ Y)⁺ Yᵀ (Frangella, Tropp and Udell
    2021, arXiv:2110.02820, algorithm 2.1), here with a shift that keeps it stable.

    Args:
      matvec: the map of a vector; it is called under `jax.vmap`.
      sketch: the last sketch.

    Returns:
      The new one.
    """
    omega = sketch.basis
    images = jax.vmap(matvec, in_axes=1, out_axes=1)(omega)
    shift = jnp.finfo(omega.dtype).eps ** 0.5 * jnp.max(jnp.abs(images)) / 10
    images += shift * omega
    factor, used = cholesky(full_matmul(omega.T, images))
    root = triangular_solve(factor, images.T, lower=True).T
    basis, roots, _ = lapack.svd(root)
    return NystromSketch(basis, jnp.maximum(roots**2 - shift - used, 0))


def nystrom_solve(sketch: NystromSketch, damping: jax.Array, r: jax.Array) -> jax.Array:
    """Returns (s_r + λ) U (s + λ)⁻¹ Uᵀ r + (I - U Uᵀ) r, close to a multiple of (A + λI)⁻¹ r."""
    inside = full_matmul(sketch.basis.T, r)
    share = (sketch.values[-1] + damping) / (sketch.values + damping) - 1
    return r + full_matmul(sketch.basis, share * inside)
