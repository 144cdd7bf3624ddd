"""N is read off what reaches the mean at the end of the loss, and a batch of one is a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import normal
from jax import lax

from optax_curv import find_layers, value_grad_and_curvature
from optax_curv.capture._graph.trace import trace

N, D = 6, 4
PARAMS = {"w": normal(1, D, 3), "b": normal(2, 3)}


def outputs(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def plain(p, x):
    return jnp.mean(outputs(p, x) ** 2)


OTHER_ARRAYS = {
    "schedule": (lambda p, s, x: jnp.mean((s[7] * outputs(p, x)) ** 2), jnp.linspace(0, 1, 50)),
    "class weights": (lambda p, w, x: jnp.mean((outputs(p, x) * w) ** 2), jnp.ones(3)),
    "a temperature for each class": (
        lambda p, t, x: jnp.mean(jax.nn.softmax(outputs(p, x) / t.sum())),
        jnp.ones(3),
    ),
    "target network": (
        lambda p, t, x: jnp.mean((outputs(p, x) - outputs(t, x)) ** 2),
        {"b": normal(3, 3), "w": normal(4, D, 3)},
    ),
    "table that is looked up": (
        lambda p, t, x: jnp.mean((outputs(p, x) + t[jnp.argmax(x, 1)]) ** 2),
        normal(5, D, 3),
    ),
    "raw key": (
        lambda p, key, x: jnp.mean(
            outputs(p, x + jax.random.normal(jax.random.wrap_key_data(key, impl="rbg"), x.shape))
        ),
        jax.random.key_data(jax.random.key(0, impl="rbg")),
    ),
}


@pytest.mark.parametrize("name", OTHER_ARRAYS)
def test_an_array_that_is_not_the_batch_is_not_asked(name):
    loss, other = OTHER_ARRAYS[name]
    assert trace("test", loss, PARAMS, (other, normal(6, N, D)), {}).batch == N


def test_keyword_arguments_and_nested_batches_are_read():
    def loss(p, *, batch):
        return plain(p, batch["inner"]["x"]["deep"]) * batch["a_table"].sum()

    batch = {"a_table": jnp.ones(9), "inner": {"x": {"deep": normal(6, N, D)}}}
    assert trace("test", loss, PARAMS, (), {"batch": batch}).batch == N


def test_a_time_major_batch_alone_is_an_error_that_names_both_numbers():
    def loss(p, x):
        def step(h, x):
            return outputs(p, x) + h, None

        return jnp.mean(jnp.sum(lax.scan(step, jnp.zeros((x.shape[1], 3)), x)[0] ** 2, -1))

    x = normal(6, 5, N, D)
    for call in (find_layers, lambda loss, *args: value_grad_and_curvature(loss)(*args)):
        with pytest.raises(
            ValueError, match=r"5 examples, but the loss is a mean over \[6\]; give"
        ):
            call(loss, PARAMS, x)
    assert len(find_layers(loss, PARAMS, x, batch_size=N)) == 1


def test_sums_and_means_over_a_multiple_of_the_examples_pass():
    x = normal(6, N, D)
    for loss in (
        lambda p, x: jnp.sum(outputs(p, x) ** 2),
        lambda p, x: jnp.sum(outputs(p, x) ** 2) / (3 * len(x)),
        lambda p, x: jnp.sqrt(plain(p, x)),
        lambda p, x: jnp.sum(outputs(p, x) ** 2) / jnp.sum(x > 0),
    ):
        assert len(find_layers(loss, PARAMS, x)) == 1


@pytest.mark.parametrize("shape", [(N, D), (N, 5, D)])
def test_a_batch_of_one_finds_what_a_batch_of_many_finds(shape):
    params = PARAMS | {"scale": normal(7, 3), "mean": normal(8, 3)}

    def loss(p, x):
        def log_prob(z, mean, scale):
            return -jnp.sum(jnp.sin((z - mean) * scale) ** 2)

        log_prob = jnp.vectorize(log_prob, signature="(d),(d),(d)->()")
        return -jnp.mean(log_prob(outputs(p, x), p["mean"], p["scale"]))

    x = normal(6, *shape)
    layers = find_layers(loss, params, x)
    assert not layers.uncovered
    measure = jax.jit(value_grad_and_curvature(loss, layers=layers))
    alone = [jax.tree.leaves(measure(params, x[k : k + 1])[2]) for k in range(N)]
    for given, *parts in zip(jax.tree.leaves(measure(params, x)[2]), *alone, strict=True):
        np.testing.assert_allclose(given, np.mean(parts, axis=0), rtol=1e-4, atol=1e-7)
