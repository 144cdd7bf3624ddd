"""Where theory says what a Fisher matrix is, captured statistics are exactly that."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from optax_curv import Objective, find_layers, testing, value_grad_and_curvature
from optax_curv.curvature import factors_of_rows
from optax_curv.preconditioners._layerwise.blocks import factor_damping

EXACT = 1e-9
# Five standard errors of a mean of squared gradients, relative to the largest, times the square
# root of the draws.
MONTE_CARLO = 5 * np.sqrt(3)

pytestmark = pytest.mark.usefixtures("x64")


def close(found, expected, tolerance=EXACT):
    """Relative to the largest entry."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def linear_net(params, inputs):
    for layer in params:
        inputs = inputs @ layer["kernel"] + layer["bias"]
    return inputs


def tanh_net(params, inputs):
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["kernel"] + layer["bias"])
    return linear_net(params[-1:], inputs)


def mixing_net(params, inputs):
    """Positions meet: a causal sum over the time axis of [N, T, features]."""
    return linear_net(params[1:], jnp.cumsum(jnp.tanh(linear_net(params[:1], inputs)), 1))


def parameters(*widths):
    rng = np.random.default_rng(0)
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a)),
            "bias": jnp.asarray(0.1 * rng.normal(size=b)),
        }
        for a, b in itertools.pairwise(widths)
    ]


def batch(likelihood, *leading, inputs=3, outputs=4):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(*leading, inputs)))
    targets = {
        "categorical": rng.integers(0, outputs, leading),
        "bernoulli": rng.integers(0, 2, (*leading, outputs)) * 1.0,
        "normal": rng.normal(size=(*leading, outputs)),
    }
    return x, jnp.asarray(targets[likelihood])


def curvature(objective, params, data, **options):
    extra = {name: options.pop(name) for name in ("key", "basis", "weights") if name in options}
    return jax.jit(value_grad_and_curvature(objective, **options))(params, *data, **extra)[2]


def block(matrix, params, layer):
    """Takes a layer's block out of a matrix over flat parameters, as [rows of the kernel, bias]."""
    flat, unravel = ravel_pytree(params)
    where = unravel(jnp.arange(float(flat.size)))[layer]
    where = np.concatenate([where["kernel"], where["bias"][None]]).astype(int).ravel()
    return np.asarray(matrix)[np.ix_(where, where)]


def kron(statistic):
    return np.kron(statistic.input_factor, statistic.output_factor)


# ---- exact
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(6,), (3, 2), (2, 3, 2)])
def test_linear_softmax_layer_has_its_closed_form(leading):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    x, classes = batch("categorical", *leading)
    found = curvature(
        Objective(lambda p, x: x @ p["w"], "categorical"), {"w": w}, (x, classes), fisher="exact"
    )["w"]
    rows = np.asarray(x).reshape(-1, 3)
    p = np.asarray(jax.nn.softmax(rows @ w))
    close(found.input_factor, rows.T @ rows / len(rows))
    close(found.output_factor, np.diag(p.mean(0)) - p.T @ p / len(rows))


@pytest.mark.parametrize("leading", [(5,), (5, 3)])
def test_deep_linear_net_with_squared_error_is_exactly_kronecker(leading):
    params, data = parameters(3, 5, 2, 4), batch("normal", *leading)
    objective = Objective(linear_net, "normal")
    found = curvature(objective, params, data, fisher="exact")
    dense = testing.dense_gauss_newton(objective, params, *data)
    for layer, statistic in enumerate(found.values()):
        close(kron(statistic), block(dense, params, layer))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "normal"])
def test_any_dense_net_is_exactly_kronecker_at_one_example(likelihood):
    params, data = parameters(3, 5, 4), batch(likelihood, 1)
    objective = Objective(tanh_net, likelihood)
    found = curvature(objective, params, data, fisher="exact")
    dense = testing.dense_fisher(objective, params, data[0])
    for layer, statistic in enumerate(found.values()):
        close(kron(statistic), block(dense, params, layer))


def test_scales_and_shifts_have_their_exact_block():
    params = {"scale": jnp.array([0.5, 1.0, -2.0]), "shift": jnp.array([0.1, 0.2, 0.3])}
    data = batch("categorical", 6, outputs=3)
    objective = Objective(lambda p, x: jnp.tanh(x * p["scale"]) * 2 + p["shift"], "categorical")
    found = curvature(objective, params, data, fisher="exact")
    dense = testing.dense_gauss_newton(objective, params, *data)
    close(found["scale"].output_factor, dense[:3, :3])
    close(found["shift"].output_factor, dense[3:, 3:])


# ---- shared weights
# ----------------------------------------------------------------------------------------------


def scanned(params, inputs):
    """The same linear layer at every time step of [N, T, features], in a scan."""
    return jnp.moveaxis(
        jax.lax.scan(lambda c, x: (c, x @ params["w"]), (), jnp.moveaxis(inputs, 1, 0))[1], 0, 1
    )


