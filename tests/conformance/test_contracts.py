"""What every transformation keeps, whatever its method: programs that are compiled and run."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import cases, problems, released

import optax_curv
from optax_curv import diagnostics

STEPS = 3
# A few steps of rounding through factorisations, in float32.
ROUNDING = {"rtol": 2e-3, "atol": 1e-5}
SHORT = 0.02  # of an update whose leaves have fewer digits, relative
COUNTER_LIMIT = 2**31 - 1
# The states that each alias had in the newest release, see `released`.
RELEASED = pathlib.Path(__file__).parents[1] / "data" / "states_0_1.npz"

# A method whose alias runs the same rule on every leaf is compiled as its alias only.
SAME_RULE = {
    *("scale_by_kron_psgd", "scale_by_dense_psgd", "scale_by_lra_psgd", "scale_by_branch_fisher"),
    *("scale_by_branch_kfac", "scale_by_kfac", "scale_by_ekfac", "scale_by_gauss_newton"),
}
COMPILED = [name for name in cases.CASES if name not in SAME_RULE]
GUARDED = [name for name in COMPILED if name not in cases.PIECES]
WITHIN = {"adapt_damping": "it wraps another transformation, and runs within kfac_adaptive"}
every = pytest.mark.parametrize("name", cases.CASES)
every_compiled = pytest.mark.parametrize("name", COMPILED)
every_guarded = pytest.mark.parametrize("name", GUARDED)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs run for microseconds: compile them without most optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def extras(name, step=0, **rows):
    return cases.CASES[name].extras(np.random.default_rng(100 + step), **rows)


def updater(name, tx):
    """The transformation's update with its static and some unknown extra arguments filled in."""

    def update(grads, state, params, arrays):
        return tx.update(grads, state, params, **arrays, **cases.CASES[name].static(), unknown=1)

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


def is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def numbers(state):
    """A state's floating-point leaves."""
    return [leaf for leaf in jax.tree.leaves(state) if is_floating(leaf)]


def named(state):
    """A state's leaves by the name of their field, with their place."""
    return [
        (getattr(path[-1], "name", ""), jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    ]


@functools.cache
def jitted_walk(name):
    tx, update = compiled(name)
    return walk(name, update, tx.init(cases.tree(0)))


@every_compiled
def test_nothing_changes_shape_or_dtype_from_step_to_step(name):
    updates, states = jitted_walk(name)
    for step, new in enumerate(updates):
        chex.assert_trees_all_equal_shapes_and_dtypes(new, cases.tree(step + 1))
    for state in states[1:]:
        chex.assert_trees_all_equal_shapes_and_dtypes(state, states[0])
    chex.assert_tree_all_finite((updates, states))


@every_compiled
def test_jit_changes_nothing(name):
    tx, _ = compiled(name)
    updates, states = walk(name, updater(name, tx), tx.init(cases.tree(0)), steps=1)
    expected_updates, expected_states = jitted_walk(name)
    chex.assert_trees_all_close(updates[0], expected_updates[0], **ROUNDING)
    chex.assert_trees_all_close(numbers(states[1]), numbers(expected_states[1]), **ROUNDING)


@every_compiled
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
    tx = cases.CASES[name].transformation()
    params = cases.tree(0)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(jax.eval_shape(lambda: params)), state)
    owned = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size}
    assert not owned & held


def skipped_once(state, after):
    """Asserts that a step has changed nothing of a state but a counter of skipped steps."""
    assert jax.tree.structure(after) == jax.tree.structure(state)
    counted = 0
    for (field, path, old), (_, _, new) in zip(named(state), named(after), strict=True):
        if field == "total_notfinite" and new != old:  # that of a state within another may stay
            counted += 1
            assert new == old + 1, path
        else:
            np.testing.assert_array_equal(new, old, err_msg=path)
    assert counted >= 1


@every_guarded
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_moves_no_leaf_and_no_state(name, bad):
    """Not through weight decay, momentum or the transformation of other leaves either."""
    _, update = compiled(name)
    state = jitted_walk(name)[1][-1]
    grads = cases.tree(1) | {"w": jnp.full(cases.SHAPES["w"], bad, jnp.float32)}
    new, after = update(grads, copied(state), cases.tree(0), extras(name))
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(new))
    skipped_once(state, after)


