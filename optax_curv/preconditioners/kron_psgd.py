"""Kronecker PSGD: P = QᵀQ, a Kronecker product over all axes of a leaf, learned on a group."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from optax_curv.layers import Layers
from optax_curv.preconditioners._psgd import axis_factors as factor_trees
from optax_curv.preconditioners._psgd.pieces import bounded, descending
from optax_curv.preconditioners._psgd.rule import KronRule
from optax_curv.preconditioners._psgd.rule import ScaleByKronPsgdState as ScaleByKronPsgdState
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.aliases import decayed
from optax_curv.preconditioners._transformation.numbers import static
from optax_curv.preconditioners._transformation.transformation import transformation
from optax_curv.typing import (
    Criterion,
    Geometry,
    Key,
    Number,
    Schedulable,
    Sharding,
    Stacked,
    Tree,
    Whiten,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _KronPsgd(KronRule):
    """Kronecker PSGD of every leaf; `scale_by_kron_psgd` documents the options."""

    @property
    def complex_leaves(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The original's rule knows real matrices only."""
        return self.geometry != "right_triangular"


def scale_by_kron_psgd(
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
    max_dense_dim: int = static(8192),
    max_skew: float = static(1.0),
    precond_dtype: Any = "float32",
    stacked: Stacked = None,
    layers: Layers | None = None,
    block_size: int | None = None,
    update_last: bool = False,
    sharding: Sharding = None,
    transport_dtype: Any = None,
    factor_sharding: Sharding = None,
    eps: Number = 1e-8,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each leaf by P = ⊗ QᵢᴴQᵢ, learned to whiten gradients or invert curvature.

    There is a factor for each axis. For "whitening", P is fitted so that P g has the covariance of
    white noise, P → (E[g gᴴ])^(-1/2); for "newton", with Hessian-vector products h = Hv of random
    probes v, P → |H|⁻¹ (in each case the closest Kronecker product). Write N for the size of a
    leaf, dᵢ for an axis, Uᵢ(X) = X₍ᵢ₎X₍ᵢ₎ᴴ for the mode-i second moment, μ for `precond_lr`, and
    D = T1 - T2:

    =========== ============================= =====================================================
    geometry    T1, T2                        step
    =========== ============================= =====================================================
    eq          Uᵢ(⊗Q g), Uᵢ(⊗Q⁻ᴴ v)          Q ← Q - μ/L triu(D) Q
    qep         Qᵢ Uᵢ(P g) Qᵢᴴ, (N/dᵢ) Qᵢ Qᵢᴴ Q ← Q - μ/L D Q, balanced at every step
    qeq         Uᵢ(P g), (N/dᵢ) I             Q ← Q - μ/L Q D
    q0.5eq1.5   as qeq                        a Procrustes rotation, then Q ← Q - μ/L D Q
    quad        as qeq                        E = μ/2L D, p = Q - E Q, p ← p - p E, Q ← (p + pᴴ)/2
    quad4p      as qeq, Q holds P itself      as quad with μ/L
    =========== ============================= =====================================================

    The rotation keeps Q near symmetric. For "newton" h takes the place of g and Uᵢ(v) that of
    (N/dᵢ) I. ℓ = ‖T1 + T2‖₂ and L ← max(βL + (1-β)ℓ, ℓ). The new P is applied to g itself, or to
    its momentum. P runs away nowhere, and catches up at once:

    - T1 has a part that noise of standard deviation σ on g would have, σ² = damping² + (ρ rms g)²
      with ρ of 1024 roundings, which bounds P by 1/σ. The noise itself would turn Q.
    - T2, and N with it, counts rows of the leaf in which g is above ρ rms g. Where a row has none,
      P may grow to twice what it is where there is one, and the row gets no step.
    - While ℓ exceeds 4 L, or ‖P g‖² four times its expectation, the step is repeated on the axis
      along which P is largest for this gradient beside what it usually is, with (1 - e^(-1/4)) / ℓ
      for μ/L, e being the excess, but at most 1/2ℓ.

    "right_triangular" is the rule of the original implementation, for parity: the probe is g
    itself, S = sym((A - B)(A + B)ᵀ), Q ← Q - μ Q triu(S)/(‖S‖_F + eps), and matrices become Q_LᵀQ_L
    g Q_R Q_Rᵀ; other ranks pass unchanged. It *never preconditions*: from Q = I, A = B = g and S =
    0 for ever. Its step also multiplies on the wrong side (the Lie gradient of its own A is triu(S)
    Q), and Q_R Q_Rᵀ contradicts Q_RᵀQ_R. It takes no damping, no Lipschitz bound, and all its
    factors are dense.

    Args:
      precond_lr: μ > 0, a number or a schedule of the step count. A schedule that falls lets P
        converge.
      geometry: how Q moves: "q0.5eq1.5", "eq", "qep", "qeq", "quad", "quad4p" or
        "right_triangular".
      criterion: "whitening", or "newton", which needs `probe` and `hvp` (`hessian_probe`) at every
        update.
      b1: decay of the bias-corrected momentum that is preconditioned, in [0, 1]; 0 for none. A
        number or a schedule; with any but the Python number 0 the state keeps a buffer.
      whiten: "gradient" or "momentum": which of them P whitens.
      update_probability: probability of moving Q at a step, in [0, 1], a number or a schedule
        (`flat_then_decay`). Other than the Python number 1, P is kept in the state and the other
        steps cost one product an axis; a vmap over whole steps turns this choice into computing
        both.
      init_scale: Q starts as this multiple of the identity; None: (mean|g|⁴ + damping⁴)^(-1/8) of
        the first gradient of a leaf that is not zero. Until then the leaf's factors are zero, and
        so is its update.
      damping: σ ≥ 0, the standard deviation of a noise that the gradient is taken to have, a number
        or a schedule; it bounds P by 1/damping.
      lipschitz_decay: β, the decay of the running bounds on the steps, in [0, 1].
      max_dense_dim: longer axes have diagonal factors.
      max_skew: so have axes whose square exceeds `max_skew` times the size of the leaf, and axes of
        length 1.
      precond_dtype: in which factors of leaves up to float32 are kept. "bfloat16" halves the
        memory; the arithmetic stays float32. Leaves of float64 keep float64.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a prefix of the parameters' tree with them, or a function of the
        parameters that returns one.
      layers: from `find_layers`; they say what of every kernel is a matrix, see `matrix_axes`.
        None: a factor for every axis of a leaf.
      block_size: longer axes are cut into the fewest blocks of nearly equal length, each with
        factors of its own.
      update_last: whether P is applied before Q moves, so that no gradient is whitened by what it
        has taught itself. A gradient that jumps then meets the P of the ones before it.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many tensors of every shape, keeps what belongs to them, and alone computes
        their directions.
      transport_dtype: in which gradients go to their owners and directions come back, such as
        "bfloat16"; None: in which they are.
      factor_sharding: the old name of `sharding`.
      eps: floor of the normaliser of "right_triangular" only.
      key: an integer seed from 0 to 2⁶⁴ - 1, or a PRNG key of any kind.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, probe=None,
      hvp=None)`. With a NaN or an infinity the update is zero and the state keeps its last value
      but for `total_notfinite`. `axis_factors` shows the factors, `with_axis_factors` sets them.

    Raises:
      ValueError: for an unknown choice, a number out of range, a leaf that is not of floating
        point; in `update` for a missing probe or hvp, for trees or shapes that differ, and for the
        state of another geometry whose factors are not of the same kind.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> kron = optax_curv.scale_by_kron_psgd(b1=0.9)
      >>> tx = optax.chain(kron, optax.scale_by_learning_rate(0.01))
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> [q.shape for q in optax_curv.axis_factors(state, params)["w"]]
      [(4,), (3, 3)]
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state)
      >>> jax.tree.map(jnp.shape, updates)
      {'b': (3,), 'w': (4, 3)}

    References:
      Li, *Stochastic Hessian fittings with Lie groups*, 2024, arXiv:2402.11858. Pooladzandi and Li,
      *Curvature-informed SGD via general purpose Lie-group preconditioners*, 2024,
      arXiv:2402.04553. Deviations: the scale waits for a gradient that is not zero, noise is its
      expectation, and rows without a gradient and sudden ones are treated as above.
    """
    rule = _KronPsgd(
        method="scale_by_kron_psgd",
        layers=layers,
        stacked=stacked,
        precond_lr=precond_lr,
        geometry=geometry,
        criterion=criterion,
        b1=b1,
        whiten=whiten,
        update_probability=update_probability,
        init_scale=init_scale,
        damping=damping,
        lipschitz_decay=lipschitz_decay,
        max_dense_dim=max_dense_dim,
        max_skew=max_skew,
        precond_dtype=precond_dtype,
        block_size=block_size,
        update_last=update_last,
        owners=owners_of("scale_by_kron_psgd", sharding, factor_sharding, transport_dtype),
        eps=eps,
        key=key,
    )
    rule.check_options(rule.method)
    return transformation(rule)


def kron_psgd(
    learning_rate: Schedulable,
    b1: Schedulable = 0.9,
    *,
    layers: Layers | None = None,
    weight_decay: Number = 0.0,
    weight_decay_mask: Tree | None = None,
    gradient_bound: Number | None = 3.0,
    max_rms: Number | None = 2.0,
    precond_lr: Schedulable = 0.1,
    geometry: Geometry = "q0.5eq1.5",
    update_probability: Schedulable = static(1.0),
    max_dense_dim: int = static(8192),
    precond_dtype: Any = "float32",
    stacked: Stacked = None,
    key: Key = 0,
    sharding: Sharding = None,
    transport_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Kronecker PSGD with momentum, bounded updates, decoupled weight decay and a learning rate.

    It whitens gradients as `scale_by_kron_psgd` does, which has the options for research and the
    mathematics. A whitened gradient has a root mean square near one; the bound acts where P has not
    yet followed a gradient that grew.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the bias-corrected momentum that is preconditioned, in [0, 1]; 0 for none. A
        number or a schedule; with any but the Python number 0 the state keeps a buffer.
      layers: from `find_layers`; they say what of every kernel is a matrix, see `matrix_axes`.
        None: a factor for every axis of a leaf.
      weight_decay: decoupled from the preconditioner, as in AdamW. Other than the Python number 0,
        update needs params.
      weight_decay_mask: which leaves decay, as in `optax.add_decayed_weights`.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each leaf's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
      max_rms: largest root mean square of each leaf's update before decay and learning rate, and a
        fifth of the largest entry (2 and 10 by default, as in psgd_torch); None for no bound. Each
        layer of a stacked leaf is bounded by itself.
      precond_lr: μ > 0, a number or a schedule of the step count. A schedule that falls lets P
        converge.
      geometry: how Q moves: "q0.5eq1.5", "eq", "qep", "qeq", "quad", "quad4p" or
        "right_triangular".
      update_probability: probability of moving Q at a step, in [0, 1], a number or a schedule
        (`flat_then_decay`). Other than the Python number 1, P is kept in the state and the other
        steps cost one product an axis; a vmap over whole steps turns this choice into computing
        both.
      max_dense_dim: longer axes have diagonal factors, as have axes whose square exceeds the size
        of the leaf, and axes of length 1.
      precond_dtype: in which factors of leaves up to float32 are kept. "bfloat16" halves the
        memory; the arithmetic stays float32. Leaves of float64 keep float64.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a prefix of the parameters' tree with them, or a function of the
        parameters that returns one.
      key: an integer seed from 0 to 2⁶⁴ - 1, or a PRNG key of any kind.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many tensors of every shape, keeps what belongs to them, and alone computes
        their directions.
      transport_dtype: in which gradients go to their owners and directions come back, such as
        "bfloat16"; None: in which they are.

    Returns:
      A `GradientTransformationExtraArgs`. With a NaN or an infinity in any gradient no leaf moves.

    Raises:
      ValueError: for an unknown choice, a number out of range, a leaf that is not of floating
        point, and a learning rate that is none; in `update` for trees or shapes that differ.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> tx = optax_curv.kron_psgd(0.05, weight_decay=1e-4)
      >>> params = {"w": jnp.ones((4, 3))}
      >>> grads = {"w": jnp.full((4, 3), 1e-6)}
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> print(updates["w"].round(2)[0])
      [-0.05 -0.05 -0.05]

    References:
      Li, *Stochastic Hessian fittings with Lie groups*, 2024, arXiv:2402.11858.
    """
    rule = _KronPsgd(
        method="kron_psgd",
        layers=layers,
        stacked=stacked,
        weight_decay_mask=weight_decay_mask,
        precond_lr=precond_lr,
        geometry=geometry,
        criterion="whitening",
        b1=b1,
        whiten="gradient",
        update_probability=update_probability,
        init_scale=None,
        damping=1e-9,
        lipschitz_decay=0.9,
        max_dense_dim=max_dense_dim,
        max_skew=1.0,
        update_last=False,
        precond_dtype=precond_dtype,
        block_size=None,
        owners=owners_of("kron_psgd", sharding, transport_dtype=transport_dtype),
        eps=1e-8,
        key=key,
    )
    rule.check_options(rule.method)
    pieces = [*bounded(rule.method, max_rms), *decayed(weight_decay)]
    return descending(rule, learning_rate, weight_decay, gradient_bound, *pieces)


def axis_factors(state: Any, params: Tree) -> Tree:
    """Shows the factors of Kronecker PSGD as a tree like the parameters.

    They are Q, or P itself for `geometry="quad4p"`. Dense PSGD has one for the whole vector.

    Args:
      state: a `ScaleByKronPsgdState`, or the state of a chain or an alias that holds one.
      params: the parameters, of which only the tree and the shapes are read.

    Returns:
      A tree in which each leaf is replaced by the tuple of its axes' factors, dense [*stack, d, d]
      or diagonal [*stack, d]; a leaf cut by `block_size` by the tuple of its blocks' tuples,
      neighbours along its last axis first; one without factors by (). For dense PSGD the tuple of
      one matrix [n, n].

    Raises:
      ValueError: for a state that holds no `ScaleByKronPsgdState`, or several.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> params = {"w": jnp.ones((3, 2))}
      >>> state = optax_curv.kron_psgd(0.1, max_dense_dim=2).init(params)
      >>> [q.shape for q in optax_curv.axis_factors(state, params)["w"]]
      [(3,), (2, 2)]
    """
    return factor_trees.shown(factor_trees.state_within("axis_factors", state), params)


def with_axis_factors(state: Any, params: Tree, tree: Tree) -> Any:
    """Returns a state that goes on from given factors; a P that it kept is dropped.

    Args:
      state: a `ScaleByKronPsgdState`, or the state of a chain or an alias that holds one.
      params: the parameters, of which only the tree and the shapes are read.
      tree: the factors, as `axis_factors` shows them.

    Returns:
      The state with these factors, in its own dtypes.

    Raises:
      ValueError: for a state that holds no `ScaleByKronPsgdState`, or several, and for factors of
        another tree or other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> params = {"w": jnp.ones((3, 2))}
      >>> state = optax_curv.scale_by_kron_psgd(init_scale=1.0).init(params)
      >>> doubled = jax.tree.map(lambda q: 2 * q, optax_curv.axis_factors(state, params))
      >>> state = optax_curv.with_axis_factors(state, params, doubled)
      >>> print(optax_curv.axis_factors(state, params)["w"][0])
      [2. 2. 2.]
    """
    factor_trees.state_within("with_axis_factors", state)
    return factor_trees.with_state(
        state, lambda found: factor_trees.replaced("with_axis_factors", found, params, tree)
    )


def flat_then_decay(
    flat_steps: Number = 500, decay: Number = 1e-3, floor: Number = 0.03
) -> optax.Schedule:
    """Returns a schedule for `update_probability`: 1 at first, then exp(-decay · (steps since)).

    It never falls below `floor`. Q is learned fast while the loss falls fast, and costs little
    afterwards; the defaults are psgd_torch's.

    Args:
      flat_steps: how many steps have the value 1.
      decay: rate of the exponential, per step.
      floor: the least value.

    Returns:
      A schedule, of the step count.

    Examples:
      >>> import optax_curv
      >>> schedule = optax_curv.flat_then_decay()
      >>> [round(float(schedule(count)), 3) for count in (0, 500, 1500, 10**5)]
      [1.0, 1.0, 0.368, 0.03]
    """

    def schedule(count):
        since = jnp.maximum(jnp.asarray(count) - flat_steps, 0)
        return jnp.maximum(jnp.exp(-jnp.asarray(decay) * since), floor)

    return schedule
