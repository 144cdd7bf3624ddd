"""Matrix-free Gauss-Newton: conjugate gradients on products with the curvature, as in Hessian-free optimisation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv import linalg
from optax_curv.curvature import KroneckerFactors
from optax_curv.layers import Layers
from optax_curv.preconditioners._layerwise.factors import (
    LayerFactors,
    kronecker_factors,
    spectra_of,
)
from optax_curv.preconditioners._layerwise.preconditioner import layer_preconditioner, layer_view
from optax_curv.preconditioners._layerwise.statistics import require_curvature
from optax_curv.preconditioners._stacks.owners import with_sharding_types
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners.chain_pieces import with_decay
from optax_curv.preconditioners.quadratic_model import (
    adapt_damping,
    refuse_weight_decay,
    require_objective,
)


class ScaleByGaussNewtonState(NamedTuple):
    """State of `scale_by_gauss_newton`.

    Attributes:
      count: steps taken, int32 [].
      start: where the next solve starts, `warm_start` times the last solution; like the parameters,
        float32 at least.
      iterations: iterations of the last step, int32 [].
      returned: number of the iterate that the last step returned, int32 [].
      stacks: by stack of equal layers the averaged K-FAC factors; empty without `layers`.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    start: Any
    iterations: jax.Array
    returned: jax.Array
    stacks: dict[str, LayerFactors]
    total_notfinite: jax.Array

    @property
    def factors(self) -> Mapping[str, KroneckerFactors]:
        """The running averages by layer; empty without `layers`."""
        return kronecker_factors(self.stacks)

    def spectra(self) -> dict[str, dict[str, jax.Array]]:
        """The factors that diagnostics read, by stack and side."""
        return spectra_of(self.stacks)


