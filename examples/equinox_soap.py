"""An Equinox model with SOAP: a model is a tree, so `eqx.filter_jit` and friends are all it takes.

python examples/equinox_soap.py [--tiny]
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optax_curv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
steps = 3 if parser.parse_args().tiny else 300

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))


def loss(model, x, y):
    """Cross-entropy; Equinox models see one example."""
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# SOAP keeps its moments for arrays; activation functions are leaves of the model and no parameters.
params = eqx.filter(model, eqx.is_inexact_array)
tx = optax_curv.soap(optax.cosine_decay_schedule(0.01, steps), weight_decay=1e-2)
opt_state = tx.init(params)
print(optax_curv.matrix_axes(params))


@eqx.filter_jit
def step(model, opt_state, x, y):
    """One step on one batch."""
    value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, value


for number in range(steps):
    rows = jax.random.choice(jax.random.key(number), 1797, (256,), replace=False)
    model, opt_state, value = step(model, opt_state, images[rows], labels[rows])
print(f"last loss {value:.4f}, on all images {loss(model, images, labels):.4f}")
