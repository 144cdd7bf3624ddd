"""Small chainable pieces; all but two of them keep no state.

Zero updates stay zero, and dtypes stay those of the incoming updates. A NaN passes through, as in
Optax's own pieces: the methods before them answer it with a zero update, and
`optax.apply_if_finite` catches the rest.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._transformation import bounds, leaves
from optax_curv.preconditioners._transformation.bounds import (
    BoundByRunningNormState as BoundByRunningNormState,
)
from optax_curv.preconditioners._transformation.numbers import require_numbers
from optax_curv.preconditioners._transformation.transformation import (
    PassingRule,
    transformation,
)
from optax_curv.preconditioners._transformation.trees import (
    require_parameters,
    require_params,
    require_same_leaves,
)
from optax_curv.typing import Estimator, Number


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Clip(PassingRule):
    method: str
    max_abs: Number

    def update(self, updates, state, params, **extra_args):
        return jax.tree.map(lambda u: leaves.clipped(u, self.max_abs), updates), state


def clip_by_max_abs(max_abs: Number) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its largest entry does not exceed a bound.

    The update is u · min(1, max_abs / max|u|). Unlike `optax.clip` it keeps the direction of a
    leaf; one within the bound is returned bit for bit. The original Kronecker PSGD calls this its
    "spectral" clip.

    Args:
      max_abs: the bound, a number (or array, tracer) above zero.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: if `max_abs` is a Python number out of range.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.clip_by_max_abs(1.0)
      >>> updates, _ = tx.update(jnp.array([3.0, -4.0]), tx.init(None))
      >>> print(updates)
      [ 0.75 -1.  ]
    """
    require_numbers("clip_by_max_abs", max_abs=max_abs, above=0)
    return transformation(_Clip(method="clip_by_max_abs", max_abs=max_abs))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _NormalizeByRms(PassingRule):
    method: str
    target: Number

    def update(self, updates, state, params, **extra_args):
        return jax.tree.map(lambda u: leaves.with_rms(u, self.target), updates), state


def normalize_by_rms(target: Number) -> optax.GradientTransformationExtraArgs:
    """Gives each leaf a root mean square of `target`: u · target / rms(u).

    Args:
      target: a number (or array, tracer), at least zero.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: if `target` is a Python number out of range.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.normalize_by_rms(0.2)
      >>> updates, _ = tx.update(jnp.array([3.0, -3.0]), tx.init(None))
      >>> print(updates)
      [ 0.2 -0.2]
    """
    require_numbers("normalize_by_rms", target=target, at_least=0)
    return transformation(_NormalizeByRms(method="normalize_by_rms", target=target))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _NormalizeByReference(PassingRule):
    method: str
    reference: optax.GradientTransformationExtraArgs

    def init(self, params):
        return self.reference.init(params)

    def update(self, updates, state, params, *, grad=None, **extra_args):
        given = updates if grad is None else grad
        reference, state = self.reference.update(given, state, params, **extra_args)

        def sized(u, r):
            return leaves.scaled(u, leaves.norm_of(r), leaves.norm_of(u))

        return jax.tree.map(sized, updates, reference), state


