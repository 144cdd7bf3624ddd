"""K-FAC equals dense solves, keeps its periods, is safe between inversions and with bad input."""

import itertools

import chex
import jax
import jax.numpy as jnp
import micro_batches
import numpy as np
import optax
import pytest

from optax_curv import (
    EigenbasisMoments,
    FactorRows,
    KroneckerFactors,
    Layer,
    Layers,
    average_curvature,
    ekfac,
    find_layers,
    kfac,
    layer_diagnostics,
    scale_by_kfac,
    value_grad_and_curvature,
)
from optax_curv.layers import layer_matrix
from optax_curv.preconditioners.kfac import STALE_RATIO

EXACT = 1e-9  # relative, in float64
SINGLE = 2e-4  # relative, in float32, for the condition numbers used here

ZOO = Layers(
    [
        Layer("hidden", "dense", "['hidden']['w']", "['hidden']['b']", 3, 2),
        Layer("transposed", "dense", "['transposed']", None, 4, 2, kernel_axes=(1, 0)),
        Layer("stacked", "dense", "['stacked']['w']", "['stacked']['b']", 3, 2, (2,)),
        Layer("tokens", "embedding", "['tokens']", None, 5, 2),
        Layer("scale", "scale", "['norm']['scale']", None, 1, 4),
        Layer("shift", "shift", None, "['norm']['shift']", 0, 4),
    ]
)
ONE = Layers([ZOO["hidden"]])  # where one layer shows it: compiling the zoo takes seconds
SHAPES = {
    "hidden": {"w": (3, 2), "b": (2,)},
    "transposed": (2, 4),
    "stacked": {"w": (2, 3, 2), "b": (2, 2)},
    "tokens": (5, 2),
    "norm": {"scale": (4,), "shift": (4,)},
}


def draw(seed, dtype=jnp.float32, layers=ZOO):
    """A tree like the parameters."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES if layers is ZOO else {"hidden": SHAPES["hidden"]}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: type(s) is tuple
    )


def statistics(seed, dtype=jnp.float32, layers=ZOO):
    """A random, positive definite statistic for every layer."""
    rng = np.random.default_rng(seed)

    def factor(shape, stack):
        if len(shape) == len(stack) + 1:
            return jnp.asarray(rng.uniform(0.1, 2, size=shape), dtype)
        x = (
            rng.normal(size=(*shape, 2))[..., 0]
            if shape[-1] == 1
            else rng.normal(size=(*shape[:-1], shape[-1] + 2))
        )
        return jnp.asarray(x @ x.swapaxes(-1, -2), dtype)

    found = {}
    for layer in layers:
        a, g = (factor(shape, layer.stack) for shape in layer.factor_shapes)
        found[layer.name] = KroneckerFactors(
            jnp.ones_like(a) if layer.kind in ("scale", "shift") else a, g, jnp.int32(1)
        )
    return found


def matrices(tree, layers=ZOO):
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}
    return {layer.name: layer_matrix(layer, leaves) for layer in layers}


def dense_direction(layer, factors, matrix, damping, rule):
    """The layer's direction by one dense solve a slice, with the Kronecker product formed."""
    stack = layer.stack
    expected = np.zeros(matrix.shape)
    for i in np.ndindex(stack):
        a, g = (np.asarray(f[i]) for f in factors[:2])
        a, g = (np.diag(f) if f.ndim == 1 else f for f in (a, g))
        mean_a, mean_g = np.trace(a) / len(a), np.trace(g) / len(g)
        if rule == "pi":
            pi = np.sqrt(mean_a / mean_g)
            add_a, add_g = pi * np.sqrt(damping), np.sqrt(damping) / pi
        else:
            add_a, add_g = max(damping * mean_a, 1e-10), max(damping * mean_g, 1e-10)
        if layer.kind in ("scale", "shift"):
            add_a, add_g = 0, damping if rule == "pi" else add_g
        product = np.kron(a + add_a * np.eye(len(a)), g + add_g * np.eye(len(g)))
        expected[i] = np.linalg.solve(product, np.asarray(matrix[i]).ravel()).reshape(
            matrix[i].shape
        )
    return expected


