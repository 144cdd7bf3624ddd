# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two published methods that do not precondition
#
# Both originals are reproduced by this package, number for number, and both are at best plain gradient descent. This
# notebook shows why, and what the corrected rules do instead.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optax_curv

FAST = os.environ.get("OPTAX_CURV_FAST") == "1"

# %% [markdown]
# ## Fresh random projections average to a multiple of the gradient
#
# The original branch methods take K samples of a D-dimensional state, with covariance C, and move along
# P (C + λI)⁻¹ Pᵀ g, where P is Gaussian with variance 1/D and drawn afresh at every step. Over the draws,
# E[P M⁻¹ Pᵀ] = tr(M⁻¹)/D · I: on average the direction is the gradient times a number, whatever the samples say.

# %%
draws = 200 if FAST else 5000
branches = jax.random.normal(jax.random.key(1), (12, 4)) * jnp.array([10.0, 3.0, 1.0, 0.3])
grad = jnp.array([1.0, -2.0, 0.5, 0.0, 3.0])


def directions(**options):
    """One direction for each of many keys: [draws, 5]."""

    def direction(key):
        method = optax_curv.scale_by_branch_fisher(0.1, solver="cholesky", key=key, **options)
        return method.update(grad, method.init(grad), grad, branches=branches)[0]

    return jax.vmap(direction)(jnp.arange(draws))


original = directions()
factor = np.trace(np.linalg.inv(np.cov(branches.T) + 0.1 * np.eye(4))) / 4
print("mean direction / factor:", np.asarray(original.mean(0) / factor).round(2))
print("gradient:               ", np.asarray(grad))

# %% [markdown]
# A single draw is mostly noise, and across it there is nothing at all: P has rank D. With `complement=True` the part of
# the gradient that P cannot see passes unchanged, so that the direction has full rank and lies closer to it.

# %%
corrected = directions(complement=True)


def cosines(found):
    return np.asarray(found @ grad / jnp.linalg.norm(found, axis=1) / jnp.linalg.norm(grad))


figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
bins = np.linspace(-0.2, 1, 60)
axes.hist(cosines(original), bins, alpha=0.6, label="original")
axes.hist(cosines(corrected), bins, alpha=0.6, label="complement=True")
axes.set(xlabel="cosine between direction and gradient", ylabel="draws")
axes.legend()
# %% [markdown]
# ## The original Kronecker PSGD never leaves the identity
#
# It compares A = Q_L G Q_Rᵀ with B = Q_L⁻ᵀ G Q_R⁻¹ and moves Q along A Aᵀ - B Bᵀ. At Q = I both are G: the difference
# is exactly zero, and remains so for ever. The corrected rules compare against the identity or random noise instead.

# %%
steps = 50 if FAST else 1000
left, right = jnp.array([100.0, 10.0, 1.0, 0.1]), jnp.array([1.0, 0.3, 0.1, 0.03])


def train(geometry):
    """The factors' distance from the identity, and the condition of the whitened gradients, after each step."""
    method = optax_curv.scale_by_kron_psgd(0.1, geometry=geometry)

    def step(state, key):
        gradient = left[:, None] * jax.random.normal(key, (4, 4)) * right
        direction, state = method.update(gradient, state)
        moved = sum(jnp.linalg.norm(q / q[0, 0] - jnp.eye(len(q))) for q in state.factors)
        return state, (moved, direction)

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, method.init(jnp.zeros((4, 4))), keys)[1]


figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for geometry in ("right_triangular", "q0.5eq1.5"):
    moved, direction = jax.jit(train, static_argnums=0)(geometry)
    axes[0].plot(moved, label=geometry)
    axes[1].semilogy(np.sort(np.std(direction[-steps // 2 :], axis=0).ravel()), "o", label=geometry)
axes[0].set(xlabel="step", ylabel="distance of Q, scaled, from the identity")
axes[1].set(xlabel="entry of the leaf, sorted", ylabel="deviation of the preconditioned gradient")
axes[0].legend()

# %% [markdown]
# The entries differ by nearly five orders of magnitude. The original passes them on as they are; the corrected
# rule makes all of them alike.
