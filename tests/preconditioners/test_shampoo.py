"""Shampoo against its dense definition, and what its state survives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_curv
from optax_curv.linalg.factors import SymmetricPair

ROOT = "the root"  # the stack of a tree that is one array

ROUNDING = 1e-8  # relative, in float64, through roots of factors damped to condition 1e6
DAMPING = 1e-6

# Small matrices take longer to compile than to run.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gradients(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def mode_moment(g, axis):
    unfolded = np.moveaxis(np.asarray(g), axis, 0).reshape(g.shape[axis], -1)
    return unfolded @ unfolded.conj().T


def damped_power(factor, exponent):
    values, vectors = np.linalg.eigh(factor)
    return (vectors * (values + DAMPING * values[-1]) ** -exponent) @ vectors.conj().T


def run(tx, steps):
    """The updates and the last state."""
    state, update, updates = tx.init(steps[0]), quick_jit(tx.update), []
    for g in steps:
        new, state = update(g, state)
        updates.append(new)
    return updates, state


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 4), (2, 2, 2, 3)])
@pytest.mark.parametrize("exponent", [0.5, 0.25, 0.7])
def test_the_direction_is_the_kronecker_product_of_roots_times_the_momentum(shape, exponent, x64):
    """u = (⊗ Fᵢ)⁻ᵉ vec(m) with averages of Adam's kind, whatever the rank."""
    decay, b1, steps = 0.9, 0.8, gradients(shape, shape, shape)
    tx = optax_curv.scale_by_shampoo(
        decay,
        b1=b1,
        nesterov=False,
        exponent=exponent,
        damping=DAMPING,
        refresh_growth=np.inf,
        root_every=1,
    )
    updates, state = run(tx, steps)
    factors, momentum = [0.0] * len(shape), 0.0
    for count, (g, u) in enumerate(zip(steps, updates, strict=True), start=1):
        momentum = b1 * momentum + (1 - b1) * np.asarray(g)
        factors = [decay * f + (1 - decay) * mode_moment(g, axis) for axis, f in enumerate(factors)]
        roots = [damped_power(f / (1 - decay**count), exponent) for f in factors]
        whole = functools.reduce(np.kron, roots)
        expected = whole @ momentum.ravel() / (1 - b1**count)
        np.testing.assert_allclose(
            u.ravel(), expected, rtol=0, atol=ROUNDING * np.abs(expected).max()
        )
    for kept, factor in zip(state.factors[ROOT], factors, strict=True):
        np.testing.assert_allclose(kept.factor[0], factor / (1 - decay ** len(steps)), rtol=1e-12)


def test_roots_by_orthogonal_iteration_are_those_of_the_tracked_basis(x64):
    """Q ← QR(F Q) with columns in falling order and R = Q diag(qᵀ F q)⁻ᵉ Qᵀ, by numpy."""
    g, steps = gradients((6, 9))[0], 30
    g = g * jnp.geomspace(1, 1e-2, 6)[:, None]
    tx = optax_curv.scale_by_shampoo(1.0, b1=0.0, root="qr", root_every=1, damping=DAMPING)
    updates, state = run(tx, [g] * steps)
    factors = [mode_moment(g, axis) for axis in (0, 1)]
    exact = damped_power(factors[0], 0.5) @ g @ damped_power(factors[1], 0.5)
    bases = [np.eye(6), np.eye(9)]
    for step in range(steps):
        for i, f in enumerate(factors):
            image = f @ bases[i]
            bases[i], _ = np.linalg.qr(
                image[:, np.argsort(-np.sum(bases[i] * image, axis=0), kind="stable")]
            )
        values = [
            np.maximum(np.sum(q * (f @ q), axis=0), 0) for f, q in zip(factors, bases, strict=True)
        ]
        left, right = (
            (q * (v + DAMPING * v.max()) ** -0.5) @ q.T for q, v in zip(bases, values, strict=True)
        )
        np.testing.assert_allclose(
            updates[step], left @ g @ right, rtol=0, atol=1e-6 * jnp.abs(updates[step]).max()
        )
    np.testing.assert_allclose(updates[-1], exact, rtol=0, atol=0.03 * jnp.abs(exact).max())
    basis = state.bases[ROOT][0][0]
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-12)


