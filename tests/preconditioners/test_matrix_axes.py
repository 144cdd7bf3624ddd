"""Which axes are a matrix: read from the traced loss, or from names and shapes."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_curv
from optax_curv.layers import layer_matrix
from optax_curv.preconditioners._stacks.stacks import Stacks
from optax_curv.preconditioners._transformation.trees import path_of


def of_linen(module, *inputs):
    params = module.init(jax.random.key(0), *inputs)

    def loss(params, *inputs):
        return jnp.mean(jnp.tanh(module.apply(params, *inputs)) ** 2)

    return loss, params, inputs


def of_nnx(model, *inputs):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, *inputs):
        return jnp.mean(jnp.tanh(nnx.merge(graph, params, rest)(*inputs)) ** 2)

    return loss, params, inputs


def of_equinox(model, inputs):
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, inputs):
        return jnp.mean(jnp.tanh(jax.vmap(eqx.combine(params, rest))(inputs)) ** 2)

    return loss, params, (inputs,)


def experts():
    params = {"router": jnp.ones((6, 3)), "up": jnp.ones((3, 6, 8)), "down": jnp.ones((3, 8, 6))}

    def loss(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        hidden = jnp.tanh(jnp.einsum("nd,edh->neh", x, params["up"]))
        return jnp.mean(jnp.einsum("neh,ehd,ne->nd", hidden, params["down"], gates) ** 2)

    return loss, params, (jnp.ones((5, 6)),)


def scanned_blocks():
    params = {"w": jnp.ones((4, 6, 6)), "b": jnp.ones((4, 6))}

    def loss(params, x):
        def block(x, p):
            return jnp.tanh(x @ p["w"] + p["b"]), None

        return jnp.mean(jax.lax.scan(block, x, params)[0] ** 2)

    return loss, params, (jnp.ones((5, 6)),)


X1, X2, X3 = (jnp.ones((2, *[5] * rank, 4)) for rank in (1, 2, 3))
RNGS = nnx.Rngs(0)
MODELS = {
    "linen attention": lambda: of_linen(nn.MultiHeadDotProductAttention(2), jnp.ones((2, 5, 8))),
    "nnx attention": lambda: of_nnx(
        nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 8))
    ),
    "dense general": lambda: of_linen(nn.DenseGeneral((3, 2), axis=(-2, -1)), jnp.ones((2, 5, 4))),
    "conv 1d": lambda: of_linen(nn.Conv(6, (3,)), X1),
    "conv 2d groups": lambda: of_linen(nn.Conv(6, (3, 3), feature_group_count=2), X2),
    "conv 2d depthwise": lambda: of_linen(nn.Conv(4, (3, 3), feature_group_count=4), X2),
    "conv 3d": lambda: of_linen(nn.Conv(6, (2, 2, 2)), X3),
    "conv transpose": lambda: of_linen(nn.ConvTranspose(6, (3, 3)), X2),
    "experts": experts,
    "scanned blocks": scanned_blocks,
    "lstm": lambda: of_linen(nn.RNN(nn.OptimizedLSTMCell(6)), X1),
    "gru": lambda: of_linen(nn.RNN(nn.GRUCell(6)), X1),
    "equinox mlp": lambda: of_equinox(
        eqx.nn.MLP(4, 3, 5, 2, key=jax.random.key(0)), jnp.ones((3, 4))
    ),
    "equinox conv": lambda: of_equinox(
        eqx.nn.Conv2d(4, 6, 3, key=jax.random.key(0)), jnp.ones((2, 4, 7, 7))
    ),
}


def numbered(params):
    """Every number another one, so that an exchange of two axes shows."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


