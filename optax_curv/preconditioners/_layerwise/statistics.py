"""The statistics of layers as `update` receives them: what does not fit is refused, by name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.curvature import FactorRows, InputRows, MadeKernelStatistic, factors_of_rows
from optax_curv.layers import Layers
from optax_curv.preconditioners._layerwise.members import PresentLayer


def require_curvature(method: str, layers: Layers, curvature: Any) -> Mapping[str, Any]:
    """Refuses a curvature that is missing or not one of these layers, and returns it."""
    if curvature is None:
        raise ValueError(
            f"{method}: the extra argument curvature= is missing. Make it with value, grads, "
            "curvature = optax_curv.value_grad_and_curvature(loss_fn)(params, ...) and call "
            "update(grads, state, params, curvature=curvature). Flax's own TrainState drops it; "
            "optax_curv.flax.TrainState hands it on."
        )
    names = {layer.name for layer in layers}
    if not isinstance(curvature, Mapping) or set(curvature) != names:
        given: Any = f"a {type(curvature).__name__}"
        if isinstance(curvature, Mapping):
            given = sorted(curvature)
        raise ValueError(
            f"{method}: curvature must be a dict with the layers {sorted(names)}, got {given}. "
            "Make it with optax_curv.value_grad_and_curvature from the same layers."
        )
    return curvature


def of_kernels(curvature: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of the kernels that meet the inputs, made ones without their slopes."""
    return {
        name: x.statistic if isinstance(x, MadeKernelStatistic) else x
        for name, x in curvature.items()
    }


def has_rows(curvature: Mapping[str, Any]) -> bool:
    """Says whether some layer's statistic is its rows, of which factors are still to be made."""
    return any(isinstance(statistic, FactorRows) for statistic in curvature.values())


def layer_factors(method: str, x: PresentLayer, statistic: Any) -> tuple[jax.Array, jax.Array]:
    """A and G of a layer's statistic, each [*stack, d, d] or its diagonal [*stack, d].

    Which of the two follows from the layer; of a layer whose kernel or bias is masked, A has the
    coordinates of the leaves that are there.
    """
    whole = x.whole
    if isinstance(statistic, FactorRows):
        _require_rows(method, x, statistic)
        factors = factors_of_rows(statistic, whole)
    elif hasattr(statistic, "input_factor") and hasattr(statistic, "output_factor"):
        factors = statistic.input_factor, statistic.output_factor
    else:
        raise ValueError(
            f"{method}: the statistic of layer {whole.name!r} is a {type(statistic).__name__}, "
            "expected one with input_factor and output_factor as "
            "optax_curv.value_grad_and_curvature makes."
        )
    a, g = factors
    is_dense = _require_shape(method, x, "output_factor", g, whole.out_dim)
    g = _as_kept(jnp.asarray(g, x.dtype), is_dense, x.kind.dense_output)
    return _own_input_factor(method, x, a), g


def input_factor(method: str, x: PresentLayer, statistic: Any) -> jax.Array:
    """A of a layer's statistic, [*stack, d, d] or its diagonal [*stack, d]; see `layer_factors`."""
    if isinstance(statistic, FactorRows):
        return layer_factors(method, x, statistic)[0]
    if not hasattr(statistic, "input_factor"):
        raise ValueError(
            f"{method}: the statistic of layer {x.whole.name!r} is a {type(statistic).__name__}, "
            "expected one with input_factor. Make it with optax_curv.value_grad_and_curvature("
            'loss_fn, statistic="input"); "kronecker" and "rows" have it, too.'
        )
    if isinstance(statistic, InputRows):  # whose factor would be made to see its shape
        shape = *statistic.inputs.shape[:-2], statistic.width, statistic.width
        _require_shape(method, x, "input_factor", jax.ShapeDtypeStruct(shape, x.dtype))
    return _own_input_factor(method, x, statistic.input_factor)


def _own_input_factor(method: str, x: PresentLayer, a: Any) -> jax.Array:
    """The coordinates of A whose leaves are there, as it is kept."""
    is_dense = _require_shape(method, x, "input_factor", a)
    a = jnp.asarray(a, x.dtype)
    a = a[..., x.own_rows, x.own_rows] if is_dense else a[..., x.own_rows]
    return _as_kept(a, is_dense, x.kind.dense_input)


def _require_shape(
    method: str, x: PresentLayer, what: str, factor: Any, width: int | None = None
) -> bool:
    """Refuses a factor of another width, and says whether it is dense."""
    width = x.whole.rows_of_matrix if width is None else width
    shapes = (*x.whole.stack, width, width), (*x.whole.stack, width)
    if jnp.shape(factor) not in shapes:
        raise ValueError(
            f"{method}: the {what} of layer {x.whole.name!r} has shape {jnp.shape(factor)}, "
            f"expected {shapes[0]} or its diagonal {shapes[1]}."
        )
    return jnp.shape(factor) == shapes[0]


def _as_kept(factor: jax.Array, is_dense: bool, wanted_dense: bool) -> jax.Array:
    """A dense factor as its diagonal, or a diagonal one as a dense one, where that is kept."""
    if is_dense and not wanted_dense:
        return jnp.diagonal(factor, axis1=-2, axis2=-1)
    if wanted_dense and not is_dense:
        return factor[..., None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return factor


def _require_rows(method: str, x: PresentLayer, value: FactorRows):
    """Refuses rows that are not of the layer's widths."""
    given = {
        "inputs": (value.inputs, x.whole.rows_of_matrix),
        "output_grads": (value.output_grads, x.whole.out_dim),
    }
    for what, (rows, width) in given.items():
        no_features = what == "inputs" and rows.ndim == value.output_grads.ndim - 1
        if not no_features and (rows.shape[:-2] != x.whole.stack or rows.shape[-1] != width):
            raise ValueError(
                f"{method}: the {what} of layer {x.whole.name!r} have shape {rows.shape}, expected "
                f"{(*x.whole.stack, 'R', width)}."
            )
