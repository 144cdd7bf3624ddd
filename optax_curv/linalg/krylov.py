"""Conjugate gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg._checks import widen
from optax_curv.linalg._compiler import FULL, equally_varying, is_within_shard_map
from optax_curv.typing import MatVec, Number, Tree

LONGEST_WINDOW = 128  # of the progress rule, reached at 1280 iterations
MERIT_RATIO = 1.3  # of successive iterates whose merit is taken (Martens 2010, §4.6)


class ConjugateGradientInfo(NamedTuple):
    """Figures of a solve by conjugate gradients.

    Attributes:
      iterations: number of iterations, each with one product with the operator (`x0` takes one
        more), int32 [].
      residual_norm: norm of the residual r of the last iterate, float [].
      returned: number of the iterate that is the solution, the last one unless `merit` chose
        another, int32 [].
    """

    iterations: jax.Array
    residual_norm: jax.Array
    returned: jax.Array


def conjugate_gradient(
    matvec: MatVec,
    b: Tree,
    *,
    x0: Tree | None = None,
    max_iters: Number,
    tol: Number = 0.0,
    atol: Number = 0.0,
    preconditioner: MatVec | None = None,
    floor: Number = 0.0,
    min_progress: Number | None = None,
    merit: Callable[[Any], jax.Array] | None = None,
    keep_finite: bool = False,
) -> tuple[Any, ConjugateGradientInfo]:
    """Solves `A x = b` for a Hermitian positive definite operator by conjugate gradients.

    Each iteration is

        α = ⟨r, z⟩ / ⟨p, A p⟩,   x ← x + α p,   r ← r - α A p,   z = M r,   β = ⟨r, z⟩ / ⟨r, z⟩_old,
        p ← z + β p.

    It stops when `‖r‖ ≤ max(tol ‖b‖, atol)`, or after `max_iters`.

    With `floor` above zero both denominators are `max(floor, ·)` and the test `‖r‖ < max(tol ‖b‖,
    atol)` comes after the update, so at least one iteration is done: this is the original branch
    natural gradient (floor 1e-12, atol 1e-6), whose step is not invariant to the scale of b.

    Derivatives in `b` and in what `matvec` closes over are those of the equation, and exact once
    the solve has converged; within a `jax.shard_map` they are those of the iteration, and forward
    only. Norms do not overflow or underflow for any `b`. Under `jax.vmap` a lane
    that has stopped keeps its solution.

    Two rules are for solves far from convergence, of the minimum of φ(x) = ½⟨x, A x⟩ - ⟨b, x⟩. With
    `min_progress` ε the solve also stops at an iteration i > k where

        φ(x_i) < 0   and   (φ(x_i) - φ(x_{i-k})) / φ(x_i) < k ε,   k = max(10, i / 10).

    With `merit`, at the cost of one more copy of x, the solution is the iterate of least merit
    among the last one and numbers 1, 2, 3, 4, 6, 8, 11, …, each 1.3 times the one before.

    Args:
      matvec: function v ↦ A v from a pytree like `b`, in float32 at least as all arithmetic is, to
        such a pytree.
      b: pytree of arrays, real or complex.
      x0: pytree like `b` to start from; None (the default) starts from zero.
      max_iters: most iterations, a number, array or tracer as `tol`, `atol` and `floor` are.
      tol: relative tolerance; zero by default.
      atol: absolute tolerance; zero by default.
      preconditioner: function `r ↦ M r` for a Hermitian positive definite M that approximates A⁻¹;
        None (the default) is the identity.
      floor: smallest denominator, see above; zero, the default, leaves them alone.
      min_progress: ε, a number or tracer, 5e-4 in the paper; None (the default) omits this rule.
      merit: function from pytrees like `b` to a number, of which a NaN counts as the worst; None
        (the default) returns the last iterate.
      keep_finite: whether an iteration whose residual is not finite leaves the solution as it was;
        then only `residual_norm` shows that `b` or `matvec` was not finite. By default the solution
        shows it, too.

    Returns:
      The solution, with the structure, shapes and float types of `b`, and a
      `ConjugateGradientInfo`.

    Raises:
      ValueError: if `x0`, or what `matvec` or `preconditioner` return, has another structure or
        shapes than `b`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> b = jnp.array([2.0, 4.0])
      >>> x, info = linalg.conjugate_gradient(lambda v: 2 * v, b, max_iters=5, tol=1e-6)
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
    linear_solve: Any = jax.lax.custom_linear_solve  # pyright takes it for never returning
    if is_within_shard_map():  # where it wants that all constants of `matvec` vary as b does
        x, info = solve(operator, b)
    else:
        x, info = linear_solve(operator, b, solve, backward, symmetric=not is_complex, has_aux=True)
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), x, dtypes), info


class _Search(NamedTuple):
    """The state of the iteration.

    Attributes:
      x: the iterate.
      r: its residual.
      p: the direction of search.
      rz: ⟨r, z⟩.
      norm: ‖r‖.
      done: number of iterations.
      values: φ of the last iterates, by their number modulo `LONGEST_WINDOW`, or None.
      best: the iterate of least merit as a `_Best`, or None.
    """

    x: Any
    r: Any
    p: Any
    rz: jax.Array
    norm: jax.Array
    done: jax.Array
    values: jax.Array | None
    best: Any


