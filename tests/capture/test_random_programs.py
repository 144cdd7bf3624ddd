"""Programs drawn at random: factors are those of single examples, whatever the batch repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_programs

from optax_curv import Objective, find_layers, value_grad_and_curvature
from optax_curv.layers import layer_matrix

EXACT = 1e-9  # relative to the largest entry, float64
TINY = 1e-10  # absolute: entries that cancel
QUICK_COMPILATION = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
N = 3
SEEDS = (0, 3, 7, 13, 19, 40)


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_close(given, right, what):
    scale = float(np.abs(right).max())
    np.testing.assert_allclose(given, right, rtol=0, atol=EXACT * scale + TINY, err_msg=what)


@pytest.mark.parametrize("seed", SEEDS)
def test_factors_are_the_mean_of_single_examples_and_the_same_for_the_batch_twice(x64, seed):
    loss, params = random_programs.loss_of(seed), random_programs.parameters(seed)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(N, *random_programs.EXAMPLE)))
    layers = find_layers(loss, params, x)
    covered = {path for layer in layers for path in layer.paths}
    assert covered | set(layers.uncovered) == set(by_path(params)), (
        "a leaf is a layer's, or has a reason"
    )
    of_one = find_layers(loss, params, x[:1])
    assert covered <= {path for layer in of_one for path in layer.paths}, "one finds what many do"

    def everything(params, x):
        measure = value_grad_and_curvature(loss, layers=layers)

        def single(x):
            return measure(params, x[None])[1:]

        return measure(params, x), measure(params, jnp.concatenate([x, x]))[2], jax.vmap(single)(x)

    (_, grads, once), twice, (single_grads, single) = jax.jit(
        everything, compiler_options=QUICK_COMPILATION
    )(params, x)
    jax.tree.map(lambda one, all_of: assert_close(one, all_of.mean(0), "grad"), grads, single_grads)
    for layer in layers:
        for factor in ("input_factor", "output_factor"):
            right = np.mean(getattr(single[layer.name], factor), axis=0)
            assert_close(getattr(once[layer.name], factor), right, f"{factor} of {layer.name}")
            assert_close(getattr(twice[layer.name], factor), right, f"{layer.name}, batch twice")
        if layer.is_elementwise:
            own = {path: by_path(single_grads)[path] for path in layer.paths}
            rows = np.asarray(jax.vmap(lambda x, layer=layer: layer_matrix(layer, x))(own))[
                ..., 0, :
            ]
            outer = np.mean(rows[..., :, None] * rows[..., None, :], axis=0)
            assert_close(once[layer.name].output_factor, outer, f"the block of {layer.name}")


@pytest.mark.parametrize("seed", SEEDS[1:3])
def test_exact_factors_are_the_same_for_the_batch_twice(x64, seed):
    def predict(params, x):
        return random_programs.outputs_of(seed)(params, x)[:, 0]

    params = random_programs.parameters(seed)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(N, *random_programs.EXAMPLE)))
    measure = value_grad_and_curvature(Objective(predict, "normal"), fisher="exact")

    def both(params, x):
        y = jnp.zeros((N, random_programs.D))
        twice = measure(params, jnp.concatenate([x, x]), jnp.concatenate([y, y]))
        return measure(params, x, y)[2], twice[2]

    once, twice = jax.jit(both, compiler_options=QUICK_COMPILATION)(params, x)
    jax.tree.map(lambda a, b: assert_close(b, a, "batch twice"), once, twice)