def summed(params, inputs):
    """A linear recurrent net that only accumulates: its last state is the output."""
    start = jnp.zeros((len(inputs), params["w"].shape[1]), inputs.dtype)
    return jax.lax.scan(
        lambda h, x: (h + x @ params["w"], None), start, jnp.moveaxis(inputs, 1, 0)
    )[0]


def test_expand_equals_its_definition_and_is_exact_for_a_linear_net_with_a_loss_at_every_step():
    params, data = (
        {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))},
        batch("normal", 5, 2),
    )
    objective = Objective(scanned, "normal")
    dense = testing.dense_gauss_newton(objective, params, *data)
    close(kron(curvature(objective, params, data, fisher="exact")["w"]), dense)

    found = curvature(objective, params, data)["w"]
    a, steps = np.asarray(data[0]), 2
    g = (
        np.asarray(a @ params["w"]) - np.asarray(data[1])
    ) / steps  # of one example's own loss, a mean over its steps
    inputs, grads = np.einsum("nti,ntj->ij", a, a) / 5, np.einsum("nti,ntj->ij", g, g) / 5
    close(kron(found), np.kron(inputs, grads) / steps)


def test_reduce_equals_its_definition_and_is_exact_for_a_linear_net_that_sums_its_steps():
    params, x = (
        {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))},
        batch("normal", 5, 2)[0],
    )
    targets = batch("normal", 5)[1]
    objective = Objective(summed, "normal")
    dense = testing.dense_gauss_newton(objective, params, x, targets)
    close(
        kron(curvature(objective, params, (x, targets), fisher="exact", sharing="reduce")["w"]),
        dense,
    )

    data = batch("normal", 5, 2)
    found = curvature(Objective(scanned, "normal"), params, data, sharing="reduce")["w"]
    a = np.asarray(data[0])
    g = (np.asarray(a @ params["w"]) - np.asarray(data[1])) / 2
    close(found.input_factor, np.einsum("ni,nj->ij", a.mean(1), a.mean(1)) / 5)
    close(found.output_factor, np.einsum("ni,nj->ij", g.sum(1), g.sum(1)) / 5)


def test_exact_keeps_the_positions_of_an_example_apart_where_the_network_mixes_them():
    params, data = parameters(3, 2, 4), batch("categorical", 2, 3)
    objective = Objective(mixing_net, "categorical")
    found = curvature(objective, params, data, fisher="exact")["0"].output_factor
    hidden = linear_net(params[:1], data[0])
    outputs, pull_back = jax.vjp(
        lambda h: linear_net(params[1:], jnp.cumsum(jnp.tanh(h), 1)), hidden
    )
    columns = objective.likelihood.hessian_sqrt(outputs)
    rows = jnp.eye(6).reshape(6, 2, 3, 1)  # one row of one example at a time
    (pulled,) = jax.jit(jax.vmap(pull_back))((rows[:, None] * columns).reshape(-1, *outputs.shape))
    close(found, jnp.einsum("cnti,cntj->ij", pulled, pulled) / 6)


# ---- scale
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_duplicating_the_batch_changes_nothing(fisher, sharing):
    params, data = parameters(3, 2, 4), batch("categorical", 3, 2)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), data)
    objective = Objective(mixing_net, "categorical")
    once = curvature(objective, params, data, fisher=fisher, sharing=sharing)
    jax.tree.map(close, curvature(objective, params, twice, fisher=fisher, sharing=sharing), once)


def test_pi_splits_the_damping_of_captured_factors():
    params, data = parameters(3, 5, 4), batch("categorical", 6)
    found = curvature(Objective(tanh_net, "categorical"), params, data, fisher="exact")["0"]
    means = [jnp.trace(factor) / len(factor) for factor in found[:2]]
    input_damping, output_damping = factor_damping("pi", 0.01, *means)
    close(input_damping * output_damping, 0.01)
    close(input_damping / output_damping, means[0] / means[1])
    for zero in ((0.0, means[1]), (means[0], 0.0)):
        close(jnp.stack(factor_damping("pi", 0.01, *map(jnp.asarray, zero))), jnp.full(2, 0.1))


@pytest.mark.parametrize("net", [tanh_net, mixing_net])
def test_sampled_converges_to_exact_at_the_monte_carlo_rate(net):
    leading = (3,) if net is tanh_net else (2, 3)
    params, data = parameters(3, 2, 4), batch("categorical", *leading)
    objective = Objective(net, "categorical")
    exact = curvature(objective, params, data, fisher="exact")
    for samples in (100, 10_000):
        drawn = curvature(
            objective, params, data, fisher="sampled", samples=samples, key=jax.random.key(0)
        )
        for name, statistic in drawn.items():
            close(statistic.input_factor, exact[name].input_factor)
            close(
                statistic.output_factor, exact[name].output_factor, MONTE_CARLO / np.sqrt(samples)
            )


