"""Matrix-free Gauss-Newton: conjugate gradients on products with the curvature."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from optax_curv import linalg
from optax_curv.curvature import KroneckerFactors
from optax_curv.layers import Layers
from optax_curv.linalg.factors import Factor
from optax_curv.linalg.nystrom import (
    NystromSketch,
    nystrom_solve,
    refreshed_sketch,
    zero_sketch,
)
from optax_curv.preconditioners._layerwise.factors import (
    LayerFactors,
    kronecker_factors,
    spectra_of,
)
from optax_curv.preconditioners._layerwise.preconditioner import layer_preconditioner, layer_view
from optax_curv.preconditioners._layerwise.statistics import require_curvature
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.aliases import decayed
from optax_curv.preconditioners._transformation.averages import is_due
from optax_curv.preconditioners._transformation.bounds import bounded
from optax_curv.preconditioners._transformation.numbers import (
    require_flags,
    require_learning_rate,
    require_numbers,
    value_at,
)
from optax_curv.preconditioners._transformation.objectives import (
    refuse_weight_decay,
    require_objective,
    require_whole,
)
from optax_curv.preconditioners._transformation.placement import PlacedRule
from optax_curv.preconditioners._transformation.soundness import is_finite
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.preconditioners._transformation.trees import (
    require_params,
    require_same_leaves,
    wide_zeros,
)
from optax_curv.preconditioners.quadratic_model import adapt_damping
from optax_curv.typing import Number, Schedulable, Sharding, Tree


class ScaleByGaussNewtonState(NamedTuple):
    """State of `scale_by_gauss_newton`.

    Attributes:
      count: steps taken, int32 [].
      start: where the next solve starts, `warm_start` times the last solution; like the parameters,
        float32 at least.
      iterations: iterations of the last step, int32 [].
      returned: number of the iterate that the last step returned, int32 [].
      stacks: by stack of equal layers the averaged K-FAC factors; empty without `layers`.
      sketch: the Nyström approximation of F, of the parameters flattened in `jax.tree.leaves`
        order, or None.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    start: Tree
    iterations: jax.Array
    returned: jax.Array
    stacks: dict[str, LayerFactors]
    sketch: NystromSketch | None
    total_notfinite: jax.Array

    @property
    def factors(self) -> Mapping[str, KroneckerFactors]:
        """The running averages by layer; empty without `layers`."""
        return kronecker_factors(self.stacks)

    def spectra(self) -> dict[str, dict[str, Factor]]:
        """Returns the factors that diagnostics read, by stack and side."""
        return spectra_of(self.stacks)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _GaussNewton(PlacedRule):
    """The solve of `scale_by_gauss_newton`, which documents the options."""

    # A solve that is not sound ends at its start: no second copy need be kept to go back to.
    guarded = ("start",)

    method: str
    damping: Schedulable
    max_iters: Number
    tol: Number
    warm_start: Number
    backtrack: bool
    diagonal_power: Number
    layers: Layers | None
    decay: Schedulable
    nystrom_rank: int | None
    refresh_every: Number

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_numbers(self.method, damping=self.damping, at_least=0, schedule=True)
        require_numbers(self.method, max_iters=self.max_iters, tol=self.tol, at_least=0)
        require_numbers(self.method, warm_start=self.warm_start, at_least=0, at_most=1)
        require_numbers(self.method, decay=self.decay, at_least=0, at_most=1, schedule=True)
        require_numbers(self.method, diagonal_power=self.diagonal_power)
        require_flags(self.method, backtrack=self.backtrack)
        require_numbers(self.method, refresh_every=self.refresh_every, at_least=1)
        rank = self.nystrom_rank
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(
                f"{self.method}: expected nystrom_rank to be None or an integer > 0, got {rank!r}."
            )
        if self.layers is not None and rank is not None:
            raise ValueError(
                f"{self.method}: got nystrom_rank={rank} beside layers; a solve has one "
                "preconditioner."
            )
        if self.layers is not None and not isinstance(self.layers, Layers):
            raise ValueError(
                f"{self.method}: expected layers from optax_curv.find_layers, got a "
                f"{type(self.layers).__name__}."
            )

    def init(self, view, params):
        """A start at zero, and factors of zero."""
        del view
        stacks = {}
        if self.layers is not None:
            view = layer_view(self.method, self.layers, params)
            stacks = view.zero_factors(view.structs)
        return ScaleByGaussNewtonState(
            **counters(),
            start=wide_zeros(params),
            iterations=jnp.zeros([], jnp.int32),
            returned=jnp.zeros([], jnp.int32),
            stacks=stacks,
            sketch=self._first_sketch(params),
        )

    def _first_sketch(self, params):
        leaves = jax.tree.leaves(params)
        if self.nystrom_rank is None or not leaves:
            return None
        dtype = jnp.result_type(jnp.float32, *leaves)
        return zero_sketch(sum(map(jnp.size, leaves)), self.nystrom_rank, dtype)

    def update(
        self, view, grads, state, params, sound, *, diagonal=None, curvature=None, **extra_args
    ):
        """(F + λI)⁻¹ g, preconditioned by a diagonal or by K-FAC."""
        product = self._product(params, extra_args)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(state.start))
        damping = value_at(self.damping, state.count, dtype)
        stacks, fit, preconditioner = self._preconditioner(
            view, grads, state, diagonal, curvature, damping
        )
        sound &= fit
        gradient = jax.tree.map(lambda g: jnp.where(sound, g, jnp.nan), grads)
        like = view.structs if params is None else params

        def damped(v):
            narrow = jax.tree.map(lambda x, y: x.astype(y.dtype), v, like)
            return jax.tree.map(
                lambda fv, x: fv.astype(x.dtype) + damping.astype(x.dtype) * x, product(narrow), v
            )

        sketch = state.sketch
        if sketch is not None:
            if diagonal is not None:
                raise ValueError(
                    f"{self.method}: got diagonal= beside nystrom_rank; give one or the other."
                )
            sketch = self._sketch(product, state, like)
            _, unravel = ravel_pytree(state.start)
            wide = damping.astype(sketch.values.dtype)

            def by_sketch(r):
                return unravel(nystrom_solve(sketch, wide, ravel_pytree(r)[0]))

            preconditioner = by_sketch

        direction, info = linalg.conjugate_gradient(
            damped,
            gradient,
            x0=state.start,
            max_iters=self.max_iters,
            preconditioner=preconditioner,
            min_progress=self.tol,
            merit=self._merit(params, extra_args) if self.backtrack else None,
            keep_finite=True,
        )
        # A solve that breaks off after some iterations has a solution all the same.
        ended = jnp.isfinite(info.residual_norm) | (info.iterations > 1)
        good = sound & is_finite(direction) & ended
        kept = jnp.where(good, self.warm_start, 1)
        state = state._replace(
            start=jax.tree.map(lambda d: jnp.asarray(kept, d.dtype) * d, direction),
            iterations=info.iterations,
            returned=info.returned,
            stacks=stacks,
            sketch=sketch,
        )
        return self.kept(Step(direction, state, good), grads)

    def _sketch(self, product, state, like):
        """The sketch of this step, made anew where that is due."""
        _, unravel = ravel_pytree(state.start)

        def matvec(v):
            narrow = jax.tree.map(lambda x, y: x.astype(y.dtype), unravel(v), like)
            return ravel_pytree(product(narrow))[0].astype(v.dtype)

        return jax.lax.cond(
            is_due(state.count, self.refresh_every),
            lambda sketch: refreshed_sketch(matvec, sketch),
            lambda sketch: sketch,
            state.sketch,
        )

    def _preconditioner(self, view, grads, state, diagonal, curvature, damping):
        """(the averaged factors, whether what entered is sound, the preconditioner or None)."""
        if self.layers is not None:
            if diagonal is not None:
                raise ValueError(
                    f"{self.method}: got diagonal= beside layers; give one or the other."
                )
            given = require_curvature(self.method, self.layers, curvature)
            seen = layer_view(self.method, self.layers, view.structs)
            return layer_preconditioner(seen, state.stacks, state.count, given, self.decay, damping)
        if diagonal is None:
            return state.stacks, True, None
        require_same_leaves(self.method, "diagonal", diagonal, "updates", grads)

        def scale(d, p):
            return (d.astype(p.dtype) + damping) ** -jnp.asarray(self.diagonal_power, p.dtype)

        scales = jax.tree.map(scale, diagonal, state.start)
        return state.stacks, is_finite(diagonal), _times(scales)

    def _product(self, params: Any, given: Mapping[str, Any]) -> Callable[[Any], Any]:
        """The map v ↦ F v that the extra arguments name."""
        product, objective = given.get("curvature_product"), given.get("objective")
        if (product is None) == (objective is None):
            raise ValueError(
                f"{self.method}: expected one of two extra arguments, got "
                f"{'neither' if product is None else 'both'}: curvature_product=, a function v -> "
                "F v of trees like the gradients, or objective=, an optax_curv.Objective, with "
                "batch=(inputs, targets)."
            )
        if objective is None:
            if not callable(product):
                raise ValueError(
                    f"{self.method}: expected a function as curvature_product, got {product!r}."
                )
            return product
        require_params(self.method, params)
        require_objective(self.method, objective, given.get("batch"), params)
        return objective.curvature_operator(params, given["batch"][0], weights=given.get("weights"))

    def _merit(self, params: Any, given: Mapping[str, Any]) -> Callable[[Any], jax.Array]:
        """The loss after a step back by d, as a function of d."""
        require_params(self.method, params)
        require_whole(self.method, params)
        objective, value_fn = given.get("objective"), given.get("value_fn")
        if value_fn is None and objective is None:
            raise ValueError(
                f"{self.method}: backtrack=True needs a loss to evaluate: pass value_fn=, a "
                "function of the parameters, or objective= with batch=."
            )

        def merit(d):
            moved = jax.tree.map(lambda p, x: (p - x).astype(p.dtype), params, d)
            if objective is not None:
                return objective(moved, *given["batch"], weights=given.get("weights"))
            assert value_fn is not None
            return value_fn(moved)

        return merit


