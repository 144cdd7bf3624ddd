import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from optax_curv import linalg

FLOOR = 1e-12
GOLDEN_TOLERANCE = 1e-9  # relative, as the reference's notes suggest
GOLDEN_RESIDUAL_NOISE = (
    1e-12  # of the right-hand side: what is left of it after convergence is rounding
)
SOLVE_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5
PROGRESS_TOLERANCE = (
    1e-5  # a slow solve's value after some fifty iterations, each of which spreads rounding
)


@jax.jit
def dense_cg(a, b, max_iters=50, tol=0.0, atol=0.0, floor=0.0):
    """The solve, with every number a tracer."""
    return linalg.conjugate_gradient(
        lambda v: a @ v, b, max_iters=max_iters, tol=tol, atol=atol, floor=floor
    )


SPD = spectra.symmetric(spectra.rotation(np.random.default_rng(0), 6), np.linspace(1, 5, 6))
RIGHT = np.random.default_rng(1).standard_normal(6)


@pytest.mark.parametrize("name", golden.cases("branch_natural.npz"))
def test_guarded_mode_is_the_originals_rule(x64, name):
    case = golden.case("branch_natural.npz", name)
    for step in np.flatnonzero(case["has_branches"]):
        operator = jnp.asarray(case["cov"][step] + case["damping"] * np.eye(case["cov"].shape[-1]))
        for limit in range(int(case["cg_iters"]) + 1):
            x, info = dense_cg(
                operator, case["g_state"][step], max_iters=limit, atol=1e-6, floor=FLOOR
            )
            if limit and info.iterations == limit:
                expected = case["cg_residual_norms"][step][limit - 1]
                noise = GOLDEN_RESIDUAL_NOISE * np.linalg.norm(case["g_state"][step])
                np.testing.assert_allclose(
                    info.residual_norm, expected, rtol=GOLDEN_TOLERANCE, atol=noise
                )
        assert info.iterations == case["cg_operator_calls"][step]
        largest = np.abs(case["v_star"][step]).max()
        np.testing.assert_allclose(x, case["v_star"][step], rtol=0, atol=GOLDEN_TOLERANCE * largest)


@spectra.PROPERTY
@given(
    spectrum=spectra.spectra(kinds=("condition", "clustered"), sizes=(1, 5)),
    iterations=st.integers(0, 8),
)
def test_error_shrinks_as_the_condition_promises(x64, spectrum, iterations):
    rotated, values = spectrum
    truth = rotated.sum(axis=1)
    x, info = dense_cg(
        spectra.symmetric(*spectrum), spectra.symmetric(*spectrum) @ truth, iterations
    )

    def energy(error):
        return np.sqrt(np.sum(values * (rotated.T @ error) ** 2))

    root = np.sqrt(values.max() / values.min())
    assert info.iterations <= iterations
    assert energy(x - truth) <= (
        2 * ((root - 1) / (root + 1)) ** iterations + SOLVE_TOLERANCE
    ) * energy(truth)


@spectra.PROPERTY
@given(spectrum=spectra.spectra(kinds=("rank_deficient", "zero"), sizes=(1, 5)))
def test_singular_systems_with_a_solution_are_solved(x64, spectrum):
    a = spectra.symmetric(*spectrum)
    b = a @ np.ones(len(a))
    x, info = dense_cg(a, b, tol=SOLVE_TOLERANCE)
    assert np.linalg.norm(a @ x - b) <= 2 * SOLVE_TOLERANCE * np.linalg.norm(b)
    assert info.iterations <= len(a)


def test_relative_and_absolute_tolerance_stop_whichever_is_looser(x64):
    for options in (
        {"tol": 0.05},
        {"atol": 0.05},
        {"tol": 1e-8, "atol": 0.05},
        {"tol": 0.05, "atol": 1e-8},
    ):
        limit = max(options.get("tol", 0) * np.linalg.norm(RIGHT), options.get("atol", 0))
        x, info = dense_cg(SPD, RIGHT, **options)
        assert 0 < info.iterations < 6
        assert (
            info.residual_norm
            <= limit
            < dense_cg(SPD, RIGHT, int(info.iterations) - 1)[1].residual_norm
        )
        np.testing.assert_allclose(
            info.residual_norm, np.linalg.norm(RIGHT - SPD @ x), rtol=SOLVE_TOLERANCE
        )
    assert info.iterations.dtype == jnp.int32 and info.residual_norm.dtype == jnp.float64


@pytest.mark.parametrize("floor", [0.0, FLOOR])
def test_zero_right_hand_side_gives_zero(floor):
    for matrix in (jnp.eye(3), jnp.zeros((3, 3))):
        x, info = dense_cg(matrix, jnp.zeros(3), floor=floor)
        np.testing.assert_array_equal(x, np.zeros(3))
        assert info.residual_norm == 0
    x, info = dense_cg(jnp.zeros((3, 3)), jnp.ones(3), floor=floor)
    assert np.all(np.isfinite(x)) and np.isfinite(info.residual_norm)


