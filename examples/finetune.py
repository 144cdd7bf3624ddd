"""Fine-tuning: the backbone stays as it is, the head is trained with K-FAC, then all with Shampoo.

First the loss is a function of the head alone, so that no factor of a frozen layer is measured.
Then `optax.partition` lets the backbone follow at a tenth of the rate.

python examples/finetune.py [--tiny]
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_curv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
steps = 3 if parser.parse_args().tiny else 200

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)


class Net(nnx.Module):
    """A backbone and a head."""

    def __init__(self, rngs):
        self.backbone = nnx.Sequential(
            nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 32, rngs=rngs), nnx.relu
        )
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.backbone(x))


def loss_of(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


net = Net(nnx.Rngs(0))  # in earnest: restored from a checkpoint
loss = lambda net, x, y: loss_of(net(x), y)  # noqa: E731
print(f"before: {loss(net, images, labels):.3f}")

# The head: what the backbone makes of the images is its input.
head_loss = lambda head, x, y: loss_of(head(x), y)  # noqa: E731
features = net.backbone(images)
layers = optax_curv.find_layers(head_loss, net.head, features, labels)
capture = optax_curv.value_grad_and_curvature(head_loss, layers=layers)
optimizer = nnx.Optimizer(net.head, optax_curv.kfac(0.1, layers), wrt=nnx.Param)


@nnx.jit
def train_head(head, optimizer, x, y):
    value, grads, curvature = capture(head, x, y)
    optimizer.update(head, grads, curvature=curvature)
    return value


for _ in range(steps):
    train_head(net.head, optimizer, features, labels)
print(f"head trained: {loss(net, images, labels):.3f}")


# All of it: the backbone at a tenth of the rate. Frozen for good would be `optax.set_to_zero()`.
def parts(params):
    return jax.tree.map_with_path(lambda path, _: path[0].key, params)


tx = optax.partition(
    {"backbone": optax_curv.shampoo(1e-3), "head": optax_curv.shampoo(1e-2)}, parts
)
optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)


@nnx.jit
def train(net, optimizer, x, y):
    value, grads = nnx.value_and_grad(loss)(net, x, y)
    optimizer.update(net, grads)
    return value


for _ in range(steps):
    value = train(net, optimizer, images, labels)
print(f"all trained: {value:.3f}")
