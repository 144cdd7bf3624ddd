"""JAX's dense factorisations, of many matrices without a deadlock on CPU.

From JAX 0.10 on, LAPACK's kernels share a large batch out over the thread pool in which they run
themselves, and wait: as many at a time as there are threads (on two cores, two of K-FAC's factor
widths) wait for ever. So on CPU a large batch, also one that `jax.vmap` makes, is a loop over calls
too small to be shared out.
"""

import functools
import math

import jax
import jax.numpy as jnp

from optax_curv.linalg._compiler import cut_out

# Batches are shared out from 2e5 operations on; the dearest, `eigh`, takes about 25 n³ a matrix.
SMALL_CUBES = 8_000


def in_small_calls(kernel, derivable=None):
    """`kernel`, a function of arrays [*batch, m, n], with small calls alone on CPU.

    The loop over them has no transpose: derivatives are those of the kernel itself, or of
    `derivable`.
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

        return jax.lax.platform_dependent(
            *arrays, cpu=lambda *x: jax.lax.map(one, x, batch_size=few), default=kernel
        )

    @jax.custom_jvp
    def call(*arrays):
        batch = arrays[0].shape[:-2]
        results = in_calls(*(x.reshape(math.prod(batch), *x.shape[-2:]) for x in arrays))
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

    @call.defjvp
    def _derivative(primals, tangents):
        return jax.jvp(derivable or kernel, primals, tangents)

    return call


def for_each(function, *lists) -> list:
    """`function` of the arrays [*batch, n, n] of every entry of some lists.

    On CPU one by one, as LAPACK takes them anyway: what is done to arrays of one shape is compiled
    once, unlike what joins them and takes them apart. Elsewhere those of one width are one batch.
    """

    def one_by_one(*lists):
        return [function(*arrays) for arrays in zip(*lists, strict=True)]

    def in_batches(*lists):
        found = joined(
            function, *([x.reshape(-1, *x.shape[-2:]) for x in arrays] for arrays in lists)
        )
        stacks = [x.shape[:-2] for x in lists[0]]
        return [
            tuple(x.reshape(*stack, *x.shape[1:]) for x in part)
            for part, stack in zip(found, stacks, strict=True)
        ]

    return jax.lax.platform_dependent(*lists, cpu=one_by_one, default=in_batches)


@functools.cache
def _solver(**options):
    return in_small_calls(functools.partial(jax.lax.linalg.triangular_solve, **options))


cholesky = in_small_calls(functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False))
eigh = in_small_calls(functools.partial(jnp.linalg.eigh, symmetrize_input=False))
qr = in_small_calls(jnp.linalg.qr)
qr_triangle = in_small_calls(functools.partial(jnp.linalg.qr, mode="r"))
_solve = in_small_calls(jnp.linalg.solve)
svd = in_small_calls(functools.partial(jnp.linalg.svd, full_matrices=False))


def triangular_solve(t, b, **options):
    """`jax.lax.linalg.triangular_solve` for t and b of the same batch."""
    return _solver(**options)(t, b)


def solve(a, b):
    """Solves `a x = b` by an LU factorisation, for b [*batch, n] or [*batch, n, k] of the batch of a."""
    if b.ndim == a.ndim - 1:
        return _solve(a, b[..., None])[..., 0]
    return _solve(a, b)


def joined(kernel, *columns):
    """`kernel` of every row of columns of arrays [batch, ...], in one call for all rows of equal shapes."""
    rows = list(zip(*columns, strict=True))
    groups: dict = {}
    for place, row in enumerate(rows):
        groups.setdefault(tuple((x.shape[1:], x.dtype) for x in row), []).append(place)
    results: list = [None] * len(rows)
    for places in groups.values():
        found = kernel(*map(jnp.concatenate, zip(*(rows[place] for place in places), strict=True)))
        end = 0
        for place in places:
            start, end = end, end + len(rows[place][0])
            results[place] = jax.tree.map(
                functools.partial(cut_out, start=start, stack=(end - start,)), found
            )
    return results
