"""Conjugate gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg._checks import widen

LONGEST_WINDOW = 128  # of the progress rule, reached at 1280 iterations
MERIT_RATIO = 1.3  # of successive iterates whose merit is taken (Martens 2010, §4.6)


class ConjugateGradientInfo(NamedTuple):
    """How a solve ended.

    Attributes:
      iterations: iterations done, one product with the operator each (and one for `x0`), int32 [].
      residual_norm: norm of the last iterate's recursive residual, float [].
      returned: number of the iterate returned; the last one unless `merit` chose, int32 [].
    """

    iterations: jax.Array
    residual_norm: jax.Array
    returned: jax.Array


def conjugate_gradient(
    matvec,
    b,
    *,
    x0=None,
    max_iters,
    tol=0.0,
    atol=0.0,
    preconditioner=None,
    floor=0.0,
    min_progress=None,
    merit=None,
    keep_finite: bool = False,
):
    r"""Solves `A x = b` for a Hermitian positive definite operator by conjugate gradients.

    Each iteration is

        α = ⟨r, z⟩ / ⟨p, A p⟩,   x ← x + α p,   r ← r - α A p,   z = M r,   β = ⟨r, z⟩ / ⟨r, z⟩_old,
        p ← z + β p.

    It stops when `‖r‖ ≤ max(tol ‖b‖, atol)`, or after `max_iters`.

    With `floor` above zero both denominators are `max(floor, ·)` and the test `‖r‖ < max(tol ‖b‖,
    atol)` comes after the update, so at least one iteration is done: the original branch natural
    gradient (floor 1e-12, atol 1e-6), whose step is not invariant to the scale of b.

    Derivatives in `b` and in what `matvec` closes over are those of the equation: exact once
    converged. Norms do not overflow or underflow for any `b`. Under `jax.vmap` a lane that is done
    keeps its solution.

    Two rules are for solves far from convergence, of the minimum of φ(x) = ½⟨x, A x⟩ - ⟨b, x⟩. With
    `min_progress` ε it also stops at an iteration i > k where

        φ(x_i) < 0   and   (φ(x_i) - φ(x_{i-k})) / φ(x_i) < k ε,   k = max(10, i / 10).

    With `merit`, for one more copy of x, the iterate of least merit is returned, among the last and
    1, 2, 3, 4, 6, 8, 11, …, each 1.3 times the one before.

    Args:
      matvec: function from pytrees like `b`, in float32 at least as all arithmetic, to the same.
      b: pytree of arrays, real or complex.
      x0: pytree like `b` to start from; None: zero.
      max_iters: most iterations; a number, array or tracer, like the three below.
      tol: relative tolerance.
      atol: absolute tolerance.
      preconditioner: function `r ↦ M r` for a Hermitian positive definite M that approximates A⁻¹;
        None: the identity.
      floor: smallest denominator; see above.
      min_progress: ε, a number or tracer, 5e-4 in the paper; None: no such rule.
      merit: function from pytrees like `b` to a number; a NaN counts as the worst. None: the last
        iterate is returned.
      keep_finite: whether an iteration whose residual is not finite is not taken: then only
        `residual_norm` shows NaNs in `b` or `matvec`, and else the solution too.

    Returns:
      The solution, with the structure, shapes and float types of `b`, and a
      `ConjugateGradientInfo`.

    Raises:
      ValueError: if `x0`, or what `matvec` or `preconditioner` return, has another structure or
        shapes than `b`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> x, info = linalg.conjugate_gradient(lambda v: 2 * v, jnp.array([2.0, 4.0]), max_iters=5, tol=1e-6)
      >>> x.tolist(), int(info.iterations)
      ([1.0, 2.0], 1)

    References:
      Hestenes & Stiefel, *Methods of Conjugate Gradients for Solving Linear Systems*, 1952, (3:1).
      Martens, *Deep Learning via Hessian-Free Optimization*, 2010, §4.4 (`min_progress`) and §4.6
      (`merit`).
    """
    dtypes = jax.tree.map(lambda x: jnp.result_type(x, float), b)
    b = jax.tree.map(widen, b)
    x0 = None if x0 is None else _like("x0", x0, b)

    def operator(v):
        return _like("matvec", matvec(v), b)

    def precondition(r):
        return r if preconditioner is None else _like("preconditioner", preconditioner(r), b)

    def solve(operator, b):
        limits = (max_iters, tol, atol, floor, min_progress)
        return _iterate(operator, precondition, b, x0, limits, merit, keep_finite)

    def transpose_solve(_, b):  # Aᵀ is the conjugate of A
        x, info = solve(operator, jax.tree.map(jnp.conj, b))
        return jax.tree.map(jnp.conj, x), info

    is_complex = any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(b))
    backward = transpose_solve if is_complex else None
    linear_solve: Any = (
        jax.lax.custom_linear_solve
    )  # of which checkers of types think that it never returns
    x, info = linear_solve(operator, b, solve, backward, symmetric=not is_complex, has_aux=True)
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), x, dtypes), info


class _Search(NamedTuple):
    """The state of an iteration."""

    x: Any
    r: Any
    p: Any
    rz: jax.Array  # ⟨r, z⟩
    norm: jax.Array  # ‖r‖
    done: jax.Array
    values: jax.Array | None  # the last of φ, by the iteration modulo their number
    best: Any


class _Best(NamedTuple):
    """The iterate of least merit so far."""

    x: Any
    merit: jax.Array
    number: jax.Array
    following: jax.Array  # the next that is tried


def _iterate(operator, precondition, b, x, limits, merit, keep_finite):
    max_iters, tol, atol, floor, min_progress = limits
    leaves = jax.tree.leaves(b)
    real = jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype
    initial = jnp.zeros((), real)
    scale = _power_of_two(
        functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), initial=0) for x in leaves), initial)
    )
    b = _times(1 / scale, b)
    threshold = jnp.maximum(tol * jnp.sqrt(_dot(b, b)), atol / scale).astype(real)
    floor = jnp.asarray(floor, real)
    guarded, floor = floor > 0, floor / scale / scale

    def quotient(numerator, denominator):
        denominator = jnp.where(guarded, jnp.maximum(floor, denominator), denominator)
        return numerator / jnp.where(denominator == 0, jnp.inf, denominator)

    def unfinished(search):
        # a residual that is not finite runs one iteration, which carries it into the solution
        first = (search.done == 0) & (guarded | ~jnp.isfinite(search.norm))
        above = jnp.where(guarded, search.norm >= threshold, search.norm > threshold)
        if min_progress is not None:
            above &= ~_stalled(search.values, search.done, min_progress)
        if keep_finite:
            above &= jnp.isfinite(search.norm)
        return (search.done < max_iters) & (first | above)

    def iterate(search):
        product = operator(search.p)
        alpha = quotient(search.rz, _dot(search.p, product))
        x, r = _plus(search.x, alpha, search.p), _plus(search.r, -alpha, product)
        norm = jnp.sqrt(_dot(r, r))
        if keep_finite:
            x = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(norm), new, old), x, search.x)
        z = precondition(r)
        rz, done, values, best = _dot(r, z), search.done + 1, search.values, search.best
        if values is not None:  # an iteration lowers φ by α ⟨r, z⟩ / 2
            lower = values[search.done % LONGEST_WINDOW] - alpha * search.rz / 2
            values = values.at[done % LONGEST_WINDOW].set(lower)
        if best is not None:
            best = jax.lax.cond(done < best.following, lambda best, x: best, tried, best, x)
        p = _plus(z, quotient(rz, search.rz), search.p)
        return _Search(x, r, p, rz, norm, done, values, best)

    def tried(best, x):
        number, value = best.following, jnp.asarray(merit(_times(scale, x)), real)
        better = (value < best.merit) | (number == 1)
        following = jnp.maximum(number + 1, jnp.ceil(MERIT_RATIO * number).astype(number.dtype))
        chosen = jax.tree.map(lambda new, old: jnp.where(better, new, old), x, best.x)
        value = jnp.where(better, jnp.where(jnp.isnan(value), jnp.inf, value), best.merit)
        return _Best(chosen, value, jnp.where(better, number, best.number), following)

    if x is None:
        x, r = jax.tree.map(jnp.zeros_like, b), b
    else:
        x = _times(1 / scale, x)
        r = _plus(b, -1.0, operator(x))
        initial = -(_dot(x, b) + _dot(x, r)) / 2
    values = None if min_progress is None else jnp.zeros(LONGEST_WINDOW, real).at[0].set(initial)
    z, zero = precondition(r), jnp.int32(0)
    best = None if merit is None else _Best(x, jnp.asarray(jnp.inf, real), zero, jnp.int32(1))
    start = _Search(x, r, z, _dot(r, z), jnp.sqrt(_dot(r, r)), zero, values, best)
    search = jax.lax.while_loop(unfinished, iterate, start)
    x, number = search.x, search.done
    if best is not None:  # the last is tried too
        last = search.best._replace(following=jnp.maximum(number, 1))
        x, _, chosen, _ = tried(last, x)
        number = jnp.minimum(chosen, number)
    return _times(scale, x), ConjugateGradientInfo(search.done, search.norm * scale, number)


def _stalled(values, done, min_progress):
    """Whether φ fell by less than k ε of itself over the last k = max(10, done / 10) iterations."""
    window = jnp.clip(done // 10, 10, LONGEST_WINDOW - 1)
    now, before = values[done % LONGEST_WINDOW], values[(done - window) % LONGEST_WINDOW]
    return (done > window) & (now < 0) & (now - before > window * min_progress * now)


def _power_of_two(largest):
    """A power of two near `largest`, 1 for zero or what is not finite; dividing by it changes no digit."""
    limit = (
        -jnp.finfo(largest.dtype).minexp - 1
    )  # neither the power nor its inverse leaves the normal numbers
    exponent = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -limit, limit))


def _dot(x, y):
    products = jax.tree.map(
        lambda a, b: jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST).real, x, y
    )
    return functools.reduce(jnp.add, jax.tree.leaves(products), jnp.float32(0))


def _times(factor, x):
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, jnp.finfo(leaf.dtype).dtype), x)


def _plus(x, factor, y):
    return jax.tree.map(jnp.add, x, _times(factor, y))


def _like(what, tree, b):
    """`tree` in the float types of `b`, whose structure and shapes it must have."""
    given, expected = (jax.tree.map(jnp.shape, x) for x in (tree, b))
    if jax.tree.structure(tree) != jax.tree.structure(b) or jax.tree.leaves(
        given
    ) != jax.tree.leaves(expected):
        raise ValueError(
            f"conjugate_gradient: {what} has shapes {given}, but b has shapes {expected}."
        )
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, b)
