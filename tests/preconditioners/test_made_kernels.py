"""Directions of leaves that kernels are made of entry by entry: (C K C)⁻¹ ∇, and masks are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import normal
from jax.flatten_util import ravel_pytree

import optax_curv
from optax_curv import Objective, find_layers, value_grad_and_curvature
from optax_curv.testing import dense_gauss_newton

EXACT = 1e-8  # relative to the largest entry, float64, after a solve
N, D, O = 7, 4, 3
MASK = jnp.tril(jnp.ones((D, O)))
MAKING = {
    "softplus": jax.nn.softplus,
    "array": lambda w: w * jnp.linspace(0.3, 2.0, D * O).reshape(D, O),
    "cubic": lambda w: w + 0.1 * w**3,
}


def measured(predict, statistic="kronecker", **options):
    params = {"w": 0.5 * normal(1, D, O), "b": normal(2, O)}
    batch, objective = (normal(3, N, D), normal(4, N, O)), Objective(predict, "normal")
    layers = find_layers(objective, params, *batch)
    assert [(layer.paths, layer.made) for layer in layers] == [(("['w']", "['b']"), True)]
    measure = value_grad_and_curvature(
        objective, layers=layers, statistic=statistic, fisher="exact"
    )
    _, grads, curvature = measure(params, *batch, **options)
    return layers, objective, params, batch, grads, curvature


@pytest.mark.parametrize("statistic", ["kronecker", "rows"])
@pytest.mark.parametrize("making", MAKING)
def test_direction_is_that_of_the_dense_gauss_newton_block(x64, making, statistic):
    layers, objective, params, batch, grads, curvature = measured(
        lambda p, x: x @ MAKING[making](p["w"]) + p["b"], statistic
    )
    tx = optax_curv.scale_by_kfac(layers, damping=0.0)
    direction = tx.update(grads, tx.init(params), params, curvature=curvature)[0]
    right = jnp.linalg.solve(dense_gauss_newton(objective, params, *batch), ravel_pytree(grads)[0])
    np.testing.assert_allclose(
        ravel_pytree(direction)[0], right, rtol=0, atol=EXACT * float(jnp.abs(right).max())
    )


@pytest.mark.parametrize("method", ["scale_by_kfac", "scale_by_ekfac", "scale_by_adam_in_basis"])
def test_what_a_mask_hides_never_moves(method):
    statistic = "eigenbasis" if method == "scale_by_ekfac" else "kronecker"
    basis = {"w": (jnp.eye(D + 1), jnp.eye(O))} if statistic == "eigenbasis" else None
    options = {} if basis is None else {"basis": basis}
    layers, *_, params, _, grads, curvature = measured(
        lambda p, x: x @ jnp.where(MASK > 0, p["w"], 0) + p["b"], statistic, **options
    )
    tx = getattr(optax_curv, method)(layers)
    step = tx.update(grads, tx.init(params), params, curvature=curvature)[0]["w"]
    np.testing.assert_array_equal(jnp.where(MASK > 0, 0, step), 0)
    assert float(jnp.abs(step[0, 0])) > 0


def test_a_diagonal_of_the_fisher_is_that_of_the_leaf(x64):
    *_, objective, params, batch, _, curvature = measured(
        lambda p, x: x @ MAKING["cubic"](p["w"]) + p["b"], "diagonal"
    )
    dense = jnp.diagonal(dense_gauss_newton(objective, params, *batch))
    (diagonal,) = curvature.values()
    rows = jnp.concatenate([dense[O:].reshape(D, O), dense[:O][None]])
    np.testing.assert_allclose(diagonal, rows, rtol=EXACT)


def test_a_statistic_without_its_slope_is_refused():
    layers, *_, params, _, grads, curvature = measured(lambda p, x: x @ (p["w"] * MASK) + p["b"])
    tx = optax_curv.scale_by_kfac(layers)
    (name,) = curvature
    bare = {name: curvature[name].statistic}
    with pytest.raises(ValueError, match="has no slope, and its kernel is made of"):
        tx.update(grads, tx.init(params), params, curvature=bare)


def test_other_functions_of_one_leaf_or_at_every_step_are_no_layer():
    def twice(p, x):
        return jnp.mean(jnp.sin(x @ (p["w"] * MASK)) * (x @ p["w"]))

    def dropped(p, x):
        def step(h, mask):
            return jnp.tanh(h @ (p["u"] * mask)), None

        masks = jnp.stack([jnp.tril(jnp.ones((D, D))), jnp.ones((D, D))])
        return jnp.mean(jnp.square(jax.lax.scan(step, x, masks)[0]))

    x = jnp.ones((N, D))
    assert (
        "different functions" in find_layers(twice, {"w": jnp.ones((D, O))}, x).uncovered["['w']"]
    )
    assert "made of it" in find_layers(dropped, {"u": jnp.ones((D, D))}, x).uncovered["['u']"]
