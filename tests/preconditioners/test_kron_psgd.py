"""Kronecker PSGD against theory: fixed points, invariances, and what a state survives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_curv
from optax_curv.linalg import _compiler
from optax_curv.preconditioners._psgd import step as kron_steps

GEOMETRIES = ("q0.5eq1.5", "eq", "qep", "qeq", "quad", "quad4p")
WHITENING_ERROR = (
    0.35  # ‖P H - I‖₂ after 2000 steps of rate 0.5 → 0; Li's implementation reaches 0.10-0.24
)
NEWTON_ERROR = 1e-8
KRONECKER_NEWTON_ERROR = 1e-6
STEPS = 2000


# Small matrices take longer to compile than to run.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def spd(size, condition, seed):
    """A symmetric positive definite matrix of that condition."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return jnp.asarray((basis * np.geomspace(1.0, 1.0 / condition, size)) @ basis.T)


def full_preconditioner(factors, geometry):
    """P as one matrix."""
    axes = factors if geometry == "quad4p" else [q.conj().T @ q for q in factors]
    whole = axes[0]
    for axis in axes[1:]:
        whole = jnp.kron(whole, axis)
    return whole


def run(tx, params, signal, steps, newton=False, seed=1):
    """The factors after `steps` updates by `signal(v)`, v ~ N(0, I), in one compiled scan."""
    return optax_curv.axis_factors(state_after(tx, params, signal, steps, newton, seed), params)


def state_after(tx, params, signal, steps, newton=False, seed=1):
    """The state after these updates."""

    def step(state, key):
        v = jax.random.normal(key, params.shape, params.dtype)
        extra = {"probe": v, "hvp": signal(v)} if newton else {}
        return tx.update(signal(v), state, **extra)[1], None

    keys = jax.random.split(jax.random.key(seed), steps)
    return quick_jit(lambda state: jax.lax.scan(step, state, keys)[0])(tx.init(params))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_whitening_reaches_the_inverse_root_of_the_covariance(geometry, x64):
    """For G = H1 V H2 the fixed point is P = (E[vec G vec Gᵀ])^(-1/2) = H1⁻¹ ⊗ H2⁻¹."""
    h1, h2 = spd(5, 10.0, 1), spd(7, 10.0, 2)
    rate = optax.linear_schedule(0.5, 0.0, STEPS)
    tx = optax_curv.scale_by_kron_psgd(rate, geometry=geometry, max_skew=np.inf)
    factors = run(tx, jnp.zeros((5, 7)), lambda v: h1 @ v @ h2, STEPS)
    error = full_preconditioner(factors, geometry) @ jnp.kron(h1, h2) - jnp.eye(35)
    assert jnp.linalg.norm(error, 2) < WHITENING_ERROR


@pytest.mark.parametrize("geometry", ["q0.5eq1.5", "qeq", "quad"])
def test_newton_reaches_the_inverse_hessian(geometry, x64):
    """Condition 10, n = 10, no noise: P = |H|⁻¹ by step 1000."""
    hessian = spd(10, 10.0, 3)
    tx = optax_curv.scale_by_kron_psgd(
        0.5, geometry=geometry, criterion="newton", max_skew=np.inf, damping=0.0
    )
    factors = run(tx, jnp.zeros(10), lambda v: hessian @ v, 1000, newton=True)
    error = full_preconditioner(factors, geometry) @ hessian - jnp.eye(10)
    assert jnp.linalg.norm(error, 2) < NEWTON_ERROR


def test_kronecker_newton_reaches_the_inverse_hessian(x64):
    """H = H1 ⊗ H2 of condition 100 over both axes, no noise: P = H1⁻¹ ⊗ H2⁻¹."""
    h1, h2 = spd(5, 10.0, 1), spd(7, 10.0, 2)
    tx = optax_curv.scale_by_kron_psgd(0.5, criterion="newton", max_skew=np.inf, damping=0.0)
    factors = run(tx, jnp.zeros((5, 7)), lambda v: h1 @ v @ h2, STEPS, newton=True)
    error = full_preconditioner(factors, "q0.5eq1.5") @ jnp.kron(h1, h2) - jnp.eye(35)
    assert jnp.linalg.norm(error, 2) < KRONECKER_NEWTON_ERROR


