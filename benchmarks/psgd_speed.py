"""What a step of Kronecker PSGD costs beside Adam and the published JAX ports, in one interleaved
run.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.psgd_speed    # after python -m benchmarks.peers

24 layers of 256×256 and their biases; `--dtype bfloat16` for parameters, gradients and
preconditioners of that type. Times are medians over the rounds; a round runs every contender once,
so that a change of the machine's load meets all of them alike. On an accelerator steps follow each
other without waiting for the host."""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv
from benchmarks import peers

LAYERS, WIDTH = 24, 256
SECONDS = 0.05  # of a contender in a round, at least
GEOMETRIES = ("q0.5eq1.5", "eq", "qep", "qeq", "quad", "quad4p")
# Products of two 256×256 matrices for one layer and step; those whose result is symmetric count the
# same. "eq" has two triangular solves beside.
MATMULS = {"q0.5eq1.5": 14, "eq": 12, "qep": 20, "qeq": 12, "quad": 14, "quad4p": 10}


class Compiled(NamedTuple):
    """What runs so many steps and gives the seconds of one, how many make a round, the cost of
    trace + compile."""

    steps: Callable[[int], float]
    count: int
    seconds: float
    state_bytes: int


def contenders(only, dtype):
    """Name -> transformation."""
    psgdax, distributed = peers.load("psgdax"), peers.load("distributed_kron")
    narrow = {"precond_dtype": dtype} if dtype != "float32" else {}
    wide = (
        {"mu_dtype": "float32"} if narrow else {}
    )  # as ours; psgdax's own choice changes its type after a step
    plain = {"merge_small_dims": False, "partition_grads_into_blocks": False}

    def port(make, probability, **options):
        return lambda: make(
            1e-3, preconditioner_update_probability=probability, **options, **narrow, **wide
        )

    def ours(**options):
        return lambda: optax_curv.kron_psgd(1e-3, **options, **narrow)

    made = {"adam": lambda: optax.adam(1e-3)}
    made["psgdax"] = port(psgdax.kron, 1.0)
    made["distributed-kron"] = port(distributed.kron, 1.0, **plain)
    made |= {geometry: ours(geometry=geometry) for geometry in GEOMETRIES}
    made["psgdax, applied"] = port(psgdax.kron, 0.0)
    made["distributed-kron, applied"] = port(distributed.kron, 1e-9, **plain)
    made |= {
        f"{geometry}, applied": ours(geometry=geometry, update_probability=0.0)
        for geometry in (GEOMETRIES[0], "quad4p")
    }
    return {
        name: make for name, make in made.items() if not only or name in (*only, "adam", "psgdax")
    }


def compiled(make, params, grads):
    """A contender's step."""
    tx = make()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = jax.tree.map(jnp.copy, jax.jit(tx.init)(params))
    jax.block_until_ready(state)
    started = time.perf_counter()
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads[0]).compile()
    seconds = time.perf_counter() - started
    carry = [run(params, state, grads[0])]
    waits = jax.default_backend() == "cpu"

    def steps(count):
        started = time.perf_counter()
        for i in range(count):
            carry[0] = run(*carry[0], grads[i % len(grads)])
            if waits or i == count - 1:
                jax.block_until_ready(carry[0])
        return (time.perf_counter() - started) / count

    steps(1)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return Compiled(steps, max(2, math.ceil(SECONDS / steps(2))), seconds, size)


def peak_of_matmul(dtype):
    """Floating-point operations a second of a batch of products of the layers' shape."""
    a = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH), dtype)
    product = jax.jit(lambda a, b: a @ b).lower(a, a).compile()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - started)
    return 2 * LAYERS * WIDTH**3 / min(times)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    keys = jax.random.split(jax.random.key(0), 4)
    dtype = jnp.dtype(arguments.dtype)
    params = [
        {"w": jnp.zeros((WIDTH, WIDTH), dtype), "b": jnp.zeros(WIDTH, dtype)} for _ in range(LAYERS)
    ]
    grads = [optax.tree.random_like(key, params, sampler=jax.random.normal) for key in keys]
    runs = {}
    for name, make in contenders(arguments.only, arguments.dtype).items():
        runs[name] = compiled(make, params, grads)
        print(f"{name}: {runs[name].seconds:.1f} s to compile", file=sys.stderr, flush=True)
    times = {name: [] for name in runs}
    peak = peak_of_matmul(dtype)
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(run.steps(run.count))

    seconds = {name: float(np.median(of_name)) for name, of_name in times.items()}
    print(
        f"{jax.devices()[0].device_kind}, {arguments.dtype}: matmul peak {peak / 1e9:.0f} GFLOP/s; "
        f"Adam {1e3 * seconds['adam']:.2f} ms"
    )
    print(
        f"{'':28}{'ms':>8}{'Adams':>8}{'/psgdax':>9}{'compile s':>11}{'/psgdax':>9}{'state':>7}"
        f"{'matmuls':>9}{'peak':>6}"
    )
    for name, run in runs.items():
        reference = runs[
            "psgdax, applied" if "applied" in name and "psgdax, applied" in runs else "psgdax"
        ]
        base = seconds[
            "psgdax, applied" if "applied" in name and "psgdax, applied" in runs else "psgdax"
        ]
        count = MATMULS.get(name, 2 if "applied" in name and name[0] == "q" else None)
        fraction = f"{count * 2 * LAYERS * WIDTH**3 / seconds[name] / peak:6.0%}" if count else ""
        print(
            f"{name:28}{1e3 * seconds[name]:8.2f}{seconds[name] / seconds['adam']:8.1f}"
            f"{seconds[name] / base:9.2f}"
            f"{run.seconds:11.2f}{run.seconds / reference.seconds:9.2f}"
            f"{run.state_bytes / runs['adam'].state_bytes:7.2f}{count or '':>9}"
            f"{fraction}"
        )


if __name__ == "__main__":
    main()