def assert_directions(updates, grads, factors, damping, rule="pi", limit=EXACT, layers=ZOO):
    got, given = matrices(updates, layers), matrices(grads, layers)
    for layer in layers:
        expected = dense_direction(layer, factors[layer.name], given[layer.name], damping, rule)
        np.testing.assert_allclose(
            got[layer.name],
            expected,
            rtol=0,
            atol=limit * np.max(np.abs(expected)),
            err_msg=layer.name,
        )


def stepper(tx):
    return jax.jit(lambda grads, state, curvature: tx.update(grads, state, curvature=curvature))


@pytest.mark.parametrize(
    ("rule", "inverse"), [("pi", "cholesky"), ("pi", "eigh"), ("pi", "cg"), ("trace", "cholesky")]
)
def test_every_inverse_equals_a_dense_solve(x64, rule, inverse):
    grads, curvature = draw(0, jnp.float64), statistics(1, jnp.float64)
    tx = scale_by_kfac(ZOO, 0.1, damping_rule=rule, inverse=inverse)
    updates, state = stepper(tx)(grads, tx.init(draw(2, jnp.float64)), curvature)
    assert_directions(updates, grads, curvature, 0.1, rule)
    assert all(u.dtype == jnp.float64 for u in jax.tree.leaves(updates))
    assert state.count == 1 and state.total_notfinite == 0


def test_one_example_makes_the_kronecker_product_the_exact_fisher(x64):
    # one tanh layer, one example: the Fisher block is g gᵀ with g the whole gradient
    rng = np.random.default_rng(0)
    x, w, damping = rng.normal(size=3), rng.normal(size=(3, 2)), 0.3
    layers = Layers([Layer("w", "dense", "['w']", None, 3, 2)])
    value, pull = jax.vjp(lambda z: jnp.sum(jnp.tanh(z) ** 2), x @ w)
    (g,) = pull(jnp.ones_like(value))
    grad = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)
    statistic = KroneckerFactors(jnp.outer(x, x), jnp.outer(g, g), jnp.int32(1))
    np.testing.assert_allclose(
        jnp.kron(*statistic[:2]), jnp.outer(grad.ravel(), grad.ravel()), rtol=EXACT
    )
    tx = scale_by_kfac(layers, damping)
    updates, _ = tx.update({"w": grad}, tx.init({"w": w}), curvature={"w": statistic})
    assert_directions(
        updates["w"],
        grad,
        {"w": statistic},
        damping,
        layers=Layers([Layer("w", "dense", "", None, 3, 2)]),
    )


def test_the_first_statistic_replaces_and_later_ones_average(x64):
    tx = scale_by_kfac(ONE, 0.1, decay=lambda count: 0.5 + 0.1 * count)
    first, second = statistics(0, jnp.float64, ONE), statistics(1, jnp.float64, ONE)
    step, grads = stepper(tx), draw(2, jnp.float64, ONE)
    _, state = step(grads, tx.init(grads), first)
    for name, factors in state.factors.items():
        np.testing.assert_array_equal(factors.input_factor, first[name].input_factor)
    updates, state = step(grads, state, second)
    weight = 0.4 / (1 - 0.6**2)  # of the second of two
    average = {
        name: KroneckerFactors(
            *(
                (1 - weight) * a + weight * b
                for a, b in zip(first[name][:2], second[name][:2], strict=False)
            ),
            jnp.int32(2),
        )
        for name in first
    }
    for name, factors in state.factors.items():
        np.testing.assert_allclose(factors.output_factor, average[name].output_factor, rtol=EXACT)
        assert factors.count == 2
    assert_directions(updates, grads, average, 0.1, layers=ONE)


