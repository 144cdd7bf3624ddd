"""What a matrix-free Gauss-Newton step of a Flax network of ten million parameters costs, beside
one gradient.

python benchmarks/gauss_newton_step.py [--batch 128] [--iters 10] [--rounds 7]

Prints times of interleaved rounds (medians), their ratio against the bound 2 · iterations + 3, and
the memory that XLA plans for a step, all of its arguments and results counted, in copies of the
parameters."""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import optax_curv

COPIES = 6


class Network(linen.Module):
    """784-2304-2304-1280-10: 10.1 million parameters."""

    @linen.compact
    def __call__(self, x):
        for width in (2304, 2304, 1280):
            x = linen.gelu(linen.Dense(width)(x))
        return linen.Dense(10)(x)


def seconds(function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(options.batch, 784)), jnp.float32)
    batch = (inputs, jnp.asarray(rng.integers(0, 10, options.batch)))
    network = Network()
    params = network.init(jax.random.key(0), inputs[:1])
    objective = optax_curv.Objective(network.apply, "categorical")
    size = optax.tree.size(params)
    one_copy = 4 * size
    tx = optax_curv.gauss_newton(1.0, 1e-3, max_iters=options.iters, tol=0.0)

    def step(params, state, batch):
        grads = jax.grad(objective)(params, *batch)
        updates, state = tx.update(grads, state, params, objective=objective, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    gradient = jax.jit(jax.grad(objective)).lower(params, *batch).compile()
    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()

    def copies(compiled):
        memory = compiled.memory_analysis()
        total = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )
        return (total - memory.alias_size_in_bytes) / one_copy

    times: dict[str, list[float]] = {"gradient": [], "step": []}
    for round_number in range(options.rounds + 1):
        taken, _ = seconds(gradient, params, *batch)
        spent, (params, state) = seconds(step, params, state, batch)
        if round_number:
            times["gradient"].append(taken)
            times["step"].append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [s / g for g, s in zip(times["gradient"], times["step"], strict=True)]
    iterations = int(state[0].iterations)
    print(
        f"{size / 1e6:.2f} million parameters, batch {options.batch}, "
        f"{jax.devices()[0].device_kind}"
    )
    print(f"gradient {medians['gradient']:.3f} s, {copies(gradient):.2f} copies of the parameters")
    print(
        f"step     {medians['step']:.3f} s, {copies(step):.2f} copies of the parameters (bound "
        f"{COPIES})"
    )
    print(
        f"ratio    {statistics.median(ratios):.1f} (rounds from {min(ratios):.1f} to "
        f"{max(ratios):.1f}) for "
        f"{iterations} iterations (bound {2 * iterations + 3})"
    )


if __name__ == "__main__":
    main()
