"""PSGD with one preconditioner for a small whole tree: dense, or Q = (I + U Vᵀ) diag(d) of low rank."""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import _lapack as lapack
from optax_curv.preconditioners._psgd import geometries as kron_geometries
from optax_curv.preconditioners._psgd.options import check_fit, require_probe
from optax_curv.preconditioners._psgd.step import BALANCE_PROBABILITY, averaged, bias_correction
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners._transformation.contracts import (
    is_python_number,
    static,
    structural,
)
from optax_curv.preconditioners.chain_pieces import on_flat_vector, with_decay
from optax_curv.preconditioners.kron_psgd import scale_by_kron_psgd

LRA = "scale_by_lra_psgd"
HIGHEST = jax.lax.Precision.HIGHEST
# Factors common to d and the columns of I + U Vᵀ would drift apart until float32 no longer holds
# their product: columns of a squared norm beyond these are drawn back. 1 % of μ outweighs the drift
# where the bounds remember 100 steps.
LARGEST, PULL = 1e2, 1e-2
START_NORM = 0.1  # ‖U Vᵀ‖_F at the start, as in psgd_torch: near the diagonal, but not where the gradient of U is zero


def scale_by_dense_psgd(
    precond_lr=0.1,
    *,
    geometry="q0.5eq1.5",
    criterion="whitening",
    b1=static(0.0),
    whiten="gradient",
    update_probability=static(1.0),
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.9,
    precond_dtype="float32",
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions a small whole tree by one matrix P = QᵀQ of its n parameters, learned as in Kronecker PSGD.

    Memory n², time n³ a step. Nothing about P is assumed, so for "newton" with exact products it
    reaches |H|⁻¹, of an indefinite H too.

    Args:
      precond_lr: see `scale_by_kron_psgd`, as for all that follow.
      geometry: any but "right_triangular".
      criterion: see there.
      b1: see there.
      whiten: see there.
      update_probability: see there.
      init_scale: see there.
      damping: see there.
      lipschitz_decay: see there.
      precond_dtype: see there.
      key: see there.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, probe=None,
      hvp=None)`. Its state is a `ScaleByKronPsgdState` whose `factors` are the tuple of one matrix
      [n, n].

    Raises:
      ValueError: as `scale_by_kron_psgd`; for geometry="right_triangular", which knows matrices
        only.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> state = optax_curv.scale_by_dense_psgd().init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> [q.shape for q in state.factors]
      [(9, 9)]

    References:
      Li 2024, arXiv:2402.11858.
    """
    given = locals()
    if geometry == "right_triangular":
        raise ValueError(
            "scale_by_dense_psgd: geometry='right_triangular' knows matrices only; use another geometry."
        )
    kron = scale_by_kron_psgd(**given, max_dense_dim=2**31, max_skew=float("inf"))
    return on_flat_vector("scale_by_dense_psgd", kron)


def dense_psgd(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    *,
    weight_decay=0.0,
    precond_lr=0.1,
    geometry="q0.5eq1.5",
    criterion="whitening",
    whiten="gradient",
    update_probability=static(1.0),
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.9,
    precond_dtype="float32",
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_dense_psgd`, decoupled weight decay and a learning rate.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the momentum.
      weight_decay: decoupled from the preconditioner; update needs params.
      precond_lr: see `scale_by_kron_psgd`, as for all that follow.
      geometry: any but "right_triangular".
      criterion: see there.
      whiten: see there.
      update_probability: see there.
      init_scale: see there.
      damping: see there.
      lipschitz_decay: see there.
      precond_dtype: see there.
      key: see there.

    Returns:
      The chain, a `GradientTransformationExtraArgs`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx, params = optax_curv.dense_psgd(0.1), jnp.ones(3)
      >>> updates, state = jax.jit(tx.update)(jnp.full(3, 1e-5), tx.init(params), params)
      >>> print(updates.round(1))
      [-0.1 -0.1 -0.1]
    """
    return with_decay(
        contracts.handed_on(scale_by_dense_psgd, locals()), learning_rate, weight_decay
    )


class ScaleByLRAPsgdState(NamedTuple):
    """State of `scale_by_lra_psgd`, n being the number of parameters, r the rank; real, float32 at least.

    Attributes:
      count: steps taken, int32 [].
      key: raw key data, uint32 [...].
      diagonal: d [n]; all zero: not set yet.
      u: U [n, r].
      v: V [n, r].
      lipschitz: running bounds of the steps of d, U and V, [3].
      momentum: [n]; None where b1 is the Python number 0.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    key: jax.Array
    diagonal: jax.Array
    u: jax.Array
    v: jax.Array
    lipschitz: jax.Array
    momentum: Any
    total_notfinite: jax.Array


