"""The methods of the demo, and their training."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optax_curv
from optax_curv.demo.problems import PROBLEMS, Problem

EVALUATIONS = 50  # of the error, in the training of each method


class Run(NamedTuple):
    """The training of one method, as it was at the start and at each evaluation.

    Attributes:
      method: its name.
      compile_seconds: of its step.
      steps: how many were done.
      seconds: for these, without compilation and evaluation.
      errors: on what was not trained on.
      params: of the network.
    """

    method: str
    compile_seconds: float
    steps: np.ndarray
    seconds: np.ndarray
    errors: np.ndarray
    params: list[Any]


class Method(NamedTuple):
    """How a method trains on a problem.

    Attributes:
      build: (problem, schedule) -> the optimizer and a function (params, batch, key) -> (loss,
        gradients, extra arguments of its update).
      rates: the first learning rate, by problem, None where it has none; without an entry it does
        not run there.
      share: of the steps that it gets, where each costs far more than the others'.
    """

    build: Callable
    rates: dict[str, float | None]
    share: float = 1.0


def _of_gradients(alias: Callable, *rates: float) -> Method:
    def build(problem, schedule):
        def measured(params, batch, key):
            del key
            return *jax.value_and_grad(problem.loss)(params, *batch), {}

        return alias(schedule), measured

    return Method(build, dict(zip(PROBLEMS, rates, strict=True)))


def _kfac(problem: Problem, schedule: Any):
    del schedule  # its steps, momentum and damping come from the quadratic model
    objective, batch = problem.loss, tuple(x[: problem.batch_size] for x in problem.data)
    layers = optax_curv.find_layers(objective, problem.params, *batch)
    capture = optax_curv.value_grad_and_curvature(
        objective, layers=layers, statistic="rows", fisher="sampled"
    )

    def measured(params, batch, key):
        value, grads, curvature = capture(params, *batch, key=key)
        extra = {"curvature": curvature, "objective": objective, "batch": batch, "value": value}
        return value, grads, extra

    return optax_curv.kfac(None, layers), measured


def _levenberg_marquardt(problem: Problem, schedule: Any):
    del schedule
    rows_of = optax_curv.residual_rows(*problem.residuals)

    def measured(params, batch, key):
        del key
        value, grads, rows = rows_of(params, *batch)
        value_fn = lambda params: problem.loss(params, *batch)  # noqa: E731
        return value, grads, {"branches": rows, "value": value, "value_fn": value_fn}

    return optax_curv.levenberg_marquardt(), measured


METHODS = {  # rates in the order of PROBLEMS
    "adam": _of_gradients(optax.adam, 0.01, 0.01, 0.02),
    "muon": _of_gradients(
        functools.partial(optax.contrib.muon, consistent_rms=0.2), 0.02, 0.01, 0.02
    ),
    "shampoo": _of_gradients(optax_curv.shampoo, 0.02, 0.02, 0.01),
    "kron_psgd": _of_gradients(optax_curv.kron_psgd, 0.02, 0.005, 0.005),
    "kfac(None)": Method(_kfac, {"autoencoder": None, "classify": None}),
    "levenberg_marquardt": Method(_levenberg_marquardt, {"poisson": None}, 1 / 20),
}


def order_of(problem: Problem, steps: int, seed: int) -> np.ndarray:
    """Indices [steps, batch], drawn without replacement in an epoch."""
    if problem.batch_size is None:
        return np.zeros((steps, 0), int)
    rng, examples = np.random.default_rng(seed), len(problem.data[0])
    whole = examples // problem.batch_size * problem.batch_size
    epochs = -(-steps * problem.batch_size // whole)
    drawn = [rng.permutation(examples)[:whole] for _ in range(epochs)]
    return np.concatenate(drawn).reshape(-1, problem.batch_size)[:steps]


def train(name: str, problem: Problem, steps: int, seed: int, rate: float | None) -> Run:
    """Compiles and trains with a method, and looks at the error from time to time."""
    from tqdm import tqdm

    method = METHODS[name]
    steps = max(1, round(steps * method.share))
    optimizer, measured = method.build(problem, rate and optax.cosine_decay_schedule(rate, steps))
    optimizer, error = optax.with_extra_args_support(optimizer), jax.jit(problem.error)

    def step(params, state, indices, count):
        batch = problem.data
        if problem.batch_size is not None:
            batch = tuple(x[indices] for x in batch)
        key = jax.random.fold_in(jax.random.key(seed), count)
        _, grads, extra_args = measured(params, batch, key)
        updates, state = optimizer.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    order, params = order_of(problem, steps, seed), problem.params
    with tqdm(total=steps, desc=f"{name:19} compiling", ncols=100) as bar:
        bar.refresh()
        start = time.perf_counter()
        state = jax.jit(optimizer.init)(params)
        step = jax.jit(step).lower(params, state, order[0], 0).compile()
        compile_seconds = time.perf_counter() - start
        jax.block_until_ready(step(params, state, order[0], 0))  # the first one takes longer
        seen = [(0, 0.0, float(error(params)), params)]
        bar.set_description_str(f"{name:19}          ")
        bar.reset()
        for part in np.array_split(np.arange(steps), min(EVALUATIONS, steps)):
            start = time.perf_counter()
            for i in part:
                params, state = step(params, state, order[i], int(i))
                bar.update()
            jax.block_until_ready(params)
            seconds = seen[-1][1] + time.perf_counter() - start
            seen.append((part[-1] + 1, seconds, float(error(params)), params))
            bar.set_postfix_str(f"error {seen[-1][2]:.3g}")
    done, seconds, errors = (np.array([x[i] for x in seen]) for i in range(3))
    return Run(name, compile_seconds, done, seconds, errors, [x[3] for x in seen])
