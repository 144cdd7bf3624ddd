"""Low-rank PSGD: P = QᵀQ, Q = (I + U Vᵀ) diag(d), for all parameters of a tree."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._compiler import full_matmul
from optax_curv.linalg.factors import Diagonal
from optax_curv.preconditioners._psgd.flat import WHOLE_TREE, FlatRule, flat_members
from optax_curv.preconditioners._psgd.geometries import Sizes, scale_of
from optax_curv.preconditioners._psgd.options import FitOptions, checked_probes
from optax_curv.preconditioners._psgd.pieces import descending
from optax_curv.preconditioners._psgd.step import BALANCE_PROBABILITY
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation import averages
from optax_curv.preconditioners._transformation.aliases import decayed
from optax_curv.preconditioners._transformation.numbers import (
    raw_key,
    require_numbers,
    split_key,
    static,
    structural,
    value_at,
)
from optax_curv.preconditioners._transformation.soundness import is_finite, kept_unless
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.typing import Criterion, Key, Number, Schedulable, Sharding, Tree, Whiten

# Factors common to d and the columns of I + U Vᵀ would drift apart until float32 no longer holds
# their product: columns of a squared norm beyond these are drawn back. 1 % of μ outweighs the drift
# where the bounds remember 100 steps.
LARGEST, PULL = 1e2, 1e-2
# ‖U Vᵀ‖_F at the start, as in psgd_torch: near the diagonal, but not where U has no gradient.
START_NORM = 0.1


class ScaleByLRAPsgdState(NamedTuple):
    """State of `scale_by_lra_psgd`, n being the number of parameters, r the rank.

    All is real, float32 at least.

    Attributes:
      count: steps taken, int32 [].
      key: the data of a PRNG key, uint32, in the shape of its kind.
      diagonal: d [n]; all zero: not set yet.
      u: U [n, r].
      v: V [n, r].
      lipschitz: running bounds of the steps of d, U and V, [3].
      momentum: [n], free of the bias of its start; [0] where b1 is the Python number 0.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    diagonal: jax.Array
    u: jax.Array
    v: jax.Array
    lipschitz: jax.Array
    momentum: jax.Array
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, dict[str, jax.Array | Diagonal]]:
        """The factors that diagnostics read: d, and the singular values of U Vᵀ as a diagonal."""
        low_rank = jnp.zeros(0, self.diagonal.dtype)
        if self.u.size:
            r_u, r_v = (lapack.qr_triangle(x) for x in (self.u, self.v))
            low_rank = lapack.svd(full_matmul(r_u, r_v.T))[1]
        found: dict[str, jax.Array | Diagonal] = {
            "diagonal": Diagonal(self.diagonal[None]),
            "low_rank": Diagonal(low_rank[None]),
        }
        return {WHOLE_TREE: found}


class _Fit(NamedTuple):
    """The parts of the state that move: d, U, V and the running bounds."""

    diagonal: jax.Array
    u: jax.Array
    v: jax.Array
    lipschitz: jax.Array