def _times(a, b):
    return jnp.matmul(a, b, precision=HIGHEST)


def _low_rank(u, v, x):
    """(I + U Vᵀ) x."""
    return x + _times(u, _times(v.T, x))


def _low_rank_inverse(u, v, x):
    """(I + U Vᵀ)⁻¹ x = x - U (I + VᵀU)⁻¹ Vᵀ x."""
    if u.shape[1] == 0:
        return x
    small = jnp.eye(u.shape[1], dtype=u.dtype) + _times(v.T, u)
    return x - _times(u, lapack.solve(small, _times(v.T, x)))


def precondition(diagonal, u, v, x):
    """P x = QᵀQ x."""
    return diagonal * _low_rank(v, u, _low_rank(u, v, diagonal * x))


def _bounded_step(old, new, rate, decay):
    """(running bound, μ / bound)."""
    new = jnp.maximum(decay * old + (1 - decay) * new, new)
    return new, rate / jnp.maximum(new, jnp.finfo(new.dtype).tiny)


def _projected(span, a, b):
    """W with (a aᵀ - b bᵀ) Π = W spanᵀ, Π the projection on the columns of `span` [n, r], and a bound on its norm."""
    gram = _times(span.T, span)
    floor = (
        jnp.finfo(gram.dtype).eps * jnp.trace(gram) + jnp.finfo(gram.dtype).tiny
    )  # a column may vanish
    inner = _times(span.T, jnp.stack([a, b], axis=1))
    weights = lapack.solve(gram + floor * jnp.eye(gram.shape[0], dtype=gram.dtype), inner)
    sizes = jnp.sqrt(jnp.maximum(jnp.sum(inner * weights, axis=0), 0))  # ‖Π a‖, ‖Π b‖
    bound = jnp.linalg.norm(a) * sizes[0] + jnp.linalg.norm(b) * sizes[1]
    return jnp.outer(a, weights[:, 0]) - jnp.outer(b, weights[:, 1]), bound


def _move(diagonal, u, v, lipschitz, h, w, rate, decay):
    """One step down the gradient of ‖Q h‖² + ‖Q⁻ᵀ w‖²: Q ← Q (I - diag), then (I - E) Q for U and for V."""
    # With a = Q h, b = Q⁻ᵀ w the gradient is h ∘ P h - w ∘ P⁻¹ w for d, and for E it is a aᵀ - b
    # bᵀ, projected on what keeps the form: E = W Vᵀ moves U alone, E = U Wᵀ moves V alone.

    def images(diagonal, u, v):
        return _low_rank(u, v, diagonal * h), _low_rank_inverse(v, u, w / diagonal)

    a, b = images(diagonal, u, v)
    curved, whitened = h * diagonal * _low_rank(v, u, a), w * _low_rank_inverse(u, v, b) / diagonal
    bound_d, step = _bounded_step(
        lipschitz[0], jnp.max(jnp.abs(curved) + jnp.abs(whitened)), rate, decay
    )
    diagonal = diagonal * (1 - step * (curved - whitened))
    if u.shape[1] == 0:
        return diagonal, u, v, jnp.stack([bound_d, *lipschitz[1:]])

    change, size = _projected(v, *images(diagonal, u, v))
    bound_u, step = _bounded_step(lipschitz[1], size, rate, decay)
    u = u - step * (change + _times(change, _times(v.T, u)))

    change, size = _projected(u, *images(diagonal, u, v))
    bound_v, step = _bounded_step(lipschitz[2], size, rate, decay)
    v = v - step * (change + _times(v, _times(u.T, change)))
    squares = 1 + 2 * jnp.sum(u * v, axis=1) + jnp.sum(_times(v, _times(u.T, u)) * v, axis=1)
    squares = jnp.maximum(squares, jnp.finfo(v.dtype).eps)
    diagonal = diagonal * (squares / jnp.clip(squares, 1 / LARGEST, LARGEST)) ** (PULL * rate)
    return diagonal, u, v, jnp.stack([bound_d, bound_u, bound_v])


