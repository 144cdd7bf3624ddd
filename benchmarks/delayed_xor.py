"""Delayed XOR: a small tanh recurrent net that must hold a bit for thirty steps, by Adam, Muon and
ours.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.delayed_xor

Two of thirty signs are marked, the first among the first three, the second before the middle; the
target is their XOR at the end, by a logistic loss; without both bits no guess beats log 2. The
recurrent kernel starts orthogonal, the others small, as in the problem's published form. The
learning rate falls linearly to a tenth. All seeds and rates run in one compiled scan, data
included; the last row of a method has ten times its largest rate.

The table says which of these seeds reach a loss below `SOLVED` within these steps at these few
rates, and no more: a run that stays at log 2 may leave it later, five seeds tell large differences
only, and nothing else was tuned."""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv
from benchmarks.problems import xor

SOLVED, BLOCK = 0.1, 500
RATES = {
    "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "kron_psgd": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (1e-3, 3e-3, 1e-2, 3e-2),
    "shampoo": (1e-3, 3e-3, 1e-2, 3e-2),
}
TOO_LARGE = 10.0
PROBLEM = xor.problem()


def draw(key):
    """Sequences [BATCH, DELAY, 2] of (sign, mark) and targets [BATCH] in {0, 1}."""
    keys, rows, length = jax.random.split(key, 3), jnp.arange(xor.BATCH), xor.DELAY
    signs = jax.random.rademacher(keys[0], (xor.BATCH, length), jnp.float32)
    first = jax.random.randint(keys[1], (xor.BATCH,), 0, length // 10)
    second = jax.random.randint(keys[2], (xor.BATCH,), length // 10, length // 2)
    marks = jnp.zeros_like(signs).at[rows, first].set(1.0).at[rows, second].set(1.0)
    return jnp.stack([signs, marks], -1), (signs[rows, first] != signs[rows, second]).astype(
        jnp.float32
    )


METHODS = {
    "adam": optax.adam,
    "kron_psgd": optax_curv.kron_psgd,
    "muon": lambda rate: optax.contrib.muon(rate, consistent_rms=0.2),
    "shampoo": optax_curv.shampoo,
}


def optimizer(method, rate, steps):
    return METHODS[method](optax.linear_schedule(rate, 0.1 * rate, steps))


def start(seed, tx):
    """(parameters, state, key of the data)."""
    params = PROBLEM.init(seed)
    return params, tx.init(params), jax.random.key(1000 + seed)


def train(method, decay_steps, block, rate, carry):
    """Carry after a block of steps, and their losses [block]."""
    tx = optimizer(method, rate, decay_steps)

    def step(carry, _):
        params, state, key = carry
        key, data = jax.random.split(key)
        value, grads = jax.value_and_grad(PROBLEM.loss)(params, *draw(data))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, key), value

    return jax.lax.scan(step, carry, length=block)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--rates", nargs="*", type=float, help="instead of the grid and ten times its largest"
    )
    arguments = parser.parse_args()
    print(
        f"{'':10}{'rate':>8}{'solved':>8}  "
        f"{'step of the first 100 below 0.1, by seed':44}{'last loss':>10}"
    )
    for method in arguments.methods:
        rates = jnp.array(arguments.rates or [*RATES[method], TOO_LARGE * max(RATES[method])])
        seeds = jnp.tile(jnp.arange(arguments.seeds), len(rates))  # one batch of runs
        block = jax.vmap(functools.partial(train, method, arguments.steps, BLOCK))
        block, runs = jax.jit(block, donate_argnums=1), jnp.repeat(rates, arguments.seeds)
        carry = jax.jit(
            jax.vmap(
                lambda seed, method=method: start(seed, optimizer(method, 0.1, arguments.steps))
            )
        )(seeds)
        means = []
        for done in range(BLOCK, arguments.steps + 1, BLOCK):
            carry, losses = block(runs, carry)
            means.append(np.asarray(losses).reshape(len(rates), arguments.seeds, -1, 100).mean(-1))
            last = np.array2string(means[-1][..., -1], precision=2, suppress_small=True).replace(
                "\n", ""
            )
            print(f"{method} {done}: {last}", file=sys.stderr, flush=True)
        means = np.concatenate(means, -1)  # of every 100 steps
        for rate, of_rate in zip(rates, means, strict=True):
            first = [
                100 * int(np.argmax(row < SOLVED) + 1) if (row < SOLVED).any() else None
                for row in of_rate
            ]
            note = "" if np.isfinite(of_rate).all() else "  NaN"
            solved = f"{sum(f is not None for f in first)}/{len(first)}"
            print(
                f"{method:10}{rate:8.4f}{solved:>8}  "
                f"{first!s:44}{np.median(of_rate[:, -1]):10.4f}{note}",
                flush=True,
            )


if __name__ == "__main__":
    main()
