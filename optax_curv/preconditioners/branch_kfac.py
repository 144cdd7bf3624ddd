"""Branch K-FAC: samples of a D-dimensional state as a block-diagonal metric."""

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_curv import linalg
from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._compiler import full_matmul
from optax_curv.preconditioners._branches.state_space import StateBranches, descent
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.numbers import static
from optax_curv.preconditioners._transformation.transformation import counters, transformation
from optax_curv.typing import Key, Number, ProjectionKind, Schedulable, Sharding


class ScaleByBranchKFACState(NamedTuple):
    """State of `scale_by_branch_kfac`.

    Attributes:
      count: steps taken, int32 [].
      key: data of the PRNG key of the next drawn projection, uint32.
      precond_norm: Euclidean norm of the last direction, float32 [].
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    precond_norm: jax.Array
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, Any]:
        """Returns no factors, as the state keeps none."""
        return {}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _BranchKFAC(StateBranches):
    """The blocks of branch K-FAC; `scale_by_branch_kfac` documents the options."""

    blocks: int

    def check_options(self):
        """Refuses options that cannot be, by name."""
        super().check_options()
        try:
            operator.index(self.blocks)
        except TypeError as error:
            raise ValueError(
                f"{self.method}: expected a Python int for blocks, got {self.blocks!r}: it decides "
                'shapes; with optax.inject_hyperparams pass static_args=("blocks",).'
            ) from error

    def init(self, view, params):
        """The first key; nothing else is kept."""
        del view, params
        return ScaleByBranchKFACState(**counters(), **self.numbers())

    def solve(self, rows, b, damping):
        """Returns (blockdiag(BᵀB) + λI)⁻¹ b, of every block in one batch."""
        # The padding of the shorter blocks is an identity, which is solved and dropped.
        index = _block_index(self.blocks, rows.shape[1])
        inside = _take(rows, index)
        padding = jnp.eye(index.shape[1], dtype=rows.dtype) * (index == rows.shape[1])[:, None, :]
        gram = full_matmul(inside.mT, inside)
        factor, _ = linalg.cholesky(gram + padding, damping)
        solution = linalg.cholesky_solve(factor, _take(b, index))
        return jnp.zeros_like(b).at[index].set(solution, mode="drop"), True

    def root(self, rows):
        """R with RᵀR = blockdiag(BᵀB): the triangular factors of the blocks of B, side by side."""
        index = _block_index(self.blocks, rows.shape[1])
        factors = lapack.qr_triangle(_take(rows, index))
        wide = jnp.zeros((*factors.shape[:2], rows.shape[1]), rows.dtype)
        wide = wide.at[np.arange(len(index))[:, None], :, index].set(factors.mT, mode="drop")
        return wide.reshape(-1, rows.shape[1])


def _block_index(blocks, dimension):
    """Returns the state coordinates of each run, [blocks, longest], filled up with D."""
    blocks = min(max(1, operator.index(blocks)), dimension)
    sizes = dimension // blocks + (np.arange(blocks) < dimension % blocks)
    place = np.arange(sizes[0])
    return np.where(place < sizes[:, None], (np.cumsum(sizes) - sizes)[:, None] + place, dimension)


def _take(x, index):
    """[..., D] -> [blocks, ..., longest], zero where a run is filled up."""
    return jnp.moveaxis(jnp.take(x, index, axis=-1, mode="fill", fill_value=0), -2, 0)


def scale_by_branch_kfac(
    damping: Schedulable = 1e-3,
    *,
    blocks: int = static(4),
    projection: ProjectionKind = "gaussian",
    complement: bool = True,
    centered: bool = True,
    ddof: int | None = None,
    key: Key = 0,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient in the block-diagonal metric of K samples ("branches") of a state.

    Of the covariance C of the branches, K samples of a D-dimensional state, only the diagonal
    blocks of `blocks` runs of state coordinates are kept, the first D mod `blocks` of them one
    longer than the others. With P a map from the state to the parameters the direction is

    .. math::
      d = \lambda (\lambda I + P \, \mathrm{blockdiag}(C) P^T)^{-1} g,

    which is full rank: what P cannot see of the gradient g passes unchanged. `complement=False` is
    the original rule,

    .. math::
      M = \mathrm{blockdiag}(C) + \lambda I, \qquad d = P M^{-1} P^T g,

    which *only adds noise* where P is drawn afresh at every step: then E[P M⁻¹ Pᵀ] = tr(M⁻¹)/D · I,
    a multiple of the gradient whatever the branches say.

    `update` takes the extra arguments

    * `branches`: an array [K, D], K ≥ 0, D ≥ 1 (D = 0: a zero direction, or with `complement` the
      gradient). K and D may change from step to step. With None, said on purpose, or an array that
      is not two-dimensional, the gradient passes unchanged and the key does not move;
    * `projection`: P itself, [n, D] over the flattened parameters in `jax.tree.leaves` order or a
      tree of [\*leaf.shape, D]; the key does not move;
    * `weights`: [K], not negative, for the mean and the covariance; a branch of weight zero is as
      if it were not there. The gradient is taken as it is given.

    Args:
      damping: λ, at least 0; a number or a schedule. A singular block gets more of it.
      blocks: number of runs, limited to 1..D. It decides shapes: name it in `static_args` of
        `optax.inject_hyperparams`.
      projection: "gaussian" (entries N(0, 1/D), new at every step), "fixed" (drawn once) or
        "orthonormal" (orthonormal columns, drawn once; D <= n).
      complement: whether what P cannot see of the gradient passes; False is the original rule.
      centered: whether the mean of the branches is removed; False divides by K.
      ddof: centred branches are divided by max(1, K - ddof); None is 1, the original's.
      key: a seed from 0 to 2⁶⁴ - 1, or a PRNG key.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. What is kept
        like the parameters is sharded as they are.

    Returns:
      A transformation with state `ScaleByBranchKFACState`. Arithmetic is float32 at least, float64
      if gradients or branches are. With a NaN or an infinity in gradients, branches, `projection`,
      `weights` or the result the update is zero and the state keeps its last value but for
      `total_notfinite`.

    Raises:
      ValueError: for an unknown `projection`, a number out of range, or traced `blocks`; in
        `update`, where `branches` is missing or shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.scale_by_branch_kfac(0.5, blocks=2, complement=False)
      >>> params = {"w": jnp.ones(2)}
      >>> given = {"branches": jnp.array([[1.0, 1.0], [-1.0, -1.0]]), "projection": jnp.eye(2)}
      >>> direction, state = tx.update(params, tx.init(params), params, **given)
      >>> print(direction["w"])  # 1 / (2 + 0.5): the covariance between the two blocks is dropped
      [0.4 0.4]

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §4.2 for the block-diagonal metric (there the
      blocks are layers). The arithmetic of `complement=False` with "gaussian" is that of the
      published `HCKFACLike`.
    """
    rule = _BranchKFAC(
        method="scale_by_branch_kfac",
        owners=owners_of("scale_by_branch_kfac", sharding),
        damping=damping,
        projection=projection,
        complement=complement,
        centered=centered,
        ddof=ddof,
        key=key,
        blocks=blocks,
    )
    rule.check_options()
    return transformation(rule)


