"""K-FAC and EKFAC in training with captured statistics: adaptive mode, donation, bases."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

EXACT = 1e-9  # relative, in float64
DAMPING = 1e-12
DAMPED = 1e-5  # ten times the root of the damping, which is what each factor gets


def regression():
    """Least squares with a bias: one dense layer, whose Fisher block is exactly A ⊗ I."""
    rng = np.random.default_rng(0)
    inputs, targets = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.normal(size=(16, 2)))
    objective = optax_curv.Objective(lambda p, x: x @ p["w"] + p["b"], "normal")
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.zeros(2)}
    return objective, params, inputs, targets


def step_of(tx, objective, layers, **capture):
    measure = optax_curv.value_grad_and_curvature(objective, layers=layers, **capture)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, inputs, targets):
        basis = (
            {"basis": optax_curv.eigenbasis(state)}
            if capture.get("statistic") == "eigenbasis"
            else {}
        )
        value, grads, curvature = measure(params, inputs, targets, **basis)
        extra = {
            "curvature": curvature,
            "objective": objective,
            "batch": (inputs, targets),
            "value": value,
        }
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def solution(inputs, targets):
    with_one = np.concatenate([inputs, np.ones((len(inputs), 1))], 1)
    return np.linalg.lstsq(with_one, targets, rcond=None)[0]


def test_the_adaptive_mode_solves_least_squares_in_one_step_with_donated_state(x64):
    objective, params, inputs, targets = regression()
    layers = optax_curv.find_layers(objective, params, inputs, targets)
    tx = optax_curv.kfac(None, layers, DAMPING)
    step = step_of(tx, objective, layers, fisher="exact")
    params, state = step(params, tx.init(params), inputs, targets)
    expected = solution(inputs, targets)
    np.testing.assert_allclose(params["w"], expected[:3], rtol=0, atol=DAMPED)
    np.testing.assert_allclose(params["b"], expected[3], rtol=0, atol=DAMPED)
    params, state = step(params, state, inputs, targets)  # the donated state is as good as another
    np.testing.assert_allclose(params["b"], expected[3], rtol=0, atol=EXACT)
    assert step._cache_size() == 1
    assert "input_condition" in optax_curv.layer_diagnostics(state)


def test_ekfac_solves_least_squares_with_a_learning_rate_of_one(x64):
    objective, params, inputs, targets = regression()
    layers = optax_curv.find_layers(objective, params, inputs, targets)
    tx = optax_curv.ekfac(1.0, layers, 0.0, momentum=0.0, kl_clip=None)
    step = step_of(tx, objective, layers, fisher="exact", statistic="eigenbasis")
    params, state = step(params, tx.init(params), inputs, targets)
    np.testing.assert_allclose(params["w"], solution(inputs, targets)[:3], rtol=0, atol=EXACT)
    step(params, state, inputs, targets)
    assert step._cache_size() == 1


def test_the_adaptive_mode_damps_its_preconditioner_by_a_part_of_the_models_damping(x64):
    objective, params, inputs, targets = regression()
    layers = optax_curv.find_layers(objective, params, inputs, targets)
    value, grads, curvature = optax_curv.value_grad_and_curvature(objective, layers=layers)(
        params, inputs, targets
    )
    pieces = optax_curv.scale_by_kfac(layers, 0.03 * 0.2), optax_curv.scale_by_quadratic_model(0.2)
    chain = optax.chain(*pieces, optax.scale_by_learning_rate(1.0))
    extra = {
        "curvature": curvature,
        "objective": objective,
        "batch": (inputs, targets),
        "value": value,
    }
    expected, _ = chain.update(grads, chain.init(params), params, **extra)
    tx = optax_curv.kfac(None, layers, 0.2)
    updates, _ = tx.update(grads, tx.init(params), params, **extra)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)  # the damping of the state is float32


def test_the_adaptive_mode_refuses_what_its_model_would_not_see():
    objective, params, inputs, targets = regression()
    layers = optax_curv.find_layers(objective, params, inputs, targets)
    with pytest.raises(
        ValueError, match=r"expected no weight decay with learning_rate=None.*regularizer="
    ):
        optax_curv.kfac(None, layers, weight_decay=0.1)
    tx = optax_curv.kfac(None, layers)
    _, grads, curvature = optax_curv.value_grad_and_curvature(objective)(params, inputs, targets)
    with pytest.raises(ValueError, match="objective="):
        tx.update(grads, tx.init(params), params, curvature=curvature)
