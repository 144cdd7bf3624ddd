"""What the walk finds, what it refuses, and what it says about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from optax_curv import find_layers, value_grad_and_curvature

X = jax.ShapeDtypeStruct((5, 3), jnp.float32)
W = jax.ShapeDtypeStruct((3, 3), jnp.float32)


def reason(loss, params=W, *args):
    """Why the only parameter is in no layer."""
    layers = find_layers(loss, params, *(args or (X,)))
    assert not list(layers)
    (said,) = layers.uncovered.values()
    return said


def test_abstract_arrays_suffice_and_layers_are_hashable():
    def loss(p, x):
        return jnp.mean(x @ p)

    assert hash(find_layers(loss, W, X)) == hash(find_layers(loss, W, X))
    assert find_layers(loss, W, X) == find_layers(loss, W, x=X)


def test_a_parameter_the_loss_ignores_is_named():
    layers = find_layers(lambda p, x: jnp.mean(x @ p["used"]), {"used": W, "idle": W}, X)
    assert layers.uncovered == {
        "['idle']": "the loss does not depend on it; leave it out of the parameters"
    }


def test_frozen_leaves_are_in_no_layer_and_uses_without_a_gradient_do_not_count():
    assert "frozen" in reason(lambda p, x: jnp.mean(x @ lax.stop_gradient(p)))
    assert "frozen" in reason(lambda p, x: jnp.mean(x + lax.stop_gradient(jnp.tanh(x @ p))))

    def through_scan_and_jit(p, x):
        h, kept = lax.scan(lambda h, _: (jnp.tanh(h @ p), h @ p), x, None, length=2)
        return jnp.mean(jax.jit(lambda h, x: jnp.sin(lax.stop_gradient(h)) + x)(h, x)), kept

    assert "frozen" in reason(lambda p, x: through_scan_and_jit(p, x)[0])

    def own_target(p, x):
        return jnp.mean((x @ p - lax.stop_gradient((x + 1) @ p)) ** 2)

    (layer,) = find_layers(own_target, W, X)
    assert layer.shared == 1


def test_a_kernel_made_of_leaves_is_named():
    assert "kernel that meets the data is made of it" in reason(
        lambda p, x: jnp.mean(jnp.sin(x @ (p / jnp.linalg.norm(p, axis=0))))
    )
    assert "`cumsum`" in reason(lambda p, x: jnp.mean(jnp.sin(x @ jnp.cumsum(p, axis=0))))


def test_reasons_name_what_stands_in_the_way():
    assert "a function of it, made entry by entry, enters `sort`" in reason(
        lambda p, x: jnp.mean(x @ jnp.sort(jnp.tanh(p)))
    )
    assert "write (x @ a) @ b" in reason(lambda p, x: jnp.mean(x @ (p @ p)))
    assert "added to another" in reason(lambda p, x: jnp.mean(x @ (p + p.T)))
    assert "becomes complex" in reason(lambda p, x: jnp.mean(jnp.abs(jnp.fft.fft(x) @ p)))
    assert "becomes complex" in reason(lambda p, x: jnp.mean(jnp.abs(x @ (1j * p))))
    complex_leaf = jax.ShapeDtypeStruct((3, 3), jnp.complex64)
    assert "is or becomes complex" in reason(lambda p, x: jnp.mean(jnp.abs(x @ p)), complex_leaf)
    assert "different axes" in reason(
        lambda p, x: (
            jnp.mean(x @ p) + jnp.mean(jnp.einsum("nij,ij->n", x[:, :, None] * x[:, None], p))
        )
    )
    assert "unequal slices" in reason(lambda p, x: jnp.mean(x @ p[::-1][:2].T))
    assert "jax.lax.scan(f, init, xs)" in reason(
        lambda p, x: jnp.mean(lax.fori_loop(1, 3, lambda i, h: h * (x @ p[i])[:, None], x))
    )


def test_complex_leaves_have_gradients_beside_the_layers():
    def loss(p, x):
        return jnp.mean((jnp.abs(jnp.fft.fft(x) @ p["w"]) @ p["v"]) ** 2)

    args = {"w": jnp.full((3, 3), 1 + 2j), "v": jnp.ones((3, 2))}, jnp.eye(4, 3)
    _, grads, curvature = value_grad_and_curvature(loss)(*args)
    jax.tree.map(np.testing.assert_array_equal, grads, jax.grad(loss)(*args))
    assert list(curvature) == ["v"] and curvature["v"].output_factor.dtype == jnp.float32


def test_a_custom_rule_hides_the_layer():
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    assert "whose own derivative rule hides" in reason(lambda p, x: jnp.mean(dense(p, x)))


def test_a_penalty_does_not_uncover_a_layer():
    layers = find_layers(lambda p, x: jnp.mean(jnp.tanh(x @ p)) + jnp.sum(p**2), W, X)
    assert len(layers) == 1 and not layers.uncovered


def test_a_while_loop_around_a_layer_is_an_error():
    def loss(p, x):
        return jnp.mean(lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h @ p, x))

    with pytest.raises(ValueError, match=r"while_loop around the layer .* use jax\.lax\.scan"):
        find_layers(loss, W, X)


def test_layers_that_cannot_tell_the_examples_apart_are_named():
    def loss(p, x):
        return jnp.mean(lax.map(lambda x: jnp.tanh(x @ p["w"]) * p["s"], x, batch_size=2) ** 2)

    params, x = {"w": jnp.ones((3, 3)), "s": jnp.ones(3)}, jnp.ones((4, 3))
    layers = find_layers(loss, params, x)
    assert [layer.name for layer in layers] == ["w"]
    assert layers.uncovered == {"['s']": "the examples cannot be told apart where it is used"}
    with pytest.raises(
        ValueError, match="nothing tells the examples apart where the layer 'w' is used"
    ):
        value_grad_and_curvature(loss, sharing="reduce")(params, x)


def test_a_batch_size_nobody_shows_is_an_error():
    x = jnp.ones((5, 3))
    with pytest.raises(ValueError, match="give batch_size="):
        value_grad_and_curvature(lambda p: jnp.mean(x @ p))(jnp.ones((3, 3)))


def test_batch_size_scales_the_output_factor():
    x, p = jnp.ones((4, 3)), jnp.ones((3, 1))
    factors = [
        value_grad_and_curvature(lambda p: jnp.mean(x @ p), batch_size=n)(p)[2]["params"]
        for n in (1, 4)
    ]
    np.testing.assert_allclose(4 * factors[0].output_factor, factors[1].output_factor)


def test_names_are_short_and_unique():
    params = {
        "a": {"kernel": W, "bias": jax.ShapeDtypeStruct((3,), jnp.float32)},
        "b": [W, W],
        "norm": {"scale": W},
    }

    def loss(p, x):
        h = (x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"][0] @ p["b"][1]
        return jnp.mean(h @ p["norm"]["scale"])

    assert [layer.name for layer in find_layers(loss, params, X)] == ["a", "b/0", "b/1", "norm"]


def test_side_effects_beside_a_layer_stay(capsys):
    def loss(p, x):
        def step(h, _):
            jax.debug.print("seen {}", jnp.sum(h))
            return jnp.tanh(h @ p), None

        return jnp.mean(lax.scan(step, x, None, length=2)[0])

    args = jnp.eye(3), jnp.ones((5, 3))
    grads = value_grad_and_curvature(loss)(*args)[1]
    jax.effects_barrier()
    assert capsys.readouterr().out.count("seen") >= 2
    np.testing.assert_allclose(grads, jax.grad(loss)(*args), rtol=1e-6)


def test_a_table_of_a_deep_transformer_needs_no_arrays():
    width, depth = 8, 12
    shapes = {
        "q": (width, width),
        "k": (width, width),
        "v": (width, width),
        "up": (width, 16),
        "down": (16, width),
    }
    blocks = [
        {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()} for _ in range(depth)
    ]

    def loss(p, x):
        for block in p:
            q, k, v = (x @ block[n] for n in "qkv")
            x = x + jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v
            x = x + jax.nn.gelu(x @ block["up"]) @ block["down"]
        return jnp.mean(x)

    layers = find_layers(loss, blocks, jax.ShapeDtypeStruct((2, 4, width), jnp.float32))
    assert len(layers) == depth * len(shapes) and str(layers).count("\n") == depth * len(shapes)
    assert all(layer.rows == 8 for layer in layers)


def test_what_only_comes_beside_the_loss_has_no_layer():
    params = {name: jnp.ones((3, 3)) for name in "abcd"}

    def loss(p, x):
        shared = jnp.tanh(p["b"])
        beside = (x @ p["c"], shared, p["a"] @ p["a"])
        return jnp.mean(jnp.sin(x @ p["a"]) @ shared) + lax.stop_gradient(
            jnp.mean(x @ p["d"])
        ), beside

    layers = find_layers(loss, params, jnp.ones((5, 3)))
    assert {path for layer in layers for path in layer.paths} == {"['a']", "['b']"}
    assert "does not depend on it" in layers.uncovered["['c']"]
    assert "stop_gradient" in layers.uncovered["['d']"]


def test_a_leaf_without_use_is_no_layer_at_a_batch_of_one():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones(3)}
    layers = find_layers(lambda p, x: jnp.mean(jnp.sin(x @ p["a"])), params, jnp.ones((1, 3)))
    assert [layer.paths for layer in layers] == [("['a']",)]
    assert "does not depend on it" in layers.uncovered["['b']"]


def test_a_table_of_which_a_map_over_examples_picks_one_row_is_an_embedding():
    ids = jnp.array([1, 2, -1, 1])

    def loss(p, ids):
        return jnp.mean(jnp.sin(lax.map(lambda k: p[k], ids)))

    (layer,) = find_layers(loss, jnp.ones((4, 3)), ids)
    assert (layer.kind, layer.in_dim, layer.out_dim) == ("embedding", 4, 3)
    curvature = value_grad_and_curvature(loss)(jnp.ones((4, 3)), ids)[2][layer.name]
    assert curvature.input_factor.tolist() == [0, 0.5, 0.25, 0.25]
