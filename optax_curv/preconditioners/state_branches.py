"""What both branch methods share: samples of a D-dimensional state as geometry for the parameters."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners import contracts, projections
from optax_curv.preconditioners.chain_pieces import keep_params_in_box
from optax_curv.preconditioners.distribution import with_sharding_types


class Solve(Protocol):
    """(B, b, λ) -> M⁻¹ b with M = BᵀB + λI, or the part of it that the method keeps."""

    def __call__(self, rows: jax.Array, b: jax.Array, damping: jax.Array) -> jax.Array: ...  # noqa: D102


def scale_by_state_branches(
    method: str,
    empty_state,
    solve: Solve,
    root,
    *,
    damping,
    projection,
    complement,
    centered,
    key,
    complex_leaves=False,
) -> optax.GradientTransformationExtraArgs:
    """The transformation d = P M⁻¹ Pᵀ g, or λ (λI + P cov Pᵀ)⁻¹ g with `complement`, for branches [K, D].

    Args:
      method: name for messages.
      empty_state: NamedTuple class or maker with `count`, `key`, `precond_norm`, `total_notfinite`.
      solve: M⁻¹ b; used without `complement`.
      root: B -> R [r, D] with RᵀR the covariance that the method keeps; used with `complement`.
      damping: λ, a number or a schedule.
      projection: "gaussian", "fixed" or "orthonormal".
      complement: keep what P cannot see.
      centered: remove the mean of the branches.
      key: seed or key.
      complex_leaves: let `init` take complex parameters, for branches in parameter space.
    """
    contracts.require_number(method, "damping", damping, at_least=0)
    contracts.require_choice(method, "projection", projection, projections.PROJECTIONS)
    kind, seen = projection, []

    def init(params):
        contracts.require_float_leaves(method, params, complex_leaves=complex_leaves)
        seen.clear()
        # numbers of their own, as a buffer that stands twice in a state cannot be donated
        counts = {name: jnp.zeros([], jnp.int32) for name in ("count", "total_notfinite")}
        return empty_state(key=contracts.raw_key(key), precond_norm=jnp.zeros([], jnp.float32), **counts)

    def update(updates, state, params=None, *, branches=None, projection=None, **extra_args):
        del extra_args
        if params is not None:
            contracts.require_same_leaves(method, "the gradients", updates, "the parameters", params)
        if branches is None or not is_array(branches) or jnp.ndim(branches) != 2 or not optax.tree.size(updates):
            return step(updates, state, (), updates)
        _require_same_shape(method, jnp.shape(branches), seen)
        for what, given in (("branches [K, D]", branches), ("gradients for branches [K, D]", updates)):
            if is_complex(given):
                raise ValueError(f"{method}: expected real {what}, got complex ones.")
        leaves = [jnp.asarray(x) for x in jax.tree.leaves((updates, branches, projection))]
        dtype = jnp.result_type(jnp.float32, *leaves)
        rows = covariance_rows(jnp.asarray(branches, dtype), centered)
        gradient = jax.tree.map(lambda g: jnp.asarray(g, dtype), updates)
        if not rows.shape[1]:
            return step(updates, state, (), gradient if complement else optax.tree.zeros_like(gradient))
        basis, next_key = _projection(method, kind, projection, gradient, rows, state.key)
        damping_now = contracts.value_at(damping, state.count, dtype)
        if complement:
            direction = _keep_complement(basis, gradient, root(rows), damping_now)
        else:
            direction = basis.push(solve(rows, basis.pull(gradient), damping_now))
        return step(updates, state, (branches, projection), direction, key=next_key)

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def descend(preconditioner, learning_rate, weight_decay, param_bound) -> optax.GradientTransformationExtraArgs:
    """The aliases' chain: θ ← θ - lr (d + weight_decay θ), then limited to the box."""
    box = () if param_bound is None else (keep_params_in_box(param_bound),)
    return optax.chain(
        preconditioner, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate), *box
    )


