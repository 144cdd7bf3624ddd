"""A residual network with batch normalisation in Flax linen, trained with K-FAC.

Batch statistics go in as an argument and come out as auxiliary output; `optax_curv.flax.TrainState`
forwards the curvature. Convolutions, scales and biases are layers; `print(layers)` shows them.

python examples/linen_resnet.py [--tiny]
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_curv
from optax_curv.flax import TrainState

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
tiny = parser.parse_args().tiny
width, epochs, batch = (4, 1, 512) if tiny else (32, 10, 128)


class ResNet(nn.Module):
    """Two residual blocks on 8 × 8 images."""

    @nn.compact
    def __call__(self, x, train=True):
        def norm():
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)

        x = nn.relu(norm()(nn.Conv(width, (3, 3), use_bias=False)(x)))
        for features in (width, 2 * width):
            y = nn.relu(norm()(nn.Conv(features, (3, 3), use_bias=False)(x)))
            y = norm()(nn.Conv(features, (3, 3), use_bias=False)(y))
            x = nn.Conv(features, (1, 1))(x) if features != width else x
            x = nn.max_pool(nn.relu(x + y), (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


digits = load_digits()
images = np.asarray(digits.images[..., None] / 16, np.float32)
labels = np.asarray(digits.target)
held_out = slice(0, 297)

model = ResNet()
variables = model.init(jax.random.key(0), images[:1])


class State(TrainState):
    """The training state, with the running averages of batch normalisation."""

    batch_stats: Any = None


def loss(params, x, y, batch_stats):
    """Cross-entropy, and the new batch statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = model.apply(variables, x, mutable=["batch_stats"])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return value, new["batch_stats"]


example = images[:batch], labels[:batch], variables["batch_stats"]
layers = optax_curv.find_layers(lambda *args: loss(*args)[0], variables["params"], *example)
print(layers)
capture = optax_curv.value_grad_and_curvature(loss, layers=layers, has_aux=True)
tx = optax_curv.kfac(optax.cosine_decay_schedule(0.1, epochs * (1500 // batch)), layers)
state = State.create(
    apply_fn=model.apply, params=variables["params"], tx=tx, batch_stats=example[2]
)


@jax.jit
def step(state, x, y):
    """One step; `curvature=` goes on to the transformation."""
    (value, stats), grads, curvature = capture(state.params, x, y, state.batch_stats)
    state = state.apply_gradients(grads=grads, curvature=curvature)
    return state.replace(batch_stats=stats), value


rng = np.random.default_rng(0)
for epoch in range(epochs):
    order = 297 + rng.permutation(1500)
    for start in range(0, 1500 - batch + 1, batch):
        rows = order[start : start + batch]
        state, value = step(state, images[rows], labels[rows])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = model.apply(variables, images[held_out], train=False)
    error = (logits.argmax(-1) != labels[held_out]).mean()
    print(f"epoch {epoch + 1}: loss {value:.4f}, held-out error {error:.1%}")
