"""Kronecker PSGD: a preconditioner P = QᵀQ that is a Kronecker product over all axes of a leaf, learned on a group."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import kron_matvec
from optax_curv.preconditioners._psgd import geometries as kron_geometries
from optax_curv.preconditioners._psgd import step as kron_steps
from optax_curv.preconditioners._psgd.kron_layout import LIKE_FACTORS
from optax_curv.preconditioners._psgd.options import (
    METHOD,
    Options,
    check_extras,
    check_options,
    is_python_number,
    layout_of_params,
    layout_of_state,
)
from optax_curv.preconditioners._stacks.owners import as_kept, equally_varying, with_sharding_types
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners._transformation.contracts import static
from optax_curv.preconditioners.chain_pieces import clip_leaves


class ScaleByKronPsgdState(NamedTuple):
    """State of `scale_by_kron_psgd`.

    Attributes:
      count: steps taken, int32 [].
      key: raw key data, uint32 [...].
      factors: like the parameters, each leaf replaced by the tuple of its axis factors, [*stack, d,
        d] or [*stack, d]; a leaf cut by `block_size` by the tuple of its blocks' tuples. All zero:
        not set yet.
      lipschitz: like the parameters, each leaf replaced by its blocks' running bounds L, [*stack,
        axes].
      momentum: like the parameters, float32 at least; None where b1 is the Python number 0.
      preconditioners: like factors, P of each axis; None where P would be used once only, or is the
        factor itself.
      fingerprint: of the factors to which `preconditioners` belong, uint32 [factored tensors]; None
        with them.
      total_notfinite: steps skipped for a NaN or infinity, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    factors: Any
    lipschitz: Any
    momentum: Any
    preconditioners: Any
    fingerprint: jax.Array | None
    total_notfinite: jax.Array


