"""Problems of the demo: digits that are drawn again or told apart, and an equation."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optax_curv

SHOWN = 12  # digits in the picture
STEPS = {"autoencoder": 400, "classify": 300, "poisson": 2000}


class Problem(NamedTuple):
    """A network and what it is to learn.

    Attributes:
      name: of the option `--problem`.
      measure: the name of the error, with its unit.
      loss: (params, *batch) -> the mean loss of a batch.
      params: the first ones.
      data: arrays of examples, which batches are drawn from.
      batch_size: of these; None: every batch is all of them.
      error: params -> the error on what no method has seen.
      picture: params -> what the network does, an image [height, width].
      truth: the image that is right, or None where it is blank.
      caption: of the images.
      residuals: functions (params, points) -> residuals, one for each array of the data, where the
        loss is made of these.
    """

    name: str
    measure: str
    loss: Any
    params: Any
    data: tuple[jax.Array, ...]
    batch_size: int | None
    error: Callable
    picture: Callable
    truth: np.ndarray | None
    caption: str
    residuals: tuple[Callable, ...] = ()


def _network(seed: int, *widths: int, linear: int | None = None) -> tuple[Callable, Any]:
    """(function of parameters and inputs, parameters) of tanh layers; one may be linear."""
    from flax import nnx

    rngs, parts = nnx.Rngs(seed), []
    for i, (m, n) in enumerate(itertools.pairwise(widths)):
        parts.append(nnx.Linear(m, n, rngs=rngs, param_dtype=jnp.result_type(float)))
        parts += [] if i in (linear, len(widths) - 2) else [jnp.tanh]
    graph, params = nnx.split(nnx.Sequential(*parts))
    return lambda params, x: nnx.merge(graph, params)(x), params


def _digits(seed: int) -> tuple[jax.Array, ...]:
    """(images, held-out images, labels, held-out labels): a quarter of 1797 is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype("float32") / 16, labels.astype("int32")
    return tuple(
        map(jnp.asarray, train_test_split(images, labels, random_state=seed, stratify=labels))
    )


def _strip(images: jax.Array) -> np.ndarray:
    """Digits [n, 64] side by side, with a blank column between."""
    squares = np.pad(np.asarray(images).reshape(-1, 8, 8), ((0, 0), (0, 0), (1, 1)))
    return np.concatenate(squares, axis=1)


def autoencoder(seed: int) -> Problem:
    """Eight numbers for each digit, from which it is drawn again."""
    images, unseen, *_ = _digits(seed)
    predict, params = _network(seed, 64, 128, 32, 8, 32, 128, 64, linear=2)

    def drawn(params, images):
        return jax.nn.sigmoid(predict(params, images))

    return Problem(
        "autoencoder",
        "squared error of a held-out digit",
        optax_curv.Objective(predict, "bernoulli"),
        params,
        (images, images),
        256,
        lambda params: jnp.mean(jnp.sum(jnp.square(drawn(params, unseen) - unseen), -1)),
        lambda params: _strip(drawn(params, unseen[:SHOWN])),
        _strip(unseen[:SHOWN]),
        "Held-out digits and what each network draws of them",
    )


def classify(seed: int) -> Problem:
    """Which digit it is."""
    images, unseen, labels, unseen_labels = _digits(seed)
    predict, params = _network(seed, 64, 64, 64, 10)

    def wrong(params):
        shares = jax.nn.softmax(predict(params, unseen))
        found = np.zeros((10, 10))
        np.add.at(found, np.asarray(unseen_labels), np.asarray(shares))
        return found * (1 - np.eye(10))

    loss = optax_curv.Objective(predict, "categorical")
    return Problem(
        "classify",
        "cross-entropy of held-out digits",
        loss,
        params,
        (images, labels),
        128,
        lambda params: loss(params, unseen, unseen_labels),
        wrong,
        None,
        "Probability given to wrong digits, by the right one (down) and the wrong one (across)",
    )


def poisson(seed: int) -> Problem:
    """-Δu = f on the unit square, zero at its border, by the equation alone and in float64."""
    network, params = _network(seed, 2, 16, 16, 1)
    rng = np.random.default_rng(seed)
    inside, side = rng.uniform(size=(400, 2)), np.linspace(0, 1, 40)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    border = grid[np.any((grid == 0) | (grid == 1), 1)]

    def u(params, x):
        return network(params, x)[0]

    def right(x):
        return jnp.prod(jnp.sin(jnp.pi * x), -1)

    def of_point(params, x):
        laplacian = jnp.trace(jax.hessian(functools.partial(u, params))(x))
        return laplacian + 2 * jnp.pi**2 * right(x)

    def equation(params, points):
        return jax.vmap(functools.partial(of_point, params))(points)

    def boundary(params, points):
        return 10 * network(params, points)[:, 0]

    def difference(params):
        return network(params, grid)[:, 0] - right(grid)

    def loss(params, points, border):
        parts = equation(params, points), boundary(params, border)
        return sum(0.5 * jnp.mean(jnp.square(r)) for r in parts)

    return Problem(
        "poisson",
        "relative error of the solution",
        loss,
        params,
        (jnp.asarray(inside), jnp.asarray(border)),
        None,
        lambda params: jnp.linalg.norm(difference(params)) / jnp.linalg.norm(right(grid)),
        lambda params: np.abs(np.asarray(difference(params))).reshape(40, 40),
        None,
        "Distance to the exact solution on the unit square",
        (equation, boundary),
    )


PROBLEMS = {"autoencoder": autoencoder, "classify": classify, "poisson": poisson}
