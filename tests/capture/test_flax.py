"""Flax models: nnx modules and states as first argument, linen variables with collections."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optax_curv import find_layers, scale_by_kfac, value_grad_and_curvature


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def loss(model, x):
    return jnp.mean(model(x) ** 2)


X = jax.random.normal(jax.random.key(0), (5, 3))


def test_an_nnx_module_is_differentiated_and_updated_as_by_nnx():
    ours, theirs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    value, grads, curvature = nnx.jit(lambda m, x: value_grad_and_curvature(loss)(m, x))(ours, X)
    expected_value, expected = nnx.jit(nnx.value_and_grad(loss))(theirs, X)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, expected
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    after, expected_after = (nnx.state(m, nnx.BatchStat) for m in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, expected_after)
    assert ours.dropout.rngs.count[...] == theirs.dropout.rngs.count[...] == 1
    assert set(curvature) == {"first", "norm/scale", "norm/bias", "last"}


def test_an_nnx_optimizer_takes_the_gradients_and_the_curvature():
    model = Net(nnx.Rngs(0))
    layers = find_layers(loss, model, X)
    assert not layers.uncovered
    optimizer = nnx.Optimizer(
        model, optax.chain(scale_by_kfac(layers), optax.scale(-0.1)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x):
        value, grads, curvature = value_grad_and_curvature(loss, layers=layers)(model, x)
        optimizer.update(model, grads, curvature=curvature)
        return value

    before = jnp.array(model.first.kernel[...])
    assert np.isfinite(step(model, optimizer, X))
    assert not np.array_equal(before, model.first.kernel[...])


def test_an_nnx_state_keeps_its_structure():
    graph, state, rest = nnx.split(
        nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    del rest
    _, grads, curvature = value_grad_and_curvature(lambda s, x: loss(nnx.merge(graph, s), x))(
        state, X
    )
    assert jax.tree.structure(grads) == jax.tree.structure(state) and list(curvature) == [
        "layers/0"
    ]


def test_linen_collections_change_through_aux():
    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x)))

    variables = Module().init(jax.random.key(0), X)

    def linen_loss(params, x, stats):
        outputs, changed = Module().apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean(outputs**2), changed["batch_stats"]

    def both(params, x, stats):
        ours = value_grad_and_curvature(linen_loss, has_aux=True)(params, x, stats)
        return ours, jax.value_and_grad(linen_loss, has_aux=True)(params, x, stats)

    assert not find_layers(linen_loss, variables["params"], X, variables["batch_stats"]).uncovered
    ours, expected = jax.jit(both)(variables["params"], X, variables["batch_stats"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours[:2], expected
    )


def test_examples_are_counted_in_the_batch_and_not_in_batch_statistics_or_keys():
    module = nn.Sequential(
        [nn.Dense(4), nn.BatchNorm(use_running_average=False), jnp.tanh, nn.Dense(2)]
    )
    variables = module.init(jax.random.key(0), X)

    def loss(params, stats, key, batch):
        x = batch["x"] + 0 * jax.random.normal(key, batch["x"].shape)
        return jnp.mean(
            module.apply({"params": params, **stats}, x, mutable=["batch_stats"])[0] ** 2
        )

    stats = {"batch_stats": variables["batch_stats"]}
    layers = find_layers(loss, variables["params"], stats, jax.random.PRNGKey(0), {"x": X})
    assert not layers.uncovered and [layer.rows for layer in layers] == [5, 5, 5, 5]