def branch_kfac(
    learning_rate: Schedulable,
    damping: Schedulable = 1e-3,
    *,
    blocks: int = static(4),
    projection: ProjectionKind = "gaussian",
    complement: bool = True,
    centered: bool = True,
    ddof: int | None = None,
    key: Key = 0,
    sharding: Sharding = None,
    weight_decay: Number = 0.0,
    gradient_bound: Number | None = 3.0,
    param_bound: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent in the block-diagonal metric of branches of a state.

    With d the direction of `scale_by_branch_kfac`, θ ← θ - lr (d + weight_decay θ), then limited to
    [-param_bound, param_bound].

    Args:
      learning_rate: a number or a schedule.
      damping: λ, at least 0; a number or a schedule. A singular block gets more of it.
      blocks: number of runs, limited to 1..D. It decides shapes: name it in `static_args` of
        `optax.inject_hyperparams`.
      projection: "gaussian" (entries N(0, 1/D), new at every step), "fixed" (drawn once) or
        "orthonormal" (orthonormal columns, drawn once; D <= n).
      complement: whether what P cannot see of the gradient passes; False is the original rule.
      centered: whether the mean of the branches is removed; False divides by K.
      ddof: centred branches are divided by max(1, K - ddof); None is 1, the original's.
      key: a seed from 0 to 2⁶⁴ - 1, or a PRNG key.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. What is kept
        like the parameters is sharded as they are.
      weight_decay: decoupled weight decay, added after preconditioning.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each leaf's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
      param_bound: half-width of a box in which the *parameters* stay; None: no box.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` takes `branches=`, an array [K, D] or None,
      `projection=` and `weights=`, and needs `params` for a decay or a box. With a NaN or an
      infinity no parameter moves.

    Raises:
      ValueError: for a learning rate that is none, an unknown `projection`, a number out of range;
        in `update`, where `branches` is missing or shapes do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx, params = optax_curv.branch_kfac(0.1, damping=1.0, blocks=2), jnp.ones(4)
      >>> branches = jax.random.normal(jax.random.key(0), (6, 3))
      >>> updates, state = tx.update(params, tx.init(params), params, branches=branches)
      >>> updates.shape
      (4,)

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §4.2 for the block-diagonal metric (there the
      blocks are layers).
    """
    rule = _BranchKFAC(
        method="branch_kfac",
        owners=owners_of("branch_kfac", sharding),
        damping=damping,
        projection=projection,
        complement=complement,
        centered=centered,
        ddof=ddof,
        key=key,
        blocks=blocks,
    )
    return descent(rule, learning_rate, weight_decay, gradient_bound, param_bound)