class _Best(NamedTuple):
    """The iterate of least merit so far.

    Attributes:
      x: the iterate.
      merit: its merit.
      number: its number.
      following: number of the next iterate whose merit is computed.
    """

    x: Any
    merit: jax.Array
    number: jax.Array
    following: jax.Array


def _iterate(operator, precondition, b, x, limits, merit, keep_finite):
    max_iters, tol, atol, floor, min_progress = limits
    leaves = jax.tree.leaves(b)
    real = jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype
    sizes = (jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves)
    scale = _power_of_two(functools.reduce(jnp.maximum, sizes, jnp.zeros((), real)))
    b = _times(1 / scale, b)
    threshold = jnp.maximum(tol * jnp.sqrt(_dot(b, b)), atol / scale).astype(real)
    floor = jnp.asarray(floor, real)
    guarded, floor = floor > 0, floor / scale / scale

    def quotient(numerator, denominator):
        denominator = jnp.where(guarded, jnp.maximum(floor, denominator), denominator)
        return numerator / jnp.where(denominator == 0, jnp.inf, denominator)

    def unfinished(search):
        # A first residual that is not finite runs one iteration, which makes the solution NaN, too.
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
        return _better(best, x, jnp.asarray(merit(_times(scale, x)), real))

    x = None if x is None else _times(1 / scale, x)
    start = _start(operator, precondition, b, x, min_progress is not None, merit is not None)
    search = jax.lax.while_loop(unfinished, iterate, equally_varying(start))
    x, number = search.x, search.done
    if merit is not None:  # of the last iterate in any case
        last = search.best._replace(following=jnp.maximum(number, 1))
        x, _, chosen, _ = tried(last, x)
        number = jnp.minimum(chosen, number)
    return _times(scale, x), ConjugateGradientInfo(search.done, search.norm * scale, number)


def _start(operator, precondition, b, x, with_values, with_merit):
    """The search before its first iteration, from x, or from zero where that is None."""
    real = jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves(b))).dtype
    values = best = None
    if x is None:
        x, r, initial = jax.tree.map(jnp.zeros_like, b), b, jnp.zeros((), real)
    else:
        r = _plus(b, -1.0, operator(x))
        initial = -(_dot(x, b) + _dot(x, r)) / 2
    if with_values:
        values = jnp.zeros(LONGEST_WINDOW, real).at[0].set(initial)
    if with_merit:
        best = _Best(x, jnp.asarray(jnp.inf, real), jnp.int32(0), jnp.int32(1))
    z = precondition(r)
    return _Search(x, r, z, _dot(r, z), jnp.sqrt(_dot(r, r)), jnp.int32(0), values, best)


def _better(best, x, merit):
    """The better one of the best iterate so far and iterate `best.following`, which is `x`."""
    number = best.following
    better = (merit < best.merit) | (number == 1)
    following = jnp.maximum(number + 1, jnp.ceil(MERIT_RATIO * number).astype(number.dtype))
    chosen = jax.tree.map(lambda new, old: jnp.where(better, new, old), x, best.x)
    merit = jnp.where(better, jnp.where(jnp.isnan(merit), jnp.inf, merit), best.merit)
    return _Best(chosen, merit, jnp.where(better, number, best.number), following)


def _stalled(values, done, min_progress):
    """Whether φ fell by less than k ε of itself over the last k = max(10, done / 10) iterations."""
    window = jnp.clip(done // 10, 10, LONGEST_WINDOW - 1)
    now, before = values[done % LONGEST_WINDOW], values[(done - window) % LONGEST_WINDOW]
    return (done > window) & (now < 0) & (now - before > window * min_progress * now)


def _power_of_two(largest):
    """A power of two near `largest`, by which to divide without rounding; 1 where there is none."""
    # Neither the power nor its inverse leaves the normal numbers.
    limit = -jnp.finfo(largest.dtype).minexp - 1
    exponent = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -limit, limit))


def _dot(x, y):
    products = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision=FULL).real, x, y)
    return functools.reduce(jnp.add, jax.tree.leaves(products), jnp.float32(0))


def _times(factor, x):
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, jnp.finfo(leaf.dtype).dtype), x)


def _plus(x, factor, y):
    return jax.tree.map(jnp.add, x, _times(factor, y))


def _like(what, tree, b):
    """Returns `tree` in the float types of `b`, whose structure and shapes it must have."""
    given, expected = (jax.tree.map(jnp.shape, x) for x in (tree, b))
    same_structure = jax.tree.structure(tree) == jax.tree.structure(b)
    if not same_structure or jax.tree.leaves(given) != jax.tree.leaves(expected):
        raise ValueError(
            f"conjugate_gradient: {what} has shapes {given}, but b has shapes {expected}."
        )
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, b)
