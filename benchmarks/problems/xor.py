"""Delayed XOR: a recurrent network that has to remember two bits for thirty steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problems import Problem

UNITS, DELAY, BATCH = 30, 30, 128


def problem() -> Problem:
    """The two bits (±1) stand in the first half, each marked; the answer, their product, is asked
    for at the end."""

    def init(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = {"input": (2, UNITS), "recurrent": (UNITS, UNITS), "output": (UNITS, 1)}
        kernels = {
            name: 0.1 * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        kernels["recurrent"] = jnp.linalg.qr(kernels["recurrent"])[0]
        return {**kernels, "bias": jnp.zeros(UNITS), "output_bias": jnp.zeros(1)}

    def predict(params, sequences):
        def step(h, x):
            return jnp.tanh(x @ params["input"] + h @ params["recurrent"] + params["bias"]), None

        h, _ = jax.lax.scan(
            step, jnp.zeros((sequences.shape[0], UNITS)), jnp.moveaxis(sequences, 1, 0)
        )
        return h @ params["output"] + params["output_bias"]

    def loss(params, sequences, targets):
        return jnp.mean(
            optax.sigmoid_binary_cross_entropy(predict(params, sequences)[:, 0], targets)
        )

    def draw(rng, count):
        """Sequences [count, DELAY, 2] of (a random sign, 1 where it counts) and targets [count] in
        {0, 1}."""
        signs = rng.choice([-1.0, 1.0], (count, DELAY)).astype(np.float32)
        marked = np.zeros((count, DELAY), np.float32)
        first, second = (
            rng.integers(0, DELAY // 10, count),
            rng.integers(DELAY // 10, DELAY // 2, count),
        )
        rows = np.arange(count)
        marked[rows, first] = marked[rows, second] = 1
        targets = (signs[rows, first] != signs[rows, second]).astype(np.float32)
        return jnp.asarray(np.stack([signs, marked], -1)), jnp.asarray(targets)

    def batches(seed, steps):
        rng = np.random.default_rng(seed)
        return (draw(rng, BATCH) for _ in range(steps))

    fixed = draw(np.random.default_rng(0), 1024)
    return Problem(
        definition=f"delayed XOR: two marked signs among {DELAY}, tanh recurrent network of "
        f"{UNITS} units, "
        f"orthogonal at first and small elsewhere, sigmoid cross-entropy, batch {BATCH}; solved "
        f"below 0.1",
        init=init,
        loss=loss,
        batches=batches,
        metrics={"loss": lambda params: loss(params, *fixed)},
        steps=5000,
        evaluate_every=100,
        goal=0.1,
    )