def scale_by_kron_psgd(
    precond_lr: Any = 0.1,
    *,
    geometry="q0.5eq1.5",
    criterion="whitening",
    b1=static(0.0),
    whiten="gradient",
    update_probability=static(1.0),
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.9,
    max_dense_dim=static(8192),
    max_skew=static(1.0),
    precond_dtype="float32",
    stacked=None,
    block_size=None,
    factor_sharding=None,
    eps=1e-8,
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each leaf by P = ⊗ QᵢᴴQᵢ, a factor for each axis, learned to whiten gradients or invert curvature.

    For "whitening", P is fitted so that P g has the covariance of white noise, P → (E[g
    gᴴ])^(-1/2); for "newton", with Hessian-vector products h = Hv of random probes v, P → |H|⁻¹ (in
    each case the closest Kronecker product). Write N for the size of a leaf, dᵢ for an axis, Uᵢ(X)
    = X₍ᵢ₎X₍ᵢ₎ᴴ for the mode-i second moment, μ for `precond_lr`:

    =========== ================================ ==================================================================
    geometry    T1, T2                           step, with D = T1 - T2
    =========== ================================ ==================================================================
    eq          Uᵢ(⊗Q g), Uᵢ(⊗Q⁻ᴴ v)             Q ← Q - μ/L triu(D) Q qep         Qᵢ Uᵢ(P g) Qᵢᴴ,
    (N/dᵢ) Qᵢ Qᵢᴴ    Q ← Q - μ/L D Q, balanced at every step qeq         Uᵢ(P g), (N/dᵢ) I
    Q ← Q - μ/L Q D q0.5eq1.5   as qeq                           a Procrustes rotation that keeps Q
    near symmetric, then Q ← Q - μ/L D Q quad        as qeq                           E = μ/2L D, p
    = Q - E Q, p ← p - p E, Q ← (p + pᴴ)/2 quad4p      as qeq, Q holds P itself         as quad with
    μ/L
    =========== ================================ ==================================================================

    For "newton" h takes the place of g and Uᵢ(v) that of (N/dᵢ) I. ℓ = ‖T1 + T2‖₂ and L ← max(βL +
    (1-β)ℓ, ℓ). Before the step g receives the noise (damping + eps(dtype)|g|) ⊙ N(0, I), which
    bounds P by 1/damping; the new P is applied to g itself, or to its momentum.

    "right_triangular" is the rule of the original implementation, for parity: the probe is g
    itself, S = sym((A - B)(A + B)ᵀ), Q ← Q - μ Q triu(S)/(‖S‖_F + eps), and matrices become Q_LᵀQ_L
    g Q_R Q_Rᵀ; other ranks pass unchanged. It *never preconditions*: from Q = I, A = B = g and S =
    0 for ever. Its step also multiplies on the wrong side (the Lie gradient of its own A is triu(S)
    Q), and Q_R Q_Rᵀ contradicts Q_RᵀQ_R. It takes no damping, no Lipschitz bound, and all its
    factors are dense.

    Args:
      precond_lr: μ > 0, a number or a schedule of the step count. A schedule that falls lets P
        converge.
      geometry: see above.
      criterion: "whitening", or "newton", which needs `probe` and `hvp` (`hessian_probe`) at every
        update.
      b1: decay of the bias-corrected momentum that is preconditioned; 0 for none. A traced b1
        always keeps a buffer.
      whiten: "gradient" or "momentum": which of them P whitens.
      update_probability: probability of moving Q at a step, a number or a schedule
        (`flat_then_decay`). Other than the Python number 1, P is kept in the state and the other
        steps cost one product an axis; a vmap over whole steps turns this choice into computing
        both.
      init_scale: Q starts as this multiple of the identity; None: (mean|g|⁴ + damping⁴)^(-1/8) of
        the first gradient of a leaf that is not zero. Until then the leaf's factors are zero, and
        so is its update.
      damping: at least 0.
      lipschitz_decay: β, in [0, 1].
      max_dense_dim: longer axes have diagonal factors.
      max_skew: so have axes whose square exceeds `max_skew` times the size of the leaf, and axes of
        size 1.
      precond_dtype: in which factors of leaves up to float32 are kept. "bfloat16" halves the
        memory; the arithmetic stays float32. Leaves of float64 keep float64.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a tree of them that is a prefix of the parameters', or a function of
        the parameters that returns one.
      block_size: longer axes are cut into the fewest blocks of nearly equal length, each with
        factors of its own.
      factor_sharding: None, or a `jax.sharding.NamedSharding` whose first entry names mesh axes,
        such as ``NamedSharding(mesh, PartitionSpec(("data", "model")))``. Leaves and blocks of
        equal shape then move and apply their factors on their devices in turn, and factors are kept
        divided along the first axis that the number of devices divides.
      eps: floor of the normaliser of "right_triangular" only.
      key: int or PRNG key.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, probe=None,
      hvp=None)`. With a NaN or infinity the update is zero and the state keeps its last value but
      for `total_notfinite`.

    Raises:
      ValueError: for an unknown choice, a number out of range, a leaf that is not of floating
        point; in `update` for a missing probe or hvp and for trees or shapes that differ.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> kron = optax_curv.scale_by_kron_psgd(b1=0.9)
      >>> tx = optax.chain(kron, optax.scale_by_learning_rate(0.01))
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> [q.shape for q in state[0].factors["w"]]
      [(4,), (3, 3)]
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state)
      >>> jax.tree.map(jnp.shape, updates)
      {'b': (3,), 'w': (4, 3)}

    References:
      Li, *Stochastic Hessian fittings with Lie groups*, 2024, arXiv:2402.11858. Pooladzandi and Li,
      *Curvature-informed SGD via general purpose Lie-group preconditioners*, 2024,
      arXiv:2402.04553. Deviation: the scale waits for a gradient that is not zero.
    """
    options = Options(**locals())
    check_options(options)
    update = with_sharding_types(functools.partial(_update, options))
    return optax.GradientTransformationExtraArgs(functools.partial(_init, options), update)


def kron_psgd(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    *,
    weight_decay=0.0,
    weight_decay_mask=None,
    max_rms=2.0,
    max_abs=10.0,
    precond_lr=0.1,
    geometry="q0.5eq1.5",
    criterion="whitening",
    whiten="gradient",
    update_probability=static(1.0),
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.9,
    max_dense_dim=static(8192),
    max_skew=static(1.0),
    precond_dtype="float32",
    stacked=None,
    block_size=None,
    factor_sharding=None,
    eps=1e-8,
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """Kronecker PSGD with momentum, clipped updates, decoupled weight decay and a learning rate.

    The chain of `scale_by_kron_psgd`, which documents the other arguments, the clips of
    `clip_by_max_abs` and `optax.clip_by_block_rms`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`. A whitened gradient has a root mean square near one; the clips
    act where P has not yet followed a gradient that grew.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the momentum.
      weight_decay: decoupled from the preconditioner, as in AdamW. Other than the Python number 0,
        update needs params.
      weight_decay_mask: as in `optax.add_decayed_weights`.
      max_rms: largest root mean square of a leaf's update before decay and learning rate (2, as in
        psgd_torch); or None.
      max_abs: largest magnitude of an entry (10, as in psgd_torch); or None.
      precond_lr: see `scale_by_kron_psgd`, as for all that follow.
      geometry: see there.
      criterion: see there.
      whiten: see there.
      update_probability: see there.
      init_scale: see there.
      damping: see there.
      lipschitz_decay: see there.
      max_dense_dim: see there.
      max_skew: see there.
      precond_dtype: see there.
      stacked: see there.
      block_size: see there.
      factor_sharding: see there.
      eps: see there.
      key: see there.

    Returns:
      The chain, a `GradientTransformationExtraArgs`.

    Raises:
      ValueError: as `scale_by_kron_psgd`; for a bound that is not above zero.

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
    given, decays = locals(), not is_python_number(weight_decay, 0)
    contracts.require_numbers("kron_psgd", max_abs=max_abs, max_rms=max_rms, above=0)
    return optax.chain(
        contracts.handed_on(scale_by_kron_psgd, given),
        clip_leaves(max_abs, max_rms),
        optax.add_decayed_weights(weight_decay, weight_decay_mask) if decays else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def flat_then_decay(flat_steps=500, decay=1e-3, floor=0.03) -> optax.Schedule:
    """A schedule for `update_probability`: 1 at first, then exp(-decay · (steps since)), never below a floor.

    Q is learned fast while the loss falls fast, and costs little afterwards; the defaults are
    psgd_torch's.

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
        return jnp.maximum(jnp.exp(-decay * jnp.maximum(jnp.asarray(count) - flat_steps, 0)), floor)

    return schedule


def _init(options, params) -> Any:
    contracts.require_float_leaves(
        METHOD, params, complex_leaves=options.geometry != "right_triangular"
    )
    layout = layout_of_params(options, params)
    scale = options.init_scale
    if scale is None:
        scale = 1.0 if options.geometry == "right_triangular" else 0.0  # zero: not set yet

    def factors_of(piece):
        number = jnp.asarray(scale, piece.real_dtype)
        return kron_geometries.scaled_identities(
            options.geometry, piece.factors, number, len(piece.stack)
        )

    state = ScaleByKronPsgdState(
        count=jnp.zeros([], jnp.int32),
        key=contracts.raw_key(options.key),
        factors=layout.build(factors_of),
        lipschitz=layout.build(lambda p: jnp.zeros((*p.stack, len(p.shape)), p.real_dtype)),
        momentum=None if is_python_number(options.b1, 0) else contracts.wide_zeros(params),
        preconditioners=jax.tree.map(jnp.zeros_like, layout.build(factors_of))
        if options.caches
        else None,
        fingerprint=jnp.zeros(layout.count, jnp.uint32) if options.caches else None,
        total_notfinite=jnp.zeros([], jnp.int32),
    )
    return _as_kept(options, state)


def _as_kept(options, state):
    """The state with its factors and what belongs to them divided over devices."""
    trees = {name: as_kept(getattr(state, name), options.factor_sharding) for name in LIKE_FACTORS}
    return state._replace(**trees)


def _update(options, updates, state, params=None, *, probe=None, hvp=None, **extra_args):
    del extra_args
    grads = updates
    check_extras(options, grads, state, params, probe, hvp)
    state = state._replace(
        **{name: contracts.tuples_at_leaves(getattr(state, name), grads) for name in LIKE_FACTORS}
    )
    layout = layout_of_state(options, grads, state)
    state = state._replace(factors=layout.as_kept(state.factors))
    sound = contracts.is_squarable(grads, probe, hvp)
    correction = kron_steps.bias_correction(options.b1, state)
    state = state._replace(momentum=kron_steps.averaged(options.b1, grads, state.momentum, sound))
    direction = grads if state.momentum is None else state.momentum
    newton = options.criterion == "newton"
    signal = hvp if newton else grads if options.whiten == "gradient" else direction

    key, step_key, noise_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)
    now = kron_steps.numbers(options, state.count, sound, correction, step_key)
    # None: the signal is what P is applied to.
    given = None if signal is direction else signal, direction, probe if newton else None
    step = functools.partial(_step, options, layout, now, noise_key, grads)
    if not options.always_updates:
        state, given = equally_varying((state, given))
        apply = functools.partial(_apply, layout, now, grads)
        moves = now.moves | ~kron_steps.kept_is_usable(layout, state)
        updates, kept, good = jax.lax.cond(moves, step, apply, state, *given)
    else:
        updates, kept, good = step(state, *given)
    old = state._replace(**dict.fromkeys(kept))
    new = old._replace(
        count=jnp.asarray(optax.safe_increment(state.count)), key=jax.random.key_data(key)
    )
    updates, new = contracts.skip_unless(good, updates, new, old)
    return updates, _as_kept(options, new._replace(**kept))


def _kept(state):
    """What belongs to the factors, by name."""
    return {name: getattr(state, name) for name in (*LIKE_FACTORS, "fingerprint")}


def _step(options, layout, now, key, grads, state, signal, direction, probe):
    """(updates, what belongs to the factors, whether the step is sound), P applied after Q has moved, if it does."""
    # By group up to the end: whatever is done leaf by leaf is also compiled leaf by leaf.
    tensors = layout.tensors(direction)
    nothing = [None] * len(tensors)
    signals = nothing if signal is None else layout.tensors(signal)
    probes = nothing if probe is None else layout.tensors(probe)
    rest = [leaf / now.correction for leaf in layout.without_pieces(direction)]
    givens = zip(signals, probes, kron_steps.random_bits(options, tensors, key), strict=True)
    steps = [
        kron_steps.step_of_group(options, now, kept, group, kron_steps.Given(*given))
        for kept, group, given in zip(
            layout.kept_dtypes, layout.groups(state, tensors), givens, strict=True
        )
    ]
    good = functools.reduce(jnp.logical_and, [fine for _, fine in steps], now.sound)
    updates = layout.leaves([group.tensor for group, _ in steps], rest, grads)
    return updates, _kept(layout.with_groups(state, [group for group, _ in steps])), good


def _apply(layout, now, grads, state, _signal, direction, _probe):
    """The same where Q does not move and the P that is kept is Q's."""
    kept = (
        state.factors if state.preconditioners is None else state.preconditioners
    )  # "quad4p" has P for its factors
    if kron_steps.by_piece():
        products, leaves = (
            map(kron_matvec, layout.by_piece(kept), layout.blocks(direction)),
            layout.leaves_of_blocks,
        )
    else:
        products, leaves = (
            map(jax.vmap(kron_matvec), layout.join(kept), layout.tensors(direction)),
            layout.leaves,
        )
    products = [x / jnp.asarray(now.correction, jnp.finfo(x.dtype).dtype) for x in products]
    rest = [leaf / now.correction for leaf in layout.without_pieces(direction)]
    good = now.sound & contracts.is_finite(products)
    return leaves(products, rest, grads), _kept(state), good
