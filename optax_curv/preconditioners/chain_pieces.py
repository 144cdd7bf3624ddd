"""Small chainable pieces, stateless but for the reference of `normalize_by_reference`.

Zero updates stay zero, and dtypes stay those of the incoming updates. A NaN passes through, as in
Optax's own pieces: the methods before them answer it with a zero update, and
`optax.apply_if_finite` catches the rest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_curv.preconditioners._stacks.owners import with_sharding_types
from optax_curv.preconditioners._transformation import contracts


def clip_by_max_abs(max_abs) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its largest entry does not exceed a bound: u · min(1, max_abs / max|u|).

    Unlike `optax.clip` it keeps the direction of a leaf; one within the bound is returned bit for
    bit. The original Kronecker PSGD calls this its "spectral" clip.

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
    contracts.require_numbers("clip_by_max_abs", max_abs=max_abs, above=0)

    def clipped(u):
        peak = _peak(u)
        limit = jnp.asarray(max_abs, peak.dtype)
        return jnp.where(peak > limit, _scaled(u, limit, peak), u)

    return _stateless(lambda updates: jax.tree.map(clipped, updates))


def clip_leaves(max_abs, max_rms) -> optax.GradientTransformationExtraArgs:
    """`clip_by_max_abs` and `optax.clip_by_block_rms` in turn, either unless None; in fewer passes over the updates."""

    def clipped(u):
        magnitudes, scale = _magnitudes(u), 1
        if max_abs is not None:
            scale = jnp.minimum(
                1, jnp.asarray(max_abs, magnitudes.dtype) / jnp.max(magnitudes, initial=0)
            )
        if max_rms is not None:
            rms = jnp.sqrt(jnp.sum(jnp.square(magnitudes * scale)) / max(1, u.size))
            scale = scale * jnp.minimum(1, jnp.asarray(max_rms, magnitudes.dtype) / rms)
        return (u * scale).astype(u.dtype)

    return _stateless(lambda updates: jax.tree.map(clipped, updates))


def normalize_by_rms(target) -> optax.GradientTransformationExtraArgs:
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
    contracts.require_numbers("normalize_by_rms", target=target, at_least=0)
    return _stateless(
        lambda updates: jax.tree.map(
            lambda u: _scaled(u, target, _norm(u) / max(1, u.size) ** 0.5), updates
        )
    )


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

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> tx = optax_curv.normalize_by_reference(optax.scale(0.1))
      >>> updates, _ = tx.update(jnp.array([0.0, 2.0]), tx.init(jnp.zeros(2)), grad=jnp.array([3.0, 4.0]))
      >>> print(updates)
      [0.  0.5]

    References:
      Agarwal et al. 2020, arXiv:2002.11803.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, *, grad=None, **extra_args):
        reference, state = tx.update(updates if grad is None else grad, state, params, **extra_args)
        return jax.tree.map(lambda u, r: _scaled(u, _norm(r), _norm(u)), updates, reference), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def keep_params_in_box(bound) -> optax.GradientTransformationExtraArgs:
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
    contracts.require_numbers("keep_params_in_box", bound=bound, at_least=0)

    def init(params):
        contracts.require_float_leaves("keep_params_in_box", params)
        return optax.EmptyState()

    def inside(u, p):
        if u is None:
            return None
        dtype = jnp.promote_types(jnp.float32, jnp.promote_types(u.dtype, p.dtype))
        box = jnp.asarray(_rounded_inwards(bound, p.dtype), dtype)
        p = jnp.asarray(p, dtype)
        total = p + u.astype(dtype)
        # Compilers may keep excess precision through a cast, never through reduce_precision.
        info = jnp.finfo(u.dtype)
        step = jax.lax.reduce_precision(jnp.clip(total, -box, box) - p, info.nexp, info.nmant)
        inwards = jnp.nextafter(
            step.astype(u.dtype), jnp.where(total > 0, -jnp.inf, jnp.inf).astype(u.dtype)
        )
        step = jnp.where(jnp.abs(p + step) > box, inwards, step.astype(u.dtype))
        return jnp.where(jnp.abs(total) > box, step, u)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        contracts.require_params("keep_params_in_box", params)
        return jax.tree.map(inside, updates, params, is_leaf=_is_none), state

    return optax.GradientTransformationExtraArgs(init, update)


def estimate_gradients(estimator) -> optax.GradientTransformationExtraArgs:
    """Replaces incoming updates by `estimator(params, **extra_args)`: for losses without `jax.grad`; place it first.

    Args:
      estimator: function of the parameters and of all extra arguments of `update` (end it in `**_`
        in a chain with members that take others) that returns a tree like the parameters.

    Returns:
      A stateless transformation. `update` needs `params`; the incoming updates give only the
      dtypes, and a None leaf stays None. They may be None altogether, which means the parameters'
      dtypes.

    Raises:
      ValueError: in `update`, if `params` is missing or the estimate's tree or shapes differ from
        theirs.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> def estimator(params, *, key):  # central differences along one random direction
      ...     v = 1e-2 * jax.random.normal(key, params.shape)
      ...     return (jnp.sum((params + v) ** 2) - jnp.sum((params - v) ** 2)) / 2e-4 * v
      >>> tx, params = optax.chain(optax_curv.estimate_gradients(estimator), optax.sgd(0.1)), jnp.ones(3)
      >>> updates, state = tx.update(None, tx.init(params), params, key=jax.random.key(0))
      >>> updates.shape
      (3,)
    """

    def update(updates, state, params=None, **extra_args):
        contracts.require_params("estimate_gradients", params)
        estimates = estimator(params, **extra_args)
        contracts.require_same_leaves(
            "estimate_gradients", "the estimate", estimates, "params", params
        )
        like = params if updates is None else updates
        estimates = jax.tree.map(
            lambda u, x: None if u is None else jnp.asarray(x, u.dtype),
            like,
            estimates,
            is_leaf=_is_none,
        )
        return estimates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def with_decay(tx, learning_rate, weight_decay, *after) -> optax.GradientTransformationExtraArgs:
    """An alias's chain: θ ← θ - lr (d + weight_decay θ), then the rest."""
    return optax.chain(
        tx,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        *after,
    )


