"""How the Kronecker factors Qᵢ of P = ⊗ QᵢᴴQᵢ move: one update, and a small function a geometry.

Everything here sees one tensor and the tuple of its axis factors, `Dense` [d, d] or `Diagonal` [d],
and is batched by vmap. With μ the learning rate, Lᵢ a running bound, N the tensor's size and
Uᵢ(X) = X₍ᵢ₎X₍ᵢ₎ᴴ, each step is

    Dᵢ = T1ᵢ - T2ᵢ,    ℓᵢ ≈ ‖T1ᵢ + T2ᵢ‖₂,    Lᵢ ← max(βLᵢ + (1-β)ℓᵢ, ℓᵢ),
    Qᵢ ← move(Qᵢ, Dᵢ, μ/Lᵢ).

Where there is nothing to follow, P must not run away: see `_growing` and `_floor`. What
P has not followed in time is followed within the step: see `JUMP`.

References:
  Li, "Stochastic Hessian Fittings with Lie Groups", arXiv:2402.11858. Pooladzandi and Li,
  "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners", arXiv:2402.04553.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.linalg import kron_matvec, spectral_norm_bound, triangular_solve
from optax_curv.linalg._compiler import FULL, full_matmul, gram
from optax_curv.linalg.factors import Dense, Diagonal, Factor
from optax_curv.preconditioners._transformation.averages import ROUNDINGS
from optax_curv.preconditioners._transformation.leaves import norm_of
from optax_curv.typing import Geometry

Factors = tuple[Factor, ...]

PIVOT_FLOOR = 1e-12  # the original's: a smaller pivot of a triangular solve makes that entry zero
ROTATION_LIMIT = 0.1  # largest ‖aR‖₂ of a Procrustes step: its Taylor error is below 1/3000
SILENT = 2.0  # how many times P may be larger where a row has no gradient than where others do
# A step is repeated, for as much as that is too large, while ℓ exceeds the running L, or the mean
# square of the whitened signal one, this many times: `max_rms` lets twice the size through, too.
JUMP = 4.0


def array_of(factor: Any) -> jax.Array:
    """The matrix of a dense factor, the diagonal of a diagonal one."""
    return factor.vector if isinstance(factor, Diagonal) else factor.matrix


def second_moment(x: jax.Array, axis: int, like: Factor) -> Factor:
    """U(X) = X₍ᵢ₎X₍ᵢ₎ᴴ of one axis, or its diagonal, of the type of `like`."""
    unfolded = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    if isinstance(like, Diagonal):
        return Diagonal(jnp.sum(jnp.square(jnp.abs(unfolded)), axis=1))
    return Dense(gram(unfolded))


def preconditioners(geometry: Geometry, factors: Factors) -> Factors:
    """The axis preconditioners Pᵢ of the factors Qᵢ."""
    if geometry == "quad4p":
        return factors
    if geometry == "right_triangular":
        left, right = factors  # the original applies its right factor as (·) Q_R Q_Rᵀ
        return left.adjoint().compose(left), right.compose(right.adjoint())

    def of_one(q):
        if isinstance(q, Diagonal):
            return q.compose(q)
        return Dense(gram(q.adjoint().matrix))

    return tuple(map(of_one, factors))


def _plus(a: Any, scale: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def _scaled(scale: Any, a: Any) -> Any:
    return jax.tree.map(lambda x: scale * x, a)


def _rotation(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """aR, R ∝ Qᴴ - Q, and aRQ: exp(aR) turns Q towards its polar decomposition's symmetric matrix.

    To second order tr(exp(aR) Q) = tr Q + a tr(RQ) + a²/2 tr(R²Q); a maximises it with ‖aR‖₂ ≤
    `ROTATION_LIMIT`. Since R is skew, tr(RQ) = ‖R‖²_F / 2 ≥ 0: the first-order term always raises
    the trace.
    """
    skew = q.conj().T - q
    first = full_matmul(skew, q)
    norm = spectral_norm_bound(skew, iterations=1)
    scale = 1 / jnp.where(norm > 0, norm, 1.0)  # R = scale · skew; scalars take it, and no matrix
    dot = functools.partial(jnp.vdot, precision=FULL)
    slope = 0.5 * scale * dot(skew, skew).real
    curvature = -jnp.square(scale) * dot(skew, first).real  # tr(R RQ), as R is skew
    best = -slope / jnp.where(curvature < 0, curvature, -1.0)
    angle = jnp.where(
        curvature < 0, jnp.minimum(best, ROTATION_LIMIT), jnp.where(slope > 0, ROTATION_LIMIT, 0.0)
    )
    return scale * angle * skew, scale * angle * first


def _move_eq(q, d, rate):
    upper = d if isinstance(d, Diagonal) else Dense(jnp.triu(d.matrix))
    return _plus(q, -rate, upper.compose(q))


def _move_qep(q, d, rate):
    return _plus(q, -rate, d.compose(q))


def _move_qeq(q, d, rate):
    return _plus(q, -rate, q.compose(d))


def _move_q05eq15(q, d, rate):
    """(I - μ/L D) exp(aR) Q, to second order in the rotation: Q + aRQ/2 + (aR/2 - μ/L D)(Q + aRQ).

    The rotation leaves P as it is, so that it may as well come before the step, where both share a
    product.
    """
    if isinstance(q, Diagonal):
        return _move_qep(q, d, rate)
    turn, turned = _rotation(q.matrix)
    step = full_matmul(0.5 * turn - rate * d.matrix, q.matrix + turned)
    return Dense(q.matrix + 0.5 * turned + step)


def _move_quad(q, d, rate):
    q = _plus(q, -0.5 * rate, d.compose(q))
    q = _plus(q, -0.5 * rate, q.compose(d))
    return jax.tree.map(lambda x, y: 0.5 * (x + y), q, q.adjoint())


def _move_quad4p(p, d, rate):
    return _move_quad(p, d, 2 * rate)


MOVES: dict[str, Callable[[Any, Any, jax.Array], Any]] = {
    "eq": _move_eq,
    "qep": _move_qep,
    "qeq": _move_qeq,
    "q0.5eq1.5": _move_q05eq15,
    "quad": _move_quad,
    "quad4p": _move_quad4p,
}


def _norm_bound(a: Factor) -> jax.Array:
    if isinstance(a, Diagonal):
        return jnp.max(a.vector)
    return spectral_norm_bound(a.matrix, iterations=2)


def _solve_adjoint(q: Factor, x: jax.Array, pivot_floor: float = 0.0) -> jax.Array:
    """Q⁻ᴴ x of an upper-triangular or diagonal factor; a pivot not above the floor gives zero."""
    if isinstance(q, Diagonal):
        usable = jnp.abs(q.vector) > pivot_floor
        return jnp.where(usable, 1 / jnp.where(usable, q.vector, 1), 0)[:, None] * x
    return triangular_solve(q.adjoint().matrix, x, lower=True, zero_pivot=pivot_floor)


def _inverse_adjoint_matvec(factors: Factors, x: jax.Array) -> jax.Array:
    """⊗Q⁻ᴴ · x."""
    for axis, q in enumerate(factors):
        front = jnp.moveaxis(x, axis, 0)
        rows = _solve_adjoint(q, front.reshape(front.shape[0], -1))
        x = jnp.moveaxis(rows.reshape(front.shape), 0, axis)
    return x


class Sizes(NamedTuple):
    """How large a signal g is, and where.

    Attributes:
      exists: whether there is any, see `carries_scale`.
      rms: its root mean square.
      squares: |g|² relative to the mean square, like g.
    """

    exists: jax.Array
    rms: jax.Array
    squares: jax.Array

    @property
    def present(self) -> jax.Array:
        """Where the signal is more than rounding of the whole, bool like g."""
        return self.squares > _rounding(self.rms) ** 2

    @classmethod
    def of(cls, g: jax.Array) -> "Sizes":
        """The sizes of a signal; no square underflows or overflows."""
        peak = jnp.max(jnp.abs(g), initial=0)
        squares = jnp.square(jnp.abs(g) / jnp.where(peak > 0, peak, 1))
        mean = jnp.mean(squares)
        return cls(carries_scale(g), peak * jnp.sqrt(mean), squares / jnp.where(mean > 0, mean, 1))


def _rounding(x: jax.Array) -> Any:
    return ROUNDINGS * jnp.finfo(x.dtype).eps


def _present(sizes: Sizes) -> list[jax.Array]:
    """Which rows of each axis have a signal, bool [d] each."""

    def of_axis(axis):
        others = tuple(i for i in range(sizes.squares.ndim) if i != axis)
        return jnp.mean(sizes.squares, axis=others) > _rounding(sizes.rms) ** 2

    return [of_axis(axis) for axis in range(sizes.squares.ndim)]


def _growing(present: jax.Array, applied: Factor) -> jax.Array:
    """Along which rows of an axis P may grow, bool [d].

    These are the rows with a signal, and others until P is `SILENT` times what it is for those: a
    row that has been silent for long must not be thrown when it wakes.
    """
    p = applied.vector if isinstance(applied, Diagonal) else jnp.diagonal(applied.matrix)
    usual = jnp.sum(jnp.where(present, p.real, 0)) / jnp.maximum(1, jnp.sum(present))
    return present | (p.real < SILENT * usual)


def _along(mask: jax.Array, axis: int, ndim: int) -> jax.Array:
    """A mask of one axis, to be multiplied with a tensor of so many axes."""
    return mask.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _within(mask: jax.Array, a: Factor) -> Factor:
    """A factor with zeros in the rows and columns that are masked."""
    if isinstance(a, Diagonal):
        return Diagonal(jnp.where(mask, a.vector, 0))
    return Dense(jnp.where(mask & mask[:, None], a.matrix, 0))


def _floor(
    geometry: Geometry, factors: Factors, applied: Factors, axis: int, noise: jax.Array
) -> Factor:
    """A second moment that holds P to at most 1/noise, in the place of noise on the signal.

    Noise n itself would have E[Uᵢ(P n)] = σ² Πⱼ‖Pⱼ‖²_F Pᵢ², j ≠ i. Its root, which has the same
    fixed point where there is no signal, needs no product.
    """
    others = [i for i in range(len(factors)) if i != axis]
    if geometry == "eq":
        share = noise * functools.reduce(jnp.multiply, [_norm(factors[i]) for i in others], 1.0)
        return _square(_scaled(share, factors[axis]))
    share = noise * functools.reduce(jnp.multiply, [_norm(applied[i]) for i in others], 1.0)
    count = functools.reduce(jnp.multiply, [array_of(applied[i]).shape[-1] for i in others], 1)
    return _scaled(share * count**0.5, applied[axis])


def _norm(a: Factor) -> jax.Array:
    return norm_of(array_of(a))


def _square(q: Factor) -> Factor:
    return q.compose(q) if isinstance(q, Diagonal) else Dense(gram(q.matrix))


def _trace(a: Factor) -> jax.Array:
    return jnp.sum(a.vector if isinstance(a, Diagonal) else jnp.diagonal(a.matrix)).real


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """The ratio a / b, and 0 where b is not above 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _reach(t1: Factor, applied: Factor) -> jax.Array:
    """How many times the usual P of an axis is that along what it whitens now.

    The usual P is its Rayleigh quotient for what is left of a fixed vector by (‖P‖ - P)², in which
    the directions of large P, those that were silent, vanish.
    """
    p, t = array_of(applied), array_of(t1)
    now = jnp.sum((t.conj() * p).real) / _trace(t1)
    times: Any = (lambda x: full_matmul(p, x)) if p.ndim == 2 else (lambda x: p * x)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(p.shape[-1]), p.dtype)
    bound = _norm_bound(applied)
    for _ in range(2):
        x = x - times(x) / bound
    return now * jnp.sum(jnp.square(jnp.abs(x))) / jnp.sum((x.conj() * times(x)).real)


