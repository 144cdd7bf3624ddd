"""Every architecture: full coverage, exact gradients, and factors equal to single examples'.

The oracle is `jax.grad` of one example at a time: the rows of a layer must sum to its gradient, and
with the rows of each example apart the factors follow from their definitions, without any of the
batched arithmetic."""

import architectures
import jax
import jax.numpy as jnp
import made_architectures  # noqa: F401 - which registers its own
import numpy as np
import pytest
import shared_architectures  # noqa: F401
import unusual_architectures  # noqa: F401

from optax_curv import find_layers, value_grad_and_curvature
from optax_curv.curvature import factors_of_rows
from optax_curv.layers import layer_matrix, slope_matrix

EXACT = 1e-10  # relative to the largest entry, float64: the same sums in another order
ROUNDING = (
    1e-14  # absolute: sums of numbers of order one that cancel (a key's bias has no gradient)
)
TWICE = 1e-9  # absolute: sums over a batch of another size
FLOAT32 = 1e-5  # absolute, where a softmax of the model computes in float32, on numbers up to ten
QUICK_COMPILATION = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ELEMENTWISE = ("scale", "shift")


def assert_equal_up_to_rounding(given, expected, what, rounding=ROUNDING):
    given, expected = np.asarray(given), np.asarray(expected)
    assert given.shape == expected.shape, what
    np.testing.assert_allclose(
        given, expected, rtol=0, atol=EXACT * np.abs(expected).max() + rounding, err_msg=what
    )


def everything(loss, params, args):
    """Computes all that is compared in one compilation; single examples lead with an axis N."""

    def single(*example):
        example = [x[None] for x in example]
        return value_grad_and_curvature(loss, statistic="raw")(params, *example)[1:]

    twice = [jnp.concatenate([x, x]) for x in args]
    return {
        "expand": value_grad_and_curvature(loss)(params, *args),
        "twice": value_grad_and_curvature(loss)(params, *twice)[2],
        "reduce": value_grad_and_curvature(loss, sharing="reduce")(params, *args)[2],
        "rows": value_grad_and_curvature(loss, statistic="rows")(params, *args)[2],
        "input": value_grad_and_curvature(loss, statistic="input")(params, *args)[2],
        "single": jax.vmap(single)(*args),
        "single_grads": jax.vmap(lambda *x: jax.grad(loss)(params, *(y[None] for y in x)))(*args),
    }


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def rows(layer, raw):
    """Inputs as float rows: one-hot for an embedding, 1 for element-wise layers."""
    if layer.kind in ELEMENTWISE:
        return jnp.ones((*raw.inputs.shape, 1))
    if raw.inputs.ndim == raw.output_grads.ndim - 1:
        return jax.nn.one_hot(raw.inputs, layer.in_dim)
    return raw.inputs


def outer(x, full):
    """Mean over the leading axis of x xᵀ, or its diagonal."""
    moments = np.mean(np.einsum("n...i,n...j->n...ij", x, x), axis=0)
    return moments if full else np.diagonal(moments, axis1=-2, axis2=-1)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_architecture(x64, name):
    loss, params, *args = architectures.ARCHITECTURES[name]()
    layers = find_layers(loss, params, *args)
    assert sorted(layers.uncovered) == architectures.UNCOVERED.get(name, [])

    measured = jax.jit(lambda p, a: everything(loss, p, a), compiler_options=QUICK_COMPILATION)(
        params, args
    )
    rounding = FLOAT32 if name in architectures.FLOAT32_INSIDE else ROUNDING
    single_grads, raw_of_single = by_path(measured["single_grads"]), measured["single"][1]
    for path, grad in by_path(measured["expand"][1]).items():
        expected = np.mean(single_grads[path], axis=0)
        assert_equal_up_to_rounding(grad, expected, f"gradient of {path}", rounding)
    for layer in layers:
        matrix = jax.vmap(lambda leaves, layer=layer: layer_matrix(layer, leaves))(
            {path: single_grads[path] for path in layer.paths}
        )
        a, g = rows(layer, raw_of_single[layer.name]), raw_of_single[layer.name].output_grads
        summed = np.einsum("n...ri,n...rj->n...ij", a, g)
        if layer.made:
            summed *= slope_matrix(layer, raw_of_single[layer.name].slope[0])
        assert_equal_up_to_rounding(
            summed, matrix, f"rows of {layer.name} sum to each example's gradient", rounding
        )
        assert_factors(layer, measured, a, g, matrix, rounding)


def assert_factors(layer, measured, a, g, matrix, rounding):
    """Both sharings' factors from rows and gradients of single examples [N, *stack, R, ·]."""
    twice, expand, reduce, made = (
        getattr(x[layer.name], "statistic", x[layer.name])
        for x in (
            measured["twice"],
            measured["expand"][2],
            measured["reduce"],
            measured["rows"],
        )
    )
    assert (expand.input_factor.shape, expand.output_factor.shape) == layer.factor_shapes
    for found, factor in zip(twice[:2], expand[:2], strict=True):
        assert_equal_up_to_rounding(
            found, factor, f"{layer.name}: the batch given twice", max(rounding, TWICE)
        )
    made = made[:2] if layer.kind in ELEMENTWISE else factors_of_rows(made, layer)
    for found, factor in zip(made, expand[:2], strict=True):
        assert_equal_up_to_rounding(found, factor, f"factors of the rows of {layer.name}", rounding)
    alone = measured["input"][layer.name].input_factor
    assert_equal_up_to_rounding(alone, expand.input_factor, f"A of {layer.name} alone", rounding)
    full_input, full_output = (len(shape) == len(layer.stack) + 2 for shape in layer.factor_shapes)
    if layer.kind in ELEMENTWISE:
        for factors in (expand, reduce):
            np.testing.assert_array_equal(factors.input_factor, 1.0)
            assert_equal_up_to_rounding(
                factors.output_factor, outer(matrix[..., 0, :], full_output), layer.name, rounding
            )
        return
    assert_equal_up_to_rounding(
        reduce.input_factor,
        outer(np.mean(a, axis=-2), full_input),
        f"reduce A {layer.name}",
        rounding,
    )
    assert_equal_up_to_rounding(
        reduce.output_factor,
        outer(np.sum(g, axis=-2), full_output),
        f"reduce G {layer.name}",
        rounding,
    )
    uses = a.shape[-2]
    a, g = np.moveaxis(a, -2, 1), np.moveaxis(g, -2, 1)
    a, g = a.reshape(-1, *a.shape[2:]), g.reshape(-1, *g.shape[2:])
    assert_equal_up_to_rounding(
        expand.input_factor, outer(a, full_input), f"expand A {layer.name}", rounding
    )
    assert_equal_up_to_rounding(
        expand.output_factor, uses * outer(g, full_output), f"expand G {layer.name}", rounding
    )
