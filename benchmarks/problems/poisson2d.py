"""Poisson's equation in two dimensions."""

import jax.numpy as jnp

from benchmarks.problems.poisson import poisson

X64 = True


def problem():
    return poisson(
        2,
        "sin πx sin πy",
        lambda x: jnp.prod(jnp.sin(jnp.pi * x)),
        interior=900,
        boundary=120,
        steps=4000,
        evaluate_every=100,
        goal=1e-3,
        share_of_steps={"branch_fisher": 0.05},
    )