def test_each_axis_is_whitened_where_the_covariance_is_no_kronecker_product(x64):
    """No P = P1 ⊗ P2 whitens such gradients; all the same E[Uᵢ(P g)] = (N/dᵢ) I."""
    root = spd(35, 10.0, 4)
    tx = optax_curv.scale_by_kron_psgd(optax.linear_schedule(0.5, 0.0, STEPS), max_skew=np.inf)
    factors = run(tx, jnp.zeros((5, 7)), lambda v: (root @ v.reshape(-1)).reshape(5, 7), STEPS)
    p = full_preconditioner(factors, "q0.5eq1.5")
    covariance = p @ root @ root @ p
    assert jnp.linalg.norm(covariance - jnp.eye(35), 2) > 2
    by_axis = covariance.reshape(5, 7, 5, 7)
    assert jnp.linalg.norm(jnp.einsum("iaja->ij", by_axis) / 7 - jnp.eye(5), 2) < WHITENING_ERROR
    assert jnp.linalg.norm(jnp.einsum("aiaj->ij", by_axis) / 5 - jnp.eye(7), 2) < WHITENING_ERROR


@pytest.mark.parametrize("options", [{}, {"geometry": "quad4p"}, {"update_probability": 0.5}])
def test_updated_last_each_gradient_meets_the_preconditioner_of_the_ones_before(options, x64):
    steps = [gradients((4, 3), seed=seed)[0] for seed in range(6)]
    plain = optax_curv.scale_by_kron_psgd(0.5, max_skew=np.inf, **options)
    last = optax_curv.scale_by_kron_psgd(0.5, max_skew=np.inf, update_last=True, **options)
    state, same, update = last.init(steps[0]), plain.init(steps[0]), quick_jit(last.update)
    for count, g in enumerate(steps):
        before = optax_curv.axis_factors(state, g)
        updates, state = update(g, state)
        _, same = plain.update(g, same)
        if count:
            p = full_preconditioner(before, options.get("geometry", "q0.5eq1.5"))
            np.testing.assert_allclose(updates.reshape(-1), p @ g.reshape(-1), rtol=ROUNDING)
        for kept, other in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
            np.testing.assert_allclose(kept, other, rtol=ROUNDING, atol=ROUNDING)


def test_the_original_rule_never_leaves_the_identity():
    """Its probe is the gradient: at Q = I, A = B, so S = 0 for ever: no preconditioner."""
    tx = optax_curv.scale_by_kron_psgd(geometry="right_triangular")
    factors = run(tx, jnp.zeros((6, 4)), lambda v: v * jnp.geomspace(1e-3, 1e3, 4), 50)
    for q in factors:
        assert jnp.array_equal(q, jnp.eye(len(q)))


def first_update(tx, grads, steps=1):
    state = tx.init(grads)
    update = quick_jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state)
    return updates, state


def gradients(*shapes, seed=0, dtype=float):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


ROUNDING = 1e-9  # between two orders of float64 sums over some steps


def test_leaves_stacks_and_blocks_share_one_arithmetic(x64):
    """Three leaves of a shape, one stacked leaf and one leaf in blocks get the same updates."""
    leaves = gradients((4, 6), (4, 6), (4, 6))
    options = {"damping": 0.0, "max_skew": 2.0}
    alone = [first_update(optax_curv.scale_by_kron_psgd(**options), g, 3)[0] for g in leaves]
    together, _ = first_update(optax_curv.scale_by_kron_psgd(**options), leaves, 3)
    tx = optax_curv.scale_by_kron_psgd(stacked=True, **options)
    stacked, stacked_state = first_update(tx, jnp.stack(leaves), 3)
    tx = optax_curv.scale_by_kron_psgd(block_size=6, **options)
    blocks, blocks_state = first_update(tx, jnp.concatenate(leaves, axis=1), 3)
    np.testing.assert_allclose(jnp.stack(together), jnp.stack(alone), rtol=ROUNDING)
    np.testing.assert_allclose(stacked, jnp.stack(alone), rtol=ROUNDING)
    np.testing.assert_allclose(blocks, jnp.concatenate(alone, axis=1), rtol=ROUNDING)
    whole, cut = jnp.stack(leaves), jnp.concatenate(leaves, axis=1)
    factors = optax_curv.axis_factors(stacked_state, whole)
    assert [q.shape for q in factors] == [(3, 4, 4), (3, 6, 6)]
    factors = optax_curv.axis_factors(blocks_state, cut)
    assert [[q.shape for q in block] for block in factors] == [[(4, 4), (6, 6)]] * 3


