"""Levenberg-Marquardt over rows: its steps, its damping, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

EXACT = 1e-9
RNG = np.random.default_rng(5)
INPUTS, TARGETS = RNG.normal(size=(20, 4)), RNG.normal(size=20)


def residual(params, batch):
    x, y = batch
    return x[:, :3] @ params["a"] + x[:, 3] * params["b"] - y


rows_of = optax_curv.residual_rows(residual)


def problem(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    batch = jnp.asarray(scale * INPUTS), jnp.asarray(TARGETS)
    return {"a": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(rng.normal())}, batch


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def given(params, batch):
    value, grads, rows = rows_of(params, batch)
    loss = lambda p: jnp.mean(residual(p, batch) ** 2) / 2  # noqa: E731
    return grads, {"branches": rows, "value": value, "value_fn": loss}


@pytest.mark.parametrize("momentum", [None, 0.6])
def test_steps_are_damped_gauss_newton_steps_and_the_damping_falls_tenfold(momentum, x64):
    params, batch = problem()
    metric = INPUTS.T @ INPUTS / 20
    lam, previous = 0.05, np.zeros(4)
    tx = optax_curv.levenberg_marquardt(lam, momentum=momentum)
    state, mu = tx.init(params), momentum or 0.0
    for _ in range(2):
        grads, extra = given(params, batch)
        updates, state = tx.update(grads, state, params, **extra)
        right = flat(grads) - mu * metric @ previous
        step = np.linalg.solve(metric + lam * np.eye(4), right) + mu * previous
        np.testing.assert_allclose(flat(updates), -step, rtol=EXACT)
        assert int(state.tries) == 1
        lam /= 10
        np.testing.assert_allclose(state.damping, lam, rtol=EXACT)
        previous = step
        params = optax.apply_updates(params, updates)


def test_the_rows_foretell_the_decrease_of_a_linear_problem(x64):
    params, batch = problem()
    tx = optax_curv.levenberg_marquardt()
    grads, extra = given(params, batch)
    _, state = tx.update(grads, tx.init(params), params, **extra)
    np.testing.assert_allclose(state.reduction_ratio, 1, rtol=EXACT)
    first = 1e-3 * np.trace(INPUTS.T @ INPUTS / 20)
    np.testing.assert_allclose(state.damping, first / 10, rtol=EXACT)


@pytest.mark.parametrize("rows", ["few", "many"])
def test_the_metric_is_formed_in_the_smaller_space(rows, x64):
    batch = INPUTS[: 3 if rows == "few" else 20], TARGETS[: 3 if rows == "few" else 20]
    params, _ = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt(0.1)
    updates, _ = jax.jit(lambda g, s: tx.update(g, s, params, **extra))(grads, tx.init(params))
    x = batch[0]
    step = np.linalg.solve(x.T @ x / len(x) + 0.1 * np.eye(4), flat(grads))
    np.testing.assert_allclose(flat(updates), -step, rtol=EXACT)


def test_a_loss_that_never_falls_refuses_the_step_and_raises_the_damping(x64):
    params, batch = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt(0.1, max_tries=3)
    worse = extra | {"value_fn": lambda p: extra["value"] + 1 + 0 * p["b"]}
    updates, state = tx.update(grads, tx.init(params), params, **worse)
    assert not np.any(flat(updates))
    assert int(state.refused) == 1 and int(state.tries) == 3
    np.testing.assert_allclose(state.damping, 0.1 * 3**3, rtol=EXACT)


def test_dampings_are_raised_within_one_step_until_the_loss_falls(x64):
    """Only steps shorter than a hundredth of the first one lower this loss."""
    params, batch = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt(1e-3, max_tries=40)

    def near(p):
        moved = jnp.sqrt(sum(jnp.sum((p[k] - params[k]) ** 2) for k in p))
        return extra["value"] - moved * (0.01 - moved)

    updates, state = tx.update(grads, tx.init(params), params, **(extra | {"value_fn": near}))
    assert 0 < np.linalg.norm(flat(updates)) < 0.01
    assert int(state.tries) > 5 and int(state.refused) == 0


def test_a_damping_that_was_found_by_raising_it_is_where_the_next_step_begins(x64):
    params, batch = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt(1e-3)
    longest = 0.5 * optax.tree.norm(tx.update(grads, tx.init(params), params, **extra)[0])

    def walled(p):
        moved = optax.tree.norm(optax.tree.sub(p, params))
        return jnp.where(moved < longest, extra["value_fn"](p), jnp.inf)

    _, state = tx.update(grads, tx.init(params), params, **(extra | {"value_fn": walled}))
    assert int(state.tries) > 1 and float(state.reduction_ratio) > 0.5
    np.testing.assert_allclose(state.damping, 1e-3 * 3.0 ** (int(state.tries) - 1), rtol=EXACT)


def test_a_step_is_no_longer_than_its_bound(x64):
    params, batch = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt(1e-3, max_norm=0.01)
    updates, state = tx.update(grads, tx.init(params), params, **extra)
    np.testing.assert_allclose(np.linalg.norm(flat(updates)), 0.01, rtol=EXACT)
    np.testing.assert_allclose(state.reduction_ratio, 1, rtol=1e-6)


def test_what_is_not_finite_moves_nothing_and_is_counted(x64):
    params, batch = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt(0.1, momentum=0.5)
    state = tx.init(params)
    spoilt = jax.tree.map(lambda x: x.at[0].set(jnp.nan), extra["branches"])
    for wrong in ({"value": jnp.nan}, {"branches": spoilt}, {"weights": jnp.full(20, jnp.nan)}):
        updates, after = tx.update(grads, state, params, **(extra | wrong))
        assert not np.any(flat(updates))
        expected = state._replace(total_notfinite=jnp.int32(1))
        jax.tree.map(np.testing.assert_array_equal, after, expected)
    nowhere = extra | {"value_fn": lambda p: jnp.nan * p["b"]}
    updates, after = tx.update(grads, state, params, **nowhere)
    assert not np.any(flat(updates)) and int(after.refused) == 1


def test_rows_that_are_never_stored_make_the_same_step(x64):
    params, batch = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt(0.1, momentum=0.5)
    lazy = optax_curv.lazy_rows(residual, params, batch, chunk_size=3)
    stored, _ = tx.update(grads, tx.init(params), params, **extra)
    made, _ = tx.update(grads, tx.init(params), params, **(extra | {"branches": lazy}))
    np.testing.assert_allclose(flat(made), flat(stored), rtol=EXACT)


def test_what_is_missing_is_said():
    params, batch = problem()
    grads, extra = given(params, batch)
    tx = optax_curv.levenberg_marquardt()
    state = tx.init(params)
    for name, message in (
        ("branches", r"branches= with rows in parameter space.*residual_rows"),
        ("value", r"value=, the loss at the parameters"),
        ("value_fn", r"value_fn=, a function of the parameters"),
    ):
        left = {k: v for k, v in extra.items() if k != name}
        with pytest.raises(ValueError, match=message):
            tx.update(grads, state, params, **left)
    with pytest.raises(ValueError, match=r"params"):
        tx.update(grads, state, **extra)
    with pytest.raises(ValueError, match=r"damping > 0, got damping=0"):
        optax_curv.levenberg_marquardt(0)
    with pytest.raises(ValueError, match=r"max_tries >= 1"):
        optax_curv.levenberg_marquardt(max_tries=0)