class Seen(NamedTuple):
    """The second moments that one step of the factors of one tensor compares.

    Attributes:
      moments: T1 of each axis.
      differences: T1 - T2 of each axis.
      bounds: ℓ, [axes].
      excess: above 1: so far is the signal beyond what P has followed, and the step takes back what
        P is too large, and is repeated; [].
      exists: whether there is a signal, bool [].
    """

    moments: Factors
    differences: Factors
    bounds: jax.Array
    excess: jax.Array
    exists: jax.Array


def seen(
    geometry: Geometry,
    factors: Factors,
    applied: Factors,
    lipschitz: jax.Array,
    g: jax.Array,
    v: jax.Array | None,
    *,
    damping: jax.Array,
) -> Seen:
    """The second moments of a step of the factors of one tensor, and how far they are apart.

    Args:
      geometry: a key of `MOVES`.
      factors: one for each axis of g.
      applied: the axis preconditioners that they give.
      lipschitz: running bounds L, real [axes].
      g: the gradient, or the Hessian-vector product; where it is zero nothing moves.
      v: the probe, or None for whitening without one, whose second moment has the expectation (N/d)
        I.
      damping: P stays below 1/damping.
    """
    if geometry == "eq":
        a, b = kron_matvec(factors, g), _inverse_adjoint_matvec(factors, _given(v))
    else:
        a, b = kron_matvec(applied, g), v
    sizes = Sizes.of(g)
    noise = jnp.sqrt(jnp.square(damping) + jnp.square(_rounding(g) * sizes.rms))
    present = _present(sizes)
    moments, differences, bounds, beyond = [], [], [], []
    for axis, q in enumerate(factors):
        t1 = _plus(second_moment(a, axis, q), 1, _floor(geometry, factors, applied, axis, noise))
        others = [x for i, x in enumerate(present) if i != axis]
        if b is None:
            share = functools.reduce(jnp.multiply, map(jnp.sum, others), 1)
            t2 = _scaled(share, type(q).identity((), g.shape[axis], array_of(q).dtype))
            t2 = _within(_growing(present[axis], applied[axis]), t2)
        else:
            signals = [_along(x, i, g.ndim) for i, x in enumerate(present)]
            t2 = second_moment(functools.reduce(jnp.multiply, signals, b), axis, q)
        if geometry == "qep":  # Uᵢ(QᵢX) = Qᵢ Uᵢ(X) Qᵢᴴ
            t1, t2 = (q.compose(t).compose(q.adjoint()) for t in (t1, t2))
        beyond.append(_ratio(_trace(t1), JUMP * _trace(t2)))
        moments.append(t1)
        differences.append(_plus(t1, -1, t2))
        bounds.append(_norm_bound(_plus(t1, 1, t2)))
    found = jnp.stack(bounds)
    excess = jnp.max(jnp.stack([*beyond, *_ratio(found, JUMP * lipschitz)]))
    return Seen(tuple(moments), tuple(differences), found, excess, sizes.exists)