def _balanced(u, v):
    """U and V of equal Frobenius norms and an unchanged product."""
    norms = jnp.linalg.norm(u), jnp.linalg.norm(v)
    gain = jnp.sqrt(norms[1] / jnp.where(norms[0] > 0, norms[0], 1))
    gain = jnp.where((norms[0] > 0) & (norms[1] > 0), gain, 1)
    return u * gain, v / gain


def _init(options, params) -> Any:
    key, start = jax.random.split(jax.random.wrap_key_data(contracts.raw_key(options.key)))
    shape = (params.size, int(structural(LRA, "rank", options.rank)))
    u, v = jax.random.normal(start, (2, *shape), params.dtype)
    norm = jnp.maximum(jnp.linalg.norm(u) * jnp.linalg.norm(v), jnp.finfo(params.dtype).tiny)
    return ScaleByLRAPsgdState(
        count=jnp.zeros([], jnp.int32),
        key=jax.random.key_data(key),
        diagonal=jnp.full(
            shape[:1], 0 if options.init_scale is None else options.init_scale, params.dtype
        ),
        u=u * jnp.sqrt(START_NORM / norm),
        v=v * jnp.sqrt(START_NORM / norm),
        lipschitz=jnp.zeros(3, params.dtype),
        momentum=None if is_python_number(options.b1, 0) else jnp.zeros(shape[:1], params.dtype),
        total_notfinite=jnp.zeros([], jnp.int32),
    )


def _update(options, updates, state, params=None, *, probe=None, hvp=None, **extra_args):
    del params, extra_args
    if updates.shape != state.diagonal.shape:
        raise ValueError(
            f"{LRA}: got {updates.size} gradients in all, the state has {state.diagonal.size}; init the state "
            "with parameters of the gradients' shapes."
        )
    if updates.size == 0:
        return updates, state
    require_probe(LRA, options.criterion, probe, hvp)
    momentum = averaged(options.b1, updates, state.momentum, jnp.bool_(True))
    direction = (
        updates
        if momentum is None
        else (momentum / bias_correction(options.b1, state)).astype(momentum.dtype)
    )
    whitened = updates if options.whiten == "gradient" else direction
    signal = jnp.asarray(hvp if options.criterion == "newton" else whitened)
    keys = jax.random.split(jax.random.wrap_key_data(state.key), 5)
    dtype = state.diagonal.dtype
    noise, normal_probe = jax.random.normal(keys[1], (2, updates.size), dtype)
    probe = probe if options.criterion == "newton" else None
    level = contracts.value_at(options.damping, state.count, dtype)
    (diagonal,) = kron_geometries.set_scale("lra", (state.diagonal,), signal, probe, level)

    def moved(diagonal, u, v, lipschitz):
        h = signal + (level + jnp.finfo(dtype).eps * jnp.abs(signal)) * noise
        rate = contracts.value_at(options.precond_lr, state.count, dtype)
        decay = jnp.asarray(options.lipschitz_decay, dtype)
        w = normal_probe if probe is None else probe
        out = _move(diagonal, u, v, lipschitz, h, w, rate, decay)
        balances = jax.random.bernoulli(keys[3], BALANCE_PROBABILITY)
        out = out[0], *jax.lax.cond(balances, _balanced, lambda u, v: (u, v), *out[1:3]), out[3]
        # A solve that fails is left out: the next one has other noise.
        sound = contracts.is_finite(out)
        return tuple(
            jnp.where(sound, new, old)
            for new, old in zip(out, (diagonal, u, v, lipschitz), strict=True)
        )

    chance = contracts.value_at(options.update_probability, state.count)
    moves = (jax.random.uniform(keys[4]) < chance) & jnp.any(diagonal != 0)
    old = (diagonal, state.u, state.v, state.lipschitz)
    diagonal, u, v, lipschitz = jax.lax.cond(moves, moved, lambda *kept: kept, *old)
    updates = precondition(diagonal, u, v, direction)
    new_state = state._replace(
        count=jnp.asarray(optax.safe_increment(state.count)),
        key=jax.random.key_data(keys[0]),
        diagonal=diagonal,
        u=u,
        v=v,
        lipschitz=lipschitz,
        momentum=momentum,
    )
    good = contracts.is_squarable(direction, probe, hvp) & contracts.is_finite(
        updates, diagonal, lipschitz
    )
    return contracts.skip_unless(good, updates, new_state, state)


