"""Objectives: losses, Hessians and drawn targets against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_curv
from optax_curv import Objective, testing
from optax_curv.objective import LIKELIHOODS

EXACT = 1e-9
DRAWS = 40_000
# Five standard errors of a mean over DRAWS entries of size one.
MONTE_CARLO = 5 / np.sqrt(DRAWS)
LEADING = (4, 3)
WIDTH = 5
# The curvature of "score" is not the Hessian of its loss: it has tests of its own.
LOG_LIKELIHOODS = [name for name in LIKELIHOODS if name != "score"]

pytestmark = pytest.mark.usefixtures("x64")


def predict(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def problem(likelihood, leading=LEADING, dtype="float64"):
    """Parameters, inputs and targets of a small net whose outputs are [*leading, WIDTH]."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(2, 3)), "v": rng.normal(size=(3, WIDTH))}
    targets = {
        "categorical": rng.integers(0, WIDTH, leading),
        "bernoulli": rng.integers(0, 2, (*leading, WIDTH)) * 1.0,
        "normal": rng.normal(size=(*leading, WIDTH)),
    }[likelihood]
    inputs = rng.normal(size=(*leading, 2))
    params, inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, inputs))
    return params, inputs, jnp.asarray(targets, None if likelihood == "categorical" else dtype)


def logits_and_targets(likelihood, leading=LEADING):
    params, inputs, targets = problem(likelihood, leading)
    return jax.jit(predict)(params, inputs), targets


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """The normal likelihood again, as a user would write it."""

    def loss(self, outputs, targets):
        return 0.5 * jnp.sum((outputs - targets) ** 2, -1)

    def sample_cotangent(self, key, outputs):
        return jax.random.normal(key, outputs.shape, outputs.dtype)

    def hessian_sqrt(self, outputs):
        eye = jnp.eye(outputs.shape[-1], dtype=outputs.dtype)
        return jnp.broadcast_to(
            eye.reshape(len(eye), *(1,) * (outputs.ndim - 1), -1), (len(eye), *outputs.shape)
        )


def test_losses_are_optax_losses_averaged_over_all_leading_axes():
    z, classes = logits_and_targets("categorical")
    objective = Objective(lambda params, inputs: params + inputs, "categorical")
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(z, classes).mean()
    np.testing.assert_allclose(objective(z, 0.0, classes), expected, rtol=EXACT)
    np.testing.assert_allclose(
        objective(z, 0.0, jax.nn.one_hot(classes, WIDTH)), expected, rtol=EXACT
    )
    np.testing.assert_allclose(
        objective(z, 0.0, jax.nn.one_hot(classes, WIDTH, dtype=int)), expected, rtol=EXACT
    )
    soft = jax.nn.softmax(z[::-1])
    np.testing.assert_allclose(
        objective(z, 0.0, soft), optax.losses.softmax_cross_entropy(z, soft).mean(), rtol=EXACT
    )
    z, bits = logits_and_targets("bernoulli")
    expected = optax.losses.sigmoid_binary_cross_entropy(z, bits).sum(-1).mean()
    np.testing.assert_allclose(
        Objective(predict, "bernoulli").loss_of_outputs(z, bits), expected, rtol=EXACT
    )
    z, reals = logits_and_targets("normal")
    expected = optax.losses.l2_loss(z, reals).sum(-1).mean()
    np.testing.assert_allclose(
        Objective(predict, "normal").loss_of_outputs(z, reals), expected, rtol=EXACT
    )


@pytest.mark.parametrize("likelihood", LOG_LIKELIHOODS)
@pytest.mark.parametrize("leading", [(), (1,), (4, 3)])
def test_columns_square_to_the_hessian_of_the_loss(likelihood, leading):
    z, targets = logits_and_targets(likelihood, leading)
    model = LIKELIHOODS[likelihood]
    columns = model.hessian_sqrt(z)
    assert columns.shape == (WIDTH, *z.shape)
    rows, row_targets = (
        z.reshape(-1, WIDTH),
        jnp.reshape(targets, (-1, *jnp.shape(targets)[len(leading) :])),
    )
    hessians = jax.jit(jax.vmap(jax.hessian(model.loss)))(rows, row_targets).reshape(
        *leading, WIDTH, WIDTH
    )
    np.testing.assert_allclose(
        np.einsum("c...i,c...j->...ij", columns, columns), hessians, atol=EXACT
    )
    product = model.hessian_product(z, z)
    np.testing.assert_allclose(product, np.einsum("...ij,...j->...i", hessians, z), atol=EXACT)