def root_in_basis(factor, basis, exponent=0.5, drop_below=0.0):
    """R = Q (diag(Qᴴ F Q) + δ λ_max)⁻ᵉ Qᴴ, 0 where a value is below its share of the largest."""
    values = np.diag(basis.T @ factor @ basis)
    powers = np.where(
        values < drop_below * values.max(), 0, (values + DAMPING * values.max()) ** -exponent
    )
    return (basis * powers) @ basis.T


def test_fresh_values_are_those_of_the_present_factor_in_the_last_basis(x64):
    steps = gradients(*[(4, 6)] * 8)
    options = {"nesterov": False, "root": "qr", "damping": DAMPING, "refresh_growth": np.inf}
    tx = optax_curv.scale_by_shampoo(fresh_values=True, root_every=3, **options)
    state, update, stale = tx.init(steps[0]), quick_jit(tx.update), 0
    for g in steps:
        u, state = update(g, state)
        left, right = (
            root_in_basis(np.asarray(pair.factor[0]), np.asarray(basis[0]))
            for pair, basis in zip(state.factors[ROOT], state.bases[ROOT], strict=True)
        )
        np.testing.assert_allclose(u, left @ state.momentum[ROOT][0] @ right, rtol=ROUNDING)
        stale += not np.allclose(left, state.factors[ROOT][0].root[0], rtol=1e-3)
    assert stale > 1  # the roots that are kept are older
    always = {"root_every": 1, **options}
    same = [
        run(optax_curv.scale_by_shampoo(fresh_values=x, **always), steps) for x in (False, True)
    ]
    np.testing.assert_allclose(*(updates for updates, _ in same), rtol=ROUNDING)


@pytest.mark.parametrize("root", ["eigh", "qr"])
def test_values_below_the_tolerance_are_dropped_and_not_damped(root, x64):
    steps = gradients((4, 6), (4, 6))
    tx = optax_curv.scale_by_shampoo(
        nesterov=False, root=root, damping=DAMPING, drop_below=0.1, root_every=1
    )
    updates, state = run(tx, steps)
    pairs, roots = state.factors[ROOT], []
    for axis, pair in enumerate(pairs):
        factor = np.asarray(pair.factor[0])
        basis = (
            np.linalg.eigh(factor)[1] if root == "eigh" else np.asarray(state.bases[ROOT][axis][0])
        )
        roots.append(root_in_basis(factor, basis, drop_below=0.1))
    expected = roots[0] @ state.momentum[ROOT][0] @ roots[1]
    np.testing.assert_allclose(updates[-1], expected, rtol=ROUNDING, atol=ROUNDING)
    ranks = [np.linalg.matrix_rank(x) for x in roots]
    assert ranks[0] <= 4 and ranks[1] < 6  # two gradients of rank four leave little of the rest
    # Of an axis with a diagonal factor what is small is left out alike.
    vector = optax_curv.scale_by_shampoo(nesterov=False, drop_below=0.1, max_dim=1, b1=0.0)
    u, _ = vector.update(jnp.array([3.0, 0.5, 1.0]), vector.init(jnp.zeros(3)))
    np.testing.assert_allclose(u, [1.0, 0.0, 1.0], rtol=1e-4)


def test_a_bad_gradient_changes_nothing_but_the_counter():
    tx = optax_curv.shampoo(0.1)
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    _, state = run(tx, [params, params])
    updates, after = quick_jit(tx.update)({**params, "b": jnp.array([1.0, jnp.nan, 1.0])}, state)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    assert after[0].total_notfinite == 1
    same = jax.tree.map(
        jnp.array_equal, after[0]._replace(total_notfinite=0), state[0]._replace(total_notfinite=0)
    )
    assert jax.tree.all(same)