def blamed(moments: Factors, applied: Factors) -> jax.Array:
    """The axis whose P is too large by most for what it whitens now, int []."""
    reaches = [_reach(t1, p) for t1, p in zip(moments, applied, strict=True)]
    return jnp.nanargmax(jnp.stack(reaches))


def move_factors(
    geometry: Geometry,
    factors: Factors,
    lipschitz: jax.Array,
    what: Seen,
    axis: jax.Array,
    jumped: jax.Array,
    usual: jax.Array,
    *,
    rate: jax.Array,
    lipschitz_decay: jax.Array,
) -> tuple[Factors, jax.Array]:
    """(factors, running bounds) of one tensor after one step.

    Args:
      geometry: a key of `MOVES`.
      factors: one for each axis.
      lipschitz: running bounds L, real [axes].
      what: is seen in the step.
      axis: the one that a repeated step moves.
      jumped: whether the step is one of those, bool [].
      usual: whether it is a usual one, bool []; where it is neither nothing moves.
      rate: μ.
      lipschitz_decay: β.
    """
    bounds, tiny = what.bounds, jnp.finfo(what.bounds.dtype).tiny
    running = jnp.maximum(lipschitz_decay * lipschitz + (1 - lipschitz_decay) * bounds, bounds)
    # The excess goes with the fourth power of Q, of which a step takes this share at most half.
    share = jnp.minimum(0.5, 1 - 0.95 * jnp.maximum(what.excess, 1) ** -0.25)
    share = jnp.where(jnp.arange(len(factors)) == axis, share / jnp.maximum(bounds, tiny), 0)
    steps = jnp.where(jumped, share, jnp.where(usual, rate, 0) / jnp.maximum(running, tiny))
    rows = zip(factors, what.differences, steps, strict=True)
    moved = tuple(MOVES[geometry](q, d, step) for q, d, step in rows)
    return moved, jnp.where(usual, running, lipschitz)


