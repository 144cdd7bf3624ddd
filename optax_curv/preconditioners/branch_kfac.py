"""Branch K-FAC, and what it shares with branch Fisher: samples of a D-dimensional state as geometry."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_curv import linalg
from optax_curv.linalg import _lapack as lapack
from optax_curv.preconditioners._branches import projections
from optax_curv.preconditioners._stacks.owners import with_sharding_types
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners._transformation.contracts import static
from optax_curv.preconditioners.chain_pieces import keep_params_in_box, with_decay


class ScaleByBranchKFACState(NamedTuple):
    """State of `scale_by_branch_kfac`.

    Attributes:
      count: steps taken, int32 [].
      key: raw PRNG key data, uint32 [...].
      precond_norm: Euclidean norm of the last direction, float32 [].
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    key: jax.Array
    precond_norm: jax.Array
    total_notfinite: jax.Array


def scale_by_branch_kfac(
    damping=1e-3,
    *,
    blocks: int = static(4),
    projection: str = "gaussian",
    complement: bool = False,
    centered: bool = True,
    key=0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient in the block-diagonal metric of K samples ("branches") of a D-dimensional state.

    As `scale_by_branch_fisher`, but of the covariance C only the diagonal blocks of `blocks` runs
    of state coordinates are kept, the first D mod `blocks` of them one longer than the others:

    .. math::
      M = \mathrm{blockdiag}(C) + \lambda I, \qquad d = P M^{-1} P^T g

    **The original rule (the defaults) only adds noise**, see there; `complement=True` is what we
    recommend: λ (λI + P blockdiag(C) Pᵀ)⁻¹ g. `update` takes `branches` [K, D] and `projection` as
    there.

    Args:
      damping: λ, at least 0; a number or a schedule. A singular block gets more of it.
      blocks: number of runs, limited to 1..D. It decides shapes: name it in `static_args` of
        `optax.inject_hyperparams`.
      projection: see `scale_by_branch_fisher`, as for all that follow.
      complement: see there.
      centered: see there.
      key: see there.

    Returns:
      A transformation with state `ScaleByBranchKFACState`; dtypes, NaNs and infinities as in
      `scale_by_branch_fisher`.

    Raises:
      ValueError: unknown `projection`, negative damping, traced `blocks`; in `update`, shapes that
        do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.scale_by_branch_kfac(0.5, blocks=2)
      >>> params = {"w": jnp.ones(2)}
      >>> branches = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
      >>> direction, state = tx.update(params, tx.init(params), params, branches=branches, projection=jnp.eye(2))
      >>> print(direction["w"])  # 1 / (2 + 0.5): the covariance between the two blocks is dropped
      [0.4 0.4]

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §4.2 for the block-diagonal metric (there the
      blocks are layers). The arithmetic of `complement=False` with "gaussian" is that of the
      published `HCKFACLike`.
    """
    method = "scale_by_branch_kfac"
    try:
        blocks = operator.index(blocks)
    except TypeError as error:
        raise ValueError(
            f"{method}: expected a Python int for blocks, got {blocks!r}: it decides shapes; with "
            'optax.inject_hyperparams pass static_args=("blocks",).'
        ) from error
    return scale_by_state_branches(
        method,
        ScaleByBranchKFACState,
        functools.partial(_solve, blocks),
        functools.partial(_root, blocks),
        damping=damping,
        projection=projection,
        complement=complement,
        centered=centered,
        key=key,
    )


def _solve(blocks, rows, b, damping):
    """(blockdiag(BᵀB) + λI)⁻¹ b: every block in one batch, the padding an identity that is solved and dropped."""
    index = _block_index(blocks, rows.shape[1])
    inside = _take(rows, index)
    padding = jnp.eye(index.shape[1], dtype=rows.dtype) * (index == rows.shape[1])[:, None, :]
    gram = jnp.matmul(inside.mT, inside, precision=jax.lax.Precision.HIGHEST)
    factor, _ = linalg.cholesky(gram + padding, damping)
    solution = linalg.cholesky_solve(factor, _take(b, index))
    return jnp.zeros_like(b).at[index].set(solution, mode="drop")


def _root(blocks, rows):
    """R with RᵀR = blockdiag(BᵀB): the triangular factors of the blocks of B, side by side."""
    index = _block_index(blocks, rows.shape[1])
    factors = lapack.qr_triangle(_take(rows, index))
    wide = jnp.zeros((*factors.shape[:2], rows.shape[1]), rows.dtype)
    wide = wide.at[np.arange(len(index))[:, None], :, index].set(factors.mT, mode="drop")
    return wide.reshape(-1, rows.shape[1])


def _block_index(blocks, dimension):
    """The state coordinates of each run, [blocks, longest], filled up with D."""
    blocks = min(max(1, blocks), dimension)
    sizes = dimension // blocks + (np.arange(blocks) < dimension % blocks)
    place = np.arange(sizes[0])
    return np.where(place < sizes[:, None], (np.cumsum(sizes) - sizes)[:, None] + place, dimension)


def _take(x, index):
    """[..., D] -> [blocks, ..., longest], zero where a run is filled up."""
    return jnp.moveaxis(jnp.take(x, index, axis=-1, mode="fill", fill_value=0), -2, 0)


def branch_kfac(
    learning_rate: optax.ScalarOrSchedule,
    damping=1e-3,
    *,
    blocks: int = static(4),
    projection: str = "gaussian",
    complement: bool = False,
    centered: bool = True,
    key=0,
    weight_decay=0.0,
    param_bound=None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent in the block-diagonal metric of branches, see `scale_by_branch_kfac`.

    θ ← θ - lr (d + weight_decay θ), then limited to [-param_bound, param_bound].

    Args:
      learning_rate: a number or a schedule.
      damping: see `scale_by_branch_kfac`, as for all up to `key`.
      blocks: see there.
      projection: see there.
      complement: see there; True is recommended.
      centered: see there.
      key: see there.
      weight_decay: decoupled weight decay, added after preconditioning.
      param_bound: half-width of a box which the *parameters* stay in; None: none.

    Returns:
      A chain; its `update` needs `params` and takes `branches=` and `projection=`.

    Raises:
      ValueError: as `scale_by_branch_kfac`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx, params = optax_curv.branch_kfac(0.1, damping=1.0, blocks=2, complement=True), jnp.ones(4)
      >>> branches = jax.random.normal(jax.random.key(0), (6, 3))
      >>> updates, state = tx.update(params, tx.init(params), params, branches=branches)
      >>> updates.shape
      (4,)
    """
    return descend(scale_by_branch_kfac, locals())


def scale_by_state_branches(
    method: str,
    empty_state,
    solve,
    root,
    *,
    damping,
    projection,
    complement,
    centered,
    key,
    complex_leaves=False,
) -> optax.GradientTransformationExtraArgs:
    """The transformation d = P M⁻¹ Pᵀ g, or λ (λI + P cov Pᵀ)⁻¹ g with `complement`, for branches [K, D]."""
    # solve: (B, b, λ) -> M⁻¹ b with M = BᵀB + λI, or the part of it that the method keeps; without
    # `complement` root: B -> R [r, D] with RᵀR the covariance that the method keeps; with
    # `complement`
    contracts.require_numbers(method, damping=damping, at_least=0)
    contracts.require_choice(method, "projection", projection, projections.PROJECTIONS)
    kind, seen = projection, []

    def init(params):
        contracts.require_float_leaves(method, params, complex_leaves=complex_leaves)
        seen.clear()
        # numbers of their own, as a buffer that stands twice in a state cannot be donated
        counts = {name: jnp.zeros([], jnp.int32) for name in ("count", "total_notfinite")}
        return empty_state(
            key=contracts.raw_key(key), precond_norm=jnp.zeros([], jnp.float32), **counts
        )

    def update(updates, state, params=None, *, branches=None, projection=None, **extra_args):
        del extra_args
        if params is not None:
            contracts.require_same_leaves(
                method, "the gradients", updates, "the parameters", params
            )
        if (
            branches is None
            or not is_array(branches)
            or jnp.ndim(branches) != 2
            or not optax.tree.size(updates)
        ):
            return step(updates, state, (), updates)
        _require_same_shape(method, jnp.shape(branches), seen)
        for what, given in (
            ("branches [K, D]", branches),
            ("gradients for branches [K, D]", updates),
        ):
            if is_complex(given):
                raise ValueError(f"{method}: expected real {what}, got complex ones.")
        leaves = [jnp.asarray(x) for x in jax.tree.leaves((updates, branches, projection))]
        dtype = jnp.result_type(jnp.float32, *leaves)
        rows = covariance_rows(jnp.asarray(branches, dtype), centered)
        gradient = jax.tree.map(lambda g: jnp.asarray(g, dtype), updates)
        if not rows.shape[1]:
            return step(
                updates, state, (), gradient if complement else optax.tree.zeros_like(gradient)
            )
        basis, next_key = _projection(method, kind, projection, gradient, rows, state.key)
        damping_now = contracts.value_at(damping, state.count, dtype)
        if complement:
            direction = _keep_complement(basis, gradient, root(rows), damping_now)
        else:
            direction = basis.push(solve(rows, basis.pull(gradient), damping_now))
        return step(updates, state, (branches, projection), direction, key=next_key)

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def descend(scale_by, given) -> optax.GradientTransformationExtraArgs:
    """The alias of a branch method, of the arguments `given` by name."""
    bound = given["param_bound"]
    box = () if bound is None else (keep_params_in_box(bound),)
    return with_decay(
        contracts.handed_on(scale_by, given), given["learning_rate"], given["weight_decay"], *box
    )


def is_array(branches: Any) -> bool:
    """Whether `branches` is one array, and not None or a tree."""
    return jax.tree.structure(branches) == jax.tree.structure(0)


def is_complex(tree: Any) -> bool:
    """Whether a leaf of the tree is complex."""
    return any(
        jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating) for leaf in jax.tree.leaves(tree)
    )