def _low_rank(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """(I + U Vᵀ) x."""
    return x + full_matmul(u, full_matmul(v.T, x))


def _low_rank_inverse(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """(I + U Vᵀ)⁻¹ x = x - U (I + VᵀU)⁻¹ Vᵀ x."""
    if u.shape[1] == 0:
        return x
    small = jnp.eye(u.shape[1], dtype=u.dtype) + full_matmul(v.T, u)
    return x - full_matmul(u, lapack.solve(small, full_matmul(v.T, x)))


def _precondition(diagonal: jax.Array, u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """P x = QᵀQ x."""
    return diagonal * _low_rank(v, u, _low_rank(u, v, diagonal * x))


def _bounded_step(old, new, rate, decay):
    """(running bound, μ / bound)."""
    new = jnp.maximum(decay * old + (1 - decay) * new, new)
    return new, rate / jnp.maximum(new, jnp.finfo(new.dtype).tiny)


def _projected(span, a, b):
    """W with (a aᵀ - b bᵀ) Π = W spanᵀ, Π projecting on the columns of `span`, and a norm bound."""
    gram = full_matmul(span.T, span)
    floor = (
        jnp.finfo(gram.dtype).eps * jnp.trace(gram) + jnp.finfo(gram.dtype).tiny
    )  # a column may vanish
    inner = full_matmul(span.T, jnp.stack([a, b], axis=1))
    weights = lapack.solve(gram + floor * jnp.eye(gram.shape[0], dtype=gram.dtype), inner)
    sizes = jnp.sqrt(jnp.maximum(jnp.sum(inner * weights, axis=0), 0))  # ‖Π a‖, ‖Π b‖
    bound = jnp.linalg.norm(a) * sizes[0] + jnp.linalg.norm(b) * sizes[1]
    return jnp.outer(a, weights[:, 0]) - jnp.outer(b, weights[:, 1]), bound


def _move(fit: _Fit, h: jax.Array, w: jax.Array, rate: jax.Array, decay: jax.Array) -> _Fit:
    """One step down the gradient of ‖Q h‖² + ‖Q⁻ᵀ w‖²: Q ← Q (I - diag), twice Q ← (I - E) Q."""
    diagonal, u, v, lipschitz = fit
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
        return _Fit(diagonal, u, v, jnp.stack([bound_d, *lipschitz[1:]]))

    change, size = _projected(v, *images(diagonal, u, v))
    bound_u, step = _bounded_step(lipschitz[1], size, rate, decay)
    u = u - step * (change + full_matmul(change, full_matmul(v.T, u)))

    change, size = _projected(u, *images(diagonal, u, v))
    bound_v, step = _bounded_step(lipschitz[2], size, rate, decay)
    v = v - step * (change + full_matmul(v, full_matmul(u.T, change)))
    squares = (
        1 + 2 * jnp.sum(u * v, axis=1) + jnp.sum(full_matmul(v, full_matmul(u.T, u)) * v, axis=1)
    )
    squares = jnp.maximum(squares, jnp.finfo(v.dtype).eps)
    diagonal = diagonal * (squares / jnp.clip(squares, 1 / LARGEST, LARGEST)) ** (PULL * rate)
    return _Fit(diagonal, u, v, jnp.stack([bound_d, bound_u, bound_v]))


def _balanced(u, v):
    """U and V of equal Frobenius norms and an unchanged product."""
    norms = jnp.linalg.norm(u), jnp.linalg.norm(v)
    gain = jnp.sqrt(norms[1] / jnp.where(norms[0] > 0, norms[0], 1))
    gain = jnp.where((norms[0] > 0) & (norms[1] > 0), gain, 1)
    return u * gain, v / gain


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _LowRankPsgd(FlatRule, FitOptions):
    """Low-rank PSGD's mathematics; `scale_by_lra_psgd` documents the options."""

    like_gradients = ("probe", "hvp")

    rank: int
    weight_decay_mask: Any = None

    def check_options(self):
        """Refuses options that cannot be, by name."""
        self.check_fit(self.method)
        structural(self.method, rank=self.rank)
        require_numbers(self.method, rank=self.rank, at_least=0)

    def members(self, tree):
        """The vector of all leaves."""
        return flat_members(self.method, tree, self.weight_decay_mask, self.owners)

    def check(self, updates, params, extra_args):
        """Refuses missing probes and those of other trees."""
        del params
        return checked_probes(self.method, self.criterion, updates, extra_args)

    def init_stacks(self, structs):
        """Random U and V of a small product, and d as given, or zero until the first gradient."""
        vectors = list(structs.values())
        dtype = vectors[0].dtype if vectors else jnp.dtype(jnp.float32)
        size = vectors[0].shape[1] if vectors else 0
        key, start = split_key(raw_key(self.method, self.key), 2)
        u, v = jax.random.normal(start, (2, size, int(self.rank)), dtype)
        norm = jnp.maximum(jnp.linalg.norm(u) * jnp.linalg.norm(v), jnp.finfo(dtype).tiny)
        scale = 0 if self.init_scale is None else self.init_scale
        return ScaleByLRAPsgdState(
            **counters(),
            key=key,
            diagonal=jnp.full((size,), scale, dtype),
            u=u * jnp.sqrt(START_NORM / norm),
            v=v * jnp.sqrt(START_NORM / norm),
            lipschitz=jnp.zeros(3, dtype),
            momentum=jnp.zeros(size if self.keeps_momentum else 0, dtype),
        )

    def update_stacks(self, grads, state, sound, **extra_args):
        """One step of the vector; with `criterion="newton"` probe and hvp are given."""
        ((name, stack),) = grads.items()
        grad = direction = stack[0]
        momentum = state.momentum
        if grad.size == 0:
            return Step(grads, state)
        if self.keeps_momentum:
            weight = averages.weight_at(self.b1, state.count, sound)
            momentum = direction = averages.averaged(state.momentum, weight, grad)
        signal, own_probe = grad if self.whiten == "gradient" else direction, None
        if self.criterion == "newton":
            signal, own_probe = extra_args["hvp"][name][0], extra_args["probe"][name][0]
        key, *keys = split_key(state.key, 5)
        fit = _Fit(state.diagonal, state.u, state.v, state.lipschitz)
        fit = self._moved(fit, signal, own_probe, state.count, keys)
        updates = _precondition(fit.diagonal, fit.u, fit.v, direction)
        updates = jnp.where(Sizes.of(direction).present, updates, 0)  # U and V start at random
        state = state._replace(key=key, momentum=momentum, **fit._asdict())
        return Step({name: updates[None]}, state, is_finite(fit.diagonal, fit.lipschitz))

    def _moved(self, fit, signal, probe, count, keys):
        """The fit after this step, which moves it or not."""
        noise_key, _, balance_key, move_key = keys
        dtype = signal.dtype
        noise, normal_probe = jax.random.normal(noise_key, (2, signal.size), dtype)
        level = value_at(self.damping, count, dtype)
        sizes = Sizes.of(signal)
        unset = jnp.all(fit.diagonal == 0) & sizes.exists
        scale = scale_of(signal, probe, level)
        fit = fit._replace(diagonal=jnp.where(unset, scale, fit.diagonal))

        def moved(fit):
            # Where there is no signal, neither noise nor the probe may move Q.
            h = signal + (level + jnp.finfo(dtype).eps * jnp.abs(signal)) * noise * sizes.present
            rate = value_at(self.precond_lr, count, dtype)
            decay = jnp.asarray(self.lipschitz_decay, dtype)
            w = jnp.where(sizes.present, normal_probe if probe is None else probe, 0)
            new = _move(fit, h, w, rate, decay)
            balances = jax.random.bernoulli(balance_key, BALANCE_PROBABILITY)
            u, v = jax.lax.cond(balances, _balanced, lambda u, v: (u, v), new.u, new.v)
            new = new._replace(u=u, v=v)
            # A solve that fails is left out: the next one has other noise.
            return kept_unless(is_finite(new), new, fit)

        chance = value_at(self.update_probability, count)
        moves = (jax.random.uniform(move_key) < chance) & jnp.any(fit.diagonal != 0) & sizes.exists
        return jax.lax.cond(moves, moved, lambda fit: fit, fit)


def scale_by_lra_psgd(
    precond_lr: Schedulable = 0.1,
    *,
    rank: int = static(10),
    criterion: Criterion = "whitening",
    b1: Schedulable = static(0.0),
    whiten: Whiten = "gradient",
    update_probability: Schedulable = 1.0,
    init_scale: Number | None = None,
    damping: Schedulable = 1e-9,
    lipschitz_decay: Number = 0.99,
    key: Key = 0,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the whole tree by P = QᵀQ, Q = (I + U Vᵀ) diag(d), learned on a group.

    Memory (2 r + 1) n and as much time a step, for n parameters; rank 0 is a diagonal. Q minimises
    E[‖Q h‖² + ‖Q⁻ᵀ v‖²], v ~ N(0, I), so that P = (E[h hᵀ])^(-1/2): whitening for h = g, and |H|⁻¹
    for Hessian-vector products h = Hv.

    Args:
      precond_lr: μ > 0, a number or a schedule of the step count. A schedule that falls lets P
        converge.
      rank: columns r of U and V, at least 0.
      criterion: "whitening", or "newton", which needs `probe` and `hvp` (`hessian_probe`) at every
        update.
      b1: decay of the bias-corrected momentum that is preconditioned, in [0, 1]; 0 for none. A
        number or a schedule; with any but the Python number 0 the state keeps a buffer.
      whiten: "gradient" or "momentum": which of them P whitens.
      update_probability: probability of moving Q at a step, in [0, 1], a number or a schedule
        (`flat_then_decay`).
      init_scale: d at the start; None: (mean|g|⁴ + damping⁴)^(-1/8) of the first gradient that is
        not zero. Until then d is zero, and so is the update.
      damping: standard deviation of the noise on the gradient, at least 0, a number or a schedule;
        it bounds P by 1/damping.
      lipschitz_decay: β, the decay of the running bounds on the steps, in [0, 1].
      key: an integer seed from 0 to 2⁶⁴ - 1, or a PRNG key of any kind.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. The vector of
        all leaves and what is kept of it are divided along n where the devices divide n.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, probe=None,
      hvp=None)`.

    Raises:
      ValueError: for an unknown choice, a number out of range, leaves that are not real, a missing
        probe or hvp, and trees or shapes that differ.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> state = optax_curv.scale_by_lra_psgd(rank=4).init(params)
      >>> state.diagonal.shape, state.u.shape
      ((9,), (9, 4))

    References:
      Pooladzandi and Li 2024, arXiv:2402.04553, sec. 4. Deviations: running bounds, a scale that
      waits for a gradient that is not zero, parameters without a gradient, which neither move nor
      are fitted, and columns of I + U Vᵀ whose lengths stay within a factor of ten of one.
    """
    rule = _LowRankPsgd(
        method="scale_by_lra_psgd",
        owners=owners_of("scale_by_lra_psgd", sharding),
        precond_lr=precond_lr,
        rank=rank,
        criterion=criterion,
        b1=b1,
        whiten=whiten,
        update_probability=update_probability,
        init_scale=init_scale,
        damping=damping,
        lipschitz_decay=lipschitz_decay,
        key=key,
    )
    rule.check_options()
    return transformation(rule)


def lra_psgd(
    learning_rate: Schedulable,
    b1: Schedulable = 0.9,
    *,
    weight_decay: Number = 0.0,
    weight_decay_mask: Tree | None = None,
    gradient_bound: Number | None = 3.0,
    precond_lr: Schedulable = 0.1,
    rank: int = static(10),
    criterion: Criterion = "whitening",
    update_probability: Schedulable = 1.0,
    init_scale: Number | None = None,
    key: Key = 0,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Low-rank PSGD of the whole tree with momentum, decoupled weight decay and a learning rate.

    The options for research are arguments of `scale_by_lra_psgd`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the bias-corrected momentum that is preconditioned, in [0, 1]; 0 for none. A
        number or a schedule; with any but the Python number 0 the state keeps a buffer.
      weight_decay: decoupled from the preconditioner, as in AdamW. Other than the Python number 0,
        update needs params.
      weight_decay_mask: which leaves decay, as in `optax.add_decayed_weights`.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of the gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
      precond_lr: μ > 0, a number or a schedule of the step count. A schedule that falls lets P
        converge.
      rank: columns r of U and V, at least 0.
      criterion: "whitening", or "newton", which needs `probe` and `hvp` (`hessian_probe`) at every
        update.
      update_probability: probability of moving Q at a step, in [0, 1], a number or a schedule
        (`flat_then_decay`).
      init_scale: d at the start; None: (mean|g|⁴ + damping⁴)^(-1/8) of the first gradient that is
        not zero. Until then d is zero, and so is the update.
      key: an integer seed from 0 to 2⁶⁴ - 1, or a PRNG key of any kind.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. The vector of
        all leaves and what is kept of it are divided along n where the devices divide n.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params, *, probe=None,
      hvp=None)`. With a NaN or an infinity in any gradient no leaf moves.

    Raises:
      ValueError: for an unknown choice, a number out of range, leaves that are not real, and a
        learning rate that is none; in `update` for a missing probe or hvp, and for trees or shapes
        that differ.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx, params = optax_curv.lra_psgd(0.1, rank=1), jnp.ones(3)
      >>> updates, state = jax.jit(tx.update)(jnp.ones(3), tx.init(params), params)
      >>> bool(jnp.all(updates < 0))
      True

    References:
      Pooladzandi and Li 2024, arXiv:2402.04553.
    """
    rule = _LowRankPsgd(
        method="lra_psgd",
        owners=owners_of("lra_psgd", sharding),
        weight_decay_mask=weight_decay_mask,
        precond_lr=precond_lr,
        rank=rank,
        criterion=criterion,
        b1=b1,
        whiten="gradient",
        update_probability=update_probability,
        init_scale=init_scale,
        damping=1e-9,
        lipschitz_decay=0.99,
        key=key,
    )
    rule.check_options()
    return descending(rule, learning_rate, weight_decay, gradient_bound, *decayed(weight_decay))
