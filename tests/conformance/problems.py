"""What methods are tried on: parameters, layers, an objective, and extra arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import optax_curv

SHAPES = {"w": (4, 2), "b": (2,), "scalar": (), "tensor": (1, 2, 1, 3, 2)}
OTHER_SHAPES = {"w": (3, 5), "b": (5,), "more": (5, 3)}


class Problem(NamedTuple):
    """Parameters, and what a method may be told about them.

    Attributes:
      tree: (seed, dtype) -> parameters or gradients.
      layers: the one dense layer in them, 4 inputs and 2 outputs.
      objective: of that layer.
    """

    tree: Callable[..., Any]
    layers: optax_curv.Layers
    objective: optax_curv.Objective


def _layers(kernel: str, bias: str) -> optax_curv.Layers:
    return optax_curv.Layers(
        [optax_curv.Layer("dense", "dense", kernel, bias, in_dim=4, out_dim=2)]
    )


def tree(seed, dtype="float32", shapes=SHAPES):
    """Parameters or gradients of every rank, with a leaf that is None."""
    rng = np.random.default_rng(seed)
    leaves = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return leaves | {"none": None}


TREE = Problem(
    tree,
    _layers("['w']", "['b']"),
    optax_curv.Objective(lambda params, inputs: inputs @ params["w"] + params["b"], "normal"),
)


def model(seed=0):
    """The module of Flax NNX whose parameters are those of `NNX`."""
    return nnx.Linear(4, 2, rngs=nnx.Rngs(seed))


NNX = Problem(
    lambda seed, dtype="float32": nnx.state(model(seed), nnx.Param),
    _layers("['kernel']", "['bias']"),
    optax_curv.Objective(
        lambda params, inputs: inputs @ params["kernel"][...] + params["bias"][...], "normal"
    ),
)


def array(rng, *shape):
    """Normal numbers."""
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Extra arguments of `update`: (numpy generator, number of examples) -> arrays by name.


def nothing(rng, rows=0):
    """What a method of gradients alone needs."""
    del rng, rows
    return {}


def samples(rng, rows=5):
    """Branches that are samples of a state of three numbers."""
    return {"branches": array(rng, rows, 3)}


def parameter_rows(rng, rows=5):
    """Branches in parameter space."""
    leaves = {name: array(rng, rows, *shape) for name, shape in SHAPES.items()}
    return {"branches": leaves | {"none": None}}


def factors(rng, rows=8):
    """The dense layer's Kronecker factors, of so many examples."""
    inputs, grads = array(rng, rows, 5), array(rng, rows, 2)
    found = inputs.T @ inputs / rows, grads.T @ grads / rows, jnp.int32(1)
    return {"curvature": {"dense": optax_curv.KroneckerFactors(*found)}}


def inputs(rng, rows=8):
    """The dense layer's inputs, of so many examples."""
    found = optax_curv.InputRows(array(rng, rows, 5), jnp.float32(1 / rows))
    return {"curvature": {"dense": found}}


def factor_rows(rng, rows=8):
    """The rows that the layer's factors are made of."""
    found = array(rng, rows, 5), array(rng, rows, 2), jnp.full(2, 1 / rows)
    return {"curvature": {"dense": optax_curv.FactorRows(*found)}}


def moments(rng, rows=8):
    """The layer's factors and its second moments in their basis."""
    of_layer = factors(rng, rows)["curvature"]["dense"]
    squares = jnp.square(array(rng, 5, 2))
    return {"curvature": {"dense": optax_curv.EigenbasisMoments(*of_layer, squares)}}


def batch(rng, rows=6):
    """A batch of the objective, and a loss above any that a step leads to: no step is refused."""
    return {"batch": (array(rng, rows, 4), array(rng, rows, 2)), "value": jnp.float32(1e4)}


def batch_and_factors(rng, rows=6):
    """A batch of the objective, its loss and the layer's factors."""
    return batch(rng, rows) | factors(rng, rows)


def probes(rng, rows=0):
    """A Hessian probe and its product."""
    del rows
    trees = [
        {name: array(rng, *shape) for name, shape in SHAPES.items()} | {"none": None}
        for _ in range(2)
    ]
    return dict(zip(("probe", "hvp"), trees, strict=True))
