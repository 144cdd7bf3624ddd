"""The digits autoencoder, 64-256-128-32-8-32-128-256-64."""

import functools

import jax
import jax.numpy as jnp

import optax_curv
from benchmarks.problems import Problem
from benchmarks.problems.dense import epochs, init_dense, predict_dense

WIDTHS, CODE = (64, 256, 128, 32, 8, 32, 128, 256, 64), 3


def problem() -> Problem:
    from sklearn.datasets import load_digits

    images = jnp.asarray(load_digits().data / 16, jnp.float32)
    predict = functools.partial(predict_dense, linear=(CODE,))
    loss = optax_curv.Objective(predict, "bernoulli")

    def squared_error(params):
        return jnp.mean(jnp.sum((jax.nn.sigmoid(predict(params, images)) - images) ** 2, -1))

    return Problem(
        definition="1797 digits, autoencoder 64-256-128-32-8-32-128-256-64 (tanh, linear code), "
        "sigmoid cross-entropy "
        "summed over pixels and averaged over cases, batch 512",
        init=lambda seed: init_dense(seed, WIDTHS),
        loss=loss,
        batches=lambda seed, steps: epochs((images, images), 512, seed, steps),
        metrics={
            "training loss": lambda params: loss(params, images, images),
            "squared error": squared_error,
        },
        steps=400,
        evaluate_every=5,
        objective=loss,
    )
