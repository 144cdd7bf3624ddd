"""Value, gradients and curvature of plain losses, against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv import find_layers, value_grad_and_curvature

EXACT = 1e-12  # relative, float64: the same sums in another order


def network(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (3, 4), dtype), "bias": jnp.ones(4, dtype)},
        "last": {"kernel": jax.random.normal(keys[1], (4, 2), dtype), "bias": jnp.zeros(2, dtype)},
    }
    return (
        params,
        jax.random.normal(keys[2], (5, 3), dtype),
        jax.random.normal(keys[3], (5, 2), dtype),
    )


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean(
        jnp.sum((hidden @ params["last"]["kernel"] + params["last"]["bias"] - y) ** 2, axis=-1)
    )


def per_example_grads(params, x, y):
    return jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(x, y)


def matrices(grads, name):
    """Per-example gradients of one layer as matrices [N, rows, out], the bias last."""
    return np.concatenate([grads[name]["kernel"], np.asarray(grads[name]["bias"])[:, None]], axis=1)


def test_value_and_gradients_are_those_of_jax_bit_for_bit(x64, eagerly):
    params, x, y = network()
    value, grads, _ = value_grad_and_curvature(loss)(params, x, y)
    with eagerly:
        expected = jax.value_and_grad(loss)(params, x, y)
    jax.tree.map(np.testing.assert_array_equal, (value, grads), expected)


def test_factors_are_those_of_single_examples(x64):
    params, x, y = network()
    curvature = value_grad_and_curvature(loss)(params, x, y)[2]
    hidden = np.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    inputs = {"first": x, "last": hidden}
    for name, grads in ((name, matrices(per_example_grads(params, x, y), name)) for name in inputs):
        a = np.concatenate([inputs[name], np.ones((5, 1))], axis=1)
        g = grads[:, -1]  # the bias's gradient is the output's
        np.testing.assert_allclose(curvature[name].input_factor, a.T @ a / 5, rtol=EXACT)
        np.testing.assert_allclose(curvature[name].output_factor, g.T @ g / 5, rtol=EXACT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_diagonal_is_that_of_the_per_example_fisher(x64, sharing):
    params, x, y = network()
    diagonal = value_grad_and_curvature(loss, statistic="diagonal", sharing=sharing)(params, x, y)[
        2
    ]
    grads = per_example_grads(params, x, y)
    for name in params:
        np.testing.assert_allclose(
            diagonal[name], np.mean(matrices(grads, name) ** 2, axis=0), rtol=EXACT
        )


def test_eigenbasis_moments_are_those_of_rotated_gradients(x64):
    params, x, y = network()
    factors = value_grad_and_curvature(loss)(params, x, y)[2]
    basis = {
        n: (jnp.linalg.eigh(f.input_factor)[1], jnp.linalg.eigh(f.output_factor)[1])
        for n, f in factors.items()
    }
    moments = value_grad_and_curvature(loss, statistic="eigenbasis")(params, x, y, basis=basis)[2]
    grads = per_example_grads(params, x, y)
    for name, (left, right) in basis.items():
        rotated = np.einsum("ai,nab,bj->nij", left, matrices(grads, name), right)
        np.testing.assert_allclose(moments[name].moments, np.mean(rotated**2, axis=0), rtol=1e-9)


def test_raw_samples_are_inputs_and_per_example_output_gradients(x64):
    params, x, y = network()
    raw = value_grad_and_curvature(loss, statistic="raw")(params, x, y)[2]
    grads = per_example_grads(params, x, y)
    for name in params:
        products = np.einsum("ni,nj->nij", raw[name].inputs, raw[name].output_grads)
        np.testing.assert_allclose(products, matrices(grads, name), rtol=EXACT)


def test_duplicating_the_batch_changes_no_factor(x64):
    params, x, y = network()
    once = value_grad_and_curvature(loss)(params, x, y)[2]
    twice = value_grad_and_curvature(loss)(params, jnp.tile(x, (2, 1)), jnp.tile(y, (2, 1)))[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=EXACT), once, twice)


def test_auxiliary_results_and_keywords_pass():
    params, x, y = network(jnp.float32)

    def with_aux(params, x, *, y, name):
        return loss(params, x, y), {"name": name, "x": x}

    (value, aux), grads, curvature = value_grad_and_curvature(with_aux, has_aux=True)(
        params, x, y=y, name="word"
    )
    assert aux["name"] == "word" and (aux["x"] == x).all() and value == loss(params, x, y)
    assert list(curvature) == list(grads) == ["first", "last"]


def test_a_subset_of_layers_is_measured():
    params, x, y = network(jnp.float32)
    layers = find_layers(loss, params, x, y)
    chosen = type(layers)([layers["last"]])
    assert list(value_grad_and_curvature(loss, layers=chosen)(params, x, y)[2]) == ["last"]


def test_errors_say_what_to_do():
    params, x, y = network(jnp.float32)
    with pytest.raises(ValueError, match=r"shape \(5, 2\), expected a scalar"):
        value_grad_and_curvature(lambda p, x, y: x @ p["first"]["kernel"][:, :2])(params, x, y)
    with pytest.raises(ValueError, match=r"\['n'\] has dtype int32"):
        value_grad_and_curvature(lambda p: 0.0)({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="is a str, expected a floating"):
        value_grad_and_curvature(lambda p: 0.0)({"activation": "relu"})
    with pytest.raises(ValueError, match=r"the loss is a tuple, .* set has_aux=True"):
        value_grad_and_curvature(lambda *args: (loss(*args), 1))(params, x, y)
    with pytest.raises(ValueError, match="expected a pair"):
        value_grad_and_curvature(loss, has_aux=True)(params, x, y)
    for batch_size in (0, 2.5):
        with pytest.raises(ValueError, match=f"is {batch_size}; expected at least one"):
            value_grad_and_curvature(loss, batch_size=batch_size)(params, x, y)
    with pytest.raises(ValueError, match="is 0; expected at least one"):
        value_grad_and_curvature(loss)(params, x[:0], y[:0])
    with pytest.raises(ValueError, match="pass optax_curv"):
        value_grad_and_curvature(loss, fisher="exact")
    with pytest.raises(ValueError, match="unknown statistic='fisher'"):
        value_grad_and_curvature(loss, statistic="fisher")
    others = find_layers(lambda p, x: jnp.mean(x @ p["w"]), {"w": jnp.ones((3, 2))}, x)
    with pytest.raises(ValueError, match="another model"):
        value_grad_and_curvature(loss, layers=others)(params, x, y)


def test_a_string_for_a_boolean_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown has_aux='no'; expected one of \(True, False\)"):
        value_grad_and_curvature(lambda p, x: jnp.mean(x @ p), has_aux="no")  # type: ignore[call-overload]


def test_modules_of_other_libraries_are_told_what_to_pass():
    import equinox as eqx
    from flax import nnx

    network = eqx.nn.MLP(3, 2, 4, 1, activation=jax.nn.softplus, key=jax.random.key(1))
    for call in (find_layers, lambda *args: value_grad_and_curvature(args[0])(*args[1:])):
        with pytest.raises(ValueError, match=r"activation.*eqx\.partition\(model, eqx\.is_inexact"):
            call(lambda model, x: jnp.mean(jax.vmap(model)(x)), network, jnp.ones((4, 3)))
    state = nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))) | {"count": jnp.int32(0)}
    with pytest.raises(
        ValueError, match=r"int32, expected a floating-point array; pass nnx\.state"
    ):
        find_layers(lambda p, x: jnp.mean(x), nnx.State(dict(state)), jnp.ones((4, 3)))


def test_layers_are_found_at_a_batch_size_given():
    def loss(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["h"]) * p["scale"]
            return h, h

        return jnp.mean(jax.lax.scan(step, jnp.zeros((x.shape[1], 4)), x)[1] ** 2)

    params = {"w": jnp.ones((2, 4)), "h": jnp.eye(4), "scale": jnp.ones(4)}
    x = jnp.ones((5, 3, 2))  # [time, examples, features]
    layers = find_layers(loss, params, x, batch_size=3)
    measure = value_grad_and_curvature(loss, layers=layers, batch_size=3)
    assert list(measure(params, x)[2]) == [layer.name for layer in layers] and not layers.uncovered


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_an_embedding_counts_the_rows_that_are_read(mode):
    table, ids = jnp.ones((7, 3)), jnp.array([0, -1, 2, 9, 6, 2])

    def loss(p, ids):
        rows = jax.vmap(lambda i: p.at[i].get(mode=mode, wrap_negative_indices=False))(ids)
        return jnp.mean(jnp.where(jnp.isnan(rows), 0, rows) ** 2)

    (factors,) = value_grad_and_curvature(loss)(table, ids)[2].values()
    read = jnp.clip(ids, 0, 6) if mode == "clip" else ids[jnp.array([0, 2, 4, 5])]
    expected = jnp.bincount(read, length=7) / len(ids)
    np.testing.assert_allclose(factors.input_factor, expected, atol=1e-6)


def test_a_kernel_times_a_number_known_at_run_time_is_the_same_layer(x64):
    params, x, _ = network()
    kernel, c = params["first"]["kernel"], jnp.float64(0.3)

    def given(w, x, c):
        return jnp.mean(jnp.sin(x @ (c * w / jnp.sqrt(len(w)))))

    def right(w, x, c):
        return jnp.mean(jnp.sin((x * c / jnp.sqrt(len(w))) @ w))

    measured = [value_grad_and_curvature(f)(kernel, x, c)[2] for f in (given, right)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *measured)