def test_periods_hold_back_statistics_and_inverses(x64):
    grads, step_statistics = draw(0, jnp.float64, ONE), [statistics(1, jnp.float64, ONE)] * 4
    # nearly the same statistics: no direction is far off, so nothing is inverted out of turn
    step_statistics = [
        jax.tree.map(lambda x, i=i: x * (1 + 0.01 * i), s) for i, s in enumerate(step_statistics)
    ]
    tx = scale_by_kfac(ONE, 0.1, update_every=jnp.array(2), invert_every=jnp.array(3))
    step, state, seen = stepper(tx), tx.init(grads), []
    for curvature in step_statistics:
        _, state = step(grads, state, curvature)
        seen.append(state)
    averaged = [int(s.factors["hidden"].count) for s in seen]
    assert averaged == [1, 1, 2, 2]
    inverted = [
        not np.array_equal(a.inverses["hidden"][0], b.inverses["hidden"][0])
        for a, b in itertools.pairwise(seen)
    ]
    assert inverted == [False, False, True]


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_rows_are_made_into_factors_where_the_period_asks_for_them(x64):
    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]) ** 2)

    params = {"w": jnp.ones((3, 4)) / 3, "b": jnp.zeros(4), "v": jnp.arange(8.0).reshape(4, 2) / 8}
    batches = [jax.random.normal(jax.random.key(i), (5, 3)) for i in range(4)]
    layers = find_layers(loss, params, batches[0])
    tx = scale_by_kfac(layers, 0.1, update_every=2, invert_every=2)

    def run(statistic):
        take, state, seen = value_grad_and_curvature(loss, statistic=statistic), tx.init(params), []
        for x in batches:
            _, grads, curvature = take(params, x)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            seen.append(updates)
        return seen, state

    (found, state), (expected, expected_state) = run("rows"), run("kronecker")
    for name in layers:
        for a, b in zip(state.factors[name.name], expected_state.factors[name.name], strict=True):
            np.testing.assert_allclose(a, b, rtol=EXACT)
    assert [int(factors.count) for factors in state.factors.values()] == [2, 2]

    # the first direction is held to what its rows say of it
    _, grads, raw = value_grad_and_curvature(loss, statistic="raw")(params, batches[0])
    for layer in layers:
        u, gradient, held = (
            layer_matrix(layer, by_path(tree)) for tree in (expected[0], grads, found[0])
        )
        a, g = raw[layer.name]
        bend = np.mean(np.einsum("ri,ij,rj->r", a, u, g) ** 2) + 0.1 * np.sum(u**2)
        np.testing.assert_allclose(held, u / max(1, bend / np.sum(u * gradient)), rtol=1e-7)
    bad = value_grad_and_curvature(loss, statistic="rows")(params, batches[0])[2]
    bad = bad | {"w": bad["w"]._replace(inputs=bad["w"].inputs.at[0, 0].set(jnp.nan))}
    updates, after = tx.update(grads, state, params, curvature=bad)
    assert after.total_notfinite == 1 and not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match=r"expected .*'R', 4"):
        tx.update(
            grads, state, params, curvature=bad | {"w": bad["w"]._replace(inputs=jnp.ones((5, 3)))}
        )


def test_rows_of_a_layer_without_its_kernel_are_those_of_the_bias(x64):
    layer = Layer("dense", "dense", "['w']", "['b']", in_dim=3, out_dim=2)
    grads = {"w": jnp.ones((3, 2)), "b": jnp.array([1.0, -2.0])}
    inputs = jnp.concatenate(
        [5 * jax.random.normal(jax.random.key(0), (6, 3)), jnp.ones((6, 1))], axis=1
    )
    g = jax.random.normal(jax.random.key(1), (6, 2))
    rows = FactorRows(inputs, g, jnp.array([1 / 6, 1 / 6]))
    factors = KroneckerFactors(inputs.T @ inputs / 6, g.T @ g / 6, jnp.int32(1))
    tx = optax.masked(scale_by_kfac(Layers([layer]), 1e-3, invert_every=2), {"w": False, "b": True})
    found, expected = (
        tx.update(grads, tx.init(grads), grads, curvature={"dense": statistic})[0]["b"]
        for statistic in (rows, factors)
    )
    # of which a bias alone needs no cut, as its block is exact; the kernel's inputs would ask for
    # one
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_micro_batches_with_their_average_curvature_are_one_batch(x64):
    params, batches = micro_batches.draw()
    take = value_grad_and_curvature(micro_batches.loss)
    tx = scale_by_kfac(find_layers(micro_batches.loss, params, batches[0]), 0.1)
    whole, in_thirds, mean = micro_batches.updates_of(tx, take, params, batches)
    # MultiSteps divides by a count in float32
    chex.assert_trees_all_close(in_thirds, whole, rtol=1e-6)
    chex.assert_trees_all_close(mean, take(params, batches[1])[2], rtol=1e-12)
    rows = value_grad_and_curvature(micro_batches.loss, statistic="rows")(params, batches[1])[2]
    with pytest.raises(ValueError, match="cannot be averaged"):
        average_curvature(mean, rows, 0)


