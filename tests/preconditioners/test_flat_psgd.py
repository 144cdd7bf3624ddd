"""Dense and low-rank PSGD reach the inverse Hessian and the inverse root of the covariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

NEWTON_ERROR = 1e-8
LRA_ERROR = 1e-5
INDEFINITE_ERROR = 0.2  # Li's implementation reaches 0.06-0.11

# Small matrices take longer to compile than to run.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def fit(tx, hessian, steps, criterion="newton"):
    """The state after `steps` products of the Hessian with random probes."""

    def step(state, key):
        probe = jax.random.normal(key, hessian.shape[:1], hessian.dtype)
        hvp = hessian @ probe
        extra = {"probe": probe, "hvp": hvp} if criterion == "newton" else {}
        return tx.update(hvp, state, **extra)[1], None

    keys = jax.random.split(jax.random.key(1), steps)
    return quick_jit(lambda state: jax.lax.scan(step, state, keys)[0])(
        tx.init(jnp.zeros(len(hessian)))
    )


def symmetric(spectrum, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum),) * 2))
    return jnp.asarray((basis * spectrum) @ basis.T)


def lra_preconditioner(state):
    q = (jnp.eye(state.u.shape[0]) + state.u @ state.v.T) * state.diagonal
    return q.T @ q


def test_dense_newton_fits_an_indefinite_hessian(x64):
    """P → |H|⁻¹ with a falling rate."""
    spectrum = np.geomspace(1.0, 0.1, 10) * np.where(np.arange(10) % 3, 1, -1)
    rate = lambda count: 0.5 * jnp.maximum(0.0, 1 - count / 6000)  # noqa: E731
    tx = optax_curv.scale_by_dense_psgd(rate, criterion="newton", damping=0.0)
    (q,) = optax_curv.axis_factors(fit(tx, symmetric(spectrum), 6000), jnp.zeros(10))
    error = q.T @ q @ symmetric(np.abs(spectrum)) - jnp.eye(10)
    assert jnp.linalg.norm(error, 2) < INDEFINITE_ERROR


def test_dense_psgd_is_kronecker_psgd_of_the_flat_vector():
    grads = {"b": jnp.array([1.0, -2.0]), "w": jnp.arange(6.0).reshape(2, 3)}
    dense, kron = optax_curv.scale_by_dense_psgd(), optax_curv.scale_by_kron_psgd(max_skew=np.inf)
    vector = jax.flatten_util.ravel_pytree(grads)[0]
    updates, _ = quick_jit(dense.update)(grads, dense.init(grads))
    expected, _ = quick_jit(kron.update)(vector, kron.init(vector))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, grads)
    np.testing.assert_array_equal(jax.flatten_util.ravel_pytree(updates)[0], expected)


def test_lra_newton_fits_a_diagonal_plus_low_rank_hessian(x64):
    random = np.random.default_rng(0)
    u = random.standard_normal((10, 5))
    hessian = jnp.asarray(np.diag(random.uniform(1.0, 3.0, 10)) + u @ u.T)
    tx = optax_curv.scale_by_lra_psgd(0.5, rank=5, criterion="newton", damping=0.0)
    error = lra_preconditioner(fit(tx, hessian, 5000)) @ hessian - jnp.eye(10)
    assert jnp.linalg.norm(error, 2) < LRA_ERROR


def test_lra_of_rank_zero_is_a_diagonal(x64):
    hessian = jnp.diag(jnp.geomspace(1.0, 0.1, 10))
    tx = optax_curv.scale_by_lra_psgd(0.5, rank=0, criterion="newton", damping=0.0)
    state = fit(tx, hessian, 2000)
    np.testing.assert_allclose(state.diagonal**2, 1 / jnp.diagonal(hessian), rtol=NEWTON_ERROR)


def test_lra_whitening_moves_towards_the_inverse_root(x64):
    hessian = jnp.diag(jnp.geomspace(1.0, 0.1, 6)) + 0.5
    tx = optax_curv.scale_by_lra_psgd(optax.linear_schedule(0.5, 0.0, 3000), rank=2)
    error = lra_preconditioner(fit(tx, hessian, 3000, "whitening")) @ hessian - jnp.eye(6)
    assert jnp.linalg.norm(error, 2) < 0.5


def test_lra_steps_down_its_criterion(x64):
    """With one fixed pair (h, w) every step lowers ‖Q h‖² + ‖Q⁻ᵀ w‖²."""
    h, w = jax.random.normal(jax.random.key(0), (2, 7))
    tx = optax_curv.scale_by_lra_psgd(0.1, rank=3, criterion="newton", damping=0.0, init_scale=1.0)

    def criterion(state):
        p = lra_preconditioner(state)
        return h @ p @ h + w @ jnp.linalg.solve(p, w)

    def step(state, _):
        state = tx.update(h, state, probe=w, hvp=h)[1]
        return state, criterion(state)

    start = tx.init(h)
    _, values = quick_jit(lambda state: jax.lax.scan(step, state, None, length=60))(start)
    values = jnp.array([criterion(start), *values])
    assert jnp.all(jnp.diff(values) < 0)


@pytest.mark.parametrize("make", [optax_curv.scale_by_dense_psgd, optax_curv.scale_by_lra_psgd])
def test_flat_methods_keep_the_contracts(make):
    grads = {"w": jnp.ones((2, 3)), "b": jnp.ones((), jnp.bfloat16), "none": None}
    tx = make(b1=0.9, update_probability=0.5)
    state, update = tx.init(grads), quick_jit(tx.update)
    zero = jax.tree.map(jnp.zeros_like, grads)
    updates, state = update(zero, state)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    updates, state = update(grads, state)
    assert all(jnp.all(jnp.isfinite(u)) and jnp.all(u != 0) for u in jax.tree.leaves(updates))
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
        lambda g: (g.shape, g.dtype), grads
    )
    updates, after = update({**grads, "w": jnp.full((2, 3), jnp.nan)}, state)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    assert after.total_notfinite == 1
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after._replace(total_notfinite=0), state))
    assert tx.update({}, tx.init({}))[0] == {}
    with pytest.raises(ValueError, match=r"criterion='newton' got probe=missing"):
        make(criterion="newton").update(grads, state)
    with pytest.raises(ValueError, match=r"precond_lr > 0"):
        make(precond_lr=0.0)
    with pytest.raises(ValueError, match=r"the state does not fit the gradients: at .* \(1?,? ?8"):
        make().update({"w": jnp.ones((2, 4))}, make().init(grads))
    with pytest.raises(ValueError, match=r"has dtype complex64"):
        tx.init(jnp.ones(2, jnp.complex64))


def test_bad_flat_options_are_refused():
    with pytest.raises(ValueError, match=r"knows matrices only"):
        optax_curv.scale_by_dense_psgd(geometry="right_triangular")
    with pytest.raises(ValueError, match=r"rank >= 0, got rank=-1"):
        optax_curv.scale_by_lra_psgd(rank=-1)


@pytest.mark.parametrize("rank", [1, 10])
def test_lra_keeps_its_diagonal_and_low_rank_parts_from_drifting_apart(rank):
    # on a narrow valley, where float32 no longer held their product after some 10 000 steps
    tx, start = optax_curv.lra_psgd(1e-2, rank=rank), jnp.zeros(2)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, (state, *_)), _ = jax.lax.scan(step, (start, tx.init(start)), length=30_000)
    assert jnp.max(jnp.abs(params - 1)) < 0.03
    assert jnp.max(state.diagonal) / jnp.min(state.diagonal) < 1e5