@pytest.mark.parametrize("update_probability", [1.0, 0.5])
def test_chunks_of_a_group_take_the_steps_of_one_batch(update_probability, monkeypatch, x64):
    """Also where one leaf of the group is not finite: then nothing moves."""
    leaves = gradients((4, 6), (4, 6), (4, 6), (4, 6))
    tx = optax_curv.scale_by_kron_psgd(b1=0.9, geometry="eq", update_probability=update_probability)
    poisoned = [leaves[0].at[0, 0].set(jnp.nan), *leaves[1:]]

    def steps_and_a_fault():
        update, state = quick_jit(lambda *given: tx.update(*given)), tx.init(leaves)
        for grads in (leaves, leaves, poisoned, leaves):
            updates, state = update(grads, state)
        return updates, state

    whole = steps_and_a_fault()
    monkeypatch.setattr(kron_steps, "CHUNK", 250)  # two leaves
    assert whole[1].total_notfinite == 1
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=ROUNDING), steps_and_a_fault(), whole
    )


@pytest.mark.parametrize("max_dense_dim", [5, 100])
def test_a_stack_is_its_leaves_also_with_diagonal_factors(max_dense_dim, x64):
    leaves = gradients((4, 6), (4, 6), (4, 6))

    def last_update(grads, stacked):
        tx = optax_curv.scale_by_kron_psgd(
            max_dense_dim=max_dense_dim, max_skew=np.inf, stacked=stacked
        )
        update, state = quick_jit(lambda *given: tx.update(*given)), tx.init(grads)
        for _ in range(4):
            updates, state = update(grads, state)
        return updates

    alone = jnp.stack(last_update(leaves, None))
    np.testing.assert_allclose(last_update(jnp.stack(leaves), 1), alone, rtol=ROUNDING)


@pytest.mark.parametrize("update_probability", [1.0, 0.5])
def test_gradients_may_vary_over_a_shard_map_while_the_state_does_not(
    update_probability, monkeypatch
):
    monkeypatch.setattr(kron_steps, "CHUNK", 24)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax_curv.scale_by_kron_psgd(update_probability=update_probability)
    grads = gradients((4, 6), (4, 6))
    state = tx.init(grads)
    specs = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    of_part = jax.shard_map(
        lambda g, state: tx.update(g, state)[0], mesh=mesh, in_specs=specs, out_specs=specs[0]
    )
    expected, _ = first_update(tx, grads)
    jax.tree.map(np.testing.assert_array_equal, quick_jit(of_part)(grads, state), expected)


def test_axes_are_diagonal_where_small_long_or_skewed():
    leaves = {
        "a": jnp.zeros((8, 6)),
        "b": jnp.zeros((1, 5)),
        "c": jnp.zeros(()),
        "d": jnp.zeros((3, 3, 2)),
    }
    state = optax_curv.scale_by_kron_psgd().init(leaves)
    factors = optax_curv.axis_factors(state, leaves)
    assert [q.shape for q in factors["a"]] == [(8,), (6, 6)]
    assert [q.shape for q in factors["b"]] == [(1,), (5,)]
    assert [q.shape for q in factors["c"]] == [(1,)]
    assert [q.shape for q in factors["d"]] == [(3, 3), (3, 3), (2, 2)]
    state = optax_curv.scale_by_kron_psgd(max_dense_dim=7, max_skew=2.0).init(leaves)
    factors = optax_curv.axis_factors(state, leaves)
    assert [q.shape for q in factors["a"]] == [(8,), (6, 6)]


def test_uneven_blocks_are_not_padded():
    leaf = jnp.zeros((9, 3))
    state = optax_curv.scale_by_kron_psgd(block_size=4, max_skew=np.inf).init(leaf)
    factors = optax_curv.axis_factors(state, leaf)
    assert [[q.shape for q in block] for block in factors] == [[(3, 3), (3, 3)]] * 3
    tx = optax_curv.scale_by_kron_psgd(block_size=4)
    updates, _ = first_update(tx, jnp.ones((9, 5)))
    assert jnp.all(updates > 0)


