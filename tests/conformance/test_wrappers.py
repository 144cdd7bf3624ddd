"""Every method inside what Optax and JAX wrap around it: traced with abstract values, so nothing is compiled."""

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

ALL = cases.CASES | cases.VARIANTS
every = pytest.mark.parametrize("name", cases.CASES)
every_method = pytest.mark.parametrize("name", cases.METHODS)
EXPLICIT = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
SPECS = {"w": P("model", "data"), "b": P("data"), "scalar": P(), "tensor": P(None, "data")}
# What each public maker needs beside its defaults, for inject_hyperparams.
NEEDED = {
    "scale_by_kfac": {"layers": cases.LAYERS, "fallback": optax.identity()},
    "scale_by_ekfac": {"layers": cases.LAYERS, "fallback": optax.identity()},
    "scale_by_kron_psgd": {"init_scale": 1.0, "block_size": np.int32(2)},
    "clip_by_max_abs": {"max_abs": 1.0},
    "normalize_by_rms": {"target": 1.0},
    "keep_params_in_box": {"bound": 1.0},
    "scale_by_branch_fisher": {},
    "scale_by_branch_kfac": {},
    "scale_by_dense_psgd": {},
    "scale_by_lra_psgd": {},
    "scale_by_quadratic_model": {},
}


@functools.cache
def extras(name):
    return ALL[name].extras(np.random.default_rng(0))


def updater(name, tx):
    """The update with static and some unknown extra arguments filled in."""

    def update(grads, state, params, arrays):
        return tx.update(grads, state, params, **arrays, **ALL[name].static, unknown=1)

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
    if name in cases.COMPLEX:
        keeps(name, tx, "complex64")
    elif not name.startswith("kron_psgd") or name.endswith("right_triangular"):
        with pytest.raises(ValueError, match=r"\['.*'\] has dtype complex64"):
            tx.init(cases.tree(0, "complex64"))


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
    keeps(name, WRAPPERS[wrapper](ALL[name].transformation()))


def with_extras_bound(name):
    """A method that is given its extra arguments, for what forwards none or refuses those of others."""
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
    """What they need (value, grad, value_fn) passes the method by. They refuse all that `value_fn` does not name."""
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
    assert optax.tree.get(state, "total_notfinite") == 0
    counted = optax.tree.set(state, total_notfinite=jnp.int32(3))
    assert optax.tree.get(counted, "total_notfinite") == 3
    assert jax.tree.structure(counted) == jax.tree.structure(state)


@pytest.mark.parametrize("maker", NEEDED)
def test_every_numeric_argument_can_be_injected(maker):
    factory, needed = getattr(optax_curv, maker), NEEDED[maker]
    name = next(x for x in (*cases.PIECES, *cases.METHODS) if maker in (x, f"scale_by_{x}"))
    tx = optax.inject_hyperparams(factory)(**needed)
    params = cases.tree(0)
    state = jax.eval_shape(tx.init, params)
    numbers = {
        key
        for key, parameter in inspect.signature(factory).parameters.items()
        if isinstance(needed.get(key, parameter.default), int | float)
        and parameter.default is not bool
        and not isinstance(parameter.default, bool)
    }
    assert numbers == set(state.hyperparams), "a number is not injected"
    updates, new_state, _ = one_step(name, tx, params, cases.tree(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, cases.tree(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@every
def test_shardings_that_are_types_pass(name):
    """On a mesh of explicit axes each update has the sharding of its gradient, and the state keeps its own."""
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
    if name in cases.METHODS:  # Optax's own Adam takes the types of the first gradients
        assert jax.tree.map(axes, new_state) == jax.tree.map(axes, state)
