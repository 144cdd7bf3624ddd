"""Cholesky factors that never fail, and triangular solves."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._checks import (
    per_matrix,
    require_choice,
    require_square,
    symmetric_part,
    widen,
)
from optax_curv.linalg._compiler import equally_varying, full_matmul
from optax_curv.typing import SIDES, Number, Side

# From eps · max|a| to n · max|a|, where it is positive definite (Gershgorin), lie 16 + log10(n)
# tenfold steps in float64.
MAX_ATTEMPTS = 32


@jax.jit
def cholesky(a: ArrayLike, damping: Number = 0.0) -> tuple[jax.Array, jax.Array]:
    """Factors `a + damping I = L Lᴴ`, with as much more damping as it takes.

    Where a pivot is not positive, the damping is raised to `max(10 damping, eps max|a|)` (eps, the
    machine epsilon, for a zero matrix) and the matrix is factored again, each matrix of a batch on
    its own and inside the compiled program. So the factor of a finite matrix is finite, even where
    the matrix is singular, indefinite or zero.

    The derivative is that of the factor of `a + damping_used I`, in which `damping_used` counts as
    a constant where it was raised.

    Args:
      a: symmetric or Hermitian matrices [*batch, n, n], of which the symmetric part is taken;
        float32 at least is computed and returned.
      damping: number, or an array that broadcasts to [*batch]; zero by default.

    Returns:
      The lower triangular factor [*batch, n, n], NaN where `a` or `damping` is not finite, and the
      damping used [*batch].

    Raises:
      ValueError: if the matrices are not square, or the damping does not fit the batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> factor, damping_used = linalg.cholesky(-jnp.eye(2))
      >>> bool(damping_used > 1)
      True
    """
    a = symmetric_part("cholesky", a)
    return _factorize(a, per_matrix("cholesky", "damping", damping, a))


@jax.custom_jvp
def _factorize(a, damping):
    # Matrices that are not finite are replaced before the first attempt, as no damping would help.
    # They are found by a sum, because a maximum on CPU may drop a NaN.
    hopeless = ~jnp.isfinite(jnp.sum(0 * a, axis=(-2, -1)).real + damping)
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    hopeful = jnp.where(hopeless[..., None, None], eye, a), jnp.where(hopeless, 0, damping)
    factor, used, _ = _attempts(lapack.cholesky, *hopeful)
    return jnp.where(hopeless[..., None, None], jnp.nan, factor), jnp.where(hopeless, damping, used)


def _attempts(kernel, a, damping):
    """Factors with more and more damping; returns the factor, the damping and the pivots."""
    limits, eye = jnp.finfo(a.dtype), jnp.eye(a.shape[-1], dtype=a.dtype)
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), initial=0)
    first = jnp.where(largest > 0, jnp.maximum(limits.eps * largest, limits.tiny), limits.eps)
    alone = math.prod(a.shape[:-2]) == 1  # so that no matrix has to keep what it found before

    def succeeded(pivots):
        # A failure is NaN all over, and an overflow leaves its row without a finite pivot.
        return jnp.all((pivots > 0) & (pivots < jnp.inf), axis=-1)

    def attempt(carry):
        used, factor, pivots, attempts = carry
        tried = jnp.where(attempts == 0, used, jnp.maximum(10 * used, first))
        tried = tried if alone else jnp.where(succeeded(pivots), used, tried)
        found = kernel(a + tried[..., None, None] * eye)
        factor = found if alone else jnp.where(succeeded(pivots)[..., None, None], factor, found)
        return tried, factor, jnp.diagonal(factor, axis1=-2, axis2=-1).real, attempts + 1

    def unfinished(carry):
        *_, pivots, attempts = carry
        return jnp.any(~succeeded(pivots)) & (attempts < MAX_ATTEMPTS)

    no_factor, no_pivots = jnp.full_like(a, jnp.nan), jnp.zeros(a.shape[:-1], limits.dtype)
    *start, a = equally_varying((damping, no_factor, no_pivots, jnp.int32(0), a))
    used, factor, pivots, _ = jax.lax.while_loop(unfinished, attempt, tuple(start))
    return factor, used, pivots


@_factorize.defjvp
def _factorize_jvp(primals, tangents):
    (_, damping), (a_dot, damping_dot) = primals, tangents
    factor, used = _factorize(*primals)
    used_dot = jnp.where(used == damping, damping_dot, 0)
    a_dot = a_dot + used_dot[..., None, None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return (factor, used), (lapack.cholesky_tangent(factor, a_dot), used_dot)


@jax.jit
def cholesky_solve(factor: ArrayLike, b: ArrayLike) -> jax.Array:
    """Solves `L Lᴴ x = b` for the lower triangular factor L that `cholesky` returns.

    Args:
      factor: lower triangular matrices [*batch, n, n].
      b: one right-hand side [*batch, n] if it has one axis less than `factor`, else k of them
        [*batch, n, k].

    Returns:
      The solution, of the shape of `b`.

    Raises:
      ValueError: if the shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> factor, _ = linalg.cholesky(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
      >>> linalg.cholesky_solve(factor, jnp.array([8.0, 3.0])).tolist()
      [2.0, 3.0]
    """
    half = triangular_solve(factor, b, lower=True)
    return triangular_solve(jnp.conj(factor), half, lower=True, transpose=True)


def damped_inverse(a: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (a + d I)⁻¹ of Hermitian [*batch, n, n], d, and a bound below the condition number.

    The factorisation is that of `cholesky`, which raises the `damping` d [*batch] where it must.
    """
    inverse, used, ratio = _damped_inverse(a, damping[..., None, None])
    return inverse, used[..., 0, 0], ratio[..., 0, 0]


def _inverse_by(factorize, solve, a, damping):
    factor, used, pivots = factorize(a, damping[..., 0, 0])
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    root = solve(factor, eye, left_side=True, lower=True)
    ratio = jnp.square(jnp.max(pivots, -1) / jnp.min(pivots, -1))
    inverse = full_matmul(root.mT.conj(), root)
    return inverse, used[..., None, None], ratio[..., None, None]


def _derivable_attempts(a, damping):
    factor, used = _factorize(a, damping)
    return factor, used, jnp.diagonal(factor, axis1=-2, axis2=-1).real


_plain_inverse = functools.partial(
    _inverse_by,
    functools.partial(_attempts, lapack.plain_cholesky),
    lapack.plain_triangular_solve,
)
_derivable_inverse = functools.partial(_inverse_by, _derivable_attempts, lapack.triangular_solve)
_damped_inverse = lapack.in_small_calls(
    _plain_inverse, functools.partial(jax.jvp, _derivable_inverse)
)


@functools.partial(jax.jit, static_argnames=("lower", "transpose", "side"))
def triangular_solve(
    t: ArrayLike,
    b: ArrayLike,
    *,
    lower: bool,
    transpose: bool = False,
    side: Side = "left",
    zero_pivot: Number | None = None,
) -> jax.Array:
    """Solves `op(t) x = b` (side "left") or `x op(t) = b` (side "right") for a triangular matrix t.

    Args:
      t: matrices [*batch, n, n]; only the triangle that `lower` names is read.
      b: one right-hand side [*batch, n] if it has one axis less than `t`, else k of them: [*batch,
        n, k] on the left, [*batch, k, n] on the right. The batch axes of `t` and `b` may broadcast;
        float32 at least is computed and returned.
      lower: whether t is lower triangular.
      transpose: whether op(t) is the (unconjugated) transpose of t, and not t, the default.
      side: "left" (the default) or "right".
      zero_pivot: None (the default), or a number: an entry of x is zero where the magnitude of its
        pivot is at most this number.

    Returns:
      The solution x, of the shape of `b`.

    Raises:
      ValueError: if the shapes do not fit, or the side is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> t = jnp.array([[2.0, 1.0], [0.0, 4.0]])
      >>> linalg.triangular_solve(t, jnp.array([4.0, 8.0]), lower=False).tolist()
      [1.0, 2.0]
    """
    t, b = widen(t), widen(b)
    require_square("triangular_solve", t)
    require_choice("triangular_solve", "side", side, SIDES)
    left, given, n = side == "left", b.shape, t.shape[-1]
    along, across = (-2, -1) if left else (-1, -2)
    if vector := b.ndim == t.ndim - 1:
        b = jnp.expand_dims(b, across)
    if b.ndim < 2 or b.shape[along] != n or not _broadcasts(t.shape[:-2], b.shape[:-2]):
        wanted = "[..., n, k]" if left else "[..., k, n]"
        raise ValueError(
            f"triangular_solve: b of shape {given} does not fit t of shape {t.shape}; expected "
            f"[..., n] or {wanted}."
        )
    dtype = jnp.promote_types(t.dtype, b.dtype)
    batch = jnp.broadcast_shapes(t.shape[:-2], b.shape[:-2])
    if zero_pivot is not None:
        # The equation of such a pivot becomes x_i = 0.
        dead = jnp.abs(jnp.diagonal(t, axis1=-2, axis2=-1)) <= zero_pivot
        equations = jnp.expand_dims(dead, -2 if left == transpose else -1)
        t = jnp.where(equations, jnp.eye(n, dtype=t.dtype), t)
        b = jnp.where(jnp.expand_dims(dead, across), 0, b)
    t, b = (jnp.broadcast_to(x, batch + x.shape[-2:]).astype(dtype) for x in (t, b))
    x = lapack.triangular_solve(t, b, left_side=left, lower=lower, transpose_a=transpose)
    return jnp.squeeze(x, across) if vector else x


def _broadcasts(*shapes) -> bool:
    return all(
        1 in sizes or len(set(sizes)) == 1
        for sizes in zip(*(shape[::-1] for shape in shapes), strict=False)
    )
