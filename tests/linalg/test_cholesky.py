import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import spectra
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from optax_curv import linalg

EPS = np.finfo(np.float64).eps
FACTOR_TOLERANCE = 10 * EPS  # of the largest eigenvalue, for each of n rows
SOLVE_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5


def positive_definite(rng, *shape):
    x = rng.standard_normal((*shape, shape[-1]))
    return x @ x.swapaxes(-1, -2) + np.eye(shape[-1])


@spectra.PROPERTY
@given(spectrum=spectra.spectra(), relative_damping=st.sampled_from([0.0, 1e-10, 0.1]))
def test_factor_is_that_of_the_matrix_with_the_damping_used(x64, spectrum, relative_damping):
    a = spectra.symmetric(*spectrum)
    n, largest = len(a), np.abs(spectrum[1]).max(initial=0)
    damping = relative_damping * largest
    factor, used = linalg.cholesky(a, damping)
    np.testing.assert_array_equal(factor, np.tril(factor))
    assert np.all(np.diagonal(factor) > 0)
    assert used >= damping
    error = np.abs(factor @ factor.T - a - used * np.eye(n)).max(initial=0)
    assert error <= FACTOR_TOLERANCE * n * (largest + used)


@spectra.PROPERTY
@given(spectrum=spectra.spectra())
def test_damping_is_raised_only_where_it_must_be_and_tenfold_at_a_time(x64, spectrum):
    a = spectra.symmetric(*spectrum)
    noise = FACTOR_TOLERANCE * len(a) * np.abs(spectrum[1]).max(initial=0)
    smallest = spectrum[1].min(initial=np.inf)
    used = linalg.cholesky(a)[1]
    if smallest > noise:
        assert used == 0
    elif smallest < -noise:
        assert -smallest - noise <= used <= 10 * (-smallest + noise)
    else:
        assert used <= max(10 * noise, EPS)


def test_each_matrix_of_a_batch_is_damped_on_its_own(x64):
    rng = np.random.default_rng(0)
    a = np.stack(
        [
            positive_definite(rng, 4),
            -np.eye(4),
            np.zeros((4, 4)),
            np.full((4, 4), np.nan),
            np.ones((4, 4)),
        ]
    )
    damping = np.array([0.5, 0.25, 0.0, 0.0, 1e-3])
    factors, used = linalg.cholesky(a, damping)
    for i in range(5):
        factor, own = linalg.cholesky(a[i], damping[i])
        np.testing.assert_allclose(factors[i], factor, rtol=SOLVE_TOLERANCE)
        assert used[i] == own
    np.testing.assert_allclose(used, [0.5, 2.5, EPS, 0, 1e-3])
    mapped = jax.jit(jax.vmap(linalg.cholesky))
    np.testing.assert_allclose(mapped(a, damping)[0], factors, rtol=SOLVE_TOLERANCE)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("kind", ["positive", "indefinite", "singular", "hollow"])
