"""Both branch methods for branches [K, D], against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

FLOAT64 = 1e-9  # relative; the dense reference's own rounding at damping 1e-6
MONTE_CARLO = (
    0.06  # of the gradient's norm: 10,000 draws of a direction about twice as long as the gradient
)
FLOAT32 = 1e-5
NOISELESS = 1e-6

# the originals' rule where a test does not say otherwise
METHODS = {
    "fisher": functools.partial(optax_curv.scale_by_branch_fisher, complement=False),
    "kfac": functools.partial(optax_curv.scale_by_branch_kfac, blocks=2, complement=False),
}
both_methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def problem(n=9, count=6, dimension=4, seed=0):
    """Gradient (a tree), branches, projection; all in float64 or float32 as JAX is set."""
    rng = np.random.default_rng(seed)
    grads = {"a": jnp.asarray(rng.normal(size=n - 2)), "b": jnp.asarray(rng.normal(size=(2, 1)))}
    return (
        grads,
        jnp.asarray(rng.normal(size=(count, dimension)) + 2),
        jnp.asarray(rng.normal(size=(n, dimension))),
    )


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def covariance(make, branches, centered=True):
    """The D × D matrix that the method keeps."""
    samples = np.asarray(branches) - (np.mean(branches, axis=0) if centered else 0)
    full = samples.T @ samples / max(1, len(samples) - centered)
    run = np.arange(full.shape[0]) >= -(-full.shape[0] // 2)
    return full * (run[:, None] == run) if make is METHODS["kfac"] else full


def assert_equal_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def relative(value, reference):
    return np.abs(value - reference).max() / np.abs(reference).max()


SHAPES = [(9, 3, 4), (9, 8, 4), (3, 3, 5), (3, 9, 5), (30, 1, 4)]


@both_methods
@pytest.mark.parametrize(("n", "count", "dimension"), SHAPES)
def test_complement_equals_the_dense_inverse(make, n, count, dimension, x64):
    grads, branches, projection = problem(n, count, dimension)
    pulled_back = projection @ covariance(make, branches) @ projection.T

    @jax.jit
    def directions(dampings):
        def one(damping):
            tx = make(damping, complement=True)
            return tx.update(grads, tx.init(grads), branches=branches, projection=projection)[0]

        return jax.vmap(one)(dampings)

    dampings = np.array([1e-6, 1e-3, 1.0, 1e3])
    found = directions(dampings)
    for i, damping in enumerate(dampings):
        dense = damping * np.linalg.solve(damping * np.eye(n) + pulled_back, flat(grads))
        assert relative(flat(jax.tree.map(lambda x: x[i], found)), dense) < 10 * FLOAT64  # noqa: B023


@both_methods
@pytest.mark.parametrize("centered", [False, True])
def test_direction_equals_the_dense_solve(make, centered, x64):
    grads, branches, projection = problem()
    options = {"max_iters": 50, "tol": 0.0} if make is METHODS["fisher"] else {}
    tx = make(0.1, centered=centered, **options)
    direction, state = jax.jit(tx.update)(
        grads, tx.init(grads), branches=branches, projection=projection
    )
    metric = covariance(make, branches, centered) + 0.1 * np.eye(4)
    dense = projection @ np.linalg.solve(metric, projection.T @ flat(grads))
    assert relative(flat(direction), dense) < FLOAT64
    np.testing.assert_allclose(state.precond_norm, np.linalg.norm(dense), rtol=NOISELESS)


@both_methods
def test_complement_in_float32_holds_where_the_damping_is_below_the_rounding_of_the_metric(
    make, x64
):
    grads, branches, projection = problem(n=300, count=12, dimension=4)
    projection = 100 * projection  # ‖P cov Pᵀ‖ is about 1e7, its float32 rounding about 1
    tx = make(1e-3, complement=True)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, branches, projection))
    update = jax.jit(tx.update)
    exact, _ = update(grads, tx.init(grads), branches=branches, projection=projection)
    found, _ = update(single[0], tx.init(single[0]), branches=single[1], projection=single[2])
    assert found["a"].dtype == jnp.float32
    assert relative(flat(found), flat(exact)) < FLOAT32


@both_methods
def test_fresh_gaussian_projections_average_to_a_multiple_of_the_gradient(make):
    grads, branches, _ = problem()
    branches = branches * jnp.array([5.0, 1.0, 0.2, 0.1])
    tx = make(1.0)
    state = tx.init(grads)

    def direction(key):
        return tx.update(grads, state._replace(key=key), branches=branches)[0]

    keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(jnp.arange(10_000))
    mean = flat(
        jax.jit(lambda keys: jax.tree.map(lambda d: d.mean(0), jax.vmap(direction)(keys)))(keys)
    )
    multiple = np.trace(np.linalg.inv(covariance(make, branches) + np.eye(4))) / 4
    error = np.linalg.norm(mean - multiple * flat(grads)) / np.linalg.norm(flat(grads))
    assert error < MONTE_CARLO
    assert multiple > 10 * MONTE_CARLO  # so that the bound above says something


@pytest.mark.parametrize("make", [METHODS["fisher"]])
@pytest.mark.parametrize("projection", ["gaussian", "orthonormal"])
def test_complement_passes_what_the_projection_cannot_see(make, projection):
    grads, branches, _ = problem(n=40)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    tx = make(0.01, projection=projection, complement=True)
    step = jax.jit(lambda g: tx.update(g, tx.init(g), branches=branches)[0])
    seen = flat(jax.tree.map(jnp.subtract, grads, step(grads)))  # lies in the range of P
    vectors = [seen]
    for seed in (1, 2, 3):  # as do these; together they span it
        other = problem(n=40, seed=seed)[0]
        vectors.append(flat(jax.tree.map(jnp.subtract, other, step(other))))
    left = np.linalg.svd(np.array(vectors, np.float64).T, full_matrices=False)[0]
    unseen = flat(grads) - left @ (left.T @ flat(grads))
    tree = {
        "a": jnp.asarray(unseen[:-2], jnp.float32),
        "b": jnp.asarray(unseen[-2:, None], jnp.float32),
    }
    np.testing.assert_allclose(flat(step(tree)), unseen, atol=FLOAT32)
    assert np.linalg.norm(seen) > 0.1


def test_orthonormal_is_a_projector_at_zero_covariance(x64):
    grads, _, _ = problem(n=40)
    tx = optax_curv.scale_by_branch_fisher(1.0, projection="orthonormal", complement=False)
    state, step = tx.init(grads), jax.jit(tx.update)
    once, after = step(grads, state, branches=jnp.ones((3, 4)))
    twice, _ = step(once, state, branches=jnp.ones((3, 4)))
    assert relative(flat(twice), flat(once)) < FLOAT64
    np.testing.assert_array_equal(after.key, state.key)


@pytest.mark.parametrize(
    ("projection", "explicit", "moves"), [("gaussian", 0, 1), ("gaussian", 1, 0), ("fixed", 0, 0)]
)
def test_only_a_drawn_gaussian_moves_the_key(projection, explicit, moves):
    grads, branches, matrix = problem()
    tx = optax_curv.scale_by_branch_fisher(0.1, projection=projection, complement=False, key=3)
    start, step = tx.init(grads), jax.jit(tx.update)
    extra = {"branches": branches, "projection": matrix if explicit else None}
    first, state = step(grads, start, **extra)
    second, _ = step(grads, state, **extra)
    assert np.any(state.key != start.key) == moves
    assert np.any(flat(first) != flat(second)) == moves
    assert_equal_trees(step(grads, start, **extra)[0], first)


def test_the_same_key_gives_the_same_direction_without_jit():
    grads, branches, _ = problem()
    tx = optax_curv.scale_by_branch_fisher(0.1, key=jax.random.key(3), complement=True)
    eager, _ = tx.update(grads, tx.init(grads), branches=branches)
    jitted, _ = jax.jit(tx.update)(grads, tx.init(grads), branches=branches)
    assert relative(flat(eager), flat(jitted)) < FLOAT32


@both_methods
@pytest.mark.parametrize(
    "branches", [None, np.ones(5, np.float32), np.ones((2, 3, 2), np.float32), 1.0]
)
def test_without_two_dimensional_branches_the_gradient_passes(make, branches):
    grads = {"w": jnp.array([3.0, 4.0])}
    tx = make()
    start = tx.init(grads)
    updates, state = tx.update(grads, start, branches=branches)
    assert_equal_trees(updates, grads)
    assert_equal_trees(state, start._replace(count=jnp.int32(1), precond_norm=jnp.float32(5)))


@both_methods
@pytest.mark.parametrize("complement", [False, True])
def test_few_branches_and_few_dimensions(make, complement, x64):
    grads, _, _ = problem()
    for count, dimension in ((0, 3), (1, 3), (4, 1), (0, 0), (3, 0)):
        tx = make(0.5, complement=complement)
        projection = np.eye(9)[:, :dimension]
        branches = np.arange(count * dimension).reshape(count, dimension)  # integers
        direction, state = jax.jit(tx.update)(
            grads, tx.init(grads), branches=branches, projection=projection
        )
        cov = covariance(make, branches) if count else np.zeros((dimension, dimension))
        inverse = projection @ np.linalg.inv(cov + 0.5 * np.eye(dimension)) @ projection.T
        if complement:
            inverse = 0.5 * np.linalg.inv(0.5 * np.eye(9) + projection @ cov @ projection.T)
        np.testing.assert_allclose(
            flat(direction), inverse @ flat(grads), rtol=FLOAT64, atol=FLOAT64
        )
        assert state.total_notfinite == 0


@both_methods
@pytest.mark.parametrize("complement", [False, True])
def test_a_nan_or_infinity_gives_a_zero_update_and_leaves_the_state(make, complement):
    grads, branches, projection = problem()
    tx = make(0.1, complement=complement)
    step = jax.jit(tx.update)
    _, state = step(grads, tx.init(grads), branches=branches, projection=projection)
    for where, value in (
        ("gradients", np.nan),
        ("branches", np.inf),
        ("branches", np.nan),
        ("projection", np.nan),
    ):
        bad = {"gradients": grads, "branches": branches, "projection": projection}
        bad[where] = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value), bad[where])  # noqa: B023
        updates, after = step(
            bad["gradients"], state, branches=bad["branches"], projection=bad["projection"]
        )
        assert_equal_trees(updates, jax.tree.map(jnp.zeros_like, grads))
        assert_equal_trees(after, state._replace(total_notfinite=jnp.int32(1)))
        again, _ = step(grads, after, branches=branches, projection=projection)
        assert np.all(np.isfinite(flat(again)))


@both_methods
def test_an_overflowing_direction_is_skipped_and_counted(make):
    grads, branches, projection = problem()
    tx = make(0.0)
    huge = jax.tree.map(lambda g: g.astype(jnp.float32) * 1e38, grads)
    updates, state = jax.jit(tx.update)(
        huge, tx.init(grads), branches=1e-9 * branches, projection=projection
    )
    assert not np.any(flat(updates))
    assert state.total_notfinite == 1


@both_methods
@pytest.mark.parametrize("complement", [False, True])
def test_one_transformation_serves_models_and_batches_of_any_size(make, complement):
    tx, alone = (make(0.1, complement=complement) for _ in range(2))
    problems = [problem(), problem(n=12, count=5, dimension=3, seed=1)]
    states = [tx.init(grads) for grads, _, _ in problems]
    for count in (5, 2):  # the last batch of an epoch is short
        for (grads, branches, _), state in zip(problems, states, strict=True):
            given = {"branches": branches[:count]}
            expected, _ = jax.jit(alone.update)(grads, alone.init(grads), **given)
            assert_equal_trees(jax.jit(tx.update)(grads, state, **given)[0], expected)


@both_methods
def test_the_default_keeps_the_complement(make):
    grads, branches, projection = problem()
    given = {"branches": branches, "projection": projection}
    found, _ = make.func(0.1).update(grads, make.func(0.1).init(grads), **given)
    tx = make.func(0.1, complement=True)
    assert_equal_trees(found, tx.update(grads, tx.init(grads), **given)[0])


@both_methods
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
def test_weights_are_those_of_the_mean_and_the_covariance(make, complement, ddof, x64):
    grads, branches, projection = problem(count=7)
    tx = make(
        0.1,
        complement=complement,
        ddof=ddof,
        **({"max_iters": 50} if make is METHODS["fisher"] else {}),
    )

    def step(branches, weights=None):
        given = {"branches": branches, "projection": projection, "weights": weights}
        updates, state = jax.jit(tx.update)(grads, tx.init(grads), **given)
        assert int(state.total_notfinite) == 0
        return flat(updates)

    weights = jnp.array([1.0, 2, 0, 1, 3, 0, 1])
    kept = np.array([0, 1, 3, 4, 6])
    assert relative(step(branches, weights), step(branches[kept], weights[kept])) < FLOAT64
    assert relative(step(branches, 7 * jnp.ones(7)), step(branches)) < FLOAT64
    cov = np.cov(branches.T, aweights=weights, ddof=ddof)
    run = np.arange(4) >= 2
    cov = cov * (run[:, None] == run) if make is METHODS["kfac"] else cov
    dense = projection @ np.linalg.solve(cov + 0.1 * np.eye(4), projection.T @ flat(grads))
    if complement:
        pulled_back = projection @ cov @ projection.T
        dense = 0.1 * np.linalg.solve(0.1 * np.eye(9) + pulled_back, flat(grads))
    assert relative(step(branches, weights), dense) < FLOAT64


@both_methods
def test_weights_that_are_none_are_refused_or_skipped(make):
    grads, branches, _ = problem()
    tx = make(0.1)
    state = tx.init(grads)
    for wrong, message in (
        (np.ones(5), r"one number for each of the K = 6 branches, got shape \(5,\)"),
        (-np.ones(6), "not negative"),
        (np.zeros(6), "do not sum to zero"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(grads, state, branches=branches, weights=wrong)
    step = jax.jit(lambda w: tx.update(grads, state, branches=branches, weights=w))
    for wrong in (jnp.zeros(6), -jnp.ones(6), jnp.full(6, jnp.nan)):
        updates, after = step(wrong)
        assert not np.any(flat(updates)) and int(after.total_notfinite) == 1


@both_methods
def test_branches_have_to_be_said_if_only_as_none(make):
    grads = {"w": jnp.ones(2)}
    tx = make()
    for extra in ({}, {"branch": jnp.ones((3, 2))}):
        with pytest.raises(ValueError, match=r"branches= is missing.*branches=None"):
            tx.update(grads, tx.init(grads), grads, **extra)


@both_methods
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1e-3}, r"damping >= 0, got damping=-0.001"),
        ({"projection": "uniform"}, r"unknown projection='uniform'.*gaussian"),
        ({"complement": "no"}, r"complement to be True or False, got complement='no'"),
        ({"centered": 1}, r"centered to be True or False, got centered=1"),
        ({"damping": "high"}, r"damping='high'"),
        ({"ddof": 2}, r"ddof to be None, 0 or 1, got 2"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@both_methods
def test_bad_shapes_are_refused(make):
    grads, branches, _ = problem()
    tx = make(projection="orthonormal")
    state = tx.init(grads)
    with pytest.raises(ValueError, match=r"needs D <= n, got branches with D = 10 for n = 9"):
        tx.update(grads, state, branches=jnp.ones((3, 10)))
    with pytest.raises(
        ValueError, match=r"gradients and the parameters differ in shape.*\(7,\).*\(8,\)"
    ):
        tx.update(grads, state, grads | {"a": jnp.ones(8)}, branches=branches)
    with pytest.raises(ValueError, match=r"expected real branches \[K, D\], got complex ones"):
        make().update(grads, state, branches=branches * 1j)
    with pytest.raises(
        ValueError, match=r"expected real gradients for branches \[K, D\]|complex64"
    ):
        complex_grads = {"b": jnp.ones(2, jnp.complex64)}
        make().update(complex_grads, make().init(complex_grads), branches=branches)


@both_methods
def test_numbers_may_be_traced_scheduled_and_injected(make):
    grads, branches, projection = problem()

    def first(tx):
        update = jax.jit(tx.update)
        return update(grads, tx.init(grads), grads, branches=branches, projection=projection)[0]

    swept = jax.jit(jax.vmap(lambda damping: first(make(damping))))(jnp.array([0.1, 1.0]))
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda x: x[1], swept)), flat(first(make(1.0))), rtol=FLOAT32
    )
    schedule = optax.linear_schedule(1.0, 0.1, 1)
    tx = make(schedule)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(grads), branches=branches, projection=projection)
    second, _ = update(grads, state, branches=branches, projection=projection)
    np.testing.assert_allclose(
        flat(second), flat(jax.tree.map(lambda x: x[0], swept)), rtol=FLOAT32
    )


@both_methods
def test_low_precision_masked_and_empty_leaves(make):
    grads = {"a": jnp.ones(5, jnp.bfloat16), "b": None, "c": jnp.ones((0, 2)), "d": jnp.float32(2)}
    branches = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.bfloat16)
    tx = optax.masked(make(0.1, complement=True), {"a": True, "b": True, "c": True, "d": False})
    state = tx.init(grads)
    updates, after = jax.jit(tx.update)(grads, state, grads, branches=branches)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), grads
    )
    assert updates["d"] == 2
    assert np.any(np.asarray(updates["a"], np.float32) != 1)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
    empty, _ = make().update({}, make().init({}), branches=branches)
    assert empty == {}
    abstract = make().init({"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    assert abstract.count == 0


def test_ten_million_parameters_step_within_a_gigabyte():
    params = {"w": jax.ShapeDtypeStruct((5_000, 2_000), jnp.float32)}
    branches = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    tx = optax_curv.scale_by_branch_fisher(complement=True)
    compiled = (
        jax.jit(lambda g, s, b: tx.update(g, s, branches=b))
        .lower(params, tx.init(params), branches)
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 2**30
