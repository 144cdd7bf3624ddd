"""Layers of a tree as stacks, and the averages of their factors."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.layers import slope_matrix
from optax_curv.linalg.factors import Factor
from optax_curv.preconditioners._layerwise.factors import (
    Averaging,
    LayerFactors,
    averaged,
    factor_like,
    joined,
    zero_factors,
)
from optax_curv.preconditioners._layerwise.members import LayerKind, PresentLayer, members_of_tree
from optax_curv.preconditioners._layerwise.statistics import layer_factors
from optax_curv.preconditioners._stacks.rule import is_ours
from optax_curv.preconditioners._stacks.stacks import Stacks
from optax_curv.preconditioners._transformation.numbers import value_at
from optax_curv.typing import Number, Schedulable

# Slopes below this part of a kernel's largest move their entries less the smaller they are: where a
# softplus is nearly flat the step is no longer linear in the leaf. A tenth is ours.
MADE_FLOOR = 0.1


class LayerStacks(Stacks):
    """The layers of a tree as stacks.

    Args:
      method: the name in messages.
      tree: of parameters or gradients.
      present: the layers that it holds, see `members.present_layers`.

    Attributes:
      layers: the layers of every stack of layers, in the order of its rows.
      names: the names of all layers present, in the order of `Layers`.
    """

    layers: dict[str, list[PresentLayer]]
    names: list[str]

    def __init__(self, method: str, tree: Any, present: dict[str, PresentLayer]):
        self._method = method
        members = members_of_tree(present, tree)
        super().__init__(tree, members)
        found = {member.name: x for (member, _), x in zip(members, present.values(), strict=False)}
        self.names = list(present)
        self.layers = {
            name: [found[member.name] for member in stack.members]
            for name, stack in self.of_kind(is_ours).items()
        }

    def kind(self, name: str) -> LayerKind:
        """Returns the properties that the layers of a stack share."""
        return self.layers[name][0].kind

    def places(self, name: str, rows: int) -> jax.Array:
        """The place of each row's layer among all layers present, int32 [rows]; -1 beyond them."""
        found = np.full(rows, -1, np.int32)
        places = [self.names.index(x.layer.name) for x in self.layers[name]]
        counts = [member.rows for member in self[name].members]
        found[: sum(counts)] = np.repeat(places, counts)
        return jnp.asarray(found)

    @property
    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every stack of layers, [N, rows, out]."""
        return {name: self[name].struct for name in self.layers}

    def zero_factors(self, structs: Mapping[str, Any]) -> dict[str, LayerFactors]:
        """The factors of stacks of these shapes before any step."""
        return {name: zero_factors(self.kind(name), struct) for name, struct in structs.items()}

    def factors(self, curvature: Mapping[str, Any]) -> dict[str, Any]:
        """The factors of this step's statistics, by stack: pairs of A and G."""
        found: dict[str, tuple[Factor, Factor]] = {}
        for name, layers in self.layers.items():
            parts = [layer_factors(self._method, x, curvature[x.whole.name]) for x in layers]
            found[name] = factor_like(self.kind(name), joined(layers, parts))
        return found

    def inverse_slopes(self, curvature: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns 1 / c, by which gradients of leaves become those of made kernels, by stack.

        Where a slope c is below a tenth of the largest it is c / (0.1 max c)², so 0 where a mask
        is. Directions of kernels times it are those of the leaves: (C K C)⁻¹ ∇ for the block
        C K C of a leaf whose slopes C = diag(c) are not far apart.
        """
        found = {}
        for name, layers in self.layers.items():
            if any(x.whole.made and x.layer.kernel is not None for x in layers):
                parts = [_inverse_slope(self._method, x, curvature[x.whole.name]) for x in layers]
                found[name] = jnp.concatenate(parts).astype(self[name].dtype)
        return found


def _inverse_slope(method: str, x: PresentLayer, statistic: Any) -> jax.Array:
    """See `LayerStacks.inverse_slopes`; [prod(stack), rows, out]."""
    layer = x.layer
    shape = (math.prod(layer.stack), layer.rows_of_matrix, layer.out_dim)
    if not x.whole.made or layer.kernel is None:
        return jnp.ones(shape, x.dtype)
    slope = getattr(statistic, "slope", None)
    if slope is None:
        raise ValueError(
            f"{method}: the statistic of layer {x.whole.name!r} has no slope, and its kernel is "
            f"made of {x.whole.kernel}; take it from optax_curv.value_grad_and_curvature."
        )
    c = slope_matrix(layer, slope).reshape(shape).astype(x.dtype)
    least = MADE_FLOOR * jnp.max(jnp.abs(c), axis=(-1, -2), keepdims=True)
    inverse = c / jnp.maximum(jnp.square(c), jnp.square(least))
    return jnp.where(jnp.isfinite(inverse), inverse, 0)


def averaged_of(
    old: Mapping[str, LayerFactors],
    new: Mapping[str, Any],
    count: jax.Array,
    decay: Schedulable,
    bound: Number | None,
    sound: jax.Array,
) -> tuple[dict[str, LayerFactors], dict[str, Averaging]]:
    """The factors with new ones averaged in, and how, by stack.

    Args:
      old: the averages before the step.
      new: pairs of A and G, as `LayerStacks.factors` makes them of the step's statistics.
      count: steps taken.
      decay: of the averages.
      bound: how many times an average's size that of a new factor may be; see `factors.averaged`.
      sound: whether the step is; without that nothing is averaged in.
    """
    factors, how = {}, {}
    for name, x in new.items():
        now = value_at(decay, count, x[0].dtype)
        factors[name], how[name] = averaged(old[name], x, now, bound, sound)
    return factors, how
