"""A run that is killed and goes on from its checkpoint, bit for bit: model and optimizer in Orbax.

The first run saves every five steps; the second starts with another seed, restores and goes on.
Both end with the same numbers as a run that was never stopped.

python examples/resume.py [--tiny]
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

import optax_curv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
steps = 10 if parser.parse_args().tiny else 60


def fresh(seed):
    """A network and its optimizer."""
    rngs = nnx.Rngs(seed)
    net = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.tanh, nnx.Linear(16, 1, rngs=rngs))
    return net, nnx.Optimizer(net, optax_curv.kron_psgd(0.01), wrt=nnx.Param)


@nnx.jit
def step(net, optimizer, number):
    """One step on the batch of this number."""
    x = jax.random.normal(jax.random.key(number), (32, 8))
    loss = lambda net: jnp.mean((net(x)[:, 0] - jnp.sin(x.sum(1))) ** 2)  # noqa: E731
    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads)
    return value


def train(net, optimizer, start, stop, checkpointer=None, folder=None):
    """Steps from `start` to `stop`; saves after every fifth."""
    for number in range(start, stop):
        value = step(net, optimizer, number)
        if folder and (number + 1) % 5 == 0:
            state = nnx.state((net, optimizer))
            checkpointer.save(folder / str(number + 1), nnx.to_pure_dict(state))
    return float(value)


with tempfile.TemporaryDirectory() as name:
    folder, checkpointer = pathlib.Path(name), ocp.StandardCheckpointer()
    undisturbed = train(*fresh(0), 0, steps)
    train(*fresh(0), 0, steps // 2 + 2, checkpointer, folder)  # and is killed two steps later
    checkpointer.wait_until_finished()

    net, optimizer = fresh(1)
    state = nnx.state((net, optimizer))
    last = max(int(path.name) for path in folder.iterdir())
    restored = checkpointer.restore(folder / str(last), nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update((net, optimizer), state)
    resumed = train(net, optimizer, last, steps)
    print(f"undisturbed {undisturbed!r}, resumed from step {last} {resumed!r}")
    assert undisturbed == resumed