def test_without_a_period_the_state_holds_no_inverses(x64):
    grads, curvature = draw(0, jnp.float64, ONE), statistics(1, jnp.float64, ONE)
    every, periodic = scale_by_kfac(ONE, 0.1), scale_by_kfac(ONE, 0.1, invert_every=jnp.array(1))
    updates, state = stepper(every)(grads, every.init(grads), curvature)
    expected, _ = stepper(periodic)(grads, periodic.init(grads), curvature)
    assert not state.inverses and not state.stale
    np.testing.assert_allclose(state.diagnostics.model_ratio, 1)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=EXACT), updates, expected)


def test_a_stale_direction_is_cut_to_its_models_minimum_and_inverted_anew(x64):
    grads = draw(0, jnp.float64)
    before = statistics(1, jnp.float64)
    after = jax.tree.map(lambda x: 100 * x, before)
    tx = scale_by_kfac(ZOO, 1e-3, decay=0.0, invert_every=1000)
    step = stepper(tx)
    _, state = step(grads, tx.init(grads), before)
    updates, state = step(grads, state, after)
    given = matrices(grads)
    assert jnp.all(state.diagnostics.model_ratio > STALE_RATIO)
    for layer in ZOO:
        # along a direction, the model's minimiser has ⟨u, F u⟩ = ⟨u, ∇⟩
        direction = matrices(updates)[layer.name]
        if not layer.stack and layer.kind == "dense":
            whole = np.kron(*after[layer.name][:2])
            bend = direction.ravel() @ whole @ direction.ravel()
            np.testing.assert_allclose(
                bend, jnp.vdot(direction, given[layer.name]), rtol=0.05
            )  # damping aside
    assert state.stale
    updates, state = step(grads, state, after)
    assert_directions(updates, grads, after, 1e-3)
    assert not state.stale


def test_kl_clip_bounds_the_models_decrease():
    grads, curvature = draw(0, layers=ONE), statistics(1, layers=ONE)
    free = scale_by_kfac(ONE, 0.1)
    free, _ = stepper(free)(grads, free.init(grads), curvature)
    for clip in (1e-2, 1e9):
        tx = scale_by_kfac(ONE, 0.1, kl_clip=clip)
        clipped, _ = stepper(tx)(grads, tx.init(grads), curvature)
        decrease = optax.tree.vdot(free, grads)
        scale = min(1.0, float(jnp.sqrt(clip / decrease)))
        for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(free), strict=False):
            np.testing.assert_allclose(a, scale * b, rtol=SINGLE)


def test_the_alias_bounds_its_step_and_not_its_direction():
    grads, curvature = draw(0, layers=ONE), statistics(1, layers=ONE)

    def step(learning_rate, kl_clip):
        tx = kfac(learning_rate, ONE, 0.1, momentum=0.0, kl_clip=kl_clip)
        return tx.update(grads, tx.init(grads), curvature=curvature)[0]

    for rate in (1.0, lambda count: 1e-2 + 0 * count):
        number = rate(0) if callable(rate) else rate
        free = step(rate, None)
        length = number * -float(optax.tree.vdot(free, grads))  # ⟨ηu, F ηu⟩, as F u = ∇
        for bound in (length / 4, length * 4):
            factor = min(1, (bound / length) ** 0.5)
            for a, b in zip(jax.tree.leaves(step(rate, bound)), jax.tree.leaves(free), strict=True):
                np.testing.assert_allclose(a, factor * b, rtol=SINGLE)


