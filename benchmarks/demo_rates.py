"""Finds the learning rates of the demo: ``python -m benchmarks.demo_rates [PROBLEM ...]``.

Every method of a problem trains from seed 100 at the rates 1, 2, 5, 10, … times a power of ten,
from the one that the demo has outwards until the lowest last error lies inside. Prints the errors
and the best rate.
"""

import argparse
import math

import jax

from benchmarks import running
from optax_curv.demo.problems import PROBLEMS, STEPS
from optax_curv.demo.training import METHODS, train

SEED = 100


def best_rate(name, problem, steps, start):
    """The rate of the lowest error at the end, and all errors that were seen."""
    errors = {}

    def error(rate):
        if rate not in errors:
            run = train(name, problem, steps, SEED, rate)
            errors[rate] = float(run.errors[-1])
        return errors[rate] if errors[rate] == errors[rate] else float("inf")

    best = round(3 * math.log10(start))  # its place on the grid
    while True:
        better = min((best, best - 1, best + 1), key=lambda i: error(running.on_grid(i, 3)))
        if better == best:
            return running.on_grid(best, 3), errors
        best = better


def main():
    """Parses the command line and prints one line a method."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_rates")
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), metavar="PROBLEM")
    for name in parser.parse_args().problems:
        with jax.enable_x64(name == "poisson"):
            problem = PROBLEMS[name](SEED)
            steps = STEPS[name]
            for method, (_, rates, _) in METHODS.items():
                if rates.get(name) is not None:
                    best, errors = best_rate(method, problem, steps, rates[name])
                    seen = ", ".join(f"{x:g}: {errors[x]:.3g}" for x in sorted(errors))
                    print(f"{name} {method}: {best:g} of {seen}", flush=True)


if __name__ == "__main__":
    main()
