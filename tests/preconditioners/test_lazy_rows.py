"""Rows that are never stored, and stored ones that are never copied, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_curv
from optax_curv.preconditioners._branches import metric as metric_room

EXACT = 1e-12
DAMPING, DECAY = 0.03, 0.7
RNG = np.random.default_rng(3)
REAL = {"w": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4)}
MIXED = REAL | {"w": RNG.normal(size=(3, 4, 2)) @ [1, 1j]}
X = RNG.normal(size=(7, 3))


def real(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ jnp.arange(8.0).reshape(4, 2)


def wave(params, x):
    return jnp.sum(jnp.log(jnp.cosh((1 + 2j) * (x @ params["w"]) + params["b"])), -1)


def not_holomorphic(params, x):
    return wave(params, x) + 0.3j * jnp.abs(x @ params["w"]).sum(-1) ** 2


CASES = {
    "real outputs": (real, REAL),
    "complex outputs": (wave, REAL),
    "complex and real leaves": (wave, MIXED),
    "not holomorphic": (not_holomorphic, MIXED),
    "real outputs of complex leaves": (lambda p, x: jnp.abs(wave(p, x)), MIXED),
}


def coordinates(params):
    """Real and imaginary parts as one vector, and back."""
    halves = jax.tree.map(lambda x: (jnp.real(x), jnp.imag(x)), params)
    flat, unravel = ravel_pytree(halves)

    def back(v):
        pairs = jax.tree.structure(params).flatten_up_to(unravel(v))
        leaves = [
            a + 1j * b if jnp.iscomplexobj(x) else a
            for x, (a, b) in zip(jax.tree.leaves(params), pairs, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    return flat, back


def dense_step(fn, params, gradient, previous, weights, centered):
    """One step of the published recursion, densely, over real and imaginary parts."""
    flat, back = coordinates(params)
    rows = jax.jacfwd(lambda v: jnp.ravel(fn(back(v), X)))(flat)
    share = np.ones(len(rows)) if weights is None else np.asarray(weights)
    share = share / share.sum()
    rows = rows - share @ rows if centered else rows
    metric = np.real(rows.conj().T @ (share[:, None] * rows)) + DAMPING * np.eye(len(flat))
    start = DECAY * coordinates(previous)[0]
    right = coordinates(gradient)[0] - (metric @ start - DAMPING * start)
    return np.linalg.solve(metric, right) + start


def gradient_like(params, seed):
    rng = np.random.default_rng(seed)

    def one(x):
        parts = rng.normal(size=(*x.shape, 2))
        return jnp.asarray(parts @ [1, 1j] if jnp.iscomplexobj(x) else parts[..., 0])

    return jax.tree.map(one, params)


def check(fn, params, branches_of, solver, weights, centered):
    tx = optax_curv.scale_by_branch_fisher(
        DAMPING, solver=solver, centered=centered, momentum=DECAY, max_iters=300, tol=1e-14
    )

    @jax.jit
    def step(params, gradient, state, x, weights):
        return tx.update(gradient, state, params, branches=branches_of(params, x), weights=weights)

    state, previous = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for seed in (0, 1):
        gradient = gradient_like(params, seed)
        expected = dense_step(fn, params, gradient, previous, weights, centered)
        previous, state = step(params, gradient, state, jnp.asarray(X), weights)
        found = coordinates(previous)[0]
        assert np.abs(found - expected).max() < EXACT * np.abs(expected).max() / DAMPING
    assert int(state.total_notfinite) == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("solver", "chunk_size", "weighted", "centered"),
    [
        ("woodbury", 3, False, True),
        ("woodbury", None, True, True),
        ("cholesky", 3, True, True),
        ("cg", 2, False, False),
    ],
)
def test_lazy_rows_are_the_rows(case, solver, chunk_size, weighted, centered, x64):
    fn, params = CASES[case]
    params = jax.tree.map(jnp.asarray, params)
    rows = 14 if case == "real outputs" else 7
    weights = jnp.asarray(RNG.uniform(size=rows)) if weighted else None

    def branches_of(params, x):
        return optax_curv.lazy_rows(fn, params, x, chunk_size=chunk_size)

    check(fn, params, branches_of, solver, weights, centered)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", ["woodbury", "cholesky"])
def test_stored_rows_are_centred_piece_by_piece(case, solver, x64, monkeypatch):
    monkeypatch.setattr(metric_room, "CHUNK", 25)
    fn, params = CASES[case]
    params = jax.tree.map(jnp.asarray, params)
    rows = 14 if case == "real outputs" else 7
    weights = jnp.asarray(RNG.uniform(size=rows))
    check(fn, params, optax_curv.jacobian_rows(fn), solver, weights, True)


@pytest.mark.parametrize("lazy", [True, False])
def test_rows_of_weight_zero_are_as_if_left_out(lazy, x64):
    params = jax.tree.map(jnp.asarray, MIXED)
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0])
    tx = optax_curv.scale_by_branch_fisher(DAMPING, solver="woodbury")
    gradient = gradient_like(params, 0)

    def direction(x, weights):
        rows = (
            optax_curv.lazy_rows(wave, params, x, chunk_size=2)
            if lazy
            else optax_curv.jacobian_rows(wave)(params, x)
        )
        return tx.update(gradient, tx.init(params), branches=rows, weights=weights)[0]

    kept = weights > 0
    whole, left = direction(X, weights), direction(X[kept], weights[kept])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), whole, left)


def test_a_large_mean_costs_no_more_than_its_own_rounding():
    """Rows 1e3 from zero with a spread of one, in float32: the kernel is made of centred rows."""
    count, size = 60, 72
    fn = lambda w, x: (x + 1e3) @ w  # noqa: E731
    x = jnp.asarray(RNG.normal(size=(count, size)), jnp.float32)
    gradient = jnp.asarray(x.T @ RNG.normal(size=count) / count, jnp.float32)
    tx = optax_curv.scale_by_branch_fisher(1e-1, solver="woodbury")
    exact = np.asarray(x + 1e3, np.float64)
    exact -= exact.mean(0)
    metric = exact.T @ exact / count + 1e-1 * np.eye(size)
    expected = np.linalg.solve(metric, np.asarray(gradient))
    for rows in (
        optax_curv.lazy_rows(fn, jnp.zeros(size), x, chunk_size=25),
        optax_curv.jacobian_rows(fn)(jnp.zeros(size), x),
    ):
        found, _ = tx.update(gradient, tx.init(gradient), branches=rows)
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_examples_may_be_sharded_over_a_mesh(x64):
    params = jax.tree.map(jnp.asarray, MIXED)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.tile(X, (8, 1))[:48] + RNG.normal(size=(48, 3)))
    tx = optax_curv.scale_by_branch_fisher(DAMPING, solver="woodbury")
    gradient = gradient_like(params, 0)

    @jax.jit
    def direction(x):
        rows = optax_curv.lazy_rows(not_holomorphic, params, x, chunk_size=16)
        return tx.update(gradient, tx.init(params), branches=rows)[0]

    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=EXACT / DAMPING),
        direction(placed),
        direction(x),
    )


def test_lazy_rows_that_cannot_be_are_refused():
    tx = optax_curv.scale_by_branch_fisher(DAMPING)
    rows = optax_curv.lazy_rows(real, REAL, X)
    with pytest.raises(ValueError, match=r"the gradients .* the parameters of lazy rows"):
        tx.update({"w": REAL["w"]}, tx.init({"w": REAL["w"]}), branches=rows)
    with pytest.raises(ValueError, match=r"lazy_rows: expected arrays with one leading axis"):
        optax_curv.lazy_rows(real, REAL, X[:0])
    with pytest.raises(ValueError, match=r"lazy_rows: .*jax.vmap\(fn, \(None, 0\)\)"):
        optax_curv.lazy_rows(lambda p, x: real(p, x)[0], REAL, X)
    with pytest.raises(ValueError, match=r"positive chunk_size, got chunk_size=0"):
        optax_curv.lazy_rows(real, REAL, X, chunk_size=0)
    with pytest.raises(ValueError, match=r"weights \[K\], one number for each of the K = 14"):
        tx.update(REAL, tx.init(REAL), branches=rows, weights=jnp.ones(7))


@pytest.mark.parametrize("lazy", [True, False])
def test_no_second_copy_of_the_rows_is_made(lazy):
    """Of a compiled step with 256 rows of 65,536 numbers, 64 MiB."""
    params = jax.ShapeDtypeStruct((128, 512), jnp.float32)
    rows = jax.ShapeDtypeStruct((256, 128, 512), jnp.float32)
    x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    tx = optax_curv.scale_by_branch_fisher(DAMPING, solver="auto", momentum=DECAY)

    def fn(w, x):
        return jnp.sum(jnp.tanh(x @ w), -1)

    def step(gradient, given):
        rows = optax_curv.lazy_rows(fn, gradient, given, chunk_size=32) if lazy else given
        return tx.update(gradient, tx.init(gradient), branches=rows)[0]

    compiled = jax.jit(step).lower(params, x if lazy else rows).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (0.45 if lazy else 0.3) * 2**26
