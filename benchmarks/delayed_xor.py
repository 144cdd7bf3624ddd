"""Delayed XOR: a small tanh recurrent net that must hold a bit for thirty steps, by Adam and by Kronecker PSGD.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.delayed_xor

A sequence is two bits (±1), the first at its first step and the second `DELAY` steps later, each flagged by a second
input; between them the first input is noise of the same kind (±1). The target is their XOR at the last step, by a
logistic loss; without both bits no guess beats log 2. The recurrent kernel starts orthogonal, the others Gaussian,
variance 1/fan-in. The learning rate falls linearly to a tenth. All seeds and rates run in one compiled scan, data
included; the last row of a method has ten times its largest rate.

The table says which of these seeds reach a loss below `SOLVED` within these steps at these few rates, and no more: a
run that stays at log 2 may leave it later, five seeds tell large differences only, and nothing else was tuned.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv

UNITS, DELAY, BATCH, SOLVED, BLOCK = 30, 30, 128, 0.1, 500
RATES = {"adam": (1e-3, 3e-3, 1e-2, 3e-2), "kron_psgd": (3e-3, 1e-2, 3e-2)}
TOO_LARGE = 10.0


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "input": jax.random.normal(keys[0], (2, UNITS)) / np.sqrt(2),
        "recurrent": jax.random.orthogonal(keys[1], UNITS),
        "bias": jnp.zeros(UNITS),
        "output": jax.random.normal(keys[2], (UNITS, 1)) / np.sqrt(UNITS),
        "output_bias": jnp.zeros(1),
    }


def draw(key):
    """Inputs [DELAY + 1, BATCH, 2] and targets [BATCH] in {0, 1}."""
    values = jax.random.rademacher(key, (DELAY + 1, BATCH), jnp.float32)
    flags = jnp.zeros_like(values).at[0].set(1.0).at[-1].set(1.0)
    return jnp.stack([values, flags], -1), (values[0] * values[-1] < 0).astype(jnp.float32)


def loss(params, inputs, targets):
    def step(h, x):
        return jnp.tanh(x @ params["input"] + h @ params["recurrent"] + params["bias"]), None

    h, _ = jax.lax.scan(step, jnp.zeros((BATCH, UNITS)), inputs)
    return jnp.mean(optax.sigmoid_binary_cross_entropy((h @ params["output"] + params["output_bias"])[:, 0], targets))


METHODS = {
    "adam": lambda rate: optax.adam(rate),
    "kron_psgd": lambda rate: optax_curv.kron_psgd(rate, precond_lr=0.1, max_skew=np.inf),
}


def optimizer(method, rate, steps):
    return METHODS[method](optax.linear_schedule(rate, 0.1 * rate, steps))


def start(seed, tx):
    """(parameters, state, key of the data)."""
    keys = jax.random.split(jax.random.key(seed))
    params = init(keys[0])
    return params, tx.init(params), keys[1]


def train(method, decay_steps, block, rate, carry):
    """Carry after a block of steps, and their losses [block]."""
    tx = optimizer(method, rate, decay_steps)

    def step(carry, _):
        params, state, key = carry
        key, data = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(params, *draw(data))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, key), value

    return jax.lax.scan(step, carry, length=block)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", nargs="*", type=float, help="instead of the grid and ten times its largest")
    arguments = parser.parse_args()
    print(f"{'':10}{'rate':>8}{'solved':>8}  {'step of the first 100 below 0.1, by seed':44}{'last loss':>10}")
    for method in arguments.methods:
        rates = jnp.array(arguments.rates or [*RATES[method], TOO_LARGE * max(RATES[method])])
        seeds = jnp.tile(jnp.arange(arguments.seeds), len(rates))  # one batch of runs
        block = jax.vmap(functools.partial(train, method, arguments.steps, BLOCK))
        block, runs = jax.jit(block, donate_argnums=1), jnp.repeat(rates, arguments.seeds)
        carry = jax.jit(jax.vmap(lambda seed, method=method: start(seed, optimizer(method, 0.1, arguments.steps))))(
            seeds
        )
        means = []
        for done in range(BLOCK, arguments.steps + 1, BLOCK):
            carry, losses = block(runs, carry)
            means.append(np.asarray(losses).reshape(len(rates), arguments.seeds, -1, 100).mean(-1))
            last = np.array2string(means[-1][..., -1], precision=2, suppress_small=True).replace("\n", "")
            print(f"{method} {done}: {last}", file=sys.stderr, flush=True)
        means = np.concatenate(means, -1)  # of every 100 steps
        for rate, of_rate in zip(rates, means, strict=True):
            first = [100 * int(np.argmax(row < SOLVED) + 1) if (row < SOLVED).any() else None for row in of_rate]
            note = "" if np.isfinite(of_rate).all() else "  NaN"
            solved = f"{sum(f is not None for f in first)}/{len(first)}"
            print(f"{method:10}{rate:8.4f}{solved:>8}  {first!s:44}{np.median(of_rate[:, -1]):10.4f}{note}", flush=True)


if __name__ == "__main__":
    main()
