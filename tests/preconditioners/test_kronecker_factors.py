"""One layer's arithmetic: the original's numbers, dense solves, and what is refused."""

import contextlib
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv import KroneckerFactors, init_factors, natural_gradient, update_factors

FILE = "layer_kfac.npz"
# Relative to the largest entry, a little above the differences that the golden README measured.
LIMITS = {"float64": 1e-11, "float32": 5e-4}
EXACT = 1e-9


@contextlib.contextmanager
def precision(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield LIMITS[dtype]


def assert_close(actual, expected, limit):
    scale = np.max(np.abs(expected)) or 1.0
    assert np.max(np.abs(np.asarray(actual, np.float64) - expected)) <= limit * scale


update = jax.jit(update_factors)  # compiled once for each shape, over all cases
trace_damped = jax.jit(functools.partial(natural_gradient, rule="trace"))
both = pytest.mark.parametrize("dtype", LIMITS)


@both
@pytest.mark.parametrize("name", golden.cases(FILE))
def test_layer_equals_the_original(name, dtype):
    case = golden.case(FILE, name)
    with precision(dtype) as limit:
        factors = init_factors(int(case["in_dim"]), int(case["out_dim"]))
        for step in range(len(case["num_updates"])):
            if len(case["batch_sizes"]):
                factors = update(
                    factors, case[f"acts_{step}"], case[f"gouts_{step}"], float(case["ema"])
                )
            grad = case["weight_grad"][step].T.astype(dtype)
            direction = trace_damped(factors, grad, float(case["damping_effective"]))
            assert factors.count == case["num_updates"][step]
            assert factors.input_factor.dtype == dtype == direction.dtype
            assert_close(factors.input_factor, case["a_factor"][step], limit)
            assert_close(factors.output_factor, case["g_factor"][step], limit)
            assert_close(direction.T, case["nat_grad"][step], limit)
            if step == case["reset_after"]:
                factors = init_factors(int(case["in_dim"]), int(case["out_dim"]))


@both
@pytest.mark.parametrize("name", golden.cases(FILE, "network_names"))
def test_network_equals_the_original(name, dtype):
    case = golden.case(FILE, name)
    with precision(dtype) as limit:
        for number, (width_in, width_out) in enumerate(case["layer_dims"]):
            layer = {
                k: case[f"layer{number}/{k}"]
                for k in ("acts", "gouts", "weight_grad", "a_factor", "update")
            }
            factors = init_factors(int(width_in), int(width_out))
            damping = float(case["layer_damping_effective"][number])
            for step in range(len(layer["acts"])):
                factors = update(factors, layer["acts"][step], layer["gouts"][step])
                direction = trace_damped(factors, layer["weight_grad"][step].T, damping)
                assert_close(factors.input_factor, layer["a_factor"][step], limit)
                assert_close(-case["lr_effective"] * direction.T, layer["update"][step], limit)


@pytest.mark.parametrize(
    "name",
    ["empty_batch", "empty_activations", "batch_mismatch", "activation_width", "gradient_width"],
)
def test_a_bad_batch_is_refused_and_names_both_shapes(name):
    bad = golden.case(FILE, f"errors/{name}")
    inputs, output_grads = bad["activations"], bad["gradients"]
    named = {
        "activation_width": r"inputs has shape \(2, 4\), expected \[N, 3\].*\(3, 3\)",
        "gradient_width": r"output_grads has shape \(2, 3\), expected \[N, 2\].*\(2, 2\)",
    }.get(name, rf"\({len(inputs)}, 3\) and \({len(output_grads)}, 2\)")
    with pytest.raises(ValueError, match=named):
        update_factors(init_factors(3, 2), inputs, output_grads)


@pytest.mark.parametrize("name", ["weight_rows", "weight_columns_short", "weight_columns_long"])
def test_a_gradient_of_another_shape_is_refused(name):
    bad = golden.case(FILE, f"errors/{name}")
    factors = update_factors(init_factors(3, 2), bad["activations"], bad["gradients"])
    grad = bad["weight_grad"].T
    with pytest.raises(
        ValueError, match=rf"shape \({grad.shape[0]}, {grad.shape[1]}\), expected .*3, 2\]"
    ):
        natural_gradient(factors, grad, rule="trace")


def test_a_nan_activation_gives_nan_as_in_the_original():
    bad = golden.case(FILE, "errors/nan_activation")
    factors = update_factors(init_factors(2, 2), bad["activations"], bad["gradients"])
    direction = natural_gradient(factors, bad["weight_grad"].T, rule="trace")
    np.testing.assert_array_equal(np.isnan(direction.T), np.isnan(bad["nat_grad"]))


@both
def test_where_the_original_meets_a_lost_pivot_the_damping_is_raised(dtype):
    bad = golden.case(FILE, "errors/not_positive_definite_network_damping_0")
    with precision(dtype):
        factors = update_factors(init_factors(2, 2), bad["activations"], bad["gradients"])
        assert np.all(
            np.isfinite(natural_gradient(factors, bad["weight_grad"].T, 0.0, rule="trace"))
        )


def random_factors(rng, stack, rows, out, full=(True, True)):
    def factor(d, full):
        x = rng.normal(size=(*stack, d, d + 2))
        return jnp.asarray(x @ x.swapaxes(-1, -2) if full else np.square(x).sum(-1))

    return KroneckerFactors(factor(rows, full[0]), factor(out, full[1]), jnp.int32(1))


def dense(factor):
    return factor if factor.ndim == 2 else jnp.diag(factor)


@pytest.mark.parametrize("full", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("damping", [1e-3, 2.0])
def test_pi_damping_solves_the_damped_kronecker_product(x64, full, damping):
    rng = np.random.default_rng(0)
    factors, grad = random_factors(rng, (), 4, 3, full), rng.normal(size=(4, 3))
    a, g = dense(factors.input_factor), dense(factors.output_factor)
    pi = np.sqrt((np.trace(a) / 4) / (np.trace(g) / 3))
    product = np.kron(a + pi * np.sqrt(damping) * np.eye(4), g + np.sqrt(damping) / pi * np.eye(3))
    expected = np.linalg.solve(product, grad.ravel()).reshape(4, 3)
    assert_close(natural_gradient(factors, grad, damping), expected, EXACT)


def test_stacked_factors_are_solved_slice_by_slice(x64):
    rng = np.random.default_rng(1)
    factors, grad = random_factors(rng, (2, 3), 4, 2), rng.normal(size=(2, 3, 4, 2))
    together = natural_gradient(factors, grad)
    for i in np.ndindex(2, 3):
        one = KroneckerFactors(factors.input_factor[i], factors.output_factor[i], factors.count)
        assert_close(together[i], natural_gradient(one, grad[i]), EXACT)


@pytest.mark.parametrize("zero", ["input", "output", "both"])
def test_zero_factors_under_pi_leave_finite_directions(zero):
    factors = KroneckerFactors(
        jnp.zeros((3, 3)) if zero != "output" else jnp.eye(3),
        jnp.zeros((2, 2)) if zero != "input" else jnp.eye(2),
        jnp.int32(1),
    )
    direction = natural_gradient(factors, jnp.ones((3, 2)), 1e-2)
    added = {"input": 0.1 * 1.1, "output": 0.1 * 1.1, "both": 0.01}[zero]  # pi falls back to 1
    np.testing.assert_allclose(direction, jnp.ones((3, 2)) / added, rtol=1e-5)


def test_damping_and_decay_may_be_traced_and_swept():
    factors = update_factors(init_factors(2, 2), jnp.eye(2), jnp.ones((2, 2)))
    dampings = jnp.array([1e-3, 1e-1])
    swept = jax.jit(jax.vmap(lambda d: natural_gradient(factors, jnp.eye(2), d)))(dampings)
    for damping, direction in zip(dampings, swept, strict=True):
        np.testing.assert_allclose(
            direction, natural_gradient(factors, jnp.eye(2), float(damping)), rtol=1e-4
        )
    updated = jax.jit(update_factors)(factors, jnp.ones((4, 2)), jnp.ones((4, 2)), jnp.array(0.5))
    np.testing.assert_allclose(updated.input_factor, [[0.75, 0.5], [0.5, 0.75]])


def test_low_precision_gradients_keep_their_dtype():
    factors = update_factors(
        init_factors(2, 2), jnp.eye(2, dtype=jnp.bfloat16), jnp.ones((2, 2), jnp.bfloat16)
    )
    assert factors.input_factor.dtype == jnp.float32
    assert natural_gradient(factors, jnp.ones((2, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def test_bad_choices_are_refused():
    factors = init_factors(2, 2)
    with pytest.raises(ValueError, match="unknown rule='tikhonov'; expected one of"):
        natural_gradient(factors, jnp.ones((2, 2)), rule="tikhonov")
    with pytest.raises(ValueError, match=r"expected damping >= 0, got damping=-0\.5"):
        natural_gradient(factors, jnp.ones((2, 2)), -0.5)
    with pytest.raises(ValueError, match="expected out_dim >= 1, got out_dim=0"):
        init_factors(2, 0)
    with pytest.raises(ValueError, match=r"inputs has shape \(3,\)"):
        update_factors(init_factors(3, 2), jnp.ones(3), jnp.ones((1, 2)))
