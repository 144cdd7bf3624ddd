"""`LayerRule`: a method on stacks of layers, and what takes the leaves that no layer covers.

What a step's statistics are by stack is made of them first; from there on a layer is a row like any
other, which its owner keeps and steps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_curv.layers import Layers
from optax_curv.linalg._compiler import FULL, not_recomputed
from optax_curv.preconditioners._layerwise.factors import Averaging, LayerFactors
from optax_curv.preconditioners._layerwise.members import present_layers
from optax_curv.preconditioners._layerwise.statistics import (
    has_rows,
    of_kernels,
    require_curvature,
)
from optax_curv.preconditioners._layerwise.view import LayerStacks, averaged_of
from optax_curv.preconditioners._stacks.rule import Fallback, StackRule
from optax_curv.preconditioners._transformation import averages
from optax_curv.preconditioners._transformation.aliases import decayed, downhill_trace
from optax_curv.preconditioners._transformation.bounds import bounded
from optax_curv.preconditioners._transformation.numbers import (
    is_python_number,
    require_learning_rate,
    require_numbers,
    value_at,
)
from optax_curv.preconditioners._transformation.soundness import is_squarable
from optax_curv.preconditioners._transformation.transformation import Step, transformation
from optax_curv.typing import Number, Schedulable


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerRule(StackRule):
    """A method whose members are layers seen as matrices; `scale_by_kfac` documents the options.

    Attributes:
      seen: the layers of the tree at hand.
      has_rows: whether the statistics at hand are rows, which are averaged less often.
      step_rate: the learning rate that follows, for `kl_clip`; 1 where the direction is the step.
    """

    layers: Layers
    decay: Schedulable
    update_every: Number | None
    statistic_bound: Number | None
    kl_clip: Number | None = None
    step_rate: Schedulable = 1.0
    seen: Any = None
    has_rows: bool = False

    def check_layers(self):
        """Refuses options that cannot be, by name."""
        require_numbers(self.method, decay=self.decay, at_least=0, at_most=1, schedule=True)
        require_numbers(self.method, update_every=self.update_every, at_least=1, or_none=True)
        bound = self.statistic_bound
        require_numbers(self.method, statistic_bound=bound, at_least=1, or_none=True)
        require_numbers(self.method, kl_clip=self.kl_clip, above=0, or_none=True)
        if not isinstance(self.layers, Layers):
            raise ValueError(
                f"{self.method}: expected layers from optax_curv.find_layers, got a "
                f"{type(self.layers).__name__}."
            )

    def measured(self, curvature: Mapping[str, Any]) -> dict[str, Any]:
        """Factors by stack of statistics by layer, as extra arguments of `update_stacks`."""
        return {"factors": self.seen.factors(curvature)}

    def held(self, step: Step, grads: dict[str, jax.Array], curvature: Mapping[str, Any]) -> Step:
        """The step within what else the statistics say of it."""
        del grads, curvature
        return step

    def view(self, tree: Any) -> LayerStacks:
        """The layers of a tree as stacks."""
        allowed = self.fallback is not None
        present = present_layers(self.method, self.layers, tree, allowed)
        return LayerStacks(self.method, tree, present)

    def check(self, updates: Any, params: Any, extra_args: Mapping[str, Any]) -> Any:
        """Refuses a curvature that is missing or of other layers.

        Its numbers are looked at where they are averaged, as not every step does that.
        """
        del updates, params
        require_curvature(self.method, self.layers, extra_args.get("curvature"))
        return ()

    def init(self, view: Any, params: Any) -> Any:
        """The state of the layers and of the fallback."""
        rule = dataclasses.replace(self, seen=view)
        return super(LayerRule, rule).init(view, params)

    def placed(self, view: Any, params: Any, state: Any, others: Any) -> tuple[Any, Any]:
        """The state with its owners, and that of all else sharded as the parameters are."""
        rule = dataclasses.replace(self, seen=view)
        return super(LayerRule, rule).placed(view, params, state, others)

    def diagonals(self, name: str, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Whether the factors of rows and of columns are diagonal."""
        kind = self.seen.kind(name)
        return not kind.dense_input, not kind.dense_output

    def update(
        self,
        view: Any,
        grads: Any,
        state: Any,
        params: Any,
        sound: jax.Array,
        *,
        curvature: Any = None,
        **extra_args: Any,
    ) -> Step:
        """One step of the layers, within the clip, and of the fallback on all other leaves."""
        inverse, kernels = view.inverse_slopes(curvature), of_kernels(curvature)
        ours = {name: grads[name] * inverse.get(name, 1) for name in view.layers}
        others = {name: g for name, g in grads.items() if name not in ours}
        rule = dataclasses.replace(self, seen=view, has_rows=has_rows(curvature))
        given, sound = rule._when_due(kernels, state, sound)
        step = rule.held(rule._stepped(ours, state, sound, given), ours, kernels)
        directions = self._clipped(step.directions, ours, state.count)
        directions = {name: u * inverse.get(name, 1) for name, u in directions.items()}
        new = step.state
        if self.fallback is not None:
            given = others, state.fallback, params
            others, fallback = self.fallback.update(view, *given, **extra_args)
            new = new._replace(fallback=fallback)
        return step._replace(directions={**directions, **others}, state=new)

    def _when_due(
        self, curvature: Mapping[str, Any], state: Any, sound: jax.Array
    ) -> tuple[dict[str, Any], jax.Array]:
        """`measured`, or zeros where nothing is averaged, and whether it and all else is sound."""

        def measured():
            found = self.measured(curvature)
            return found, not_recomputed(sound & is_squarable(found))

        def nothing():
            shapes, _ = jax.eval_shape(measured)
            # As varying over manual axes as the state is.
            zero = 0 * state.count
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero, shapes), sound

        return self.when_due(state, sound, measured, nothing)

    def _clipped(
        self, directions: dict[str, jax.Array], grads: dict[str, jax.Array], count: jax.Array
    ) -> dict[str, jax.Array]:
        """The directions u, scaled so that the step r u has r² Σ ⟨u, ∇⟩ ≤ `kl_clip`."""
        if self.kl_clip is None or not directions:
            return directions
        parts = [jnp.vdot(u, grads[name], precision=FULL).real for name, u in directions.items()]
        decrease = sum(parts[1:], start=parts[0])
        decrease = jnp.square(value_at(self.step_rate, count, decrease.dtype)) * decrease
        # A NaN-free 1 where the decrease is zero, as the root of infinity is infinite.
        scale = jnp.minimum(1, jnp.sqrt(self.kl_clip / jnp.maximum(decrease, 0)))
        return {name: scale.astype(u.dtype) * u for name, u in directions.items()}

    @property
    def period(self) -> Any:
        """Steps between averaging statistics in; see `update_every`."""
        return self.update_every

    def is_due(self, state: Any) -> jax.Array:
        """Whether the period says so, bool []."""
        return averages.is_due(state.count, self.period)

    def when_due(
        self, state: Any, sound: jax.Array, due: Callable[[], Any], otherwise: Callable[[], Any]
    ) -> Any:
        """`due()` where the period says so and all is sound, else `otherwise()`."""
        if is_python_number(self.period, 1):
            return due()
        return jax.lax.cond(sound & self.is_due(state), due, otherwise)

    def with_statistics(
        self, old: Mapping[str, LayerFactors], new: Mapping[str, Any], state: Any, sound: jax.Array
    ) -> tuple[dict[str, LayerFactors], dict[str, Averaging]]:
        """Averages this step's factors in; see `view.averaged_of`."""
        return averaged_of(old, new, state.count, self.decay, self.statistic_bound, sound)


def heavy_ball(
    rule: LayerRule, learning_rate: Any, momentum: Any, weight_decay: Any, gradient_bound: Any
) -> optax.GradientTransformationExtraArgs:
    """The alias of a rule: bounded gradients, weight decay, momentum and a learning rate."""
    require_learning_rate(rule.method, learning_rate)
    require_numbers(rule.method, momentum=momentum, weight_decay=weight_decay)
    after = downhill_trace(momentum), optax.scale_by_learning_rate(learning_rate)
    first = bounded(rule.method, gradient_bound)
    return transformation(rule, *decayed(weight_decay), *after, first=first)


def fallback_of(tx: optax.GradientTransformation | None) -> Fallback | None:
    """The transformation that a user gives for uncovered leaves, as it runs on their tree."""
    return None if tx is None else Fallback(tx, by_stack=False)