@pytest.mark.parametrize(("method", "shrunk"), [(kfac, (1 + 0.1**0.5) ** 2), (ekfac, 1.1)])
def test_a_layer_whose_momentum_would_climb_starts_anew(x64, method, shrunk):
    """Slices of a stack are layers of their own, and a leaf in no layer keeps its momentum."""
    layers = Layers([ZOO["stacked"], ZOO["tokens"]])
    first = {name: draw(0, jnp.float64)[name] for name in ("stacked", "tokens")}
    first["other"] = jnp.ones(3)
    ones = {"stacked": (jnp.stack([jnp.eye(4)] * 2), jnp.stack([jnp.eye(2)] * 2), jnp.int32(1))}
    ones["tokens"] = jnp.ones(5), jnp.eye(2), jnp.int32(1)
    moments = {"stacked": jnp.ones((2, 4, 2)), "tokens": jnp.ones((5, 2))}
    curvature = {name: EigenbasisMoments(*x, moments[name]) for name, x in ones.items()}
    slices = lambda tree: [*zip(*jax.tree.leaves(tree["stacked"])), tree["tokens"], tree["other"]]  # noqa: E731, B905
    # From the second step on the gradients are these multiples of the first ones. The momentum of
    # the first layer alone would climb: 0.9 - 0.5 along a gradient of -0.5.
    turned = jnp.array([-0.5, 0.5]), -4.0, -0.5
    second = {
        "stacked": jax.tree.map(lambda x: jax.vmap(jnp.multiply)(turned[0], x), first["stacked"]),
        "tokens": turned[1] * first["tokens"],
        "other": turned[2] * first["other"],
    }
    steps = [(1, 1, 1, 1), (-0.5, 1.4, -3.1, 0.4), (-0.95, 1.76, -6.79, -0.14)]
    tx = method(0.2, layers, 0.1, kl_clip=None, fallback=optax.scale(1 / shrunk))
    step, state = stepper(tx), tx.init(first)
    for grads, expected in zip((first, second, second), steps, strict=True):
        updates, state = step(grads, state, curvature)
        for u, g, multiple in zip(slices(updates), slices(first), expected, strict=True):
            for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(g), strict=True):
                np.testing.assert_allclose(a, -0.2 * multiple / shrunk * b, rtol=EXACT)


def test_an_outlier_among_the_statistics_is_held_to_a_multiple_of_the_average(x64):
    grads, usual = draw(0, jnp.float64, ONE), statistics(1, jnp.float64, ONE)
    outlier = {"hidden": usual["hidden"]._replace(output_factor=1e6 * usual["hidden"][1])}
    tx = scale_by_kfac(ONE, 0.1, decay=0.9)
    step, state = stepper(tx), tx.init(grads)

    def last_weight(count):
        return (1 - 0.9) / (1 - 0.9**count)

    def factor(state):  # in units of the usual one
        return float(state.factors["hidden"].output_factor[0, 0] / usual["hidden"][1][0, 0])

    _, early = step(grads, step(grads, state, usual)[1], outlier)
    np.testing.assert_allclose(factor(early), 1 + last_weight(2) * (1e6 - 1))  # still free
    for _ in range(10):
        _, state = step(grads, state, usual)
    (kept,) = state.stacks.values()
    np.testing.assert_array_equal(kept.held, [[0, 0]])
    _, state = step(grads, state, outlier)
    first = 1 + last_weight(11) * (10 - 1)
    np.testing.assert_allclose(factor(state), first)
    np.testing.assert_allclose(state.factors["hidden"][0], usual["hidden"][0])
    _, state = step(grads, state, outlier)  # what comes again is followed
    np.testing.assert_allclose(factor(state), first * (1 + last_weight(12) * (100 - 1)))
    _, state = step(grads, state, usual)
    (kept,) = state.stacks.values()
    np.testing.assert_array_equal(kept.held, [[2, 0]])


def test_diagnostics_are_in_the_order_of_the_layers():
    layers = Layers([Layer(name, "dense", f"['{name}']", None, 2, 2) for name in "zab"])
    layers = Layers([*layers, Layer("s", "scale", "['s']", None, 1, 3)])
    params = {name: jnp.ones((2, 2)) for name in "zab"} | {"s": jnp.ones(3)}
    curvature = {
        name: KroneckerFactors((i + 1.0) * jnp.eye(2), jnp.eye(2), jnp.int32(1))
        for i, name in enumerate("zab")
    } | {"s": KroneckerFactors(jnp.eye(1), 0.25 * jnp.eye(3), jnp.int32(1))}
    tx = scale_by_kfac(layers)
    _, state = jax.jit(lambda g, s: tx.update(g, s, curvature=curvature))(params, tx.init(params))
    found = optax.tree_utils.tree_get(state, "diagnostics")
    np.testing.assert_allclose(found.trace_ratio, [1.0, 2.0, 3.0, 4.0])
    lines = [line.split() for line in layer_diagnostics(state).splitlines()]
    assert [(line[0], float(line[5])) for line in lines[1:]] == list(
        zip("zabs", (1, 2, 3, 4), strict=True)
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["gradient", "statistic"])
def test_a_bad_number_anywhere_leaves_the_state_alone(where, bad):
    grads, curvature = draw(0, layers=ONE), statistics(1, layers=ONE)
    tx = scale_by_kfac(ONE)
    step = stepper(tx)
    _, state = step(grads, tx.init(grads), curvature)
    broken = {"gradient": grads["hidden"], "statistic": curvature}[where]
    key = {"gradient": "b", "statistic": "hidden"}[where]
    broken[key] = jax.tree.map(lambda x: (x * bad).astype(x.dtype), broken[key])
    updates, after = step(grads, state, curvature)
    assert all(not jnp.any(u) for u in jax.tree.leaves(updates))
    assert after.total_notfinite == 1
    for old, new in zip(
        jax.tree.leaves(state), jax.tree.leaves(after._replace(total_notfinite=0)), strict=True
    ):
        np.testing.assert_array_equal(old, new)


