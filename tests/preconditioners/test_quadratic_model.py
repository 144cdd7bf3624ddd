"""Step size, momentum and damping from the quadratic model, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_curv
from optax_curv import Objective, testing

EXACT = 1e-9
SINGLE = 1e-5
DAMPING = 0.3


def predict(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def problem(dtype="float64"):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(2, 3)), "v": rng.normal(size=(3, 4))}
    params, inputs = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (params, rng.normal(size=(8, 2)))
    )
    return params, (inputs, jnp.asarray(rng.integers(0, 4, 8)))


def penalty(params):
    return 0.1 * optax.tree.norm(params, squared=True) + 0.01 * jnp.sum(params["v"] ** 4)


def jitted(tx, objective):
    @jax.jit
    def step(params, state, direction, batch, weights=None):
        value = objective(params, *batch, weights=weights)
        extra = {"objective": objective, "batch": batch, "value": value, "weights": weights}
        return tx.update(direction, state, params, **extra)

    return step


def dense_step(objective, params, batch, directions):
    """The best combination of flat directions under the dense damped model."""
    curvature = testing.dense_gauss_newton(objective, params, *batch)
    if objective.regularizer is not None:
        curvature += testing.dense_hessian(objective.regularizer, params)
    slopes = ravel_pytree(jax.grad(objective)(params, *batch))[0]
    basis = np.stack(directions, 1)
    model = basis.T @ (np.asarray(curvature) + DAMPING * np.eye(len(basis))) @ basis
    return basis @ np.linalg.lstsq(model, basis.T @ np.asarray(slopes), rcond=1e-12)[0]


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
@pytest.mark.parametrize("regularizer", [None, penalty])
def test_updates_minimise_the_dense_model_over_direction_and_previous_update(
    x64, likelihood, regularizer
):
    params, (inputs, classes) = problem()
    batch = (inputs, jax.nn.one_hot(classes, 4))
    objective = Objective(predict, likelihood, regularizer=regularizer)
    tx = optax_curv.scale_by_quadratic_model(DAMPING)
    step, state = jitted(tx, objective), tx.init(params)
    previous = np.zeros(18)
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=18)
        updates, state = step(params, state, ravel_pytree(params)[1](direction), batch)
        expected = dense_step(objective, params, batch, [direction, previous])
        previous = np.asarray(ravel_pytree(updates)[0])
        np.testing.assert_allclose(previous, expected, rtol=EXACT, atol=EXACT)
        params = optax.apply_updates(params, jax.tree.map(jnp.negative, updates))
    assert state.count == 3 and state.coefficients[1] != 0


def test_on_a_quadratic_it_is_the_conjugate_gradient_method(x64):
    """Steepest descent of the best size and momentum ends a 6-dimensional quadratic in 6 steps."""
    rng = np.random.default_rng(0)
    inputs, targets = jnp.asarray(rng.normal(size=(9, 6))), jnp.asarray(rng.normal(size=(9, 1)))
    objective = Objective(lambda w, x: x @ w, "normal")
    tx = optax.chain(optax_curv.scale_by_quadratic_model(0.0), optax.scale_by_learning_rate(1.0))
    step, gradient = jitted(tx, objective), jax.jit(jax.grad(objective))
    w = jnp.zeros((6, 1))
    state = tx.init(w)
    for _ in range(6):
        updates, state = step(w, state, gradient(w, inputs, targets), (inputs, targets))
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w, np.linalg.lstsq(inputs, targets)[0], atol=EXACT)


def test_a_direction_parallel_to_the_previous_update_or_zero_stays_finite():
    params, batch = problem("float32")
    objective = Objective(predict, "categorical")
    tx = optax_curv.scale_by_quadratic_model(DAMPING)
    step = jitted(tx, objective)
    direction = jax.tree.map(jnp.ones_like, params)
    first, state = step(params, tx.init(params), direction, batch)
    again, state = step(params, state, direction, batch)
    assert state.coefficients[1] == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=SINGLE), again, first)
    still, state = step(params, tx.init(params), jax.tree.map(jnp.zeros_like, params), batch)
    assert (
        not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(still))
        and state.total_notfinite == 0
    )


def test_masked_examples_do_not_enter_the_model(x64):
    params, (inputs, classes) = problem()
    tx = optax_curv.scale_by_quadratic_model(DAMPING)
    step = jitted(tx, Objective(predict, "categorical"))
    direction = jax.tree.map(jnp.cos, params)
    mask = jnp.arange(8) < 5
    masked, _ = step(params, tx.init(params), direction, (inputs, classes), mask)
    kept, _ = step(params, tx.init(params), direction, (inputs[:5], classes[:5]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=EXACT), masked, kept)


def test_updates_keep_their_dtype_and_the_state_its_shapes():
    params, batch = problem("float32")
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    tx = optax_curv.adapt_damping(optax_curv.scale_by_quadratic_model)
    state = tx.init(params)
    updates, new_state = jitted(tx, Objective(predict, "categorical"))(params, state, params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert jax.tree.map(jnp.result_type, new_state) == jax.tree.map(jnp.result_type, state)


def trained(damping, steps=12):
    """Losses, damping and ratios of an adaptive run, all of it in one scan."""
    params, batch = problem("float32")
    objective = Objective(predict, "categorical")
    tx = optax_curv.adapt_damping(
        lambda lam: optax.chain(
            optax_curv.scale_by_quadratic_model(lam), optax.scale_by_learning_rate(1.0)
        ),
        damping,
    )

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(objective)(params, *batch)
        updates, state = tx.update(
            grads, state, params, objective=objective, batch=batch, value=value
        )
        return (optax.apply_updates(params, updates), state), (
            value,
            state.damping,
            state.reduction_ratio,
        )

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]


def test_a_sweep_over_damping_equals_single_runs():
    sweep = jax.jit(jax.vmap(trained))(jnp.array([0.1, 10.0]))
    alone = jax.jit(trained)(10.0)
    jax.tree.map(
        lambda many, one: np.testing.assert_allclose(many[1], one, rtol=1e-4), sweep, alone
    )
    assert (
        np.all(alone[1][:4] == 10.0)
        and alone[1][4] != 10.0
        and np.all(alone[1][4:9] == alone[1][4])
    )


@pytest.mark.parametrize(("delta", "power"), [(1.0, 5), (2.0, 0), (3.3, -5), (-1.0, -5)])
def test_damping_follows_the_reduction_ratio(x64, delta, power):
    """L(w) = ½ (sin w − 2)² at 0 has slope −2 and Gauss-Newton curvature 1."""
    objective = Objective(lambda w, x: jnp.sin(w * x), "normal")
    w, batch, damping = jnp.zeros(1), (jnp.ones(1), 2 * jnp.ones(1)), 0.05
    tx = optax_curv.adapt_damping(
        lambda lam: optax.scale(delta), damping, adapt_every=1, factor=0.95**5
    )
    _, state = jitted(tx, objective)(w, tx.init(w), jnp.ones(1), batch)
    predicted = -2 * delta + 0.5 * (1 + damping) * delta**2
    ratio = (0.5 * (np.sin(delta) - 2) ** 2 - 2) / predicted if predicted < 0 else 0
    np.testing.assert_allclose(state.reduction_ratio, ratio, rtol=SINGLE)
    np.testing.assert_allclose(state.damping, damping * 0.95**power, rtol=SINGLE)


def test_a_step_to_an_infinite_loss_raises_the_damping_within_its_bounds():
    objective = Objective(lambda w, x: jnp.exp(w * x), "normal")
    w, batch = jnp.array([1.0]), (jnp.ones(1), jnp.zeros(1))
    tx = optax_curv.adapt_damping(
        lambda lam: optax.scale(1000.0), 1.0, adapt_every=1, factor=0.5, max_damping=3.0
    )
    step, state = jitted(tx, objective), tx.init(w)
    for expected in (2.0, 3.0):
        _, state = step(w, state, w, batch)
        assert state.reduction_ratio == 0 and state.damping == expected


def logarithmic():
    """An objective that is not defined beyond w = 0, and a step there at the first damping."""
    objective = Objective(lambda w, x: x * jnp.log(w), "normal")
    return objective, (jnp.ones((1, 1)), jnp.full((1, 1), -3.0))


@pytest.mark.parametrize("every", [1, 5])
def test_a_step_that_would_raise_the_loss_is_not_taken(every):
    objective, batch = logarithmic()

    def damped(lam):
        model = optax_curv.scale_by_quadratic_model(lam)
        return optax.chain(model, optax.scale(-1.0))

    tx = optax_curv.adapt_damping(damped, 1.0, adapt_every=every, factor=0.5 ** (1 / every))
    step, state, w = jitted(tx, objective), tx.init(jnp.float32(1.0)), jnp.float32(1.0)
    grad, losses = jax.jit(jax.grad(objective)), []
    for _ in range(60):
        updates, new = step(w, state, grad(w, *batch), batch)
        if int(new.refused) > int(state.refused):
            assert updates == 0 and new.inner[0].previous == 0
            np.testing.assert_allclose(new.damping, 2 * state.damping, rtol=SINGLE)
        w, state = optax.apply_updates(w, updates), new
        losses.append(float(objective(w, *batch)))
    assert 0 < int(state.refused) < 60 and int(state.count) == 60
    assert int(state.total_notfinite) == 0
    assert max(losses) <= 4.5 and losses[-1] < 1e-3


def test_a_step_may_be_judged_on_another_batch(x64):
    objective = Objective(lambda w, x: x @ w, "normal")
    rng = np.random.default_rng(0)
    w, x = jnp.zeros((2, 1)), jnp.asarray(rng.normal(size=(4, 2)))
    batch, other = (x, jnp.ones((4, 1))), (x, -jnp.ones((4, 1)))  # a step for one harms the other
    tx = optax_curv.adapt_damping(
        lambda lam: optax.chain(optax_curv.scale_by_quadratic_model(lam), optax.scale(-1.0)),
        adapt_every=1,
    )
    value, grads = jax.value_and_grad(objective)(w, *batch)
    given = {"objective": objective, "batch": batch, "value": value}
    taken, state = tx.update(grads, tx.init(w), w, **given)
    assert np.any(taken != 0) and int(state.refused) == 0
    refused, state = tx.update(grads, tx.init(w), w, **given, judge_batch=other)
    assert not np.any(refused) and int(state.refused) == 1
    same, _ = tx.update(grads, tx.init(w), w, **given, judge_batch=batch)
    np.testing.assert_array_equal(same, taken)
    with pytest.raises(ValueError, match=r"judge_batch=\(inputs, targets\), got a"):
        tx.update(grads, tx.init(w), w, **given, judge_batch=x)


def test_masked_parameters_are_refused_by_name():
    params, batch = problem("float32")
    objective = Objective(predict, "categorical")
    tx = optax.masked(optax_curv.scale_by_quadratic_model(), {"w": True, "v": False})
    with pytest.raises(ValueError, match=r"masked its leaves \[\"\['v'\]\"\]"):
        tx.update(params, tx.init(params), params, objective=objective, batch=batch)


@pytest.mark.parametrize("poison", ["updates", "inputs"])
def test_what_is_not_finite_leaves_the_state_alone_and_is_counted(poison):
    params, (inputs, classes) = problem("float32")
    tx = optax_curv.adapt_damping(optax_curv.scale_by_quadratic_model, adapt_every=1)
    step = jitted(tx, Objective(predict, "categorical"))
    _, state = step(params, tx.init(params), params, (inputs, classes))
    bad = (
        jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
        if poison == "updates"
        else params
    )
    bad_inputs = inputs.at[0].set(jnp.inf * 0) if poison == "inputs" else inputs
    updates, kept = step(params, state, bad, (bad_inputs, classes))
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates))
    assert kept.total_notfinite == 1
    for (path, new), old in zip(
        jax.tree.leaves_with_path(kept), jax.tree.leaves(state), strict=True
    ):
        if not jax.tree_util.keystr(path).endswith(".total_notfinite"):
            np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": None}, "requires the current value of parameters"),
        (
            {"objective": None},
            r"expected the extra argument objective= .* got None.*Objective\(predict_fn",
        ),
        (
            {"objective": predict},
            r"expected the extra argument objective= .* got <function predict",
        ),
        ({"batch": None}, r"batch=\(inputs, targets\), got None"),
        ({"batch": jnp.ones(2)}, r"batch=\(inputs, targets\), got a ArrayImpl"),
        ({"value": None}, "value= is missing"),
        ({"updates": {"w": jnp.ones((2, 3))}}, "tree of the gradients differs"),
    ],
)
def test_missing_arguments_are_refused(changes, message):
    params, batch = problem("float32")
    objective = Objective(predict, "categorical")
    tx = optax_curv.adapt_damping(optax_curv.scale_by_quadratic_model)
    given = {
        "updates": params,
        "params": params,
        "objective": objective,
        "batch": batch,
        "value": 0.0,
    } | changes
    with pytest.raises(ValueError, match=message):
        tx.update(given.pop("updates"), tx.init(params), given.pop("params"), **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optax_curv.scale_by_quadratic_model(-1.0),
            "expected damping >= 0, got damping=-1.0",
        ),
        (
            lambda: optax_curv.adapt_damping(optax.scale, 0.0),
            "expected damping > 0, got damping=0.0",
        ),
        (
            lambda: optax_curv.adapt_damping(optax.scale, factor=2.0),
            "expected factor <= 1, got factor=2.0",
        ),
        (lambda: optax_curv.adapt_damping(optax.scale, adapt_every=0), "expected adapt_every >= 1"),
        (lambda: optax_curv.adapt_damping(optax.scale, max_damping=0), "expected max_damping > 0"),
        (
            lambda: optax_curv.scale_by_quadratic_model().init({"n": jnp.ones(2, int)}),
            r"\['n'\] has dtype int",
        ),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
