"""Many factorisations at a time: on CPU those of JAX 0.10 and later wait for each other for ever."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.linalg import _lapack as lapack

PROGRAM = """
import jax, jax.numpy as jnp
from optax_curv import linalg
from optax_curv.linalg import _lapack as lapack

def many(x):
    eye = jnp.eye(x.shape[-1])
    lower, _ = linalg.cholesky(x + eye)
    return linalg.cholesky_solve(lower, x), lapack.eigh(x), lapack.qr(x)

batches = [jax.random.normal(jax.random.key(n), (4, n, n)) for n in (129, 130, 131, 132)]
batches = [x @ x.mT for x in batches]
for function in (many, jax.vmap(many)):
    for _ in range(3):
        jax.block_until_ready(jax.jit(lambda batches: [function(x) for x in batches])(batches))
print("done")
"""


def test_large_batches_at_a_time_do_not_wait_for_each_other():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert found.stdout.strip() == "done"


@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,), (2, 3), (7, 2)])
@pytest.mark.parametrize("n", [1, 5, 30])
def test_every_batch_is_factored_as_one_matrix_after_the_other(batch, n):
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(0), (*batch, n, n))
        spd = x @ x.mT + jnp.eye(n)
        checks = {
            "cholesky": (lapack.cholesky(spd), np.linalg.cholesky(spd)),
            "triangular_solve": (lapack.triangular_solve(spd, x, left_side=True, lower=True), None),
            "eigh": (lapack.eigh(spd)[0], np.linalg.eigvalsh(spd)),
            "solve": (lapack.solve(spd, x), np.linalg.solve(spd, x)),
            "solve of a vector": (lapack.solve(spd, x[..., 0]), np.linalg.solve(spd, x)[..., 0]),
            "svd": (lapack.svd(x)[1], np.linalg.svd(x, compute_uv=False)),
            "qr_triangle": (jnp.abs(lapack.qr_triangle(x)), np.abs(np.linalg.qr(x, mode="r"))),
        }
        checks["triangular_solve"] = (jnp.tril(spd) @ checks["triangular_solve"][0], x)
        for found, expected in checks.values():
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_batch_within_a_vmap_within_a_vmap():
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(0), (3, 4, 2, 12, 12))
        spd = x @ x.mT + jnp.eye(12)
        found = jax.vmap(jax.vmap(lapack.cholesky))(spd)
        np.testing.assert_allclose(found, np.linalg.cholesky(spd), rtol=1e-10, atol=1e-10)
        one_axis = jax.vmap(
            lambda t, b: lapack.triangular_solve(t, b, left_side=True, lower=True), (None, 0)
        )
        np.testing.assert_allclose(
            jnp.tril(spd[0, 0]) @ one_axis(spd[0, 0], x[0]), x[0], rtol=1e-9, atol=1e-9
        )


def test_derivatives_are_those_of_jax():
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(0), (2, 40, 40))
        spd = x @ x.mT + jnp.eye(40)

        def ours(x, b):
            return jnp.sum(
                lapack.triangular_solve(lapack.cholesky(x), b, left_side=True, lower=True) ** 2
            )

        def theirs(x, b):
            lower = jax.lax.linalg.cholesky(x, symmetrize_input=False)
            return jnp.sum(
                jax.lax.linalg.triangular_solve(lower, b, left_side=True, lower=True) ** 2
            )

        found, expected = (jax.grad(f, (0, 1))(spd, x) for f in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
