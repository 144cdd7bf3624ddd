"""Roots of symmetric matrices, and a bound on norms."""

import functools

import jax
import jax.numpy as jnp

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._checks import hermitian, per_matrix, symmetric_part, widen

NEWTON_ITERATIONS = 100  # at condition 1e12 about 30
NEWTON_SCALING = (
    0.1  # smaller ones are faster still, but T of so large a condition is at the cost of accuracy
)
NEWTON_SCALED = 0.9  # until then M need not get nearer to the identity at every step
QR_ITERATIONS = 100
# In the worst case (all other eigenvalues equal, 1/n of the largest in the row) 0.83 of the norm
# for n = 300.
POWER_ITERATIONS = 4


def inverse_root(a, p, *, damping, relative=False, method="eigh") -> jax.Array:
    """The root `(a + damping I)^(-1/p)` of a positive semi-definite matrix.

    "eigh": by the eigenvalues. Those that rounding cannot tell from zero (at most `n eps λ_max`,
    negative ones too) count as zero before the damping is added. One that is zero after it stays
    zero, as in a pseudo-inverse: without damping the root of a singular matrix is finite, that of
    the zero matrix zero. The derivative is finite where eigenvalues coincide too.

    "newton": by matrix products alone, for accelerators that have little else: with λ an upper
    bound of the largest eigenvalue, from X = λ^(-1/p) I and M = (a + damping I) / λ,

        T = α ((p + 1) I - αᵖ M) / p,   X ← X T,   M ← Tᵖ M,

    until M gets no nearer to the identity. With l a lower bound of the eigenvalues of M¹ᐟᵖ, but 0.1
    at least, αᵖ = (p + 1) (1 - l) / (1 - lᵖ⁺¹) takes the ends of [l, 1] to the same place, which is
    the least away from 1; with α = 1 twice as many steps are needed. It needs a whole p, and a
    damping above rounding: n eps λ_max at least.

    "qr": by 100 steps of orthogonal iteration, Q ← QR(a Q) from Q = I, as Q f(diag(Qᵀ a Q)) Qᵀ.
    Eigenvalues that differ by less than a hundredth of them are not told apart, which moves the
    root by less than 1e-2 of its norm.

    Args:
      a: symmetric or Hermitian matrices [*batch, n, n], of which the symmetric part is taken;
        float32 at least is computed and returned.
      p: order of the root, a positive number, or an array that broadcasts to [*batch]; 1 gives the
        inverse. For "newton" a Python number that is whole.
      damping: number, or an array that broadcasts to [*batch].
      relative: whether the damping is in units of each matrix's largest eigenvalue ("newton":
        `spectral_norm_bound`). Then negative eigenvalues alone count as zero, as it is the damping
        that stands above rounding.
      method: "eigh", "newton" or "qr".

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
    if isinstance(p, int | float) and not p > 0:
        raise ValueError(f"inverse_root: expected p > 0, got {p=}.")
    if method == "newton":
        if not isinstance(p, int | float) or p != round(p):
            raise ValueError(
                f'inverse_root: method="newton" needs a whole number p, got {p=}; use method="eigh".'
            )
        return _newton_root(a, round(p), damping, relative)
    if method not in ("eigh", "qr"):
        raise ValueError(
            f"inverse_root: unknown {method=}; expected one of ('eigh', 'newton', 'qr')."
        )
    return _inverse_root(a, p, damping, relative, method)


@functools.partial(jax.jit, static_argnames=("relative", "method"))
def _inverse_root(a, p, damping, relative, method):
    a = symmetric_part("inverse_root", a)
    p, damping = (
        per_matrix("inverse_root", *named, a) for named in (("p", p), ("damping", damping))
    )
    if method == "qr":
        basis = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
        basis = jax.lax.fori_loop(
            0, QR_ITERATIONS, lambda _, q: orthogonal_iteration(a, q)[0], basis
        )
        return hermitian(_power_in_basis(a, basis, -1 / p, damping, relative)[0])
    return (
        hermitian(relative_power(a, -1 / p, damping)[0]) if relative else _power(a, -1 / p, damping)
    )


def factor_roots(factors: list, bases: list, exponent, damping, method) -> list:
    """R = (a + damping λ_max I)^(-exponent), tr(a R) and for "qr" a basis one step nearer, of each a [*batch, n, n]."""

    def numbers(a):
        return (
            jnp.broadcast_to(jnp.asarray(x, jnp.finfo(a.dtype).dtype), a.shape[:-2])
            for x in (-exponent, damping)
        )

    def root(a):
        if method == "newton":
            found = inverse_root(a, 1 / exponent, damping=damping, relative=True, method=method)
            return found, jnp.sum((a * found.conj()).real, axis=(-2, -1))
        return relative_power(a, *numbers(a))

    def tracked(a, basis):
        basis, _ = orthogonal_iteration(a, basis.astype(a.dtype))
        return *_power_in_basis(a, basis, *numbers(a), True), basis

    def one_by_one(*factors):
        return list(map(root, factors))

    def filled_up(*factors):
        width = max(a.shape[-1] for a in factors)
        filled = [
            jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), *[(0, width - a.shape[-1])] * 2]) for a in factors
        ]
        found = zip(lapack.for_each(root, filled), factors, strict=True)
        return [(r[..., : a.shape[-1], : a.shape[-1]], trace) for (r, trace), a in found]

    if method == "qr":
        return lapack.for_each(tracked, factors, bases)
    # elsewhere more calls cost more than larger ones
    found = jax.lax.platform_dependent(*factors, cpu=one_by_one, default=filled_up)
    return [(*of_factor, None) for of_factor in found]


@jax.jit
def orthogonal_iteration(a, basis):
    """A basis nearer to the eigenvectors of positive semi-definite [*batch, n, n], and the old columns' order in it."""
    largest = jnp.max(jnp.diagonal(a, axis1=-2, axis2=-1).real, axis=-1, initial=0)[..., None, None]
    image = _matmul(a / jnp.where(largest > 0, largest, 1), basis)
    order = _order(image, basis)
    return lapack.qr(jnp.take_along_axis(image, order[..., None, :], axis=-1))[0], order


