"""A sweep of learning rate and damping on one device: `jax.vmap` of a whole training run.

Every number of a transformation may be traced, so that all runs are one program, compiled once.

python examples/sweep.py [--tiny]
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optax_curv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
steps = 3 if parser.parse_args().tiny else 100

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)


def start(key):
    """A network of two layers."""
    first, second = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(first, (64, 32)) / 8, "b": jnp.zeros(32)},
        "out": {"w": jax.random.normal(second, (32, 10)) / 6, "b": jnp.zeros(10)},
    }


def loss(params, x, y):
    """Cross-entropy."""
    hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = hidden @ params["out"]["w"] + params["out"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


layers = optax_curv.find_layers(loss, start(jax.random.key(0)), images, labels)
capture = optax_curv.value_grad_and_curvature(loss, layers=layers)


def run(learning_rate, damping):
    """The loss of every step of one run."""
    tx = optax_curv.kfac(learning_rate, layers, damping)

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, 1797, (128,))
        value, grads, curvature = capture(params, images[rows], labels[rows])
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state), value

    params = start(jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[1]


rates, dampings = jnp.array([0.03, 0.1, 0.3]), jnp.array([1e-3, 1e-2, 1e-1])
every_damping = jax.vmap(run, in_axes=(None, 0))
losses = jax.jit(jax.vmap(every_damping, in_axes=(0, None)))(rates, dampings)
last = losses[..., -10:].mean(-1)
print("last loss    " + "  ".join(f"damping {d:<5g}" for d in dampings))
for rate, row in zip(rates, last, strict=True):
    print(f"rate {rate:<7g} " + "  ".join(f"{x:<13.4f}" for x in row))
best = jnp.unravel_index(jnp.argmin(last), last.shape)
print(f"best: rate {rates[best[0]]:g}, damping {dampings[best[1]]:g}")
