"""What every transformation keeps, whatever its method."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import cases
from flax import nnx

import optax_curv

STEPS = 3
ROUNDING = {
    "rtol": 2e-3,
    "atol": 1e-5,
}  # a few steps of rounding through factorisations, in float32
WRAPPED = ("w", "b")

ANY_TREE = [name for name, case in cases.CASES.items() if case.any_tree]
every = pytest.mark.parametrize("name", cases.CASES)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs run for microseconds: compile them without most optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def extras(name, step=0):
    return cases.CASES[name].extras(np.random.default_rng(100 + step))


def updater(name, tx):
    """The transformation's update with its static and some unknown extra arguments filled in."""

    def update(grads, state, params, arrays):
        return tx.update(grads, state, params, **arrays, **cases.CASES[name].static, unknown=1)

    update.__name__ = name  # traces are counted by name
    return update


@functools.cache
def compiled(name):
    """The transformation and its jitted update, which donates the state and may be traced once."""
    tx = cases.CASES[name].transformation()
    return tx, jax.jit(chex.assert_max_traces(updater(name, tx), n=1), donate_argnums=1)


def copied(state):
    return jax.tree.map(jnp.copy, state)


def walk(name, update, state, steps=STEPS):
    """Updates and states of some steps."""
    params, updates, states = cases.tree(0), [], [state]
    for step in range(steps):
        new, state = update(cases.tree(step + 1), copied(state), params, extras(name, step))
        updates.append(new)
        states.append(state)
    return updates, states


def numbers(state):
    """A state's floating-point leaves: fingerprints of them hash the rounding."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@functools.cache
def jitted_walk(name):
    tx, update = compiled(name)
    return walk(name, update, tx.init(cases.tree(0)))


@every
def test_nothing_changes_shape_or_dtype_from_step_to_step(name):
    updates, states = jitted_walk(name)
    for step, new in enumerate(updates):
        chex.assert_trees_all_equal_shapes_and_dtypes(new, cases.tree(step + 1))
    for state in states[1:]:
        chex.assert_trees_all_equal_shapes_and_dtypes(state, states[0])
    chex.assert_tree_all_finite((updates, states))


@every
def test_jit_changes_nothing(name):
    tx, _ = compiled(name)
    updates, states = walk(name, updater(name, tx), tx.init(cases.tree(0)), steps=1)
    expected_updates, expected_states = jitted_walk(name)
    chex.assert_trees_all_close(updates[0], expected_updates[0], **ROUNDING)
    chex.assert_trees_all_close(numbers(states[1]), numbers(expected_states[1]), **ROUNDING)


@every
def test_a_sweep_over_a_number_is_a_vmapped_scan(name):
    case = cases.CASES[name]
    arrays = jax.tree.map(lambda *x: jnp.stack(x), *(extras(name, step) for step in range(STEPS)))
    grads = jax.tree.map(lambda *x: jnp.stack(x), *(cases.tree(step + 1) for step in range(STEPS)))
    params = cases.tree(0)

    def run(number):
        tx = case.make(**{case.number: number}) if case.number else case.make()

        def step(state, xs):
            new, state = updater(name, tx)(xs[0], state, params, xs[1])
            return state, new

        return jax.lax.scan(step, tx.init(params), (grads, arrays))[1]

    swept = jax.jit(jax.vmap(run))(jnp.array([case.value, 2 * case.value]))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *jitted_walk(name)[0])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], swept), expected, **ROUNDING)


@every
def test_init_takes_shapes_and_its_state_shares_nothing_with_the_parameters(name):
    tx, _ = compiled(name)
    params = cases.tree(0)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(jax.eval_shape(lambda: params)), state)
    owned = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size}
    assert not owned & held


@pytest.mark.parametrize("name", cases.METHODS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(name, bad):
    _, update = compiled(name)
    state = jitted_walk(name)[1][-1]
    grads = cases.tree(1) | {"w": jnp.full(cases.SHAPES["w"], bad, jnp.float32)}
    new, skipped = update(grads, copied(state), cases.tree(0), extras(name))
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(new))
    chex.assert_trees_all_equal(skipped, state._replace(total_notfinite=state.total_notfinite + 1))


@every
def test_updates_keep_the_precision_of_the_gradients(name):
    tx = cases.CASES[name].transformation()
    grads = cases.tree(1, "bfloat16")
    for params in (cases.tree(0, "bfloat16"), cases.tree(0, "float32")):
        keeps_shapes(updater(name, tx), tx.init, params, grads, extras(name))


def keeps_shapes(update, init, params, grads, arrays):
    """Traces a step and compares what comes out with what went in."""
    state = jax.eval_shape(init, params)
    new, new_state = jax.eval_shape(update, grads, state, params, arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("name", ANY_TREE)
def test_a_model_without_parameters_passes(name):
    tx = cases.CASES[name].transformation()
    keeps_shapes(updater(name, tx), tx.init, {}, {}, extras(name))


@every
@pytest.mark.parametrize(
    "wrapper", ["masked", "partition", "multi_steps", "apply_if_finite", "inject_hyperparams"]
)
def test_wrappers_of_optax_trace(name, wrapper):
    case = cases.CASES[name]
    inside = {key: key in WRAPPED for key in (*cases.SHAPES, "none")}
    schedule = {case.number: lambda count: case.value / (1 + count)} if case.number else {}
    tx = {
        "masked": lambda: optax.masked(case.transformation(), inside),
        "partition": lambda: optax.partition(
            {True: case.transformation(), False: optax.sgd(0.1)}, inside
        ),
        "multi_steps": lambda: optax.MultiSteps(case.transformation(), 2).gradient_transformation(),
        "apply_if_finite": lambda: optax.apply_if_finite(case.transformation(), 3),
        "inject_hyperparams": lambda: optax.inject_hyperparams(case.make)(**schedule),
    }[wrapper]()
    keeps_shapes(updater(name, tx), tx.init, cases.tree(0), cases.tree(1), extras(name))


@pytest.mark.parametrize(
    "name", ["branch_kfac", "normalize_by_rms", "kron_psgd", "shampoo", "soap", "lra_psgd"]
)
def test_nnx_optimizer_forwards_the_extra_arguments_step_after_step(name):
    model, tx = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), cases.CASES[name].transformation()
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    expected, state = params, tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, expected, **extras(name))
        expected = optax.apply_updates(expected, updates)
    expected = jax.tree.map(jnp.copy, expected)
    for _ in range(2):
        optimizer.update(model, grads, **extras(name))
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), expected, **ROUNDING)


def test_every_transformation_is_registered():
    public = {name for name in vars(optax_curv) if name.startswith("scale_by_")}
    pieces = {
        name
        for name in vars(optax_curv)
        if getattr(getattr(optax_curv, name), "__module__", "").endswith("chain_pieces")
    }
    assert public | pieces <= {*cases.PIECES, *(f"scale_by_{name}" for name in cases.METHODS)}
