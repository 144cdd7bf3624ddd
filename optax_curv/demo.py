"""Trains a Flax network on handwritten digits with each method: ``python -m optax_curv.demo``.

The digits are scikit-learn's. Every method starts from the same weights, sees the same batches and
lets its learning rate fall to zero along a cosine. The network has two hidden layers of 64 tanh
units; a quarter of the 1797 images is held out.

Learning rates, and the dampings of kfac (0.01 or 0.1) and branch_fisher (0.1 or 1), are those with
the lowest training loss after 300 steps from seed 100, on one grid for all of 1, 3, 10, 30, …; seed
0, the default, had no say.
"""

import argparse
import io
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv

BATCH_SIZE = 128
WIDTHS = (64, 64, 64, 10)
EVALUATIONS = 20


class Problem(NamedTuple):
    """The network, the loss and the images that all methods share."""

    predict: Callable  # (params, images [N, 64]) -> logits [N, 10]
    loss: Callable  # (params, images, labels) -> mean loss []
    params: Any
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


class Run(NamedTuple):
    """The training of one method, and how good its network is in the end."""

    method: str
    losses: np.ndarray  # [steps], of each batch before the step
    loss: float
    accuracy: float
    seconds: float


# A method is an optimizer and (params, images, labels) -> (loss, gradients, extra arguments of its
# update).


def _gradients(loss: Callable) -> Callable:
    return lambda *args: (*jax.value_and_grad(loss)(*args), {})


def _of_gradients(alias: Callable) -> Callable:
    return lambda problem, learning_rate: (alias(learning_rate), _gradients(problem.loss))


def _kfac(problem: Problem, learning_rate: optax.Schedule):
    layers = optax_curv.find_layers(
        problem.loss, problem.params, *(x[:BATCH_SIZE] for x in problem.train)
    )
    measure = optax_curv.value_grad_and_curvature(problem.loss, layers=layers, statistic="rows")

    def measured(*args):
        value, grads, curvature = measure(*args)
        return value, grads, {"curvature": curvature}

    return optax_curv.kfac(learning_rate, layers, damping=0.1), measured


def _branch_fisher(problem: Problem, learning_rate: optax.Schedule):
    """The branches are the logits of the batch, the projection is the Jacobian of their mean."""

    def measured(params, images, labels):
        value, grads, _ = _gradients(problem.loss)(params, images, labels)
        jacobian = jax.jacrev(lambda params: problem.predict(params, images).mean(0))(params)
        projection = jax.tree.map(lambda rows: jnp.moveaxis(rows, 0, -1), jacobian)
        return value, grads, {"branches": problem.predict(params, images), "projection": projection}

    fisher = optax_curv.scale_by_branch_fisher(1.0)
    return optax.chain(
        fisher, optax.trace(0.9), optax.scale_by_learning_rate(learning_rate)
    ), measured


METHODS = {  # and the first learning rates
    "adam": (_of_gradients(optax.adam), 0.03),
    "muon": (_of_gradients(optax.contrib.muon), 0.03),
    "kron_psgd": (_of_gradients(optax_curv.kron_psgd), 0.01),
    "kfac": (_kfac, 0.3),
    "branch_fisher": (_branch_fisher, 1.0),
}


def _problem(seed: int) -> Problem:
    from flax import nnx
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    rngs = nnx.Rngs(seed)
    stack = [
        part
        for widths in itertools.pairwise(WIDTHS)
        for part in (nnx.Linear(*widths, rngs=rngs), jnp.tanh)
    ]
    graph, params = nnx.split(nnx.Sequential(*stack[:-1]))

    def predict(params, images):
        return nnx.merge(graph, params)(images)

    def loss(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(
            predict(params, images), labels
        ).mean()

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.astype("float32") / 16, labels.astype("int32"), random_state=seed, stratify=labels
    )
    images, test_images, labels, test_labels = map(jnp.asarray, parts)
    return Problem(predict, loss, params, (images, labels), (test_images, test_labels))