@every_guarded
def test_a_statistic_that_is_not_finite_moves_no_leaf_and_no_state(name):
    arrays = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if is_floating(x) else x, extras(name)
    )
    if not arrays:
        return  # a method of gradients alone
    _, update = compiled(name)
    state = jitted_walk(name)[1][-1]
    new, after = update(cases.tree(1), copied(state), cases.tree(0), arrays)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(new))
    skipped_once(state, after)


@every_guarded
def test_counters_stay_at_the_largest_number(name):
    _, update = compiled(name)
    state, params = jitted_walk(name)[1][-1], cases.tree(0)

    def late(path, leaf):
        is_count = getattr(path[-1], "name", "") in ("count", "since", "total_notfinite")
        return jnp.full_like(leaf, COUNTER_LIMIT - 1) if is_count else leaf

    state = jax.tree.map_with_path(late, state)
    before = jitted_walk(name)[0][-1]
    for step in range(4):
        new, state = update(cases.tree(step + 1), copied(state), params, extras(name, step))
        assert 0 < optax.tree.norm(new) < 100 * optax.tree.norm(before)
    for field, path, leaf in named(state):
        if field in ("count", "total_notfinite"):
            assert leaf in (COUNTER_LIMIT, COUNTER_LIMIT - 1), path


@pytest.mark.parametrize("name", cases.ALIASES)
def test_a_state_that_a_release_has_saved_goes_on_as_it_did(name):
    """Leaves have the paths, shapes and dtypes they had, and the next update has its value."""
    tx, update = compiled(name)
    params = cases.tree(0)
    fresh = tx.init(params)
    with np.load(RELEASED) as arrays:
        saved, expected = (released.recorded(arrays, name, kind) for kind in ("state", "update"))
    found = {path: (x.shape, x.dtype) for path, x in released.by_path(fresh).items()}
    assert found == {path: (x.shape, x.dtype) for path, x in saved.items()}
    state = jax.tree.map_with_path(lambda path, _: saved[jax.tree_util.keystr(path)], fresh)
    new, _ = update(cases.tree(1), jax.tree.map(jnp.asarray, state), params, extras(name))
    for path, u in released.by_path(new).items():
        largest = np.max(np.abs(expected[path]))
        np.testing.assert_allclose(u, expected[path], atol=ROUNDING["rtol"] * largest)


def states_of_ours(state):
    """The states of this package in a state, and those within them."""

    def is_ours(x):
        return isinstance(x, diagnostics.CurvatureState)

    for x in filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours)):
        yield x
        yield from states_of_ours(tuple(x))


def dense_magnitudes(state):
    """Singular values of every tensor's factor, in float64, in no order: of one state of ours."""
    for factors in state.spectra().values():
        for factor in factors.values() if isinstance(factors, dict) else factors:
            for x in np.asarray(jax.tree.leaves(factor)[0], np.float64):
                yield np.linalg.svd(x if x.ndim == 2 else np.diag(x), compute_uv=False)


@every_guarded
@pytest.mark.parametrize("where", ["alone", "in a chain"])
def test_diagnostics_show_the_spectrum_of_every_factor(name, where):
    state = jitted_walk(name)[1][-1]
    state = (optax.EmptyState(), state) if where == "in a chain" else state
    spectra = diagnostics.factor_spectra(state)
    shown = [row for x in spectra for row in np.atleast_2d(x.eigenvalues)]
    dense = [values for x in states_of_ours(state) for values in dense_magnitudes(x)]
    assert len(spectra) == cases.CASES[name].factors
    assert len(shown) == len(dense)
    for values, expected in zip(sorted(shown, key=tuple), sorted(dense, key=tuple), strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-12 * max(expected))

    lines = diagnostics.curvature_table(state).splitlines()
    assert any(line.endswith("State: 3 steps, 0 skipped") or "3 steps" in line for line in lines)
    for spectrum in spectra:
        figures = spectrum.eigenvalues.max(), spectrum.eigenvalues.min()
        line = next(
            x for x in lines if x.startswith(f"  {spectrum.name} ") and spectrum.factor in x
        )
        assert [f"{x:.3g}" for x in figures] == line.split()[-4:-2]


