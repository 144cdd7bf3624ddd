"""Compiling, training and timing: every method on the same weights and batches, in one interleaved
run."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.methods import Method
from benchmarks.problems import Problem


class Compiled(NamedTuple):
    """A method that is ready to run.

    Attributes:
      init: parameters -> state.
      step: (params, state, batch, settings) -> (params, state).
      settings: the values of its hyper-parameters.
      trace_seconds: processor time of tracing and lowering the step; None where the method compiles
        itself.
      compile_seconds: that of compiling it; both together where the method compiles itself.
      state_bytes: of the optimizer's state.
    """

    init: Callable
    step: Callable
    settings: dict[str, float]
    trace_seconds: float | None
    compile_seconds: float
    state_bytes: int


def numbers(settings: dict[str, float]) -> dict:
    return {
        name: np.asarray(value, jax.dtypes.canonicalize_dtype(float))
        for name, value in settings.items()
    }


def state_bytes(state) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes"))


def compile_method(method: Method, problem: Problem, settings: dict[str, float]) -> Compiled:
    """Traces and compiles the step apart, from empty caches, and runs it once."""
    batch, params, values = next(iter(problem.batches(0, 1))), problem.init(0), numbers(settings)
    if method.host:
        return _compile_by_running(method, batch, params, settings)
    jax.clear_caches()
    init = jax.jit(method.init).lower(params).compile()
    state = init(params)
    start = time.process_time()
    lowered = jax.jit(method.step).lower(params, state, batch, values)
    traced = time.process_time()
    step = lowered.compile()
    compiled = time.process_time()
    jax.block_until_ready(step(params, state, batch, values))
    return Compiled(init, step, settings, traced - start, compiled - traced, state_bytes(state))


def _compile_by_running(method, batch, params, settings, steps=6):
    """What the first steps take longer than the same steps again; six reach a change of damping."""
    seconds = []
    for _ in range(2):
        start, state, moved = time.process_time(), method.init(params), _copy(params)
        for _ in range(steps):
            moved, state = jax.block_until_ready(method.step(moved, state, batch, settings))
        seconds.append(time.process_time() - start)
    return Compiled(
        method.init, method.step, settings, None, seconds[0] - seconds[1], state_bytes(state)
    )


def _copy(tree):
    return jax.tree.map(lambda x: x.copy(), tree)


def evaluator(problem: Problem) -> Callable[[Any], dict[str, float]]:
    """All metrics of some parameters, compiled once."""
    every = jax.jit(
        lambda params: {name: metric(params) for name, metric in problem.metrics.items()}
    )
    evaluate = every.lower(problem.init(0)).compile()  # kept when JAX's caches are cleared
    return lambda params: {name: float(value) for name, value in evaluate(params).items()}


class Curve:
    """One method's run from one seed: steps, seconds and metrics at every evaluation."""

    def __init__(self, name: str, method: Compiled, problem: Problem, seed: int, steps: int):
        self.name, self.method, self.failure = name, method, None
        share = problem.share_of_steps.get(name, 1.0)
        self.block = max(1, round(problem.evaluate_every * share))
        self.params = _copy(problem.init(seed))  # some methods donate what they are given
        self.state = method.init(self.params)
        self.values = method.settings if method.trace_seconds is None else numbers(method.settings)
        self.steps, self.seconds = [0], [0.0]
        self.metrics: dict[str, list[float]] = {}

    def advance(self, batches: list[tuple]):
        """A timed block of steps."""
        start = time.perf_counter()
        for batch in batches:
            self.params, self.state = self.method.step(self.params, self.state, batch, self.values)
        jax.block_until_ready(self.params)
        self.seconds.append(self.seconds[-1] + time.perf_counter() - start)
        self.steps.append(self.steps[-1] + len(batches))

    def record(self, metrics: dict[str, float]):
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)


def train(
    problem: Problem,
    methods: dict[str, Compiled],
    seed: int,
    steps: int,
    evaluate: Callable,
    tick: Callable,
) -> list[Curve]:
    """Trains all methods block by block, in an order that rotates; a method that raises stops with
    its reason."""
    curves = [Curve(name, method, problem, seed, steps) for name, method in methods.items()]
    untrained = evaluate(problem.init(seed))
    for curve in curves:
        curve.record(untrained)
    stream = iter(problem.batches(seed, steps))
    for turn in itertools.count():
        batches = list(itertools.islice(stream, problem.evaluate_every))
        if not batches:
            return curves
        first = turn % len(curves) if curves else 0
        for curve in curves[first:] + curves[:first]:
            if curve.failure:
                continue
            try:
                curve.advance(batches[: curve.block] if curve.block < len(batches) else batches)
                curve.record(evaluate(curve.params))
            except Exception as error:  # of another package, whatever it is
                curve.failure = reason(error)
        tick(len(batches))


def reason(error: Exception) -> str:
    """The kind and the first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]


def on_grid(index: int, per_decade: int) -> float:
    """1, 2, 5, 10, … for three per decade; 1, 10, 100, … for one."""
    return float(f"{(1, 2, 5)[index % per_decade]}e{index // per_decade}")


def tune(
    problem: Problem,
    method: Compiled,
    name: str,
    seed: int,
    steps: int,
    evaluate: Callable,
    note: Callable,
) -> dict[str, float]:
    """Walks each setting along its grid to the lowest last value of the first metric, the learning
    rate first.

    Learning rates are 1, 2, 5, 10, …, other settings powers of ten. A walk starts at the method's
    own first value and goes on while the metric falls, so the best value is never at the edge of
    what was tried."""
    (metric,) = itertools.islice(problem.metrics, 1)
    known: dict[tuple, float] = {}
    whole = problem._replace(evaluate_every=steps)

    def score(settings):
        key = tuple(settings.values())
        if key not in known:
            trial = {name: method._replace(settings=dict(settings))}
            (curve,) = train(whole, trial, seed, steps, evaluate, lambda _: None)
            if curve.failure:
                raise RuntimeError(curve.failure)
            last = curve.metrics[metric][-1]
            known[key] = last if math.isfinite(last) else math.inf
            note(
                f"{name} " + ", ".join(f"{k} {v:g}" for k, v in settings.items()) + f": {last:.4g}"
            )
        return known[key]

    best = dict(method.settings)
    settled = False
    while not settled:
        before = dict(best)
        for setting in best:
            per_decade = 3 if setting == "learning_rate" else 1
            start = best[setting]
            index = round(math.log10(start) * per_decade)
            for direction in (1, -1):
                for k in itertools.count():
                    value = on_grid(index + direction * k, per_decade)
                    if direction * (value - start) <= 0:  # a start may lie off the grid
                        continue
                    trial = {**best, setting: value}
                    if not score(trial) < score(best):
                        break
                    best = trial
                if best[setting] != start:
                    break
        settled = best == before or len(best) == 1
    return best
