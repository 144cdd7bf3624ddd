"""Matrix-free Gauss-Newton against dense matrices, in float64 where not said otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_curv
from optax_curv import Objective, testing

EXACT = 1e-8  # a solve to the rounding of conjugate gradients, relative
MILLIONTH = 1e-6  # what fifty damped steps leave of a loss that falls to zero
DAMPING = 0.05
CONVERGED = {"tol": 0.0, "max_iters": 80}


def predict(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"]) @ params["v"]


def penalty(params):
    return 0.1 * optax.tree.norm(params, squared=True)


def problem(dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = {"w": (2, 3), "b": (3,), "v": (3, 4)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params, inputs = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (params, rng.normal(size=(12, 2)))
    )
    return params, (inputs, jnp.asarray(rng.integers(0, 4, 12)))


def dense_direction(objective, params, batch, damping=DAMPING):
    matrix = testing.dense_gauss_newton(objective, params, *batch)
    if objective.regularizer is not None:
        matrix += testing.dense_hessian(objective.regularizer, params)
    gradient = ravel_pytree(jax.grad(objective)(params, *batch))[0]
    return np.linalg.solve(matrix + damping * np.eye(len(matrix)), gradient)


def stepper(tx, objective):
    @jax.jit
    def step(params, state, batch, **extra):
        value, grads = jax.value_and_grad(objective)(params, *batch)
        return tx.update(
            grads, state, params, objective=objective, batch=batch, value=value, **extra
        )

    return step


def exact_curvature(objective, layers):
    return jax.jit(optax_curv.value_grad_and_curvature(objective, layers=layers, fisher="exact"))


def assert_close(tree, expected, tolerance=EXACT):
    found = np.asarray(ravel_pytree(tree)[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_the_solution_is_the_dense_one_and_the_next_starts_there(x64):
    params, batch = problem()
    objective = Objective(predict, "categorical", regularizer=penalty)
    tx = optax_curv.scale_by_gauss_newton(DAMPING, warm_start=0.5, **CONVERGED)
    expected = dense_direction(objective, params, batch)
    step, state = stepper(tx, objective), tx.init(params)
    for _ in range(2):
        direction, state = step(params, state, batch)
        assert_close(direction, expected)
        assert_close(state.start, 0.5 * expected)
    no_iteration = optax_curv.scale_by_gauss_newton(DAMPING, max_iters=0)
    assert_close(stepper(no_iteration, objective)(params, state, batch)[0], 0.5 * expected)


def test_a_given_product_and_weighted_examples_solve_their_own_systems(x64):
    params, (inputs, classes) = problem()
    objective, tx = (
        Objective(predict, "categorical"),
        optax_curv.scale_by_gauss_newton(DAMPING, **CONVERGED),
    )
    grads = jax.grad(objective)(params, inputs, classes)

    @jax.jit
    def by_product(grads, state):
        return tx.update(grads, state, curvature_product=lambda v: jax.tree.map(lambda x: 3 * x, v))

    expected = ravel_pytree(grads)[0] / (3 + DAMPING)
    assert_close(by_product(grads, tx.init(params))[0], expected)

    kept = dense_direction(objective, params, (inputs[:7], classes[:7]))
    mask, grads = jnp.arange(12) < 7, jax.grad(objective)(params, inputs[:7], classes[:7])
    update = jax.jit(
        lambda g, s: tx.update(
            g, s, params, objective=objective, batch=(inputs, classes), weights=mask
        )
    )
    assert_close(update(grads, tx.init(params))[0], kept)


def test_preconditioners_change_the_way_and_not_the_end(x64):
    params, batch = problem()
    objective = Objective(predict, "categorical", regularizer=penalty)
    layers = optax_curv.find_layers(objective, params, *batch)
    uncovered = optax_curv.Layers([layer for layer in layers if layer.kernel == "['v']"])
    _, _, curvature = exact_curvature(objective, layers)(params, *batch)
    expected = dense_direction(objective, params, batch)
    given = {
        "diagonal": (None, {"diagonal": jax.tree.map(jnp.square, params)}),
        "layers": (layers, {"curvature": curvature}),
        "some layers": (
            uncovered,
            {"curvature": {layer.name: curvature[layer.name] for layer in uncovered}},
        ),
    }
    for chosen, extra in given.values():
        tx = optax_curv.scale_by_gauss_newton(DAMPING, layers=chosen, **CONVERGED)
        assert_close(stepper(tx, objective)(params, tx.init(params), batch, **extra)[0], expected)


def test_a_preconditioner_that_is_the_inverse_ends_the_solve_in_one_iteration(x64):
    rng = np.random.default_rng(0)
    scales, w = jnp.asarray(np.logspace(-3, 2, 5)), {"w": jnp.asarray(rng.normal(size=(5, 1)))}
    grads = jax.tree.map(jnp.ones_like, w)
    diagonal = {"w": scales[:, None]}
    tx = optax_curv.scale_by_gauss_newton(DAMPING, max_iters=1, diagonal_power=1.0)
    direction, _ = tx.update(
        grads,
        tx.init(w),
        diagonal=diagonal,
        curvature_product=lambda v: {"w": scales[:, None] * v["w"]},
    )
    assert_close(direction, 1 / (np.asarray(scales) + DAMPING))

    # K-FAC is exact for a linear layer with one output and no damping to split.
    inputs = jnp.asarray(rng.normal(size=(9, 5))) * scales
    objective, batch = Objective(lambda w, x: x @ w["w"], "normal"), (inputs, jnp.ones((9, 1)))
    layers = optax_curv.find_layers(objective, w, *batch)
    _, _, curvature = exact_curvature(objective, layers)(w, *batch)
    tx = optax_curv.scale_by_gauss_newton(0.0, max_iters=1, layers=layers)
    direction, _ = stepper(tx, objective)(w, tx.init(w), batch, curvature=curvature)
    solution = np.linalg.lstsq(inputs, batch[1])[0]
    assert_close(optax.tree.sub(w, direction), solution.ravel())


def test_backtracking_returns_the_best_of_its_iterates(x64):
    params, batch = problem()
    params = jax.tree.map(
        lambda p: 4 * p, params
    )  # saturated: the undamped model promises too much
    objective = Objective(predict, "categorical")
    full = optax_curv.scale_by_gauss_newton(1e-6, tol=0.0, max_iters=11, backtrack=True)
    direction, state = stepper(full, objective)(params, full.init(params), batch)
    grads, limits = jax.grad(objective)(params, *batch), np.array([1, 2, 3, 4, 6, 8, 11])

    def loss_after(limit):
        tx = optax_curv.scale_by_gauss_newton(1e-6, tol=0.0, max_iters=limit)
        candidate, _ = tx.update(grads, tx.init(params), params, objective=objective, batch=batch)
        return objective(optax.tree.sub(params, candidate), *batch)

    losses = dict(zip(limits.tolist(), jax.jit(jax.vmap(loss_after))(limits).tolist(), strict=True))
    assert int(state.returned) == min(losses, key=losses.get) < int(state.iterations) == 11
    np.testing.assert_allclose(
        objective(optax.tree.sub(params, direction), *batch), min(losses.values()), rtol=EXACT
    )

    @jax.jit
    def by_product(grads, state):
        product = objective.curvature_operator(params, batch[0])
        given = {"curvature_product": product, "value_fn": lambda p: objective(p, *batch)}
        return full.update(grads, state, params, **given)

    assert_close(by_product(grads, full.init(params))[0], ravel_pytree(direction)[0])


def test_the_quadratic_model_takes_a_converged_direction_as_it_is(x64):
    params, batch = problem()
    objective = Objective(predict, "categorical", regularizer=penalty)
    solve = optax_curv.scale_by_gauss_newton(DAMPING, **CONVERGED)
    chained = optax.chain(solve, optax_curv.scale_by_quadratic_model(DAMPING))
    direction, state = stepper(chained, objective)(params, chained.init(params), batch)
    assert_close(direction, dense_direction(objective, params, batch))
    np.testing.assert_allclose(state[1].coefficients, [1, 0], atol=1e-6)


def test_damping_adapts_and_the_adaptive_alias_converges(x64):
    params, (inputs, _) = problem()
    objective = Objective(predict, "normal")
    batch = (inputs, predict(jax.tree.map(jnp.cos, params), inputs))  # a loss that falls to zero

    def damped(lam):
        pieces = (optax_curv.scale_by_gauss_newton(lam), optax_curv.scale_by_quadratic_model(lam))
        return optax.chain(*pieces, optax.scale_by_learning_rate(1.0))

    for tx in (
        optax_curv.adapt_damping(damped, 0.1, adapt_every=1, factor=2 / 3),
        optax_curv.gauss_newton(None, backtrack=True),
    ):
        step, state, now = stepper(tx, objective), tx.init(params), params
        for _ in range(50):
            updates, state = step(now, state, batch)
            now = optax.apply_updates(now, updates)
        assert objective(now, *batch) < MILLIONTH * objective(params, *batch)
        assert float(state.damping) < 0.1 and int(state.total_notfinite) == 0


def test_mixed_precision_keeps_dtypes_and_solves_nearly(x64):
    params, batch = problem("float32")
    objective, tx = (
        Objective(predict, "categorical"),
        optax_curv.scale_by_gauss_newton(DAMPING, **CONVERGED),
    )
    mixed = params | {"v": params["v"].astype(jnp.bfloat16)}
    state = tx.init(mixed)
    direction, after = stepper(tx, objective)(mixed, state, batch)
    assert jax.tree.map(jnp.result_type, direction) == jax.tree.map(jnp.result_type, mixed)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    expected = dense_direction(
        objective, jax.tree.map(lambda p: p.astype(jnp.float32), mixed), batch
    )
    assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), direction), expected, 0.03)


def test_a_product_that_is_not_finite_is_skipped_and_counted():
    params, _ = problem("float32")
    tx = optax_curv.scale_by_gauss_newton()
    state = tx.init(params)._replace(start=params)
    bad = jax.jit(
        lambda g: tx.update(
            g, state, curvature_product=lambda v: jax.tree.map(lambda x: x * jnp.nan, v)
        )
    )
    updates, after = bad(params)
    assert not np.any(ravel_pytree(updates)[0])
    jax.tree.map(np.testing.assert_array_equal, after, state._replace(total_notfinite=jnp.int32(1)))


@pytest.mark.parametrize(
    ("what", "peak"), [("gradient", np.nan), ("gradient", 1e30), ("diagonal", np.inf)]
)
def test_a_gradient_or_diagonal_that_is_unsound_is_skipped_and_counted(what, peak):
    params, _ = problem("float32")
    tx = optax_curv.scale_by_gauss_newton()
    state = tx.init(params)._replace(start=params)
    struck = jax.tree.map(lambda p: p.at[0].set(peak), params)
    grads, diagonal = (struck, params) if what == "gradient" else (params, struck)
    diagonal = jax.tree.map(jnp.abs, diagonal)
    updates, after = tx.update(grads, state, curvature_product=identity, diagonal=diagonal)
    assert not np.any(ravel_pytree(updates)[0])
    jax.tree.map(np.testing.assert_array_equal, after, state._replace(total_notfinite=jnp.int32(1)))


def identity(v):
    return v


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({}, {}, "one of two extra arguments, got neither"),
        (
            {},
            {"curvature_product": identity, "objective": Objective(predict, "normal")},
            "got both",
        ),
        ({}, {"curvature_product": 3.0}, r"a function as curvature_product, got 3\.0"),
        ({}, {"objective": jnp.sum}, "to be an optax_curv.Objective"),
        ({}, {"objective": Objective(predict, "normal")}, r"batch=\(inputs, targets\), got None"),
        (
            {},
            {"curvature_product": identity, "diagonal": {"w": 1}},
            "tree of diagonal differs from that of updates",
        ),
        (
            {"backtrack": True},
            {"curvature_product": identity},
            "backtrack=True needs a loss to evaluate",
        ),
        (
            {"layers": optax_curv.Layers([])},
            {"curvature_product": identity},
            "curvature= is missing",
        ),
        (
            {"layers": optax_curv.Layers([])},
            {"curvature_product": identity, "curvature": {}, "diagonal": problem("float32")[0]},
            "diagonal= beside layers",
        ),
    ],
)
def test_bad_arguments_are_refused(options, extra, message):
    params, _ = problem("float32")
    tx = optax_curv.scale_by_gauss_newton(**options)
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, **extra)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optax_curv.scale_by_gauss_newton(-1.0), "expected damping >= 0, got damping=-1.0"),
        (lambda: optax_curv.scale_by_gauss_newton(warm_start=2.0), "expected warm_start <= 1"),
        (
            lambda: optax_curv.scale_by_gauss_newton(layers={}),
            "expected layers from optax_curv.find_layers, got a dict",
        ),
        (
            lambda: optax_curv.scale_by_gauss_newton().init({"n": jnp.ones(2, "complex64")}),
            r"\['n'\] has dtype complex",
        ),
        (
            lambda: optax_curv.gauss_newton(None, weight_decay=0.1),
            "no weight decay with learning_rate=None",
        ),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrap", ["masked", "partition"])
@pytest.mark.parametrize("learning_rate", [0.1, None])
def test_masked_leaves_are_named_with_what_to_do(wrap, learning_rate):
    params, batch = problem("float32")
    objective = Objective(predict, "categorical")
    tx = optax_curv.gauss_newton(learning_rate)
    if wrap == "masked":
        tx = optax.masked(tx, {"w": True, "b": False, "v": True})
    else:
        labels = {"w": "train", "b": "freeze", "v": "train"}
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    given = {"objective": objective, "batch": batch, "value": jnp.float32(1)}
    with pytest.raises(ValueError, match=r"masked its leaves \[\"\['b'\]\"\].*set_to_zero"):
        tx.update(params, tx.init(params), params, **given)


def test_a_product_over_the_trained_leaves_is_taken_under_a_mask():
    params, _ = problem("float32")
    tx = optax.masked(optax_curv.gauss_newton(1.0, 1.0), {"w": True, "b": False, "v": True})
    updates, _ = tx.update(params, tx.init(params), params, curvature_product=identity)
    np.testing.assert_allclose(updates["w"], -params["w"] / 2, rtol=1e-5)
    np.testing.assert_array_equal(updates["b"], params["b"])


@pytest.mark.parametrize("learning_rate", ["0.1", True])
def test_a_learning_rate_that_is_none_of_the_three_is_refused(learning_rate):
    with pytest.raises(ValueError, match=rf"learning_rate={learning_rate!r}"):
        optax_curv.gauss_newton(learning_rate)


def test_a_nystrom_sketch_leaves_few_iterations_and_is_kept_over_steps(x64):
    """Of a curvature with ten eigenvalues far above the others, which are all alike."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    values = np.concatenate([np.logspace(4, 1, 10), np.full(30, 1e-3)])
    matrix, gradient = jnp.asarray(basis * values @ basis.T), jnp.asarray(rng.normal(size=40))
    expected = np.linalg.solve(matrix + 1e-2 * np.eye(40), gradient)
    iterations = {}
    for rank in (None, 15):
        tx = optax_curv.scale_by_gauss_newton(
            1e-2, max_iters=200, warm_start=0.0, tol=1e-9, nystrom_rank=rank, refresh_every=2
        )
        grads = {"a": gradient[:7], "b": gradient[7:].reshape(3, 11)}
        state, states = tx.init(grads), []

        def product(v):
            flat, unravel = ravel_pytree(v)
            return unravel(matrix @ flat)

        for _ in range(3):
            direction, state = tx.update(grads, state, grads, curvature_product=product)
            states.append(state)
        found = np.asarray(ravel_pytree(direction)[0])
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        iterations[rank] = int(state.iterations)
    assert iterations[15] == 11 < iterations[None] / 2  # the rule of progress looks ten back
    np.testing.assert_allclose(states[-1].sketch.values[:10], values[:10], rtol=1e-2)


def test_one_preconditioner_is_enough():
    with pytest.raises(ValueError, match=r"nystrom_rank to be None or an integer > 0, got 0"):
        optax_curv.scale_by_gauss_newton(nystrom_rank=0)
    tx = optax_curv.scale_by_gauss_newton(nystrom_rank=2)
    w = jnp.ones(3)
    with pytest.raises(ValueError, match=r"diagonal= beside nystrom_rank"):
        tx.update(w, tx.init(w), w, curvature_product=lambda v: v, diagonal=w)