def test_uncovered_leaves_go_to_the_fallback():
    params = {"kept": draw(0), "extra": jnp.ones(3)}
    layers = Layers(
        [Layer("hidden", "dense", "['kept']['hidden']['w']", "['kept']['hidden']['b']", 3, 2)],
        uncovered={"['extra']": "multiplied by itself"},
    )
    curvature = statistics(1, layers=layers)
    with pytest.raises(
        ValueError, match=r"no layer covers .*\['extra'\] \(multiplied by itself\).*fallback="
    ):
        scale_by_kfac(layers).init(params)
    tx = scale_by_kfac(layers, fallback=optax.scale_by_adam())
    updates, _state = stepper(tx)(params, tx.init(params), curvature)
    expected, _ = optax.scale_by_adam().update(
        params["extra"], optax.scale_by_adam().init(params["extra"])
    )
    np.testing.assert_allclose(updates["extra"], expected, rtol=1e-6)
    assert_directions(
        updates["kept"],
        params["kept"],
        curvature,
        1e-3,
        limit=SINGLE,
        layers=Layers([Layer("hidden", "dense", "['hidden']['w']", "['hidden']['b']", 3, 2)]),
    )


def test_masked_leaves_take_their_rows_out_of_the_block(x64):
    grads, curvature = draw(0, jnp.float64), statistics(1, jnp.float64)
    mask = jax.tree.map(lambda _: False, grads)
    mask["hidden"]["w"] = mask["stacked"]["b"] = True
    tx = optax.masked(scale_by_kfac(ZOO, 0.1), mask)
    updates, _ = jax.jit(lambda g, s: tx.update(g, s, curvature=curvature))(grads, tx.init(grads))
    kernel = KroneckerFactors(
        curvature["hidden"].input_factor[:3, :3], curvature["hidden"].output_factor, 1
    )
    only = Layers([Layer("hidden", "dense", "['hidden']['w']", None, 3, 2)])
    assert_directions(updates, grads, {"hidden": kernel}, 0.1, layers=only)
    row = KroneckerFactors(
        curvature["stacked"].input_factor[:, 3:, 3:], curvature["stacked"].output_factor, 1
    )
    only = Layers([Layer("stacked", "shift", None, "['stacked']['b']", 0, 2, (2,))])
    assert_directions(updates, grads, {"stacked": row}, 0.1, layers=only)
    np.testing.assert_array_equal(updates["tokens"], grads["tokens"])