def is_array(branches: Any) -> bool:
    """Whether `branches` is one array, so samples of a state, and not None or a tree of samples of the parameters."""
    return jax.tree.structure(branches) == jax.tree.structure(0)


def is_complex(tree: Any) -> bool:
    """Whether a leaf of the tree is complex."""
    return any(jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating) for leaf in jax.tree.leaves(tree))


def covariance_rows(branches, centered: bool) -> jax.Array:
    """Rows B with BᵀB = cov(branches), [max(K, 1), ...]: centred, over the root of max(1, K - 1), or of K if not."""
    count = branches.shape[0]
    if not count:
        return jnp.zeros((1, *branches.shape[1:]), branches.dtype)
    if centered:
        branches = branches - jnp.mean(branches, axis=0)
    return branches / jnp.sqrt(jnp.asarray(max(1, count - centered), branches.dtype))


def step(updates, state, inputs, direction, **changed):
    """The direction in the dtypes of `updates` and the new state; zero and the old one if anything is not finite."""
    cast = jax.tree.map(lambda d, u: d.astype(jnp.result_type(u)), direction, updates)
    wide = jax.tree.map(lambda d: d.astype(jnp.promote_types(jnp.float32, d.dtype)), direction)
    # A norm beyond float32 is recorded as its largest number: the state stays finite.
    norm = jnp.nan_to_num(jnp.asarray(optax.tree.norm(wide), jnp.float32))
    new_state = state._replace(count=optax.safe_increment(state.count), precond_norm=norm, **changed)
    good = contracts.is_squarable(updates, inputs) & contracts.is_finite(cast)
    return contracts.skip_unless(good, cast, new_state, state)


def _require_same_shape(method, shape, seen):
    """Refuses branches of another shape than the first since `init`; `seen` holds that shape and nothing else."""
    seen[:] = seen or [shape]
    if seen[0] != shape:
        raise ValueError(
            f"{method}: branches [K, D] changed shape from {seen[0]} to {shape} between two steps; every step needs "
            "the same K and D. Pad or subsample them, or call init again."
        )


def _projection(method, kind, given, gradient, rows, key):
    """The Projection of this step, and the raw key for the next."""
    dimension, dtype = rows.shape[1], rows.dtype
    if given is not None:
        return projections.explicit(method, given, gradient, dimension, dtype), key
    step_key = jax.random.wrap_key_data(key)
    if kind == "gaussian":
        next_key, step_key = jax.random.split(step_key)
        return projections.gaussian(step_key, gradient, dimension, dtype), jax.random.key_data(next_key)
    basis = projections.gaussian(step_key, gradient, dimension, dtype)
    if kind == "fixed":
        return basis, key
    if dimension > (size := optax.tree.size(gradient)):
        raise ValueError(
            f'{method}: projection="orthonormal" needs D <= n, got branches with D = {dimension} for n = {size} '
            'parameters; use projection="gaussian" or "fixed".'
        )
    return basis.factor()[0], key


def _keep_complement(basis, gradient, root, damping):
    """λ (λI + P RᵀR Pᵀ)⁻¹ g, which is g - Q U diag(s² / (s² + λ)) Uᵀ Qᵀ g for P = Q T, T Rᵀ = U s Vᵀ.

    Nothing is squared before it is divided and no share exceeds 1, so it stays accurate where λ is far below the
    rounding of P cov Pᵀ (whose norm grows as n / D).
    """
    columns, triangle = basis.factor()
    left, s, _ = jnp.linalg.svd(jnp.matmul(triangle, root.T, precision="highest"), full_matrices=False)
    share = (s / jnp.maximum(jnp.hypot(s, jnp.sqrt(damping)), jnp.finfo(s.dtype).tiny)) ** 2
    inside = share * jnp.matmul(left.T, columns.pull(gradient), precision="highest")
    return optax.tree.sub(gradient, columns.push(jnp.matmul(left, inside, precision="highest")))