def _given(v: jax.Array | None) -> jax.Array:
    assert v is not None  # "eq" always has a probe
    return v


def move_right_triangular(
    factors: Factors, g: jax.Array, *, rate: jax.Array, eps: jax.Array
) -> Factors:
    """The original's step Q ← Q - μ Q triu(S)/(‖S‖_F + eps), with S exactly zero where A = B."""
    left, right = factors
    a = kron_matvec(factors, g)
    b = _solve_adjoint(left, _solve_adjoint(right, g.T, PIVOT_FLOOR).T, PIVOT_FLOOR)
    # A Aᵀ - B Bᵀ as the symmetric part of (A-B)(A+B)ᵀ: the difference of products leaves rounding
    # noise at A = B.
    s_left = full_matmul(a - b, (a + b).T)
    s_right = full_matmul((a - b).T, a + b)

    def move(q, s):
        s = 0.5 * (s + s.T)
        step = q.compose(Dense(jnp.triu(s)))
        return _plus(q, -rate / (jnp.linalg.norm(s) + eps), step)

    return move(left, s_left), move(right, s_right)


def balance(
    geometry: Geometry, factors: Factors, lipschitz: jax.Array
) -> tuple[Factors, jax.Array]:
    """Scales factors to equal largest magnitudes and an unchanged product, and their bounds."""
    count = len(factors)
    norms = jnp.stack([jnp.max(jnp.abs(array_of(q))) for q in factors])
    ratios = norms / jnp.maximum(norms[:, None], jnp.finfo(norms.dtype).tiny)
    gains = jnp.prod(jnp.sqrt(ratios) if count == 2 else ratios ** (1 / count), axis=1)
    gains = jnp.where(norms.min() > 0, gains, 1.0)
    if geometry == "qep":  # whose second moments are those of Q P g
        lipschitz = lipschitz * gains**2
    pairs = zip(factors, gains, strict=True)
    return tuple(_scaled(gain, q) for q, gain in pairs), lipschitz


