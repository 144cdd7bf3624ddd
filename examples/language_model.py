"""A small transformer with Flax's attention, Shampoo, and parameters divided over eight devices.

`layers=` tells Shampoo which axes of an attention kernel are the rows and columns of a matrix, and
`sharding=` divides its factors and roots over the mesh. Without eight devices it makes eight of the
CPU's own.

python examples/language_model.py [--tiny]
"""

import argparse
import os
import pathlib

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_curv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
tiny = parser.parse_args().tiny
width, depth, length, steps = (16, 1, 16, 2) if tiny else (64, 3, 64, 200)

source = pathlib.Path(__file__).read_bytes()  # in earnest: your corpus
text = np.frombuffer(source * 50, np.uint8)
vocabulary, tokens = np.unique(text, return_inverse=True)


class Block(nnx.Module):
    """Attention and a perceptron, each after a normalisation."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(width, 4 * width, rngs=rngs),
            nnx.Linear(4 * width, width, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Next-token prediction."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(len(vocabulary), width, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (length, width)) * 0.02)
        self.blocks = nnx.List([Block(rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, len(vocabulary), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, batch):
    """Cross-entropy of the next token."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def batch(number):
    """Windows of the text."""
    starts = np.random.default_rng(number).integers(len(tokens) - length - 1, size=16)
    return np.stack([tokens[i : i + length + 1] for i in starts])


mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
model = Transformer(nnx.Rngs(0))
layers = optax_curv.find_layers(loss, model, batch(0))


def divided(x):
    """Fully sharded: the first axis that eight divides is split."""
    axis = next((i for i, size in enumerate(x.shape) if size % 8 == 0), None)
    spec = P() if axis is None else P(*[None] * axis, "data")
    return jax.device_put(x, NamedSharding(mesh, spec))


nnx.update(model, jax.tree.map(divided, nnx.state(model, nnx.Param)))
tx = optax_curv.shampoo(0.02, layers=layers, sharding=mesh)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, batch):
    """One step."""
    value, grads = nnx.value_and_grad(loss)(model, batch)
    optimizer.update(model, grads)
    return value


rows = NamedSharding(mesh, P("data"))
for number in range(steps):
    value = step(model, optimizer, jax.device_put(batch(number), rows))
    if number % 20 == 0 or number == steps - 1:
        print(f"step {number}: {value:.3f}")