@pytest.mark.parametrize("name", MODELS)
def test_with_layers_a_method_sees_every_kernel_as_its_layers_matrix(name):
    loss, params, inputs = MODELS[name]()
    params = numbered(params)
    layers = optax_curv.find_layers(loss, params, *inputs)
    table = {row.leaf: row for row in optax_curv.matrix_axes(params, layers)}
    leaves = {
        path_of(path).removesuffix(".value"): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    kernels = [layer for layer in layers if layer.kind in ("dense", "conv")]
    assert kernels
    for layer in kernels:
        kernel = layer.kernel.removesuffix(".value")
        row = table.pop(kernel)
        assert row.by_method and row.is_matrix
        place = list(leaves).index(kernel)
        path = jax.tree.leaves_with_path(params)[place][0]
        member = row.member(place, path, leaves[kernel])
        seen = member.take(jax.tree.leaves(params))
        alone = optax_curv.Layer(
            "kernel",
            layer.kind,
            kernel,
            None,
            layer.in_dim,
            layer.out_dim,
            layer.stack,
            kernel_split=layer.kernel_split,
            kernel_axes=layer.kernel_axes,
        )
        expected = layer_matrix(alone, leaves).reshape(seen.shape)
        np.testing.assert_array_equal(seen, expected)
        back = member.give(seen, jax.tree.leaves(params))
        np.testing.assert_array_equal(back[place], leaves[kernel])
    assert not any(row.by_method for row in table.values()), "no bias, scale or table is a matrix"


@pytest.mark.parametrize("name", ["linen attention", "conv 3d", "experts", "scanned blocks"])
def test_muon_with_the_numbers_sees_the_same_matrices(name):
    loss, params, inputs = MODELS[name]()
    params = numbered(params)
    layers = optax_curv.find_layers(loss, params, *inputs)
    numbers = optax_curv.muon_dimension_numbers(layers)(params)
    is_numbers = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    given = jax.tree.leaves(numbers, is_leaf=is_numbers)
    for row, own in zip(optax_curv.matrix_axes(params, layers), given, strict=True):
        if not row.is_matrix:
            assert own is None
            continue
        assert (own.reduction_axis, own.output_axis) == (row.rows, row.columns)
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers)
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


def test_without_layers_names_and_shapes_decide():
    params = {
        "attention": {"kernel": jnp.ones((32, 4, 8)), "bias": jnp.ones((4, 8))},
        "conv": jnp.ones((3, 3, 4, 8)),
        "dense": jnp.ones((5, 7)),
        "norm": {"scale": jnp.ones((5, 7))},
        "vector": jnp.ones(3),
        "empty": jnp.ones((0, 3)),
    }
    table = {row.leaf: row for row in optax_curv.matrix_axes(params)}
    matrices = {leaf: row.matrix_shape for leaf, row in table.items() if row.by_method}
    assert matrices == {
        "['attention']['kernel']": (1, 32, 32),
        "['conv']": (1, 9, 32),
        "['dense']": (1, 5, 7),
    }


def test_adam_for_and_stacked_have_the_last_word():
    params = {"a": jnp.ones((3, 4, 5)), "b": jnp.ones((4, 5)), "c": jnp.ones(4)}
    chosen = {"a": False, "b": "adam", "c": "matrix_axes"}
    table = optax_curv.matrix_axes(params, adam_for=chosen, stacked={"a": 1, "b": 0, "c": 0})
    assert table["['a']"].matrix_shape == (3, 4, 5)
    assert not table["['b']"].by_method
    assert table["['c']"].by_method and not table["['c']"].is_matrix
    assert hash(table) == hash(
        optax_curv.matrix_axes(params, adam_for=chosen, stacked={"a": 1, "b": 0, "c": 0})
    )
    assert "adam_for" in str(table)


def test_layers_of_another_model_are_refused_by_name():
    layer = optax_curv.Layer("dense", "dense", "['w']", None, 3, 2)
    layers = optax_curv.Layers([layer])
    with pytest.raises(ValueError, match=r"covers \['w'\], which the tree lacks; it has .*\['v'\]"):
        optax_curv.matrix_axes({"v": jnp.ones((3, 2))}, layers)
    with pytest.raises(ValueError, match=r"has shape \(3, 3\), expected the size of"):
        optax_curv.shampoo(0.1, layers=layers).init({"w": jnp.ones((3, 3))})


def test_a_kernel_trains_as_the_same_numbers_in_a_dense_layer():
    kernel, bias = numbered([jnp.ones((6, 2, 3)), jnp.ones((2, 3))])
    general = {"kernel": kernel, "bias": bias}
    dense = {"kernel": kernel.reshape(6, 6), "bias": bias.reshape(6)}
    for tx in (optax_curv.shampoo(0.1, weight_decay=0.1), optax_curv.soap(0.1)):
        results = []
        for params in (general, dense):
            state = tx.init(params)
            for _ in range(3):
                updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            results.append([np.asarray(u).ravel() for u in jax.tree.leaves(updates)])
        for own, other in zip(*results, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-5)


def test_stacks_take_and_give_back_what_they_took():
    params = numbered({"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3)), "c": jnp.ones((2, 4, 3))})
    rows = optax_curv.matrix_axes(params, stacked={"a": 0, "b": 0, "c": 1})
    leaves = enumerate(jax.tree.leaves_with_path(params))
    members = [(row.member(i, *x), "kind") for row, (i, x) in zip(rows, leaves, strict=True)]
    stacks = Stacks(params, members)
    assert [stack.struct.shape for stack in stacks.values()] == [(4, 4, 3)]
    back = stacks.give(stacks.take(params), params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