def test_factor_is_finite_at_any_scale_of_float32(scale, kind):
    signs = {
        "positive": [1, 2, 0.5],
        "indefinite": [1, -1, 0.5],
        "singular": [1, 0, 0],
        "hollow": [0, 0, 0],
    }[kind]
    rotated = spectra.rotation(np.random.default_rng(1), 3)
    a = spectra.symmetric(rotated, signs) if kind != "hollow" else np.ones((3, 3)) - np.eye(3)
    a = (a * scale).astype(np.float32)
    factor, used = linalg.cholesky(a)
    assert np.all(np.isfinite(factor)) and np.isfinite(used)
    damped = a.astype(np.float64) + float(used) * np.eye(3)
    factor = np.asarray(factor, np.float64)
    np.testing.assert_allclose(
        factor @ factor.T, damped, atol=FLOAT32_TOLERANCE * np.abs(damped).max()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_gives_nan_and_no_retry(bad):
    a = np.eye(3, dtype=np.float32)
    a[0, 2] = a[2, 0] = bad
    factor, used = linalg.cholesky(a, 0.5)
    assert np.all(np.isnan(factor)) and used == 0.5
    assert np.all(np.isnan(linalg.cholesky(np.eye(3, dtype=np.float32), bad)[0]))


def test_a_negative_damping_is_raised_like_any_other(x64):
    factor, used = linalg.cholesky(np.eye(2), -2.0)
    assert np.all(np.isfinite(factor)) and 0 < used < 1e-15


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_narrow_types_are_factored_in_float32(dtype):
    factor, used = linalg.cholesky(4 * jnp.eye(2, dtype=dtype), jnp.asarray(5, dtype))
    assert factor.dtype == used.dtype == jnp.float32
    np.testing.assert_array_equal(factor, 3 * np.eye(2))


def test_hermitian_matrices_are_factored_and_solved(x64):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 5)) + 1j * rng.standard_normal((5, 5))
    a, b = x @ x.conj().T + np.eye(5), rng.standard_normal((5, 2)) + 1j
    factor, used = linalg.cholesky(a)
    assert used.dtype == jnp.float64
    np.testing.assert_allclose(
        linalg.cholesky_solve(factor, b), np.linalg.solve(a, b), rtol=SOLVE_TOLERANCE
    )


def test_gradients_agree_with_differences_and_stay_finite_after_a_retry(x64):
    a = positive_definite(np.random.default_rng(3), 4)
    check_grads(lambda a, damping: linalg.cholesky(a, damping)[0], (a, 0.1), order=1)
    gradient = jax.grad(lambda a: linalg.cholesky(a)[0].sum())(jnp.diag(jnp.array([1.0, -1.0])))
    assert np.all(np.isfinite(gradient))
    assert jax.grad(lambda d: linalg.cholesky(a, d)[1].sum())(0.1) == 1
    assert jax.grad(lambda d: linalg.cholesky(-a, d)[1].sum())(0.1) == 0


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3), (1, 1), (2, 1, 4, 4)])
def test_empty_and_batched_shapes(shape):
    factor, used = linalg.cholesky(jnp.ones(shape))
    assert factor.shape == shape and used.shape == shape[:-2]
    for b in (jnp.ones(shape[:-1]), jnp.ones((*shape[:-1], 2))):
        assert linalg.cholesky_solve(factor, b).shape == b.shape


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("columns", [(), (6,)])
def test_cholesky_solve_is_the_dense_solve(x64, batch, columns):
    rng = np.random.default_rng(4)
    a, b = positive_definite(rng, *batch, 4), rng.standard_normal((*batch, 4, *columns))
    expected = np.linalg.solve(a, b if columns else b[..., None])
    found = linalg.cholesky_solve(linalg.cholesky(a)[0], b)
    np.testing.assert_allclose(
        found, expected.reshape(b.shape), rtol=SOLVE_TOLERANCE, atol=SOLVE_TOLERANCE
    )


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_triangular_solve_is_the_dense_solve(x64, lower, transpose, side):
    rng = np.random.default_rng(5)
    full = rng.standard_normal((3, 5, 5)) + 4 * np.eye(5)  # the other triangle must not be read
    t = np.tril(full) if lower else np.triu(full)
    t = t.swapaxes(-1, -2) if transpose else t
    solve = functools.partial(linalg.triangular_solve, lower=lower, transpose=transpose, side=side)
    b, vector = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 5))
    b = b if side == "left" else b.swapaxes(-1, -2)
    product = t @ solve(full, b) if side == "left" else solve(full, b) @ t
    np.testing.assert_allclose(product, b, rtol=SOLVE_TOLERANCE, atol=SOLVE_TOLERANCE)
    one = solve(full, vector)
    product = np.einsum("bij,bj->bi" if side == "left" else "bji,bj->bi", t, one)
    np.testing.assert_allclose(product, vector, rtol=SOLVE_TOLERANCE, atol=SOLVE_TOLERANCE)


