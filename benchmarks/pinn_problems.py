"""Four equations for physics-informed networks, as blocks of residuals, with their solutions.

Each network takes the coordinates of one point, scaled to [-1, 1], and has three hidden tanh
layers.
The points are drawn once and kept, so that every method minimises the same loss, the weighted sum
of
the blocks' half mean squares."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_banded

pi = np.pi


class Problem(NamedTuple):
    """An equation: residuals of one point by block, points by block, and what is to be found."""

    name: str
    box: tuple[tuple[float, float], ...]
    outputs: int
    residuals: tuple[Callable, ...]  # (u, x) -> a number or [r]
    points: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    test: np.ndarray
    exact: np.ndarray  # [T, compared outputs]
    width: int = 16
    ansatz: Callable = lambda x, n: n  # what meets conditions by itself, made of the network n

    def initial(self, seed: int):
        """Glorot's weights."""
        rng = np.random.default_rng(seed)
        widths = (len(self.box), self.width, self.width, self.width, self.outputs)
        return [
            (jnp.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / (m + n))), jnp.zeros(n))
            for m, n in itertools.pairwise(widths)
        ]

    def network(self, params, x):
        """The outputs at one point; a number where there is one."""
        low, high = np.array(self.box).T
        h = (2 * x - low - high) / (high - low)
        for w, b in params[:-1]:
            h = jnp.tanh(h @ w + b)
        h = h @ params[-1][0] + params[-1][1]
        return self.ansatz(x, h[0] if self.outputs == 1 else h)

    @property
    def blocks(self):
        """Functions (params, points) -> residuals, as `residual_rows` takes them."""

        def block(residual):
            def of_batch(params, points):
                u = functools.partial(self.network, params)
                return jax.vmap(lambda x: residual(u, x))(points)

            return of_batch

        return tuple(map(block, self.residuals))

    def loss(self, params):
        """½ Σ_b w_b mean ‖r‖²."""
        total = 0.0
        for weight, block, points in zip(self.weights, self.blocks, self.points, strict=True):
            r = block(params, points)
            total += weight * jnp.sum(r**2) / (2 * len(points))
        return total

    def error(self, params):
        """The relative L2 error."""
        found = jax.vmap(functools.partial(self.network, params))(self.test)
        found = found.reshape(len(self.test), -1)[:, : self.exact.shape[1]]
        return jnp.linalg.norm(found - self.exact) / jnp.linalg.norm(self.exact)


def along(f, x, i, order=1):
    """A derivative along coordinate i."""
    e = np.eye(len(x))[i]
    for _ in range(order):
        f = functools.partial(lambda f, y: jax.jvp(f, (y,), (e,))[1], f)
    return f(x)