def covariance_rows(branches, centered: bool) -> jax.Array:
    """Rows B [max(K, 1), ...] with BᵀB = cov(branches): centred, over the root of max(1, K - 1), or of K if not."""
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
    new_state = state._replace(
        count=optax.safe_increment(state.count), precond_norm=norm, **changed
    )
    good = contracts.is_squarable(updates, inputs) & contracts.is_finite(cast)
    return contracts.skip_unless(good, cast, new_state, state)


def _require_same_shape(method, shape, seen):
    """Refuses branches of another shape than the first since `init`, which `seen` holds."""
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
        return projections.gaussian(step_key, gradient, dimension, dtype), jax.random.key_data(
            next_key
        )
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
    """λ (λI + P RᵀR Pᵀ)⁻¹ g, which is g - Q U diag(s² / (s² + λ)) Uᵀ Qᵀ g for P = Q T, T Rᵀ = U s Vᵀ."""
    # Nothing is squared before it is divided: accurate where λ is far below the rounding of P cov
    # Pᵀ.
    columns, triangle = basis.factor()
    left, s, _ = lapack.svd(jnp.matmul(triangle, root.T, precision="highest"))
    share = (s / jnp.maximum(jnp.hypot(s, jnp.sqrt(damping)), jnp.finfo(s.dtype).tiny)) ** 2
    inside = share * jnp.matmul(left.T, columns.pull(gradient), precision="highest")
    return optax.tree.sub(gradient, columns.push(jnp.matmul(left, inside, precision="highest")))
