"""Branch Fisher with searches, adaptive damping, other dtypes, devices, and a real state."""

import subprocess
import sys

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_curv
from optax_curv import Objective

EXACT = 1e-9
SHARDED = 1e-6  # of eight devices against one, in float32
BFLOAT16 = 0.02  # two roundings of eight bits
CONVERGED = 1e-10  # of a loss that falls to zero, from its first value


def network(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"]) @ params["v"]


def problem(dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = {"w": (2, 8), "b": (8,), "v": (8, 1)}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    inputs = jnp.asarray(rng.normal(size=(10, 2)), dtype)
    return params, (
        inputs,
        network(jax.tree.map(lambda p: p + 0.3 * jnp.cos(3 * p), params), inputs),
    )


def residual(params, batch):
    return network(params, batch[0]) - batch[1]


value_grads_and_rows = optax_curv.residual_rows(residual)


def loss_of(batch):
    """The loss as Optax's searches call it, with a name for every extra argument."""

    def loss(params, branches=None, objective=None, batch=batch, weights=None):
        del branches, objective, weights
        return 0.5 * jnp.mean(residual(params, batch) ** 2)

    return loss


SEARCHES = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(20),
    "zoom": lambda: optax.scale_by_zoom_linesearch(20),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_line_search_after_it_never_climbs_and_converges(search, x64):
    params, batch = problem()
    loss = loss_of(batch)
    fisher = optax_curv.scale_by_branch_fisher(1e-8, solver="auto", centered=False)
    tx = optax.chain(fisher, optax.scale(-1.0), SEARCHES[search]())

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads, rows = value_grads_and_rows(params, batch)
            given = {"branches": rows, "value": value, "grad": grads, "value_fn": loss}
            updates, state = tx.update(grads, state, params, **given)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=30)[1]

    values = np.asarray(train(params))
    rounding = np.finfo(float).eps * values[0]  # in the end the loss is some 1e-33
    assert np.all(np.diff(values) <= rounding) and values[-1] < CONVERGED * values[0]


def test_adaptive_damping_before_it_follows_the_model(x64):
    params, batch = problem()
    objective, given = (
        Objective(lambda p, _: residual(p, batch), "normal"),
        (batch[0], jnp.zeros_like(batch[1])),
    )

    def damped(lam):
        fisher = optax_curv.scale_by_branch_fisher(lam, solver="auto", centered=False)
        return optax.chain(fisher, optax.scale(-1.0))

    tx = optax_curv.adapt_damping(damped, 1e-2, adapt_every=1, factor=0.5, min_damping=1e-12)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads, rows = value_grads_and_rows(params, batch)
            updates, state = tx.update(
                grads, state, params, branches=rows, objective=objective, batch=given, value=value
            )
            return (optax.apply_updates(params, updates), state), (value, state.damping)

        return jax.lax.scan(step, (params, tx.init(params)), length=30)[1]

    values, dampings = train(params)
    assert values[-1] < CONVERGED * values[0] and dampings.min() < 1e-4


def test_the_jacobian_of_a_networks_state_as_projection_is_the_pullback_of_its_covariance(x64):
    """With P = Jᵀ and s(θ) the hidden state, directions that move s where it varies cost."""
    params, (inputs, _) = problem()
    damping = 0.1

    def states(params):
        """The hidden state at every input, [K, D]."""
        return jnp.tanh(inputs @ params["w"] + params["b"])

    jacobian = jax.jacobian(lambda p: jnp.mean(states(p), 0))(
        params
    )  # the mean state's, a tree [D, *shape]
    projection = jax.tree.map(lambda j: jnp.moveaxis(j, 0, -1), jacobian)
    grads = jax.tree.map(jnp.sin, params)
    tx = optax_curv.scale_by_branch_fisher(damping, complement=True)
    step = jax.jit(
        lambda g: tx.update(
            g, tx.init(params), params, branches=states(params), projection=projection
        )[0]
    )
    direction, _ = ravel_pytree(step(grads))

    flat_jacobian = jax.vmap(lambda row: ravel_pytree(row)[0])(jacobian)
    metric = flat_jacobian.T @ np.cov(np.asarray(states(params)), rowvar=False) @ flat_jacobian
    flat, _ = ravel_pytree(grads)
    expected = damping * np.linalg.solve(metric + damping * np.eye(len(flat)), flat)
    np.testing.assert_allclose(direction, expected, rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(
        step(grads)["v"], grads["v"], rtol=EXACT
    )  # the state does not depend on it


def test_mixed_precision_trees_keep_their_dtypes_and_move_alike():
    params, batch = problem("float32")
    narrow = params | {"w": params["w"].astype(jnp.bfloat16)}
    # a damping that lets the rounding of bfloat16 rows grow no further in the solve
    tx = optax_curv.scale_by_branch_fisher(10.0, solver="auto", centered=False, momentum=0.9)

    @jax.jit
    def step(params, state):
        _, grads, rows = value_grads_and_rows(params, batch)
        return tx.update(grads, state, params, branches=rows)

    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    direction, state = step(narrow, tx.init(narrow))
    expected, _ = step(wide, tx.init(wide))
    assert jax.tree.map(jnp.result_type, direction) == jax.tree.map(jnp.result_type, narrow)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, tx.init(narrow))
    found, expected = (
        ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float32), d))[0]
        for d in (direction, expected)
    )
    assert jnp.linalg.norm(found - expected) < BFLOAT16 * jnp.linalg.norm(expected)


def test_a_state_may_be_donated():
    params, batch = problem("float32")
    _, grads, rows = value_grads_and_rows(params, batch)
    tx = optax_curv.scale_by_branch_fisher(momentum=0.9, solver="auto")
    step = jax.jit(lambda state: tx.update(grads, state, branches=rows)[1], donate_argnums=0)
    assert int(step(step(tx.init(params))).count) == 2


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax_curv
from jax.sharding import AxisType, NamedSharding, PartitionSpec
rng = np.random.default_rng(0)
params = {"w": rng.normal(size=(6, 5)).astype("float32"), "b": rng.normal(size=5).astype("float32")}
x, y = (rng.normal(size=shape).astype("float32") for shape in ((32, 6), (32, 5)))
rows_of = optax_curv.residual_rows(lambda p, batch: jnp.tanh(batch[0] @ p["w"] + p["b"]) - batch[1])
mesh = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Auto,))
examples = NamedSharding(mesh, PartitionSpec("examples"))
assert len(jax.devices()) == 8
for solver in ("woodbury", "cholesky", "cg"):
    options = {"max_iters": 60, "tol": 0.0, "centered": False, "momentum": 0.9}
    tx = optax_curv.scale_by_branch_fisher(0.1, solver=solver, **options)

    def two_steps(batch):
        state = tx.init(params)
        for _ in range(2):
            _, grads, rows = rows_of(params, batch)
            direction, state = tx.update(grads, state, branches=rows)
        return direction, rows

    alone, _ = jax.jit(two_steps)((x, y))
    given = jax.device_put((x, y), examples)
    spread, rows = jax.jit(two_steps, out_shardings=(None, examples))(given)
    assert len(rows["w"].sharding.device_set) == 8
    print(solver, max(float(abs(alone[k] - spread[k]).max() / abs(alone[k]).max()) for k in params))
"""


def test_rows_sharded_over_eight_devices_equal_one_device():
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=eight_devices.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert set(errors) == {"woodbury", "cholesky", "cg"}
    assert all(float(error) < SHARDED for error in errors.values()), errors
