"""The derivatives of made kernels by the leaves that they are made of, entry by entry."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.capture._graph.jaxpr import varying_like
from optax_curv.capture._graph.replay import Tap, run_with_taps
from optax_curv.capture._graph.trace import Trace
from optax_curv.curvature import MadeKernelStatistic
from optax_curv.layers import Layers, slope_matrix


def slopes(traced: Trace, layers: Layers) -> dict[str, jax.Array]:
    """Finds c = ∂f(w) / ∂w of every layer whose kernel is f(w).

    In a backward pass of its own every made kernel hands on ones, whatever reaches it: what then
    arrives at the leaf is Jᵀ 1, the diagonal of J, once for each use. All that comes before the
    made kernels in that pass is not needed, and the compiler drops it.

    Returns:
      The slopes in the shape of w, by the layer's name.
    """
    made = {layer.name: layer for layer in layers if layer.made}
    uses = {number: use for number, use in traced.uses.items() if use.layer.name in made}
    if not uses:
        return {}
    leaf_of = {use.layer.name: use.found.view.source for use in uses.values()}
    taps = {
        number: Tap(use, "", _as_ones, (False,) * len(use.loops), on_kernel=True)
        for number, use in uses.items()
    }
    everything = [*traced.leaves, *traced.arrays]
    chosen = varying_like({k: jnp.asarray(everything[k]) for k in leaf_of.values()}, everything)

    def value(chosen: dict[int, jax.Array]) -> jax.Array:
        operands = [chosen.get(k, x) for k, x in enumerate(everything)]
        return jnp.sum(run_with_taps(traced.node, operands, taps, {})[0])

    found = jax.grad(value)(chosen)
    return {name: found[leaf] / made[name].shared for name, leaf in leaf_of.items()}


@jax.custom_vjp
def _as_ones(kernel: jax.Array) -> jax.Array:
    """The kernel, whose derivative is lost: ones go back."""
    return kernel


def _forward(kernel: jax.Array) -> tuple[jax.Array, None]:
    return kernel, None


def _backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
    return (varying_like(jnp.ones_like(grad), [grad]),)


_as_ones.defvjp(_forward, _backward)


def with_slopes(
    curvature: dict[str, Any], found: dict[str, jax.Array], layers: Layers
) -> dict[str, Any]:
    """The curvature with the slopes of its layers; a diagonal is that of the leaf, c² times."""
    curvature = dict(curvature)
    for name, slope in found.items():
        statistic = curvature[name]
        if isinstance(statistic, jax.Array):
            factor = slope_matrix(layers[name], slope)
            curvature[name] = statistic * jnp.square(factor).astype(statistic.dtype)
        else:
            curvature[name] = MadeKernelStatistic(statistic, slope)
    return curvature
