"""The branch methods against the originals' own arithmetic."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

FLOAT64 = 1e-9  # relative, golden/README.md's limit
FLOAT32 = 1e-5  # relative, its limit where the listed difference is below 1e-6
STATE_NORM = 1e-6  # precond_norm is stored in float32

# Ten times the listed float32 difference, where that is above FLOAT32.
LISTED_FLOAT32 = {
    "branch_kfac.npz": {"k_less_than_d": 5e-4, "k_less_than_d_one_block": 1e-4, "correlated": 5e-5},
    "branch_natural.npz": {
        "defaults": 2e-5,
        "k_less_than_d": 8e-5,
        "ill_conditioned": 1e-2,
        "multi_leaf": 2e-4,  # seventeen times: sums of another order, which CG makes larger
    },
}


def number(value, default):
    return default if np.isnan(value) else float(value)


def transformation(file, case, bound):
    """The alias for a case: its first state is the preconditioner's, its last link the box."""
    damping, lr = number(case["damping"], 1e-3), float(case["lr"])
    given = {"complement": False, "param_bound": bound}  # the originals' rule
    if file == "branch_kfac.npz":
        return optax_curv.branch_kfac(lr, damping, blocks=int(case["blocks"]), **given)
    return optax_curv.branch_fisher(lr, damping, max_iters=int(case["cg_iters"]), **given)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def largest_difference(value, reference):
    return np.abs(value - reference).max(initial=0) / max(
        np.abs(reference).max(initial=0), np.finfo(float).tiny
    )


def follow(file, name, dtype, limit):
    """Directions, norms, counts and (within their box) parameters of every step."""
    case = golden.case(file, name)
    names = [str(leaf) for leaf in case["leaf_names"]]
    params = {leaf: jnp.asarray(case[f"init_{leaf}"], dtype) for leaf in names}
    bound = number(case["clip"], None)
    tx, box = (
        transformation(file, case, None),
        optax_curv.keep_params_in_box(1.0 if bound is None else bound),
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(len(case["steps"])):
        grads = {leaf: jnp.asarray(case[f"grads_{leaf}"][t], dtype) for leaf in names}
        extra: dict = {"branches": None}
        if "branches" in case and (case["has_branches"][t] or case["branches"][t].ndim != 2):
            extra["branches"] = jnp.asarray(case["branches"][t], dtype)
        if case["has_branches"][t]:
            extra["projection"] = jnp.asarray(case["P"][t], dtype)
        updates, state = update(grads, state, params, **extra)
        assert largest_difference(flat(updates), -case["lr"] * case["direction"][t]) <= limit
        if bound is not None:
            updates, _ = box.update(updates, box.init(params), params)
        params = optax.apply_updates(params, updates)
        assert params[names[0]].dtype == dtype
        assert largest_difference(flat(params), case["theta"][t]) <= limit
        assert largest_difference(state[0].precond_norm, case["precond_norm"][t]) <= max(
            limit, STATE_NORM
        )
        assert state[0].count == case["steps"][t]


FILES = ("branch_kfac.npz", "branch_natural.npz")
CASES = [
    pytest.param(file, *getattr(name, "values", (name,)), marks=getattr(name, "marks", ()))
    for file in FILES
    for name in golden.cases(file)
]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_float64_trajectory_equals_the_original(file, name, x64):
    follow(file, name, jnp.float64, FLOAT64)


@pytest.mark.parametrize(("file", "name"), CASES)
def test_float32_trajectory_stays_near_the_original(file, name):
    follow(file, name, jnp.float32, LISTED_FLOAT32[file].get(name, FLOAT32))
