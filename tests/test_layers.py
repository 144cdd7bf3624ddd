"""A layer's leaves as one matrix and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.layers import MAX_FULL_ELEMENTWISE, Layer, Layers, layer_leaves, layer_matrix


def leaf(*shape, dtype=jnp.float32):
    return jnp.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)


def round_trip(layer, leaves):
    matrix = layer_matrix(layer, leaves)
    assert matrix.shape == (*layer.stack, layer.rows_of_matrix, layer.out_dim)
    back = layer_leaves(layer, matrix, leaves)
    for path in layer.paths:
        assert back[path].dtype == leaves[path].dtype
        np.testing.assert_array_equal(back[path], leaves[path])
    return matrix


def test_the_bias_is_the_last_row():
    leaves = {"w": leaf(3, 2), "b": leaf(2)}
    matrix = round_trip(Layer("l", "dense", "w", "b", 3, 2), leaves)
    np.testing.assert_array_equal(matrix, jnp.concatenate([leaves["w"], leaves["b"][None]]))


def test_a_transposed_kernel_is_turned():
    leaves = {"w": leaf(2, 3)}
    matrix = round_trip(Layer("l", "dense", "w", None, 3, 2, kernel_axes=(1, 0)), leaves)
    np.testing.assert_array_equal(matrix, leaves["w"].T)


def test_a_grouped_convolution_splits_its_output_axis():
    leaves = {"w": leaf(3, 3, 2, 8), "b": leaf(8)}  # two groups of two channels, four outputs each
    layer = Layer(
        *("l", "conv", "w", "b", 18, 4, (2,)),
        kernel_split=(3, 3, 2, 2, 4),
        kernel_axes=(3, 0, 1, 2, 4),
    )
    matrix = round_trip(layer, leaves)
    for group in range(2):
        outputs = slice(4 * group, 4 * group + 4)
        np.testing.assert_array_equal(matrix[group, :-1], leaves["w"][..., outputs].reshape(18, 4))
        np.testing.assert_array_equal(matrix[group, -1], leaves["b"][outputs])


def test_stack_and_bias_axes_are_named():
    leaves = {"w": leaf(3, 4, 2), "b": leaf(2, 4)}
    layer = Layer("l", "dense", "w", "b", 3, 2, (4,), kernel_axes=(1, 0, 2), bias_axes=(1, 0))
    matrix = round_trip(layer, leaves)
    np.testing.assert_array_equal(matrix[1, :-1], leaves["w"][:, 1])
    np.testing.assert_array_equal(matrix[1, -1], leaves["b"][:, 1])


@pytest.mark.parametrize(
    "layer",
    [Layer("l", "scale", "w", None, 1, 6), Layer("l", "shift", None, "w", 0, 6)],
    ids=["scale", "shift"],
)
def test_elementwise_layers_are_one_row(layer):
    round_trip(layer, {"w": leaf(2, 3, dtype=jnp.bfloat16)})


def test_factors_of_wide_elementwise_layers_and_embeddings_are_diagonal():
    assert Layer("l", "dense", "w", "b", 3, 2, (5,)).factor_shapes == ((5, 4, 4), (5, 2, 2))
    assert Layer("l", "embedding", "w", None, 9, 2).factor_shapes == ((9,), (2, 2))
    wide = MAX_FULL_ELEMENTWISE + 1
    assert Layer("l", "shift", None, "b", 0, wide).factor_shapes == ((1, 1), (wide,))


def test_a_leaf_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"'l': the leaf w has shape \(3, 3\), expected .* 3 × out_dim=2"
    ):
        layer_matrix(Layer("l", "dense", "w", None, 3, 2), {"w": leaf(3, 3)})


def test_layers_may_be_an_argument_of_a_jitted_function():
    """They have no leaves, so that a program is compiled for each table."""
    layer = Layer("dense", "dense", "['w']", None, 3, 2)
    layers = Layers([layer])

    @jax.jit
    def names(layers, x):
        return x + len(layers)

    assert names(layers, jnp.zeros(())) == 1
    assert not jax.tree.leaves(layers)