@pytest.mark.parametrize("geometry", ["q0.5eq1.5", "eq", "qep", "quad4p"])
def test_scaled_gradients_with_scaled_factors_give_the_same_bits(geometry):
    """P is equivariant: g → 16 g with Q → Q/4 leaves P g unchanged for 200 steps."""

    tx = optax_curv.scale_by_kron_psgd(
        geometry=geometry, damping=0.0, max_skew=np.inf, init_scale=1.0
    )
    like = jnp.zeros((3, 4))
    state = tx.init(like)
    noise = jax.random.normal(jax.random.key(0), (200, 3, 4))

    @quick_jit
    def steps(state, grads):
        return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], state, grads)[1]

    base = steps(state, noise)
    left, right = optax_curv.axis_factors(state, like)
    smaller = (0.0625 if geometry == "quad4p" else 0.25) * left
    scaled = steps(optax_curv.with_axis_factors(state, like, (smaller, right)), 16 * noise)
    assert jnp.all(jnp.isfinite(base)) and jnp.any(base[0] != base[-1])
    assert jnp.array_equal(base, scaled)


@pytest.mark.parametrize("init_scale", [None, 1.0])
def test_a_leaf_that_wakes_late_moves_at_once(init_scale):
    """1500 zero gradients leave P finite, bounded by 1/damping; the next gradient is answered."""
    tx, like = optax_curv.scale_by_kron_psgd(init_scale=init_scale), jnp.zeros((4, 3))
    state = state_after(tx, like, jnp.zeros_like, 1500)
    factors = [jnp.diag(q) if q.ndim == 1 else q for q in optax_curv.axis_factors(state, like)]
    assert jnp.max(jnp.abs(full_preconditioner(factors, "q"))) < 1.3e9
    updates, state = quick_jit(tx.update)(jnp.ones((4, 3)), state)
    assert jnp.all(jnp.isfinite(updates)) and jnp.all(updates != 0)
    if init_scale is None:
        assert jnp.allclose(updates, 1.0, rtol=0.2)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e15])
def test_the_first_gradient_sets_the_scale(magnitude):
    """Whatever its magnitude, the first preconditioned gradient has entries near one."""
    tx = optax_curv.scale_by_kron_psgd(damping=0.0)
    g = magnitude * gradients((6, 6))[0]
    updates, state = first_update(tx, g)
    assert state.total_notfinite == 0
    assert 0.3 < float(jnp.sqrt(jnp.mean(updates**2))) < 3.0


@pytest.mark.parametrize("geometry", ["q0.5eq1.5", "eq", "quad"])
def test_cauchy_gradients_leave_the_factors_sound(geometry):
    tx = optax_curv.scale_by_kron_psgd(geometry=geometry, max_skew=np.inf)
    factors = run(tx, jnp.zeros((4, 3)), lambda v: v / (v[::-1] + 1e-12), STEPS)
    left, right = factors
    spectrum = jnp.linalg.eigvalsh(full_preconditioner((left, right), geometry))
    assert jnp.all(jnp.isfinite(spectrum)) and spectrum[0] > 0
    if geometry == "quad":
        assert jnp.array_equal(left, left.T) and jnp.array_equal(right, right.T)
    if geometry == "eq":
        assert jnp.array_equal(left, jnp.triu(left)) and jnp.array_equal(right, jnp.triu(right))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counter(bad):
    tx = optax_curv.scale_by_kron_psgd(b1=0.9)
    grads = {"w": gradients((4, 3))[0], "b": jnp.ones(3)}
    _, state = first_update(tx, grads, 2)
    updates, after = quick_jit(tx.update)({**grads, "b": jnp.array([1.0, bad, 1.0])}, state)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    assert after.total_notfinite == 1
    assert jax.tree.all(
        jax.tree.map(
            jnp.array_equal, after._replace(total_notfinite=0), state._replace(total_notfinite=0)
        )
    )