def grid(box, *counts):
    axes = [np.linspace(low, high, n) for (low, high), n in zip(box, counts, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(box))


def inside(box, count, seed=0):
    """Points of a Halton sequence."""

    def radical(base):
        values = np.zeros(count)
        for i in range(count):
            n, f = i + 1 + 20 * seed, 1.0
            while n:
                f /= base
                values[i] += f * (n % base)
                n //= base
        return values

    low, high = np.array(box).T
    unit = np.stack([radical(b) for b in (2, 3, 5)[: len(box)]], -1)
    return low + (high - low) * unit


def denser(box, count, centers, width):
    """Points half of which are uniform, and half lie near some values of the second coordinate."""
    points = inside(box, count)
    near = points[: count // 2]
    low, high = box[1]
    unit = 2 * (near[:, 1] - low) / (high - low) - 1
    offset = width * np.sinh(3 * unit) / np.sinh(3)
    near[:, 1] = np.resize(centers, len(near)) + offset
    return points


def edges(box, count, sides):
    """Points on sides (axis, which end) of a rectangle."""
    found = []
    for axis, end in sides:
        points = np.empty((count, 2))
        points[:, axis] = box[axis][end]
        points[:, 1 - axis] = np.linspace(*box[1 - axis], count)
        found.append(points)
    return np.concatenate(found)


ALL_SIDES = ((0, 0), (0, 1), (1, 0), (1, 1))


def poisson():
    box = ((0.0, 1.0), (0.0, 1.0))

    def exact(x):
        return jnp.sin(pi * x[0]) * jnp.sin(pi * x[1]) + 0.5 * jnp.sin(2 * pi * x[0]) * jnp.sin(
            3 * pi * x[1]
        )

    def equation(u, x):
        return sum(along(u, x, i, 2) - along(exact, x, i, 2) for i in (0, 1))

    test = grid(box, 80, 80)
    return Problem(
        "poisson",
        box,
        1,
        (equation, lambda u, x: u(x)),
        (inside(box, 1000), edges(box, 40, ALL_SIDES)),
        (1.0, 100.0),
        test,
        np.asarray(jax.vmap(exact)(test))[:, None],
    )


def kovasznay():
    """Navier-Stokes behind a grid at Reynolds number 40; u and v are compared."""
    re, box = 40.0, ((-0.5, 1.0), (-0.5, 1.5))
    lam = re / 2 - np.sqrt(re**2 / 4 + 4 * pi**2)

    def exact(x):
        e, y = jnp.exp(lam * x[0]), 2 * pi * x[1]
        return jnp.stack([1 - e * jnp.cos(y), lam / (2 * pi) * e * jnp.sin(y)])

    def equation(f, x):
        (u, v, _), dx, dy = f(x), along(f, x, 0), along(f, x, 1)
        laplacian = along(f, x, 0, 2) + along(f, x, 1, 2)
        momentum = u * dx[:2] + v * dy[:2] + jnp.stack([dx[2], dy[2]]) - laplacian[:2] / re
        return jnp.append(momentum, dx[0] + dy[1])

    test = grid(box, 60, 80)
    return Problem(
        "kovasznay",
        box,
        3,
        (equation, lambda f, x: f(x)[:2] - exact(x)),
        (inside(box, 600), edges(box, 40, ALL_SIDES)),
        (1.0, 10.0),
        test,
        np.asarray(jax.vmap(exact)(test)),
    )


def burgers():
    nu, box = 0.01 / pi, ((0.0, 1.0), (-1.0, 1.0))
    nodes, node_weights = np.polynomial.hermite.hermgauss(120)

    def exact(points):  # Cole and Hopf
        t, x = points[:, :1], points[:, 1:]
        z = x - np.sqrt(4 * nu * np.maximum(t, 1e-12)) * nodes
        log = -np.cos(pi * z) / (2 * pi * nu)
        f = np.exp(log - log.max(1, keepdims=True)) * node_weights
        return -(np.sin(pi * z) * f).sum(1) / f.sum(1)

    def equation(u, x):
        return along(u, x, 0) + u(x) * along(u, x, 1) - nu * along(u, x, 1, 2)

    start, sides = edges(box, 100, [(0, 0)]), edges(box, 40, [(1, 0), (1, 1)])
    test = grid(box, 101, 257)
    return Problem(
        "burgers",
        box,
        1,
        (equation, lambda u, x: u(x) + jnp.sin(pi * x[1]), lambda u, x: u(x)),
        (denser(box, 1500, [0.0], 0.15), start, sides),
        (1.0, 10.0, 10.0),
        test,
        exact(test)[:, None],
    )


def allen_cahn():
    """The first values and those at both ends are met by the ansatz, as published ones are."""
    d, box = 1e-4, ((0.0, 1.0), (-1.0, 1.0))

    def equation(u, x):
        return along(u, x, 0) - d * along(u, x, 1, 2) - 5 * (u(x) - u(x) ** 3)

    def ansatz(x, n):
        return x[1] ** 2 * jnp.cos(pi * x[1]) + x[0] * (1 - x[1] ** 2) * n

    times, x, values = allen_cahn_solution(d)
    test = np.stack(np.meshgrid(times, x, indexing="ij"), -1).reshape(-1, 2)
    return Problem(
        "allen_cahn",
        box,
        1,
        (equation,),
        (denser(box, 1500, [-0.5, 0.5], 0.25),),
        (1.0,),
        test,
        values.reshape(-1, 1),
        ansatz=ansatz,
    )


def allen_cahn_solution(d, nodes=1601, steps=2000, kept=50):
    """Strang's splitting: the reaction exactly, the diffusion by Crank and Nicolson."""
    x = np.linspace(-1, 1, nodes)
    u, dt = x**2 * np.cos(pi * x), 1 / steps
    r = d * dt / (2 * (x[1] - x[0]) ** 2)
    bands = np.zeros((3, nodes))
    bands[0, 2:], bands[1], bands[2, :-2] = -r, 1 + 2 * r, -r
    bands[1, [0, -1]] = 1

    def react(u, h):  # u' = 5 (u - u³)
        return u / np.sqrt(u**2 + (1 - u**2) * np.exp(-10 * h))

    values = [u]
    for step in range(steps):
        u = react(u, dt / 2)
        right = u.copy()
        right[1:-1] += r * (u[2:] - 2 * u[1:-1] + u[:-2])
        right[[0, -1]] = -1
        u = react(solve_banded((1, 1), bands, right), dt / 2)
        if (step + 1) % (steps // kept) == 0:
            values.append(u)
    return np.linspace(0, 1, kept + 1), x[::8], np.array(values)[:, ::8]


PROBLEMS = {f.__name__: f for f in (poisson, allen_cahn, kovasznay, burgers)}