@pytest.mark.parametrize("likelihood", LOG_LIKELIHOODS)
def test_sampled_cotangents_have_mean_zero_and_second_moment_the_hessian(likelihood):
    z = jnp.array([1.0, -0.5, 0.3])
    model = LIKELIHOODS[likelihood]
    draw = jax.jit(jax.vmap(model.sample_cotangent, in_axes=(0, None)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), DRAWS), z))
    columns = model.hessian_sqrt(z)
    np.testing.assert_allclose(drawn.mean(0), 0, atol=MONTE_CARLO)
    np.testing.assert_allclose(drawn.T @ drawn / DRAWS, columns.T @ columns, atol=2 * MONTE_CARLO)


def test_a_sampled_cotangent_is_the_gradient_at_a_possible_target():
    z, _ = logits_and_targets("categorical")
    drawn = LIKELIHOODS["categorical"].sample_cotangent(jax.random.key(0), z)
    target = jnp.argmin(drawn, -1)
    gradient = jax.grad(lambda z: LIKELIHOODS["categorical"].loss(z, target).sum())(z)
    np.testing.assert_allclose(drawn, gradient, atol=EXACT)
    z, _ = logits_and_targets("bernoulli")
    drawn = LIKELIHOODS["bernoulli"].sample_cotangent(jax.random.key(0), z)
    gradient = jax.grad(lambda z: LIKELIHOODS["bernoulli"].loss(z, (drawn < 0) * 1.0).sum())(z)
    np.testing.assert_allclose(drawn, gradient, atol=EXACT)


@pytest.mark.parametrize("likelihood", [*LOG_LIKELIHOODS, SquaredError()])
@pytest.mark.parametrize("leading", [(6,), (4, 3)])
def test_gauss_newton_product_equals_the_dense_matrix(likelihood, leading):
    params, inputs, targets = problem(
        likelihood if isinstance(likelihood, str) else "normal", leading
    )
    objective = Objective(predict, likelihood)
    v = jax.tree.map(jnp.cos, params)
    product = jax.jit(objective.gauss_newton_product)(params, inputs, v)
    dense = testing.dense_gauss_newton(objective, params, inputs, targets)
    np.testing.assert_allclose(ravel_pytree(product)[0], dense @ ravel_pytree(v)[0], atol=EXACT)


@pytest.mark.parametrize("likelihood", LOG_LIKELIHOODS)
def test_exact_cotangents_pull_back_to_the_gauss_newton_matrix(likelihood):
    params, inputs, targets = problem(likelihood, (7,))
    objective = Objective(predict, likelihood)
    outputs, pull_back = jax.vjp(lambda p: predict(p, inputs), params)
    columns = objective.exact_cotangents(outputs)
    apart = (columns[:, :, None] * jnp.eye(7)[:, :, None]).reshape(-1, *outputs.shape)
    rows = jax.jit(jax.vmap(lambda cotangent: ravel_pytree(pull_back(cotangent))[0]))(apart)
    dense = testing.dense_gauss_newton(objective, params, inputs, targets)
    np.testing.assert_allclose(rows.T @ rows, dense, atol=EXACT)


def test_sampled_cotangents_share_their_scale_with_the_exact_ones():
    objective = Objective(predict, "normal")
    outputs = jnp.zeros((2, 3, 2000))
    mask = jnp.array([1.0, 0.0])
    for weights in (None, mask):
        exact = jnp.sum(objective.exact_cotangents(outputs, weights=weights) ** 2, (0, -1))
        drawn = objective.sampled_cotangents(jax.random.key(0), outputs, samples=8, weights=weights)
        assert drawn.shape == (8, *outputs.shape)
        np.testing.assert_allclose(
            jnp.sum(drawn**2, (0, -1)), exact, rtol=5 * np.sqrt(2 / (8 * 2000))
        )


@pytest.mark.parametrize("likelihood", LOG_LIKELIHOODS)
def test_a_mask_leaves_rows_out(likelihood):
    params, inputs, targets = problem(likelihood)
    objective = Objective(predict, likelihood)
    mask = jnp.array([True, False, True, True])
    expected = jax.jit(jax.value_and_grad(objective))(params, inputs[mask], targets[mask])
    masked = jax.jit(jax.value_and_grad(objective))(params, inputs, targets, weights=mask)
    by_row = jax.jit(jax.value_and_grad(objective))(
        params, inputs, targets, weights=3 * jnp.broadcast_to(mask[:, None], LEADING)
    )
    for found in (masked, by_row):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=EXACT, atol=EXACT), found, expected
        )
    v = jax.tree.map(jnp.cos, params)
    kept = jax.jit(objective.gauss_newton_product)(params, inputs[mask], v)
    product = jax.jit(objective.gauss_newton_product)(params, inputs, v, weights=mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=EXACT), product, kept)