@pytest.mark.parametrize("geometry", ["q0.5eq1.5", "quad4p"])
def test_replaced_factors_are_applied_though_p_is_cached(geometry):
    """The update is that of the factors in the state, also where nothing has moved them."""
    tx = optax_curv.scale_by_kron_psgd(geometry=geometry, update_probability=0.0, max_skew=np.inf)
    g = gradients((4, 3))[0]
    _, state = first_update(tx, g, 2)
    update = quick_jit(tx.update)
    for edit in (jnp.sin, jnp.triu, jnp.tril, jnp.transpose, lambda q: 2 * q):
        factors = tuple(map(edit, gradients((4, 4), (3, 3), seed=1)))
        _, state = update(g, optax_curv.with_axis_factors(state, g, factors))
        left, right = factors if geometry == "quad4p" else (q.T @ q for q in factors)
        expected = left @ g @ right.T
        for _ in range(2):  # the second step applies a P that was kept
            updates, state = update(g, state)
            np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-4)


def test_update_probability_is_how_often_factors_move():
    tx = optax_curv.scale_by_kron_psgd(
        update_probability=lambda count: jnp.where(count < 5, 1.0, 0.25)
    )
    like = jnp.zeros((4, 3))
    state = tx.init(like)

    def step(state, g):
        moved = tx.update(g, state)[1]
        old, new = (optax_curv.axis_factors(x, like)[1] for x in (state, moved))
        return moved, jnp.any(old != new)

    grads = jax.random.normal(jax.random.key(0), (405, 4, 3))
    _, moved = quick_jit(lambda grads: jax.lax.scan(step, state, grads))(grads)
    assert jnp.all(moved[:5])
    assert 60 <= int(moved[5:].sum()) <= 140  # binomial(400, 1/4): 100 ± 4.6 standard deviations


def test_momentum_is_preconditioned_and_may_be_what_is_whitened():
    g1, g2 = gradients((4, 3), (4, 3))
    averages = [g1, (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)]
    for whiten, signals in (("gradient", [g1, g2]), ("momentum", averages)):
        tx = optax_curv.scale_by_kron_psgd(b1=0.9, whiten=whiten, damping=0.0)
        plain = optax_curv.scale_by_kron_psgd(damping=0.0)
        state, plain_state = tx.init(g1), plain.init(g1)
        for g, signal in zip([g1, g2], signals, strict=True):
            updates, state = quick_jit(tx.update)(g, state)
            _, plain_state = quick_jit(plain.update)(signal, plain_state)
        diagonal, dense = optax_curv.axis_factors(plain_state, g1)
        expected = (diagonal**2)[:, None] * averages[-1] @ dense.T @ dense
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("geometry", ["q0.5eq1.5", "eq"])
def test_every_rank_and_dtype_passes(geometry):
    leaves = {
        "scalar": jnp.ones((), jnp.bfloat16),
        "vector": jnp.ones(5),
        "tensor": jnp.ones((2, 3, 4)) * jnp.arange(1.0, 5),
        "complex": jnp.ones((3, 3), jnp.complex64) * (1 + 2j),
        "empty": jnp.ones((0, 3)),
        "none": None,
    }
    tx = optax_curv.scale_by_kron_psgd(geometry=geometry, b1=0.9)
    state = tx.init(leaves)
    update = quick_jit(tx.update)
    for _ in range(3):
        updates, after = update(leaves, state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        state = after
    assert state.total_notfinite == 0
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
        lambda g: (g.shape, g.dtype), leaves
    )
    assert all(jnp.all(jnp.isfinite(u)) and jnp.all(u != 0) for u in jax.tree.leaves(updates))


def test_complex_gradients_are_whitened(x64):
    """G = H1 V H2 with complex Hermitian H1."""
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.standard_normal((4, 4)) + 1j * random.standard_normal((4, 4)))
    h1, h2 = jnp.asarray((basis * np.geomspace(1, 0.2, 4)) @ basis.conj().T), spd(3, 3.0, 1)
    tx = optax_curv.scale_by_kron_psgd(optax.linear_schedule(0.5, 0.0, 1000), max_skew=np.inf)
    factors = run(tx, jnp.zeros((4, 3), jnp.complex128), lambda v: h1 @ v @ h2, 1000)
    error = full_preconditioner(factors, "q") @ jnp.kron(h1, h2) - jnp.eye(12)
    assert jnp.linalg.norm(error, 2) < WHITENING_ERROR


