"""Physics-informed networks on Poisson's equation: branch Fisher against Adam and L-BFGS at equal
time, in one run.

python benchmarks/poisson.py [--problem 2d | 5d | heat | helmholtz] [--seconds 60]

Every problem is the same composition (`residual_rows` of the interior's and the boundary's
residuals, `branch_fisher` with `centered=False`, a line search on the loss); what a user writes for
another equation is its residual functions. Prints relative L2 errors over time, compilation
excluded, and the time to 1e-3."""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv

jax.config.update("jax_enable_x64", True)
pi = jnp.pi


def network(params, x):
    """A tanh network: one point [d] -> a number."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return (x @ w + b)[0]


def initial(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (jnp.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / (m + n))), jnp.zeros(n))
        for m, n in itertools.pairwise(widths)
    ]


def second_derivatives(u, x):
    """∂²u/∂x_i² for each i, [d]."""
    directions = jnp.eye(len(x))
    return jax.vmap(lambda e: jax.jvp(lambda y: jax.jvp(u, (y,), (e,))[1], (x,), (e,))[1])(
        directions
    )


class Problem(NamedTuple):
    """A linear equation with a known solution: residuals of one point, the solution, points and a
    network's widths."""

    residual: Callable  # (u, x) -> number in the interior
    solution: Callable  # x -> number; the boundary's values
    interior: np.ndarray
    boundary: np.ndarray
    test: np.ndarray
    widths: tuple[int, ...]


def grid(n, dim=2):
    """The n^dim inner points of a regular grid."""
    axis = (np.arange(n) + 1) / (n + 1)
    return np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim)


def faces(n, dim, rng=None):
    """Points of the unit cube's faces, n for each."""
    points = []
    for axis in range(dim):
        for side in (0.0, 1.0):
            x = (
                rng.random((n, dim))
                if rng
                else np.tile(((np.arange(n) + 0.5) / n)[:, None], (1, dim))
            )
            x[:, axis] = side
            points.append(x)
    return np.concatenate(points)


def poisson_2d():
    def solution(x):
        return jnp.sin(pi * x[0]) * jnp.sin(pi * x[1])

    def residual(u, x):
        return jnp.sum(second_derivatives(u, x)) + 2 * pi**2 * solution(x)

    return Problem(residual, solution, grid(30), faces(30, 2), grid(50), (2, 64, 1))


def poisson_5d():
    rng = np.random.default_rng(1)

    def solution(x):
        return jnp.sum(jnp.cos(pi * x))

    def residual(u, x):
        return jnp.sum(second_derivatives(u, x)) + pi**2 * solution(x)

    points = (rng.random((3000, 5)), faces(50, 5, rng), rng.random((5000, 5)))
    return Problem(residual, solution, *points, (5, 64, 1))


def heat():
    def solution(x):  # u_t = u_yy / 4 in (t, y); the "boundary" leaves out t = 1
        return jnp.exp(-(pi**2) * x[0] / 4) * jnp.sin(pi * x[1])

    def residual(u, x):
        return jax.grad(u)(x)[0] - second_derivatives(u, x)[1] / 4

    edges = faces(40, 2)
    return Problem(residual, solution, grid(30), edges[edges[:, 0] < 1], grid(50), (2, 64, 1))


def helmholtz():
    def solution(x):
        return jnp.sin(pi * x[0]) * jnp.sin(4 * pi * x[1])

    def residual(u, x):
        return jnp.sum(second_derivatives(u, x)) + u(x) - (1 - 17 * pi**2) * solution(x)

    return Problem(residual, solution, grid(30), faces(60, 2), grid(50), (2, 64, 1))


PROBLEMS = {"2d": poisson_2d, "5d": poisson_5d, "heat": heat, "helmholtz": helmholtz}


def blocks(problem):
    """Residuals of the interior and of the boundary, as `residual_rows` takes them."""

    def interior(params, points):
        return jax.vmap(lambda x: problem.residual(functools.partial(network, params), x))(points)

    def boundary(params, points):
        return jax.vmap(lambda x: network(params, x) - problem.solution(x))(points)

    return interior, boundary


