"""Layers whose input all examples share: right, or in no layer with a reason, at any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import normal
from jax import lax

from optax_curv import Objective, find_layers, value_grad_and_curvature

EXACT = 1e-9  # relative to the largest entry, float64
N, T, D = 4, 3, 5
X = (N, T, D)


def points():
    return jnp.linspace(-1, 1, T * D).reshape(T, D)


# How shared activations [T, D] go on, and how they meet the examples [N, T, D].
ON = {
    "linear": lambda h, w: h,
    "tanh": lambda h, w: jnp.tanh(h),
    "softmax": lambda h, w: jax.nn.softmax(h),
    "second matrix": lambda h, w: h @ w,
    "norm": lambda h, w: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "softplus": lambda h, w: jax.nn.softplus(h),
    "jitted": lambda h, w: jax.jit(lambda h: jnp.sin(h) * h + jnp.cos(h))(h),
    "scan": lambda h, w: lax.scan(lambda h, _: (jnp.tanh(h @ w), h), h, None, length=2)[1][1],
    "carried": lambda h, w: lax.scan(lambda h, k: (jnp.sin(h) + k, k), h, jnp.arange(2.0))[0],
    "masked": lambda h, w: jnp.where(h > 0, h, 0.1 * h),
    "sorted": lambda h, w: jnp.sort(h, axis=-1),
    "inverse": lambda h, w: jnp.linalg.inv(h @ h.T + jnp.eye(T)) @ h,
}
MEET = {
    "sum": lambda h, x: x + h,
    "product": lambda h, x: x * h,
    "repeated": lambda h, x: x * jnp.broadcast_to(h, x.shape),
    "by hand": lambda h, x: x * (jnp.tile(h, (len(x), 1, 1)) + jnp.ones_like(x)),
    "matrix": lambda h, x: jnp.tanh(x @ h.T),
    "from the left": lambda h, x: jnp.einsum("td,nsd->tns", h, x).swapaxes(0, 1),
    "vmap": lambda h, x: jax.vmap(lambda x: jax.nn.softmax(h @ x.T) @ x)(x),
    "concatenated": lambda h, x: jnp.concatenate([jnp.broadcast_to(h, x.shape), x], axis=1),
    "maximum": lambda h, x: jnp.maximum(x, h),
    "selected": lambda h, x: jnp.where(x > 0, h, x),
    "looked up": lambda h, x: h[jnp.argmax(x, axis=1)],
    "in a scan": lambda h, x: lax.scan(lambda x, k: (jnp.sin(x * h + k), None), x, normal(7, 2))[0],
}


def losses(seed):
    """Each way to go on with one way to meet, the pairs drawn at random."""
    rng = np.random.default_rng(seed)
    meets = list(MEET) * 2
    rng.shuffle(meets)
    return [(on, meets[k]) for k, on in enumerate(ON)] + [
        (list(ON)[rng.integers(len(ON))], meet) for meet in MEET
    ]


@pytest.mark.parametrize(("on", "meet"), sorted(set(losses(0))))
def test_factors_are_the_mean_of_single_examples_at_any_batch(x64, on, meet):
    params = {"w": normal(1, D, D), "b": normal(2, D), "v": normal(3, D, D)}

    def loss(p, x):
        shared = ON[on](points() @ p["w"] + p["b"], p["v"])
        return jnp.mean(jnp.sum(jnp.sin(MEET[meet](shared, x)) ** 2, axis=(1, 2)))

    x = normal(4, *X)
    layers = find_layers(loss, params, x)
    assert {path for layer in layers for path in layer.paths} | set(layers.uncovered) == {
        "['w']",
        "['b']",
        "['v']",
    }
    assert_same_at_any_batch(loss, params, x, layers)
    assert "['w']" not in layers.uncovered


def assert_same_at_any_batch(loss, params, x, layers):
    measure = value_grad_and_curvature(loss, layers=layers)

    @jax.jit
    def everything(params, x):
        alone = jax.vmap(lambda example: measure(params, example[None])[2])(x)
        mean = jax.tree.map(lambda parts: jnp.mean(parts, axis=0), alone)
        return measure(params, x)[2], measure(params, jnp.concatenate([x, x]))[2], mean

    once, twice, mean = everything(params, x)
    for layer in layers:
        for given, doubled, right in zip(
            once[layer.name][:2], twice[layer.name][:2], mean[layer.name][:2], strict=True
        ):
            scale = float(jnp.abs(right).max()) + 1e-12
            np.testing.assert_allclose(given, right, rtol=0, atol=EXACT * scale)
            np.testing.assert_allclose(doubled, right, rtol=0, atol=EXACT * scale)


def test_exact_factors_of_a_shared_trunk_stay_when_the_batch_is_given_twice(x64):
    def predict(p, x):
        return x @ jnp.tanh(points() @ p["w"] + p["b"]).T

    params, x = {"w": normal(1, D, D), "b": normal(2, D)}, normal(4, N, D)
    objective = Objective(predict, "normal")
    measure = value_grad_and_curvature(objective, fisher="exact")
    once = measure(params, x, jnp.zeros((N, T)))[2]
    twice = measure(params, jnp.concatenate([x, x]), jnp.zeros((2 * N, T)))[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=EXACT), once, twice)


def test_what_cannot_be_told_apart_is_in_no_layer():
    params = {"w": jnp.ones((D, D)), "v": jnp.ones((D, 2))}

    def by_branch(p, x):
        shared = lax.cond(x[0, 0, 0] > 0, jnp.sin, jnp.cos, points() @ p["w"])
        return jnp.mean(jnp.sin((x * shared) @ p["v"]))

    def penalised(p, x):
        return jnp.mean(jnp.sin(x @ p["v"])) + jnp.sum((points() @ p["w"]) ** 2)

    for loss, reason in ((by_branch, "cannot be told apart"), (penalised, "without meeting them")):
        layers = find_layers(loss, params, jnp.ones(X))
        assert [layer.name for layer in layers] == ["v"]
        assert reason in layers.uncovered["['w']"]


def own_second_moment(loss, params, x, leaf):
    """The mean of g gᵀ over examples, g the gradient of one example's own loss."""
    grads = jax.vmap(lambda one: leaf(jax.grad(loss)(params, one[None])))(x)
    return jnp.einsum("ni,nj->ij", grads, grads) / len(x)