def test_the_alias_sends_matrices_to_shampoo_and_the_rest_to_adam():
    shapes = {"embedding": (5, 4), "kernel": (4, 3), "bias": (3,)}
    params = dict(zip(shapes, gradients(*shapes.values()), strict=True))
    grads = dict(zip(shapes, gradients(*shapes.values(), seed=1), strict=True))
    tx = optax_curv.shampoo(
        0.1, weight_decay=0.01, adam_for=lambda path, leaf: path[0].key == "embedding"
    )
    updates, _ = quick_jit(tx.update)(grads, tx.init(params), params)
    ours = optax.chain(optax_curv.scale_by_shampoo(damping=1e-5), optax_curv.normalize_by_rms(0.2))
    direction, _ = optax.scale_by_adam().update(grads, optax.scale_by_adam().init(params))
    direction["kernel"], _ = quick_jit(ours.update)(grads["kernel"], ours.init(params["kernel"]))
    for name in shapes:
        np.testing.assert_allclose(
            updates[name], -0.1 * (direction[name] + 0.01 * params[name]), rtol=1e-3
        )


def test_an_nnx_optimizer_takes_the_same_steps_as_a_tree():
    model, tx = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), optax_curv.shampoo(0.1)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state, optimizer = tx.init(params), nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        grads = jax.tree.map(lambda x: jnp.sin(7 * x) + 0.1, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
        updates, state = tx.update(nnx.as_pure(grads), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model, nnx.Param)), params)


def test_stacked_and_blocked_leaves_are_the_leaves_done_one_by_one(x64):
    leaves = gradients((4, 5), (4, 5), (4, 5))
    alone = jnp.stack([run(optax_curv.scale_by_shampoo(), [g, 2 * g])[0][-1] for g in leaves])
    steps = jnp.stack(leaves)
    stacked = run(optax_curv.scale_by_shampoo(stacked=True), [steps, 2 * steps])[0][-1]
    np.testing.assert_allclose(stacked, alone, rtol=0, atol=ROUNDING * jnp.abs(alone).max())
    wide = jnp.concatenate(leaves, axis=1)
    blocked = run(optax_curv.scale_by_shampoo(block_size=5), [wide, 2 * wide])[0][-1]
    expected = jnp.concatenate(list(alone), axis=1)
    np.testing.assert_allclose(blocked, expected, rtol=0, atol=ROUNDING * jnp.abs(alone).max())


def test_the_covariance_is_the_fixed_point_of_the_kl_variant(x64):
    """For gradients A^(1/2) Z B^(1/2) the mean step from the factors A and B is no step."""
    x, y = gradients((3, 9), (4, 9), seed=2)
    factors = (x @ x.T, y @ y.T)
    halves = [jnp.asarray(damped_power(f, -0.5)) for f in factors]
    roots = tuple(jnp.linalg.inv(half) for half in halves)
    tx = optax_curv.scale_by_shampoo(0.0, kl=True, root_every=10)
    state = tx.init(jnp.zeros((3, 4)))
    kept = tuple(
        pair.replace(factor=f[None], root=r[None])
        for pair, f, r in zip(state.factors[ROOT], factors, roots, strict=True)
    )
    state = state._replace(count=jnp.int32(1), factors={ROOT: kept})
    # The mean outer product of these is the identity.
    units = jnp.eye(12).reshape(12, 3, 4) * jnp.sqrt(12.0)
    steps = jax.vmap(lambda z: tx.update(halves[0] @ z @ halves[1], state)[1].factors)
    for kept, factor in zip(quick_jit(steps)(units)[ROOT], factors, strict=True):
        assert isinstance(kept, SymmetricPair)
        np.testing.assert_allclose(
            kept.factor[:, 0].mean(axis=0), factor, atol=1e-4 * jnp.abs(factor).max()
        )


