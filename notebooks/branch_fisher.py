# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From state branches to natural gradient
#
# A branch method takes K samples of a D-dimensional state that the parameters drive, and uses their
# covariance as the metric of the step. What maps the state to the parameters, the projection P,
# decides whether that means anything: drawn at random it means nothing, and as the state's Jacobian
# it makes the step a natural gradient.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optax_curv

jax.config.update("jax_enable_x64", True)  # λ is small in the last picture
GREY, ORANGE, BLUE, GREEN = "#888888", "#D55E00", "#0072B2", "#009E73"
plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)

# %% [markdown]
# ## A state of two numbers
#
# The state is a normal distribution, s = (μ, log σ); the loss its cross-entropy to a target. The
# branches are samples of the score ∂(-log p(x))/∂s, x drawn from the state itself: their covariance
# is the Fisher information of s.

# %%
TARGET = (2.0, 0.5)  # μ, σ
z = jax.random.normal(jax.random.key(0), (1024,))
z = (z - z.mean()) / z.std()


def loss(s):
    return s[1] + (TARGET[1] ** 2 + (TARGET[0] - s[0]) ** 2) / (2 * jnp.exp(2 * s[1]))


def branches_at(s):
    """∂(-log p(x))/∂μ = -(x - μ)/σ² and ∂(-log p(x))/∂log σ = 1 - (x - μ)²/σ², at x = μ + σ z:
    [1024, 2]."""
    return jnp.stack([-z / jnp.exp(s[1]), 1 - z**2], axis=1)


# %% [markdown]
# ## Fresh random projections average to a multiple of the gradient
#
# The published methods move along P (C + λI)⁻¹ Pᵀ g, where C is the branches' covariance and P is
# Gaussian with variance 1/D, drawn afresh at every step. Over the draws E[P M⁻¹ Pᵀ] = tr(M⁻¹)/D ·
# I: on average the direction is the gradient times a number, whatever the samples say. The
# curvature only adds noise.

# %%
draws, damping = 10000, 0.1
start = jnp.array([0.0, 0.9])
grad, branches = jax.grad(loss)(start), branches_at(start)


def directions(grad, branches, **options):
    """One direction for each of many keys: [draws, n]."""
    # In a tree, as branches beside one vector of the same length are rows in parameter space.
    grads = {"theta": grad}

    def direction(key):
        method = optax_curv.scale_by_branch_fisher(damping, solver="cholesky", key=key, **options)
        return method.update(grads, method.init(grads), grads, branches=branches)[0]["theta"]

    return np.array(jax.jit(jax.vmap(direction))(jnp.arange(draws)))


original = directions(grad, branches, complement=False)
predicted = np.trace(np.linalg.inv(np.cov(branches.T) + damping * np.eye(2))) / 2 * np.array(grad)
pulled_back = optax_curv.scale_by_branch_fisher(damping)
natural = (
    pulled_back.update(grad, pulled_back.init(grad), branches=branches, projection=jnp.eye(2))[0]
    / damping
)

many = jax.random.normal(jax.random.key(1), (12, 4)) * jnp.array(
    [10.0, 3.0, 1.0, 0.3]
)  # branches of another state
long_grad = jax.random.normal(jax.random.key(2), (50,))  # for 50 parameters

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.scatter(*-original.T, s=5, color=GREY, alpha=0.4, lw=0)
for arrow, colour, width, text in (
    (-original.mean(0), "black", 5, ""),
    (-predicted, BLUE, 2, "mean of the draws (black), and\ntr(M⁻¹)/D · gradient (blue)"),
    (-natural, ORANGE, 2.5, "natural gradient"),
):
    left.annotate(
        "",
        arrow,
        (0, 0),
        arrowprops={"color": colour, "arrowstyle": "-|>", "lw": width, "shrinkA": 0},
    )
    left.annotate(
        text, arrow, (6, -4), textcoords="offset points", color=colour, va="top", weight="bold"
    )
left.set(
    xlim=(-1, 3.2), ylim=(-2, 0.8), aspect="equal", xlabel="change of μ", ylabel="change of log σ"
)
left.set_title("One step from μ = 0, σ = 2.5 towards μ = 2, σ = 0.5")
bins = np.linspace(-0.1, 1, 80)
for options, colour, text in (
    ({"complement": False}, GREY, "original"),
    ({}, GREEN, "complement kept"),
):
    found = directions(long_grad, many, **options)
    cosines = found @ long_grad / np.linalg.norm(found, axis=1) / jnp.linalg.norm(long_grad)
    counts, _, _ = right.hist(np.array(cosines), bins, color=colour, alpha=0.85)
    place = (bins[counts.argmax()], counts.max())
    right.annotate(
        text, place, (-4, 4), textcoords="offset points", color=colour, ha="right", weight="bold"
    )
