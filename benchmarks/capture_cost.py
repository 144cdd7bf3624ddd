"""What the statistics of `value_grad_and_curvature` cost beside `jax.value_and_grad`.

    python -m benchmarks.capture_cost [PROBLEM]

All run once in each round, in an order that rotates; printed are the median time and the ratio to
`value_and_grad` of the same round, with quartiles, and of the shortest times. All is returned from
`jax.jit`, so that also what a method would use in some steps only is written to memory."""

import argparse
import statistics
import time

import jax

import optax_curv
from benchmarks import problems, report

STATISTICS = ("input", "rows", "kronecker")


def measured(problem: problems.Problem, rounds: int) -> dict[str, list[float]]:
    """The seconds of every function in every round, by name."""
    batch, params = next(iter(problem.batches(0, 1))), problem.init(0)
    layers = optax_curv.find_layers(problem.loss, params, *batch)
    functions = {"value_and_grad": jax.jit(jax.value_and_grad(problem.loss))}
    for name in STATISTICS:
        take = optax_curv.value_grad_and_curvature(problem.loss, layers=layers, statistic=name)
        functions[name] = jax.jit(take)
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            jax.block_until_ready(functions[name](params, *batch))
            if turn >= 0:  # the first two compile and warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", nargs="?", default="transformer")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    title, problem = problems.load(options.problem)
    seconds = measured(problem, options.rounds)
    base = seconds["value_and_grad"]
    machine = report.machine()
    print(f"{title}: {machine['processor']}, {machine['cores']} cores, jax {jax.__version__}")
    print(f"{'':16}{'ms':>8}{'ratio':>8}{'quartiles':>16}{'of shortest':>13}")
    for name, of_name in seconds.items():
        ratios = report.spread([x / y for x, y in zip(of_name, base, strict=True)])
        assert ratios is not None
        low, middle, high = ratios
        print(
            f"{name:16}{1e3 * statistics.median(of_name):8.1f}{middle:8.3f}"
            f"{f'[{low:.2f}, {high:.2f}]':>16}{min(of_name) / min(base):13.3f}"
        )


if __name__ == "__main__":
    main()
