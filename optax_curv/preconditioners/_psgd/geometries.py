"""How the Kronecker factors Q_i of a preconditioner P = ⊗ QᵢᴴQᵢ move: one update, and a small function a geometry.

Everything here sees one tensor and the tuple of its axis factors, [d, d] dense or [d] diagonal, and
is batched by vmap. With μ the learning rate, Lᵢ a running bound, N the tensor's size and Uᵢ(X) =
X₍ᵢ₎X₍ᵢ₎ᴴ, each step is

    Dᵢ = T1ᵢ - T2ᵢ,    ℓᵢ ≈ ‖T1ᵢ + T2ᵢ‖₂,    Lᵢ ← max(βLᵢ + (1-β)ℓᵢ, ℓᵢ),    Qᵢ ← move(Qᵢ, Dᵢ,
    μ/Lᵢ).

References:
  Li, "Stochastic Hessian Fittings with Lie Groups", arXiv:2402.11858. Pooladzandi and Li,
  "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners", arXiv:2402.04553.
"""

import functools

import jax
import jax.numpy as jnp

from optax_curv.linalg import kron_matvec, spectral_norm_bound, triangular_solve
from optax_curv.linalg._compiler import laid_out

Factors = tuple[jax.Array, ...]

PIVOT_FLOOR = 1e-12  # the original's: a smaller pivot of a triangular solve makes that entry zero
HALVED_FROM = 1024  # smaller products by halves cost more than they save
ROTATION_LIMIT = 0.1  # largest ‖aR‖₂ of a Procrustes step, by a bound above 0.8 of it: its Taylor error is below 1/3000


def product(a, b):
    """A product of two factors of one axis, dense or diagonal, at full precision."""
    return a * b if a.ndim == 1 else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def adjoint(a):
    """The adjoint of a dense factor; diagonals are real."""
    return a if a.ndim == 1 else a.conj().T


