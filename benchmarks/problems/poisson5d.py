"""Poisson's equation in five dimensions."""

import jax.numpy as jnp

from benchmarks.problems.poisson import poisson

X64 = True


def problem():
    return poisson(
        5,
        "Σ cos πxᵢ",
        lambda x: jnp.sum(jnp.cos(jnp.pi * x)),
        interior=3000,
        boundary=500,
        steps=2000,
        evaluate_every=50,
        goal=1e-3,
        share_of_steps={"branch_fisher": 0.1},
    )