def normalize_by_reference(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives each leaf the norm that another transformation's update has (grafting): u · ‖r‖ / ‖u‖.

    r is the update of `tx` for the gradients where `update` is given them (`grad=`, Optax's own
    name for it), else for the incoming updates themselves.

    Args:
      tx: the reference; it is initialised and updated here, and receives the extra arguments.

    Returns:
      A transformation whose state is that of `tx`.

    Raises:
      ValueError: if `tx` is no transformation.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> tx = optax_curv.normalize_by_reference(optax.scale(0.1))
      >>> state, gradient = tx.init(jnp.zeros(2)), jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(jnp.array([0.0, 2.0]), state, grad=gradient)
      >>> print(updates)
      [0.  0.5]

    References:
      Agarwal et al. 2020, arXiv:2002.11803.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"normalize_by_reference: expected an optax.GradientTransformation, got tx={tx!r}."
        )
    reference = optax.with_extra_args_support(tx)
    return transformation(
        _NormalizeByReference(method="normalize_by_reference", reference=reference)
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _BoundByRunningNorm(PassingRule):
    method: str
    bound: bounds.NormBound

    def init(self, params):
        require_parameters(self.method, params, complex_leaves=True)
        return self.bound.init(params)

    def update(self, updates, state, params, **extra_args):
        return self.bound.update(updates, state)


def bound_by_running_norm(
    factor: Number = 3.0, decay: Number = bounds.DECAY, start: Number = bounds.START
) -> optax.GradientTransformationExtraArgs:
    """Holds each leaf's norm to a multiple of its own running mean; place it first in a chain.

    With n the norm of a leaf's incoming update and m the running mean of what was let through,

      u ← u · min(1, factor · m / n),    m ← m + w (min(n, factor · m) - m),

    where w = (1 - decay) / (1 - decay^t) at the t-th step, so that the mean is free of the bias of
    its start. One outlier, however large, then moves the parameters by the length of a few steps,
    and enters the averages of the optimizer behind it no heavier than that. An update that is
    within the bound is returned bit for bit.

    A leaf follows freely in its first `start` steps. A step in which it is zero counts for nothing,
    so that a leaf that wakes after a long time is held to what it was before. What has been too
    large `start` times in a row is no outlier but another size: the mean starts anew from there,
    and the leaf follows freely again.

    Args:
      factor: how many times its running mean a norm may be, at least 1; a number (or array,
        tracer).
      decay: of the running mean, in [0, 1]; 1 averages all steps alike.
      start: steps in which a leaf follows freely, and steps in a row after which the bound gives
        way; at least 1.

    Returns:
      A transformation with state `BoundByRunningNormState`. A NaN or an infinity passes, for the
      method behind to refuse, and changes no mean.

    Raises:
      ValueError: for a Python number out of range; in `init`, for a leaf that is no floating-point
        array.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> tx = optax.chain(optax_curv.bound_by_running_norm(start=2), optax.sgd(1.0))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for size in (1.0, 1.0, 1e6):
      ...     updates, state = tx.update(jnp.array([0.0, size]), state, params)
      >>> print(updates, int(state[0].held))
      [-0. -3.] 1

    References:
      Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063, §3.2, clips to a fixed norm, and takes a
      multiple of the average norm for it; here that average is each leaf's own and moves.
    """
    bound = bounds.NormBound(factor, decay, start)
    bound.require("bound_by_running_norm")
    return transformation(_BoundByRunningNorm(method="bound_by_running_norm", bound=bound))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _KeepParamsInBox(PassingRule):
    method: str
    bound: Number

    def init(self, params):
        require_parameters(self.method, params)
        return optax.EmptyState()

    def update(self, updates, state, params, **extra_args):
        require_params(self.method, params)
        return leaves.boxed_tree(self.bound, updates, params), state


def keep_params_in_box(bound: Number) -> optax.GradientTransformationExtraArgs:
    """Adjusts updates so that params + updates lies in [-bound, bound]; place it last in a chain.

    Holds for what `optax.apply_updates` stores: in a low-precision dtype the box, and an update
    that would round across it, are rounded inwards. Updates that stay inside are returned bit for
    bit.

    Args:
      bound: half-width of the box, a number (or array, tracer), at least zero.

    Returns:
      A stateless transformation; `update` needs `params`.

    Raises:
      ValueError: if `bound` is a Python number out of range, if `params` is missing in `update`,
        or, in `init`, for a leaf that is not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> params = jnp.array([0.2, -0.2, 1.0])
      >>> tx = optax_curv.keep_params_in_box(0.25)
      >>> updates, _ = tx.update(jnp.array([0.5, 0.125, 0.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.25  -0.075  0.25 ]
    """
    require_numbers("keep_params_in_box", bound=bound, at_least=0)
    return transformation(_KeepParamsInBox(method="keep_params_in_box", bound=bound))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _AddCautiousDecay(PassingRule):
    method: str
    weight_decay: Number

    def update(self, updates, state, params, **extra_args):
        require_params(self.method, params)

        def decayed(u, p):
            if u is None:
                return None
            both = (u.conj() * p).real if jnp.iscomplexobj(u) else u * p
            return jnp.where(both > 0, u + (self.weight_decay * p).astype(u.dtype), u)

        return jax.tree.map(decayed, updates, params, is_leaf=lambda x: x is None), state


def add_cautious_weight_decay(weight_decay: Number) -> optax.GradientTransformationExtraArgs:
    """Adds weight decay where the update already takes a parameter towards zero: λ θ [u θ > 0].

    With the step -η u that follows, an entry decays only while its own step lessens it, so that
    decay never works against the loss. It takes the place of `optax.add_decayed_weights`, before
    the learning rate; let `optax.masked` leave out what is not to decay.

    Args:
      weight_decay: λ ≥ 0, a number (or array, tracer).

    Returns:
      A stateless transformation; `update` needs `params`. A zero update stays zero.

    Raises:
      ValueError: for a Python number out of range, and in `update` without `params`.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.add_cautious_weight_decay(0.5)
      >>> params, updates = jnp.array([2.0, 2.0]), jnp.array([1.0, -1.0])
      >>> print(tx.update(updates, tx.init(params), params)[0])
      [ 2. -1.]

    References:
      Chen et al. 2025, arXiv:2510.12402, Algorithm 1, where u θ = 0 decays, too.
    """
    require_numbers("add_cautious_weight_decay", weight_decay=weight_decay, at_least=0)
    return transformation(
        _AddCautiousDecay(method="add_cautious_weight_decay", weight_decay=weight_decay)
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _KeepParamsNorm(PassingRule):
    method: str

    def update(self, updates, state, params, **extra_args):
        require_params(self.method, params)

        def kept(u, p):
            if u is None:
                return None
            total = p + u
            norm, moved = leaves.norm_of(p), leaves.norm_of(total)
            back = (leaves.scaled(total, norm, moved) - p).astype(u.dtype)
            return jnp.where((norm > 0) & (moved > 0) & (leaves.norm_of(u) > 0), back, u)

        return jax.tree.map(kept, updates, params, is_leaf=lambda x: x is None), state


def keep_params_norm() -> optax.GradientTransformationExtraArgs:
    """Adjusts updates so that each leaf keeps its norm; place it last in a chain.

    The update becomes (θ + u) ‖θ‖ / ‖θ + u‖ - θ. It takes the place of weight decay where a layer's
    scale does not matter, as before a normalisation; let `optax.masked` choose the matrices. A leaf
    that is zero moves freely.

    Returns:
      A stateless transformation; `update` needs `params`. A zero update stays zero.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> params, tx = jnp.array([3.0, 4.0]), optax_curv.keep_params_norm()
      >>> updates, _ = tx.update(jnp.array([-3.0, 0.0]), tx.init(params), params)
      >>> print(params + updates)
      [0. 5.]
    """
    return transformation(_KeepParamsNorm(method="keep_params_norm"))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _EstimateGradients(PassingRule):
    method: str
    estimator: Estimator

    def update(self, updates, state, params, **extra_args):
        require_params(self.method, params)
        estimates = self.estimator(params, **extra_args)
        require_same_leaves(self.method, "the estimate", estimates, "params", params)

        def in_dtype(u, x):
            return None if u is None else jnp.asarray(x, u.dtype)

        like = params if updates is None else updates
        return jax.tree.map(in_dtype, like, estimates, is_leaf=lambda x: x is None), state


def estimate_gradients(estimator: Estimator) -> optax.GradientTransformationExtraArgs:
    """Replaces incoming updates by `estimator(params, **extra_args)`; place it first in a chain.

    It serves losses that `jax.grad` cannot differentiate.

    Args:
      estimator: function of the parameters and of all extra arguments of `update` (end it in `**_`
        in a chain with members that take others) that returns a tree like the parameters.

    Returns:
      A stateless transformation. `update` needs `params`; the incoming updates give only the
      dtypes, and a None leaf stays None. They may be None altogether, which means the parameters'
      dtypes.

    Raises:
      ValueError: if `estimator` is no function; in `update`, if `params` is missing or the
        estimate's tree or shapes differ from theirs.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> def estimator(params, *, key):  # central differences along one random direction
      ...     v = 1e-2 * jax.random.normal(key, params.shape)
      ...     return (jnp.sum((params + v) ** 2) - jnp.sum((params - v) ** 2)) / 2e-4 * v
      >>> tx = optax.chain(optax_curv.estimate_gradients(estimator), optax.sgd(0.1))
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(None, tx.init(params), params, key=jax.random.key(0))
      >>> updates.shape
      (3,)
    """
    if not callable(estimator):
        raise ValueError(
            f"estimate_gradients: expected estimator to be a function, got estimator={estimator!r}."
        )
    return transformation(_EstimateGradients(method="estimate_gradients", estimator=estimator))
