"""Stochastic variational inference in numpyro, its guide trained by this package's methods.

`numpyro.optim.optax_to_numpyro` takes any transformation that needs gradients alone.

python examples/numpyro_svi.py [--tiny]
"""

import sys

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

import optax_curv


def main(tiny):
    """Infers a linear model, and returns the largest distance of a mean from the exact one."""
    count, steps = (50, 1500) if tiny else (500, 4000)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (count, 3)) * jnp.array([1.0, 3.0, 0.3])
    y = x @ jnp.array([1.0, -0.5, 2.0]) + jax.random.normal(keys[1], (count,))

    def model():
        w = numpyro.sample("w", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    exact = jnp.linalg.solve(x.T @ x + jnp.eye(3) / 100, x.T @ y)
    guide = AutoMultivariateNormal(model)
    tx = optax_curv.lra_psgd(0.02)
    svi = SVI(model, guide, numpyro.optim.optax_to_numpyro(tx), Trace_ELBO(num_particles=8))
    found = svi.run(keys[2], steps, progress_bar=False)
    mean = guide.median(found.params)["w"]
    distance = float(jnp.max(jnp.abs(mean - exact)))
    print(f"posterior mean {mean}, exact {exact}, distance {distance:.2e}")
    assert distance < 0.1
    return distance


if __name__ == "__main__":
    main("--tiny" in sys.argv)