@jax.jit
def eigenvectors(a, basis):
    """The same with the eigenvectors themselves, largest eigenvalue first; the basis itself where there are none."""
    vectors = lapack.eigh(a)[1][..., ::-1]
    found = jnp.all(jnp.isfinite(vectors), axis=(-2, -1), keepdims=True)
    order = jnp.where(found[..., 0], _order(_matmul(a, basis), basis), jnp.arange(a.shape[-1]))
    return jnp.where(found, vectors, basis), order


def _order(image, basis):
    return jnp.argsort(-jnp.sum((basis.conj() * image).real, axis=-2), axis=-1)


@functools.partial(jax.jit, static_argnames="relative")
def _power_in_basis(a, basis, exponent, damping, relative):
    """The power as if the basis were of eigenvectors, and its product's trace with `a`."""
    values = jnp.maximum(jnp.sum((basis.conj() * _matmul(a, basis)).real, axis=-2), 0)
    unit = jnp.max(values, axis=-1, keepdims=True, initial=0) if relative else 1
    return _power_and_trace(values, basis, damping, unit, exponent)


@jax.jit
def relative_power(a, exponent, damping):
    """The power, with rounding in its symmetry, and its product's trace with `a`."""
    values, vectors = lapack.eigh(
        a.mT.conj()
    )  # the same matrices, as LAPACK, by columns, finds them in memory
    values = jnp.maximum(values, 0)
    return _power_and_trace(values, vectors, damping, values[..., -1:], exponent)


def _power_and_trace(values, vectors, damping, unit, exponent):
    halves = _raise(values + damping[..., None] * unit, exponent[..., None] / 2)
    vectors = vectors * halves[..., None, :]
    return _matmul(vectors, vectors.mT.conj()), jnp.sum(values * jnp.square(halves), axis=-1)


