"""SOAP's published recursion, step by step, and Adam in K-FAC's eigenbasis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

ROUNDING = 1e-7  # relative, in float64, through some steps of QR iteration
B1, B2, EPS, EVERY = 0.9, 0.8, 1e-8, 2

# Small matrices take longer to compile than to run.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gradients(count, shape, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape)) for _ in range(count)]


def run(tx, steps):
    state, update, updates = tx.init(steps[0]), quick_jit(tx.update), []
    for g in steps:
        new, state = update(g, state)
        updates.append(new)
    return updates, state


def eigenvectors(f):
    return np.linalg.eigh(f)[1][:, ::-1]


def published(steps, basis):
    """Vyas et al., Algorithms 3 and 4; their code, too, skips the first step. V turns with Q."""
    left = right = momentum = v = 0.0
    for count, g in enumerate(map(np.asarray, steps)):
        left, right = B2 * left + (1 - B2) * g @ g.T, B2 * right + (1 - B2) * g.T @ g
        if count == 0:
            q_left, q_right = map(eigenvectors, (left, right))
            yield np.zeros_like(g)
            continue
        rotated = q_left.T @ g @ q_right
        momentum, v = B1 * momentum + (1 - B1) * g, B2 * v + (1 - B2) * rotated**2
        inside = (q_left.T @ momentum @ q_right) / (1 - B1**count)
        inside = inside / (np.sqrt(v / (1 - B2**count)) + EPS)
        yield q_left @ inside @ q_right.T
        if count % EVERY == 0:
            orders = [
                np.argsort(-np.diag(q.T @ f @ q)) for q, f in ((q_left, left), (q_right, right))
            ]
            old = q_left, q_right
            if basis == "eigh":
                q_left, q_right = map(eigenvectors, (left, right))
            else:
                q_left = np.linalg.qr(left @ q_left[:, orders[0]])[0]
                q_right = np.linalg.qr(right @ q_right[:, orders[1]])[0]
            v = (q_left.T @ old[0]) ** 2 @ v @ ((q_right.T @ old[1]) ** 2).T


@pytest.mark.parametrize("basis", ["qr", "eigh"])
def test_every_step_is_that_of_the_published_recursion(basis, x64):
    steps = gradients(7, (4, 4))
    updates, state = run(
        optax_curv.scale_by_soap(B1, B2, eps=EPS, basis_every=EVERY, basis=basis), steps
    )
    for u, expected in zip(updates, published(steps, basis), strict=True):
        np.testing.assert_allclose(u, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    for q in state.bases["the root"]:
        np.testing.assert_allclose(q[0].T @ q[0], np.eye(4), atol=1e-12)


def test_kl_factors_are_of_gradients_whitened_by_the_other_side(x64):
    """L ← b2 L + (1 - b2) G R⁻¹ Gᵀ / n and R likewise, with R's values in its present basis."""
    steps = gradients(6, (4, 6))
    tx = optax_curv.scale_by_soap(B1, B2, basis_every=EVERY, kl=True)
    state, update = tx.init(steps[0]), quick_jit(tx.update)
    for count, g in enumerate(steps):
        inverses = []
        for factor, basis in zip(state.factors["the root"], state.bases["the root"], strict=True):
            factor, basis = np.asarray(factor[0]), np.asarray(basis[0])
            values = np.diag(basis.T @ factor @ basis)
            values = values + 1e-6 * values.max() if count else np.ones(len(values))
            inverses.append((basis / values) @ basis.T)
        before = [np.asarray(f[0]) for f in state.factors["the root"]]
        _, state = update(g, state)
        weight = (1 - B2) / (1 - B2 ** (count + 1))
        g = np.asarray(g)
        omega = np.sqrt(np.trace(inverses[0] @ g @ inverses[1] @ g.T) / g.size)
        g = g * (omega / np.clip(omega, 0.1, 10)) ** -0.5  # what is too much both sides share
        new = g @ inverses[1] @ g.T / g.shape[1], g.T @ inverses[0] @ g / g.shape[0]
        for found, old, moment in zip(state.factors["the root"], before, new, strict=True):
            np.testing.assert_allclose(found[0], old + weight * (moment - old), rtol=ROUNDING)


def test_newton_schulz_after_the_basis_is_the_polar_factor_of_soaps_direction(x64):
    """With coefficients that converge; Muon's own end between 0.7 and 1.2."""
    steps = gradients(4, (4, 6))
    exact = {"ns_coeffs": (1.5, -0.5, 0.0), "ns_steps": 60}
    newton_schulz = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, **exact)
    alone, _ = run(optax_curv.scale_by_soap(B1, B2), steps)
    after, _ = run(optax.chain(optax_curv.scale_by_soap(B1, B2), newton_schulz), steps)
    left, _, right = np.linalg.svd(alone[-1], full_matrices=False)
    np.testing.assert_allclose(after[-1], left @ right, atol=1e-6)


def test_in_the_basis_of_a_constant_diagonal_factor_it_is_adam(x64):
    """Gradients with one entry have coordinate axes for a basis, whatever their order."""
    mask = jnp.zeros((3, 5)).at[1, 2].set(1.0)
    steps = [mask * g for g in gradients(4, (3, 5))]
    updates, _ = run(optax_curv.scale_by_soap(B1, B2, eps=EPS), steps)
    expected, _ = run(optax.scale_by_adam(B1, B2, EPS), steps[1:])
    np.testing.assert_allclose(jnp.stack(updates[1:]), jnp.stack(expected), atol=1e-9)


