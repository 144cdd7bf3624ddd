"""After any fault a method stays finite and recovers: random schedules of faults, on one small noisy regression.

A schedule says which fault strikes at which of the first steps; `GOOD` undisturbed steps follow. It
is data of one compiled training run, so that hundreds of them cost one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import cases
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import optax_curv

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

RNG = np.random.default_rng(7)
INPUTS = jnp.asarray(RNG.normal(size=(64, 4)), jnp.float32)
TARGETS = jnp.asarray(INPUTS @ RNG.normal(size=(4, 2)) + RNG.normal(size=(64, 2)), jnp.float32)
GOALS = jax.tree.map(lambda x: 0.3 * x, cases.tree(5))
WIDENING = jnp.asarray(RNG.normal(size=(4, 24)) / 2, jnp.float32)
START = jax.tree.map(jnp.zeros_like, cases.tree(0))


def per_example(params, x, y):
    """Squared errors of a linear layer, and a bowl for the leaves that no layer covers."""
    others = [jnp.sum(jnp.square(params[name] - GOALS[name])) for name in ("scalar", "tensor")]
    return 0.5 * jnp.sum(jnp.square(x @ params["w"] + params["b"] - y)) + 0.5 * sum(others)


def loss_fn(params, x, y):
    return jnp.mean(jax.vmap(per_example, (None, 0, 0))(params, x, y))


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


class Method:
    """A maker of an optimizer from its damping, and the extra arguments that this problem gives it."""

    def __init__(self, make, extras_of=lambda *_: {}, damping=1e-2):
        self.make, self.extras_of, self.damping = make, extras_of, damping


def factors_of(params, x, y, errors):
    rows = jnp.concatenate([x, jnp.ones((64, 1))], axis=1)
    factors = rows.T @ rows / len(x), errors.T @ errors / len(x), jnp.int32(1)
    return {"curvature": {"dense": optax_curv.KroneckerFactors(*factors)}}


def moments_of(params, x, y, errors):
    factors = factors_of(params, x, y, errors)["curvature"]["dense"]
    rows = jnp.concatenate([x, jnp.ones((64, 1))], axis=1)
    moments = jnp.square(rows).T @ jnp.square(errors) / len(x)
    return {"curvature": {"dense": optax_curv.EigenbasisMoments(*factors, moments)}}


def layer_rows_of(params, x, y, errors):
    rows = jnp.concatenate([x, jnp.ones((64, 1))], axis=1)
    return {
        "curvature": {
            "dense": optax_curv.FactorRows(rows, errors / len(x), jnp.array([1 / len(x), len(x)]))
        }
    }


def rows_of(params, x, y, errors):
    return {"branches": jax.vmap(jax.grad(per_example), (None, 0, 0))(params, x, y)}


OBJECTIVE = optax_curv.Objective(
    lambda params, x: x @ params["w"] + params["b"],
    "normal",
    regularizer=lambda params: (
        0.5 * sum(jnp.sum(jnp.square(params[n] - GOALS[n])) for n in ("scalar", "tensor"))
    ),
)


def batch_of(params, x, y, errors):
    return {"batch": (x, y), "value": loss_fn(params, x, y)}


def batch_and_factors_of(*given):
    return batch_of(*given) | factors_of(*given)


def batch_and_diagonal_of(*given):
    squares = jax.tree.map(lambda g: jnp.mean(jnp.square(g), 0), rows_of(*given)["branches"])
    return batch_of(*given) | {"diagonal": squares}


# Steps that do not shrink with the gradient: their rate has to, once a tenfold one has been made
# good.
FADING = optax.exponential_decay(0.15, 1, 0.4, transition_begin=DISTURBED + 14)
ADAM = {"b1": 0.7, "b2": 0.9}
MATRICES_AND_ADAM = {"b1": 0.7, "adam_b1": 0.7, "adam_b2": 0.9}


def adam_in_basis(damping):
    method = optax_curv.scale_by_adam_in_basis(cases.LAYERS, **ADAM, fallback=optax.identity())
    return optax.chain(method, optax.scale_by_learning_rate(FADING))


def with_objective(make, extras_of=batch_of, damping=1e-2):
    """A method of the quadratic model of `OBJECTIVE`."""

    def of_objective(damping):
        tx = make(damping)
        update = functools.partial(tx.update, objective=OBJECTIVE)
        return optax.GradientTransformationExtraArgs(tx.init, update)

    return Method(of_objective, extras_of, damping)


def kron(**options):
    return Method(lambda damping: optax_curv.kron_psgd(0.25, 0.7, **options))


def layerwise(method, extras_of, **options):
    def make(damping):
        return optax.chain(
            # Without a bound, a first statistic of rank one makes steps of 1/damping in all other
            # directions.
            method(cases.LAYERS, damping, kl_clip=1.0, fallback=optax.identity(), **options),
            optax.scale_by_learning_rate(0.3),
        )

    return Method(make, extras_of)


def branches(method, extras_of, damping, **options):
    def make(damping):
        # The undamped metric of rows that have nearly vanished, as at a minimum, knows no bound
        # either.
        return optax.chain(
            method(damping, **options),
            optax.clip_by_global_norm(3.0),
            optax.scale_by_learning_rate(0.7),
        )

    return Method(make, extras_of, damping)


def samples(params, x, y, errors):
    return {"branches": x}


def features(params, x, y, errors):
    """A state as wide as the parameters: what moves only within the state's image converges within the good steps."""
    return {"branches": jnp.tanh(x @ WIDENING)}