@pytest.mark.parametrize("name", cases.ALIASES)
def test_moments_of_short_leaves_are_those_of_float32(name):
    """Fifty steps with gradients that all dtypes hold: nothing rounds away or overflows within."""
    case = cases.CASES[name]
    tx = case.transformation()
    update = jax.jit(updater(name, tx))

    def run(dtype):
        params = jax.tree.map(lambda p: p.astype(dtype), cases.tree(0, "bfloat16"))
        state = tx.init(params)
        for step in range(50):
            scale = 1.0 if step < 10 else 2.0**-6
            grads = jax.tree.map(
                lambda g, c=scale: (c * g).astype(dtype), cases.tree(step % 7, "bfloat16")
            )
            new, state = update(grads, state, params, extras(name))
        return jax.tree.map(lambda u: u.astype("float32"), new), state

    expected, wide = run("float32")
    for dtype in ("bfloat16", "float16"):
        new, state = run(dtype)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, wide)
        if case.network:
            continue  # the user's own network runs in the leaves' dtype
        for u, v in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(u, v, rtol=SHORT, atol=SHORT * jnp.max(jnp.abs(v)))


def program(name, tx, params, grads, arrays):
    """The program of one step, without the addresses in it."""
    state = jax.eval_shape(tx.init, params)
    traced = jax.make_jaxpr(updater(name, tx))(grads, state, params, arrays)
    return re.sub(r"0x[0-9a-f]+", "", str(traced))


@every
def test_one_transformation_serves_two_models(name):
    """What it does for one does not depend on what it has seen of the other, nor on the batch."""
    case = cases.CASES[name]
    tx = case.transformation()
    first = cases.tree(0), cases.tree(1), extras(name)
    other = {"shapes": problems.OTHER_SHAPES} if case.any_tree else {}
    second = cases.tree(0, **other), cases.tree(1, **other), extras(name, rows=3)

    alone = program(name, tx, *first)
    jax.eval_shape(tx.init, second[0])
    assert program(name, tx, *first) == alone
    of_second = program(name, tx, *second)
    assert program(name, tx, *first) == alone
    assert program(name, tx, first[0], first[1], second[2])  # a last, short batch
    assert program(name, tx, *first) == alone
    assert of_second == program(name, case.transformation(), *second)


def keeps_shapes(update, init, params, grads, arrays):
    """Traces a step and compares what comes out with what went in."""
    state = jax.eval_shape(init, params)
    new, new_state = jax.eval_shape(update, grads, state, params, arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@every
def test_updates_keep_the_precision_of_the_gradients(name):
    tx = cases.CASES[name].transformation()
    grads = cases.tree(1, "bfloat16")
    for params in (cases.tree(0, "bfloat16"), cases.tree(0, "float32")):
        keeps_shapes(updater(name, tx), tx.init, params, grads, extras(name))


@pytest.mark.parametrize("name", [name for name, case in cases.CASES.items() if case.any_tree])
def test_a_model_without_parameters_passes(name):
    tx = cases.CASES[name].transformation()
    keeps_shapes(updater(name, tx), tx.init, {}, {}, extras(name))


def test_every_transformation_is_registered():
    """Each public maker of a transformation has a case, and each case says what it omits."""
    makers = {case.maker for case in cases.ALL.values()}
    public = {
        name
        for name, value in vars(optax_curv).items()
        if getattr(value, "__annotations__", {}).get("return")
        in (optax.GradientTransformationExtraArgs, optax.GradientTransformation)
    }
    assert public and public - makers == set(WITHIN)
    for name, case in cases.ALL.items():
        for field in ("inject", "fault", "suite", "devices"):
            value = getattr(case, field)
            assert not isinstance(value, str) or len(value.split()) > 2, (name, field)


def test_what_is_compiled_as_its_alias_only_has_one():
    for name in SAME_RULE:
        alias = cases.CASES[name.removeprefix("scale_by_")]
        assert (
            alias.factors == cases.CASES[name].factors and alias.extras == cases.CASES[name].extras
        )