def test_updates_are_decided_by_gradients_and_not_by_their_rounding():
    """A gradient is diagonal in its own bases, and V would hold the rounding of all zeros there."""
    steps, touch = gradients(2, (32, 32)), gradients(1, (32, 32), 1)[0]
    tx = optax_curv.scale_by_soap()
    (first, second), _ = run(tx, [x.astype(jnp.float32) for x in steps])
    (_, touched), _ = run(tx, [(x + 1e-6 * touch).astype(jnp.float32) for x in steps])
    assert jnp.all(first == 0) and jnp.linalg.norm(second) > 1
    assert jnp.linalg.norm(touched - second) < 1e-2 * jnp.linalg.norm(second)


@pytest.mark.parametrize("basis", ["qr", "eigh"])
def test_where_gradients_keep_their_direction_no_step_is_longer_than_adams(basis):
    """Off the diagonal V is rounding, and M gets there where eigenvalues meet and bases turn."""
    goal, params = gradients(1, (4, 3))[0].astype(jnp.float32), jnp.zeros((4, 3))
    tx = optax_curv.scale_by_soap(B1, B2, basis_every=EVERY, basis=basis)
    state, update = tx.init(params), quick_jit(tx.update)
    for _ in range(60):
        updates, state = update(params - goal, state)
        assert jnp.linalg.norm(updates) < 2 * np.sqrt(params.size)
        params = params - 0.1 * updates


def test_as_many_slices_as_a_diagonal_axis_is_long_are_told_from_a_dense_one(x64):
    leaves, options = gradients(5, (5, 2)), {"max_dim": 4}
    alone = jnp.stack([run(optax_curv.scale_by_soap(**options), [g, 2 * g])[0][-1] for g in leaves])
    steps = jnp.stack(leaves)
    stacked = run(optax_curv.scale_by_soap(stacked=True, **options), [steps, 2 * steps])[0][-1]
    np.testing.assert_allclose(stacked, alone, atol=ROUNDING)


def test_stacked_and_blocked_leaves_are_the_leaves_done_one_by_one(x64):
    leaves = gradients(3, (4, 5))
    options = {"b1": B1, "b2": B2, "eps": EPS, "basis_every": 1}
    alone = jnp.stack([run(optax_curv.scale_by_soap(**options), [g, 2 * g])[0][-1] for g in leaves])
    steps = jnp.stack(leaves)
    stacked = run(optax_curv.scale_by_soap(stacked=True, **options), [steps, 2 * steps])[0][-1]
    np.testing.assert_allclose(stacked, alone, atol=ROUNDING)
    wide = jnp.concatenate(leaves, axis=1)
    blocked = run(optax_curv.scale_by_soap(block_size=5, **options), [wide, 2 * wide])[0][-1]
    np.testing.assert_allclose(blocked, jnp.concatenate(list(alone), axis=1), atol=ROUNDING)


def test_a_bad_gradient_changes_nothing_but_the_counter():
    tx = optax_curv.scale_by_soap()
    steps = [g.astype(jnp.float32) for g in gradients(2, (4, 3))]
    _, state = run(tx, steps)
    updates, after = quick_jit(tx.update)(steps[0].at[0, 0].set(jnp.inf), state)
    assert jnp.all(updates == 0) and after.total_notfinite == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(total_notfinite=jnp.int32(0)), state)


LAYERS = optax_curv.Layers([optax_curv.Layer("dense", "dense", "['w']", "['b']", 3, 2)])


def statistic(seed):
    x, y = (np.asarray(g) for shape in ((9, 4), (9, 2)) for g in gradients(1, shape, seed))
    return {
        "dense": optax_curv.KroneckerFactors(
            jnp.asarray(x.T @ x), jnp.asarray(y.T @ y), jnp.int32(1)
        )
    }


def test_adam_in_the_basis_of_captured_factors(x64):
    """While the basis stays, the moments are Adam's of the rotated gradient."""
    tx = optax_curv.scale_by_adam_in_basis(LAYERS, B1, B2, eps=EPS)
    steps = [
        {"w": w, "b": b} for w, b in zip(gradients(3, (3, 2)), gradients(3, (2,), 1), strict=True)
    ]
    state, adam = tx.init(steps[0]), optax.scale_by_adam(B1, B2, EPS)
    update = quick_jit(lambda g, s, c: tx.update(g, s, curvature=c))
    rotated_state = None
    for seed, grads in enumerate(steps):
        updates, state = update(grads, state, statistic(seed))
        u_a, u_g = state.basis["dense"]
        first = statistic(0)["dense"]
        np.testing.assert_allclose(
            np.diag(np.diag(u_a.T @ first.input_factor @ u_a)),
            u_a.T @ first.input_factor @ u_a,
            atol=1e-9,
        )
        rotated = u_a.T @ jnp.concatenate([grads["w"], grads["b"][None]]) @ u_g
        rotated_state = adam.init(rotated) if rotated_state is None else rotated_state
        inside, rotated_state = adam.update(rotated, rotated_state)
        expected = u_a @ inside @ u_g.T
        np.testing.assert_allclose(updates["w"], expected[:3], atol=ROUNDING)
        np.testing.assert_allclose(updates["b"], expected[3], atol=ROUNDING)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optax_curv.scale_by_soap(-0.1), r"scale_by_soap: expected b1 >= 0, got b1=-0.1"),
        (lambda: optax_curv.scale_by_soap(basis_every=0), r"expected basis_every >= 1"),
        (lambda: optax_curv.scale_by_soap(basis="svd"), r"unknown basis='svd'"),
        (lambda: optax_curv.scale_by_soap(block_size=0), r"expected block_size >= 1"),
        (lambda: optax_curv.scale_by_adam_in_basis(LAYERS, eps=-1), r"expected eps >= 0"),
        (
            lambda: optax_curv.soap(0.1, adam_for={"w": 3}).init({"w": jnp.ones((2, 2))}),
            r"adam_for gives 3 for .*'w'",
        ),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
