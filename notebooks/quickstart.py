# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From Adam to curvature in three lines
#
# You have a Flax network, a loss and `optax.adam`. This notebook replaces Adam by Shampoo and by Kronecker PSGD, which
# need nothing but gradients, and by K-FAC, which also looks at the layers; first in nnx, then in linen.

# %%
import os
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

STEPS = 150 if os.environ.get("OPTAX_CURV_FAST") == "1" else 300
COLOURS = {"Adam": "#888888", "Muon": "#56B4E9", "shampoo": "#0072B2", "kron_psgd": "#009E73", "kfac": "#D55E00"}
plt.rc("axes", titlelocation="left", grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.25)

images, labels = load_digits(return_X_y=True)  # 1797 handwritten digits of 8 × 8 pixels
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
batches = jax.random.randint(jax.random.key(0), (STEPS, 128), 0, len(images))  # the same for every method

# %% [markdown]
# ## nnx
#
# The loss is any function of the model and a batch; nothing in it knows of curvature. A step with **Adam** is the
# usual one. To drop in `optax_curv.shampoo(0.05)` or `optax_curv.kron_psgd(0.03)` change the optimizer and nothing
# else; Shampoo is the one we would try first.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def step(model, optimizer, x, y):
    value, grads = nnx.value_and_grad(loss)(model, x, y)
    optimizer.update(model, grads)
    return value


# %% [markdown]
# With **K-FAC** the layers are found once, by tracing the loss; then the same backward pass that makes the gradients
# also makes the curvature, and `update` takes it. One line more, two lines changed.

# %%
layers = optax_curv.find_layers(loss, Net(nnx.Rngs(0)), images[:128], labels[:128])
print(layers)


@nnx.jit
def kfac_step(model, optimizer, x, y):
    value, grads, curvature = optax_curv.value_grad_and_curvature(loss, layers=layers)(model, x, y)
    optimizer.update(model, grads, curvature=curvature)
    return value


# %% [markdown]
# Each method is an `optax.GradientTransformation`: `scale_by_kron_psgd` goes into a chain beside what Optax has, and
# `kfac` is such a chain already. The learning rates are the best of 0.01, 0.02, 0.03, 0.05, 0.1 for each.


# %%
def cosine(peak):
    return optax.cosine_decay_schedule(peak, STEPS)


kron_psgd = optax.chain(
    optax_curv.scale_by_kron_psgd(0.5, b1=0.9),
    optax.clip_by_block_rms(2.0),
    optax.add_decayed_weights(1e-4),
    optax.scale_by_learning_rate(cosine(0.03)),
)
methods = {
    "Adam": (optax.adam(cosine(0.05)), step),
    "Muon": (optax.contrib.muon(cosine(0.05)), step),
    "shampoo": (optax_curv.shampoo(cosine(0.05)), step),
    "kron_psgd": (kron_psgd, step),
    "kfac": (optax_curv.kfac(cosine(0.05), layers, damping=0.01), kfac_step),
}
runs = {name: (Net(nnx.Rngs(0)), function) for name, (_, function) in methods.items()}
optimizers = {name: nnx.Optimizer(runs[name][0], tx, wrt=nnx.Param) for name, (tx, _) in methods.items()}
curves, seconds = {name: [] for name in methods}, {name: [] for name in methods}
for rows in batches:
    for name, (model, function) in runs.items():  # side by side, so that all see the same load of the machine
        start = time.perf_counter()
        curves[name].append(float(function(model, optimizers[name], images[rows], labels[rows])))
        seconds[name].append(time.perf_counter() - start)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
window = 15
for name, curve in curves.items():
    smooth = np.exp(np.convolve(np.log(curve), np.full(window, 1 / window), mode="valid"))
    x = np.arange(window, STEPS + 1)
    for axes, x_here in ((left, x), (right, x * np.median(seconds[name]))):
        axes.semilogy(x_here, smooth, color=COLOURS[name], lw=2)
        axes.annotate(name, (x_here[-1], smooth[-1]), (4, -3), textcoords="offset points", color=COLOURS[name])
left.set(xlabel="step", ylabel="cross-entropy of a batch (nats)", title="By step")
right.set(xlabel="seconds (median step × steps, without compilation)", title="By time")

# %% [markdown]
# What to see: lower is better; the curves are geometric means over 15 batches, from the same weights on the same
# batches. Right, the price of a step: on a network this small Python and the dispatch of kernels weigh as much as the
# arithmetic of either method.

# %% [markdown]
# ## linen
#
# The same two lines. A chain's `update` takes the curvature directly.

# %%
net = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(10)])
params = net.init(jax.random.key(0), images[:1])


def linen_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()


layers = optax_curv.find_layers(linen_loss, params, images[:128], labels[:128])
optimizer = optax_curv.kfac(cosine(0.05), layers, damping=0.01)


@jax.jit
def linen_step(params, state, x, y):
    value, grads, curvature = optax_curv.value_grad_and_curvature(linen_loss, layers=layers)(params, x, y)
    updates, state = optimizer.update(grads, state, params, curvature=curvature)
    return optax.apply_updates(params, updates), state, value


state = optimizer.init(params)
for rows in batches:
    params, state, value = linen_step(params, state, images[rows], labels[rows])
print(f"loss of the last batch after {STEPS} steps: {value:.5f}")