def test_weights_that_are_all_zero_give_zero_and_not_nan():
    params, inputs, targets = problem("categorical")
    objective = Objective(predict, "categorical")
    value, gradient = jax.jit(jax.value_and_grad(objective))(
        params, inputs, targets, weights=jnp.zeros(4)
    )
    assert value == 0 and not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_the_regularizer_adds_to_the_loss_and_not_to_the_curvature():
    params, inputs, targets = problem("normal")
    plain = Objective(predict, "normal")
    objective = Objective(
        predict, "normal", regularizer=lambda p: 0.5 * optax.tree.norm(p, squared=True)
    )
    value, gradient = jax.jit(jax.value_and_grad(objective))(params, inputs, targets)
    plain_value, plain_gradient = jax.jit(jax.value_and_grad(plain))(params, inputs, targets)
    np.testing.assert_allclose(
        value - plain_value, 0.5 * optax.tree.norm(params, squared=True), rtol=EXACT
    )
    jax.tree.map(
        lambda a, b, p: np.testing.assert_allclose(a, b + p, atol=EXACT),
        gradient,
        plain_gradient,
        params,
    )
    product = jax.jit(objective.gauss_newton_product)(params, inputs, params)
    jax.tree.map(
        np.testing.assert_array_equal,
        product,
        jax.jit(plain.gauss_newton_product)(params, inputs, params),
    )


@pytest.mark.parametrize("likelihood", LOG_LIKELIHOODS)
def test_bfloat16_outputs_are_computed_in_float32_and_cotangents_keep_their_dtype(likelihood):
    params, inputs, targets = problem(likelihood, dtype="bfloat16")
    objective = Objective(predict, likelihood)
    outputs = predict(params, inputs)
    assert objective(params, inputs, targets).dtype == jnp.float32
    np.testing.assert_allclose(
        objective(params, inputs, targets),
        objective.loss_of_outputs(
            outputs.astype("float32"), targets.astype("float32") if targets.ndim > 2 else targets
        ),
        rtol=1e-6,
    )
    assert objective.exact_cotangents(outputs).dtype == jnp.bfloat16
    assert objective.sampled_cotangents(jax.random.key(0), outputs).dtype == jnp.bfloat16
    product = jax.jit(objective.gauss_newton_product)(params, inputs, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_huge_logits_stay_finite(likelihood):
    z = jnp.array([[1e4, -1e4, 0.0]], "float32")
    targets = jnp.array([1]) if likelihood == "categorical" else jnp.array([[0.0, 1.0, 1.0]])
    objective = Objective(lambda params, inputs: params, likelihood)
    results = (
        jax.jit(jax.value_and_grad(objective))(z, None, targets),
        objective.exact_cotangents(z),
        objective.sampled_cotangents(jax.random.key(0), z),
        objective.gauss_newton_product(z, None, z),
    )
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(results))


def test_a_class_masked_out_by_minus_infinity_costs_nothing():
    z = jnp.array([[0.0, 0.0, -jnp.inf]])
    objective = Objective(lambda params, inputs: params, "categorical")
    for targets in (jnp.array([0]), jnp.array([[1.0, 0.0, 0.0]])):
        value, gradient = jax.jit(jax.value_and_grad(objective))(z, None, targets)
        np.testing.assert_allclose(value, np.log(2), rtol=EXACT)
        np.testing.assert_allclose(gradient, [[-0.5, 0.5, 0.0]], atol=EXACT)


def test_an_objective_is_hashable_frozen_and_a_jit_argument():
    objective = Objective(predict, "normal")
    assert objective == Objective(predict, "normal") and hash(objective) == hash(
        Objective(predict, "normal")
    )
    assert objective != Objective(predict, "bernoulli")
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.likelihood = "categorical"
    params, inputs, targets = problem("normal")
    value = jax.jit(lambda objective, *args: objective(*args))(objective, params, inputs, targets)
    np.testing.assert_allclose(value, objective(params, inputs, targets), rtol=EXACT)


