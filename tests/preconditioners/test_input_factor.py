"""The input side alone equals dense powers and K-FAC's own, before any optimizer."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import micro_batches
import numpy as np
import optax
import pytest
from flax import nnx

import optax_curv as oc

EXACT = 1e-9  # relative, in float64
SINGLE = 1e-6  # relative, where Optax counts or computes in float32
LAYERS = oc.Layers(
    [
        oc.Layer("dense", "dense", "['w']", "['b']", 3, 2),
        oc.Layer("tokens", "embedding", "['e']", None, 5, 2),
        oc.Layer("stacked", "dense", "['s']", None, 4, 2, (2,)),
        oc.Layer("norm", "scale", "['g']", None, 1, 3),
    ]
)
SHAPES = {"w": (3, 2), "b": (2,), "e": (5, 2), "s": (2, 4, 2), "g": (3,), "free": (2, 2)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def statistics(seed):
    rng = np.random.default_rng(seed)

    def factor(layer):
        x = rng.normal(size=(*layer.stack, 6, max(1, layer.rows_of_matrix)))
        full = np.einsum("...ri,...rj->...ij", x, x) / 6
        wanted = len(layer.factor_shapes[0]) - len(layer.stack)
        return jnp.asarray(full if wanted == 2 else np.einsum("...ii->...i", full))

    return {x.name: oc.InputFactor(factor(x), jnp.int32(1)) for x in LAYERS}


def matrices(tree):
    return {
        "dense": np.concatenate([tree["w"], tree["b"][None]]),
        "tokens": np.asarray(tree["e"]),
        "stacked": np.asarray(tree["s"]),
    }


def dense_power(a, power, ridge):
    """(A + ridge · mean eigenvalue · I)^(-power), by eigenvalues in NumPy."""
    a = np.asarray(a, np.float64)
    values, vectors = np.linalg.eigh(a + ridge * np.trace(a) / len(a) * np.eye(len(a)))
    return (vectors * values**-power) @ vectors.T


def direction(name, a, matrix, power, ridge):
    if name == "stacked":
        return np.stack([dense_power(x, power, ridge) @ m for x, m in zip(a, matrix, strict=True)])
    return dense_power(np.diag(a) if a.ndim == 1 else a, power, ridge) @ matrix


@pytest.mark.parametrize(("power", "ridge"), [(0.5, 0.15), (1.0, 0.01), (0.25, 1.0)])
def test_every_step_is_the_dense_power_of_the_average(x64, power, ridge):
    tx = oc.scale_by_input_factor(LAYERS, power, ridge, every=1, decay=0.9)
    state, step = tx.init(draw(0)), jax.jit(tx.update)
    total, weight = None, 0.0
    for seed in range(4):
        grads, curvature = draw(seed), statistics(seed)
        updates, state = step(grads, state, curvature=curvature)
        factors = {n: np.asarray(x.input_factor) for n, x in curvature.items()}
        weight = 0.9 * weight + 0.1
        total = {n: 0.9 * (0 if total is None else total[n]) + 0.1 * f for n, f in factors.items()}
        for name, found in matrices(updates).items():
            given = total[name] / weight, matrices(grads)[name]
            expected = direction(name, *given, power, ridge)
            np.testing.assert_allclose(found, expected, rtol=EXACT, atol=EXACT)
        for name in ("g", "free"):
            np.testing.assert_array_equal(updates[name], grads[name])
    np.testing.assert_allclose(state.factors["dense"].input_factor, total["dense"] / weight, EXACT)


def test_power_one_is_kfac_at_the_input(x64):
    layers = oc.Layers([layer for layer in LAYERS if layer.name != "norm"])
    damping = 0.1
    kfac = oc.scale_by_kfac(
        layers, damping, damping_rule="trace", decay=0.8, fallback=optax.identity()
    )
    ours = oc.scale_by_input_factor(layers, 1.0, damping, decay=0.8, every=1)
    states = [tx.init(draw(0)) for tx in (kfac, ours)]
    for seed in range(3):
        grads, given = draw(seed), statistics(seed)
        # An output factor that is the identity only divides by 1 + damping.
        both = {
            x.name: oc.KroneckerFactors(
                given[x.name].input_factor,
                jnp.broadcast_to(jnp.eye(x.out_dim), x.factor_shapes[1]),
                jnp.int32(1),
            )
            for x in layers
        }
        expected, states[0] = kfac.update(grads, states[0], curvature=both)
        found, states[1] = ours.update(grads, states[1], curvature=both)
        for name in ("w", "b", "e", "s"):
            np.testing.assert_allclose(found[name], (1 + damping) * expected[name], rtol=EXACT)


def of_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.tanh(nn.LayerNorm()(nn.Dense(5)(x))))

    params = Net().init(jax.random.key(0), jnp.zeros((1, 3)))
    return params, lambda params, x: jnp.mean(Net().apply(params, x) ** 2)


def of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 3, 4, 4, decode=False, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.attention(jnp.stack([x, x + 1], 1)))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    return params, lambda params, x: jnp.mean(nnx.merge(graph, params)(x) ** 2)


def of_equinox():
    model = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jnp.mean(jax.vmap(eqx.combine(params, rest))(x) ** 2)


@pytest.mark.parametrize("make", [of_linen, of_nnx, of_equinox])
def test_before_muon(x64, make):
    params, loss = make()
    params = jax.tree.map(lambda x: x.astype(float), params)
    x = jax.random.normal(jax.random.key(1), (16, 3))
    layers = oc.find_layers(loss, params, x)
    take = jax.jit(oc.value_grad_and_curvature(loss, layers=layers, statistic="input"))
    numbers = oc.muon_dimension_numbers(layers)
    muon = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    tx = optax.chain(oc.scale_by_input_factor(layers), muon)
    state, alone = tx.init(params), muon.init(params)
    step = jax.jit(tx.update)
    _, grads, curvature = take(params, x)
    updates, state = step(grads, state, params, curvature=curvature)

    rows = oc.value_grad_and_curvature(loss, layers=layers, statistic="raw")(params, x)[2]
    leaves = {jax.tree_util.keystr(path): g for path, g in jax.tree.leaves_with_path(grads)}
    for layer in layers:
        if layer.kind == "dense":
            own = {path: leaves[path] for path in layer.paths}
            inputs = np.asarray(rows[layer.name].inputs, np.float64)
            a = inputs.T @ inputs / len(inputs)
            moved = dense_power(a, 0.5, 0.15) @ oc.layers.layer_matrix(layer, own)
            leaves |= oc.layers.layer_leaves(layer, moved, own)
    given = jax.tree.unflatten(jax.tree.structure(grads), list(leaves.values()))
    expected, _ = muon.update(given, alone, params)
    for found, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=SINGLE)  # of updates near 0.02


def test_refreshes_come_early_and_then_by_the_period():
    tx = oc.scale_by_input_factor(LAYERS, every=6)
    state, step, counts = tx.init(draw(0)), jax.jit(tx.update), []
    for seed in range(30):
        _, state = step(draw(0), state, curvature=statistics(seed))
        counts.append(int(state.factors["dense"].count))
    # At steps 0, 1, 2, 3, 4, then after two, three, … steps.
    refreshed = [i for i, (a, b) in enumerate(zip([0, *counts], counts, strict=False)) if b > a]
    gaps = np.diff(refreshed)
    assert refreshed[0] == 0 and gaps[0] == 1
    assert all(np.diff(gaps) >= 0) and gaps[-1] == 6


def test_micro_batches_are_the_whole_batch(x64):
    params, batches = micro_batches.draw()
    layers = oc.find_layers(micro_batches.loss, params, batches[0])
    take = oc.value_grad_and_curvature(micro_batches.loss, layers=layers, statistic="input")
    tx = oc.scale_by_input_factor(layers, every=1)
    whole, in_thirds, _ = micro_batches.updates_of(tx, take, params, batches)
    chex.assert_trees_all_close(in_thirds, whole, rtol=SINGLE)


def test_statistics_of_the_same_batch_give_the_same_step(x64):
    params, (x, _) = micro_batches.draw()
    layers = oc.find_layers(micro_batches.loss, params, x)
    tx, found = oc.scale_by_input_factor(layers), []
    for statistic in ("input", "kronecker", "rows"):
        take = oc.value_grad_and_curvature(micro_batches.loss, layers=layers, statistic=statistic)
        _, grads, curvature = take(params, x)
        found.append(tx.update(grads, tx.init(params), curvature=curvature)[0])
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=EXACT), found[0], other)


def test_a_layer_without_inputs_stays_and_a_masked_bias_has_no_coordinate():
    tx = oc.scale_by_input_factor(LAYERS, every=1)
    zero = {n: x._replace(input_factor=0 * x.input_factor) for n, x in statistics(0).items()}
    grads = draw(0)
    updates, _ = tx.update(grads, tx.init(grads), curvature=zero)
    assert not any(np.any(m) for m in matrices(updates).values())
    masked = optax.masked(tx, {name: name != "b" for name in SHAPES})
    updates, _ = masked.update(grads, masked.init(grads), curvature=statistics(0))
    alone = dense_power(statistics(0)["dense"].input_factor[:3, :3], 0.5, 0.15)
    np.testing.assert_allclose(updates["w"], alone @ grads["w"], rtol=1e-5)
    np.testing.assert_array_equal(updates["b"], grads["b"])


def test_what_does_not_fit_is_refused():
    for options, words in (
        ({"power": 0.0}, "power"),
        ({"power": 1.5}, "power"),
        ({"ridge": -0.1}, "ridge"),
        ({"every": 0}, "every"),
        ({"decay": 1.5}, "decay"),
    ):
        with pytest.raises(ValueError, match=words):
            oc.scale_by_input_factor(LAYERS, **options)
    with pytest.raises(ValueError, match="find_layers"):
        oc.scale_by_input_factor("dense")
    tx = oc.scale_by_input_factor(LAYERS)
    grads = draw(0)
    state = tx.init(grads)
    with pytest.raises(ValueError, match="curvature= is missing"):
        tx.update(grads, state)
    with pytest.raises(ValueError, match="must be a dict with the layers"):
        tx.update(grads, state, curvature={"dense": statistics(0)["dense"]})
    with pytest.raises(ValueError, match="layers of another model"):
        tx.init({"kernel": jnp.ones((3, 2))})
    wide = statistics(0) | {"dense": oc.InputFactor(jnp.eye(7), jnp.int32(1))}
    with pytest.raises(ValueError, match=r"input_factor of layer 'dense' has shape \(7, 7\)"):
        tx.update(grads, state, curvature=wide)
    rows = statistics(0) | {"dense": oc.InputRows(jnp.ones((6, 9)), jnp.float32(1))}
    with pytest.raises(ValueError, match=r"has shape \(9, 9\)"):
        tx.update(grads, state, curvature=rows)
    with pytest.raises(ValueError, match='statistic="input"'):
        tx.update(grads, state, curvature=statistics(0) | {"dense": jnp.eye(4)})
    for options in ({"sharing": "reduce"}, {"fisher": "sampled"}):
        with pytest.raises(ValueError, match="input"):
            oc.value_grad_and_curvature(
                oc.Objective(lambda p, x: x, "normal"), statistic="input", **options
            )