def make_loss(problem):
    interior, boundary = blocks(problem)

    def loss(params):
        inside, edge = interior(params, problem.interior), boundary(params, problem.boundary)
        return 0.5 * (jnp.mean(inside**2) + jnp.mean(edge**2))

    return loss


def branch_fisher(problem):
    """Gauss-Newton with a step length that a search over the loss chooses, its damping falling
    slowly."""
    loss = make_loss(problem)
    rows = optax_curv.residual_rows(*blocks(problem))
    damping = optax.exponential_decay(1e-6, 1, 0.97, end_value=1e-10)
    tx = optax.chain(
        optax_curv.scale_by_branch_fisher(damping, solver="auto", centered=False),
        optax.scale(-1.0),
        optax.scale_by_backtracking_linesearch(
            30, decrease_factor=0.5, increase_factor=jnp.inf, max_learning_rate=1.0
        ),
    )

    def step(params, state):
        value, grads, branches = rows(params, problem.interior, problem.boundary)
        given = {"branches": branches, "value": value, "grad": grads}
        # Optax's searches hand every extra argument on, so that value_fn has to name it.
        updates, state = tx.update(
            grads, state, params, **given, value_fn=lambda p, branches: loss(p)
        )
        return optax.apply_updates(params, updates), state

    return tx, step


def lbfgs(problem):
    loss = make_loss(problem)
    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(params, state):
        value, grads = value_and_grad(params, state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return tx, step


def adam(problem):
    loss, tx = (
        make_loss(problem),
        optax.adam(optax.exponential_decay(3e-3, 2000, 0.7, end_value=1e-5)),
    )

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


METHODS = {
    "branch_fisher": (branch_fisher, 1),
    "lbfgs": (lbfgs, 20),
    "adam": (adam, 50),
}  # steps between evaluations


def train(problem, method, every, seconds, goal):
    """Time and relative L2 error after every few steps, until the time is spent or the error falls
    below the goal."""
    tx, step = method(problem)
    exact = jax.vmap(problem.solution)(problem.test)

    @jax.jit
    def error(params):
        found = jax.vmap(functools.partial(network, params))(problem.test)
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

    @jax.jit
    def steps(params, state):
        return jax.lax.fori_loop(0, every, lambda _, carry: step(*carry), (params, state))

    params = initial(problem.widths)
    state, history, spent = tx.init(params), [(0.0, 0, float(error(params)))], 0.0
    jax.block_until_ready(
        steps(*steps(params, state))
    )  # compiles; twice, as a search's state changes its weak types
    while spent < seconds and history[-1][2] > goal:
        start = time.perf_counter()
        params, state = jax.block_until_ready(steps(params, state))
        spent += time.perf_counter() - start
        history.append((spent, history[-1][1] + every, float(error(params))))
    return history


def report(name, history):
    best = min(e for _, _, e in history)
    reached = {goal: next((t for t, _, e in history if e <= goal), None) for goal in (1e-3, 1e-5)}
    times = ", ".join(
        f"{goal:g} {'not reached' if t is None else f'after {t:.2f} s'}"
        for goal, t in reached.items()
    )
    print(
        f"{name:14s} {history[-1][1]:6d} steps in {history[-1][0]:6.1f} s: best error "
        f"{best:.1e}; {times}",
        flush=True,
    )
    return best, reached


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=[*PROBLEMS, "all"], default="all")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--goal", type=float, default=1e-6, help="error at which a run ends")
    options = parser.parse_args()
    for name in PROBLEMS if options.problem == "all" else [options.problem]:
        problem = PROBLEMS[name]()
        print(
            f"{name}: {len(problem.interior)} interior and {len(problem.boundary)} boundary "
            f"points, {problem.widths}"
        )
        for method in options.methods:
            report(method, train(problem, *METHODS[method], options.seconds, options.goal))


if __name__ == "__main__":
    main()
