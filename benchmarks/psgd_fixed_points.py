"""Where Kronecker PSGD goes, against theory, in float64.

    python -m benchmarks.psgd_fixed_points

Each line is an experiment whose answer is known: the figure reached, and the limit, marked MISSED
where it is not kept."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv

GEOMETRIES = ("q0.5eq1.5", "eq", "qep", "qeq", "quad", "quad4p")
SHAPE = (5, 7)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})


def spd(size, condition, seed):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return jnp.asarray((basis * np.geomspace(1.0, 1.0 / condition, size)) @ basis.T)


def dense(factors, geometry):
    axes = factors if geometry == "quad4p" else [q.T @ q for q in factors]
    return functools.reduce(jnp.kron, axes)


def fit(tx, shape, signal, steps, newton=False, seed=1):
    """The state after `steps` updates by signal(v), v ~ N(0, I)."""

    def step(state, key):
        v = jax.random.normal(key, shape)
        extra = {"probe": v, "hvp": signal(v)} if newton else {}
        return tx.update(signal(v), state, **extra)[1], None

    keys = jax.random.split(jax.random.key(seed), steps)
    return quick_jit(lambda state: jax.lax.scan(step, state, keys)[0])(tx.init(jnp.zeros(shape)))


def away(p, inverse):
    return float(jnp.linalg.norm(p @ inverse - jnp.eye(len(p)), 2))


def factors(state, shape):
    return optax_curv.axis_factors(state, jnp.zeros(shape))


def kron(rate, geometry, **options):
    return optax_curv.scale_by_kron_psgd(rate, geometry=geometry, max_skew=np.inf, **options)


def dense_newton(geometry):
    h = spd(10, 10.0, 3)
    tx = kron(0.5, geometry, criterion="newton", damping=0.0)
    return away(
        dense(factors(fit(tx, (10,), lambda v: h @ v, 1000, newton=True), (10,)), geometry), h
    )


def indefinite_newton(geometry):
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((10, 10)))
    spectrum = np.geomspace(1.0, 0.1, 10) * np.where(np.arange(10) % 3, 1, -1)
    h = jnp.asarray((basis * spectrum) @ basis.T)
    tx = kron(optax.linear_schedule(0.5, 0.0, 6000), geometry, criterion="newton", damping=0.0)
    state = fit(tx, (10,), lambda v: h @ v, 6000, newton=True)
    p = dense(factors(state, (10,)), geometry)
    return away(p, jnp.asarray((basis * abs(spectrum)) @ basis.T))


def matched(geometry, newton):
    """G = H1 V H2 of condition 100 in all."""
    h1, h2 = spd(5, 10.0, 1), spd(7, 10.0, 2)
    rate = 0.5 if newton else optax.linear_schedule(0.5, 0.0, 2000)
    options = {"criterion": "newton", "damping": 0.0} if newton else {}
    state = fit(kron(rate, geometry, **options), SHAPE, lambda v: h1 @ v @ h2, 2000, newton)
    return away(dense(factors(state, SHAPE), geometry), jnp.kron(h1, h2))


def inverse_root(a):
    values, basis = jnp.linalg.eigh(a)
    return (basis / jnp.sqrt(values)) @ basis.T


def own_fixed_point(covariance, geometry):
    """The Kronecker P of a geometry for a covariance that is no Kronecker product, axis by axis in
    closed form.

    "eq" minimises tr(P C) + tr(P⁻¹): P₁ = (tr P₂⁻¹)^(1/2) C₁^(-1/2), C₁ the contraction of C with
    P₂; the others have E[U₁(P g)] = (N/d₁) I: P₁ = (N/d₁)^(1/2) C₁^(-1/2), C₁ that with P₂²."""
    c, (m, n) = covariance.reshape(*SHAPE, *SHAPE), SHAPE
    p1, p2 = jnp.eye(m), jnp.eye(n)
    for _ in range(200):
        if geometry == "eq":
            p1 = jnp.sqrt(jnp.trace(jnp.linalg.inv(p2))) * inverse_root(
                jnp.einsum("iajb,ab->ij", c, p2)
            )
            p2 = jnp.sqrt(jnp.trace(jnp.linalg.inv(p1))) * inverse_root(
                jnp.einsum("iajb,ij->ab", c, p1)
            )
        else:
            p1 = jnp.sqrt(n) * inverse_root(jnp.einsum("iajb,ab->ij", c, p2 @ p2))
            p2 = jnp.sqrt(m) * inverse_root(jnp.einsum("iajb,ij->ab", c, p1 @ p1))
    return jnp.kron(p1, p2)


def mismatched(geometry):
    root = spd(35, 10.0, 4)
    tx = kron(optax.linear_schedule(0.5, 0.0, 6000), geometry)
    state = fit(tx, SHAPE, lambda v: (root @ v.reshape(-1)).reshape(SHAPE), 6000)
    return away(
        dense(factors(state, SHAPE), geometry),
        jnp.linalg.inv(own_fixed_point(root @ root, geometry)),
    )


def steady_errors(geometry):
    """Mean errors over three seeds at rates 0.5, 0.1, 0.02, each after 3000 steps."""
    h1, h2 = spd(5, 3.0, 1), spd(7, 3.0, 2)

    def error(rate, seed):
        state = fit(kron(rate, geometry), SHAPE, lambda v: h1 @ v @ h2, 3000, seed=seed)
        return away(dense(factors(state, SHAPE), geometry), jnp.kron(h1, h2))

    return [np.mean([error(rate, seed) for seed in range(3)]) for rate in (0.5, 0.1, 0.02)]


def low_rank_newton():
    random = np.random.default_rng(0)
    u = random.standard_normal((10, 5))
    h = jnp.asarray(np.diag(random.uniform(1.0, 3.0, 10)) + u @ u.T)
    tx = optax_curv.scale_by_lra_psgd(0.5, rank=5, criterion="newton", damping=0.0)
    state = fit(tx, (10,), lambda v: h @ v, 5000, newton=True)
    q = (jnp.eye(10) + state.u @ state.v.T) * state.diagonal
    return away(q.T @ q, h)


def rosenbrock_steps(seed):
    """Steps until f < 1e-6 in 100 variables by dense Newton, from a random start."""

    def f(x):
        return jnp.sum(100.0 * (x[1::2] - x[::2] ** 2) ** 2 + (1.0 - x[::2]) ** 2)

    tx = optax_curv.dense_psgd(1.0, b1=0.0, criterion="newton", precond_lr=0.2, init_scale=0.1)

    def step(carry, key):
        x, state = carry
        value, grads, probe, hvp = optax_curv.hessian_probe(f, x, key=key)
        updates, state = tx.update(grads, state, x, probe=probe, hvp=hvp)
        norm = optax.tree.norm(updates)
        updates = updates * jnp.minimum(1.0, 1.0 / norm)  # a trust region of radius 1
        return (optax.apply_updates(x, updates), state), value

    keys = jax.random.split(jax.random.key(seed), 1801)
    x = jax.random.normal(keys[0], 100)
    values = quick_jit(lambda carry: jax.lax.scan(step, carry, keys[1:])[1])((x, tx.init(x)))
    return int(jnp.argmax(values < 1e-6)) if bool(jnp.any(values < 1e-6)) else 10**6


def line(what, figure, limit):
    verdict = "" if figure <= limit else "  MISSED"
    print(f"{what:62}{figure:12.2g}{limit:12.2g}{verdict}", flush=True)


def main():
    jax.config.update("jax_enable_x64", True)
    started = time.perf_counter()
    print(f"{'‖P|H| - I‖₂ or as said':62}{'reached':>12}{'limit':>12}")
    for geometry in ("q0.5eq1.5", "qeq", "quad"):
        line(
            f"dense Newton, n = 10, condition 10, 1000 steps: {geometry}",
            dense_newton(geometry),
            1e-8,
        )
        line(
            f"the same, indefinite, falling rate, 6000 steps: {geometry}",
            indefinite_newton(geometry),
            0.2,
        )
    for geometry in GEOMETRIES:
        line(
            f"matched Kronecker whitening, 5×7, condition 100: {geometry}",
            matched(geometry, False),
            0.35,
        )
        line(
            f"against its own fixed point, mismatched, 5×7: {geometry}", mismatched(geometry), 0.35
        )
    for geometry in ("q0.5eq1.5", "qeq", "quad"):
        line(
            f"matched Kronecker Newton, 5×7, condition 100: {geometry}",
            matched(geometry, True),
            1e-6,
        )
    errors = steady_errors("q0.5eq1.5")
    for rate, error, limit in zip((0.5, 0.1, 0.02), errors, (np.inf, *errors), strict=False):
        line(f"steady whitening error at precond_lr {rate}, limit: the last", error, limit)
    line("low rank: Newton, n = 10, rank 5, 5000 steps", low_rank_newton(), 1e-5)
    steps = [rosenbrock_steps(seed) for seed in range(5)]
    line(f"Rosenbrock, 100 variables: most steps of 5 seeds {steps}", max(steps), 1800)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
