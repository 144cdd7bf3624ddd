"""Roots of symmetric matrices."""

import jax
import jax.numpy as jnp

from optax_curv.linalg.checks import per_matrix, symmetric_part


def inverse_root(a, p, *, damping) -> jax.Array:
    """The root `(a + damping I)^(-1/p)` of a positive semi-definite matrix, by its eigenvalues.

    Eigenvalues that rounding cannot tell from zero (at most `n eps λ_max`, negative ones too) count as zero before the
    damping is added. An eigenvalue that is zero after it stays zero, as in a pseudo-inverse: without damping the root
    of a singular matrix is finite, and that of the zero matrix is zero. The derivative is finite where eigenvalues
    coincide too.

    Args:
      a: symmetric or Hermitian matrices [*batch, n, n]. The symmetric part is taken. float16 and bfloat16 are computed
        and returned as float32.
      p: order of the root, a positive number, or an array that broadcasts to [*batch]. 1 gives the inverse, 2 the
        inverse square root.
      damping: number, or an array that broadcasts to [*batch].

    Returns:
      The symmetric root [*batch, n, n], NaN where `a` is not finite.

    Raises:
      ValueError: if the matrices are not square, damping or p do not fit the batch, or p is a Python number that is
        not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import linalg
      >>> linalg.inverse_root(jnp.diag(jnp.array([4.0, 0.0])), 2, damping=0.0).tolist()
      [[0.5, 0.0], [0.0, 0.0]]
    """
    if isinstance(p, int | float) and not p > 0:
        raise ValueError(f"inverse_root: expected p > 0, got {p=}.")
    return _inverse_root(a, p, damping)


@jax.jit
def _inverse_root(a, p, damping):
    a = symmetric_part("inverse_root", a)
    p, damping = (per_matrix("inverse_root", *named, a) for named in (("p", p), ("damping", damping)))
    return _power(a, -1 / p, damping)


def _eigen(a, damping):
    """Eigenvalues of a + damping I, zero where rounding cannot tell, and the eigenvectors."""
    values, vectors = jnp.linalg.eigh(a, symmetrize_input=False)
    smallest = a.shape[-1] * jnp.finfo(a.dtype).eps * values[..., -1:]
    return jnp.where(values <= smallest, 0, values) + damping[..., None], vectors


def _raise(values, exponent):
    return jnp.where(values == 0, 0, jnp.where(values == 0, 1, values) ** exponent)


def _matmul(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _symmetric_product(x, y):
    product = _matmul(x, y.mT.conj())
    return product / 2 + product.mT.conj() / 2


@jax.custom_jvp
def _power(a, exponent, damping):
    values, vectors = _eigen(a, damping)
    return _symmetric_product(vectors * _raise(values, exponent[..., None])[..., None, :], vectors)


@_power.defjvp
def _power_jvp(primals, tangents):
    # In the eigenbasis the derivative of a power is a product with its divided differences (Daleckii & Krein), whereas
    # the derivative of eigh divides by gaps between eigenvalues, and is NaN where two are equal.
    (a, exponent, damping), (a_dot, exponent_dot, damping_dot) = primals, tangents
    values, vectors = _eigen(a, damping)
    eye, exponent = jnp.eye(a.shape[-1], dtype=a.dtype), exponent[..., None, None]
    low = jnp.minimum(values[..., None], values[..., None, :])
    gap = jnp.maximum(values[..., None], values[..., None, :]) - low
    base, step = jnp.where(low == 0, 1, low), jnp.where(gap == 0, 1, gap)
    # low^q ((1 + gap/low)^q - 1) / gap, without the cancellation, and its limits for gap = 0 and low = 0.
    quotients = jnp.where(gap == 0, exponent / base, jnp.expm1(exponent * jnp.log1p(gap / base)) / step)
    quotients = jnp.where(low == 0, _raise(gap, exponent) / step, base**exponent * quotients)
    inner = a_dot + damping_dot[..., None, None] * eye
    inner = _matmul(_matmul(vectors.mT.conj(), inner), vectors)
    logs = jnp.log(jnp.where(values == 0, 1, values)) * _raise(values, exponent[..., 0])
    inner = quotients * inner + (exponent_dot[..., None] * logs)[..., None] * eye
    return _power(*primals), _symmetric_product(_matmul(vectors, inner), vectors)
