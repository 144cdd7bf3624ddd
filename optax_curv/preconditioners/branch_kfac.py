"""Branch K-FAC: the covariance of state samples, cut into diagonal blocks, as the metric of a natural gradient."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_curv import linalg
from optax_curv.linalg import lapack
from optax_curv.preconditioners import state_branches
from optax_curv.preconditioners.contracts import static


class ScaleByBranchKFACState(NamedTuple):
    """State of `scale_by_branch_kfac`.

    Attributes:
      count: steps taken, int32 [].
      key: raw PRNG key data, uint32 [...].
      precond_norm: Euclidean norm of the last direction, float32 [].
      total_notfinite: steps skipped for a NaN or an infinity, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
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

    As `scale_by_branch_fisher`, but of the covariance C only the diagonal blocks of `blocks` consecutive, nearly equal
    runs of state coordinates are kept (the first D mod `blocks` runs are one longer):

    .. math::
      M = \mathrm{blockdiag}(C) + \lambda I, \qquad d = P M^{-1} P^T g

    The blocks are padded to one size and solved in one batched Cholesky factorisation.

    **The original rule (the defaults) only adds noise**: with a fresh Gaussian P, E[P M⁻¹ Pᵀ] = tr(M⁻¹)/D · I, a
    multiple of the gradient. `complement=True` is what we recommend: λ (λI + P blockdiag(C) Pᵀ)⁻¹ g.

    `update` takes `branches` and `projection` with the meaning, the fallback and the limits that
    `scale_by_branch_fisher` gives them.

    Args:
      damping: λ, at least 0; a number or a schedule of the step count. A block that is singular without damping gets
        more of it (`optax_curv.linalg.cholesky`).
      blocks: number of runs, limited to 1..D. It decides shapes, so it cannot be traced; with
        `optax.inject_hyperparams` name it in `static_args`.
      projection: "gaussian", "fixed" or "orthonormal".
      complement: keep what P cannot see.
      centered: remove the mean and divide by max(1, K - 1); False: divide by K.
      key: seed, or a PRNG key.

    Returns:
      A transformation with state `ScaleByBranchKFACState`. Arithmetic is float32 at least, float64 if gradients or
      branches are. A NaN or infinity in gradients, branches, `projection` or the result gives a zero update, leaves
      the state as it was and adds one to `total_notfinite`.

    Raises:
      ValueError: unknown `projection`, negative damping, traced `blocks`; in `update`, shapes that do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.scale_by_branch_kfac(0.5, blocks=2)
      >>> params = {"w": jnp.ones(2)}
      >>> branches = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
      >>> direction, state = tx.update(params, tx.init(params), params, branches=branches, projection=jnp.eye(2))
      >>> print(direction["w"])  # 1 / (2 + 0.5): the covariance between the two blocks is dropped
      [0.4 0.4]

    References:
      Martens & Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015, §4.2 for the block-diagonal metric (there the blocks are layers).
      The arithmetic of `complement=False` with "gaussian" is that of the published `HCKFACLike`.
    """
    method = "scale_by_branch_kfac"
    try:
        blocks = operator.index(blocks)
    except TypeError as error:
        raise ValueError(
            f"{method}: expected a Python int for blocks, got {blocks!r}: it decides shapes; with "
            'optax.inject_hyperparams pass static_args=("blocks",).'
        ) from error
    return state_branches.scale_by_state_branches(
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
      learning_rate: number or schedule.
      damping: this and the next up to `key`: see `scale_by_branch_kfac`.
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
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> tx = optax_curv.branch_kfac(0.1, damping=1.0, blocks=2, complement=True)
      >>> params = {"w": jnp.ones(4)}
      >>> state = tx.init(params)
      >>> branches = jax.random.normal(jax.random.key(0), (6, 3))
      >>> updates, state = tx.update(params, state, params, branches=branches)
      >>> optax.apply_updates(params, updates)["w"].shape
      (4,)
    """
    preconditioner = scale_by_branch_kfac(
        damping, blocks=blocks, projection=projection, complement=complement, centered=centered, key=key
    )
    return state_branches.descend(preconditioner, learning_rate, weight_decay, param_bound)