def _train(name: str, problem: Problem, steps: int, seed: int) -> Run:
    from tqdm import tqdm

    start = time.perf_counter()
    build, learning_rate = METHODS[name]
    optimizer, measure = build(problem, optax.cosine_decay_schedule(learning_rate, steps))
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params, state, batch):
        value, grads, extra_args = measure(params, *(x[batch] for x in problem.train))
        updates, state = optimizer.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def evaluate(params):
        images, labels = problem.test
        return problem.loss(params, *problem.train), jnp.mean(
            problem.predict(params, images).argmax(-1) == labels
        )

    params, state, losses = problem.params, optimizer.init(problem.params), []
    with tqdm(_batches(len(problem.train[0]), steps, seed), desc=f"{name:13}", ncols=100) as bar:
        for batch in bar:
            params, state, value = step(params, state, batch)
            losses.append(value)
            if len(losses) % max(1, steps // EVALUATIONS) == 0:
                bar.set_postfix_str(
                    "loss {:.4f}, test accuracy {:.2%}".format(*map(float, evaluate(params)))
                )
    loss, accuracy = map(float, evaluate(params))
    return Run(name, np.asarray(losses), loss, accuracy, time.perf_counter() - start)


def _batches(examples: int, steps: int, seed: int) -> np.ndarray:
    """Indices [steps, batch], drawn without replacement in an epoch."""
    rng = np.random.default_rng(seed)
    whole = examples // BATCH_SIZE * BATCH_SIZE
    epochs = [rng.permutation(examples)[:whole] for _ in range(-(-steps * BATCH_SIZE // whole))]
    return np.concatenate(epochs).reshape(-1, BATCH_SIZE)[:steps]


def _table(runs: list[Run], steps: int) -> str:
    header = f"{'method':13}  {'steps':>6}  {'loss':>9}  {'test accuracy':>13}  {'seconds':>7}"
    rows = (
        f"{r.method:13}  {steps:6}  {r.loss:9.5f}  {r.accuracy:13.2%}  {r.seconds:7.1f}"
        for r in runs
    )
    footer = "loss: over the training images, after the last step; seconds: compilation included"
    return "\n".join((header, *rows, footer))


def _plot(runs: list[Run], out: pathlib.Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, window = figure.add_subplot(), min(10, len(runs[0].losses))
    for run in runs:
        smooth = np.convolve(run.losses, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(window, len(run.losses) + 1), smooth, label=run.method)
    label = f"loss of a batch (mean over {window})"
    axes.set(xlabel="step", ylabel=label, yscale="log", title="Digits: cross-entropy in training")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    _replace(out, picture.getvalue())


def _replace(out: pathlib.Path, content: bytes):
    """Writes a file whole or, where that fails, leaves the older one as it is."""
    if out.exists() and not out.is_file():  # a pipe or a device
        out.write_bytes(content)
        return
    target = out.resolve()
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _whole(numbers: range, named: str) -> Callable[[str], int]:
    def parse(text):
        if not text.isdecimal() or int(text) not in numbers:
            raise argparse.ArgumentTypeError(f"expected a whole number {named}, got {text!r}")
        return int(text)

    return parse


def _writable(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from error
    if not existed:
        path.unlink()
    return path


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains, prints the table and writes the plot."""
    parser = _Parser(
        prog="python -m optax_curv.demo",
        description="Trains a Flax network on handwritten digits, once a method.",
    )
    steps, seeds = (
        _whole(range(1, sys.maxsize), "above zero"),
        _whole(range(2**32), "from 0 to 2**32 - 1"),
    )
    parser.add_argument(
        "--method",
        nargs="+",
        action="extend",
        choices=METHODS,
        help="which to train (default: all)",
    )
    parser.add_argument(
        "--steps", type=steps, default=300, help="training steps of each method (default: 300)"
    )
    parser.add_argument(
        "--seed", type=seeds, default=0, help="of weights, batches and held-out images (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=_writable,
        default="optax_curv_demo.png",
        help="the plot (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401

        problem = _problem(options.seed)
    except ImportError as error:
        parser.error(f"{error}; install what the demo needs: pip install 'optax-curv[demo]'")
    names, runs = list(dict.fromkeys(options.method or METHODS)), []
    try:
        for name in names:
            runs.append(_train(name, problem, options.steps, options.seed))
    except KeyboardInterrupt:
        if runs:
            print(_table(runs, options.steps))
        parser.exit(130, f"interrupted: {len(runs)} of {len(names)} methods have finished\n")
    print(_table(runs, options.steps))
    try:
        _plot(runs, options.out)
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: cannot write {options.out}: {error.strerror}\n")
    print(f"loss curves: {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
