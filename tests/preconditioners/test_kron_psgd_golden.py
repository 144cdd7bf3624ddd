"""`right_triangular` reproduces the original Kronecker PSGD: every case of kron_psgd.npz."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

FILE = "kron_psgd.npz"
FACTORS_RTOL = 1e-4  # of the largest entry, as the golden README suggests
PARAMS_ATOL = 1e-4
LARGE_GRADIENT_ATOL = 1e-3
LARGE_GRADIENT_CASES = ("vector_large_gradient", "identity_scales")


def chain_of(case):
    number = lambda name: float(case[name])  # noqa: E731
    pieces = [
        optax.add_decayed_weights(number("weight_decay")),
        optax.trace(number("momentum")),
        optax.scale_by_learning_rate(number("lr")),
    ]
    if case["param0"].ndim == 2:
        kron = optax_curv.scale_by_kron_psgd(
            number("precond_lr"), geometry="right_triangular", eps=number("eps"), max_skew=0.0
        )
        pieces = [kron, optax_curv.clip_by_max_abs(number("clip")), *pieces]
    return optax.chain(*pieces)


def run(case, dtype):
    """(params, factors) after every step."""
    params, grads = jnp.asarray(case["param0"], dtype), jnp.asarray(case["grads"], dtype)
    tx = chain_of(case)
    state = tx.init(params)
    if "QL0" in case:
        start = (jnp.asarray(case["QL0"], dtype), jnp.asarray(case["QR0"], dtype))
        state = optax_curv.with_axis_factors(state, params, start)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        factors = optax_curv.axis_factors(state, params) if "QL0" in case else ()
        return (params, state), (params, updates, factors)

    # Small matrices take longer to compile than to run.
    quick = jax.jit(
        lambda start: jax.lax.scan(step, start, grads)[1],
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return quick((params, state))


@pytest.mark.parametrize("name", golden.cases(FILE))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trajectory_equals_the_originals(name, dtype):
    case = golden.case(FILE, name)
    with jax.enable_x64(dtype == "float64"):
        params, updates, factors = jax.tree.map(np.asarray, run(case, dtype))
    atol = LARGE_GRADIENT_ATOL if name in LARGE_GRADIENT_CASES else PARAMS_ATOL
    assert params.dtype == dtype
    np.testing.assert_allclose(params, case["params"], rtol=0, atol=atol)
    np.testing.assert_allclose(updates, case["update"], rtol=0, atol=atol)
    for found, key in zip(factors, ("QL", "QR"), strict=False):
        np.testing.assert_allclose(
            found, case[key], rtol=0, atol=FACTORS_RTOL * np.abs(case[key]).max()
        )
        if name.startswith("identity"):
            assert np.array_equal(found, case[key])