def scale_by_gauss_newton(
    damping: Schedulable = 1e-3,
    *,
    max_iters: Number = 50,
    tol: Number = 5e-4,
    warm_start: Number = 0.95,
    backtrack: bool = False,
    diagonal_power: Number = 0.75,
    layers: Layers | None = None,
    decay: Schedulable = 0.95,
    nystrom_rank: int | None = None,
    refresh_every: Number = 10,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction d = (F + λI)⁻¹ g of a curvature that is known only by its products v ↦ F v.

    For models too large for rows or factors: it holds a few vectors of the parameters' size and
    minimises

    .. math::
      \varphi(d) = \tfrac{1}{2} \langle d, (F + \lambda I) d \rangle - \langle g, d \rangle

    by conjugate gradients from `warm_start` times the last solution, until an iteration i > k gains
    less than ε = `tol` of φ, averaged over the last k = max(10, i / 10): (φ_i - φ_{i-k}) / φ_i < k
    ε. F must be positive semi-definite.

    `update` takes the extra arguments

    * `curvature_product`: a function v ↦ F v of trees like the gradients, leaf by leaf in their
      dtypes; or
    * `objective` (an `Objective`) and `batch` (inputs, targets), and `weights` if there are any: F
      is the Gauss-Newton matrix of the batch plus the regularizer's Hessian, linearised once a
      step;
    * `diagonal`: a tree like the gradients, not negative, that approximates the diagonal of F (such
      as the mean of squared gradients): the solve is preconditioned by (diagonal + λ) to the power
      `diagonal_power`;
    * `curvature`: with `layers` only, their statistics (`value_grad_and_curvature`): the solve is
      preconditioned by K-FAC, whose factors the state averages, and by the mean eigenvalue where no
      layer covers a leaf;
    * `value_fn`: params ↦ loss, as Optax's line searches take it, for `backtrack` without an
      objective.

    Args:
      damping: λ, at least 0; a number or a schedule.
      max_iters: most iterations.
      tol: ε, at least 0: the solve ends when an iteration gains less than this share of the model's
        decrease; with 0 only `max_iters` ends it.
      warm_start: what of the last solution the next solve starts from, in [0, 1].
      backtrack: whether the best by the loss of the iterates 1, 2, 3, 4, 6, 8, 11, … (each 1.3
        times the one before) and the last is returned, and not always the last. It costs one more
        vector, and these forward passes.
      diagonal_power: of the preconditioner made of `diagonal=`; 1 is Jacobi's, 3/4 Martens'.
      layers: from `find_layers`, for a solve preconditioned by K-FAC; `update` then needs
        `curvature=`. None: no K-FAC factors.
      decay: weight of the old factors in their running averages, in [0, 1]; a number or a schedule.
      nystrom_rank: r > 0, for a solve preconditioned by a sketch of F of rank r, for residuals and
        other curvatures whose largest eigenvalues stand out; None: none. Its basis takes r products
        at once, and r vectors of the parameters' size.
      refresh_every: steps after which the sketch is made anew, from the last one.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. What is kept
        like the parameters is sharded as they are.

    Returns:
      A transformation with state `ScaleByGaussNewtonState`. Arithmetic is float32 at least. With a
      NaN or infinity in gradients (or their squares), statistics or the result the update is zero
      and the state keeps its last value but for `total_notfinite`.

    Raises:
      ValueError: numbers out of range; in `init` a leaf that is not real; in `update` a curvature
        that is missing or given twice, trees that do not fit, or nothing to evaluate for
        `backtrack`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: x @ w, "normal")
      >>> x, w = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.zeros((2, 1))
      >>> batch = (x, x @ jnp.array([[3.0], [4.0]]))
      >>> tx = optax_curv.scale_by_gauss_newton(damping=1e-6)
      >>> grads = jax.grad(objective)(w, *batch)
      >>> direction, state = tx.update(grads, tx.init(w), w, objective=objective, batch=batch)
      >>> print((w - direction).ravel().round(2))  # linear least squares in one step
      [3. 4.]

    References:
      Martens, Deep Learning via Hessian-Free Optimization, ICML 2010: §4.4 for the stopping rule,
      §4.5 for the warm start, §4.6 for backtracking (there back from the last iterate to the first
      that is worse; here all are compared), §4.7 for the diagonal. Martens and Sutskever 2012,
      doi:10.1007/978-3-642-35289-8_27, for the warm start's decay. Frangella, Tropp and Udell 2021,
      arXiv:2110.02820, for `nystrom_rank`.
    """
    rule = _GaussNewton(
        method="scale_by_gauss_newton",
        owners=owners_of("scale_by_gauss_newton", sharding),
        damping=damping,
        max_iters=max_iters,
        tol=tol,
        warm_start=warm_start,
        backtrack=backtrack,
        diagonal_power=diagonal_power,
        layers=layers,
        decay=decay,
        nystrom_rank=nystrom_rank,
        refresh_every=refresh_every,
    )
    rule.check_options()
    return transformation(rule)


def _times(scale):
    return lambda r: jax.tree.map(lambda s, x: s.astype(x.dtype) * x, scale, r)


def gauss_newton(
    learning_rate: Schedulable | None,
    damping: Schedulable | None = None,
    *,
    max_iters: Number = 50,
    tol: Number = 5e-4,
    warm_start: Number = 0.95,
    backtrack: bool = False,
    diagonal_power: Number = 0.75,
    layers: Layers | None = None,
    decay: Schedulable = 0.95,
    nystrom_rank: int | None = None,
    refresh_every: Number = 10,
    sharding: Sharding = None,
    weight_decay: Number = 0.0,
    gradient_bound: Number | None = 3.0,
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton with a learning rate; or Hessian-free optimisation, with none to choose.

    With a learning rate and d the direction of `scale_by_gauss_newton`, θ ← θ - lr (d +
    weight_decay θ).

    With `learning_rate=None` the step has length one, and `adapt_damping` changes the damping by
    the factor 2/3 or 3/2 at every step, as the quadratic model foretells the change of the loss
    well or not. A step after which the loss would be higher, or not finite, is not taken. `update`
    then needs `objective=`, `batch=` and `value=` (the loss), and takes `judge_batch=`.

    Args:
      learning_rate: a number or a schedule; None: adaptive damping.
      damping: λ, at least 0; a number or a schedule. None: 1e-3; with adaptive damping it is the
        first one, a number, and None: 1.
      max_iters: most iterations of conjugate gradients.
      tol: ε, at least 0: the solve ends when an iteration gains less than this share of the model's
        decrease; with 0 only `max_iters` ends it.
      warm_start: what of the last solution the next solve starts from, in [0, 1].
      backtrack: whether the best by the loss of the iterates 1, 2, 3, 4, 6, 8, 11, … (each 1.3
        times the one before) and the last is returned, and not always the last. It costs one more
        vector, and these forward passes.
      diagonal_power: of the preconditioner made of `diagonal=`; 1 is Jacobi's, 3/4 Martens'.
      layers: from `find_layers`, for a solve preconditioned by K-FAC; `update` then needs
        `curvature=`. None: no K-FAC factors.
      decay: weight of the old factors in their running averages, in [0, 1]; a number or a schedule.
      nystrom_rank: r > 0, for a solve preconditioned by a sketch of F of rank r, for residuals and
        other curvatures whose largest eigenvalues stand out; None: none. Its basis takes r products
        at once, and r vectors of the parameters' size.
      refresh_every: steps after which the sketch is made anew, from the last one.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. What is kept
        like the parameters is sharded as they are.
      weight_decay: decoupled weight decay, added after preconditioning; 0 with adaptive damping.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each leaf's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
        Without effect with adaptive damping, which refuses steps that are too long.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` takes the extra arguments of
      `scale_by_gauss_newton`. With a NaN or an infinity no parameter moves.

    Raises:
      ValueError: for a learning rate that is neither a number, a schedule nor None, and numbers out
        of range; for a weight decay with adaptive damping, whose model would not know of it; in
        `update` for a curvature that is missing or given twice, and masked parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: jnp.exp(x * w), "normal")
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.exp(jnp.array([[0.5], [1.0]])))
      >>> tx, w = optax_curv.gauss_newton(None, backtrack=True), jnp.float32(0)
      >>> state = tx.init(w)
      >>> for _ in range(20):
      ...     value, grads = jax.value_and_grad(objective)(w, *batch)
      ...     given = {"objective": objective, "batch": batch, "value": value}
      ...     updates, state = tx.update(grads, state, w, **given)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w.round(3))
      0.5

    References:
      Martens, Deep Learning via Hessian-Free Optimization, ICML 2010: §4.1 for the adaptive
      damping, §4.4 to §4.7 for the solve.
    """

    def rule(damping):
        made = _GaussNewton(
            method="gauss_newton",
            owners=owners_of("gauss_newton", sharding),
            damping=damping,
            max_iters=max_iters,
            tol=tol,
            warm_start=warm_start,
            backtrack=backtrack,
            diagonal_power=diagonal_power,
            layers=layers,
            decay=decay,
            nystrom_rank=nystrom_rank,
            refresh_every=refresh_every,
        )
        made.check_options()
        return made

    rate: Any = learning_rate
    if rate is not None:
        require_learning_rate("gauss_newton", learning_rate)
        require_numbers("gauss_newton", weight_decay=weight_decay)
        pieces = [*decayed(weight_decay), optax.scale_by_learning_rate(rate)]
        first = bounded("gauss_newton", gradient_bound)
        return transformation(rule(1e-3 if damping is None else damping), *pieces, first=first)
    refuse_weight_decay("gauss_newton", weight_decay)
    first: Any = 1.0 if damping is None else damping
    rule(first)  # options are refused now, and not first in init

    def damped(lam):
        return transformation(rule(lam), optax.scale_by_learning_rate(1.0))

    return adapt_damping(damped, first, adapt_every=1, factor=2 / 3)