@pytest.mark.parametrize("wrap", ["masked", "partition"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_one_label_may_stand_for_all_leaves_of_a_module(method, wrap):
    module = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    params = {"frozen": module, "trained": module, "other": jnp.ones(2)}
    names = "frozen", "trained"
    found = [Layer(n, "dense", f"['{n}']['w']", f"['{n}']['b']", 3, 2) for n in names]
    layers = Layers(found)
    factors = statistics(1, layers=Layers([Layer("frozen", "dense", "w", "b", 3, 2)]))["frozen"]
    statistic = EigenbasisMoments(*factors, jnp.ones((4, 2)))
    curvature = dict.fromkeys(names, factors if method == "kfac" else statistic)
    make = {"kfac": kfac, "ekfac": ekfac}[method]
    tx = make(0.1, layers, weight_decay=0.1)
    labels = {"frozen": "freeze", "trained": "train", "other": "freeze"}
    if wrap == "masked":
        trains = {name: label == "train" for name, label in labels.items()}
        tx = optax.masked(tx, trains)
    else:
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    state = tx.init(params)
    updates, _ = jax.jit(lambda s: tx.update(params, s, params, curvature=curvature))(state)
    alone = make(0.1, Layers(found[1:]), weight_decay=0.1)
    trained = {"trained": params["trained"]}
    expected, _ = alone.update(
        trained, alone.init(trained), trained, curvature={"trained": curvature["trained"]}
    )
    for a, b in zip(jax.tree.leaves(updates["trained"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=SINGLE)


def test_paths_of_an_nnx_state_and_of_pure_arrays_meet():
    curvature = {"l": KroneckerFactors(jnp.eye(2), jnp.eye(2), 1)}
    for path in ("['w']", "['w'].value"):
        layers = Layers([Layer("l", "dense", path, None, 2, 2)])
        tx = scale_by_kfac(layers, 0.0)
        updates, _ = tx.update(
            {"w": jnp.ones((2, 2))}, tx.init({"w": jnp.ones((2, 2))}), curvature=curvature
        )
        np.testing.assert_allclose(
            updates["w"], jnp.ones((2, 2)), rtol=1e-6
        )  # an inverse on a GPU is not exact


def test_half_precision_gradients_are_computed_in_single():
    grads, curvature = draw(0, jnp.bfloat16, ONE), statistics(1, layers=ONE)
    tx = scale_by_kfac(ONE, 0.1)
    updates, state = stepper(tx)(grads, tx.init(grads), curvature)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    assert state.factors["hidden"].input_factor.dtype == jnp.float32
    single, _ = stepper(tx)(
        jax.tree.map(lambda g: g.astype(jnp.float32), grads), tx.init(grads), curvature
    )
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(single), strict=False):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_a_sweep_over_every_number_equals_single_runs():
    steps = [(draw(i, layers=ONE), statistics(10 + i, layers=ONE)) for i in range(4)]
    grads, curvatures = (
        jax.tree.map(lambda *x: jnp.stack(x), *part) for part in zip(*steps, strict=False)
    )

    start = draw(9, layers=ONE)

    def train(damping, decay, every, learning_rate):
        tx = kfac(
            learning_rate,
            ONE,
            damping,
            decay=decay,
            update_every=every,
            invert_every=every,
            kl_clip=damping,
        )

        def step(carry, xs):
            updates, state = tx.update(xs[0], carry[1], carry[0], curvature=xs[1])
            return (optax.apply_updates(carry[0], updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), (grads, curvatures))
        return params

    columns = (
        jnp.array([1e-2, 1.0]),
        jnp.array([0.9, 0.0]),
        jnp.array([1, 2]),
        jnp.array([0.1, 0.01]),
    )
    swept, train = jax.jit(jax.vmap(train))(*columns), jax.jit(train)
    for i in range(2):
        alone = train(*(c[i] for c in columns))
        for a, b in zip(jax.tree.leaves(swept), jax.tree.leaves(alone), strict=False):
            np.testing.assert_allclose(a[i], b, rtol=SINGLE, atol=SINGLE)


def test_init_needs_only_shapes_and_empty_models_pass():
    shapes = jax.eval_shape(lambda: draw(0))
    real, abstract = scale_by_kfac(ZOO).init(draw(0)), scale_by_kfac(ZOO).init(shapes)
    assert jax.tree.map(jnp.shape, real) == jax.tree.map(jnp.shape, abstract)
    tx = scale_by_kfac(Layers([]))
    updates, _ = tx.update({}, tx.init({}), {}, curvature={})
    assert updates == {}


def test_equal_shapes_share_one_factorisation():
    def factorisations(count):
        layers = Layers([Layer(f"l{i}", "dense", f"['l{i}']", None, 4, 4) for i in range(count)])
        params = {f"l{i}": jnp.ones((4, 4)) for i in range(count)}
        tx = scale_by_kfac(layers)
        text = str(
            jax.make_jaxpr(tx.update)(
                params, tx.init(params), None, curvature=statistics(0, layers=layers)
            )
        )
        return text.count("cholesky")

    assert factorisations(6) == factorisations(1) > 0


def test_alias_is_the_chain():
    grads, curvature, params = draw(0, layers=ONE), statistics(1, layers=ONE), draw(2, layers=ONE)
    tx = kfac(0.1, ONE, 0.1, momentum=0.8, weight_decay=0.01, kl_clip=None)
    direction, _ = stepper(scale_by_kfac(ONE, 0.1))(
        grads, scale_by_kfac(ONE, 0.1).init(params), curvature
    )
    state = tx.init(params)
    updates, state = jax.jit(lambda s: tx.update(grads, s, params, curvature=curvature))(state)
    for u, d, p in zip(*map(jax.tree.leaves, (updates, direction, params)), strict=False):
        np.testing.assert_allclose(u, -0.1 * (d + 0.01 * p), rtol=SINGLE, atol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"damping": -1e-3}, r"expected damping >= 0, got damping=-0\.001"),
            (
                {"damping_rule": "norm"},
                r"unknown damping_rule='norm'; expected one of \('pi', 'trace'\)",
            ),
            (
                {"inverse": "lu"},
                r"unknown inverse='lu'; expected one of \('cholesky', 'eigh', 'cg'\)",
            ),
            ({"decay": 1.5}, r"expected decay <= 1, got decay=1\.5"),
            ({"update_every": 0}, "expected update_every >= 1, got update_every=0"),
            ({"invert_every": 0}, "expected invert_every >= 1, got invert_every=0"),
            ({"kl_clip": 0.0}, r"expected kl_clip > 0, got kl_clip=0\.0"),
            ({"statistic_bound": 0.5}, "expected statistic_bound >= 1, got statistic_bound=0.5"),
            ({"damping": "0.1"}, r"expected damping to be a number .*, got damping='0.1'"),
        ],
    )
    def test_numbers_and_choices(self, options, message):
        with pytest.raises(ValueError, match=f"scale_by_kfac: {message}"):
            scale_by_kfac(ZOO, **options)

    def test_layers_of_another_model(self):
        with pytest.raises(
            ValueError,
            match=r"layer 'hidden' covers .*which the tree lacks; it has \['other'\]|another",
        ):
            scale_by_kfac(ZOO).init({"other": jnp.ones(3)})
        params = draw(0) | {"transposed": jnp.ones((2, 5))}
        with pytest.raises(
            ValueError,
            match=r"'transposed': the leaf .* has shape \(2, 5\), expected .*4 × out_dim=2",
        ):
            scale_by_kfac(ZOO).init(params)
        with pytest.raises(
            ValueError, match=r"expected layers from optax_curv\.find_layers, got a list"
        ):
            scale_by_kfac([1])

    def test_curvature(self):
        tx, grads = scale_by_kfac(ZOO), draw(0)
        state, curvature = tx.init(grads), statistics(1)
        with pytest.raises(
            ValueError, match=r"curvature= is missing.*optax_curv\.value_grad_and_curvature"
        ):
            tx.update(grads, state, grads)
        fewer = {name: x for name, x in curvature.items() if name != "scale"}
        with pytest.raises(
            ValueError, match=r"must be a dict with the layers \[.*'scale'.*\], got \["
        ):
            tx.update(grads, state, curvature=fewer)
        with pytest.raises(ValueError, match=r"got \['extra', "):
            tx.update(grads, state, curvature=curvature | {"extra": curvature["hidden"]})
        with pytest.raises(ValueError, match="got a list"):
            tx.update(grads, state, curvature=[])
        with pytest.raises(
            ValueError, match="layer 'hidden' is a int, expected one with input_factor"
        ):
            tx.update(grads, state, curvature=curvature | {"hidden": 3})
        wide = KroneckerFactors(jnp.eye(5), jnp.eye(2), 1)
        with pytest.raises(
            ValueError,
            match=r"input_factor of layer 'hidden' has shape \(5, 5\), expected \(4, 4\)",
        ):
            tx.update(grads, state, curvature=curvature | {"hidden": wide})

    def test_gradients_unlike_the_parameters_and_unfit_leaves(self):
        tx, grads = scale_by_kfac(ZOO), draw(0)
        other = {name: x for name, x in grads.items() if name != "tokens"}
        with pytest.raises(
            ValueError, match="tree of the gradients differs from that of the parameters"
        ):
            tx.update(other, tx.init(grads), grads, curvature=statistics(1))
        for dtype in (jnp.complex64, jnp.int32):
            with pytest.raises(ValueError, match=r"leaf \['tokens'\] has dtype"):
                tx.init(grads | {"tokens": jnp.ones((5, 2), dtype)})
