# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # What Kronecker PSGD learns
#
# Kronecker PSGD watches gradients g go by and moves a matrix Q so that P = QᵀQ makes them white: P
# g shall have the covariance I, and then P = (E[g gᵀ])^(-1/2). One picture for two parameters, and
# one for a matrix of them.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_curv
from optax_curv import testing

STEPS = 4000
COLOURS = {
    "right_triangular": "#888888",
    "eq": "#0072B2",
    "quad4p": "#56B4E9",
    "qeq": "#CC79A7",
    "quad": "#E69F00",
    "qep": "#009E73",
    "q0.5eq1.5": "#D55E00",
}
plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)

# %% [markdown]
# ## Two parameters: a cloud becomes round
#
# Gradients with a long and a short axis, one to ten, that lie across the coordinates. A method with
# a diagonal preconditioner, such as Adam, can stretch this cloud along its coordinates only; a
# dense Q also sees the slant.

# %%
slant = jnp.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
root = (slant * jnp.array([3.0, 0.3])) @ slant.T  # the covariance's square root
moments = [0, 10, 30, 100, 1000]  # steps at which we look
method = optax_curv.scale_by_kron_psgd(0.1, max_skew=2.0)  # dense for a vector, diagonal by default
start = jnp.zeros(2)


def learn(state, key):
    """One step, on one gradient of the cloud; P before it."""
    (q,) = optax_curv.axis_factors(state, start)
    return method.update(root @ jax.random.normal(key, (2,)), state)[1], q.T @ q


keys = jax.random.split(jax.random.key(0), moments[-1] + 1)
found = np.array(jax.jit(lambda state: jax.lax.scan(learn, state, keys)[1])(method.init(start)))
found[0] = np.eye(2)  # nothing is known before the first gradient, which also sets the scale
cloud = np.array(jax.random.normal(jax.random.key(1), (700, 2)) @ root)
hue = np.arctan2(*np.linalg.solve(root, cloud.T))
circle = np.stack([np.cos(np.linspace(0, 2 * np.pi, 100)), np.sin(np.linspace(0, 2 * np.pi, 100))])

# %% tags=["hide-input"]
figure, panels = plt.subplots(
    1, 5, figsize=(11, 2.9), sharex=True, sharey=True, layout="constrained"
)
for axes, step in zip(panels, moments, strict=True):
    axes.scatter(*(found[step] @ cloud.T), s=5, c=hue, cmap="twilight", lw=0)
    axes.plot(*(2 * found[step] @ root @ circle), color="black", lw=1.5)
    axes.plot(*(2 * circle), color="black", lw=1, ls=":")
    axes.set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal", xlabel="first entry of P g")
    axes.set_title(f"after {step} steps" if step else "the gradients, P = I")
_ = panels[0].set_ylabel("second entry of P g")

# %% [markdown]
# What to see: the ellipse of two standard deviations becomes the dotted circle. Each point keeps
# the colour of its direction in the white cloud: P is symmetric, it stretches and does not rotate.
# After 1000 steps at a constant rate it still trembles, as every step believes a little in its own
# gradient; a falling `precond_lr` calms it.

# %% [markdown]
# ## A matrix of parameters: six ways to move Q, and one that stands still
#
# For a leaf of 12 × 16 there is one factor for each axis, P = P₁ ⊗ P₂. Six geometries differ in the
# group on which Q moves and in the cost of a step; all have the same fixed point. The gradients
# here have the covariance C₁ ⊗ C₂ with eigenvalues over six decades, so that P can be perfect, and
# the covariance of P g is known: P₁C₁P₁ ⊗ P₂C₂P₂.
#
# The seventh, `right_triangular`, is the published original's rule. It compares A = Q_L G Q_Rᵀ with
# B = Q_L⁻ᵀ G Q_R⁻¹ and moves Q along A Aᵀ - B Bᵀ. At Q = I both are G: the difference is zero, and
# remains so for ever.

# %%
covariances = [
    testing.matrix_with_spectrum(jax.random.key(d), jnp.geomspace(1e-3, 1.0, d)) for d in (12, 16)
]
roots = [jnp.linalg.cholesky(c) for c in covariances]


def learn_factors(geometry):
    """P₁ [steps, 12, 12] and P₂ [steps, 16, 16] after every step."""
    decay = optax.cosine_decay_schedule(0.3, STEPS)
    method = optax_curv.scale_by_kron_psgd(decay, geometry=geometry, max_skew=2.0)
    leaf = jnp.zeros((12, 16))

    def step(state, key):
        _, state = method.update(roots[0] @ jax.random.normal(key, (12, 16)) @ roots[1].T, state)
        factors = optax_curv.axis_factors(state, leaf)
        return state, factors if geometry == "quad4p" else tuple(q.T @ q for q in factors)

    keys = jax.random.split(jax.random.key(2), STEPS)
    return jax.lax.scan(step, method.init(leaf), keys)[1]


def spectra(preconditioners):
    """The eigenvalues of the covariance of P g after each step, sorted: [steps, 192]."""
    first, second = (
        np.linalg.eigvalsh(p @ c @ p) for p, c in zip(preconditioners, covariances, strict=True)
    )
    return np.sort((first[:, :, None] * second[:, None, :]).reshape(len(first), -1))


# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
steps = np.arange(1, STEPS + 1)
window = np.ones(15) / 15
for geometry, colour in COLOURS.items():
    eigenvalues = spectra(
        [np.array(p, np.float64) for p in jax.jit(learn_factors, static_argnums=0)(geometry)]
    )
    condition = np.log(eigenvalues[:, -1] / eigenvalues[:, 0])
    smooth = np.concatenate(
        [condition[:7], np.convolve(condition, window, mode="valid"), condition[-7:]]
    )
    right.loglog(steps, np.exp(smooth), color=colour, lw=2, label=geometry)
    if geometry == "q0.5eq1.5":
        for step, shade in zip((3, 10, 30, STEPS), (0.35, 0.5, 0.7, 1), strict=True):
            left.semilogy(eigenvalues[step - 1], color=colour, lw=2, alpha=shade)
            left.annotate(
                f"step {step}",
                (0, eigenvalues[step - 1, 0]),
                (-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
            )
    if geometry == "right_triangular":
        left.semilogy(eigenvalues[-1], color=colour, lw=2)
        left.text(60, 2e-5, "as they come, and after\nright_triangular", color=colour)
left.set(
    xlim=(-38, 192),
    xlabel="direction, sorted (192 of them)",
    ylabel="variance of P g along it",
    title="Spectra, q0.5eq1.5",
)
right.set(
    xlabel="step",
    ylabel="largest over smallest variance of P g",
    title="Condition number, all geometries",
)
_ = right.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))

# %% [markdown]
# What to see. Left: the directions of a gradient differ by six decades in variance; a few steps
# lift the lower ones, and in the end all are alike. Right: every geometry gets there, "qep" first,
# "eq" most slowly ("quad4p" lies under "qeq"); the original's line does not move.
