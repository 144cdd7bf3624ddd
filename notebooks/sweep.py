# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Sixty-four training runs in one call
#
# A method of this package is a pure function of its hyper-parameters: learning rate, damping and
# the preconditioner's own learning rate may be tracers. So a sweep is `jax.vmap` of a whole
# training run, and `jax.lax.scan` makes that run one function.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_curv

STEPS = 200
plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
batches = jax.random.randint(jax.random.key(0), (STEPS, 64), 0, len(images))
first, second = jax.random.split(jax.random.key(1))
params = {
    "hidden": {"w": jax.random.normal(first, (64, 32)) / 8, "b": jnp.zeros(32)},
    "output": {"w": jax.random.normal(second, (32, 10)) / 6, "b": jnp.zeros(10)},
}


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = hidden @ params["output"]["w"] + params["output"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# %% [markdown]
# The whole of a training run, from three numbers to a loss:


# %%
def train(learning_rate, damping, precond_lr):
    """The loss over all images after training."""
    optimizer = optax.chain(
        optax_curv.scale_by_kron_psgd(precond_lr, b1=0.9, damping=damping),
        optax.clip_by_block_rms(2.0),
        optax.scale_by_learning_rate(learning_rate),
    )

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(loss)(params, images[rows], labels[rows])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return loss(trained, images, labels)


learning_rates = jnp.array([0.01, 0.03, 0.1, 0.3])
dampings = jnp.array([1e-4, 1e-3, 1e-2, 1e-1])
precond_lrs = jnp.array([0.03, 0.1, 0.3, 1.0])
grid = [
    axis.ravel() for axis in jnp.meshgrid(learning_rates, dampings, precond_lrs, indexing="ij")
]  # 64 of each


def seconds(function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


compile_sweep, sweep = seconds(lambda: jax.jit(jax.vmap(train)).lower(*grid).compile())
run_sweep, losses = seconds(sweep, *grid)
losses = np.array(losses).reshape(4, 4, 4)

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 4, figsize=(11, 3.4), sharey=True, layout="constrained")
shades = plt.Normalize(np.log10(losses.min()), np.log10(np.nanmax(losses)))
for k, axes in enumerate(panels):
    picture = axes.imshow(
        np.log10(losses[:, :, k].T), cmap="viridis_r", norm=shades, origin="lower"
    )
    for i, j in np.ndindex(4, 4):
        best = losses[i, j, k] == losses.min()
        text = f"{losses[i, j, k]:.3f}"
        colour = "black" if shades(np.log10(losses[i, j, k])) < 0.5 else "white"
        axes.text(
            i,
            j,
            text,
            ha="center",
            va="center",
            size=8,
            color=colour,
            weight="bold" if best else None,
        )
        if best:
            axes.add_patch(
                plt.Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, color="#D55E00", lw=3)
            )
    axes.set_xticks(range(4), [f"{x:g}" for x in learning_rates])
    axes.set_yticks(range(4), [f"{x:g}" for x in dampings])
    axes.set(xlabel="learning rate", title=f"precond_lr {precond_lrs[k]:g}")
panels[0].set_ylabel("damping")
_ = figure.colorbar(picture, ax=panels, shrink=0.75, label="log10 of the loss (nats)")

# %% [markdown]
# What to see: lighter is better, and the frame is the best of all 64 runs. Along a row the learning
# rate decides. From left to right the preconditioner follows faster and bears larger steps; a
# damping of 0.1 hides the gradients from it, so that it does less, and needs larger steps too.

# %% [markdown]
# ## What it cost
#
# Against a loop that calls one compiled run 64 times, and against the loop most of us write first,
# in which the numbers are constants of the program, and every run compiles anew.

# %%
compile_one, one = seconds(lambda: jax.jit(train).lower(*[x[0] for x in grid]).compile())
run_one = [seconds(one, *[x[i] for x in grid])[0] for i in range(64)]
bars = {
    "one vmap": (compile_sweep, run_sweep),
    "64 calls of one program": (compile_one, sum(run_one)),
    "64 programs (64 × one)": (compile_one * 64, sum(run_one)),
}

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(10, 2.2), sharey=True, layout="constrained")
for axes, title, times in zip(
    panels, ("compiling", "running"), zip(*bars.values(), strict=True), strict=True
):
    axes.barh(range(3), times, color=("#D55E00", "#0072B2", "#888888"), height=0.6)
    for place, seconds_spent in enumerate(times):
        axes.text(seconds_spent, place, f" {seconds_spent:,.1f} s", va="center")
    axes.set(title=f"64 training runs: {title}", xlabel="seconds on this machine")
    axes.set_xlim(0, max(times) * 1.25)
panels[0].set_yticks(range(3), bars)
_ = panels[0].invert_yaxis()

# %% [markdown]
# What to see: the sweep compiles once, in the time of one or two single runs, and 64 runs side by
# side share every kernel call, of which a small network is all overhead. On an accelerator that one
# such run leaves idle the blue bar is longer still.
