"""Branch Fisher in parameter space: natural gradient and Gauss-Newton against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv
from optax_curv.preconditioners._branches import solve as row_room

FLOAT64 = 1e-8  # relative to the dense solution
FLOAT32 = 1e-4
CLOSED_FORM = 1e-9
ONE_STEP = 1e-7  # a linear least-squares problem of condition 10 with damping 1e-10

SHAPES = {"a": (3,), "b": (2, 2), "c": ()}
SIZE = 8


def tree(array):
    """[..., 8] -> a tree of [..., *shape]."""
    parts, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        parts[name] = jnp.asarray(
            array[..., start : start + size].reshape((*array.shape[:-1], *shape))
        )
        start += size
    return parts


def flat(parts):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(parts)])


def low_rank(count, rank, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, rank)) @ rng.normal(size=(rank, SIZE)), rng.normal(size=SIZE)


def dense_direction(rows, gradient, damping, centered):
    """(F + λI)⁻¹ g by the singular values of the rows, which loses nothing at small λ."""
    rows = (rows - rows.mean(0)) / np.sqrt(len(rows)) if centered else rows / np.sqrt(len(rows))
    _, s, vt = np.linalg.svd(rows, full_matrices=True)
    eigenvalues = np.zeros(SIZE)
    eigenvalues[: len(s)] = s**2 * (s > 1e-12 * s.max(initial=0))
    return vt.T @ ((vt @ gradient) / (eigenvalues + damping))


@pytest.mark.parametrize("solver", ["woodbury", "cholesky", "cg"])
@pytest.mark.parametrize(
    ("count", "rank", "centered"),
    [(3, 3, False), (8, 8, False), (20, 8, True), (20, 3, False), (1, 1, True)],
)
def test_every_solver_equals_the_dense_one_over_thirteen_decades_of_damping(
    solver, count, rank, centered, x64
):
    rows, gradient = low_rank(count, rank)

    def one(damping):
        tx = optax_curv.scale_by_branch_fisher(
            damping, solver=solver, max_iters=400, tol=0.0, centered=centered
        )
        return tx.update(tree(gradient), tx.init(tree(gradient)), branches=tree(rows))[0]

    dampings = np.array([1e-10, 1e-6, 1e-3, 1.0, 1e3])
    found = jax.jit(jax.vmap(one))(dampings)
    for i, damping in enumerate(dampings):
        dense = dense_direction(rows, gradient, damping, centered)
        error = np.abs(flat(jax.tree.map(lambda x: x[i], found)) - dense).max()  # noqa: B023
        assert error < FLOAT64 * np.abs(dense).max()


@pytest.mark.parametrize("solver", ["woodbury", "cholesky"])
def test_float32_and_mixed_dtypes_stay_near_and_keep_their_dtype(solver):
    rows, gradient = low_rank(5, 5)
    grads = tree(gradient.astype(np.float32)) | {"a": jnp.asarray(gradient[:3], jnp.bfloat16)}
    tx = optax_curv.scale_by_branch_fisher(1e-2, solver=solver, centered=False, momentum=0.5)
    state = tx.init(grads)
    direction, after = jax.jit(tx.update)(grads, state, branches=tree(rows.astype(np.float32)))
    dense = dense_direction(
        rows, flat(jax.tree.map(lambda g: g.astype(jnp.float32), grads)), 1e-2, False
    )
    assert jax.tree.map(jnp.result_type, direction) == jax.tree.map(jnp.result_type, grads)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    np.testing.assert_allclose(flat(after.previous), dense, atol=FLOAT32 * np.abs(dense).max())


def test_gauss_newton_solves_linear_least_squares_in_one_step(x64):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(30, SIZE)), rng.normal(size=30)
    params = tree(rng.normal(size=SIZE))

    def residual(params, batch):
        return (
            batch[0] @ jnp.concatenate([params["a"], params["b"].ravel(), params["c"][None]])
            - batch[1]
        )

    value_grad_and_rows = optax_curv.residual_rows(residual)
    tx = optax_curv.branch_fisher(1.0, 1e-10, solver="auto", centered=False)

    @jax.jit
    def step(params):
        _, grads, rows = value_grad_and_rows(params, (inputs, targets))
        updates, _ = tx.update(grads, tx.init(params), params, branches=rows)
        return optax.apply_updates(params, updates)

    solution = np.linalg.lstsq(inputs, targets)[0]
    np.testing.assert_allclose(flat(step(params)), solution, atol=ONE_STEP)


def expected_fisher_rows(log_prob, theta, outcomes):
    """Rows √(K p_y) ∇ log p(y), whose mean outer product is the Fisher matrix."""
    probability = jnp.exp(jax.vmap(log_prob, (None, 0))(theta, outcomes))
    scores = jax.vmap(jax.grad(log_prob), (None, 0))(theta, outcomes)
    return jnp.sqrt(len(outcomes) * probability)[:, None] * scores


def test_natural_gradients_equal_their_closed_forms(x64):
    gradient, damping = np.array([0.3, -0.7, 0.2]), 1e-12
    tx = optax_curv.scale_by_branch_fisher(damping, solver="cholesky", centered=False)

    def direction(rows, g):
        return np.asarray(
            jax.jit(tx.update)({"t": g}, tx.init({"t": g}), branches={"t": rows})[0]["t"]
        )

    logits = jnp.array([0.5, -1.0, 2.0])
    p = 1 / (1 + np.exp(-logits))  # three Bernoulli variables: F = p (1 - p)
    corners = jnp.array(np.meshgrid(*[[0.0, 1.0]] * 3)).reshape(3, -1).T
    rows = expected_fisher_rows(lambda t, y: jnp.sum(y * t - jnp.logaddexp(t, 0)), logits, corners)
    np.testing.assert_allclose(
        direction(rows, gradient), gradient / (p * (1 - p)), rtol=CLOSED_FORM
    )

    free = jnp.array(
        [0.2, -0.4, 0.1]
    )  # a categorical with the last logit fixed: F = diag(p) - p pᵀ
    rows = expected_fisher_rows(
        lambda t, y: jax.nn.log_softmax(jnp.append(t, 0.0))[y], free, jnp.arange(4)
    )
    p = np.asarray(jax.nn.softmax(jnp.append(free, 0.0)))
    np.testing.assert_allclose(
        direction(rows, gradient), gradient / p[:3] + gradient.sum() / p[3], rtol=CLOSED_FORM
    )

    # A Gaussian's mean and log scale: F = diag(1 / σ², 2), its rows at ±√3 σ and 0 (exact
    # quadrature of degree 5).
    sigma = 0.5
    nodes, weights = sigma * np.sqrt(3) * np.array([-1, 0, 1]), np.array([1, 4, 1]) / 6
    scores = np.stack([nodes / sigma**2, nodes**2 / sigma**2 - 1], axis=1)
    rows = jnp.asarray(np.sqrt(3 * weights)[:, None] * scores)
    np.testing.assert_allclose(
        direction(rows, gradient[:2]), gradient[:2] * [sigma**2, 0.5], rtol=CLOSED_FORM
    )


def test_the_direction_does_not_depend_on_linear_coordinates(x64):
    rows, gradient = low_rank(30, SIZE)
    mixing = np.random.default_rng(5).normal(
        size=(SIZE, SIZE)
    )  # θ = mixing φ: gradients in φ are mixingᵀ g
    tx = optax_curv.scale_by_branch_fisher(1e-13, solver="cholesky", centered=False)
    step = jax.jit(tx.update)
    theta, _ = step(tree(gradient), tx.init(tree(gradient)), branches=tree(rows))
    phi, _ = step(tree(gradient @ mixing), tx.init(tree(gradient)), branches=tree(rows @ mixing))
    np.testing.assert_allclose(mixing @ flat(phi), flat(theta), rtol=1e-6)


def test_momentum_is_the_published_spring_recursion(x64):
    damping, decay, rng = 0.01, 0.9, np.random.default_rng(0)
    tx = optax_curv.scale_by_branch_fisher(
        damping, solver="woodbury", centered=False, momentum=decay
    )
    state, step, phi = tx.init(tree(np.zeros(SIZE))), jax.jit(tx.update), np.zeros(SIZE)
    for _ in range(4):
        rows, epsilon = rng.normal(size=(5, SIZE)), rng.normal(size=5)
        scaled = rows / np.sqrt(5)  # Ō of the paper; the gradient is Ōᵀ ε̄
        zeta = np.linalg.solve(
            scaled @ scaled.T + damping * np.eye(5), epsilon - decay * scaled @ phi
        )
        phi = scaled.T @ zeta + decay * phi
        direction, state = step(tree(scaled.T @ epsilon), state, branches=tree(rows))
        np.testing.assert_allclose(flat(direction), phi, rtol=0, atol=FLOAT64)
    assert int(state.count) == 4


def test_a_sweep_over_damping_and_momentum_equals_single_runs():
    rows, gradient = (x.astype(np.float32) for x in low_rank(5, 5))

    def run(damping, momentum):
        tx = optax_curv.scale_by_branch_fisher(damping, solver="auto", momentum=momentum)
        state = tx.init(tree(gradient))
        for _ in range(2):
            direction, state = tx.update(tree(gradient), state, branches=tree(rows))
        return direction

    swept = jax.jit(jax.vmap(run))(jnp.array([0.1, 1.0]), jnp.array([0.0, 0.9]))
    for i, pair in enumerate([(0.1, 0.0), (1.0, 0.9)]):
        alone = flat(jax.jit(run)(*pair))
        np.testing.assert_allclose(flat(jax.tree.map(lambda x: x[i], swept)), alone, rtol=FLOAT32)  # noqa: B023
    plain = optax_curv.scale_by_branch_fisher(0.1, solver="auto")
    expected, _ = jax.jit(plain.update)(
        tree(gradient), plain.init(tree(gradient)), branches=tree(rows)
    )
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda x: x[0], swept)), flat(expected), rtol=FLOAT32
    )


def test_a_nan_row_gives_a_zero_update_and_leaves_the_state():
    rows, gradient = (x.astype(np.float32) for x in low_rank(5, 5))
    tx = optax_curv.scale_by_branch_fisher(0.1, solver="auto", momentum=0.9)
    step = jax.jit(tx.update)
    _, state = step(tree(gradient), tx.init(tree(gradient)), branches=tree(rows))
    rows[2, 1] = np.nan
    updates, after = step(tree(gradient), state, branches=tree(rows))
    assert not np.any(flat(updates))
    jax.tree.map(np.testing.assert_array_equal, after, state._replace(total_notfinite=jnp.int32(1)))


def complex_low_rank(count, rank):
    (real, gradient), (imaginary, other) = low_rank(count, rank), low_rank(count, rank, seed=1)
    return real + 1j * imaginary, gradient + 1j * other


@pytest.mark.parametrize("solver", ["woodbury", "cholesky", "cg"])
@pytest.mark.parametrize(
    ("count", "rank", "centered"), [(3, 3, False), (20, 8, True), (6, 2, False)]
)
def test_complex_rows_make_the_real_or_the_full_complex_metric(solver, count, rank, centered, x64):
    rows, gradient = complex_low_rank(count, rank)
    centred = rows - rows.mean(0) if centered else rows
    metric = centred.conj().T @ centred / count
    damping = 1e-3
    for kind, g, m in (("real", gradient.real, metric.real), ("full", gradient, metric)):
        options = {
            "solver": solver,
            "max_iters": 400,
            "tol": 0.0,
            "centered": centered,
            "complex_metric": kind,
        }
        tx = optax_curv.scale_by_branch_fisher(damping, **options)
        state = tx.init(tree(g))
        direction, after = jax.jit(tx.update)(tree(g), state, branches=tree(rows))
        dense = np.linalg.solve(m + damping * np.eye(SIZE), g)
        np.testing.assert_allclose(
            flat(direction), dense, rtol=0, atol=FLOAT64 * np.abs(dense).max()
        )
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_complex_momentum_is_the_same_recursion(x64):
    damping, decay, phi = 0.01, 0.9, np.zeros(SIZE, complex)
    tx = optax_curv.scale_by_branch_fisher(
        damping, solver="auto", centered=False, momentum=decay, complex_metric="full"
    )
    state, step = tx.init(tree(phi)), jax.jit(tx.update)
    for count in (5, 5, 5):
        rows, gradient = complex_low_rank(count, count)
        metric = rows.conj().T @ rows / count
        phi = (
            np.linalg.solve(metric + damping * np.eye(SIZE), gradient - decay * metric @ phi)
            + decay * phi
        )
        direction, state = step(tree(gradient), state, branches=tree(rows))
        np.testing.assert_allclose(flat(direction), phi, rtol=0, atol=FLOAT64 * np.abs(phi).max())


def test_complex_gauss_newton_solves_complex_least_squares_in_one_step(x64):
    rng = np.random.default_rng(0)
    inputs, targets, w = (
        rng.normal(size=(*shape, 2)) @ [1, 1j] for shape in ((30, 4), (30,), (4,))
    )
    predict = jax.jit(lambda w, x: x @ w)
    rows = optax_curv.jacobian_rows(predict)(w, inputs)
    np.testing.assert_allclose(rows, inputs, rtol=CLOSED_FORM)
    ascent = jax.grad(lambda w: 0.5 * jnp.mean(jnp.abs(predict(w, inputs) - targets) ** 2))(
        w
    ).conj()
    tx = optax_curv.scale_by_branch_fisher(
        1e-10, solver="auto", centered=False, complex_metric="full"
    )
    direction, _ = tx.update({"w": ascent}, tx.init({"w": w}), branches={"w": rows})
    np.testing.assert_allclose(
        w - direction["w"], np.linalg.lstsq(inputs, targets)[0], atol=ONE_STEP
    )


def test_the_real_metric_of_a_wavefunction_is_the_real_part_of_its_geometric_tensor(x64):
    """Re ⟨∂ψ|(1 - |ψ⟩⟨ψ|)|∂ψ⟩ of normalised states, from rows of log ψ over all of a basis."""
    rng = np.random.default_rng(0)
    features, theta = rng.normal(size=(6, SIZE, 2)) @ [1, 1j], rng.normal(size=SIZE)

    def log_psi(params, basis):
        return jnp.tanh(
            basis @ jnp.concatenate([params["a"], params["b"].ravel(), params["c"][None]])
        )

    def state(theta):
        psi = jnp.exp(log_psi(tree(theta), features))
        return psi / jnp.linalg.norm(psi)

    probability, jacobian = np.abs(state(theta)) ** 2, jax.jacfwd(state)(theta)
    overlap = state(theta).conj() @ jacobian
    tensor = jacobian.conj().T @ jacobian - np.outer(overlap.conj(), overlap)
    rows = optax_curv.jacobian_rows(log_psi)(tree(theta), features)
    mean = jax.tree.map(lambda row: jnp.tensordot(probability, row, 1), rows)
    weighted = jax.tree.map(
        lambda row, m: jnp.sqrt(6 * probability).reshape(-1, *[1] * m.ndim) * (row - m), rows, mean
    )
    gradient, damping = rng.normal(size=SIZE), 0.01
    tx = optax_curv.scale_by_branch_fisher(
        damping, solver="auto", centered=False, complex_metric="real"
    )
    direction, _ = tx.update(tree(gradient), tx.init(tree(theta)), branches=weighted)
    dense = np.linalg.solve(tensor.real + damping * np.eye(SIZE), gradient)
    np.testing.assert_allclose(flat(direction), dense, rtol=CLOSED_FORM)


def test_rows_of_a_single_array_of_parameters(x64):
    rng = np.random.default_rng(0)
    rows, gradient = rng.normal(size=(4, 2, 3)), jnp.asarray(rng.normal(size=(2, 3)))
    tx = optax_curv.scale_by_branch_fisher(0.1, solver="auto")
    bare, _ = tx.update(gradient, tx.init(gradient), branches=rows)
    wrapped, _ = tx.update({"w": gradient}, tx.init({"w": gradient}), branches={"w": rows})
    np.testing.assert_array_equal(bare, wrapped["w"])


def test_bad_rows_are_refused():
    rows, gradient = (x.astype(np.float32) for x in low_rank(5, 5))
    tx, grads, rows = optax_curv.scale_by_branch_fisher(), tree(gradient), tree(rows)
    state = tx.init(grads)
    with pytest.raises(ValueError, match=r"are the tree PyTreeDef.*expected that of the gradients"):
        tx.update(grads, state, branches={"a": rows["a"]})
    for wrong in (rows | {"b": rows["b"][:3]}, rows | {"a": rows["a"][:, :2]}):
        with pytest.raises(ValueError, match=r"have the shapes .* leading axis K in front"):
            tx.update(grads, state, branches=wrong)
    with pytest.raises(ValueError, match=r"no rows \(K = 0\)"):
        tx.update(grads, state, branches=jax.tree.map(lambda x: x[:0], rows))
    complex_rows = jax.tree.map(lambda x: x * 1j, rows)
    full = optax_curv.scale_by_branch_fisher(complex_metric="full")
    with pytest.raises(
        ValueError, match=r"expected complex gradients with complex_metric='full', got .*float32"
    ):
        full.update(grads, full.init(grads), branches=complex_rows)
    with pytest.raises(
        ValueError, match=r"expected real gradients for branches \[K, D\], got complex"
    ):
        full.update(complex_rows, full.init(complex_rows), branches=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"unknown complex_metric='hermitian'"):
        optax_curv.scale_by_branch_fisher(complex_metric="hermitian")
    real = optax_curv.scale_by_branch_fisher(complex_metric="real")
    with pytest.raises(ValueError, match=r"\['a'\] has dtype complex"):
        real.init(complex_rows)
    with pytest.raises(ValueError, match=r"parameter space take no projection"):
        tx.update(grads, state, branches=rows, projection=jnp.ones((SIZE, 2)))


def complex_function(params, x):
    """Neither holomorphic in z nor without a real leaf."""
    wave = jnp.sin(x[:, None] * params["z"]) @ params["z"] ** 2
    return wave + 0.3j * jnp.abs(x[:, None] * params["z"]).sum(1) ** 2 * params["r"]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_split_rows_are_solved_over_real_and_imaginary_parts(centered, momentum, weighted, x64):
    rng = np.random.default_rng(0)
    params = {"z": jnp.asarray(rng.normal(size=(3, 2)) @ [1, 1j]), "r": jnp.asarray(0.7)}
    x = jnp.asarray(rng.normal(size=12))
    weights = jnp.asarray(rng.uniform(size=12)) if weighted else None
    tx = optax_curv.scale_by_branch_fisher(0.1, solver="auto", centered=centered, momentum=momentum)
    state, step = tx.init(params), jax.jit(tx.update)

    def rows_of(v):
        z = {"z": v[1:4] + 1j * v[4:], "r": v[0]}
        return complex_function(z, x)

    v = jnp.concatenate([params["r"][None], params["z"].real, params["z"].imag])
    rows = jax.jacfwd(rows_of)(v)
    share = np.ones(12) / 12 if weights is None else weights / weights.sum()
    rows = rows - share @ rows if centered else rows
    metric = np.real(rows.conj().T @ (share[:, None] * rows))
    previous = np.zeros(7)
    for _ in range(2):
        gradient = rng.normal(size=7)
        grads = {"z": gradient[1:4] + 1j * gradient[4:], "r": jnp.asarray(gradient[0])}
        branches = optax_curv.jacobian_rows(complex_function)(params, x)
        direction, state = step(grads, state, params, branches=branches, weights=weights)
        mu = momentum or 0
        right = gradient - mu * metric @ previous
        previous = np.linalg.solve(metric + 0.1 * np.eye(7), right) + mu * previous
        found = np.concatenate([direction["r"][None], direction["z"].real, direction["z"].imag])
        np.testing.assert_allclose(found, previous, atol=FLOAT64)
    assert int(state.total_notfinite) == 0


def test_no_choice_of_the_metric_is_needed(x64):
    rows, gradient = complex_low_rank(5, 5)
    for kind, g in (("full", gradient), ("real", gradient.real)):
        named = optax_curv.scale_by_branch_fisher(0.1, solver="auto", complex_metric=kind)
        plain = optax_curv.scale_by_branch_fisher(0.1, solver="auto")
        one, other = (
            tx.update(tree(g), tx.init(tree(g)), branches=tree(rows))[0] for tx in (named, plain)
        )
        np.testing.assert_allclose(flat(one), flat(other), rtol=CLOSED_FORM)


def test_split_gradients_are_refused_with_advice():
    tx = optax_curv.scale_by_branch_fisher(0.1)
    params = {"z": jnp.ones(2, complex)}
    split = {"z": optax_curv.SplitRows(jnp.ones(2), jnp.ones(2))}
    with pytest.raises(ValueError, match=r"not holomorphic.*its two halves"):
        tx.update(split, tx.init(params), params, branches=None)


def test_a_vector_of_parameters_and_rows_of_its_length_are_parameter_space(x64):
    rng = np.random.default_rng(0)
    rows, gradient = jnp.asarray(rng.normal(size=(4, 6))), jnp.asarray(rng.normal(size=6))
    tx = optax_curv.scale_by_branch_fisher(0.1, solver="auto")
    bare, _ = tx.update(gradient, tx.init(gradient), branches=rows)
    wrapped, _ = tx.update({"w": gradient}, tx.init({"w": gradient}), branches={"w": rows})
    np.testing.assert_array_equal(bare, wrapped["w"])
    given = {"branches": rows, "projection": jnp.eye(6)}
    state_space, _ = tx.update(gradient, tx.init(gradient), **given)
    assert np.abs(bare - state_space).max() > 0.1


@pytest.mark.parametrize("iterations", [200, 1])
def test_beyond_the_dense_solvers_auto_iterates_to_a_tolerance_and_counts_failures(
    iterations, monkeypatch, x64
):
    monkeypatch.setattr(row_room, "DENSE_UP_TO", 4)
    monkeypatch.setattr(row_room, "AUTO_ITERS", iterations)
    rows, gradient = low_rank(20, 8)
    tx = optax_curv.scale_by_branch_fisher(1e-3, solver="auto", centered=False)
    direction, state = tx.update(tree(gradient), tx.init(tree(gradient)), branches=tree(rows))
    dense = dense_direction(rows, gradient, 1e-3, False)
    error = np.linalg.norm(flat(direction) - dense) / np.linalg.norm(dense)
    assert (error < 1e-2) == (iterations == 200)
    assert int(state.unconverged) == (iterations == 1)


@pytest.mark.parametrize("ddof", [None, 0, 1])
def test_centred_rows_divide_by_k_unless_ddof_says_otherwise(ddof, x64):
    rows, gradient = low_rank(6, 6)
    options = {} if ddof is None else {"ddof": ddof}
    tx = optax_curv.scale_by_branch_fisher(0.1, solver="auto", **options)
    direction, _ = tx.update(tree(gradient), tx.init(tree(gradient)), branches=tree(rows))
    metric = np.cov(rows.T, ddof=ddof or 0)
    np.testing.assert_allclose(
        flat(direction), np.linalg.solve(metric + 0.1 * np.eye(SIZE), gradient), rtol=CLOSED_FORM
    )


@pytest.mark.parametrize(("count", "rank"), [(5, 5), (5, 3), (20, 8), (20, 4)])
def test_row_diagnostics_are_those_of_the_singular_values(count, rank, x64):
    rows, gradient = low_rank(count, rank)
    found = optax_curv.row_diagnostics(
        tree(gradient), 1e-2, branches=tree(rows), centered=False, weights=jnp.ones(count)
    )
    values = np.linalg.svd(rows / np.sqrt(count), compute_uv=False) ** 2
    assert int(found.rank) == rank
    np.testing.assert_allclose(found.largest, values[0], rtol=CLOSED_FORM)
    np.testing.assert_allclose(found.smallest, values[-1], atol=CLOSED_FORM * values[0])
    assert float(found.residual) < CLOSED_FORM
