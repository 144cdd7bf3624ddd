"""Dense PSGD: one matrix P = QᵀQ for all parameters of a small tree."""

import dataclasses
from typing import Any

import optax

from optax_curv.preconditioners._psgd.flat import FlatRule, flat_members
from optax_curv.preconditioners._psgd.pieces import descending
from optax_curv.preconditioners._psgd.rule import KronRule
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.aliases import decayed
from optax_curv.preconditioners._transformation.numbers import static
from optax_curv.preconditioners._transformation.transformation import transformation
from optax_curv.typing import Criterion, Geometry, Key, Number, Schedulable, Sharding, Tree, Whiten


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _DensePsgd(FlatRule, KronRule):
    """Kronecker PSGD of the vector of all leaves, whose only factor is dense."""

    stacked: Any = None
    max_dense_dim: int = 2**31
    max_skew: float = float("inf")
    eps: Number = 1e-8
    update_last: bool = False

    def check_options(self, method: str):
        """Refuses options that cannot be, by name."""
        if self.geometry == "right_triangular":
            raise ValueError(
                f"{method}: geometry='right_triangular' knows matrices only; use another geometry."
            )
        super().check_options(method)

    def members(self, tree):
        """The vector of all leaves."""
        return flat_members(self.method, tree, self.weight_decay_mask, self.owners)


def scale_by_dense_psgd(
    precond_lr: Schedulable = 0.1,
    *,
    geometry: Geometry = "q0.5eq1.5",
    criterion: Criterion = "whitening",
    b1: Schedulable = static(0.0),
    whiten: Whiten = "gradient",
    update_probability: Schedulable = static(1.0),
    init_scale: Number | None = None,
    damping: Schedulable = 1e-9,
    lipschitz_decay: Number = 0.9,
    precond_dtype: Any = "float32",
    key: Key = 0,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions a small whole tree by one matrix P = QᵀQ of its n parameters.

    P is learned as in Kronecker PSGD, on the vector of all leaves in flattening order. Memory n²,
    time n³ a step. Nothing about P is assumed, so for "newton" with exact products it reaches
    |H|⁻¹, of an indefinite H too.

    Args:
      precond_lr: μ > 0, a number or a schedule of the step count. A schedule that falls lets P
        converge.
      geometry: how Q moves: "q0.5eq1.5", "eq", "qep", "qeq", "quad" or "quad4p", see
        `scale_by_kron_psgd` for their mathematics.
      criterion: "whitening", or "newton", which needs `probe` and `hvp` (`hessian_probe`) at every
        update.
      b1: decay of the bias-corrected momentum that is preconditioned, in [0, 1]; 0 for none. A
        number or a schedule; with any but the Python number 0 the state keeps a buffer.
      whiten: "gradient" or "momentum": which of them P whitens.
      update_probability: probability of moving Q at a step, in [0, 1], a number or a schedule
        (`flat_then_decay`). Other than the Python number 1, P is kept in the state and the other
        steps cost one product; a vmap over whole steps turns this choice into computing both.
      init_scale: Q starts as this multiple of the identity; None: (mean|g|⁴ + damping⁴)^(-1/8) of
        the first gradient that is not zero. Until then Q is zero, and so is the update.
      damping: σ ≥ 0, the standard deviation of a noise that the gradient is taken to have, a number
        or a schedule; it bounds P by 1/damping.
      lipschitz_decay: β, the decay of the running bounds on the steps, in [0, 1].
      precond_dtype: in which Q is kept where no leaf is float64. "bfloat16" halves the memory; the
        arithmetic stays float32.
      key: an integer seed from 0 to 2⁶⁴ - 1, or a PRNG key of any kind.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. The vector of
        all leaves and what is kept of it are divided along n where the devices divide n.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, probe=None,
      hvp=None)`. Its state is a `ScaleByKronPsgdState` with one stack, whose only factor is a
      matrix [1, n, n].

    Raises:
      ValueError: for an unknown choice, "right_triangular" among them, which knows matrices only; a
        number out of range; leaves that are not real; in `update` for a missing probe or hvp, and
        for trees or shapes that differ.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> state = optax_curv.scale_by_dense_psgd().init(params)
      >>> [q.shape for q in optax_curv.axis_factors(state, params)]
      [(9, 9)]

    References:
      Li 2024, arXiv:2402.11858.
    """
    rule = _DensePsgd(
        method="scale_by_dense_psgd",
        owners=owners_of("scale_by_dense_psgd", sharding),
        precond_lr=precond_lr,
        geometry=geometry,
        criterion=criterion,
        b1=b1,
        whiten=whiten,
        update_probability=update_probability,
        init_scale=init_scale,
        damping=damping,
        lipschitz_decay=lipschitz_decay,
        precond_dtype=precond_dtype,
        key=key,
    )
    rule.check_options(rule.method)
    return transformation(rule)


def dense_psgd(
    learning_rate: Schedulable,
    b1: Schedulable = 0.9,
    *,
    weight_decay: Number = 0.0,
    weight_decay_mask: Tree | None = None,
    gradient_bound: Number | None = 3.0,
    precond_lr: Schedulable = 0.1,
    geometry: Geometry = "q0.5eq1.5",
    criterion: Criterion = "whitening",
    update_probability: Schedulable = static(1.0),
    init_scale: Number | None = None,
    precond_dtype: Any = "float32",
    key: Key = 0,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Dense PSGD of a small whole tree with momentum, decoupled weight decay and a learning rate.

    The options for research are arguments of `scale_by_dense_psgd`.

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
      geometry: how Q moves: "q0.5eq1.5", "eq", "qep", "qeq", "quad" or "quad4p", see
        `scale_by_kron_psgd` for their mathematics.
      criterion: "whitening", or "newton", which needs `probe` and `hvp` (`hessian_probe`) at every
        update.
      update_probability: probability of moving Q at a step, in [0, 1], a number or a schedule
        (`flat_then_decay`). Other than the Python number 1, P is kept in the state and the other
        steps cost one product; a vmap over whole steps turns this choice into computing both.
      init_scale: Q starts as this multiple of the identity; None: (mean|g|⁴ + damping⁴)^(-1/8) of
        the first gradient that is not zero. Until then Q is zero, and so is the update.
      precond_dtype: in which Q is kept where no leaf is float64. "bfloat16" halves the memory; the
        arithmetic stays float32.
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
      >>> tx, params = optax_curv.dense_psgd(0.1), jnp.ones(3)
      >>> updates, state = jax.jit(tx.update)(jnp.full(3, 1e-5), tx.init(params), params)
      >>> print(updates.round(1))
      [-0.1 -0.1 -0.1]

    References:
      Li 2024, arXiv:2402.11858.
    """
    rule = _DensePsgd(
        method="dense_psgd",
        owners=owners_of("dense_psgd", sharding),
        weight_decay_mask=weight_decay_mask,
        precond_lr=precond_lr,
        geometry=geometry,
        criterion=criterion,
        b1=b1,
        whiten="gradient",
        update_probability=update_probability,
        init_scale=init_scale,
        damping=1e-9,
        lipschitz_decay=0.9,
        precond_dtype=precond_dtype,
        key=key,
    )
    rule.check_options(rule.method)
    return descending(rule, learning_rate, weight_decay, gradient_bound, *decayed(weight_decay))
