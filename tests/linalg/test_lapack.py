"""Many factorisations at a time: on CPU those of jaxlib 0.10 and 0.11 wait for each other."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.linalg import _lapack as lapack

# Two cores, whatever the machine has: the fewer threads, the sooner all of them wait.
PROGRAM = """
import os, sys, threading
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from optax_curv import linalg
from optax_curv.linalg import _lapack as lapack

if sys.argv[1] == "plain":
    lapack.SHARES_BATCHES = False

def solved(x):
    lower = jnp.tril(x)
    return lapack.triangular_solve(lower, x, left_side=True, lower=True), lapack.solve(x, x)

def public(x):
    lower, _ = linalg.cholesky(x)
    return linalg.cholesky_solve(lower, x), linalg.inverse_root(x, 2, damping=1e-3)

kernels = {
    "solved": solved, "cholesky": lapack.cholesky, "eigh": lapack.eigh, "qr": lapack.qr,
    "qr_triangle": lapack.qr_triangle, "svd": lapack.svd, "public": public,
}
x = jax.random.normal(jax.random.key(0), (64, 40, 40))
x = x @ x.mT + jnp.eye(40)
vary = lambda f: jax.grad(lambda x: sum(jnp.sum(y) for y in jax.tree.leaves(f(x))))
programs = [jax.jit(jax.vmap(f)).lower(x).compile() for f in kernels.values()]
if sys.argv[1] == "ours":
    programs += [jax.jit(jax.vmap(vary(f))).lower(x).compile() for f in kernels.values()]
print("compiled", flush=True)

for program in programs:
    jax.block_until_ready(program(x))

def run(first):
    for step in range(len(programs)):
        jax.block_until_ready(programs[(first + step) % len(programs)](x))

threads = [threading.Thread(target=run, args=(first,)) for first in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()

# several widths in one program
def widths(batches):
    return [(linalg.cholesky(x), lapack.eigh(x), lapack.qr(x)) for x in batches]

batches = [x[:4, :n, :n] for n in (37, 38, 39, 40)]
jax.block_until_ready(jax.jit(jax.vmap(widths))([jnp.stack([x] * 8) for x in batches]))
print("done")
"""


def started(way: str) -> subprocess.Popen:
    """The program, when it has compiled."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, way],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "compiled"
    return process


def test_every_kernel_and_its_derivative_end_under_vmap_and_in_threads():
    with started("ours") as process:
        try:
            found, _ = process.communicate(timeout=200)
        finally:
            process.kill()
    assert found.strip() == "done"


@pytest.mark.skipif(not lapack.SHARES_BATCHES, reason="jaxlib shares no batches out")
def test_the_plain_kernels_wait_for_ever():
    with started("plain") as process:
        with pytest.raises(subprocess.TimeoutExpired):  # else `in_small_calls` may go
            process.communicate(timeout=15)
        process.kill()


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


def spd(x):
    return x @ x.mT.conj() + jnp.eye(x.shape[-2])


# name -> (ours, JAX's), functions of a batch of matrices whose results are smooth in it
DERIVABLE = {
    "cholesky": (
        lambda x: lapack.cholesky(spd(x)),
        lambda x: jax.lax.linalg.cholesky(spd(x), symmetrize_input=False),
    ),
    "eigh": (
        lambda x: lapack.eigh(spd(x)),
        lambda x: jnp.linalg.eigh(spd(x), symmetrize_input=False),
    ),
    "qr": (lapack.qr, jnp.linalg.qr),
    "qr_triangle": (lapack.qr_triangle, lambda x: jnp.linalg.qr(x, mode="r")),
    "svd": (lapack.svd, lambda x: jnp.linalg.svd(x, full_matrices=False)),
    "solve": (lambda x: lapack.solve(spd(x), x), lambda x: jnp.linalg.solve(spd(x), x)),
    "solve of a vector": (
        lambda x: lapack.solve(spd(x), x[..., 0]),
        lambda x: jnp.linalg.solve(spd(x), x[..., :1])[..., 0],
    ),
}
SHAPES = {"square": (3, 4, 4), "tall": (3, 5, 3), "wide": (3, 3, 5)}


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float64", "wide"), ("complex128", "tall"), ("complex128", "square")],
)
@pytest.mark.parametrize("name", DERIVABLE)
def test_derivatives_are_those_of_jax(name, dtype, shape):
    if shape == "wide" and "qr" in name and jax.__version_info__ < (0, 10):
        pytest.skip("JAX has no such derivative of its own")
    with jax.enable_x64():
        x, x_dot = jax.random.normal(jax.random.key(0), (2, *SHAPES[shape]), dtype)
        ours, theirs = DERIVABLE[name]
        if name == "eigh" and shape == "tall":
            x, x_dot = x.mT, x_dot.mT  # of full rank, so that no eigenvalues coincide
        found, expected = (jax.jvp(f, (x,), (x_dot,)) for f in (ours, theirs))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7), found, expected
        )

        def loss(f, x):
            return sum(jnp.sum(jnp.sin(jnp.abs(y))) for y in jax.tree.leaves(f(x)))

        found = jax.vmap(jax.grad(lambda x: loss(ours, x)))(x)
        expected = jax.grad(lambda x: loss(theirs, x))(x)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("left_side", "lower", "transpose", "conjugate"),
    [
        (True, True, False, False),
        (True, False, True, True),
        (False, True, True, False),
        (False, False, False, False),
    ],
)
def test_derivatives_of_triangular_solves_are_those_of_jax(left_side, lower, transpose, conjugate):
    options = {"left_side": left_side, "lower": lower}
    options |= {"transpose_a": transpose, "conjugate_a": conjugate}
    with jax.enable_x64():
        t, b = jax.random.normal(jax.random.key(0), (2, 2, 4, 4), "complex128")
        t = t + 4 * jnp.eye(4)

        def loss(solve, t, b):
            return jnp.sum(jnp.abs(solve(t, b, **options)) ** 2)

        results = []
        for solve in (lapack.triangular_solve, jax.lax.linalg.triangular_solve):
            gradient = jax.grad(lambda t, b, solve=solve: loss(solve, t, b), (0, 1))
            second = jax.jvp(gradient, (t, b), (b, t))[1]  # the derivative of the derivative, too
            results.append((gradient(t, b), second))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), *results)


def test_the_derivative_of_a_damped_inverse():
    from optax_curv.linalg.cholesky import damped_inverse

    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(0), (2, 4, 4))

        def ours(x):
            return damped_inverse(spd(x), jnp.full(2, 0.1))

        found, (inverse_dot, used_dot, _) = jax.jvp(ours, (x,), (x,))
        a, a_dot = jax.jvp(spd, (x,), (x,))
        np.testing.assert_allclose(found[0] @ (a + 0.1 * jnp.eye(4)), jnp.eye(4) + 0 * a, atol=1e-9)
        np.testing.assert_allclose(inverse_dot, -found[0] @ a_dot @ found[0], rtol=1e-8, atol=1e-9)
        np.testing.assert_array_equal(used_dot, 0)
        jax.grad(lambda x: jnp.sum(ours(x)[0]))(x)