METHODS = {
    "kron_psgd": kron(),
    "kron_psgd_eq": kron(geometry="eq"),
    "kron_psgd_sometimes": kron(geometry="qeq", update_probability=0.5),
    "kron_psgd_quad4p": kron(geometry="quad4p"),
    "dense_psgd": Method(lambda damping: optax_curv.dense_psgd(0.2, 0.8)),
    "lra_psgd": Method(lambda damping: optax_curv.lra_psgd(0.2, 0.8, rank=2)),
    "branch_fisher": branches(optax_curv.scale_by_branch_fisher, features, 1.0),
    "branch_fisher_complement": branches(
        optax_curv.scale_by_branch_fisher, samples, 1.0, complement=True
    ),
    "branch_fisher_rows": branches(
        optax_curv.scale_by_branch_fisher, rows_of, 1.0, solver="auto", centered=False
    ),
    "branch_kfac": branches(optax_curv.scale_by_branch_kfac, features, 1.0, blocks=2),
    "kfac": layerwise(optax_curv.scale_by_kfac, factors_of),
    "kfac_eigh": layerwise(
        optax_curv.scale_by_kfac, factors_of, inverse="eigh", damping_rule="trace"
    ),
    "ekfac": layerwise(optax_curv.scale_by_ekfac, moments_of),
    "kfac_rows": layerwise(optax_curv.scale_by_kfac, layer_rows_of, invert_every=4),
    "kfac_seldom": layerwise(optax_curv.scale_by_kfac, factors_of, invert_every=4),
    "kfac_cg": layerwise(optax_curv.scale_by_kfac, factors_of, inverse="cg"),
    "adam_in_basis": Method(adam_in_basis, factors_of),
    # Less damping spends most of a step's fixed size on whitening the noise around the minimum.
    "shampoo": Method(
        lambda damping: optax_curv.shampoo(FADING, rms=1.0, damping=damping, **MATRICES_AND_ADAM),
        damping=0.1,
    ),
    "soap": Method(lambda damping: optax_curv.soap(FADING, b2=0.9, **MATRICES_AND_ADAM)),
    "soap_of_every_rank": Method(
        lambda damping: optax.chain(
            optax_curv.scale_by_soap(**ADAM), optax.scale_by_learning_rate(FADING)
        )
    ),
    "gauss_newton": with_objective(lambda damping: optax_curv.gauss_newton(1.0, damping)),
    "gauss_newton_backtracking": with_objective(
        lambda damping: optax_curv.gauss_newton(1.0, damping, backtrack=True), batch_and_diagonal_of
    ),
    "gauss_newton_layers": with_objective(
        lambda damping: optax_curv.gauss_newton(1.0, damping, layers=cases.LAYERS),
        batch_and_factors_of,
    ),
    "gauss_newton_adaptive": with_objective(lambda damping: optax_curv.gauss_newton(None, damping)),
    "kfac_adaptive": with_objective(
        lambda damping: optax_curv.kfac(None, cases.LAYERS, damping, fallback=optax.identity()),
        batch_and_factors_of,
    ),
    "quadratic_model": with_objective(
        lambda damping: optax.chain(
            optax_curv.scale_by_quadratic_model(damping), optax.scale_by_learning_rate(1.0)
        )
    ),
}


@functools.cache
def compiled(name):
    """A run over a schedule [DISTURBED + GOOD]: least loss of the good steps, and whether all was finite."""
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
    """Least loss of the good steps over the undisturbed one, and whether all stayed finite; faults: {step: name}."""
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
