"""Variational inference in blackjax, its optimizer one of this package's.

python examples/blackjax_vi.py [--tiny]
"""

import sys

import blackjax
import jax
import jax.numpy as jnp

import optax_curv


def main(tiny):
    """Fits a normal distribution, and returns the largest distance of its mean."""
    steps = 1000 if tiny else 5000
    center, scale = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 1.0, 2.0])

    def log_density(x):
        return -0.5 * jnp.sum(((x["x"] - center) / scale) ** 2)

    method = blackjax.meanfield_vi(log_density, optax_curv.lra_psgd(0.02), num_samples=50)
    state = method.init({"x": jnp.zeros(3)})

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(lambda s, key: (method.step(key, s)[0], None), state, keys)[0]

    state = run(state, jax.random.split(jax.random.key(0), steps))
    distance = float(jnp.max(jnp.abs(state.mu["x"] - center)))
    print(f"mean {state.mu['x']}, exact {center}, distance {distance:.2e}")
    assert distance < 0.2
    return distance


if __name__ == "__main__":
    main("--tiny" in sys.argv)
