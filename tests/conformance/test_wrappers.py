"""Every method inside what Optax and JAX wrap around it: traced only, so nothing is compiled."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import cases
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_curv

ALL = cases.ALL
UPDATERS = cases.METHODS | cases.ALIASES
WRAPPED = ("w", "b")
every = pytest.mark.parametrize("name", cases.CASES)
every_method = pytest.mark.parametrize("name", UPDATERS)
EXPLICIT = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
SPECS = {"w": P("model", "data"), "b": P("data"), "scalar": P(), "tensor": P(None, "data")}
SEED = 2**31 + 5
# Keys that are accepted, each made when it is asked for.
KEYS = {
    "int": lambda: 3,
    "large int": lambda: SEED,
    "largest int": lambda: 2**64 - 1,
    "numpy": lambda: np.uint32(SEED),
    "array": lambda: jnp.uint32(3),
    "typed": lambda: jax.random.key(3),
    "raw": lambda: jax.random.PRNGKey(3),
    "rbg": lambda: jax.random.key(3, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(3, impl="unsafe_rbg"),
}


@functools.cache
def extras(name):
    return ALL[name].extras(np.random.default_rng(0))


def updater(name, tx):
    """The update with static and some unknown extra arguments filled in."""

    def update(grads, state, params, arrays):
        return tx.update(grads, state, params, **arrays, **ALL[name].static(), unknown=1)

    return update


def one_step(name, tx, params, grads, arrays=None):
    """Shapes of (updates, new state, state) of one step, which only traces."""
    state = jax.eval_shape(tx.init, params)
    arrays = extras(name) if arrays is None else arrays
    return (*jax.eval_shape(updater(name, tx), grads, state, params, arrays), state)


def keeps(name, tx, dtype="float32", arrays=None):
    """Updates like the gradients, and a state like the old one, in shape and dtype."""
    params, grads = cases.tree(0, dtype), cases.tree(1, dtype)
    updates, new_state, state = one_step(name, tx, params, grads, arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_a_variant_keeps_shapes_and_dtypes(name):
    keeps(name, ALL[name].transformation(), "bfloat16")


@every
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_updates_keep_the_dtype_of_the_gradients(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        wide = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, extras(name)
        )
        keeps(name, ALL[name].transformation(), dtype, wide if dtype == "float64" else None)


@pytest.mark.parametrize("name", ALL)
def test_complex_leaves_are_handled_or_refused_by_name(name):
    tx = ALL[name].transformation()
    if ALL[name].complex:
        keeps(name, tx, "complex64")
    else:
        by_init, by_update = r"\['.*'\] has dtype complex64", "expected real gradients"
        with pytest.raises(ValueError, match=f"{by_init}|{by_update}"):
            keeps(name, tx, "complex64")


@every
@pytest.mark.parametrize(
    "wrapper", ["masked", "partition", "multi_steps", "apply_if_finite", "inject_hyperparams"]
)
def test_wrappers_of_optax_trace(name, wrapper):
    case = ALL[name]
    inside = {key: key in WRAPPED for key in (*cases.SHAPES, "none")}
    schedule = {"number": lambda count: case.value / (1 + count)} if case.number else {}

    def injected():
        def with_number(number=None):
            return case.make(**({case.number: number} if case.number else {}))

        return optax.inject_hyperparams(with_number)(**schedule)

    tx = {
        "masked": lambda: optax.masked(case.transformation(), inside),
        "partition": lambda: optax.partition(
            {True: case.transformation(), False: optax.sgd(0.1)}, inside
        ),
        "multi_steps": lambda: optax.MultiSteps(case.transformation(), 2).gradient_transformation(),
        "apply_if_finite": lambda: optax.apply_if_finite(case.transformation(), 3),
        "inject_hyperparams": injected,
    }[wrapper]()
    if case.needs_objective and wrapper in ("masked", "partition"):
        with pytest.raises(ValueError, match="masked its leaves"):  # the model needs them all
            keeps(name, tx)
        return
    keeps(name, tx)


WRAPPERS = {
    "multi_transform": lambda tx: optax.multi_transform(
        {"ours": tx, "theirs": optax.sgd(0.1)},
        {k: "ours" if k in ("w", "b") else "theirs" for k in cases.tree(0)},
    ),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step, **_: step % 2 == 0
    ),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step, **_: step % 2 == 0),
    "schedule_free": lambda tx: optax.contrib.schedule_free(
        optax.chain(tx, optax.scale_by_learning_rate(0.1)), learning_rate=0.1
    ),
    "skip_large_updates": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "normalize_by_reference": optax_curv.normalize_by_reference,
}


@every_method
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_further_wrappers_of_optax_trace(name, wrapper):
    tx = WRAPPERS[wrapper](ALL[name].transformation())
    if ALL[name].needs_objective and wrapper == "multi_transform":
        with pytest.raises(ValueError, match="masked its leaves"):
            keeps(name, tx)
        return
    keeps(name, tx)


def with_extras_bound(name):
    """A method that has its extra arguments already, for what forwards none or refuses them."""
    tx = ALL[name].transformation()
    return optax.GradientTransformation(
        tx.init, lambda g, s, p=None: updater(name, tx)(g, s, p, extras(name))
    )


@every_method
def test_lookahead_synchronizes_slow_parameters(name):
    params = {key: leaf for key, leaf in cases.tree(0).items() if leaf is not None}
    pair = optax.LookaheadParams.init_synced(params)
    inner = with_extras_bound(name)
    tx = optax.lookahead(optax.chain(inner, optax.scale(-0.1)), sync_period=2, slow_step_size=0.5)
    state = jax.eval_shape(tx.init, pair)
    updates, new_state = jax.eval_shape(tx.update, params, state, pair)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates.fast, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@every_method
@pytest.mark.parametrize(
    "linesearch",
    [optax.scale_by_backtracking_linesearch(5), optax.scale_by_zoom_linesearch(5)],
    ids=["backtracking", "zoom"],
)
def test_line_searches_follow(name, linesearch):
    """What they need (value, grad, value_fn) passes the method by; they refuse all else."""
    params = {key: leaf for key, leaf in cases.tree(0).items() if leaf is not None}
    tx = optax.chain(with_extras_bound(name), optax.scale(-1.0), linesearch)

    def value_fn(params):
        return optax.tree.norm(params, squared=True)

    def step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params)
        return tx.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)

    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(step, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@every
def test_map_params_changes_nothing_but_what_is_like_the_parameters(name):
    tx = ALL[name].transformation()
    params = cases.tree(0)
    state = tx.init(params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


@every_method
def test_the_state_is_found_and_set_by_name(name):
    tx = optax.chain(optax.clip(1.0), ALL[name].transformation())
    state = tx.init(cases.tree(0))
    found = optax.tree.get_all_with_path(state, "total_notfinite")
    assert found and all(value == 0 for _, value in found)
    if len(found) > 1:
        return  # an alias with several states of ours, which have to be told apart by a filter
    counted = optax.tree.set(state, total_notfinite=jnp.int32(3))
    assert optax.tree.get(counted, "total_notfinite") == 3
    assert jax.tree.structure(counted) == jax.tree.structure(state)


@pytest.mark.parametrize("name", [x for x, case in ALL.items() if isinstance(case.inject, dict)])
def test_every_numeric_argument_can_be_injected(name):
    factory, needed = getattr(optax_curv, ALL[name].maker), ALL[name].inject
    tx = optax.inject_hyperparams(factory)(**needed)
    params = cases.tree(0)
    state = jax.eval_shape(tx.init, params)
    numbers = {
        key
        for key, parameter in inspect.signature(factory).parameters.items()
        if isinstance(needed.get(key, parameter.default), int | float)
        and not isinstance(needed.get(key, parameter.default), bool)
    }
    assert numbers == set(state.hyperparams), "a number is not injected"
    updates, new_state, _ = one_step(name, tx, params, cases.tree(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, cases.tree(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("name", [x for x, case in ALL.items() if isinstance(case.inject, dict)])
def test_no_number_is_ignored(name):
    """Each number of a maker is used in the program of a first step, or says why it is not."""
    case = ALL[name]
    factory, needed = getattr(optax_curv, case.maker), case.inject
    given = {
        key: needed.get(key, parameter.default)
        for key, parameter in inspect.signature(factory).parameters.items()
    }
    numbers = {
        key: jnp.asarray(value)
        for key, value in given.items()
        if (type(value) in (int, float) and key not in ("key", *needed)) or key == "learning_rate"
    }
    params = cases.tree(0)

    def step(numbers):
        tx = factory(**needed | numbers)
        arrays, static = extras(name), case.static()
        return tx.update(cases.tree(1), tx.init(params), params, **arrays, **static)

    jaxpr = jax.make_jaxpr(step)(numbers).jaxpr
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    names = sorted(numbers)  # in the order of the leaves
    ignored = {key for key, x in zip(names, jaxpr.invars, strict=True) if id(x) not in used}
    assert ignored <= set(cases.IGNORED.get(case.maker, ()))


def test_every_maker_is_injected_or_has_a_reason():
    tried = {case.maker for case in ALL.values() if isinstance(case.inject, dict)}
    accepted = cases.NO_NUMBERS, cases.NEEDS_A_LOSS
    reasons = {case.maker for case in cases.CASES.values() if case.inject in accepted}
    assert tried | reasons == {case.maker for case in ALL.values()}


def takes_a_key(name):
    return "key" in inspect.signature(getattr(optax_curv, ALL[name].maker)).parameters


every_that_draws = pytest.mark.parametrize("name", [x for x in UPDATERS if takes_a_key(x)])


@pytest.mark.parametrize("kind", KEYS)
@every_that_draws
def test_every_kind_of_key_is_taken_and_kept(name, kind):
    keeps(name, ALL[name].make(key=KEYS[kind]()))


@every_that_draws
def test_a_state_keeps_its_kind_of_key_under_another_default(name):
    tx, (params, grads) = ALL[name].make(), (cases.tree(seed) for seed in (0, 1))
    state = jax.eval_shape(tx.init, params)
    with jax.default_prng_impl("rbg"):
        new_state = jax.eval_shape(updater(name, tx), grads, state, params, extras(name))[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@every
def test_shardings_that_are_types_pass(name):
    """On a mesh of explicit axes updates have their gradients' shardings, and the state its own."""
    tx, arrays = ALL[name].transformation(), extras(name)
    state, tree = jax.eval_shape(tx.init, cases.tree(0)), cases.tree(1)

    def placed(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(EXPLICIT, spec))

    with jax.sharding.use_abstract_mesh(EXPLICIT):
        grads = {k: None if x is None else placed(x, SPECS[k]) for k, x in tree.items()}
        state, arrays = jax.tree.map(lambda x: placed(x, P()), (state, arrays))
        updates, new_state = jax.eval_shape(updater(name, tx), grads, state, grads, arrays)

    def axes(x):
        return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))

    assert jax.tree.map(axes, updates) == jax.tree.map(axes, grads)
    if name in UPDATERS:  # Optax's own Adam takes the types of the first gradients
        assert jax.tree.map(axes, new_state) == jax.tree.map(axes, state)


@pytest.mark.parametrize("name", ALL)
def test_a_device_runs_a_method_on_data_of_its_own(name):
    """Inside `jax.shard_map`, where constants of the method meet what varies over the devices."""
    mesh = AbstractMesh((2,), ("member",), axis_types=(AxisType.Auto,))
    tx = ALL[name].transformation()
    given = cases.tree(0), cases.tree(1), extras(name)

    def member(given):
        params, grads, arrays = jax.tree.map(lambda x: x[0], given)
        stepped = updater(name, tx)(grads, tx.init(params), params, arrays)
        return jax.tree.map(lambda x: x[None], stepped)

    of_all = jax.shard_map(member, mesh=mesh, in_specs=P("member"), out_specs=P("member"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), given)
    updates, _ = jax.eval_shape(of_all, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, shapes[1])
