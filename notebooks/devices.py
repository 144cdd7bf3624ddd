# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Eight devices, one training run
#
# The curvature is an ordinary tree of arrays, made in the same backward pass as the gradients. So
# data parallelism is JAX's own: shard the batch, replicate the parameters, and compile the same
# step. No method here knows of devices. The eight are forced onto this machine's processor.

# %%
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from sklearn.datasets import load_digits

import optax_curv

STEPS = 200
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"
plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
rows = np.random.default_rng(0).integers(0, len(images), (STEPS, 128))
params = {
    name: {"w": jax.random.normal(jax.random.key(n), (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
    for name, m, n in (("first", 64, 48), ("second", 48, 32), ("third", 32, 10))
}


def loss(params, x, y):
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
    logits = x @ params["third"]["w"] + params["third"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


layers = optax_curv.find_layers(loss, params, images[:128], labels[:128])
measure = optax_curv.value_grad_and_curvature(loss, layers=layers)
optimizer = optax_curv.kfac(0.03, layers, damping=0.01)


def step(params, state, x, y):
    value, grads, curvature = measure(params, x, y)
    updates, state = optimizer.update(grads, state, params, curvature=curvature)
    return optax.apply_updates(params, updates), state, value


# %% [markdown]
# ## The only change: where the arrays live

# %%
mesh = Mesh(np.array(jax.devices()), ("examples",))
split, whole = NamedSharding(mesh, PartitionSpec("examples")), NamedSharding(mesh, PartitionSpec())
one_device = SingleDeviceSharding(jax.devices()[0])


def train(batch_sharding, state_sharding):
    """The losses, all parameters after every step, the first images, and the compiled step."""

    def batch(i):
        return jax.device_put((images[rows[i]], labels[rows[i]]), batch_sharding)

    carry = jax.device_put((params, optimizer.init(params)), state_sharding)
    compiled = jax.jit(step, out_shardings=state_sharding).lower(*carry, *batch(0)).compile()
    losses, path = [], []
    for i in range(STEPS):
        *carry, value = compiled(*carry, *batch(i))
        losses.append(float(value))
        path.append(ravel_pytree(carry[0])[0])
    return np.array(losses), np.array(path), batch(0)[0], compiled.as_text()


losses_8, path_8, batch, program = train(split, whole)
losses_1, path_1, *_ = train(one_device, one_device)

# %% [markdown]
# ## Who holds what, and what travels
#
# The compiler puts one all-reduce into the step: the sums over examples are the only places where
# devices must speak. We read from the compiled program what it carries, and count what it should.

# %%
carried = [line for line in program.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
shapes = re.findall(r"f32\[([\d,]*)\]", "".join(line.split(" all-reduce")[0] for line in carried))
travelled = 4 * sum(int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes)
_, grads, curvature = jax.eval_shape(measure, params, images[:128], labels[:128])
parts = {
    "gradients": 4 * sum(x.size for x in jax.tree.leaves(grads)),
    "input factors": 4 * sum(f.input_factor.size for f in curvature.values()),
    "output factors": 4 * sum(f.output_factor.size for f in curvature.values()),
}
print(
    f"{len(carried)} all-reduce of {travelled} bytes; gradients, factors and the loss are "
    f"{sum(parts.values()) + 4}"
)

# %% tags=["hide-input"]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
figure.get_layout_engine().set(wspace=0.08)
picture = np.ones((128, 64, 3))
for place, shard in enumerate(batch.addressable_shards):
    ink = np.asarray(shard.data)[..., None]
    picture[shard.index[0]] = 1 - ink * (1 - np.array(plt.get_cmap("Dark2")(place)[:3]))
    left.text(
        65,
        16 * place + 8,
        f"device {shard.device.id}",
        va="center",
        color=plt.get_cmap("Dark2")(place),
    )
left.imshow(picture, aspect="auto", interpolation="none")
left.set(xlabel="pixel", ylabel="example", title="The batch: 16 images on each device")

bottom = 0
for (name, size), colour in zip(parts.items(), (GREY, ORANGE, "#E69F00"), strict=True):
    middle.bar(0, size / 1000, bottom=bottom / 1000, color=colour, width=0.6)
    middle.text(
        0.35, (bottom + size / 2) / 1000, f"{name}\n{size / 1000:.1f} kB", va="center", color=colour
    )
    bottom += size
middle.axhline(travelled / 1000, color="black", ls=":", xmax=0.45)
middle.text(0.35, travelled / 1000, "in the compiled program", va="center")
middle.set(
    xlim=(-0.4, 1.2), xticks=[], ylabel="kB in the all-reduce of one step", title="What travels"
)

right.semilogy(losses_1, color=ORANGE, lw=5, alpha=0.5)
right.semilogy(losses_8, color=BLUE, lw=1.5)
right.semilogy(np.abs(path_8 - path_1).max(axis=1) + 1e-10, color=GREY, lw=1.5)
right.text(STEPS / 2, 4, "loss on 1 (orange) and 8 devices (blue)", ha="center")
right.text(STEPS / 2, 1e-7, "largest difference of any parameter", ha="center", color=GREY)
_ = right.set(
    xlabel="step",
    ylabel="nats, or units of the parameters",
    title="Equal up to rounding",
    ylim=(1e-8, 10),
)

# %% [markdown]
# What to see. Left: every device has its own rows, and everything else is whole on all of them.
# Middle: the factors travel with the gradients, in the same reduction. Right: both runs lie on each
# other; their parameters differ by the order in which float32 numbers are added.
