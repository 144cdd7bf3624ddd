"""Whole batches beside the micro-batches that `optax.MultiSteps` joins."""

import jax
import jax.numpy as jnp
import optax

import optax_curv

PARAMS = {"w": jnp.ones((3, 4)) / 3, "b": jnp.zeros(4), "v": jnp.arange(8.0).reshape(4, 2) / 8}


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]) ** 2)


def draw():
    """Parameters, and two batches of twelve."""
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    return params, jax.random.normal(jax.random.key(0), (2, 12, 3))


def updates_of(tx, take, params, batches):
    """The updates of batches [N, n, ...] whole and in thirds, and the last averaged curvature."""
    state, whole, in_thirds = tx.init(params), [], []
    for x in batches:
        _, grads, curvature = take(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        whole.append(updates)
    many = optax.MultiSteps(tx, every_k_schedule=3)
    step = jax.jit(lambda grads, state, mean: many.update(grads, state, params, curvature=mean))
    state = many.init(params)
    # What stood there before must not matter to the first of three.
    mean = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan if x.dtype == float else 0), curvature)
    for i, x in enumerate(batches.reshape(3 * len(batches), -1, *batches.shape[2:])):
        _, grads, curvature = take(params, x)
        mean = optax_curv.average_curvature(mean, curvature, state.mini_step)
        updates, state = step(grads, state, mean)
        in_thirds += [updates] if i % 3 == 2 else []
    return whole, in_thirds, mean