_ = right.set(
    xlabel="cosine between direction and gradient",
    ylabel="draws",
    title="50 parameters, a state of 4",
)

# %% [markdown]
# What to see. Left: single draws (grey) go anywhere, their mean along the gradient as the formula
# says, and neither where the natural gradient goes. Right: a P of rank 4 sees little of 50
# parameters. With `complement=True`, the default, what it cannot see passes unchanged, so that a
# random P does little harm; but it still knows nothing.

# %% [markdown]
# ## The state's Jacobian as the projection
#
# With P = Jᵀ, J = ∂s/∂θ, the metric λI + Jᵀ C J is the state's own, pulled back to the parameters.
# A natural gradient then does not care how the state is parametrised. Three parametrisations of the
# same normal distribution, and three starts:

# %%
parametrisations = {  # name: (state of θ, θ of μ and σ)
    "μ, log σ": (lambda t: t, lambda mean, sigma: (mean, jnp.log(sigma))),
    "μ, 1/σ²": (
        lambda t: jnp.stack([t[0], -0.5 * jnp.log(t[1])]),
        lambda mean, sigma: (mean, sigma**-2),
    ),
    "μ/σ², 1/σ²": (
        lambda t: jnp.stack([t[0] / t[1], -0.5 * jnp.log(t[1])]),
        lambda mean, sigma: (mean * sigma**-2, sigma**-2),
    ),
}
starts = [(-1.0, 2.0), (0.0, 0.6), (3.5, 2.4)]
steps, small = 2000, 1e-8


def path(state_of, parameters, natural):
    """μ and σ along a descent in small steps: [steps, 2]."""
    method = optax_curv.scale_by_branch_fisher(small)
    rate = 8.0 / steps

    def step(carry, _):
        theta, state = carry
        grad, jacobian = jax.grad(lambda t: loss(state_of(t)))(theta), jax.jacobian(state_of)(theta)
        s = state_of(theta)
        pulled_back, state = method.update(
            grad, state, branches=branches_at(s), projection=jacobian.T
        )
        direction = pulled_back / small if natural else grad  # pulled back: λ (λI + JᵀCJ)⁻¹ g
        return (theta - rate * direction, state), jnp.stack([s[0], jnp.exp(s[1])])

    return jax.lax.scan(step, (parameters, method.init(parameters)), None, steps)[1]


# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharex=True, sharey=True, layout="constrained")
mean, sigma = np.meshgrid(np.linspace(-1.6, 4.4, 200), np.linspace(0.25, 3.1, 200))
for axes, natural in zip(panels, (False, True), strict=True):
    axes.contour(
        mean,
        sigma,
        np.log(loss((mean, np.log(sigma))) + np.log(2)),
        12,
        colors=GREY,
        linewidths=0.6,
        alpha=0.6,
    )
    for (name, (state_of, of_state)), colour, width in zip(
        parametrisations.items(), (BLUE, ORANGE, GREEN), (7, 4, 1.5), strict=True
    ):
        descend = jax.jit(jax.vmap(path, (None, 0, None)), static_argnums=(0, 2))
        paths = descend(state_of, jnp.array([of_state(*s) for s in starts]), natural)
        axes.plot(*np.array(paths).T, color=colour, lw=width if natural else 2.5)
        axes.plot([], color=colour, lw=3, label=name)
    axes.plot(*np.transpose(starts), "o", color="black")
    axes.plot(*TARGET, "*", color="black", ms=14)
    axes.set(xlim=(-1.6, 4.4), ylim=(0.25, 3.1), xlabel="mean μ of the state")
    axes.set(title="natural gradient, P = Jᵀ" if natural else "gradient descent")
panels[0].set_ylabel("standard deviation σ of the state")
_ = panels[0].legend(frameon=False, title="parameters")

# %% [markdown]
# What to see: from a dot, gradient descent takes another way to the star in every parametrisation,
# and the natural gradient the same one in all three (wide, narrower and thin lines on top of each
# other).