@pytest.mark.parametrize("floor", [0.0, FLOOR])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_ends_the_solve_at_once_and_shows(floor, bad):
    x, info = dense_cg(jnp.eye(3), jnp.array([1.0, bad, 1.0]), tol=1e-6, floor=floor)
    assert np.any(np.isnan(x)) and info.iterations <= 1
    x, info = dense_cg(jnp.eye(3) * bad, jnp.ones(3), tol=1e-6, floor=floor)
    assert info.iterations <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_iteration_that_is_not_finite_may_be_left_out(bad):
    def solve(b, limit, matvec=lambda v: jnp.asarray(SPD, jnp.float32) @ v):
        return linalg.conjugate_gradient(matvec, b, x0=start, max_iters=limit, keep_finite=True)

    start, b = jnp.ones(6), jnp.asarray(RIGHT, jnp.float32)
    for broken in (solve(b.at[1].set(bad), 9), solve(b, 9, lambda v: bad * v)):
        np.testing.assert_array_equal(broken[0], start)
        assert broken[1].iterations <= 1 and not np.isfinite(broken[1].residual_norm)

    def breaks_late(
        v,
    ):  # the residual before the first iteration, then directions that grow shorter
        return jnp.where(jnp.linalg.norm(v) < 0.3 * jnp.linalg.norm(b), bad, 1.0) * (
            jnp.asarray(SPD, jnp.float32) @ v
        )

    x, info = solve(b, 9, breaks_late)
    taken = int(info.iterations) - 1
    assert 1 <= taken < 8 and not np.isfinite(info.residual_norm)
    np.testing.assert_array_equal(x, solve(b, taken)[0])


def test_pytrees_of_mixed_types_are_one_system(x64):
    b = {"scalar": jnp.float32(2), "pair": (jnp.ones((2, 2)), None), "empty": jnp.ones((0, 3))}
    x, info = linalg.conjugate_gradient(
        lambda v: jax.tree.map(lambda leaf: 4 * leaf, v), b, max_iters=9, tol=1e-6
    )
    assert jax.tree.structure(x) == jax.tree.structure(b)
    assert jax.tree.map(lambda leaf: leaf.dtype, x) == jax.tree.map(lambda leaf: leaf.dtype, b)
    np.testing.assert_allclose(x["scalar"], 0.5)
    np.testing.assert_allclose(x["pair"][0], np.full((2, 2), 0.25))
    assert info.iterations == 1
    assert linalg.conjugate_gradient(lambda v: v, {}, max_iters=3)[0] == {}


def test_lanes_that_are_done_keep_their_solution(x64):
    right = np.stack([RIGHT, 0 * RIGHT, np.linalg.eigh(SPD)[1][:, 2], RIGHT])
    limits, tolerances = np.array([50, 50, 50, 2]), np.array([1e-10, 0, 1e-10, 0])
    x, info = jax.vmap(dense_cg, in_axes=(None, 0, 0, 0))(SPD, right, limits, tolerances)
    for lane in range(4):
        alone = dense_cg(SPD, right[lane], limits[lane], tolerances[lane])
        np.testing.assert_allclose(x[lane], alone[0], rtol=SOLVE_TOLERANCE)
        assert info.iterations[lane] == alone[1].iterations
    assert info.iterations.tolist() == [6, 0, 1, 2]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_solved_in_float32_and_returned_as_they_came(dtype):
    b = jnp.asarray(RIGHT, dtype)
    x, info = dense_cg(jnp.asarray(SPD, jnp.float32), b, tol=1e-6)
    assert x.dtype == dtype and info.residual_norm.dtype == jnp.float32
    expected = np.linalg.solve(SPD, np.asarray(b, np.float64))
    np.testing.assert_allclose(
        np.asarray(x, np.float64), expected, rtol=float(jnp.finfo(dtype).eps)
    )
    assert dense_cg(2 * jnp.eye(3), jnp.ones(3, jnp.int32))[0].dtype == jnp.float32


@pytest.mark.parametrize("power", [-120, -60, 60, 120])
def test_scaling_b_by_a_power_of_two_scales_x_to_the_last_digit(power):
    a, b = jnp.asarray(SPD, jnp.float32), jnp.asarray(RIGHT, jnp.float32)
    x, info = dense_cg(a, b, 4, 1e-6)
    scaled, scaled_info = dense_cg(a, jnp.ldexp(b, power), 4, 1e-6)
    np.testing.assert_array_equal(scaled, jnp.ldexp(x, power))
    assert scaled_info.residual_norm == jnp.ldexp(info.residual_norm, power)