@pytest.mark.parametrize("root", ["eigh", "newton", "qr"])
def test_gradients_of_every_fault_leave_all_finite(root):
    """Zero, rank-1 and huge gradients, and a leaf that wakes late, which moves at once."""
    tx = optax.chain(
        optax_curv.scale_by_shampoo(root_every=100, root=root), optax_curv.normalize_by_rms(0.2)
    )
    state, update = tx.init(jnp.zeros((4, 3))), quick_jit(tx.update)
    normal = gradients((4, 3))[0].astype(jnp.float32)
    rank_one = jnp.outer(normal[:, 0], normal[0])
    for g in (
        *[0 * normal] * 30,
        normal,
        rank_one,
        1e15 * normal,
        1e30 * normal,
        1e-15 * normal,
        normal,
    ):
        updates, state = update(g, state)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        assert jnp.any(g) == jnp.any(updates) or jnp.max(jnp.abs(g)) > 1e20
    assert state[0].total_notfinite == 1  # the square of 1e30 overflows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": 0.0}, r"exponent > 0, got exponent=0.0"),
        ({"exponent": -1}, r"exponent > 0"),
        ({"root": "svd"}, r"unknown root='svd'; expected one of"),
        ({"root": "newton", "exponent": 0.7}, r"whose inverse is whole, got exponent=0.7"),
        ({"block_size": 0}, r"block_size >= 1, got block_size=0"),
        ({"kl": True, "exponent": 0.25}, r"needs exponent=0.5, got 0.25"),
        ({"drop_below": 1.0}, r"expected drop_below < 1, got drop_below=1.0"),
        ({"drop_below": -0.1}, r"expected drop_below >= 0"),
        ({"drop_below": 0.1, "root": "newton"}, r"cannot drop any"),
        ({"fresh_values": True}, r"needs the basis that root=\"qr\" keeps"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optax_curv.scale_by_shampoo(**options)


def test_labels_that_miss_a_leaf_or_say_nothing_are_refused():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises(
        ValueError,
        match=r"adam_for must be a prefix of the parameters' tree; it misses \[\"\['b'\]\"\]",
    ):
        optax_curv.shampoo(0.1, adam_for={"w": True}).init(params)
    with pytest.raises(ValueError, match=r"adam_for gives 'sgd' for the leaf \['w'\]"):
        optax_curv.shampoo(0.1, adam_for={"w": "sgd", "b": True}).init(params)


EXAMPLES = 32
RATE = 0.2  # the best of 0.05, 0.1, 0.2 and 0.5 at the default period


def weights():
    return dict(
        zip(
            ("w1", "w2"),
            (x.astype(jnp.float32) / 2 for x in gradients((6, 8), (8, 3), seed=3)),
            strict=True,
        )
    )


def fitted(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


@quick_jit
def training_losses(period, rate, one_example, asleep):
    """Losses of 200 steps on batches of 16 examples or of one; one layer sleeps till `asleep`."""
    x, noise = (g.astype(jnp.float32) for g in gradients((EXAMPLES, 6), (EXAMPLES, 3), seed=4))
    y = fitted(jax.tree.map(lambda w: 1.5 * jnp.cos(3 * w), weights()), x) + 0.1 * noise
    tx = optax_curv.shampoo(lambda count: rate * (1 - count / 200), root_every=period)

    def loss(params, chosen):
        return jnp.sum(chosen[:, None] * jnp.square(fitted(params, x) - y)) / jnp.sum(chosen)

    def step(carry, count):
        params, state = carry
        place = (jnp.arange(EXAMPLES) - 16 * count) % EXAMPLES
        chosen = jnp.where(
            one_example, jnp.arange(EXAMPLES) == count % EXAMPLES, place < 16
        ).astype(jnp.float32)
        grads = jax.grad(loss)(params, chosen)
        grads["w2"] = jnp.where(count < asleep, 0, grads["w2"])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), loss(params, jnp.ones(EXAMPLES))

    (params, state), losses = jax.lax.scan(step, (weights(), tx.init(weights())), jnp.arange(200))
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, state))])
    return losses, jnp.all(finite)


@pytest.mark.parametrize("period", [1, 2, 5, 10, 20, 50, 100])
def test_no_period_of_the_roots_diverges_at_the_tuned_rate(period):
    losses, finite = training_losses(period, RATE, False, 0)
    assert finite
    assert jnp.max(losses) < 1.5 * losses[0]
    assert losses[-1] < 1.5 * training_losses(1, RATE, False, 0)[0][-1] < 0.2 * losses[0]


@pytest.mark.parametrize("period", [1, 100])
@pytest.mark.parametrize(
    ("rate", "one_example", "asleep"),
    [(10 * RATE, False, 0), (RATE, True, 0), (10 * RATE, True, 50), (RATE, False, 50)],
)
def test_training_stays_finite_at_high_rates_on_single_examples_and_with_a_late_layer(
    period, rate, one_example, asleep
):
    losses, finite = training_losses(period, rate, one_example, asleep)
    assert finite and jnp.all(jnp.isfinite(losses))
    if rate == RATE:
        assert losses[-1] < losses[0]
