"""Optax's own suites from the installed package, with this library's optimizers in the place of Optax's.

The suites' lists of optimizers are bound when they are imported, through
`absl.testing.parameterized.product`: a copy of each is imported while ours stand there. What cannot
apply is told in `NOT_APPLICABLE`, and nowhere else. One optimizer of each kind runs by default;
OPTAX_SUITES=all in the environment runs every one."""

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized
from conformance import cases

import optax_curv


class Optimizer(NamedTuple):
    """An entry of the suites' lists."""

    make: Callable  # (learning_rate, ...) -> transformation
    options: dict
    by_default: bool = False  # otherwise another one of its kind runs


def layer_of(path, leaf):
    """Any leaf as a layer: a matrix as a dense kernel, every other one as a shift of as many numbers."""
    name = jax.tree_util.keystr(path)
    if leaf.ndim == 2:
        return optax_curv.Layer(name, "dense", name, None, *leaf.shape)
    return optax_curv.Layer(name, "shift", None, name, 0, leaf.size)


def with_curvature(method, statistic):
    """A layer-wise method that makes layers and statistics from the gradients, which are all that the suites hand over.

    Seen as a matrix, each of its rows is the output gradient of one example whose input is that
    row's unit vector."""

    def layers_and_method(tree, learning_rate, damping):
        layers = [layer_of(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
        return layers, method(learning_rate, optax_curv.Layers(layers), damping)

    def measure(layer, g):
        rows = jnp.asarray(g, jnp.promote_types(g.dtype, jnp.float32)).reshape(
            layer.rows_of_matrix, -1
        )
        count = len(rows)
        factors = jnp.eye(count, dtype=rows.dtype) / count, rows.T @ rows / count, jnp.int32(1)
        extra = (jnp.square(rows),) if statistic is optax_curv.EigenbasisMoments else ()
        return statistic(*factors, *extra)

    def make(learning_rate: optax.ScalarOrSchedule, damping=10.0):
        seen = {}  # optax.tree.map_params asks for the state of a tree without leaves, with the structure of the last

        def init(params):
            tree = seen["tree"] = params if jax.tree.leaves(params) else seen["tree"]
            return layers_and_method(tree, learning_rate, damping)[1].init(params)

        def update(updates, state, params=None, **extra_args):
            layers, tx = layers_and_method(updates, learning_rate, damping)
            curvature = {
                x.name: measure(x, g) for x, g in zip(layers, jax.tree.leaves(updates), strict=True)
            }
            return tx.update(updates, state, params, curvature=curvature, **extra_args)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def adam_in_basis(learning_rate, layers, damping):
    del damping
    return optax.chain(
        optax_curv.scale_by_adam_in_basis(layers), optax.scale_by_learning_rate(learning_rate)
    )


def gauss_newton(learning_rate: optax.ScalarOrSchedule, damping=100.0):
    """Gauss-Newton with F = g gᵀ of the gradients, which are all that the suites hand over."""
    tx = optax_curv.gauss_newton(learning_rate, damping, max_iters=3)

    def update(updates, state, params=None, **extra_args):
        def product(v):
            return optax.tree.scale(optax.tree.vdot(updates, v), updates)

        return tx.update(updates, state, params, curvature_product=product, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def with_learning_rate(*pieces):
    """Chainable pieces as an optimizer."""

    def make(learning_rate: optax.ScalarOrSchedule):
        return optax.chain(*pieces, optax.scale_by_learning_rate(learning_rate))

    return make


def kron(geometry):
    return Optimizer(optax_curv.kron_psgd, {"learning_rate": 1e-2, "geometry": geometry})


RATE = {"learning_rate": 1e-3}
OPTIMIZERS = {
    "kron_psgd": kron("q0.5eq1.5")._replace(by_default=True),
    **{
        f"kron_psgd_{geometry}": kron(geometry)
        for geometry in ("eq", "qep", "qeq", "quad", "quad4p")
    },
    "kron_psgd_right_triangular": Optimizer(
        optax_curv.kron_psgd, RATE | {"geometry": "right_triangular"}
    ),
    "dense_psgd": Optimizer(optax_curv.dense_psgd, {"learning_rate": 1e-2}),
    "lra_psgd": Optimizer(optax_curv.lra_psgd, {"learning_rate": 1e-2}, True),
    "branch_fisher": Optimizer(optax_curv.branch_fisher, RATE, True),
    "branch_kfac": Optimizer(optax_curv.branch_kfac, RATE | {"param_bound": 20.0}),
    "kfac": Optimizer(
        with_curvature(
            functools.partial(optax_curv.kfac, momentum=0.0), optax_curv.KroneckerFactors
        ),
        {"learning_rate": 0.1},
        True,
    ),
    "ekfac": Optimizer(
        with_curvature(
            functools.partial(optax_curv.ekfac, momentum=0.0), optax_curv.EigenbasisMoments
        ),
        {"learning_rate": 1e-2, "damping": 1.0},
    ),
    "adam_in_basis": Optimizer(
        with_curvature(adam_in_basis, optax_curv.KroneckerFactors), {"learning_rate": 1e-2}
    ),
    "gauss_newton": Optimizer(gauss_newton, {"learning_rate": 0.15}, True),
    "shampoo": Optimizer(optax_curv.shampoo, {"learning_rate": 1e-2}, True),
    "soap": Optimizer(optax_curv.soap, {"learning_rate": 1e-2}),
    "clip_by_max_abs": Optimizer(
        with_learning_rate(optax_curv.clip_by_max_abs(10.0), optax.trace(0.9)), RATE
    ),
    "normalize_by_rms": Optimizer(with_learning_rate(optax_curv.normalize_by_rms(1.0)), RATE, True),
    "normalize_by_reference": Optimizer(
        with_learning_rate(optax_curv.normalize_by_reference(optax.scale_by_adam())),
        {"learning_rate": 1e-2},
    ),
}
# Optax's wrappers around one method, in the form of its own list.
WRAPPED = {
    "mechanize": {"weight_decay": 0.0},
    "schedule_free": {"learning_rate": 1e-2},
    "reduce_on_plateau": {},
}
COMPLEX = ("clip_by_max_abs", "normalize_by_rms", "normalize_by_reference", "shampoo", "soap")


def handles_complex(name):
    return name in COMPLEX or (
        name.startswith("kron_psgd") and name != "kron_psgd_right_triangular"
    )


# (suite, test, which of its cases, reason)
NOT_APPLICABLE = (
    (
        "optax._src.alias_test",
        "LBFGSTest",
        None,
        "tests the arithmetic of L-BFGS and its line searches",
    ),
    (
        "optax._src.alias_test",
        "test_optimization test_state_shape_dtype_shard_stability",
        lambda case: jnp.iscomplexobj(case["dtype"]) and not handles_complex(case["opt_name"]),
        "the method refuses complex leaves, in init and by name",
    ),
    (
        "optax.contrib._common_test",
        "test_optimizers_accept_extra_args",
        lambda case: case["wrapper_name"] == "reduce_on_plateau" and case["wrap"],
        "the suite gives reduce_on_plateau its value= only around Optax's own sgd",
    ),
    (
        "optax.contrib._common_test",
        "test_optimizers_can_be_wrapped_in_inject_hyperparams",
        lambda case: case["wrapper_name"] == "reduce_on_plateau",
        "the suite skips it too: reduce_on_plateau has no numbers that can be injected",
    ),
    (
        "optax._src.alias_test",
        "test_explicit_dtype",
        None,
        "sets the state's dtype by arguments of sgd, adam and adamw",
    ),
)

# Methods of the registry that are no optimizers here, by name.
LEFT_OUT = {
    "keep_params_in_box": "runs within branch_kfac, as param_bound",
    "kron_psgd_sometimes": "runs as kron_psgd_qeq, whose rule it has",
    "branch_fisher_complement": "the suites have no branches, without which it is branch_fisher",
    "estimate_gradients": "replaces the gradients by an estimate from the loss, which the suites do not hand over",
    "scale_by_quadratic_model": "needs an Objective; the suites' losses are plain functions",
}


def test_every_method_of_the_registry_runs_in_the_suites_or_has_a_reason():
    assert set(cases.CASES) == (set(OPTIMIZERS) & set(cases.CASES)) | set(LEFT_OUT)


def entries(keys):
    """Our list with the keys of the list that it replaces."""
    plain = [
        {"opt_name": name, "opt_kwargs": x.options, "wrapper_name": None, "wrapper_kwargs": None}
        for name, x in OPTIMIZERS.items()
        if x.by_default or os.environ.get("OPTAX_SUITES") == "all"
    ]
    kron = plain[0]
    wrapped = [
        kron | {"wrapper_name": name, "wrapper_kwargs": kwargs} for name, kwargs in WRAPPED.items()
    ]
    # mechanize learns the scale of a step from 1e-6 times it, which float32 parameters of ten have
    # to feel
    wrapped[0] |= {"opt_kwargs": kron["opt_kwargs"] | {"learning_rate": 1.0}}
    return [
        {key: entry[key] for key in keys}
        for entry in (plain + wrapped if "wrapper_name" in keys else plain)
    ]


def reason_against(suite, test, case):
    for of_suite, tests, applies, reason in NOT_APPLICABLE:
        named = set(test.__qualname__.split(".")) & set(tests.split())
        if of_suite == suite and named and (applies is None or applies(case)):
            return reason
    return None


def imported(name):
    """A copy of one of Optax's test modules, whose lists of optimizers are ours."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    left_out = []

    def product(*lists, **grid):
        lists = [entries(x[0].keys()) if "opt_name" in x[0] else x for x in lists]
        grid = [[{key: value} for value in values] for key, values in grid.items()]
        cases = [
            dict(itertools.chain(*(part.items() for part in parts)))
            for parts in itertools.product(*lists, *grid)
        ]

        def decorated(test):
            kept = [case for case in cases if reason_against(name, test, case) is None]
            left_out.extend((test, case) for case in cases if case not in kept)
            return parameterized.parameters(*kept)(test) if kept else None

        return decorated

    with mock.patch.object(parameterized, "product", product):
        spec.loader.exec_module(module)
    return module, left_out


common, LEFT_OUT_OF_COMMON = imported("optax.contrib._common_test")
alias, LEFT_OUT_OF_ALIAS = imported("optax._src.alias_test")
common._get_opt_factory = lambda name: OPTIMIZERS[name].make
alias._get_opt = lambda self, name: OPTIMIZERS[name].make


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny problems take longer to compile than to solve."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class TestCommon(common.ContribTest):
    """Optax's suite for contributed optimizers."""


class TestAlias(alias.AliasTest):
    """Optax's suite for its aliases."""