def test_starting_point_and_preconditioner_save_iterations(x64):
    def solve(**options):
        return linalg.conjugate_gradient(
            lambda v: SPD @ v, RIGHT, max_iters=50, tol=1e-10, **options
        )

    truth = np.linalg.solve(SPD, RIGHT)
    x, info = solve(x0=truth)
    assert info.iterations == 0
    np.testing.assert_array_equal(x, truth)
    x, info = solve(preconditioner=lambda r: jnp.linalg.solve(SPD, r))
    assert info.iterations == 1
    np.testing.assert_allclose(x, truth, rtol=SOLVE_TOLERANCE)
    np.testing.assert_allclose(
        solve(x0=RIGHT, preconditioner=lambda r: r / 3)[0], truth, rtol=SOLVE_TOLERANCE
    )


def test_hermitian_operators_are_solved_and_differentiated(x64):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4))
    a, b = x @ x.conj().T + np.eye(4), rng.standard_normal(4) + 1j * rng.standard_normal(4)
    np.testing.assert_allclose(
        dense_cg(a, b, tol=1e-13)[0], np.linalg.solve(a, b), rtol=SOLVE_TOLERANCE
    )
    check_grads(lambda a, b: dense_cg((a + a.T.conj()) / 2, b, tol=1e-13)[0], (a, b), order=1)


def test_gradients_are_those_of_the_solution(x64):
    check_grads(lambda a, b: dense_cg(a + a.T, b, tol=1e-13)[0], (SPD, RIGHT), order=1)


def written_out(a, b, limit, least_progress, x):
    """The iterates of plain conjugate gradients, until Martens' rule or the limit ends them."""
    r = b - a @ x
    p, iterates, values = r, [x], [x @ a @ x / 2 - b @ x]
    for i in range(1, limit + 1):
        alpha = r @ r / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * a @ p
        p, r = new + new @ new / (r @ r) * p, new
        iterates.append(x)
        values.append(x @ a @ x / 2 - b @ x)
        k = max(10, i // 10)
        if i > k and values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * least_progress:
            break
    return np.array(iterates)


SLOW = spectra.symmetric(
    spectra.rotation(np.random.default_rng(2), 150), np.linspace(0.03, 10, 150)
)
SLOW_RIGHT = np.random.default_rng(3).standard_normal(150)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_progress_rule_is_the_published_one(x64, start):
    x0 = np.full(150, start)

    @jax.jit
    def solve(least):
        options = {"x0": x0, "max_iters": 300, "min_progress": least}
        return linalg.conjugate_gradient(lambda v: SLOW @ v, SLOW_RIGHT, **options)

    ends = []
    for least in (1e-2, 5e-4, 1e-6):
        iterates = written_out(SLOW, SLOW_RIGHT, 300, least, x0)
        x, info = solve(least)
        ends.append(int(info.iterations))
        assert info.iterations == info.returned == len(iterates) - 1
        reached, expected = (v @ SLOW @ v / 2 - SLOW_RIGHT @ v for v in (x, iterates[-1]))
        np.testing.assert_allclose(reached, expected, rtol=PROGRESS_TOLERANCE)
    assert 10 < ends[0] < ends[1] < ends[2] < 300


@pytest.mark.parametrize("limit", [1, 5, 17])
def test_merit_chooses_the_best_of_geometrically_spaced_iterates(x64, limit):
    iterates = written_out(SLOW, SLOW_RIGHT, limit, 0, np.zeros(150))
    tried = sorted({i for i in (1, 2, 3, 4, 6, 8, 11, 15) if i <= limit} | {limit})
    for wanted in (
        0.0,
        *np.linalg.norm(iterates[[1, limit // 2, limit]], axis=1),
    ):  # a loss least near some length

        def merit(x, wanted=wanted):
            return jnp.abs(jnp.linalg.norm(x) - wanted)

        x, info = linalg.conjugate_gradient(
            lambda v: SLOW @ v, SLOW_RIGHT, max_iters=limit, merit=merit
        )
        best = tried[np.argmin([merit(iterates[i]) for i in tried])]
        assert info.returned == best and info.iterations == limit
        np.testing.assert_allclose(x, iterates[best], rtol=1e-8, atol=1e-12)


def test_a_merit_that_is_nan_is_the_worst(x64):
    def merit(x):
        return jnp.where(jnp.linalg.norm(x) > 1e-3 * jnp.linalg.norm(RIGHT), jnp.nan, 1.0)

    x, info = linalg.conjugate_gradient(lambda v: SPD @ v, RIGHT, max_iters=4, merit=merit)
    assert info.returned == 1 and np.all(np.isfinite(x))


def test_structures_that_differ_are_refused():
    def shorten(v):
        return v[:2]

    for matvec, options, named in (
        (shorten, {}, "matvec"),
        (jnp.negative, {"x0": jnp.ones(2)}, "x0"),
        (jnp.negative, {"preconditioner": shorten}, "preconditioner"),
    ):
        with pytest.raises(
            ValueError, match=rf"{named} has shapes \(2,\), but b has shapes \(3,\)"
        ):
            linalg.conjugate_gradient(matvec, jnp.ones(3), max_iters=2, **options)
    with pytest.raises(ValueError, match="matvec has shapes"):
        linalg.conjugate_gradient(lambda v: {"b": v["a"]}, {"a": jnp.ones(3)}, max_iters=2)
