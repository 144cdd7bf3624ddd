"""The methods that are compared: ours and Optax's own. Those of other packages are in
`benchmarks.peers`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_curv
from benchmarks.problems import Problem

RMS = 0.2  # root mean square of every matrix's update, as an update of Adam has


class Absent(Exception):
    """A method that this problem or this installation does not have; the message says why."""


class Method(NamedTuple):
    """An optimizer for one problem.

    Attributes:
      init: parameters -> state.
      step: (params, state, batch, settings) -> (params, state), traceable unless `host` says
        otherwise.
      settings: name -> the value at which tuning starts; "damping" and the like beside
        "learning_rate".
      host: whether the step is Python code that compiles parts of itself.
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any]]
    settings: dict[str, float]
    host: bool = False


def schedule(peak, steps: int) -> optax.Schedule:
    """A warm-up of 5 % of the steps and a cosine to 1 % of the peak, for every method alike."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps, 0.01)
    return lambda count: peak * shape(count)


def from_optax(
    problem: Problem, steps: int, make: Callable, measure: Callable | None = None, **settings
) -> Method:
    """A method from `make(schedule, settings) -> transformation`.

    `measure(params, state, batch, key) -> (gradients, extra arguments of update)`, by default the
    gradient alone."""

    def transformation(values):
        return optax.with_extra_args_support(
            make(schedule(values.get("learning_rate"), steps), values)
        )

    def init(params):
        return transformation(settings).init(params), jnp.zeros([], jnp.int32)

    def step(params, state, batch, values):
        state, count = state
        if measure is None:
            grads, extra_args = jax.grad(problem.loss)(params, *batch), {}
        else:
            grads, extra_args = measure(
                params, state, batch, jax.random.fold_in(jax.random.key(0), count)
            )
        updates, state = transformation(values).update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), (state, count + 1)

    return Method(init, step, settings)


def _split(problem: Problem, matrices: Callable) -> Callable:
    """Matrices by `matrices(schedule, settings)`, what the problem leaves to Adam by Adam at the
    same rate."""

    def make(rate, values):
        def labels(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: "adam" if problem.adam_for(path, leaf) else "matrices", params
            )

        return optax.partition(
            {"matrices": matrices(rate, values), "adam": optax.adam(rate)}, labels
        )

    return make


def _layers(problem):
    batch = next(iter(problem.batches(0, 1)))
    layers = optax_curv.find_layers(problem.loss, jax.eval_shape(problem.init, 0), *batch)
    if not len(layers):
        raise Absent("no layer found in this loss")
    return layers


def _layers_of_axes(problem):
    """The layers where a kernel has more axes than rows and columns, as convolutions do; else
    None."""

    def is_tensor(path, leaf):
        return leaf.ndim > 2 and not problem.adam_for(path, leaf)

    like = jax.eval_shape(problem.init, 0)
    tensors = jax.tree.leaves(jax.tree_util.tree_map_with_path(is_tensor, like))
    return _layers(problem) if any(tensors) else None


def adam(problem, steps):
    return from_optax(problem, steps, lambda rate, _: optax.adam(rate), learning_rate=0.01)


def muon(problem, steps):
    layers = _layers_of_axes(problem)
    numbers = None if layers is None else optax_curv.muon_dimension_numbers(layers)

    def matrices(rate, _):
        return optax.contrib.muon(rate, consistent_rms=RMS, muon_weight_dimension_numbers=numbers)

    return from_optax(problem, steps, _split(problem, matrices), learning_rate=0.02)


def sophia(problem, steps):
    def measure(params, state, batch, key):
        return jax.grad(problem.loss)(params, *batch), {"obj_fn": lambda p: problem.loss(p, *batch)}

    return from_optax(
        problem, steps, lambda rate, _: optax.contrib.sophia(rate), measure, learning_rate=0.005
    )


def lbfgs(problem, steps):
    def init(params):
        return optax.lbfgs().init(params)

    def step(params, state, batch, values):
        def value_fn(p):
            return problem.loss(p, *batch)

        if problem.full_batch:
            value, grad = optax.value_and_grad_from_state(value_fn)(params, state=state)
        else:
            value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = optax.lbfgs().update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    return Method(init, step, {})


def kron_psgd(problem, steps):
    layers = _layers_of_axes(problem)
    return from_optax(
        problem,
        steps,
        lambda rate, _: optax_curv.kron_psgd(rate, layers=layers),
        learning_rate=0.005,
    )


def kron_psgd_rms(problem, steps):
    layers = _layers_of_axes(problem)

    def matrices(rate, values):
        kron = optax_curv.scale_by_kron_psgd(
            values["precond_lr"], b1=0.9, whiten="momentum", layers=layers
        )
        return optax.chain(
            kron, optax_curv.normalize_by_rms(RMS), optax.scale_by_learning_rate(rate)
        )

    return from_optax(problem, steps, _split(problem, matrices), learning_rate=0.02, precond_lr=0.5)


def _alias_with_adam(name):
    def method(problem, steps):
        if not hasattr(optax_curv, name):
            raise Absent(f"optax_curv has no {name} yet")
        alias, layers = getattr(optax_curv, name), _layers_of_axes(problem)
        return from_optax(
            problem,
            steps,
            lambda rate, _: alias(rate, layers=layers, adam_for=problem.adam_for),
            learning_rate=0.02,
        )

    return method


def _measured(problem):
    """The layers of a problem, and the gradients with their curvature."""
    layers = _layers(problem)
    capture = optax_curv.value_grad_and_curvature(problem.loss, layers=layers, statistic="rows")

    def measure(params, state, batch, key):
        _, grads, curvature = capture(params, *batch)
        return grads, {"curvature": curvature}

    return layers, measure


def kfac(problem, steps):
    layers, measure = _measured(problem)

    def make(rate, values):
        return optax_curv.kfac(rate, layers, values["damping"], fallback=optax.scale_by_adam())

    return from_optax(problem, steps, make, measure, learning_rate=0.02, damping=0.01)


def kfac_rms(problem, steps):
    """K-FAC's direction with every matrix's update scaled to one RMS, and Adam for the rest."""
    layers, measure = _measured(problem)

    def make(rate, values):
        def is_matrix(path, leaf):
            return not problem.adam_for(path, leaf)

        def matrices(params):
            return jax.tree_util.tree_map_with_path(is_matrix, params)

        def others(params):
            return jax.tree_util.tree_map_with_path(problem.adam_for, params)

        scaled = optax.chain(optax.trace(0.9), optax_curv.normalize_by_rms(RMS))
        return optax.chain(
            optax_curv.scale_by_kfac(
                layers,
                values["damping"],
                update_every=None,
                invert_every=20,
                fallback=optax.identity(),
            ),
            optax.masked(scaled, matrices),
            optax.masked(optax.scale_by_adam(), others),
            optax.scale_by_learning_rate(rate),
        )

    return from_optax(problem, steps, make, measure, learning_rate=0.02, damping=0.01)


def kfac_adaptive(problem, steps):
    """The adaptive mode at its default damping: nothing to tune."""
    if problem.objective is None:
        raise Absent("needs an Objective")
    layers = _layers(problem)
    capture = optax_curv.value_grad_and_curvature(
        problem.objective, layers=layers, statistic="rows", fisher="sampled"
    )

    def measure(params, state, batch, key):
        value, grads, curvature = capture(params, *batch, key=key)
        return grads, {
            "curvature": curvature,
            "objective": problem.objective,
            "batch": batch,
            "value": value,
        }

    def make(rate, _):
        return optax_curv.kfac(None, layers, fallback=optax.scale_by_adam())

    return from_optax(problem, steps, make, measure)


def ekfac(problem, steps):
    layers = _layers(problem)
    capture = optax_curv.value_grad_and_curvature(
        problem.loss, layers=layers, statistic="eigenbasis"
    )

    def measure(params, state, batch, key):
        _, grads, curvature = capture(params, *batch, basis=optax_curv.eigenbasis(state))
        return grads, {"curvature": curvature}

    def make(rate, values):
        return optax_curv.ekfac(
            rate, layers, values["damping"], invert_every=20, fallback=optax.scale_by_adam()
        )

    return from_optax(problem, steps, make, measure, learning_rate=0.02, damping=0.01)


def gauss_newton(problem, steps):
    """Hessian-free optimisation, with nothing to tune."""
    if problem.objective is None:
        raise Absent("needs an Objective")

    def measure(params, state, batch, key):
        value, grads = jax.value_and_grad(problem.loss)(params, *batch)
        return grads, {"objective": problem.objective, "batch": batch, "value": value}

    return from_optax(problem, steps, lambda rate, _: optax_curv.gauss_newton(None), measure)


def branch_fisher(problem, steps):
    """Gauss-Newton rows of the residuals, the step length by backtracking."""
    if not problem.residuals:
        raise Absent("needs a loss of residuals")
    rows = optax_curv.residual_rows(*problem.residuals)

    def measure(params, state, batch, key):
        value, grads, branches = rows(params, *batch)
        return grads, {
            "branches": branches,
            "value": value,
            "grad": grads,
            # The line search hands every extra argument on to its value_fn and refuses those it
            # does not take.
            "value_fn": lambda p, branches: problem.loss(p, *batch),
        }

    def make(rate, values):
        return optax.chain(
            optax_curv.scale_by_branch_fisher(values["damping"], centered=False, solver="auto"),
            optax.scale_by_learning_rate(1.0),
            optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
        )

    return from_optax(problem, steps, make, measure, damping=1e-6)


OURS = {
    "kfac": kfac,
    "kfac_rms": kfac_rms,
    "kfac_adaptive": kfac_adaptive,
    "ekfac": ekfac,
    "kron_psgd": kron_psgd,
    "kron_psgd_rms": kron_psgd_rms,
    "shampoo": _alias_with_adam("shampoo"),
    "soap": _alias_with_adam("soap"),
    "branch_fisher": branch_fisher,
    "gauss_newton": gauss_newton,
}
OPTAX = {"adam": adam, "muon": muon, "sophia": sophia, "lbfgs": lbfgs}