def set_scale(
    geometry: Geometry, factors: Factors, g: jax.Array, v: jax.Array | None, *, damping: jax.Array
) -> Factors:
    """Factors of the scale that a gradient sets, where all are zero and it is not.

    The scale is (mean|v|²)^(1/4) (mean|g|⁴ + damping⁴)^(-1/8).
    """
    unset = jnp.stack([jnp.all(array_of(q) == 0) for q in factors]).all() & carries_scale(g)
    scaled = scaled_identities(geometry, factors, scale_of(g, v, damping))
    return jax.tree.map(lambda s, q: jnp.where(unset, s, q), scaled, factors)


def carries_scale(g: jax.Array) -> jax.Array:
    """Whether g is not zero; denormal numbers carry no scale, only a first batch's rounding."""
    magnitude = jnp.abs(g)
    limits = jnp.finfo(magnitude.dtype)
    return magnitude.max(initial=0) > limits.tiny / limits.eps


def scale_of(g: jax.Array, v: jax.Array | None, damping: jax.Array) -> jax.Array:
    """The scale (mean|v|²)^(1/4) (mean|g|⁴ + damping⁴)^(-1/8) of Q for a gradient and a probe."""
    magnitude = jnp.abs(g)
    tiny = jnp.finfo(magnitude.dtype).tiny
    peak = jnp.maximum(jnp.maximum(magnitude.max(initial=0), damping), tiny)  # g⁴ overflows
    fourth = jnp.mean((magnitude / peak) ** 4) + (damping / peak) ** 4
    scale = 1 / jnp.sqrt(peak * jnp.sqrt(jnp.sqrt(fourth)))
    return scale if v is None else scale * jnp.mean(jnp.square(jnp.abs(v))) ** 0.25


def scaled_identities(geometry: Geometry, factors: Factors, scale: jax.Array) -> Factors:
    """Factors whose Kronecker product is scale · I (its square for P).

    They have the shapes and dtypes of `factors`, arrays or structs with any leading axes.
    """
    scale = scale ** ((2 if geometry == "quad4p" else 1) / max(1, len(factors)))

    def of_one(q):
        like = array_of(q)
        identity = type(q).identity((), like.shape[-1], scale.dtype)
        fill = lambda x: jnp.broadcast_to(scale * x, like.shape).astype(like.dtype)  # noqa: E731
        return jax.tree.map(fill, identity)

    return tuple(map(of_one, factors))
