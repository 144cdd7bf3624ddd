"""Trees drawn at random pass every alias: containers of all kinds, leaves of all ranks and dtypes.

They are traced and never compiled, so that a tree costs a fraction of a second; one tree with all
kinds in it is also computed."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import optax_curv

TREES = 8  # for every alias
LARGEST = 48  # numbers in a leaf
DTYPES = ("float32", "bfloat16", "float16")


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: Any
    bias: Any


def of_state(pair):
    """An nnx.State of two parameters."""
    return nnx.State({"a": nnx.Param(pair[0]), "b": {"c": nnx.Param(pair[1])}})


shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 4]), max_size=6).filter(
    lambda shape: math.prod(shape) <= LARGEST
)
leaves = st.builds(jax.ShapeDtypeStruct, shapes, st.sampled_from(DTYPES).map(jnp.dtype))
NAMES = st.sampled_from(["w", "bias", "my b", "a/b", "['x']", "kernel"])
trees = st.recursive(
    leaves | st.none(),
    lambda parts: st.one_of(
        st.dictionaries(NAMES, parts, max_size=3),
        st.dictionaries(NAMES, parts, max_size=3).map(FrozenDict),
        st.lists(parts, max_size=3),
        st.lists(parts, max_size=2).map(tuple),
        st.builds(Pair, parts, parts),
        st.builds(Block, parts, parts),
        st.tuples(leaves, leaves).map(of_state),
    ),
    max_leaves=6,
)

LAYERS = optax_curv.Layers([])
ADAM = optax.scale_by_adam()
ALIASES = {
    "shampoo": (lambda: optax_curv.shampoo(0.1, weight_decay=0.01), {}),
    "soap": (lambda: optax_curv.soap(0.1, rms=0.2), {}),
    "kron_psgd": (lambda: optax_curv.kron_psgd(0.1), {}),
    "dense_psgd": (lambda: optax_curv.dense_psgd(0.1, weight_decay=0.01), {}),
    "lra_psgd": (lambda: optax_curv.lra_psgd(0.1, rank=2), {}),
    "kfac": (lambda: optax_curv.kfac(0.1, LAYERS, fallback=ADAM), {"curvature": {}}),
    "ekfac": (lambda: optax_curv.ekfac(0.1, LAYERS, fallback=ADAM), {"curvature": {}}),
    "branch_fisher": (lambda: optax_curv.branch_fisher(0.1, 0.1), {"branches": None}),
    "branch_kfac": (lambda: optax_curv.branch_kfac(0.1, 0.1), {"branches": None}),
}


def structs(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def passes(alias, tree):
    """Whether an update has the leaves of the tree, and the state stays what it is."""
    make, extra = ALIASES[alias]
    tx = make()
    state = jax.eval_shape(tx.init, tree)
    update = functools.partial(tx.update, **extra)
    updates, new = jax.eval_shape(update, tree, state, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert structs(updates) == structs(tree)
    assert structs(new) == structs(state)
    assert all(x.dtype not in (jnp.bfloat16, jnp.float16) for x in jax.tree.leaves(new))


@pytest.mark.parametrize("alias", ALIASES)
def test_any_tree_passes(alias):
    @seed(18)
    @settings(
        max_examples=TREES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(trees)
    def check(tree):
        passes(alias, tree)

    check()


@pytest.mark.parametrize("alias", ["shampoo", "soap", "kron_psgd", "dense_psgd", "lra_psgd"])
def test_a_tree_with_every_kind_in_it_takes_finite_steps(alias):
    ranks = [(), (3, 2), (1, 2, 1, 2, 1, 2)]
    arrays = [jnp.ones(shape, dtype) for shape, dtype in zip(ranks, DTYPES, strict=True)]
    params = {
        "ranks": arrays,
        "none": None,
        "empty": ({}, [], ()),
        "zero": jnp.zeros((0, 3)),
        "pair": Pair(arrays[1], None),
        "block": Block(arrays[2], arrays[0]),
        "frozen": FrozenDict({"w": arrays[1]}),
        "state": of_state((arrays[1], arrays[0])),
    }
    make, extra = ALIASES[alias]
    tx = make()
    updates, state = params, tx.init(params)
    update = jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})
    for _ in range(2):
        updates, state = update(params, state, params, **extra)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
    assert any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
    assert int(optax.tree.get(state, "count", filtering=lambda path, _: len(path) < 3)) == 2
