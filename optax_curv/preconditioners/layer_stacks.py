"""Layers of equal shapes as one stack: what K-FAC keeps, and computes with one kernel a stack."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# A stack is a tuple of (layer's name, shape of its own leading axes).
Layout = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]


def layout_of(present: Mapping) -> Layout:
    """The stacks that hold the present layers, one for each kind of layer."""
    kinds: dict = {}
    for name in sorted(present):
        layer = present[name].layer
        shapes = tuple(shape[len(layer.stack) :] for shape in layer.factor_shapes)
        kind = (shapes, layer.rows_of_matrix, present[name].dtype, layer.kind in ("scale", "shift"))
        kinds.setdefault(kind, []).append((name, layer.stack))
    return tuple(map(tuple, kinds.values()))


@jax.tree_util.register_pytree_with_keys_class
class LayerStacks(Mapping):
    """Pytrees of arrays by layer, kept as stacks of equal shapes.

    As a mapping from layer names it cuts a layer's own arrays [*stack, ...] out of its stack. Compiled programs keep to
    `groups`: XLA compiles one kernel for each such cut.

    Attributes:
      layout: what lies where.
      groups: one pytree a stack, its arrays [layers, ...].
    """

    def __init__(self, layout: Layout, groups):
        self.layout, self.groups = layout, tuple(groups)

    @classmethod
    def of(cls, layout: Layout, values: Mapping[str, Any]) -> "LayerStacks":
        """Stacks of the layers' pytrees of arrays [*stack, ...]."""

        def group(entries):
            rows = [
                jax.tree.map(lambda x, stack=stack: x.reshape(math.prod(stack), *x.shape[len(stack) :]), values[name])
                for name, stack in entries
            ]
            return rows[0] if len(rows) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *rows)

        return cls(layout, map(group, layout))

    def map(self, function: Callable, *others: "LayerStacks") -> "LayerStacks":
        """`function` of each stack's pytrees."""
        return LayerStacks(self.layout, map(function, self.groups, *(other.groups for other in others)))

    def __getitem__(self, name: str):
        for entries, group in zip(self.layout, self.groups, strict=True):
            ends = itertools.accumulate(math.prod(stack) for _, stack in entries)
            for (own, stack), end in zip(entries, ends, strict=True):
                if own == name:
                    part = slice(end - math.prod(stack), end)
                    return jax.tree.map(lambda x: x[part].reshape(*stack, *x.shape[1:]), group)  # noqa: B023
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for entries in self.layout for name, _ in entries)

    def __len__(self) -> int:
        return sum(map(len, self.layout))

    def __eq__(self, other) -> bool:
        return isinstance(other, LayerStacks) and (self.layout, self.groups) == (other.layout, other.groups)

    __hash__ = None  # type: ignore[assignment]

    def tree_flatten_with_keys(self):  # noqa: D102
        return [(jax.tree_util.SequenceKey(i), group) for i, group in enumerate(self.groups)], self.layout

    @classmethod
    def tree_unflatten(cls, layout, groups):  # noqa: D102
        return cls(layout, groups)
