"""Conjugate gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg.checks import widen


class ConjugateGradientInfo(NamedTuple):
    """How a solve ended.

    Attributes:
      iterations: iterations done, one product with the operator each (and one more if `x0` was given), int32 [].
      residual_norm: Euclidean norm of the recursive residual, float [].
    """

    iterations: jax.Array
    residual_norm: jax.Array


def conjugate_gradient(matvec, b, *, x0=None, max_iters, tol=0.0, atol=0.0, preconditioner=None, floor=0.0):
    r"""Solves `A x = b` for a Hermitian positive definite operator by conjugate gradients.

    Each iteration is

        α = ⟨r, z⟩ / ⟨p, A p⟩,   x ← x + α p,   r ← r - α A p,   z = M r,   β = ⟨r, z⟩ / ⟨r, z⟩_old,   p ← z + β p.

    It stops when `‖r‖ ≤ max(tol ‖b‖, atol)`, or after `max_iters`.

    With `floor` above zero both quotients' denominators are `max(floor, ·)`, the test `‖r‖ < max(tol ‖b‖, atol)` comes
    after the update, and so at least one iteration is done: the guarded rule of the original branch natural gradient
    (floor 1e-12, atol 1e-6), kept for parity. Its step is not invariant to the scale of b.

    The solution may be differentiated in `b` and in what `matvec` closes over, through the equation it solves; that is
    exact for a converged solution. Norms neither overflow nor underflow for any representable `b`. Under `jax.vmap` a
    lane that is done keeps its solution.

    Args:
      matvec: function from pytrees like `b` to pytrees like `b`. It gets float32 where `b` is narrower than that; all
        arithmetic is in float32 at least.
      b: pytree of arrays, real or complex.
      x0: pytree like `b` to start from; None: zero.
      max_iters: most iterations; a number, array or tracer, like the three below.
      tol: relative tolerance.
      atol: absolute tolerance.
      preconditioner: function `r ↦ M r` for a Hermitian positive definite M that approximates A⁻¹; None: the identity.
      floor: smallest denominator; see above.

    Returns:
      The solution, with the structure, shapes and float types of `b`, and a `ConjugateGradientInfo`.

    Raises:
      ValueError: if `matvec` or `preconditioner` return, or `x0` has, another structure or other shapes than `b`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> x, info = linalg.conjugate_gradient(lambda v: 2 * v, jnp.array([2.0, 4.0]), max_iters=5, tol=1e-6)
      >>> x.tolist(), int(info.iterations)
      ([1.0, 2.0], 1)

    References:
      Hestenes & Stiefel, *Methods of Conjugate Gradients for Solving Linear Systems*, 1952, (3:1).
    """
    dtypes = jax.tree.map(lambda x: jnp.result_type(x, float), b)
    b = jax.tree.map(widen, b)
    x0 = None if x0 is None else _like("x0", x0, b)

    def operator(v):
        return _like("matvec", matvec(v), b)

    def precondition(r):
        return r if preconditioner is None else _like("preconditioner", preconditioner(r), b)

    def solve(operator, b):
        return _iterate(operator, precondition, b, x0, max_iters, tol, atol, floor)

    def transpose_solve(_, b):  # Aᵀ is the conjugate of A
        x, info = solve(operator, jax.tree.map(jnp.conj, b))
        return jax.tree.map(jnp.conj, x), info

    is_complex = any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(b))
    backward = transpose_solve if is_complex else None
    x, info = jax.lax.custom_linear_solve(operator, b, solve, backward, symmetric=not is_complex, has_aux=True)
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), x, dtypes), info


def _iterate(operator, precondition, b, x, max_iters, tol, atol, floor):
    leaves = jax.tree.leaves(b)
    real = jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), initial=0) for x in leaves), jnp.zeros((), real))
    scale = _power_of_two(largest)
    b = _times(1 / scale, b)
    threshold = jnp.maximum(tol * jnp.sqrt(_dot(b, b)), atol / scale).astype(real)
    floor = jnp.asarray(floor, real)
    guarded, floor = floor > 0, floor / scale / scale

    def quotient(numerator, denominator):
        denominator = jnp.where(guarded, jnp.maximum(floor, denominator), denominator)
        return numerator / jnp.where(denominator == 0, jnp.inf, denominator)

    def unfinished(carry):
        *_, norm, count = carry
        # A residual that is not finite runs one iteration, which carries it into the solution, and no more.
        first = (count == 0) & (guarded | ~jnp.isfinite(norm))
        return (count < max_iters) & (first | jnp.where(guarded, norm >= threshold, norm > threshold))

    def iterate(carry):
        x, r, p, rz, _, count = carry
        product = operator(p)
        alpha = quotient(rz, _dot(p, product))
        x, r = _plus(x, alpha, p), _plus(r, -alpha, product)
        z = precondition(r)
        rz_new = _dot(r, z)
        return x, r, _plus(z, quotient(rz_new, rz), p), rz_new, jnp.sqrt(_dot(r, r)), count + 1

    if x is None:
        x, r = jax.tree.map(jnp.zeros_like, b), b
    else:
        x = _times(1 / scale, x)
        r = _plus(b, -1.0, operator(x))
    z = precondition(r)
    start = (x, r, z, _dot(r, z), jnp.sqrt(_dot(r, r)), jnp.int32(0))
    x, *_, norm, count = jax.lax.while_loop(unfinished, iterate, start)
    return _times(scale, x), ConjugateGradientInfo(count, norm * scale)


def _power_of_two(largest):
    """A power of two near `largest`; 1 for zero or what is not finite. Dividing by it changes no digit."""
    limit = -jnp.finfo(largest.dtype).minexp - 1  # neither the power nor its inverse leaves the normal numbers
    exponent = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -limit, limit))


def _dot(x, y):
    products = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST).real, x, y)
    return sum(jax.tree.leaves(products), jnp.float32(0))


def _times(factor, x):
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, jnp.finfo(leaf.dtype).dtype), x)


def _plus(x, factor, y):
    return jax.tree.map(jnp.add, x, _times(factor, y))


def _like(what, tree, b):
    """`tree` in the float types of `b`, if its structure and shapes are those of `b`."""
    given, expected = (jax.tree.map(jnp.shape, x) for x in (tree, b))
    fits = jax.tree.structure(tree) == jax.tree.structure(b)
    if not fits or jax.tree.leaves(given) != jax.tree.leaves(expected):
        raise ValueError(f"conjugate_gradient: {what} has shapes {given}, but b has shapes {expected}.")
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, b)
