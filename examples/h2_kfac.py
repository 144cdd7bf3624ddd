"""The hydrogen molecule by a FermiNet-like network of Flax, K-FAC, and folx's forward Laplacian.

python examples/h2_kfac.py [--tiny]
"""

import sys

import flax.linen as nn
import folx
import jax
import jax.numpy as jnp
import optax

import optax_curv

ATOMS, EXACT = jnp.array([[0.0, 0.0, -0.7], [0.0, 0.0, 0.7]]), -1.17448  # Bohr radii, Hartree


class Wavefunction(nn.Module):
    """Log |ψ| of two electrons of opposite spin, [N, 6] -> [N, 1]: four products of orbitals."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 2, 3)
        from_atoms = x[:, :, None] - ATOMS
        distances = jnp.linalg.norm(from_atoms, axis=-1)
        apart = jnp.sqrt(jnp.sum((x[:, :1] - x[:, 1:]) ** 2, -1))[..., None] + jnp.zeros((1, 2, 1))
        h = jnp.concatenate([from_atoms.reshape(-1, 2, 6), distances, apart], -1)
        for _ in range(2):
            h = jnp.tanh(nn.Dense(self.width)(jnp.concatenate([h, h[:, ::-1]], -1)))
        psi = jnp.abs(jnp.sum(jnp.prod(1 + 0.1 * nn.Dense(4)(h), 1), -1, keepdims=True))
        cusp = jnp.sum(jnp.logaddexp(-distances[..., 0], -distances[..., 1]), -1)[:, None]
        return jnp.log(psi) + 1.1 * cusp + 0.5 * apart[:, 0] / (1 + apart[:, 0])


def local_energy(model, params, x):
    """(-½ Δψ / ψ) + V of one walker, by the forward Laplacian of log |ψ|."""
    found = folx.forward_laplacian(lambda y: model.apply(params, y[None])[0, 0])(x)
    kinetic = -0.5 * (found.laplacian + jnp.sum(found.jacobian.dense_array**2))
    attraction = jnp.sum(1 / jnp.linalg.norm(x.reshape(2, 1, 3) - ATOMS, axis=-1))
    return kinetic - attraction + 1 / jnp.linalg.norm(x[:3] - x[3:]) + 1 / 1.4


def energy_and_targets(model, params, x):
    """The mean local energy, and the clipped local energies less their mean, [N, 1]."""
    energies = jax.vmap(lambda x: local_energy(model, params, x))(x)
    clipped = jnp.clip(energies, *jnp.quantile(energies, jnp.array([0.02, 0.98])))
    return jnp.mean(energies), (clipped - jnp.mean(clipped))[:, None]


def walked(model, params, x, key, moves=10):
    """The walkers after some Metropolis moves."""

    def move(x, key):
        new = x + 0.5 * jax.random.normal(key, x.shape)
        gain = 2 * (model.apply(params, new) - model.apply(params, x))
        rises = -jax.random.exponential(jax.random.fold_in(key, 1), gain.shape) < gain
        return jnp.where(rises, new, x), None

    return jax.lax.scan(move, x, jax.random.split(key, moves))[0]


def main(tiny):
    walkers, steps, model = (64, 30, Wavefunction(8)) if tiny else (1024, 400, Wavefunction(32))
    keys = jax.random.split(jax.random.key(0), steps + 1)
    params = model.init(keys[-1], jnp.ones((1, 6)))
    x = ATOMS.reshape(-1) + jax.random.normal(keys[-1], (walkers, 6))

    objective = optax_curv.Objective(model.apply, "score")
    layers = optax_curv.find_layers(objective, params, x, jnp.zeros((walkers, 1)))
    capture = optax_curv.value_grad_and_curvature(objective, layers=layers, fisher="exact")
    tx = optax_curv.kfac(0.05, layers, damping=1e-3, momentum=0.0, kl_clip=1e-3)

    @jax.jit
    def step(params, state, x, key):
        x = walked(model, params, x, key)
        energy, targets = energy_and_targets(model, params, x)
        _, grads, curvature = capture(params, x, targets)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, x, energy

    state, energies = tx.init(params), []
    for key in keys[:steps]:
        params, state, x, energy = step(params, state, x, key)
        energies.append(float(energy))
    print(f"energy {(energy := sum(energies[-10:]) / 10):.4f}, exact {EXACT}")
    assert energy < (-1.0 if tiny else -1.16)


if __name__ == "__main__":
    main("--tiny" in sys.argv)
