"""Physics-informed networks on four equations, at equal processor time, interleaved in one process.

python -m benchmarks.pinn [PROBLEM ...] [--seconds 16] [--seeds 0 1 2] [--methods ...] [--save]

Peers are what is installed of jinns (SSBroyden) and optimistix (Levenberg-Marquardt), beside
Optax's Adam and L-BFGS and this package's SOAP. Every method starts from the same weights and sees
the same points, in float64. It runs in blocks of steps, in turn; what counts is the processor time
of its blocks, compilation and evaluation excluded. Prints the relative L2 errors at some times, and
writes them to `results/pinn.md` with ``--save``."""

import argparse
import importlib
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv
from benchmarks.pinn_problems import PROBLEMS

jax.config.update("jax_enable_x64", True)
RESULTS = pathlib.Path(__file__).parent / "results" / "pinn.md"


class Method(NamedTuple):
    """A method on one problem: its first state, one step, and where it keeps the parameters."""

    init: Callable[[Any], Any]
    step: Callable[[Any], Any]
    params: Callable[[Any], Any] = lambda state: state[0]
    every: int = 1  # steps in a block


def levenberg_marquardt(problem):
    rows_of = optax_curv.residual_rows(*problem.blocks, weights=problem.weights)
    tx = optax_curv.levenberg_marquardt()

    def step(carry):
        params, state = carry
        value, grads, rows = rows_of(params, *problem.points)
        given = {"branches": rows, "value": value, "value_fn": problem.loss}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    return Method(lambda params: (params, tx.init(params)), step)


def gradients_alone(make, every=20):
    def method(problem):
        tx = make()

        def step(carry):
            params, state = carry
            updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return Method(lambda params: (params, tx.init(params)), step, every=every)

    return method


def lbfgs(problem):
    tx = optax.lbfgs()

    def step(carry):
        params, state = carry
        value, grads = jax.value_and_grad(problem.loss)(params)
        given = {"value": value, "grad": grads, "value_fn": problem.loss}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    return Method(lambda params: (params, tx.init(params)), step, every=5)


def ss_broyden(problem):
    # The family's transformation has its own line search, and returns the step.
    family = importlib.import_module("jinns.optimizers")
    tx, grad_fn = family.scale_by_SSBroyden_family(), jax.grad(problem.loss)

    def step(carry):
        params, state = carry
        value, grads = jax.value_and_grad(problem.loss)(params)
        given = {"value": value, "grad_pt": grads, "grad_fn": grad_fn, "value_fn": problem.loss}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    return Method(lambda params: (params, tx.init(params)), step, every=5)


def optimistix_lm(problem):
    optimistix = importlib.import_module("optimistix")
    lineax, eqx = importlib.import_module("lineax"), importlib.import_module("equinox")
    solver = optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0, linear_solver=lineax.Cholesky())
    count = [len(x) for x in problem.points]
    pairs = list(zip(problem.weights, problem.blocks, problem.points, count, strict=True))

    def residuals(params, args):
        del args
        return [jnp.sqrt(w / n) * block(params, x) for w, block, x, n in pairs], None

    static: list[Any] = []  # programs of functions, which the state holds beside arrays

    def init(params):
        struct = jax.eval_shape(lambda p: residuals(p, None)[0], params)
        state = solver.init(residuals, params, None, {}, struct, None, frozenset())
        arrays, rest = eqx.partition(state, eqx.is_array)
        static.append(rest)
        return params, arrays

    def step(carry):
        params, arrays = carry
        state = eqx.combine(arrays, static[-1])
        params, state, _ = solver.step(residuals, params, None, {}, state, frozenset())
        return params, eqx.partition(state, eqx.is_array)[0]

    return Method(init, step, every=2)


def falling(peak):
    return optax.exponential_decay(peak, 2000, 0.7, end_value=1e-5)


METHODS = {
    "levenberg_marquardt": levenberg_marquardt,
    "jinns SSBroyden": ss_broyden,
    "optimistix LM": optimistix_lm,
    "optax lbfgs": lbfgs,
    "soap": gradients_alone(lambda: optax_curv.soap(falling(1e-2))),
    "optax adam": gradients_alone(lambda: optax.adam(falling(5e-3)), every=50),
}


def equal_dtypes(carry):
    """Without weak types, which would compile the block twice."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), carry)


class Run:
    """One method on one problem, block by block."""

    def __init__(self, name, problem, seed):
        self.method = METHODS[name](problem)
        self.error = jax.jit(lambda carry: problem.error(self.method.params(carry)))

        @jax.jit
        def block(carry):
            return jax.lax.fori_loop(0, self.method.every, lambda _, c: self.method.step(c), carry)

        self.block = block
        self.carry = equal_dtypes(self.method.init(problem.initial(seed)))
        first = block(self.carry)
        jax.block_until_ready(block(first))  # compiles
        self.spent, self.steps, self.history = 0.0, 0, [(0.0, float(self.error(self.carry)))]

    def advance(self):
        start = time.process_time()
        self.carry = jax.block_until_ready(self.block(self.carry))
        self.spent += time.process_time() - start
        self.steps += self.method.every
        self.history.append((self.spent, float(self.error(self.carry))))

    def at(self, seconds):
        """The error at a time."""
        return [e for t, e in self.history if t <= seconds][-1]


def compare(problem, seed, seconds, methods):
    runs = {}
    for name in methods:
        try:
            runs[name] = Run(name, problem, seed)
        except Exception as error:  # a peer that is absent or fails is a line of the table
            print(f"{problem.name} {name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
    while any(run.spent < seconds for run in runs.values()):
        for run in runs.values():
            goal = min(r.spent for r in runs.values()) + seconds / 20
            while run.spent < min(goal, seconds):
                run.advance()
    return runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems", nargs="*", help=f"of {list(PROBLEMS)}; default: all")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=16)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    times = [options.seconds / 4, options.seconds / 2, options.seconds]
    lines = [
        f"Median relative L2 errors of {len(options.seeds)} seeds after "
        f"{', '.join(f'{t:g}' for t in times)} processor seconds, and steps.\n",
        "| problem | method | " + " | ".join(f"{t:g} s" for t in times) + " | steps |",
        "|---|---|" + "---|" * (len(times) + 1),
    ]
    for name in options.problems or PROBLEMS:
        problem = PROBLEMS[name]()
        found = [compare(problem, s, options.seconds, options.methods) for s in options.seeds]
        for method in options.methods:
            runs = [runs[method] for runs in found if method in runs]
            if runs:
                errors = [f"{np.median([run.at(t) for run in runs]):.1e}" for t in times]
                steps = int(np.median([run.steps for run in runs]))
                lines.append(f"| {name} | {method} | {' | '.join(errors)} | {steps} |")
                print(lines[-1], flush=True)
    if options.save:
        RESULTS.write_text("# Physics-informed networks\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
