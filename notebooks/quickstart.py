# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From Adam to curvature in three lines
#
# You have a Flax network, a loss and `optax.adam`. This notebook replaces Adam by Shampoo and by
# Kronecker PSGD, which need nothing but gradients, and by K-FAC, which also looks at the layers:
# first in nnx, then in linen with a race of all of them.

# %%
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_curv

STEPS = 300
COLOURS = {
    "adam": "#888888",
    "muon": "#CC79A7",
    "shampoo": "#0072B2",
    "kron_psgd": "#009E73",
    "kfac": "#D55E00",
}
plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)

images, labels = load_digits(return_X_y=True)  # 1797 handwritten digits of 8 × 8 pixels
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
batches = jax.random.randint(
    jax.random.key(0), (STEPS, 128), 0, len(images)
)  # the same for every method

# %% [markdown]
# ## nnx
#
# The loss is any function of the model and a batch; nothing in it knows of curvature. With Adam a
# step is
#
# ```python
# optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
#
# @nnx.jit
# def step(model, optimizer, x, y):
#     value, grads = nnx.value_and_grad(loss)(model, x, y)
#     optimizer.update(model, grads)
#     return value
# ```
#
# For `optax_curv.shampoo(0.05)`, the one we would try first, or `optax_curv.kron_psgd(0.03)` put it
# in the place of `optax.adam(0.05)`. For K-FAC the layers are found once, by tracing the loss; then
# the backward pass that makes the gradients also makes the curvature, and `update` takes it: one
# line more, two changed.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.logits(jnp.tanh(self.hidden(x)))


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loss(model, x, y):
    return cross_entropy(model(x), y)


model = Net(nnx.Rngs(0))
layers = optax_curv.find_layers(loss, model, images[:128], labels[:128])
optimizer = nnx.Optimizer(model, optax_curv.kfac(0.03, layers, damping=0.01), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, x, y):
    value, grads, curvature = optax_curv.value_grad_and_curvature(loss, layers=layers)(model, x, y)
    optimizer.update(model, grads, curvature=curvature)
    return value


for rows in batches:
    value = step(model, optimizer, images[rows], labels[rows])
print(layers)
print(f"loss of the last of {STEPS} batches: {value:.5f}")

# %% [markdown]
# ## linen
#
# The same lines, with a tree of parameters. Each method is an `optax.GradientTransformation`:
# `scale_by_kron_psgd` goes into a chain beside what Optax has, and `shampoo` and `kfac` are such
# chains already. The learning rates are good ones for one seed, found by hand between 0.01 and 0.1.

# %%
net = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(10)])
start = net.init(jax.random.key(0), images[:1])


def linen_loss(params, x, y):
    return cross_entropy(net.apply(params, x), y)


def cosine(peak):
    return optax.cosine_decay_schedule(peak, STEPS)


layers = optax_curv.find_layers(linen_loss, start, images[:128], labels[:128])
kron_psgd = optax.chain(
    optax_curv.scale_by_kron_psgd(0.5, b1=0.9),
    optax.clip_by_block_rms(2.0),
    optax.scale_by_learning_rate(cosine(0.03)),
)
methods = {
    "adam": optax.adam(cosine(0.05)),
    "muon": optax.contrib.muon(cosine(0.05)),
    "shampoo": optax_curv.shampoo(cosine(0.05)),
    "kron_psgd": kron_psgd,
    "kfac": optax_curv.kfac(cosine(0.05), layers, damping=0.01),
}


def step_of(method, measure):
    @jax.jit
    def step(params, state, x, y):
        value, grads, *curvature = measure(params, x, y)
        extra_args = {"curvature": curvature[0]} if curvature else {}
        updates, state = method.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, value

    return step


measures = {name: jax.value_and_grad(linen_loss) for name in methods}
measures["kfac"] = optax_curv.value_grad_and_curvature(linen_loss, layers=layers)
runs = {name: [step_of(tx, measures[name]), start, tx.init(start)] for name, tx in methods.items()}
curves, seconds = {name: [] for name in methods}, {name: [] for name in methods}
for rows in batches:
    for name, (
        step,
        *carry,
    ) in runs.items():  # side by side, so that all see the same load of the machine
        begin = time.perf_counter()
        *runs[name][1:], value = step(*carry, images[rows], labels[rows])
        curves[name].append(float(value))
        seconds[name].append(time.perf_counter() - begin)

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for name, curve in curves.items():
    smooth = np.exp(np.convolve(np.log(curve), np.full(15, 1 / 15), mode="valid"))
    steps = np.arange(15, STEPS + 1)
    for axes, x in ((left, steps), (right, steps * np.median(seconds[name]))):
        axes.semilogy(x, smooth, color=COLOURS[name], lw=2)
    offset = (4, {"kfac": 2, "shampoo": -8}.get(name, -3))
    end = (steps[-1], smooth[-1])
    left.annotate(name, end, offset, textcoords="offset points", color=COLOURS[name])
left.grid(alpha=0.25)
right.grid(alpha=0.25)
left.set(xlabel="step", ylabel="cross-entropy of a batch (nats)", title="By step")
_ = right.set(xlabel="seconds (steps × median step, without compilation)", title="By time")

# %% [markdown]
# What to see: lower is better; the curves are geometric means over 15 batches, from the same
# weights on the same batches. Right, the price of a step: the smaller the network, the more of it
# is the dispatch of small kernels.