def scale_by_lra_psgd(
    precond_lr=0.1,
    *,
    rank=static(10),
    criterion="whitening",
    b1=static(0.0),
    whiten="gradient",
    update_probability=1.0,
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.99,
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the whole tree by P = QᵀQ, Q = (I + U Vᵀ) diag(d), learned as in Kronecker PSGD.

    Memory (2 r + 1) n and as much time a step, for n parameters; rank 0 is a diagonal. Q minimises
    E[‖Q h‖² + ‖Q⁻ᵀ v‖²], v ~ N(0, I), so that P = (E[h hᵀ])^(-1/2): whitening for h = g, and |H|⁻¹
    for Hessian-vector products h = Hv.

    Args:
      precond_lr: μ > 0, a number or a schedule.
      rank: columns r of U and V, at least 0.
      criterion: see `scale_by_kron_psgd`.
      b1: decay of the bias-corrected momentum that is preconditioned; 0 for none.
      whiten: see `scale_by_kron_psgd`.
      update_probability: probability of moving Q at a step, a number or a schedule.
      init_scale: d at the start; None: (mean|g|⁴ + damping⁴)^(-1/8) of the first gradient that is
        not zero.
      damping: standard deviation of the noise on h, which bounds P.
      lipschitz_decay: decay of the running bounds on the steps.
      key: int or PRNG key.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, probe=None,
      hvp=None)`.

    Raises:
      ValueError: for an unknown choice, a number out of range, leaves that are not real, a missing
        probe or hvp, and trees or shapes that differ.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> state = optax_curv.scale_by_lra_psgd(rank=4).init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> state.diagonal.shape, state.u.shape
      ((9,), (9, 4))

    References:
      Pooladzandi and Li 2024, arXiv:2402.04553, sec. 4. Deviations: running bounds, a scale that
      waits for a gradient that is not zero, and columns of I + U Vᵀ whose lengths stay within a
      factor of ten of one.
    """
    options = SimpleNamespace(**locals())
    check_fit(LRA, options)
    contracts.require_numbers(LRA, rank=rank, at_least=0)
    rule = functools.partial(_init, options), functools.partial(_update, options)
    return on_flat_vector(LRA, optax.GradientTransformationExtraArgs(*rule))


def lra_psgd(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    *,
    weight_decay=0.0,
    precond_lr=0.1,
    rank=static(10),
    criterion="whitening",
    whiten="gradient",
    update_probability=1.0,
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.99,
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_lra_psgd`, decoupled weight decay and a learning rate.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the momentum.
      weight_decay: decoupled from the preconditioner; update needs params.
      precond_lr: see `scale_by_lra_psgd`, as for all that follow.
      rank: see there.
      criterion: see there.
      whiten: see there.
      update_probability: see there.
      init_scale: see there.
      damping: see there.
      lipschitz_decay: see there.
      key: see there.

    Returns:
      The chain, a `GradientTransformationExtraArgs`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx, params = optax_curv.lra_psgd(0.1, rank=1), jnp.ones(3)
      >>> updates, state = jax.jit(tx.update)(jnp.ones(3), tx.init(params), params)
      >>> bool(jnp.all(updates < 0))
      True
    """
    return with_decay(contracts.handed_on(scale_by_lra_psgd, locals()), learning_rate, weight_decay)