def test_a_leaf_used_directly_and_through_a_function_of_itself_is_measured_as_a_whole(x64):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(D, D))), "b": jnp.asarray(rng.normal(size=D))}
    x = jnp.asarray(rng.normal(size=X))
    for shift in (lambda b: b - jnp.mean(b), jax.nn.log_softmax, lambda b: b / jnp.linalg.norm(b)):

        def loss(p, x):
            return jnp.mean(jnp.sin(x @ p["w"] + shift(p["b"])))  # noqa: B023

        layers = find_layers(loss, params, x)
        covered = {layer.bias: layer.name for layer in layers}
        if "['b']" not in covered:
            assert "['b']" in layers.uncovered
            continue
        _, _, curvature = value_grad_and_curvature(loss, layers=layers)(params, x)
        expected = own_second_moment(loss, params, x, lambda grads: grads["b"])
        found = curvature[covered["['b']"]].output_factor
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_leaf_whose_shift_is_added_beside_a_scale_is_measured_as_a_whole(x64):
    rng = np.random.default_rng(0)
    params, x = jnp.asarray(rng.normal(size=D)), jnp.asarray(rng.normal(size=(N, D)))

    def loss(p, x):
        return jnp.mean(x * p + jnp.tanh(p))

    layers = find_layers(loss, params, x)
    if not list(layers):
        assert layers.uncovered[""]
        return
    _, _, curvature = value_grad_and_curvature(loss, layers=layers)(params, x)
    expected = own_second_moment(loss, params, x, lambda grads: grads)
    np.testing.assert_allclose(
        curvature[next(iter(layers)).name].output_factor, expected, rtol=1e-9
    )