def on_flat_vector(
    method: str, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Lets `tx` see the tree, the probe and the Hessian-vector product as vectors [n], leaves in flattening order."""

    def dtype_of(leaves):
        return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))

    def size_of(leaves):
        return sum(leaf.size for leaf in leaves)

    def ravel(tree):
        leaves = jax.tree.leaves(tree)
        flat = [jnp.ravel(leaf).astype(dtype_of(leaves)) for leaf in leaves]
        return jnp.concatenate(flat) if size_of(leaves) else jnp.zeros(1)

    def unravel(vector, like):
        leaves, treedef = jax.tree.flatten(like)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = [
            vector[end - x.size : end].reshape(x.shape).astype(x.dtype)
            for end, x in zip(ends, leaves, strict=True)
        ]
        return treedef.unflatten(parts)

    def init(params):
        contracts.require_float_leaves(method, params)
        leaves = jax.tree.leaves(params)
        # A tree without numbers counts as one: the state's structure must not depend on how many
        # there are.
        vector: Any = jax.ShapeDtypeStruct((max(1, size_of(leaves)),), dtype_of(leaves))
        return tx.init(vector)

    def update(updates, state, params=None, *, probe=None, hvp=None, **extra_args):
        del extra_args
        for name, tree in (("params", params), ("probe", probe), ("hvp", hvp)):
            if tree is not None:
                contracts.require_same_leaves(method, name, tree, "the gradients", updates)
        flat = {
            name: ravel(tree) for name, tree in (("probe", probe), ("hvp", hvp)) if tree is not None
        }
        vector, state = tx.update(ravel(updates), state, **flat)
        return unravel(vector, updates), state

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def _stateless(function) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return function(updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _is_none(x) -> bool:
    return x is None


def _magnitudes(u) -> jax.Array:
    magnitudes = jnp.abs(u)
    return magnitudes.astype(jnp.promote_types(jnp.float32, magnitudes.dtype))


def _real(u) -> jax.Array:
    """Real numbers of the same magnitudes: `u` itself where two reductions do without an array of magnitudes."""
    return u if jnp.isrealobj(u) else _magnitudes(u)


def _peak(u) -> jax.Array:
    u = _real(u)
    return jnp.maximum(jnp.max(u, initial=0), -jnp.min(u, initial=0)).astype(
        jnp.promote_types(jnp.float32, u.dtype)
    )


def _norm(u) -> jax.Array:
    """Euclidean norm, free of underflow and overflow in the squares."""
    peak = _peak(u)
    return peak * jnp.sqrt(jnp.sum(jnp.square(_real(u) / jnp.where(peak == 0, 1, peak))))


def _scaled(u, numerator, denominator) -> jax.Array:
    """Returns u / denominator · numerator in u's dtype, in this order lest numerator / denominator overflow."""
    u_per_one = u / jnp.where(denominator == 0, 1, denominator)
    return (u_per_one * jnp.asarray(numerator, denominator.dtype)).astype(u.dtype)


def _rounded_inwards(bound, dtype):
    """The largest number of `dtype` that is not above `bound`."""
    xp, wide = (np, np.float64) if isinstance(bound, int | float) else (jnp, jnp.float32)
    bound = xp.asarray(bound, xp.promote_types(wide, jnp.result_type(bound)))
    with np.errstate(over="ignore"):
        rounded = bound.astype(dtype)
        return xp.where(
            rounded.astype(bound.dtype) > bound,
            xp.nextafter(rounded, xp.zeros_like(rounded)),
            rounded,
        )