def test_rows_beside_the_factors_of_a_scale_make_the_factors():
    def net(params, x):
        return jnp.tanh(x @ params["w"]) * params["scale"] @ params["v"]

    params = {
        "w": jnp.ones((3, 2)) / 3,
        "scale": jnp.arange(1.0, 3.0),
        "v": jnp.arange(8.0).reshape(2, 4) / 8,
    }
    objective, data = Objective(net, "categorical"), batch("categorical", 3)
    for options in (
        {"fisher": "exact"},
        {"fisher": "sampled", "samples": 3, "key": jax.random.key(0)},
    ):
        factors = curvature(objective, params, data, **options)
        layers = find_layers(objective, params, *data)
        for name, rows in curvature(objective, params, data, statistic="rows", **options).items():
            made = rows[:2] if layers[name].kind == "scale" else factors_of_rows(rows, layers[name])
            for side in (0, 1):
                close(made[side], factors[name][side])


def test_raw_samples_make_the_factors():
    params, data = parameters(3, 2, 4), batch("categorical", 3)
    objective = Objective(tanh_net, "categorical")
    for options in (
        {"fisher": "exact"},
        {"fisher": "sampled", "samples": 3, "key": jax.random.key(0)},
    ):
        factors = curvature(objective, params, data, **options)
        layers = find_layers(objective, params, *data)
        for name, rows in curvature(objective, params, data, statistic="rows", **options).items():
            for made, factor in zip(
                factors_of_rows(rows, layers[name]), factors[name][:2], strict=True
            ):
                close(made, factor)
        for name, raw in curvature(objective, params, data, statistic="raw", **options).items():
            rows = len(raw.inputs)
            close(raw.inputs.T @ raw.inputs / rows, factors[name].input_factor)
            close(raw.output_grads.T @ raw.output_grads / rows, factors[name].output_factor)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_ekfac_moments_are_the_fisher_diagonal_in_the_basis_and_diagonal_that_in_none(kind):
    params, data = parameters(3, 5, 4), batch("categorical", 6)
    objective = Objective(tanh_net, "categorical")
    factors = curvature(objective, params, data, fisher=kind)
    basis = {
        name: (jnp.linalg.eigh(f[0])[1], jnp.linalg.eigh(f[1])[1]) for name, f in factors.items()
    }
    found = curvature(objective, params, data, fisher=kind, statistic="eigenbasis", basis=basis)
    diagonal = curvature(objective, params, data, fisher=kind, statistic="diagonal")
    dense = testing.dense_fisher(objective, params, *data, kind=kind)
    for layer, name in enumerate(found):
        rotation, own = np.kron(*basis[name]), block(dense, params, layer)
        close(found[name].moments.ravel(), np.diag(rotation.T @ own @ rotation))
        close(diagonal[name].ravel(), np.diag(own))


def test_a_mask_leaves_examples_out_of_the_output_factor():
    params, (x, classes) = parameters(3, 5, 4), batch("categorical", 6)
    objective = Objective(tanh_net, "categorical")
    masked = curvature(objective, params, (x, classes), fisher="exact", weights=jnp.arange(6) < 4)
    kept = curvature(objective, params, (x[:4], classes[:4]), fisher="exact")
    for name in kept:
        close(masked[name].output_factor, kept[name].output_factor)


# ---- value, gradients, size, refusals
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_gradients_are_those_of_the_objective_bit_for_bit(fisher, eagerly):
    params, data = parameters(3, 5, 4), batch("categorical", 6)
    objective = Objective(
        tanh_net, "categorical", regularizer=lambda p: 0.1 * jnp.sum(ravel_pytree(p)[0] ** 2)
    )
    key = jax.random.key(0)
    value, grads, regularized = value_grad_and_curvature(objective, fisher=fisher)(
        params, *data, key=key
    )
    with eagerly:
        expected_value, expected_grads = jax.value_and_grad(objective)(params, *data)
    close(value, expected_value)
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
    if fisher != "empirical":
        plain = curvature(Objective(tanh_net, "categorical"), params, data, fisher=fisher, key=key)
        jax.tree.map(close, regularized, plain)


def test_the_program_for_exact_does_not_grow_with_the_classes():
    def lines(classes):
        objective = Objective(tanh_net, "categorical")
        f = jax.jit(value_grad_and_curvature(objective, fisher="exact"))
        return f.lower(parameters(3, 5, classes), *batch("categorical", 6)).as_text().count("\n")

    assert lines(3) == lines(300)


def test_bad_requests_are_refused():
    params, data = parameters(3, 5, 4), batch("categorical", 6)
    objective = Objective(tanh_net, "categorical")
    for fisher in ("sampled", "exact"):
        with pytest.raises(
            ValueError, match=rf"fisher='{fisher}' needs .* pass optax_curv.Objective"
        ):
            value_grad_and_curvature(lambda *args: objective(*args), fisher=fisher)
    with pytest.raises(ValueError, match=r"call f\(params, inputs, targets, key=key\)"):
        value_grad_and_curvature(objective, fisher="sampled")(params, *data)
    with pytest.raises(ValueError, match="expected samples >= 1, got samples=0"):
        value_grad_and_curvature(objective, fisher="sampled", samples=0)
    with pytest.raises(ValueError, match="an Objective has no aux"):
        value_grad_and_curvature(objective, has_aux=True)