class WithoutHessian:
    loss = sample_cotangent = lambda self, *args: None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Objective(predict, "poisson"),
            r"unknown likelihood='poisson'.*'categorical', 'bernoulli', 'normal'",
        ),
        (lambda: Objective(predict, WithoutHessian()), r"lacks \['hessian_sqrt'\]"),
        (lambda: Objective(predict, SquaredError), r"give an instance"),
        (lambda: Objective("net", "normal"), r"expected a function as predict_fn, got 'net'"),
        (
            lambda: Objective(predict, "normal", regularizer=0.1),
            r"expected a function as regularizer, got 0.1",
        ),
    ],
)
def test_a_bad_objective_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("likelihood", "targets", "weights", "message"),
    [
        (
            "categorical",
            jnp.zeros((4, 3)),
            None,
            r"integer targets of shape \(4, 3\).*got float.* of shape \(4, 3\)",
        ),
        (
            "categorical",
            jnp.zeros((4,), int),
            None,
            r"one-hot targets of shape \(4, 3, 5\).*\(4,\)",
        ),
        ("bernoulli", jnp.zeros((4, 3)), None, r"shape of the outputs, \(4, 3, 5\), got \(4, 3\)"),
        ("normal", jnp.zeros((1, 5)), None, r"shape of the outputs, \(4, 3, 5\), got \(1, 5\)"),
        ("normal", jnp.zeros((4, 3, 5)), jnp.ones(3), r"weights of shape \(4, 3\).*got \(3,\)"),
    ],
)
def test_bad_targets_and_weights_are_refused(likelihood, targets, weights, message):
    params, inputs, _ = problem("normal")
    with pytest.raises(ValueError, match=message):
        Objective(predict, likelihood)(params, inputs, targets, weights=weights)


def test_outputs_without_rows_and_losses_without_rows_are_refused():
    objective = Objective(lambda params, inputs: params, "normal")
    with pytest.raises(ValueError, match=r"at least one row, got shape \(0, 3\)"):
        objective(jnp.zeros((0, 3)), None, jnp.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"at least one row, got shape \(\)"):
        objective(jnp.float32(1), None, jnp.float32(1))

    class Summed(SquaredError):
        def loss(self, outputs, targets):
            return jnp.sum((outputs - targets) ** 2)

    with pytest.raises(ValueError, match=r"one number a row, shape \(4,\).*got \(\)"):
        Objective(lambda params, inputs: params, Summed())(jnp.ones((4, 3)), None, jnp.ones((4, 3)))


def test_the_score_of_a_wavefunction_has_its_forces_and_its_metric(x64):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "v": jnp.asarray(rng.normal(size=(2, 1)))}
    x, energies = jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=9))
    weights = jnp.asarray(rng.uniform(size=9))
    share = weights / weights.sum()
    targets = (energies - share @ energies)[:, None]
    log_psi = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    objective = Objective(log_psi, "score")
    flat, unravel = ravel_pytree(params)
    rows = jax.jacobian(lambda v: log_psi(unravel(v), x)[:, 0])(flat)
    gradient = jax.grad(objective)(params, x, targets, weights=weights)
    forces = share @ (rows * targets)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], forces, rtol=EXACT)
    product = objective.gauss_newton_product(params, x, gradient, weights=weights)
    metric = rows.T @ (share[:, None] * rows)
    np.testing.assert_allclose(ravel_pytree(product)[0], metric @ forces, rtol=EXACT)


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_kfac_of_a_linear_wavefunction_is_stochastic_reconfiguration(fisher, x64):
    rng = np.random.default_rng(1)
    x, energies = rng.normal(size=(12, 4)), rng.normal(size=12)
    x, targets = jnp.asarray(x - x.mean(0)), jnp.asarray(energies - energies.mean())[:, None]
    params = {"w": jnp.asarray(rng.normal(size=(4, 1)))}
    objective = Objective(lambda p, x: x @ p["w"], "score")
    layers = optax_curv.find_layers(objective, params, x, targets)
    take = optax_curv.value_grad_and_curvature(objective, layers=layers, fisher=fisher)
    key = {"key": jax.random.key(0)} if fisher == "sampled" else {}
    _, grads, curvature = take(params, x, targets, **key)
    tx = optax_curv.scale_by_kfac(layers, damping=0.0)
    direction, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
    exact = np.linalg.solve(x.T @ x / 12, x.T @ targets / 12)
    found = direction["w"] * (curvature[next(iter(layers)).name].output_factor if key else 1)
    np.testing.assert_allclose(found, exact, rtol=1e-8)


def test_a_wavefunction_without_an_axis_of_outputs_is_refused():
    objective = Objective(lambda p, x: x @ p, "score")
    with pytest.raises(ValueError, match=r"log ψ as \[N, 1\].*shape \(5,\)"):
        objective(jnp.zeros(2), jnp.zeros((5, 2)), jnp.zeros(5))