@functools.partial(jax.jit, static_argnames=("p", "relative"))
def _newton_root(a, p, damping, relative):
    a = symmetric_part("inverse_root", a)
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    damping = per_matrix("inverse_root", "damping", damping, a)
    if relative:
        damping = damping * spectral_norm_bound(a)
    a = a + damping[..., None, None] * eye
    bound = jnp.max(jnp.sum(jnp.abs(a), axis=-1), axis=-1, initial=0)[
        ..., None, None
    ]  # of λ_max, by Gershgorin
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
        scale = jnp.where(
            end < 1, (p + 1) * (1 - end) / jnp.where(end < 1, 1 - end ** (p + 1), 1), 1
        )  # αᵖ
        t = scale ** (1 / p) * ((p + 1) * eye - scale * m) / p
        new = _matmul(functools.reduce(_matmul, [t] * p), m)
        now = error(new)
        far = low < NEWTON_SCALED
        better = running & (
            now < jnp.where(far, 1.5, last)
        )  # above 1 only where there is a negative eigenvalue
        x, m = jnp.where(better, _matmul(x, t), x), jnp.where(better, hermitian(new), m)
        low = jnp.minimum(low * scale ** (1 / p) * (p + 1 - scale * low**p) / p, 1)
        running = better & (
            far | (a.shape[-1] * jnp.square(last) > eps)
        )  # of which the next error is made
        return x, m, low, jnp.where(better, now, last), running, count + 1

    m = a / bound
    low = jnp.clip(damping[..., None, None] / bound, a.shape[-1] * eps, 1) ** (1 / p)
    start = (jnp.broadcast_to(eye, a.shape), m, low, error(m) * 2, ~zero & jnp.isfinite(bound), 0)
    x, *_ = jax.lax.while_loop(unfinished, iterate, start)
    x = jnp.where(zero, 0, x * bound ** (-1 / p))
    return jnp.where(jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True), hermitian(x), jnp.nan)


def _eigen(a, damping):
    """Eigenvalues of a + damping I, zero where rounding cannot tell, and the eigenvectors."""
    values, vectors = lapack.eigh(a)
    smallest = a.shape[-1] * jnp.finfo(a.dtype).eps * values[..., -1:]
    return jnp.where(values <= smallest, 0, values) + damping[..., None], vectors


def _raise(values, exponent):
    return jnp.where(values == 0, 0, jnp.where(values == 0, 1, values) ** exponent)


def _matmul(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _symmetric_product(x, y):
    return hermitian(_matmul(x, y.mT.conj()))


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
    # low^q ((1 + gap/low)^q - 1) / gap without cancellation, and its limits
    quotients = jnp.where(
        gap == 0, exponent / base, jnp.expm1(exponent * jnp.log1p(gap / base)) / step
    )
    quotients = jnp.where(low == 0, _raise(gap, exponent) / step, base**exponent * quotients)
    inner = a_dot + damping_dot[..., None, None] * eye
    inner = _matmul(_matmul(vectors.mT.conj(), inner), vectors)
    logs = jnp.log(jnp.where(values == 0, 1, values)) * _raise(values, exponent[..., 0])
    inner = quotients * inner + (exponent_dot[..., None] * logs)[..., None] * eye
    return _power(*primals), _symmetric_product(_matmul(vectors, inner), vectors)


@jax.jit
def spectral_norm_bound(a, iterations: int = POWER_ITERATIONS) -> jax.Array:
    """Lower bound on the spectral norm, from a few power iterations.

    From the row of largest norm, `x ← AᴴA x / ‖AᴴA x‖` repeatedly; the bound is `‖A x‖`, at least
    the largest row norm.

    Args:
      a: matrices [*batch, m, n], of any scale; float32 at least is computed and returned.
      iterations: each costs two products with a vector, the bound one more. For random matrices of
        up to 300 rows one gives at least 0.8 of the norm where A is skew, four do where it is
        positive definite.

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
      Li, *Stochastic Hessian fittings with Lie groups*, 2024, arXiv:2402.11858: one such iteration.
    """
    a = widen(a)
    if a.ndim < 2:
        raise ValueError(
            f"spectral_norm_bound: expected matrices [..., m, n], got an array of shape {a.shape}."
        )
    limits = jnp.finfo(a.dtype)
    if 0 in a.shape[-2:]:
        return jnp.zeros(a.shape[:-2], limits.dtype)
    # neither the scale nor its inverse leaves the normal numbers
    scale = jnp.clip(jnp.max(jnp.abs(a), axis=(-2, -1)), 4 * limits.tiny, limits.max / 4)
    a = a / scale[..., None, None]

    def norm(x):
        return jnp.linalg.norm(x, axis=-1, keepdims=True)

    def unit(x):
        return x / jnp.where(norm(x) == 0, 1, norm(x))

    def times(a, x):
        return jnp.matmul(a, x[..., None], precision=jax.lax.Precision.HIGHEST)[..., 0]

    longest = jnp.argmax(norm(a), axis=-2, keepdims=True)
    x = unit(jnp.take_along_axis(a, longest, axis=-2)[..., 0, :].conj())
    x = jax.lax.fori_loop(0, iterations, lambda _, x: unit(times(a.mT.conj(), times(a, x))), x)
    return norm(times(a, x))[..., 0] * scale
