# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Solving a PDE by Gauss-Newton in the parameters
#
# A network u solves Poisson's equation -Δu = f on the unit square, u = 0 on its boundary, when its
# residuals vanish at many points. Adam stalls on such losses, whose condition is that of a
# differential operator squared. The residuals' Jacobian rows are samples of the parameters,
# "branches", and their metric is the Gauss-Newton matrix: `residual_rows` makes them and
# `levenberg_marquardt` steps with them.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_curv

jax.config.update("jax_enable_x64", True)  # errors near 1e-6 are the point
STEPS = 1000
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
plt.rcParams.update(
    {"axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False}
)


def solution(x):
    """Two waves; f follows from them, and is all that the network gets to know."""
    x, y = jnp.pi * x
    return jnp.sin(x) * jnp.sin(y) + 0.5 * jnp.sin(2 * x) * jnp.sin(3 * y)


def minus_laplacian(u, x):
    return -jnp.trace(jax.hessian(u)(x))


def network(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


axis = (np.arange(20) + 0.5) / 20
interior = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
edge = np.linspace(0, 1, 25)
boundary = jnp.asarray([point for e in edge for point in ((e, 0), (e, 1), (0, e), (1, e))])
source = jax.vmap(lambda x: minus_laplacian(solution, x))(interior)
keys = jax.random.split(jax.random.key(0), 3)
params = {
    "w1": 2 * jax.random.normal(keys[0], (2, 48)),
    "b1": jax.random.normal(keys[1], (48,)),
    "w2": jax.random.normal(keys[2], (48,)) / 7,
    "b2": jnp.zeros(()),
}

# %% [markdown]
# ## The problem is two residuals
#
# One block for the interior and one for the boundary, each a function of the parameters and a batch
# of points.


# %%
def inside(params, batch):
    points, f = batch
    return jax.vmap(lambda x: minus_laplacian(lambda y: network(params, y), x))(points) - f


def on_the_boundary(params, points):
    return network(params, points)


weights = (1.0, 100.0)
rows = optax_curv.residual_rows(inside, on_the_boundary, weights=weights)


def loss(params):
    r, b = inside(params, (interior, source)), on_the_boundary(params, boundary)
    return 0.5 * (weights[0] * jnp.mean(r**2) + weights[1] * jnp.mean(b**2))


# %% [markdown]
# `rows` returns the loss, its gradient and the Gauss-Newton rows in one pass. `levenberg_marquardt`
# has nothing to tune: its damping falls tenfold after a good step, and triples where the loss would
# rise, which costs a factorisation and a loss but no new rows.


# %%
marquardt = optax_curv.levenberg_marquardt()


def marquardt_step(carry, _):
    params, state = carry
    value, grads, branches = rows(params, (interior, source), boundary)
    given = {"branches": branches, "value": value, "value_fn": loss}
    updates, state = marquardt.update(grads, state, params, **given)
    return (optax.apply_updates(params, updates), state), None


# %% [markdown]
# Beside it Adam and, where jinns is installed, its SSBroyden: a quasi-Newton method that keeps an
# n × n matrix and has been the best on such problems.


# %%
adam = optax.adam(optax.exponential_decay(1e-2, 5000, 0.7))


def adam_step(carry, _):
    params, state = carry
    updates, state = adam.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None


def broyden_step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    given = {"value": value, "grad_pt": grads, "value_fn": loss, "grad_fn": jax.grad(loss)}
    updates, state = broyden.update(grads, state, params, **given)
    return (optax.apply_updates(params, updates), state), None


try:
    from jinns.optimizers import scale_by_SSBroyden_family

    broyden = scale_by_SSBroyden_family()
except ImportError:
    broyden = None

test_axis = np.linspace(0, 1, 101)
test = jnp.asarray(np.stack(np.meshgrid(test_axis, test_axis), -1).reshape(-1, 2))
exact = jax.vmap(solution)(test)


def train(step, state, steps_at_once, seconds=None):
    """Parameters, times and relative L2 errors, for STEPS steps or as many as the seconds allow."""

    @jax.jit
    def advance(carry):
        carry, _ = jax.lax.scan(step, carry, None, steps_at_once)
        return carry, jnp.linalg.norm(network(carry[0], test) - exact) / jnp.linalg.norm(exact)

    carry, times, errors = (params, state), [0.0], [1.0]  # u = 0 has the error 1
    jax.block_until_ready(advance(advance(carry)[0]))  # compiles
    start = time.perf_counter()
    while len(errors) <= STEPS // steps_at_once if seconds is None else times[-1] < seconds:
        carry, error = advance(carry)
        errors.append(float(error))
        times.append(time.perf_counter() - start)
    return carry[0], np.array(times), np.array(errors)


found, times, errors = train(marquardt_step, marquardt.init(params), 10)
found_adam, times_adam, errors_adam = train(adam_step, adam.init(params), 100, times[-1])
curves = {"Adam": (times_adam, errors_adam, BLUE), "Levenberg-Marquardt": (times, errors, ORANGE)}
if broyden is not None:
    curves["SSBroyden"] = (*train(broyden_step, broyden.init(params), 10, times[-1])[1:], GREEN)
for name, (_, history, _) in curves.items():
    print(f"{name}: error {history[-1]:.1e}")

# %% tags=["hide-input"]
figure, panels = plt.subplots(
    1, 4, figsize=(13, 3.4), width_ratios=(1, 1, 1, 1.3), layout="constrained"
)
off_adam, off = (np.log10(jnp.abs(network(p, test) - exact)) for p in (found_adam, found))
for axes, picture, title, label, shades, limits in (
    (panels[0], exact, "The solution", "u", "RdBu_r", (-1.4, 1.4)),
    (panels[1], off_adam, "Error of Adam", "log10 |error of u|", "magma", (-8, -1)),
    (panels[2], off, "Error of Levenberg-Marquardt", "log10 |error of u|", "magma", (-8, -1)),
):
    picture = axes.imshow(
        picture.reshape(101, 101), cmap=shades, clim=limits, origin="lower", extent=(0, 1, 0, 1)
    )
    figure.colorbar(picture, ax=axes, location="bottom", label=label)
    axes.set(title=title, xlabel="x", ylabel="y", xticks=(0, 1), yticks=(0, 1))
for name, (seconds, history, color) in curves.items():
    panels[3].semilogy(seconds, history, color=color, lw=2, label=name)
panels[3].set(xlabel="seconds on this machine", ylabel="relative L2 error", title="At equal time")
_ = panels[3].legend(frameon=False)

# %% [markdown]
# What to see: both maps have one scale of colours, seven decades of it. In the same time, without
# compilation, Adam has the waves to two or three digits; Levenberg-Marquardt goes on falling.
