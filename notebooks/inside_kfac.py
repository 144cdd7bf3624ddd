# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Inside K-FAC
#
# K-FAC replaces the Fisher matrix of a layer by a Kronecker product A ⊗ G of two small matrices: A
# = E[a aᵀ] of the layer's inputs, G = E[g gᵀ] of its output gradients. Which layers there are, what
# is in the factors, what is lost, and what damping does.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_curv
from optax_curv import testing

STEPS = 400
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"
plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)

# %% [markdown]
# ## What is covered
#
# `find_layers` follows the parameters through the traced loss, and computes nothing: shapes are
# enough. Here a block with an embedding, attention, a convolution and a normalisation. A parameter
# that no layer covers would stand below the table, with the reason.


# %%
class Block(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(100, 32, rngs=rngs)
        self.heads = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.conv = nnx.Conv(32, 16, (3,), rngs=rngs)

    def __call__(self, tokens):
        return jnp.mean(self.conv(self.norm(self.heads(self.embed(tokens)))) ** 2)


graph, shapes = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(0))))
tokens = jax.ShapeDtypeStruct((8, 20), jnp.int32)
print(
    optax_curv.find_layers(
        lambda params, tokens: nnx.merge(graph, params)(tokens), nnx.as_pure(shapes), tokens
    )
)

# %% [markdown]
# ## A small network, at the start and after a short training
#
# Digits, with 12 hidden units: so few that the exact Fisher matrix can be written out.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
batches = jax.random.randint(jax.random.key(0), (STEPS, 128), 0, len(images))
start = {
    "hidden": {"kernel": jax.random.normal(jax.random.key(1), (64, 12)) / 8, "bias": jnp.zeros(12)},
    "logits": {"kernel": jax.random.normal(jax.random.key(2), (12, 10)) / 4, "bias": jnp.zeros(10)},
}


def predict(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["logits"]["kernel"] + params["logits"]["bias"]


objective = optax_curv.Objective(predict, "categorical")
layers = optax_curv.find_layers(objective, start, images[:128], labels[:128])


@jax.jit
def train(params):
    optimizer = optax_curv.kfac(optax.cosine_decay_schedule(0.05, STEPS), layers, damping=1e-2)
    measure = optax_curv.value_grad_and_curvature(objective, layers=layers)

    def step(carry, rows):
        params, state = carry
        _, grads, curvature = measure(params, images[rows], labels[rows])
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]


trained = train(start)

# %% [markdown]
# ## The Fisher block of the last layer, and what stands for it


# %%
@jax.jit
def measure(params):
    """The factors, their eigenvalues and bases, the moments in these, and the exact Fisher matrix;
    of 256 images."""
    args, exact = (params, images[:256], labels[:256]), {"layers": layers, "fisher": "exact"}
    factors = optax_curv.value_grad_and_curvature(objective, **exact)(*args)[2]
    eigen = {
        name: (jnp.linalg.eigh(f.input_factor), jnp.linalg.eigh(f.output_factor))
        for name, f in factors.items()
    }
    basis = {name: (a.eigenvectors, g.eigenvectors) for name, (a, g) in eigen.items()}
    moments = optax_curv.value_grad_and_curvature(objective, statistic="eigenbasis", **exact)(
        *args, basis=basis
    )[2]
    return factors, eigen, moments, testing.dense_fisher(objective, *args)


