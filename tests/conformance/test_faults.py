"""After any fault a method stays finite and recovers: random schedules, on one small regression.

A schedule says which fault strikes at which of the first steps; `GOOD` undisturbed steps follow. It
is data of one compiled training run, so that hundreds of them cost one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import cases
from conformance.regression import INPUTS, START, TARGETS, loss_fn
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SCHEDULES = 200
DISTURBED, GOOD = 20, 20
LATENESS = 1.05  # of the undisturbed loss, which has a floor: the targets' noise
TINY, HUGE = 1e-40, 1e30  # denormal, and beyond the root of float32's largest number

# Gradients and statistics are struck with the same number, or by name below.
NUMBERS = {
    "nan": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "huge": HUGE,
    "zero": 0.0,
    "denormal": TINY,
}
FAULTS = (
    "none",
    *(f"{number} gradient" for number in NUMBERS),
    *(f"{number} statistic" for number in NUMBERS),
    "dead output",
    "rank one",
    "batch of one",
    "batch of zeros",
    "damping zero",
    "tenfold rate",
    "sleeping leaf",
    "float16 overflow",
    "lost step",
)
CODE = {name: code for code, name in enumerate(FAULTS)}

METHODS = {
    name: case.fault for name, case in cases.ALL.items() if isinstance(case.fault, cases.Fault)
}


def is_fault(code, name):
    return code == CODE[name]


def gradients_and_extras(case, params, code):
    """What reaches `update` at a step with this fault."""
    one = is_fault(code, "batch of one")
    x, y = (jnp.where(one, data[:1], data) for data in (INPUTS, TARGETS))
    x = jnp.where(is_fault(code, "batch of zeros"), 0, x)
    grads = jax.grad(loss_fn)(params, x, y)
    errors = x @ params["w"] + params["b"] - y
    dead = is_fault(code, "dead output") & (jnp.arange(2) == 0)
    errors = jnp.where(dead, 0, errors)
    grads = grads | {"w": jnp.where(dead, 0, grads["w"]), "b": jnp.where(dead, 0, grads["b"])}
    grads = grads | {"tensor": jnp.where(is_fault(code, "sleeping leaf"), 0, grads["tensor"])}
    overflowing = jax.tree.map(lambda g: (HUGE * g).astype(jnp.float16).astype(jnp.float32), grads)
    for name, number in NUMBERS.items():
        grads = jax.tree.map(
            lambda g, n=name, v=number: jnp.where(is_fault(code, f"{n} gradient"), v, g), grads
        )
    grads = jax.tree.map(
        lambda o, g: jnp.where(is_fault(code, "float16 overflow"), o, g), overflowing, grads
    )
    rows = jnp.where(is_fault(code, "rank one"), x[:1], x)
    extras = case.extras_of(params, rows, y, errors)
    for name, number in NUMBERS.items():
        struck = is_fault(code, f"{name} statistic")
        extras = jax.tree.map(
            lambda e, hit=struck, v=number: jnp.where(hit, v, e) if e.dtype == jnp.float32 else e,
            extras,
        )
    return grads, extras


@functools.cache
def compiled(name):
    """A run over a schedule: least loss of the good steps, and whether all was finite."""
    method = METHODS[name]

    def step(carry, code):
        params, state, before = carry
        state = jax.tree.map(
            lambda old, new: jnp.where(is_fault(code, "lost step"), old, new), before, state
        )
        grads, extras = gradients_and_extras(method, params, code)
        tx = method.make(jnp.where(is_fault(code, "damping zero"), 0.0, method.damping))
        updates, new_state = tx.update(grads, state, params, **extras)
        finite = jnp.stack(
            [
                jnp.all(jnp.isfinite(x))
                for x in jax.tree.leaves((updates, new_state))
                if x.dtype == jnp.float32
            ]
        )
        updates = jax.tree.map(
            lambda u: jnp.where(is_fault(code, "tenfold rate"), 10 * u, u), updates
        )
        same = [(u.shape, u.dtype) for u in jax.tree.leaves(updates)] == [
            (g.shape, g.dtype) for g in jax.tree.leaves(grads)
        ]
        assert same, "an update changed shape or dtype"
        params = optax.apply_updates(params, updates)
        return (params, new_state, state), (loss_fn(params, INPUTS, TARGETS), jnp.all(finite))

    def run(schedule):
        # scan itself refuses a state that changes shape or dtype
        state = method.make(jnp.float32(method.damping)).init(START)
        _, (losses, finite) = jax.lax.scan(step, (START, state, state), schedule)
        return jnp.min(losses[DISTURBED:]), jnp.all(finite)

    run = jax.jit(run)
    undisturbed, finite = run(jnp.zeros(DISTURBED + GOOD, jnp.int32))
    assert finite
    return run, float(undisturbed)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def outcome(name, faults):
    """Least loss of the good steps over the undisturbed one, and whether all stayed finite."""
    run, undisturbed = compiled(name)
    schedule = np.zeros(DISTURBED + GOOD, np.int32)
    for position, fault in faults.items():
        schedule[position] = CODE[fault]
    loss, finite = run(schedule)
    return float(loss) / undisturbed, bool(finite)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_survives_and_recovers_from_any_schedule_of_faults(name):
    strike = st.tuples(st.integers(0, DISTURBED - 1), st.sampled_from(FAULTS[1:]))
    distinct = (lambda strike: strike[0], lambda strike: strike[1])
    schedules = st.lists(strike, min_size=1, max_size=6, unique_by=distinct).map(dict)

    @seed(0)
    @settings(
        max_examples=SCHEDULES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(schedules)
    def survives(faults):
        ratio, finite = outcome(name, faults)
        assert finite, faults
        assert ratio < LATENESS, (ratio, faults)

    survives()
