"""One small noisy regression, on which faults strike: parameters, gradients and extra arguments."""

import jax
import jax.numpy as jnp
import numpy as np
from conformance import problems

import optax_curv

RNG = np.random.default_rng(7)
INPUTS = jnp.asarray(RNG.normal(size=(64, 4)), jnp.float32)
TARGETS = jnp.asarray(INPUTS @ RNG.normal(size=(4, 2)) + RNG.normal(size=(64, 2)), jnp.float32)
GOALS = jax.tree.map(lambda x: 0.3 * x, problems.tree(5))
WIDENING = jnp.asarray(RNG.normal(size=(4, 24)) / 2, jnp.float32)
START = jax.tree.map(jnp.zeros_like, problems.tree(0))
OTHERS = ("scalar", "tensor")


def per_example(params, x, y):
    """Squared errors of a linear layer, and a bowl for the leaves that no layer covers."""
    others = [jnp.sum(jnp.square(params[name] - GOALS[name])) for name in OTHERS]
    return 0.5 * jnp.sum(jnp.square(x @ params["w"] + params["b"] - y)) + 0.5 * sum(others)


def loss_fn(params, x, y):
    return jnp.mean(jax.vmap(per_example, (None, 0, 0))(params, x, y))


OBJECTIVE = optax_curv.Objective(
    lambda params, x: x @ params["w"] + params["b"],
    "normal",
    regularizer=lambda params: (
        0.5 * sum(jnp.sum(jnp.square(params[name] - GOALS[name])) for name in OTHERS)
    ),
)


# What `update` needs beside gradients: (parameters, inputs, targets, errors) -> arrays by name.


def nothing(*given):
    del given
    return {}


def with_ones(x):
    return jnp.concatenate([x, jnp.ones((64, 1))], axis=1)


def factors_of(params, x, y, errors):
    rows = with_ones(x)
    factors = rows.T @ rows / len(x), errors.T @ errors / len(x), jnp.int32(1)
    return {"curvature": {"dense": optax_curv.KroneckerFactors(*factors)}}


def inputs_of(params, x, y, errors):
    return {"curvature": {"dense": optax_curv.InputRows(with_ones(x), jnp.float32(1 / len(x)))}}


def moments_of(params, x, y, errors):
    factors = factors_of(params, x, y, errors)["curvature"]["dense"]
    moments = jnp.square(with_ones(x)).T @ jnp.square(errors) / len(x)
    return {"curvature": {"dense": optax_curv.EigenbasisMoments(*factors, moments)}}


def layer_rows_of(params, x, y, errors):
    rows = with_ones(x), errors / len(x), jnp.array([1 / len(x), len(x)])
    return {"curvature": {"dense": optax_curv.FactorRows(*rows)}}


def rows_of(params, x, y, errors):
    return {"branches": jax.vmap(jax.grad(per_example), (None, 0, 0))(params, x, y)}


def samples_of(params, x, y, errors):
    return {"branches": x}


def features_of(params, x, y, errors):
    """A state as wide as the parameters, so that a method that moves only in its image recovers."""
    return {"branches": jnp.tanh(x @ WIDENING)}


def batch_of(params, x, y, errors):
    return {"batch": (x, y), "value": loss_fn(params, x, y)}


def batch_and_factors_of(*given):
    return batch_of(*given) | factors_of(*given)


def batch_and_diagonal_of(*given):
    squares = jax.tree.map(lambda g: jnp.mean(jnp.square(g), 0), rows_of(*given)["branches"])
    return batch_of(*given) | {"diagonal": squares}