# %% tags=["hide-input"]
figure, panels = plt.subplots(
    2, 3, figsize=(10, 6.6), sharex=True, sharey=True, layout="constrained"
)
for row, (when, params) in zip(
    panels, {"at the start": start, f"after {STEPS} steps": trained}.items(), strict=True
):
    factors, eigen, moments, fisher = jax.tree.map(np.array, measure(params))
    order = [
        *range(len(fisher) - 120, len(fisher)),
        *range(len(fisher) - 130, len(fisher) - 120),
    ]  # the bias is last
    dense = fisher[np.ix_(order, order)]
    rotation = np.kron(*(side.eigenvectors for side in eigen["logits"]))
    kfac = np.kron(*factors["logits"][:2])
    ekfac = (rotation * moments["logits"].moments.ravel()) @ rotation.T
    limit = np.quantile(np.abs(dense), 0.99)
    for axes, name, block in zip(
        row, ("exact", "K-FAC", "EKFAC"), (dense, kfac, ekfac), strict=True
    ):
        picture = axes.imshow(block / limit, cmap="PuOr", vmin=-1, vmax=1, interpolation="none")
        error = np.linalg.norm(block - dense) / np.linalg.norm(dense)
        axes.set_title(f"exact, {when}" if block is dense else f"{name}: {error:.0%} off")
    row[0].set_ylabel("weight")
for axes in panels[1]:
    axes.set_xlabel("weight (10 outputs of 13 inputs)")
_ = figure.colorbar(
    picture, ax=panels, shrink=0.6, label="entry over the exact block's 99 % quantile"
)

# %% [markdown]
# What to see: colour is the sign and size of an entry. At the start K-FAC is the Fisher block
# almost to the eye. After training only doubtful images have curvature, inputs and output gradients
# are no longer independent, and the product that K-FAC assumes is a caricature; EKFAC, which keeps
# the eigenbasis U of A ⊗ G and measures the second moments M of the gradients along it, has the
# right sizes along the same axes.

# %% [markdown]
# ## Spectra, damping, and the moments that K-FAC gets wrong

# %% tags=["hide-input"]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for (name, sides), colour in zip(eigen.items(), (BLUE, ORANGE), strict=True):
    for side, kind, line in zip(sides, ("A", "G"), ("-", "--"), strict=True):
        values = np.maximum(side.eigenvalues[::-1], 1e-9)
        left.semilogy(
            np.arange(1, len(values) + 1),
            values,
            line,
            color=colour,
            lw=2,
            label=f"{kind} of {name}",
        )
left.set(xlabel="eigenvalue, sorted", ylabel="second moment", title="Spectra of the factors")
left.legend(frameon=False)

s_a, s_g = (side.eigenvalues for side in eigen["hidden"])
for damping, colour in ((1e-1, "#9ECAE1"), (1e-3, "#4292C6"), (1e-5, "#08519C")):
    ratio = np.sqrt(s_a.mean() / s_g.mean())  # π of the "pi" rule
    share = np.outer(s_a / (s_a + ratio * np.sqrt(damping)), s_g / (s_g + np.sqrt(damping) / ratio))
    share = np.sort(share.ravel())[::-1]
    middle.plot(
        np.linspace(0, 100, share.size), 100 * share, color=colour, lw=2, label=f"λ = {damping:g}"
    )
middle.set(xlabel="directions of the hidden layer (%)", ylabel="share of the natural gradient (%)")
middle.set_title("What damping lets through")
middle.legend(frameon=False)

product = np.maximum(np.outer(s_a, s_g), 1e-12).ravel()
measured = np.maximum(moments["hidden"].moments.ravel(), 1e-12)
right.loglog(product, measured, ".", color=GREEN, ms=4, alpha=0.6)
right.plot([1e-10, 1], [1e-10, 1], color=GREY, lw=1)
right.set(
    xlim=(1e-8, 1),
    ylim=(1e-8, 1),
    xlabel="K-FAC: product of eigenvalues",
    ylabel="EKFAC: measured moment",
)
_ = right.set_title("Second moments, hidden layer")

# %% [markdown]
# What to see. Left: the spectra fall over many decades, down to pixels that are always white.
# Middle: damping λ cuts the step where the eigenvalue is below it; with 0.1 hardly any direction
# gets its natural gradient. Right: each dot is a direction of the eigenbasis. The product of
# eigenvalues is right on average, and off by up to ten times for a single direction; EKFAC divides
# by what it has measured.
