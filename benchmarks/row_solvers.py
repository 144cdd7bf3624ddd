"""Times of the dense row solvers over K rows of n parameters, and what "auto" loses against the
faster of them.

python benchmarks/row_solvers.py [--sizes 10 30 100 300 1000 3000] [--rounds 9] [--dtype float32]

The two solvers are timed in turn, in rounds. Prints their least times with auto's choice, and the
largest loss."""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.preconditioners._branches.metric import Metric, StoredRows
from optax_curv.preconditioners._branches.solve import cheaper, solve_metric

BOUND = 1.2
SOLVERS = ("woodbury", "cholesky")


@functools.partial(jax.jit, static_argnames="solver")
def solve(rows, b, solver):
    damping = jnp.asarray(1e-3, b["w"].dtype)
    metric = Metric(StoredRows([rows["w"]], [b["w"]], jax.tree.structure(b)))
    return solve_metric(metric, b, damping, solver=solver, max_iters=0, tol=0.0).x


def seconds(rows, b, solver):
    start = time.perf_counter()
    jax.block_until_ready(solve(rows, b, solver))
    return time.perf_counter() - start


def measure(count, size, rounds, dtype):
    """Least times of the solvers, to which other load only adds: `rounds` interleaved rounds, more
    where quick."""
    rng = np.random.default_rng(0)
    rows = {"w": jnp.asarray(rng.normal(size=(count, size)) / np.sqrt(count), dtype)}
    b = {"w": jnp.asarray(rng.normal(size=size), dtype)}
    for solver in SOLVERS:
        seconds(rows, b, solver)  # compiles
    longest = max(seconds(rows, b, solver) for solver in SOLVERS)
    repeats = int(np.clip(0.2 / longest, rounds, 200))
    times = {solver: [] for solver in SOLVERS}
    for _ in range(repeats):
        for solver in SOLVERS:
            times[solver].append(seconds(rows, b, solver))
    return {solver: min(values) for solver, values in times.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 30, 100, 300, 1000, 3000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    worst = 0.0
    print("    K     n  woodbury [ms]  cholesky [ms]  auto      auto / faster")
    for count in options.sizes:
        for size in options.sizes:
            times = measure(count, size, options.rounds, options.dtype)
            chosen = cheaper(count, size)
            loss = times[chosen] / min(times.values())
            worst = max(worst, loss)
            columns = "  ".join(f"{1e3 * times[solver]:13.3f}" for solver in SOLVERS)
            print(
                f"{count:5d} {size:5d}  {columns}  {chosen:8s}  "
                f"{loss:.2f}{' *' if loss > BOUND else ''}",
                flush=True,
            )
    print(f"largest: {worst:.2f} (bound {BOUND}), {options.dtype}, {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
