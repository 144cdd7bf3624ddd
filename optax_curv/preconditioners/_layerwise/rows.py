"""Directions held to what the step's own rows of a layer say of them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.curvature import FactorRows
from optax_curv.linalg._compiler import full_matmul
from optax_curv.preconditioners._layerwise.blocks import LayerDiagnostics, model_ratio
from optax_curv.preconditioners._layerwise.factors import joined, layer_slices
from optax_curv.preconditioners._layerwise.members import PresentLayer
from optax_curv.preconditioners._layerwise.view import LayerStacks

SAMPLED_ROWS = 64  # by which directions are held, see `curvature_along`


def curvature_along(u: jax.Array, rows: FactorRows, own_rows: slice) -> jax.Array:
    """N Σ_r (a_rᵀ U ḡ_r)² of a layer's directions [*stack, rows, out], by every k-th of its rows.

    Args:
      u: U.
      rows: the layer's rows.
      own_rows: which coordinates of the inputs U has.

    Returns:
      An array of the shape of the stack.
    """
    step = max(1, rows.output_grads.shape[-2] // SAMPLED_ROWS)
    grads = rows.output_grads[..., ::step, :].astype(u.dtype)
    if rows.inputs.ndim < rows.output_grads.ndim:  # the one-hot rows of an embedding
        seen = jnp.take_along_axis(u, rows.inputs[..., ::step, None], axis=-2)
    else:
        inputs = rows.inputs[..., ::step, :].astype(u.dtype)
        seen = full_matmul(inputs[..., own_rows], u)
    share = rows.output_grads.shape[-2] / grads.shape[-2]
    return share * rows.weights[1] * jnp.sum(jnp.square(jnp.sum(seen * grads, -1)), -1)


def held_to_rows(
    view: LayerStacks,
    directions: Mapping[str, jax.Array],
    grads: Mapping[str, jax.Array],
    curvature: Mapping[str, Any],
    figures: Mapping[str, LayerDiagnostics],
) -> tuple[dict[str, jax.Array], dict[str, LayerDiagnostics]]:
    """The directions, none longer than the minimiser of its model, as some rows give it.

    Only layers that come with rows are held. With the directions come their figures with the ratios
    of `Blocks.checked`; here ⟨u, F u⟩ = N Σ_r (a_rᵀ U ḡ_r)² + d_A d_G ⟨u, u⟩.
    """
    held, found = {}, {}
    for name, layers in view.layers.items():
        x = figures[name]
        damping = x.input_damping * x.output_damping
        slices = layer_slices(name, (directions[name], grads[name], damping))
        parts = [
            _held_layer(layer, curvature[layer.whole.name], *slices[layer.layer.name])
            for layer in layers
        ]
        held[name], ratios = joined(layers, parts)
        more = jnp.ones(len(damping) - len(ratios), ratios.dtype)
        found[name] = x._replace(model_ratio=jnp.concatenate([ratios, more]))
    return held, found


def _held_layer(
    x: PresentLayer, rows: Any, u: jax.Array, grad: jax.Array, damping: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's directions [*stack, rows, out], and their ratios [*stack]."""
    if not isinstance(rows, FactorRows):
        return u, jnp.ones_like(damping)
    bend = curvature_along(u, rows, x.own_rows) + damping * jnp.sum(jnp.square(u), (-1, -2))
    ratio = model_ratio(bend, jnp.sum(u * grad, (-1, -2)))
    return u / jnp.maximum(1, ratio)[..., None, None], ratio