def test_short_factors_keep_their_dtype_and_follow():
    g = gradients((8, 8))[0]
    tx = optax_curv.scale_by_kron_psgd(precond_dtype="bfloat16")
    updates, state = first_update(tx, g, 3)
    exact, _ = first_update(optax_curv.scale_by_kron_psgd(), g, 3)
    factors = optax_curv.axis_factors(state, g)
    assert {q.dtype for q in factors} == {jnp.dtype(jnp.bfloat16)}
    assert updates.dtype == jnp.float32
    assert jnp.linalg.norm(updates - exact) < 0.1 * jnp.linalg.norm(exact)


def test_a_sweep_over_rates_is_a_vmap():
    g = gradients((4, 3))[0]

    def final(rate):
        tx = optax_curv.scale_by_kron_psgd(rate, update_probability=0.9)
        return tx.update(g, tx.update(g, tx.init(g))[1])[0]

    rates = jnp.array([0.01, 0.1])
    np.testing.assert_allclose(
        quick_jit(jax.vmap(final))(rates), [quick_jit(final)(rate) for rate in rates], rtol=1e-4
    )


def test_hyperparameters_may_be_injected():
    tx = optax.inject_hyperparams(optax_curv.scale_by_kron_psgd)(precond_lr=0.2, damping=0.0)
    g = gradients((4, 3))[0]
    state = tx.init(g)
    updates, _ = quick_jit(tx.update)(g, state)
    expected, _ = first_update(optax_curv.scale_by_kron_psgd(0.2, damping=0.0), g)
    np.testing.assert_allclose(updates, expected, rtol=1e-4)
    tx = optax.inject_hyperparams(optax_curv.scale_by_kron_psgd)(max_dense_dim=8)
    with pytest.raises(
        ValueError, match=r"max_dense_dim decides.*static_args=\('max_dense_dim',\)"
    ):
        jax.eval_shape(tx.init, g)


