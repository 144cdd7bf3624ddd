"""Pieces of aliases: sizes, weight decay, momentum and a learning rate, on stacks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._stacks.axes import LeafRule
from optax_curv.preconditioners._stacks.rule import Fallback, is_ours
from optax_curv.preconditioners._stacks.stacks import Stacks
from optax_curv.preconditioners._transformation.bounds import bounded
from optax_curv.preconditioners._transformation.leaves import with_rms
from optax_curv.preconditioners._transformation.numbers import (
    is_python_number,
    require_learning_rate,
    require_numbers,
)
from optax_curv.preconditioners._transformation.transformation import Piece, transformation
from optax_curv.preconditioners._transformation.trees import require_params


def by_rows(function: Any) -> optax.GradientTransformation:
    """A stateless piece that acts on every tensor of the method's stacks as it would on a leaf.

    Args:
      function: of one tensor.
    """

    def piece_of(view: Stacks) -> optax.GradientTransformation:
        ours = view.of_kind(is_ours)

        def update(updates, state, params=None):
            del params
            new = {n: jax.vmap(function)(u) if n in ours else u for n, u in updates.items()}
            return new, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    return piece_of  # pyright: ignore[reportReturnType]


def decayed(weight_decay: Any) -> list[Piece]:
    """Decoupled weight decay of the stacks that decay; nothing for the Python number 0.

    The state has the same structure for every number, so that an injected one fits.
    """
    if is_python_number(weight_decay, 0):
        return [optax.identity()]

    def piece_of(view: Any) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(weight_decay)
        decays = {}
        if isinstance(view, Mapping):
            decays = {name: stack.kind.decays for name, stack in view.items()}

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            require_params("weight_decay", params)
            new: Any
            new, state = decay.update(updates, state, params)
            if all(x is True for x in decays.values()):
                return new, state
            return {n: jnp.where(decays[n], new[n], u) for n, u in updates.items()}, state

        return optax.GradientTransformation(decay.init, update)

    return [piece_of]


@dataclasses.dataclass(frozen=True)
class _DownhillTrace:
    """The piece of `downhill_trace`, which sees the gradients of its step."""

    trace: optax.GradientTransformation
    ours: Mapping[str, Any]

    def init(self, params: Any) -> Any:
        """Zeros."""
        return self.trace.init(params)

    def update(self, updates: Any, state: Any, params: Any, *, gradients: Any, **_: Any) -> Any:
        """(m, the state that holds it)."""
        moved: Any = self.trace.update(updates, state, params)[0]

        def downhill(name: str, m: jax.Array) -> jax.Array:
            slope = jnp.sum(m * gradients[name], tuple(range(1, m.ndim)), keepdims=True)
            return jnp.where(slope < 0, updates[name], m)

        new = {n: downhill(n, m) if n in self.ours else m for n, m in moved.items()}
        return new, optax.TraceState(trace=new)


def downhill_trace(momentum: Any) -> Piece:
    """Momentum m ← momentum · m + u; where it would climb, ⟨m, ∇⟩ < 0, a tensor starts from u anew.

    It is for directions that are bounded, as by `kl_clip`, where m is not: gathered where the
    curvature was far lower, it carries the first steps of networks whose weights are small at first
    across the valley. Tensors that the method does not take keep their momentum.
    """
    return lambda view: _DownhillTrace(optax.trace(momentum), view.of_kind(is_ours))


def matrices_and_adam(
    rule: LeafRule,
    learning_rate: Any,
    *,
    rms: Any,
    adam_for: Any,
    adam: optax.GradientTransformation | None,
    weight_decay: Any,
    weight_decay_mask: Any,
    gradient_bound: Any,
) -> optax.GradientTransformationExtraArgs:
    """The alias of a method for matrices: their size, Adam for the rest, decay, learning rate."""
    require_learning_rate(rule.method, learning_rate)
    require_numbers(rule.method, rms=rms, above=0, or_none=True)
    require_numbers(rule.method, weight_decay=weight_decay)
    fallback = Fallback(optax.scale_by_adam() if adam is None else adam, by_stack=adam is None)
    rule = dataclasses.replace(
        rule, fallback=fallback, adam_for=adam_for, weight_decay_mask=weight_decay_mask
    )
    sizes = [] if rms is None else [by_rows(lambda u: with_rms(u, rms))]
    pieces = [*sizes, *decayed(weight_decay), optax.scale_by_learning_rate(learning_rate)]
    return transformation(rule, *pieces, first=bounded(rule.method, gradient_bound))
