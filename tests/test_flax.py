"""Flax linen, Orbax checkpoints and Equinox models, with the methods that take more than
gradients."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_curv
from optax_curv.flax import TrainState

MODEL = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
RNG = np.random.default_rng(0)
BATCHES = [
    tuple(jnp.asarray(RNG.normal(size=(8, width)), jnp.float32) for width in (3, 2))
    for _ in range(4)
]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the same sums in another order, in float32


def loss_fn(params, inputs, targets):
    return jnp.mean(jnp.square(MODEL.apply(params, inputs) - targets))


PARAMS = MODEL.init(jax.random.key(0), BATCHES[0][0])
LAYERS = optax_curv.find_layers(loss_fn, PARAMS, *BATCHES[0])
METHODS = {
    "kfac": lambda: optax_curv.kfac(0.1, LAYERS, invert_every=3),
    "kron_psgd": lambda: optax_curv.kron_psgd(0.1, update_probability=0.5),
    "branch_fisher": lambda: optax_curv.branch_fisher(0.1, complement=True),
}


@functools.cache
def compiled(method):
    def step(state, inputs, targets):
        _, grads, curvature = optax_curv.value_grad_and_curvature(loss_fn, layers=LAYERS)(
            state.params, inputs, targets
        )
        return state.apply_gradients(grads=grads, curvature=curvature, branches=inputs)

    return TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=METHODS[method]()), jax.jit(
        step
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_restored_by_orbax_continues_bit_for_bit(method, tmp_path):
    state, step = compiled(method)
    for batch in BATCHES[:2]:
        state = step(state, *batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    for batch in BATCHES[2:]:
        state, restored = step(state, *batch), step(restored, *batch)
    chex.assert_trees_all_equal(restored, state)


def test_a_train_state_hands_extra_arguments_on_and_replaces_its_fields():
    class WithStatistics(TrainState):
        statistics: jax.Array

    state = WithStatistics.create(
        apply_fn=MODEL.apply, params=PARAMS, tx=METHODS["kfac"](), statistics=jnp.zeros(())
    )
    _, grads, curvature = optax_curv.value_grad_and_curvature(loss_fn, layers=LAYERS)(
        PARAMS, *BATCHES[0]
    )
    new = state.apply_gradients(grads=grads, statistics=jnp.ones(()), curvature=curvature)
    updates, _ = state.tx.update(grads, state.opt_state, PARAMS, curvature=curvature)
    chex.assert_trees_all_equal(new.params, optax.apply_updates(PARAMS, updates))
    assert new.statistics == 1 and new.step == 1 and new.tx is state.tx
    with pytest.raises(ValueError, match="curvature= is missing"):
        state.apply_gradients(grads=grads)


def test_a_train_state_takes_optimizers_without_extra_arguments():
    state = TrainState.create(
        apply_fn=MODEL.apply, params=PARAMS, tx=optax.GradientTransformation(*optax.sgd(0.1))
    )
    new = state.apply_gradients(grads=PARAMS, curvature=None)
    chex.assert_trees_all_close(new.params, jax.tree.map(lambda p: 0.9 * p, PARAMS), **CLOSE)


@pytest.mark.parametrize("method", [optax_curv.scale_by_kfac, optax_curv.scale_by_kron_psgd])
def test_an_equinox_model_is_a_tree_like_any_other(method):
    inputs, targets = BATCHES[0]
    params, static = eqx.partition(
        eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array
    )

    def of_model(params, inputs, targets):
        return jnp.mean(jnp.square(jax.vmap(eqx.combine(params, static))(inputs) - targets))

    def of_dict(params, inputs, targets):
        hidden = jax.nn.relu(inputs @ params["w0"].T + params["b0"])
        return jnp.mean(jnp.square(hidden @ params["w1"].T + params["b1"] - targets))

    as_dict = dict(zip(("w0", "b0", "w1", "b1"), jax.tree.leaves(params), strict=True))
    updates = []
    for loss, tree in ((of_model, params), (of_dict, dict(sorted(as_dict.items())))):
        layers = optax_curv.find_layers(loss, tree, inputs, targets)
        _, grads, curvature = optax_curv.value_grad_and_curvature(loss, layers=layers)(
            tree, inputs, targets
        )
        tx = (
            method(layers)
            if method is optax_curv.scale_by_kfac
            else method(init_scale=1.0, damping=0.0)
        )
        new, _ = jax.jit(tx.update)(grads, tx.init(tree), tree, curvature=curvature)
        updates.append(new)
    model, plain = updates
    found = [model.layers[i] for i in (0, 1)]
    assert jax.tree.structure(model) == jax.tree.structure(params)
    for i, layer in enumerate(found):
        chex.assert_trees_all_close(
            [layer.weight, layer.bias], [plain[f"w{i}"], plain[f"b{i}"]], rtol=1e-3, atol=1e-4
        )
