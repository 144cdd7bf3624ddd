"""JAX's dense factorisations, of many matrices without a deadlock on CPU.

jaxlib 0.10 shares a batch of LAPACK calls out over XLA's thread pool (`ParallelBatchMap` in
jaxlib/cpu/lapack_kernels.cc), and the caller, itself a thread of this pool, blocks until all shares
are done. Where as many callers block as the pool has threads, no thread is left that could do a
share, and all wait for ever: on two cores, two of K-FAC's factor widths do, or one program in each
of two threads. From the commit "Don't try to parallelize LAPACK kernels in opensource builds" on
(July 2026, after jaxlib 0.11.0, https://github.com/jax-ml/jax/issues/36927) batches are not shared
out any more.

So with jaxlib 0.10 and 0.11 a batch on CPU, also one that `jax.vmap` makes, is a loop over calls
too small to be shared out; so are its derivatives, which are made of such calls. Nothing else in
the package calls LAPACK. This may go when jaxlib 0.12 is the lowest supported release.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.version import __version_info__ as JAXLIB

from optax_curv.linalg._chunks import in_chunks
from optax_curv.linalg._compiler import full_matmul, per_platform, slice_of_stack

SHARES_BATCHES = (0, 10) <= JAXLIB[:2] <= (0, 11)
# jaxlib shares batches out from an estimate of 2e5 operations on; the dearest, the singular values
# of a complex matrix, are estimated at 30 n³.
SMALL_CUBES = 6_000

Kernel = Callable[..., Any]


def in_small_calls(kernel: Kernel, jvp: Callable[[Any, Any], tuple[Any, Any]]) -> Kernel:
    """Returns `kernel`, a function of arrays [*batch, m, n], whose calls on CPU are all small.

    Args:
      kernel: a function of arrays of one batch shape to a tree of arrays of that batch shape.
      jvp: its derivative rule, as `jax.custom_jvp` takes it. The loop has no transpose, so that the
        tangents must come from plain operations and `jax.lax.custom_linear_solve`.
    """

    @jax.custom_batching.custom_vmap
    def small(*arrays):
        return kernel(*arrays)

    @small.def_vmap
    def _more(size, is_batched, *arrays):
        given = zip(arrays, is_batched, strict=True)
        arrays = [x if batched else jnp.broadcast_to(x, (size, *x.shape)) for x, batched in given]
        results = in_calls(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    def in_calls(*arrays):
        size, largest = len(arrays[0]), max(max(x.shape[1:]) for x in arrays)
        few = max(1, SMALL_CUBES // max(1, largest) ** 3)
        if size <= few:
            return small(*arrays)

        def one(matrices):
            return jax.tree.map(lambda x: x[0], small(*(x[None] for x in matrices)))

        return per_platform(
            *arrays, cpu=lambda *x: jax.lax.map(one, x, batch_size=few), other=kernel
        )

    @jax.custom_jvp
    def call(*arrays):
        if not SHARES_BATCHES:
            return kernel(*arrays)
        batch = arrays[0].shape[:-2]
        results = in_calls(*(x.reshape(math.prod(batch), *x.shape[-2:]) for x in arrays))
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

    call.defjvp(jvp)
    return call


# --- solves, whose tangents are solves again and have a transpose --------------------------------


def triangular_solve(
    t: jax.Array,
    b: jax.Array,
    *,
    left_side: bool,
    lower: bool,
    transpose_a: bool = False,
    conjugate_a: bool = False,
) -> jax.Array:
    """Calls `jax.lax.linalg.triangular_solve` for t [*batch, n, n] and b of the same batch."""
    return _triangular_solver(left_side, lower, transpose_a, conjugate_a)(t, b)


@functools.cache
def _triangular_solver(left_side: bool, lower: bool, transpose: bool, conjugate: bool) -> Kernel:
    def kernel(t, b):
        return jax.lax.linalg.triangular_solve(
            t, b, left_side=left_side, lower=lower, transpose_a=transpose, conjugate_a=conjugate
        )

    derivable = functools.partial(
        _linear_triangular_solve,
        left_side=left_side,
        lower=lower,
        transpose_a=transpose,
        conjugate_a=conjugate,
    )
    return in_small_calls(kernel, functools.partial(jax.jvp, derivable))


def _linear_triangular_solve(t, b, *, left_side, lower, transpose_a=False, conjugate_a=False):
    """`triangular_solve` with a transpose, for the tangents of a derivative rule."""

    def product(x):
        a = jnp.tril(t) if lower else jnp.triu(t)
        a = a.mT if transpose_a else a
        a = a.conj() if conjugate_a else a
        return full_matmul(a, x) if left_side else full_matmul(x, a)

    def solve(_, b):
        return _triangular_solver(left_side, lower, transpose_a, conjugate_a)(t, b)

    def transpose_solve(_, b):
        return _triangular_solver(left_side, lower, not transpose_a, conjugate_a)(t, b)

    return jax.lax.custom_linear_solve(product, b, solve, transpose_solve)


def solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """Solves `a x = b` by an LU factorisation, for b [*batch, n] or [*batch, n, k]."""
    if b.ndim == a.ndim - 1:
        return _solve(a, b[..., None])[..., 0]
    return _solve(a, b)


def _derivable_solve(a, b):
    def transpose_solve(_, b):
        return _solve(a.mT, b)

    return jax.lax.custom_linear_solve(
        lambda x: full_matmul(a, x), b, lambda _, b: _solve(a, b), transpose_solve
    )


_solve = in_small_calls(jnp.linalg.solve, functools.partial(jax.jvp, _derivable_solve))

# --- factorisations, with the derivatives of JAX --------------------------------------------------


def cholesky_tangent(factor: jax.Array, a_dot: jax.Array) -> jax.Array:
    """Returns dL = L Φ(L⁻¹ dA L⁻ᴴ), where Φ takes the lower triangle and half of the diagonal."""
    inner = _linear_triangular_solve(factor, a_dot, left_side=True, lower=True)
    inner = _linear_triangular_solve(
        factor, inner, left_side=False, lower=True, transpose_a=True, conjugate_a=True
    )
    halved_diagonal = inner * jnp.eye(inner.shape[-1], dtype=inner.dtype) / 2
    return full_matmul(factor, jnp.tril(inner, -1) + halved_diagonal)


def _cholesky_jvp(primals, tangents):
    factor = cholesky(*primals)
    return factor, cholesky_tangent(factor, *tangents)


def _eigh_jvp(primals, tangents):
    # dλ = diag(Vᴴ dA V), dV = V (F ∘ Vᴴ dA V) with F = 1 / (λ_j - λ_i) off the diagonal
    (a_dot,) = tangents
    found = values, vectors = eigh(*primals)
    inner = full_matmul(full_matmul(vectors.mT.conj(), a_dot), vectors)
    eye = jnp.eye(values.shape[-1], dtype=values.dtype)
    gaps = 1 / (eye + values[..., None, :] - values[..., :, None]) - eye
    values_dot = jnp.diagonal(inner, axis1=-2, axis2=-1).real
    return found, type(found)(values_dot, full_matmul(vectors, gaps * inner))


def _qr_jvp(primals, tangents):
    # With C = Qᴴ dX R⁻¹ and the skew-Hermitian S whose lower triangle is that of C,
    # dQ = Q (S - C) + dX R⁻¹ and dR = (C - S) R; columns beyond a square follow from R = Qᴴ X.
    (x,), (x_dot,) = primals, tangents
    found = q, r = qr(x)
    rows = r.shape[-2]
    square, more = x_dot[..., :rows], x_dot[..., rows:]
    scaled = _linear_triangular_solve(r[..., :rows], square, left_side=False, lower=False)
    inner = full_matmul(q.mT.conj(), scaled)
    below = jnp.tril(inner, -1)
    skew = below - below.mT.conj()
    skew = skew + jnp.eye(rows, dtype=r.dtype) * (inner - inner.real)
    q_dot = full_matmul(q, skew - inner) + scaled
    r_dot = full_matmul(inner - skew, r[..., :rows])
    more = full_matmul(q_dot.mT.conj(), x[..., rows:]) + full_matmul(q.mT.conj(), more)
    return found, type(found)(q_dot, jnp.concatenate([r_dot, more], axis=-1))


def _qr_triangle_jvp(primals, tangents):
    (_, r), (_, r_dot) = _qr_jvp(primals, tangents)
    return r, r_dot


def _svd_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    found = u, s, vh = svd(x)
    uh, v, real = u.mT.conj(), vh.mT.conj(), s[..., None, :]
    inner = full_matmul(full_matmul(uh, x_dot), v)
    eye = jnp.eye(s.shape[-1], dtype=s.dtype)
    gaps = 1 / ((real + real.mT) * (real - real.mT) + eye) - eye
    right, left = real * inner, real.mT * inner
    turned = 0.5 * (inner - inner.mT.conj()) * eye / jnp.where(real == 0, 1, real)
    u_dot = full_matmul(u, gaps * (right + right.mT.conj()) + turned)
    v_dot = full_matmul(v, gaps * (left + left.mT.conj()))
    if x.shape[-2] > x.shape[-1]:
        outside = full_matmul(x_dot, v)
        u_dot = u_dot + (outside - full_matmul(u, full_matmul(uh, outside))) / real
    if x.shape[-1] > x.shape[-2]:
        outside = full_matmul(x_dot.mT.conj(), u)
        v_dot = v_dot + (outside - full_matmul(v, full_matmul(vh, outside))) / real
    s_dot = jnp.diagonal(inner, axis1=-2, axis2=-1).real
    return found, type(found)(u_dot, s_dot, v_dot.mT.conj())


# Within a kernel that is itself called for few matrices at a time, these may be called as they are.
plain_cholesky = functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False)
plain_triangular_solve = jax.lax.linalg.triangular_solve

# Each takes one array [*batch, m, n]. `cholesky` and `eigh` read one triangle, `qr` and `svd` are
# the reduced ones, and `qr_triangle` is R alone.
cholesky = in_small_calls(plain_cholesky, _cholesky_jvp)
eigh = in_small_calls(functools.partial(jnp.linalg.eigh, symmetrize_input=False), _eigh_jvp)
qr = in_small_calls(jnp.linalg.qr, _qr_jvp)
qr_triangle = in_small_calls(functools.partial(jnp.linalg.qr, mode="r"), _qr_triangle_jvp)
svd = in_small_calls(functools.partial(jnp.linalg.svd, full_matrices=False), _svd_jvp)

# --- many arrays of several shapes ----------------------------------------------------------------


def for_each(function: Kernel, *lists: Sequence[Any]) -> list:
    """Applies `function` to corresponding entries of several lists of arrays [*batch, n, n].

    On CPU it loops, because LAPACK has no batched call and joining arrays would only add kernels to
    compile. Elsewhere arrays of one width are joined into one batched call.

    Args:
      function: of one array of each list, to a tuple of arrays that keep the batch axes.
      *lists: of equal lengths.
    """

    def chunked(*arrays):
        return in_chunks(function, *arrays)

    def one_by_one(*lists):
        return [chunked(*arrays) for arrays in zip(*lists, strict=True)]

    def in_batches(*lists):
        found = joined(
            chunked, *([x.reshape(-1, *x.shape[-2:]) for x in arrays] for arrays in lists)
        )
        stacks = [x.shape[:-2] for x in lists[0]]
        return [
            tuple(x.reshape(*stack, *x.shape[1:]) for x in part)
            for part, stack in zip(found, stacks, strict=True)
        ]

    return per_platform(*lists, cpu=one_by_one, other=in_batches)


def joined(kernel: Kernel, *columns: Iterable[jax.Array]) -> list:
    """Applies `kernel` to each row of several columns of arrays [batch, ...].

    All rows whose arrays have equal shapes are joined into one call. The result is the list of what
    `kernel` returns of each row, a tree of arrays [batch, ...].
    """
    rows = list(zip(*columns, strict=True))
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(tuple((x.shape[1:], x.dtype) for x in row), []).append(place)
    results: list = [None] * len(rows)
    for places in groups.values():
        arrays = zip(*(rows[place] for place in places), strict=True)
        found, end = kernel(*map(jnp.concatenate, arrays)), 0
        for place in places:
            start, end = end, end + len(rows[place][0])
            cut = functools.partial(slice_of_stack, start=start, stack=(end - start,))
            results[place] = jax.tree.map(cut, found)
    return results