def gram(x):
    """X Xᴴ of a matrix; on CPU a large one by halves of its rows, a quarter of the products being another's adjoint."""
    x, rows, on_cpu = laid_out(x), x.shape[0], jax.default_backend() == "cpu"
    if not on_cpu or min(x.shape) < HALVED_FROM or rows % 2:
        return product(x, x.conj().T)
    upper, lower = x[: rows // 2], x[rows // 2 :]
    corner = product(upper, lower.conj().T)
    first, last = (product(half, half.conj().T) for half in (upper, lower))
    return jnp.block([[first, corner], [corner.conj().T, last]])


def second_moment(x, axis, diagonal):
    """U(X) = X₍ᵢ₎X₍ᵢ₎ᴴ of one axis, [d, d], or its diagonal [d]."""
    unfolded = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    if diagonal:
        return jnp.sum(jnp.square(jnp.abs(unfolded)), axis=1)
    return gram(unfolded)


def preconditioners(geometry, factors: Factors) -> Factors:
    """The axis preconditioners Pᵢ of the factors Qᵢ."""
    if geometry == "quad4p":
        return factors
    if (
        geometry == "right_triangular"
    ):  # the original's right factor is Q_R Q_Rᵀ, applied as (·) Q_R Q_Rᵀ
        left, right = factors
        return product(adjoint(left), left), product(right, adjoint(right))
    return tuple(q * q if q.ndim == 1 else gram(adjoint(q)) for q in factors)


def _rotation(q):
    """aR, R ∝ Qᴴ - Q, and aRQ: exp(aR) turns Q towards the symmetric matrix of its polar decomposition.

    To second order tr(exp(aR) Q) = tr Q + a tr(RQ) + a²/2 tr(R²Q); a maximises it with ‖aR‖₂ ≤
    `ROTATION_LIMIT`. Since R is skew, tr(RQ) = ‖R‖²_F / 2 ≥ 0: the first-order term always raises
    the trace.
    """
    skew = adjoint(q) - q
    first = product(skew, q)
    norm = spectral_norm_bound(skew, iterations=1)
    scale = 1 / jnp.where(norm > 0, norm, 1.0)  # R = scale · skew; scalars take it, and no matrix
    dot = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
    slope = 0.5 * scale * dot(skew, skew).real
    curvature = -jnp.square(scale) * dot(skew, first).real  # tr(R RQ), as R is skew
    best = -slope / jnp.where(curvature < 0, curvature, -1.0)
    angle = jnp.where(
        curvature < 0, jnp.minimum(best, ROTATION_LIMIT), jnp.where(slope > 0, ROTATION_LIMIT, 0.0)
    )
    return scale * angle * skew, scale * angle * first


def _move_eq(q, d, rate):
    return q - rate * product(d if d.ndim == 1 else jnp.triu(d), q)


def _move_qep(q, d, rate):
    return q - rate * product(d, q)


def _move_qeq(q, d, rate):
    return q - rate * product(q, d)


def _move_q05eq15(q, d, rate):
    """(I - μ/L D) exp(aR) Q, to second order in the rotation: Q + aRQ/2 + (aR/2 - μ/L D)(Q + aRQ).

    The rotation leaves P as it is, so that it may as well come before the step, where both share a
    product.
    """
    if q.ndim == 1:
        return q - rate * product(d, q)
    turn, turned = _rotation(q)
    return q + 0.5 * turned + product(0.5 * turn - rate * d, q + turned)


def _move_quad(q, d, rate):
    half = 0.5 * rate * d
    q = q - product(half, q)
    q = q - product(q, half)
    return 0.5 * (q + adjoint(q))


def _move_quad4p(p, d, rate):
    return _move_quad(p, d, 2 * rate)


MOVES = {
    "eq": _move_eq,
    "qep": _move_qep,
    "qeq": _move_qeq,
    "q0.5eq1.5": _move_q05eq15,
    "quad": _move_quad,
    "quad4p": _move_quad4p,
}
GEOMETRIES = (*MOVES, "right_triangular")


def _norm_bound(a):
    return jnp.max(a) if a.ndim == 1 else spectral_norm_bound(a, iterations=2)


def _solve_adjoint(q, x, pivot_floor=0.0):
    """Q⁻ᴴ x of an upper-triangular or diagonal factor; a pivot not above the floor makes that entry zero."""
    if q.ndim == 1:
        usable = jnp.abs(q) > pivot_floor
        return jnp.where(usable, 1 / jnp.where(usable, q, 1), 0)[:, None] * x
    return triangular_solve(adjoint(q), x, lower=True, zero_pivot=pivot_floor)


def _inverse_adjoint_matvec(factors: Factors, x):
    """⊗Q⁻ᴴ · x."""
    for axis, q in enumerate(factors):
        front = jnp.moveaxis(x, axis, 0)
        rows = _solve_adjoint(q, front.reshape(front.shape[0], -1))
        x = jnp.moveaxis(rows.reshape(front.shape), 0, axis)
    return x


def move_factors(
    geometry, factors: Factors, applied: Factors, lipschitz, g, v, rate, lipschitz_decay
):
    """One step of every factor of one tensor.

    Args:
      geometry: a key of `MOVES`.
      factors: one [d, d] or [d] for each axis of g.
      applied: the axis preconditioners that they give.
      lipschitz: running bounds L, real [axes].
      g: the gradient, or the Hessian-vector product; never all zero.
      v: the probe, or None for whitening without one, whose second moment has the expectation (N/d)
        I.
      rate: μ.
      lipschitz_decay: β.

    Returns:
      (factors, lipschitz) after the step.
    """
    if geometry == "eq":
        a, b = kron_matvec(factors, g), _inverse_adjoint_matvec(factors, v)
    else:
        a, b = kron_matvec(applied, g), v
    moved, bounds = [], []
    for axis, q in enumerate(factors):
        t1 = second_moment(a, axis, q.ndim == 1)
        if b is None:
            t2 = (g.size / g.shape[axis]) * (
                jnp.ones_like(q) if q.ndim == 1 else jnp.eye(q.shape[0], dtype=q.dtype)
            )
        else:
            t2 = second_moment(b, axis, q.ndim == 1)
        if geometry == "qep":  # Uᵢ(QᵢX) = Qᵢ Uᵢ(X) Qᵢᴴ
            t1, t2 = (product(product(q, t), adjoint(q)) for t in (t1, t2))
        bound = _norm_bound(t1 + t2)
        bound = jnp.maximum(
            lipschitz_decay * lipschitz[axis] + (1 - lipschitz_decay) * bound, bound
        )
        step = rate / jnp.maximum(bound, jnp.finfo(bound.dtype).tiny)
        moved.append(MOVES[geometry](q, t1 - t2, step))
        bounds.append(bound)
    return tuple(moved), jnp.stack(bounds)


def move_right_triangular(factors: Factors, g, rate, eps):
    """The original's step Q ← Q - μ Q triu(S)/(‖S‖_F + eps), with S exactly zero where A = B."""
    left, right = factors
    a = product(product(left, g), right.T)
    b = _solve_adjoint(left, _solve_adjoint(right, g.T, PIVOT_FLOOR).T, PIVOT_FLOOR)
    # A Aᵀ - B Bᵀ as the symmetric part of (A-B)(A+B)ᵀ: the difference of products leaves rounding
    # noise at A = B.
    s_left = product(a - b, (a + b).T)
    s_right = product((a - b).T, a + b)

    def move(q, s):
        s = 0.5 * (s + s.T)
        return q - rate / (jnp.linalg.norm(s) + eps) * product(q, jnp.triu(s))

    return move(left, s_left), move(right, s_right)


def balance(geometry, factors: Factors, lipschitz):
    """Scales the factors to equal largest magnitudes and an unchanged product; returns them and their bounds."""
    count = len(factors)
    norms = jnp.stack([jnp.max(jnp.abs(q)) for q in factors])
    ratios = norms / jnp.maximum(norms[:, None], jnp.finfo(norms.dtype).tiny)
    gains = jnp.prod(jnp.sqrt(ratios) if count == 2 else ratios ** (1 / count), axis=1)
    gains = jnp.where(norms.min() > 0, gains, 1.0)
    if geometry == "qep":  # whose second moments are those of Q P g
        lipschitz = lipschitz * gains**2
    return tuple(q * gain for q, gain in zip(factors, gains, strict=True)), lipschitz


def set_scale(geometry, factors: Factors, g, v, damping) -> Factors:
    """Factors of the scale (mean|v|²)^(1/4) (mean|g|⁴ + damping⁴)^(-1/8) where all are zero and g is not."""
    magnitude = jnp.abs(g)
    # Denormal numbers carry no scale, but the noise of a first batch without any signal.
    limits = jnp.finfo(magnitude.dtype)
    unset = jnp.stack([jnp.all(q == 0) for q in factors]).all() & (
        magnitude.max() > limits.tiny / limits.eps
    )
    peak = jnp.maximum(
        jnp.maximum(magnitude.max(), damping), jnp.finfo(magnitude.dtype).tiny
    )  # g⁴ overflows
    fourth = jnp.mean((magnitude / peak) ** 4) + (damping / peak) ** 4
    scale = 1 / jnp.sqrt(peak * jnp.sqrt(jnp.sqrt(fourth)))
    if v is not None:
        scale = scale * jnp.mean(jnp.square(jnp.abs(v))) ** 0.25
    return tuple(
        jnp.where(unset, s, q)
        for s, q in zip(scaled_identities(geometry, factors, scale), factors, strict=True)
    )


def scaled_identities(geometry, factors, scale, stack=0) -> Factors:
    """Factors of the shapes and dtypes of `factors` with the Kronecker product scale · I (its square for P).

    The first `stack` axes of every factor count tensors.
    """
    scale = scale ** ((2 if geometry == "quad4p" else 1) / max(1, len(factors)))

    def of_one(q):
        identity = jnp.ones(q.shape[-1:]) if len(q.shape) == stack + 1 else jnp.eye(q.shape[-1])
        return jnp.broadcast_to(scale * identity, q.shape).astype(q.dtype)

    return tuple(map(of_one, factors))
