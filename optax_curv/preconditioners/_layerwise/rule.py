"""`LayerRule`: a method on stacks of layers, and what takes the leaves that no layer covers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_curv.layers import Layers
from optax_curv.linalg._compiler import FULL
from optax_curv.preconditioners._layerwise.factors import Averaging, LayerFactors
from optax_curv.preconditioners._layerwise.members import present_layers
from optax_curv.preconditioners._layerwise.statistics import of_kernels, require_curvature
from optax_curv.preconditioners._layerwise.view import LayerStacks, averaged_of
from optax_curv.preconditioners._stacks.owners import as_kept
from optax_curv.preconditioners._stacks.rule import Fallback, StackRule
from optax_curv.preconditioners._transformation.aliases import decayed, downhill_trace
from optax_curv.preconditioners._transformation.averages import is_due
from optax_curv.preconditioners._transformation.bounds import bounded
from optax_curv.preconditioners._transformation.numbers import (
    is_python_number,
    require_learning_rate,
    require_numbers,
    value_at,
)
from optax_curv.preconditioners._transformation.transformation import Step, transformation
from optax_curv.typing import Number, Schedulable


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerRule(StackRule):
    """A method whose members are layers seen as matrices; `scale_by_kfac` documents the options.

    Attributes:
      step_rate: the learning rate that follows, for `kl_clip`; 1 where the direction is the step.
    """

    layers: Layers
    decay: Schedulable
    update_every: Number | None
    statistic_bound: Number | None
    kl_clip: Number | None = None
    step_rate: Schedulable = 1.0

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

    def init_layers(self, view: LayerStacks) -> Any:
        """The state of the layers; its `fallback` is replaced."""
        raise NotImplementedError

    def update_layers(
        self,
        view: LayerStacks,
        grads: dict[str, jax.Array],
        state: Any,
        sound: jax.Array,
        curvature: Mapping[str, Any],
    ) -> Step:
        """One step of the layers, with this step's statistics."""
        raise NotImplementedError

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
        fallback = () if self.fallback is None else self.fallback.init(view, params)
        return self.init_layers(view)._replace(fallback=fallback)

    def with_owners(self, state: Any, split: Mapping[str, int]) -> Any:
        """The state, divided along the first axis of each array that the devices divide."""
        del split
        return as_kept(state, self.owners)

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
        inverse = view.inverse_slopes(curvature)
        ours = {name: grads[name] * inverse.get(name, 1) for name in view.layers}
        others = {name: g for name, g in grads.items() if name not in ours}
        step = self.update_layers(view, ours, state, sound, of_kernels(curvature))
        directions = self._clipped(step.directions, ours, state.count)
        directions = {name: u * inverse.get(name, 1) for name, u in directions.items()}
        kept = as_kept(step.state._replace(fallback=None), self.owners)
        fallback = state.fallback
        if self.fallback is not None:
            others, fallback = self.fallback.update(view, others, fallback, params, **extra_args)
        return Step({**directions, **others}, kept._replace(fallback=fallback), step.sound)

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

    def period(self, curvature: Mapping[str, Any]) -> Any:
        """Steps between averaging statistics in; see `update_every`."""
        del curvature
        return self.update_every

    def when_due(
        self,
        state: Any,
        curvature: Mapping[str, Any],
        sound: jax.Array,
        averaged: Callable[[], tuple],
        kept: tuple,
    ) -> tuple:
        """`averaged()` where the period says so and all is sound, else what is `kept`.

        Args:
          state: the state before the step.
          curvature: the statistics of the step.
          sound: whether the gradients are.
          averaged: returns what is averaged and, last, whether the statistics are sound, too.
          kept: its values before the step.
        """
        period = self.period(curvature)
        if is_python_number(period, 1):
            return averaged()
        due = sound & is_due(state.count, period)
        return jax.lax.cond(due, averaged, lambda: (*kept, sound))

    def averaged(
        self,
        view: LayerStacks,
        old: Mapping[str, LayerFactors],
        count: jax.Array,
        curvature: Mapping[str, Any],
        sound: jax.Array,
    ) -> tuple[dict[str, LayerFactors], dict[str, Averaging], jax.Array]:
        """Averages this step's statistics in; see `view.averaged_of`."""
        bound = self.statistic_bound
        return averaged_of(view, old, count, curvature, self.decay, bound, sound)


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
