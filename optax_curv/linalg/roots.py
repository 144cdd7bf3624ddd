"""Roots of symmetric matrices, and a bound on norms."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._checks import hermitian, per_matrix, require_choice, symmetric_part, widen
from optax_curv.linalg._chunks import in_chunks
from optax_curv.linalg._compiler import full_matmul, per_platform
from optax_curv.typing import ROOT_METHODS, Number, RootMethod

NEWTON_ITERATIONS = 100  # at condition 1e12 about 30
# The lower bound of the eigenvalues for which a Newton step is scaled: a smaller one would need
# fewer steps still, but T of so large a condition costs accuracy.
NEWTON_SCALING = 0.1
NEWTON_SCALED = 0.9  # below this bound M need not get nearer to the identity at every step
QR_ITERATIONS = 100
# In the worst case (all other eigenvalues equal, 1/n of the largest in the row) four give 0.83 of
# the norm for n = 300.
POWER_ITERATIONS = 4


def inverse_root(
    a: ArrayLike,
    p: Number,
    *,
    damping: Number,
    relative: bool = False,
    method: RootMethod = "eigh",
) -> jax.Array:
    """Computes the root `(a + damping I)^(-1/p)` of a positive semi-definite matrix.

    "eigh" takes the power of the eigenvalues. Those that rounding cannot tell from zero (at most
    `n eps λ_max`, negative ones too) count as zero before the damping is added. An eigenvalue that
    is zero after it stays zero, as in a pseudo-inverse: without damping the root of a singular
    matrix is finite, and that of the zero matrix is zero. The derivative is finite where
    eigenvalues coincide, too.

    "newton" uses matrix products alone, for accelerators that have little else. With λ an upper
    bound of the largest eigenvalue, from X = λ^(-1/p) I and M = (a + damping I) / λ, it iterates

        T = α ((p + 1) I - αᵖ M) / p,   X ← X T,   M ← Tᵖ M,

    until M gets no nearer to the identity. With l a lower bound of the eigenvalues of M¹ᐟᵖ, but 0.1
    at least, αᵖ = (p + 1) (1 - l) / (1 - lᵖ⁺¹) takes both ends of [l, 1] to the same place, which
    is the nearest to 1 that is possible; with α = 1 twice as many steps are needed. The method
    needs a whole p, and a damping above rounding: n eps λ_max at least.

    "qr" takes 100 steps of orthogonal iteration, Q ← QR(a Q) from Q = I, and returns
    Q f(diag(Qᵀ a Q)) Qᵀ. It does not tell eigenvalues apart that differ by less than a hundredth,
    which moves the root by less than 1e-2 of its norm.

    Args:
      a: symmetric or Hermitian matrices [*batch, n, n], of which the symmetric part is taken;
        float32 at least is computed and returned.
      p: order of the root, a positive number, or an array that broadcasts to [*batch]; 1 gives the
        inverse. For "newton" a Python number that is whole.
      damping: number, or an array that broadcasts to [*batch].
      relative: whether the damping is in units of each matrix's largest eigenvalue (for "newton" of
        its `spectral_norm_bound`); False by default. Then only negative eigenvalues count as zero,
        as the damping stands above rounding.
      method: "eigh" (the default), "newton" or "qr".

    Returns:
      The symmetric root [*batch, n, n], NaN where `a` is not finite.

    Raises:
      ValueError: if the matrices are not square, damping or p do not fit the batch, p is a Python
        number that is not positive, p is not whole for "newton", or the method is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> linalg.inverse_root(jnp.diag(jnp.array([4.0, 0.0])), 2, damping=0.0).tolist()
      [[0.5, 0.0], [0.0, 0.0]]

    References:
      Guo & Higham, *A Schur-Newton method for the matrix pth root and its inverse*, 2006, (1.6):
      the coupled iteration, with α = 1. Chen & Chow, *A stable scaling of Newton-Schulz for
      improving the sign function computation of a Hermitian matrix*, 2014: α for p = 2.
    """
    require_choice("inverse_root", "method", method, ROOT_METHODS)
    if isinstance(p, int | float) and not p > 0:
        raise ValueError(f"inverse_root: expected p > 0, got {p=}.")
    if method == "newton":
        if not isinstance(p, int | float) or p != round(p):
            raise ValueError(
                f'inverse_root: method="newton" needs a whole number p, got {p=}; use '
                'method="eigh".'
            )
        return _newton_root(a, round(p), damping, relative)
    return _inverse_root(a, p, damping, relative, method)


@functools.partial(jax.jit, static_argnames=("relative", "method"))
def _inverse_root(a, p, damping, relative, method):
    a = symmetric_part("inverse_root", a)
    p = per_matrix("inverse_root", "p", p, a)
    damping = per_matrix("inverse_root", "damping", damping, a)
    if method == "qr":
        basis = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

        def step(_, basis):
            return orthogonal_iteration(a, basis)

        basis = jax.lax.fori_loop(0, QR_ITERATIONS, step, basis)
        return hermitian(power_in_basis(a, basis, -1 / p, damping, relative)[0])
    if relative:
        return hermitian(relative_power(a, -1 / p, damping)[0])
    return _power(a, -1 / p, damping)


def factor_roots(
    factors: Sequence[jax.Array],
    bases: Sequence[jax.Array | None],
    exponent: Number,
    damping: Number,
    method: RootMethod,
    drop_below: Number | None = None,
) -> list[tuple[jax.Array, jax.Array, jax.Array | None]]:
    """Computes R = (a + damping λ_max I)^(-exponent) of each of several factors.

    Args:
      factors: Hermitian arrays a [*batch, n, n], each of any width.
      bases: for "qr" an orthonormal basis [*batch, n, n] for each factor, near to its eigenvectors;
        else a list of anything.
      exponent: a number.
      damping: a number, in units of the largest eigenvalue.
      method: as in `inverse_root`; "qr" takes one step of orthogonal iteration from the basis.
      drop_below: None, or a share of the largest eigenvalue below which the power is 0; not for
        "newton".

    Returns:
      For each factor R, tr(a R) and the basis after the step, or None for the other methods.
    """

    def numbers(a):
        dtype = jnp.finfo(a.dtype).dtype
        powers, added = (jnp.asarray(x, dtype) for x in (exponent, damping))
        return jnp.broadcast_to(-powers, a.shape[:-2]), jnp.broadcast_to(added, a.shape[:-2])

    def root(a):
        if method == "newton":
            found = inverse_root(a, 1 / exponent, damping=damping, relative=True, method=method)
            return found, jnp.sum((a * found.conj()).real, axis=(-2, -1))
        return relative_power(a, *numbers(a), drop_below)

    def tracked(a, basis):
        basis = orthogonal_iteration(a, basis.astype(a.dtype))
        return *power_in_basis(a, basis, *numbers(a), True, drop_below), basis

    def one_by_one(*factors):
        return [in_chunks(root, a) for a in factors]

    def in_one_width(*factors):
        width = max(a.shape[-1] for a in factors)
        padded = [_zero_padded(a, width) for a in factors]
        found = zip(lapack.for_each(root, padded), factors, strict=True)
        return [(r[..., : a.shape[-1], : a.shape[-1]], trace) for (r, trace), a in found]

    if method == "qr":
        return lapack.for_each(tracked, factors, bases)
    # Elsewhere than on CPU one call for a larger width costs less than a call for each width.
    found = per_platform(*factors, cpu=one_by_one, other=in_one_width)
    return [(*of_factor, None) for of_factor in found]


def _zero_padded(a, width):
    more = width - a.shape[-1]
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, more), (0, more)])


@jax.jit
def orthogonal_iteration(a: jax.Array, basis: jax.Array) -> jax.Array:
    """Takes one step Q ← QR(a Q) towards the eigenvectors, the largest eigenvalue first.

    The columns are sorted by qᴴ a q before.

    Args:
      a: Hermitian positive semi-definite matrices [*batch, n, n].
      basis: orthonormal columns [*batch, n, n].

    Returns:
      The new basis.
    """
    largest = jnp.max(jnp.diagonal(a, axis1=-2, axis2=-1).real, axis=-1, initial=0)[..., None, None]
    image = full_matmul(a / jnp.where(largest > 0, largest, 1), basis)
    order = jnp.argsort(-jnp.sum((basis.conj() * image).real, axis=-2), axis=-1)
    return lapack.qr(jnp.take_along_axis(image, order[..., None, :], axis=-1))[0]


@jax.jit
def eigenvectors(a: jax.Array, basis: jax.Array) -> jax.Array:
    """Computes the eigenvectors, the largest eigenvalue first, in place of a step towards them.

    Args:
      a: Hermitian matrices [*batch, n, n].
      basis: orthonormal columns [*batch, n, n], kept where no eigenvectors are found.

    Returns:
      The new basis.
    """
    vectors = lapack.eigh(a)[1][..., ::-1]
    found = jnp.all(jnp.isfinite(vectors), axis=(-2, -1), keepdims=True)
    return jnp.where(found, vectors, basis)


@functools.partial(jax.jit, static_argnames="relative")
def power_in_basis(
    a: jax.Array,
    basis: jax.Array,
    exponent: jax.Array,
    damping: jax.Array,
    relative: bool = True,
    drop_below: Number | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the power R as if the basis were of eigenvectors, and tr(a R).

    Args:
      a: Hermitian matrices [*batch, n, n].
      basis: orthonormal columns [*batch, n, n].
      exponent: real [*batch].
      damping: real [*batch].
      relative: whether the damping is in units of the largest of the values qᴴ a q.
      drop_below: None, or a share of the largest value below which the power is 0.

    Returns:
      R [*batch, n, n], and tr(a R), real [*batch].
    """
    values = jnp.maximum(jnp.sum((basis.conj() * full_matmul(a, basis)).real, axis=-2), 0)
    unit = jnp.max(values, axis=-1, keepdims=True, initial=0) if relative else 1
    return _power_and_trace(values, basis, damping, unit, exponent, drop_below)