def scale_by_gauss_newton(
    damping=1e-3,
    *,
    max_iters=50,
    tol=5e-4,
    warm_start=0.95,
    backtrack: bool = False,
    diagonal_power=0.75,
    layers: Layers | None = None,
    decay=0.95,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction d = (F + λI)⁻¹ g of a curvature that is known only by its products v ↦ F v.

    For models too large for rows or factors: it holds a few vectors of the parameters' size and
    minimises

    .. math::
      \varphi(d) = \tfrac12 \langle d, (F + \lambda I) d \rangle - \langle g, d \rangle

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
      tol: ε, at least 0; with 0 only `max_iters` ends the solve.
      warm_start: what of the last solution the next solve starts from, in [0, 1].
      backtrack: return the best of the iterates i = 1, 2, 3, 4, 6, 8, 11, … (each 1.3 times the one
        before) and the last one, by the loss L(θ - d_i). It costs one more vector, and these
        forward passes.
      diagonal_power: of the diagonal preconditioner; 1 is Jacobi's, 3/4 Martens'.
      layers: from `find_layers`; None: no K-FAC factors.
      decay: weight of the old factors in their running averages, in [0, 1]; a number or a schedule.

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
      doi:10.1007/978-3-642-35289-8_27, for the warm start's decay.
    """
    method = "scale_by_gauss_newton"
    contracts.require_numbers(method, damping=damping, max_iters=max_iters, tol=tol, at_least=0)
    contracts.require_numbers(method, warm_start=warm_start, decay=decay, at_least=0, at_most=1)
    if layers is not None and not isinstance(layers, Layers):
        raise ValueError(
            f"{method}: expected layers from optax_curv.find_layers, got a {type(layers).__name__}."
        )

    def init(params):
        contracts.require_float_leaves(method, params)
        stacks = {} if layers is None else layer_view(method, layers, params).zero_factors()
        # numbers of their own, as a buffer that stands twice in a state cannot be donated
        numbers = {
            name: jnp.int32(0) for name in ("count", "iterations", "returned", "total_notfinite")
        }
        return ScaleByGaussNewtonState(start=contracts.wide_zeros(params), stacks=stacks, **numbers)

    def update(updates, state, params=None, *, diagonal=None, curvature=None, **extra_args):
        if params is not None:
            contracts.require_same_leaves(method, "updates", updates, "params", params)
        product = _product(method, params, extra_args)
        lam = contracts.value_at(
            damping, state.count, jnp.result_type(jnp.float32, *jax.tree.leaves(state.start))
        )
        stacks, fit, preconditioner = state.stacks, True, None
        if layers is not None:
            if diagonal is not None:
                raise ValueError(f"{method}: got diagonal= beside layers; give one or the other.")
            given = require_curvature(method, layers, curvature)
            stacks, fit, preconditioner = layer_preconditioner(
                layer_view(method, layers, updates), state.stacks, state.count, given, decay, lam
            )
        elif diagonal is not None:
            contracts.require_same_leaves(method, "diagonal", diagonal, "updates", updates)
            scale = jax.tree.map(
                lambda d, p: (d.astype(p.dtype) + lam) ** -diagonal_power, diagonal, state.start
            )
            preconditioner = _times(scale)

        # What is unsound ends the solve at its start, so that no second copy of that need be kept
        # to go back to.
        sound = contracts.is_squarable(updates) & contracts.is_finite(diagonal) & fit
        gradient = jax.tree.map(
            lambda u, p: jnp.where(sound, u.astype(p.dtype), jnp.nan), updates, state.start
        )

        def damped(v):
            narrow = jax.tree.map(
                lambda x, like: x.astype(like.dtype), v, updates if params is None else params
            )
            return jax.tree.map(
                lambda fv, x: fv.astype(x.dtype) + lam.astype(x.dtype) * x, product(narrow), v
            )

        direction, info = linalg.conjugate_gradient(
            damped,
            gradient,
            x0=state.start,
            max_iters=max_iters,
            preconditioner=preconditioner,
            min_progress=tol,
            merit=_merit(method, params, extra_args) if backtrack else None,
            keep_finite=True,
        )
        new_updates = jax.tree.map(lambda d, u: d.astype(u.dtype), direction, updates)
        # A solve that breaks off after some iterations has a solution all the same.
        good = (
            sound
            & contracts.is_finite(new_updates)
            & (jnp.isfinite(info.residual_norm) | (info.iterations > 1))
        )
        kept = jnp.where(good, warm_start, 1)
        start = jax.tree.map(lambda d: jnp.asarray(kept, d.dtype) * d, direction)
        old = state._replace(start=None)
        new = old._replace(
            count=optax.safe_increment(state.count),
            iterations=info.iterations,
            returned=info.returned,
            stacks=stacks,
        )
        new_updates, new_state = contracts.skip_unless(good, new_updates, new, old)
        return new_updates, new_state._replace(start=start)

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def _product(method, params, given) -> Callable[[Any], Any]:
    """The map v ↦ F v that the extra arguments name."""
    product, objective = given.get("curvature_product"), given.get("objective")
    if (product is None) == (objective is None):
        raise ValueError(
            f"{method}: expected one of two extra arguments, got {'neither' if product is None else 'both'}: "
            "curvature_product=, a function v -> F v of trees like the gradients, or objective=, an "
            "optax_curv.Objective, with batch=(inputs, targets)."
        )
    if product is not None:
        if not callable(product):
            raise ValueError(
                f"{method}: expected a function as curvature_product, got {product!r}."
            )
        return product
    contracts.require_params(method, params)
    require_objective(method, objective, given.get("batch"))
    return objective.curvature_operator(params, given["batch"][0], weights=given.get("weights"))


def _merit(method, params, given):
    """The loss after a step back by d, as a function of d."""
    contracts.require_params(method, params)
    objective, value_fn = given.get("objective"), given.get("value_fn")
    if value_fn is None and objective is None:
        raise ValueError(
            f"{method}: backtrack=True needs a loss to evaluate: pass value_fn=, a function of the parameters, or "
            "objective= with batch=."
        )

    def merit(d):
        moved = jax.tree.map(lambda p, x: (p - x).astype(p.dtype), params, d)
        if objective is not None:
            return objective(moved, *given["batch"], weights=given.get("weights"))
        assert value_fn is not None
        return value_fn(moved)

    return merit


def _times(scale):
    return lambda r: jax.tree.map(lambda s, x: s.astype(x.dtype) * x, scale, r)


def gauss_newton(
    learning_rate: optax.ScalarOrSchedule | None,
    damping=None,
    *,
    max_iters=50,
    tol=5e-4,
    warm_start=0.95,
    backtrack: bool = False,
    diagonal_power=0.75,
    layers: Layers | None = None,
    decay=0.95,
    weight_decay=0.0,
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton with a learning rate; or Hessian-free optimisation, with none to choose.

    With a learning rate: a chain of `scale_by_gauss_newton`, `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`.

    With `learning_rate=None`: `adapt_damping` around `scale_by_gauss_newton` and a step of length
    one, the damping changed at every step by the factor 2/3 or 3/2. `update` then needs
    `objective=`, `batch=` and `value=` (the loss).

    Args:
      learning_rate: a number or a schedule; None: adaptive damping.
      damping: λ; None: 1e-3, and 1 as the first one of the adaptive damping.
      max_iters: see `scale_by_gauss_newton`, as for all up to `decay`.
      tol: see there.
      warm_start: see there.
      backtrack: see there.
      diagonal_power: see there.
      layers: see there.
      decay: see there.
      weight_decay: decoupled weight decay, added after preconditioning; 0 with adaptive damping.

    Returns:
      A transformation whose `update` takes the extra arguments of `scale_by_gauss_newton`.

    Raises:
      ValueError: as `scale_by_gauss_newton`; and for a weight decay with adaptive damping, whose
        model would not know of it.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: jnp.exp(x * w), "normal")
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.exp(jnp.array([[0.5], [1.0]])))
      >>> tx, w = optax_curv.gauss_newton(None, backtrack=True), jnp.float32(0)
      >>> state = tx.init(w)
      >>> for _ in range(20):
      ...     value, grads = jax.value_and_grad(objective)(w, *batch)
      ...     updates, state = tx.update(grads, state, w, objective=objective, batch=batch, value=value)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w.round(3))
      0.5

    References:
      Martens 2010, §4.1 for the adaptive damping; else see `scale_by_gauss_newton`.
    """
    given = locals()

    def direction(damping):
        return contracts.handed_on(scale_by_gauss_newton, given | {"damping": damping})

    if learning_rate is not None:
        return with_decay(
            direction(1e-3 if damping is None else damping), learning_rate, weight_decay
        )
    refuse_weight_decay("gauss_newton", weight_decay)

    def damped(lam):
        return optax.chain(direction(lam), optax.scale_by_learning_rate(1.0))

    return adapt_damping(damped, 1.0 if damping is None else damping, adapt_every=1, factor=2 / 3)