def test_init_needs_shapes_only_and_wrappers_pass_through():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    tx = optax_curv.kron_psgd(0.1)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert jax.tree.map(jnp.shape, tx.init(abstract)) == jax.tree.map(jnp.shape, tx.init(params))
    for wrapped in (optax.masked(tx, {"w": True, "b": False}), optax.MultiSteps(tx, 2)):
        updates, _ = quick_jit(wrapped.update)(params, wrapped.init(params), params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    for empty in ({}, None, ()):
        assert tx.update(empty, tx.init(empty))[0] == empty


def test_the_alias_is_the_chain_it_says():
    g, params = gradients((4, 3), (4, 3))
    tx = optax_curv.kron_psgd(0.1, weight_decay=0.01, max_rms=0.5)
    updates, _ = quick_jit(tx.update)(g, tx.init(params), params)
    whitened, _ = first_update(optax_curv.scale_by_kron_psgd(b1=0.9), g)
    clipped = whitened * jnp.minimum(1, 2.5 / jnp.max(jnp.abs(whitened)))
    clipped = clipped / jnp.maximum(1, jnp.sqrt(jnp.mean(clipped**2)) / 0.5)
    np.testing.assert_allclose(updates, -0.1 * (clipped + 0.01 * params), rtol=1e-5)


def test_newton_solves_a_quadratic():
    hessian = spd(6, 100.0, 0).astype(jnp.float32)
    loss = lambda w: 0.5 * w @ hessian @ w  # noqa: E731
    kron = optax_curv.scale_by_kron_psgd(0.5, criterion="newton", max_skew=np.inf)
    tx = optax.chain(kron, optax.clip_by_block_rms(2.0), optax.scale(-0.5))

    def step(carry, key):
        w, state = carry
        _, grads, probe, hvp = optax_curv.hessian_probe(loss, w, key=key)
        updates, state = tx.update(grads, state, w, probe=probe, hvp=hvp)
        return (optax.apply_updates(w, updates), state), None

    start = (jnp.ones(6), tx.init(jnp.ones(6)))
    keys = jax.random.split(jax.random.key(0), 300)
    (w, _), _ = quick_jit(lambda start: jax.lax.scan(step, start, keys))(start)
    assert loss(w) < 1e-10 * loss(jnp.ones(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precond_lr": 0.0}, r"precond_lr > 0, got precond_lr=0.0"),
        ({"precond_lr": -1}, r"precond_lr > 0"),
        ({"geometry": "square"}, r"unknown geometry='square'; expected one of .*'q0.5eq1.5'"),
        ({"criterion": "hessian"}, r"unknown criterion='hessian'"),
        ({"whiten": "noise"}, r"unknown whiten='noise'"),
        ({"b1": 1.5}, r"b1 <= 1"),
        ({"update_probability": 2.0}, r"update_probability <= 1"),
        ({"init_scale": 0.0}, r"init_scale > 0"),
        ({"block_size": 0}, r"block_size > 0"),
        ({"geometry": "right_triangular", "criterion": "newton"}, r"use another geometry"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optax_curv.scale_by_kron_psgd(**options)


def test_bad_trees_are_refused():
    tx = optax_curv.scale_by_kron_psgd()
    with pytest.raises(ValueError, match=r"leaf \['n'\] has dtype int32"):
        tx.init({"n": jnp.arange(3)})
    state = tx.init({"w": jnp.ones((4, 3))})
    with pytest.raises(
        ValueError, match=r"the state does not fit the gradients: at .*'v'.*nothing"
    ):
        tx.update({"v": jnp.ones((4, 3))}, state)
    with pytest.raises(ValueError, match=r"it has shape nothing, expected \(1, 3, 3\)"):
        tx.update({"w": jnp.ones((3, 4))}, state)
    with pytest.raises(
        ValueError, match=r"got probe=given, hvp=missing; pass both, as hessian_probe"
    ):
        tx.update({"w": jnp.ones((4, 3))}, state, probe={"w": jnp.ones((4, 3))})
    newton = optax_curv.scale_by_kron_psgd(criterion="newton")
    with pytest.raises(ValueError, match=r"criterion='newton' got probe=missing, hvp=missing"):
        newton.update({"w": jnp.ones((4, 3))}, state)
    with pytest.raises(
        ValueError, match=r"hvp and the gradients differ in shape at \['w'\]: got \(3, 4\)"
    ):
        newton.update(
            {"w": jnp.ones((4, 3))},
            state,
            probe={"w": jnp.ones((4, 3))},
            hvp={"w": jnp.ones((3, 4))},
        )
    with pytest.raises(
        ValueError, match=r"stacked=3 leading axes at the root, but its shape is \(4, 3\)"
    ):
        optax_curv.scale_by_kron_psgd(stacked=3).init(jnp.ones((4, 3)))


def test_the_schedule_is_flat_then_decays_to_its_floor():
    schedule = optax_curv.flat_then_decay(flat_steps=10, decay=0.1, floor=0.2)
    np.testing.assert_allclose(
        [schedule(i) for i in (0, 10, 20, 1000)], [1, 1, np.exp(-1), 0.2], rtol=1e-6
    )


def test_an_nnx_optimizer_takes_the_same_steps_as_a_tree():
    model, tx = (
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
        optax_curv.scale_by_kron_psgd(update_probability=0.5, block_size=2),
    )
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state, optimizer = tx.init(params), nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        grads = jax.tree.map(lambda x: jnp.sin(7 * x) + 0.1, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
        updates, state = tx.update(nnx.as_pure(grads), state)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model, nnx.Param)), params)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_a_gram_matrix_by_halves_is_the_product(dtype, x64, monkeypatch):
    monkeypatch.setattr(_compiler, "HALVED_FROM", 4)
    parts = np.random.default_rng(0).standard_normal((2, 6, 9))
    x = jnp.asarray(parts[0] + 1j * parts[1] if dtype == "complex128" else parts[0])
    assert "concatenate" in str(jax.make_jaxpr(_compiler.gram)(x))  # it goes by halves
    np.testing.assert_allclose(
        _compiler.gram(x), np.asarray(x) @ np.asarray(x).conj().T, rtol=1e-13
    )


def test_products_that_overflow_move_no_parameter_and_leave_their_own_factors():
    tx, params = optax_curv.scale_by_kron_psgd(), {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    factors = optax_curv.axis_factors(state, params)
    factors["a"] = jax.tree.map(lambda q: 1e15 * q, factors["a"])  # P of 1e60
    state = optax_curv.with_axis_factors(state, params, factors)
    updates, new = tx.update(params, state, params)
    chex.assert_tree_all_finite((updates, new))
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(optax_curv.axis_factors(new, params)["a"], factors["a"])
    assert new.total_notfinite == 1


def test_factors_shown_and_set_are_the_same_whatever_the_leaf():
    """Stacked and plain leaves, scalars, vectors, uneven blocks in both axes, and empty leaves."""
    params = {
        "stack": jnp.ones((3, 4, 6)),
        "matrix": jnp.ones((5, 7)),
        "other": jnp.ones((5, 7)),
        "vector": jnp.ones(7),
        "scalar": jnp.ones(()),
        "empty": jnp.ones((0, 3)),
    }
    stacked = {**dict.fromkeys(params, 0), "stack": 1}
    tx = optax_curv.scale_by_kron_psgd(
        block_size=3, max_skew=np.inf, stacked=stacked, update_probability=0.5, init_scale=1.0
    )
    state = tx.init(params)
    factors = optax_curv.axis_factors(state, params)
    shapes = jax.tree.map(jnp.shape, factors, is_leaf=lambda x: hasattr(x, "shape"))
    assert shapes["stack"] == (((3, 2, 2), (3, 3, 3)),) * 4
    assert [[q[0] for q in block] for block in shapes["matrix"]] == [
        [2, 2],
        [2, 2],
        [2, 3],
        [3, 2],
        [3, 2],
        [3, 3],
    ]
    assert shapes["vector"] == (((2, 2),), ((2, 2),), ((3, 3),))
    assert shapes["scalar"] == ((1,),)
    assert shapes["empty"] == ()
    leaves, treedef = jax.tree.flatten(factors)
    changed = treedef.unflatten([x + i for i, x in enumerate(leaves)])
    again = optax_curv.with_axis_factors(state, params, changed)
    chex.assert_trees_all_equal(optax_curv.axis_factors(again, params), changed)
    chex.assert_trees_all_equal_structs(again, state)
    assert not any(jnp.any(p) for p in jax.tree.leaves(again.preconditioners))


def test_a_block_has_the_factors_of_its_own_part_of_the_leaf():
    """One step of whitening a leaf in blocks gives each block the factors that it has alone."""
    leaf = gradients((4, 7))[0]
    tx = optax_curv.scale_by_kron_psgd(block_size=3, max_skew=np.inf, damping=0.0)
    _, state = first_update(tx, leaf)
    parts = [leaf[i : i + 2, j:k] for i in (0, 2) for j, k in ((0, 2), (2, 4), (4, 7))]
    for block, part in zip(optax_curv.axis_factors(state, leaf), parts, strict=True):
        _, alone = first_update(tx, part)
        for found, expected in zip(block, optax_curv.axis_factors(alone, part), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_factors_of_another_tree_or_shape_are_refused():
    params = {"w": jnp.ones((4, 3))}
    tx = optax_curv.kron_psgd(0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"factors at \['w'\] have shapes .*expected"):
        optax_curv.with_axis_factors(state, params, {"w": (jnp.ones(4), jnp.ones((4, 4)))})
    with pytest.raises(ValueError, match=r"in the place of each leaf"):
        optax_curv.with_axis_factors(state, params, {"v": (jnp.ones(4), jnp.ones((3, 3)))})
    with pytest.raises(ValueError, match=r"one ScaleByKronPsgdState, found 0"):
        optax_curv.axis_factors(optax.adam(0.1).init(params), params)


def test_the_state_of_another_geometry_is_refused():
    """P, Q and a triangular Q have arrays of the same shapes."""
    params = jnp.ones((4, 4))
    for geometry in GEOMETRIES:
        state = optax_curv.scale_by_kron_psgd(geometry=geometry).init(params)
        kind = {"eq": "triangular Q", "quad4p": "P"}.get(geometry, "Q")
        assert [list(kinds) for kinds in state.factors.values()] == [[kind]]
        other = optax_curv.scale_by_kron_psgd(geometry="eq" if kind != "triangular Q" else "quad")
        with pytest.raises(ValueError, match=r"the state does not fit the gradients"):
            other.update(params, state)


def test_momentum_is_free_of_bias_beyond_the_last_count():
    tx, g = optax_curv.scale_by_kron_psgd(b1=0.9), jnp.ones((4, 3))
    _, state = first_update(tx, g)
    state = state._replace(count=jnp.int32(2**31 - 1))
    updates, after = quick_jit(tx.update)(g, state)
    assert after.count == 2**31 - 1
    assert jnp.all(jnp.isfinite(updates)) and jnp.all(updates > 0.3)