def test_one_matrix_solves_a_batch_of_right_hand_sides(x64):
    rng = np.random.default_rng(7)
    t, b = np.tril(rng.standard_normal((4, 4))) + 3 * np.eye(4), rng.standard_normal((3, 4, 2))
    np.testing.assert_allclose(
        t @ linalg.triangular_solve(t, b, lower=True), b, rtol=SOLVE_TOLERANCE
    )


@spectra.PROPERTY
@given(spectrum=spectra.spectra(kinds=("condition", "clustered")))
def test_triangular_solve_agrees_with_scipy_for_any_condition(x64, spectrum):
    factor = (
        np.linalg.cholesky(spectra.symmetric(*spectrum)) if len(spectrum[1]) else np.zeros((0, 0))
    )
    b = np.ones(len(factor))
    found = np.asarray(linalg.triangular_solve(factor, b, lower=True))
    expected = scipy.linalg.solve_triangular(factor, b, lower=True) if len(b) else b
    # Substitution is backward stable: its residual is small whatever the condition.
    magnitude = np.abs(factor) @ np.abs(found) + 1
    assert np.all(np.abs(factor @ found - b) <= SOLVE_TOLERANCE * magnitude)
    assert np.all(np.abs(factor @ (found - expected)) <= SOLVE_TOLERANCE * magnitude)


def substitute(t, b, zero_pivot):
    """Forward substitution by rows, with the guard."""
    x = np.zeros_like(b)
    for i in range(len(b)):
        if abs(t[i, i]) > zero_pivot:
            x[i] = (b[i] - t[i, :i] @ x[:i]) / t[i, i]
    return x


@pytest.mark.parametrize("dead", [[], [0], [2], [4], [1, 3], [0, 1, 2, 3, 4]])
def test_zero_pivots_give_zero_entries_as_substitution_does(x64, dead):
    rng = np.random.default_rng(6)
    t, b = np.tril(rng.standard_normal((5, 5))) + 3 * np.eye(5), rng.standard_normal((5, 2))
    t[dead, dead] = np.resize([0.0, 1e-12, -1e-13], len(dead))
    expected = substitute(t, b, 1e-12)
    solve = functools.partial(linalg.triangular_solve, zero_pivot=1e-12)
    for found in (
        solve(t, b, lower=True),
        solve(t.T, b, lower=False, transpose=True),
        solve(t.T, b.T, lower=False, side="right").T,
        solve(t, b.T, lower=True, transpose=True, side="right").T,
        jnp.stack([solve(t, b[:, i], lower=True) for i in range(2)], axis=1),
    ):
        np.testing.assert_allclose(found, expected, rtol=SOLVE_TOLERANCE, atol=SOLVE_TOLERANCE)


def test_shapes_that_do_not_fit_are_refused():
    square = jnp.eye(3)
    with pytest.raises(ValueError, match=r"cholesky: expected square matrices .* shape \(3, 2\)"):
        linalg.cholesky(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"damping of shape \(2,\) does not fit the batch \(\)"):
        linalg.cholesky(square, jnp.ones(2))
    with pytest.raises(ValueError, match=r"damping of shape \(2,\) does not fit the batch \(3,\)"):
        linalg.cholesky(jnp.ones((3, 2, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"b of shape \(4,\) does not fit t of shape \(3, 3\)"):
        linalg.triangular_solve(square, jnp.ones(4), lower=True)
    with pytest.raises(
        ValueError, match=r"b of shape \(4, 3, 2\) does not fit t of shape \(2, 3, 3\)"
    ):
        linalg.triangular_solve(jnp.ones((2, 3, 3)), jnp.ones((4, 3, 2)), lower=True)
    with pytest.raises(ValueError, match=r"b of shape \(4,\) does not fit t of shape \(3, 3\)"):
        linalg.cholesky_solve(square, jnp.ones(4))
    with pytest.raises(ValueError, match="unknown side='up'"):
        linalg.triangular_solve(square, jnp.ones(3), lower=True, side="up")
