"""Optax's own suites, from the installed package, with optimizers of this package in their lists.

The suites' lists of optimizers are bound when they are imported, through
`absl.testing.parameterized.product`: a copy of each is imported while ours stand there. What cannot
apply is told in `NOT_APPLICABLE`, and nowhere else. One optimizer of each kind runs by default;
OPTAX_SUITES=all in the environment runs every one."""

import importlib.util
import itertools
import os
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from conformance import cases

OPTIMIZERS = {
    name: case.suite for name, case in cases.ALL.items() if isinstance(case.suite, cases.Suite)
}
# Optax's wrappers around one method, in the form of its own list.
WRAPPED = {
    "mechanize": {"weight_decay": 0.0},
    "schedule_free": {"learning_rate": 1e-2},
    "reduce_on_plateau": {},
}


def handles_complex(name):
    return cases.ALL[name].complex


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


def entries(keys):
    """Our list with the keys of the list that it replaces."""
    plain = [
        {"opt_name": name, "opt_kwargs": x.options, "wrapper_name": None, "wrapper_kwargs": None}
        for name, x in OPTIMIZERS.items()
        if x.by_default or os.environ.get("OPTAX_SUITES") == "all"
    ]
    kron = next(x for x in plain if x["opt_name"] == "kron_psgd")
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