@jax.jit
def relative_power(
    a: jax.Array, exponent: jax.Array, damping: jax.Array, drop_below: Number | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes R = (a + damping λ_max I)^exponent, symmetric up to rounding, and tr(a R).

    Args:
      a: Hermitian matrices [*batch, n, n]; negative eigenvalues count as zero.
      exponent: real [*batch].
      damping: real [*batch], in units of the largest eigenvalue.
      drop_below: None, or a share of the largest eigenvalue below which the power is 0.

    Returns:
      R [*batch, n, n], and tr(a R), real [*batch].
    """
    # LAPACK stores by columns: the conjugate transpose, which is the same matrix, needs no copy.
    values, vectors = lapack.eigh(a.mT.conj())
    values = jnp.maximum(values, 0)
    return _power_and_trace(values, vectors, damping, values[..., -1:], exponent, drop_below)


def _power_and_trace(values, vectors, damping, unit, exponent, drop_below=None):
    halves = _raise(values + damping[..., None] * unit, exponent[..., None] / 2)
    if drop_below is not None:
        largest = jnp.max(values, axis=-1, keepdims=True, initial=0)
        halves = jnp.where(values < drop_below * largest, 0, halves)
    vectors = vectors * halves[..., None, :]
    return full_matmul(vectors, vectors.mT.conj()), jnp.sum(values * jnp.square(halves), axis=-1)


@functools.partial(jax.jit, static_argnames=("p", "relative"))
def _newton_root(a, p, damping, relative):
    a = symmetric_part("inverse_root", a)
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    damping = per_matrix("inverse_root", "damping", damping, a)
    if relative:
        damping = damping * spectral_norm_bound(a)
    a = a + damping[..., None, None] * eye
    # Gershgorin's bound of the largest eigenvalue.
    bound = jnp.max(jnp.sum(jnp.abs(a), axis=-1), axis=-1, initial=0)[..., None, None]
    zero = bound == 0
    bound = jnp.where(zero, 1, bound)
    eps = jnp.finfo(bound.dtype).eps

    def error(m):
        return jnp.max(jnp.abs(m - eye), axis=(-2, -1), keepdims=True, initial=0)

    def unfinished(carry):
        *_, running, count = carry
        return jnp.any(running) & (count < NEWTON_ITERATIONS)

    def iterate(carry):
        x, m, low, last, running, count = carry
        end = jnp.maximum(low, NEWTON_SCALING)
        divisor = jnp.where(end < 1, 1 - end ** (p + 1), 1)
        scale = jnp.where(end < 1, (p + 1) * (1 - end) / divisor, 1)  # αᵖ
        t = scale ** (1 / p) * ((p + 1) * eye - scale * m) / p
        new = full_matmul(functools.reduce(full_matmul, [t] * p), m)
        now = error(new)
        far = low < NEWTON_SCALED
        # While far, the error need not fall; only a negative eigenvalue takes it above 1.
        better = running & (now < jnp.where(far, 1.5, last))
        x, m = jnp.where(better, full_matmul(x, t), x), jnp.where(better, hermitian(new), m)
        low = jnp.minimum(low * scale ** (1 / p) * (p + 1 - scale * low**p) / p, 1)
        # An error is about n times the square of the one before; below eps no step gains anything.
        running = better & (far | (a.shape[-1] * jnp.square(last) > eps))
        return x, m, low, jnp.where(better, now, last), running, count + 1

    m = a / bound
    low = jnp.clip(damping[..., None, None] / bound, a.shape[-1] * eps, 1) ** (1 / p)
    start = (jnp.broadcast_to(eye, a.shape), m, low, error(m) * 2, ~zero & jnp.isfinite(bound), 0)
    x, *_ = jax.lax.while_loop(unfinished, iterate, start)
    x = jnp.where(zero, 0, x * bound ** (-1 / p))
    return jnp.where(jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True), hermitian(x), jnp.nan)


def _eigen(a, damping):
    """Returns the eigenvalues of a + damping I and the eigenvectors.

    What rounding cannot tell from zero counts as zero before the damping is added.
    """
    values, vectors = lapack.eigh(a)
    smallest = a.shape[-1] * jnp.finfo(a.dtype).eps * values[..., -1:]
    return jnp.where(values <= smallest, 0, values) + damping[..., None], vectors


def _raise(values, exponent):
    return jnp.where(values == 0, 0, jnp.where(values == 0, 1, values) ** exponent)


def _symmetric_product(x, y):
    return hermitian(full_matmul(x, y.mT.conj()))


@jax.custom_jvp
def _power(a, exponent, damping):
    values, vectors = _eigen(a, damping)
    return _symmetric_product(vectors * _raise(values, exponent[..., None])[..., None, :], vectors)


@_power.defjvp
def _power_jvp(primals, tangents):
    # In the eigenbasis the derivative of a power is a product with its divided differences
    # (Daleckii & Krein); that of eigh is NaN where two eigenvalues are equal.
    (a, exponent, damping), (a_dot, exponent_dot, damping_dot) = primals, tangents
    values, vectors = _eigen(a, damping)
    eye, exponent = jnp.eye(a.shape[-1], dtype=a.dtype), exponent[..., None, None]
    low = jnp.minimum(values[..., None], values[..., None, :])
    gap = jnp.maximum(values[..., None], values[..., None, :]) - low
    base, step = jnp.where(low == 0, 1, low), jnp.where(gap == 0, 1, gap)
    # This is low^q ((1 + gap/low)^q - 1) / gap without cancellation, and its limits.
    growth = jnp.expm1(exponent * jnp.log1p(gap / base)) / step
    quotients = jnp.where(gap == 0, exponent / base, growth)
    quotients = jnp.where(low == 0, _raise(gap, exponent) / step, base**exponent * quotients)
    inner = a_dot + damping_dot[..., None, None] * eye
    inner = full_matmul(full_matmul(vectors.mT.conj(), inner), vectors)
    logs = jnp.log(jnp.where(values == 0, 1, values)) * _raise(values, exponent[..., 0])
    inner = quotients * inner + (exponent_dot[..., None] * logs)[..., None] * eye
    return _power(*primals), _symmetric_product(full_matmul(vectors, inner), vectors)


@jax.jit
def spectral_norm_bound(a: ArrayLike, iterations: Number = POWER_ITERATIONS) -> jax.Array:
    """Bounds the spectral norm from below by a few power iterations.

    They start at the row of largest norm and take `x ← AᴴA x / ‖AᴴA x‖`; the bound is `‖A x‖`,
    which is at least the largest norm of a row.

    Args:
      a: matrices [*batch, m, n], of any scale; float32 at least is computed and returned.
      iterations: their number, four by default. Each costs two products with a vector, and the
        bound one more. For random matrices of up to 300 rows one iteration gives at least 0.8 of
        the norm where A is skew, and four do where it is positive definite.

    Returns:
      The bounds, real [*batch]: 0 for a zero or an empty matrix, NaN where an entry is not finite.

    Raises:
      ValueError: if `a` has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> float(linalg.spectral_norm_bound(jnp.diag(jnp.array([1.0, -3.0]))))
      3.0

    References:
      Li, *Stochastic Hessian fittings with Lie groups*, 2024, arXiv:2402.11858, with one such
      iteration.
    """
    a = widen(a)
    if a.ndim < 2:
        raise ValueError(
            f"spectral_norm_bound: expected matrices [..., m, n], got an array of shape {a.shape}."
        )
    limits = jnp.finfo(a.dtype)
    if 0 in a.shape[-2:]:
        return jnp.zeros(a.shape[:-2], limits.dtype)
    # Neither the scale nor its inverse leaves the normal numbers.
    scale = jnp.clip(jnp.max(jnp.abs(a), axis=(-2, -1)), 4 * limits.tiny, limits.max / 4)
    a = a / scale[..., None, None]

    def norm(x):
        return jnp.linalg.norm(x, axis=-1, keepdims=True)

    def unit(x):
        return x / jnp.where(norm(x) == 0, 1, norm(x))

    def times(a, x):
        return full_matmul(a, x[..., None])[..., 0]

    longest = jnp.argmax(norm(a), axis=-2, keepdims=True)
    x = unit(jnp.take_along_axis(a, longest, axis=-2)[..., 0, :].conj())
    x = jax.lax.fori_loop(0, iterations, lambda _, x: unit(times(a.mT.conj(), times(a, x))), x)
    return norm(times(a, x))[..., 0] * scale
