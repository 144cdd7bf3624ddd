"""How much larger than usual a leaf may be: its norm held to a multiple of its own running mean."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners._transformation.averages import running_weight
from optax_curv.preconditioners._transformation.leaves import norm_of
from optax_curv.preconditioners._transformation.numbers import require_numbers, value_at
from optax_curv.preconditioners._transformation.transformation import Piece
from optax_curv.typing import Number, Tree

DECAY, START = 0.95, 10  # the defaults of `bound_by_running_norm`, and those of the aliases


class BoundByRunningNormState(NamedTuple):
    """State of `bound_by_running_norm`.

    Attributes:
      held: how often a leaf was held, int32 [].
      norms: running mean of each leaf's norm, a tree like the parameters of float32 []; of a stack
        [N, *shape] within an alias float32 [N].
      seen: steps in each mean, of the shapes of `norms`, int32.
      row: steps in a row in which each leaf was held, of the shapes of `norms`, int32.
    """

    held: jax.Array
    norms: Tree
    seen: Tree
    row: Tree


@dataclasses.dataclass(frozen=True)
class NormBound:
    """The arithmetic of `bound_by_running_norm`, for leaves or for the rows of stacks.

    Attributes:
      factor: how many times its running mean a norm may be.
      decay: of the running mean.
      start: steps in which a leaf follows freely.
      rows: whether the arrays are stacks, whose rows are bounded one by one.
    """

    factor: Number
    decay: Number
    start: Number
    rows: bool = False

    def require(self, method: str):
        """Refuses numbers out of range, by name."""
        require_numbers(method, factor=self.factor, at_least=1)
        require_numbers(method, decay=self.decay, at_least=0, at_most=1)
        require_numbers(method, start=self.start, at_least=1)

    def init(self, params: Any) -> BoundByRunningNormState:
        """Means of no step."""

        def zeros(dtype):
            return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x)[: int(self.rows)], dtype), params)

        counts = zeros(jnp.int32), zeros(jnp.int32)
        return BoundByRunningNormState(jnp.zeros([], jnp.int32), zeros(jnp.float32), *counts)

    def update(
        self, updates: Any, state: BoundByRunningNormState
    ) -> tuple[Any, BoundByRunningNormState]:
        """(bounded updates, new state)."""
        treedef = jax.tree.structure(updates)
        columns = (updates, state.norms, state.seen, state.row)
        rows = zip(*map(treedef.flatten_up_to, columns), strict=True)
        found = [self._bounded(*row) for row in rows]
        bounded, norms, seen, row = (treedef.unflatten([x[i] for x in found]) for i in range(4))
        over = sum((jnp.sum(x[4], dtype=jnp.int32) for x in found), jnp.int32(0))
        total = state.held + over
        held = jnp.where(total < state.held, state.held, total)  # it saturates, and cannot wrap
        return bounded, BoundByRunningNormState(held, norms, seen, row)

    def _bounded(self, u, mean, seen, row):
        """(bounded update, mean, seen, row, whether it was held) of one leaf or stack."""
        norm = (jax.vmap(norm_of)(u) if self.rows else norm_of(u)).astype(jnp.float32)
        start = jnp.asarray(self.start, jnp.int32)
        cap = jnp.where(seen < start, jnp.inf, value_at(self.factor, seen) * mean)
        over = (norm > cap) & jnp.isfinite(norm)
        # What is too large so many times in a row is no outlier: the mean starts anew.
        renewed = over & (row + 1 >= start)
        held = over & ~renewed
        kept = jnp.where(held, cap, norm)
        # A step without any gradient says nothing of the leaf's size, nor does a NaN.
        counts = (norm > 0) & jnp.isfinite(norm)
        seen_before = jnp.where(renewed, 0, seen)
        weight = running_weight(value_at(self.decay, seen), seen_before)
        mean = jnp.where(counts, mean + weight * (kept - mean), mean)
        seen = jnp.where(counts, optax.safe_increment(seen_before), seen)
        row = jnp.where(held, optax.safe_increment(row), jnp.where(counts, 0, row))
        share = jnp.where(held, cap / jnp.where(held, norm, 1), 1)
        share = share.reshape(share.shape + (1,) * (u.ndim - share.ndim))
        # times one changes no digit
        return u * share.astype(jnp.finfo(u.dtype).dtype), mean, seen, row, held


def bounded(method: str, gradient_bound: Any) -> list[Piece]:
    """`bound_by_running_norm` as the first stage of an alias, for `transformation(first=…)`.

    On stacks it bounds each row by itself; None is no bound.
    """
    require_numbers(method, gradient_bound=gradient_bound, at_least=1, or_none=True)
    if gradient_bound is None:
        return []

    def piece_of(view: Any) -> optax.GradientTransformation:
        bound = NormBound(gradient_bound, DECAY, START, rows=isinstance(view, Mapping))

        def update(updates, state, params=None):
            del params
            return bound.update(updates, state)

        return optax.GradientTransformation(bound.init, update)

    return [piece_of]
