"""Fully connected networks in plain JAX, and batches of examples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def init_dense(seed: int, widths, dtype=jnp.float32):
    """Kernels N(0, 2 / (in + out)) and zero biases, a list of layers."""
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    return [
        {
            "w": jax.random.normal(key, shape, dtype) * np.sqrt(2 / sum(shape)),
            "b": jnp.zeros(shape[1], dtype),
        }
        for key, shape in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def predict_dense(params, x, linear=()):
    """Tanh after every layer but the last and those counted in `linear`."""
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        x = x if i in (*linear, len(params) - 1) else jnp.tanh(x)
    return x


def epochs(arrays, batch_size: int, seed: int, steps: int):
    """Batches without replacement inside an epoch; its last, shorter one is left out."""
    rng = np.random.default_rng(seed)
    examples, order = len(arrays[0]), np.array([], int)
    for _ in range(steps):
        if len(order) < batch_size:
            order = rng.permutation(examples)
        rows, order = order[:batch_size], order[batch_size:]
        yield tuple(x[rows] for x in arrays)
