"""The precision policy: a preconditioner multiplies in full, whatever the user's default is."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import cases

import optax_curv

ALL = cases.ALL
PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "precision.py"
HIGHEST = jax.lax.Precision.HIGHEST


def products(jaxpr):
    """Every dot_general of a jaxpr, those of its inner jaxprs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def is_full(equation):
    precision = equation.params["precision"]
    return precision in (HIGHEST, (HIGHEST, HIGHEST))


@pytest.mark.parametrize("name", [x for x in ALL if ALL[x].network is None])
def test_every_product_of_a_preconditioner_is_a_full_one(name):
    tx, arrays = ALL[name].transformation(), ALL[name].extras(np.random.default_rng(0))
    params = cases.tree(0)
    with jax.default_matmul_precision("bfloat16"):
        traced = jax.make_jaxpr(lambda g, s, e: tx.update(g, s, params, **e))(
            params, tx.init(params), arrays
        )
    found = list(products(traced.jaxpr))
    assert [str(x) for x in found if not is_full(x)] == []
    assert found or name in cases.PIECES, "no product was found at all"


@pytest.mark.parametrize("statistic", ["kronecker", "eigenbasis"])
def test_statistics_are_full_products_beside_a_bfloat16_network(statistic):
    """Of a layer's four products, forward, both cotangents, statistics, the last is in full."""

    def loss_fn(params, x, y):
        return jnp.mean(jnp.square(x @ params["w"] - y))

    params, batch = {"w": jnp.ones((3, 2))}, (jnp.ones((8, 3)), jnp.ones((8, 2)))
    layers = optax_curv.find_layers(loss_fn, params, *batch)
    capture = optax_curv.value_grad_and_curvature(loss_fn, layers=layers)

    def factors(params, *batch):
        return capture(params, *batch)[2]

    with jax.default_matmul_precision("bfloat16"):
        traced = jax.make_jaxpr(factors)(params, *batch)
    full = [x for x in products(traced.jaxpr) if is_full(x)]
    assert len(full) >= 2, "the input and the output factor"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", cases.METHODS | cases.ALIASES)
def test_factors_of_short_gradients_are_float32(name, dtype):
    state = jax.eval_shape(ALL[name].transformation().init, cases.tree(0, dtype))
    kept = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kept <= {jnp.dtype("float32")}


def test_full_products_lose_least_and_short_ones_lose_the_whitening_difference():
    spec = importlib.util.spec_from_file_location("precision", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for errors in module.table().values():
        assert 100 * errors["float32"] < errors["tf32"] < errors["bfloat16"]
    assert errors["float32"] < 0.01 and errors["tf32"] > 1, (
        "less than float32 loses all that is left to subtract"
    )
