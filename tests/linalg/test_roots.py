import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from optax_curv import linalg
from optax_curv.linalg import roots

EPS = np.finfo(np.float64).eps
ROOT_TOLERANCE = 10 * EPS  # times the condition, for each of n rows
FLOAT32_TOLERANCE = 1e-5


@spectra.PROPERTY
@given(
    spectrum=spectra.spectra(kinds=("condition", "clustered")),
    p=st.sampled_from([1, 2, 4, 2.5]),
    relative_damping=st.sampled_from([0.0, 1e-8, 0.1]),
)
def test_root_is_that_of_the_spectrum(x64, spectrum, p, relative_damping):
    rotated, values = spectrum
    damped = values + relative_damping * values.max(initial=0)
    expected = spectra.symmetric(rotated, damped ** (-1 / p))
    found = linalg.inverse_root(
        spectra.symmetric(*spectrum), p, damping=relative_damping * values.max(initial=0)
    )
    condition = damped.max(initial=0) / damped.min(initial=np.inf)
    limit = ROOT_TOLERANCE * len(values) * condition * np.abs(expected).max(initial=0)
    assert np.abs(found - expected).max(initial=0) <= limit
    np.testing.assert_array_equal(found, found.T)


@spectra.PROPERTY
@given(spectrum=spectra.spectra(kinds=("rank_deficient", "zero")), p=st.sampled_from([1, 2, 4]))
def test_root_of_a_singular_matrix_is_its_pseudo_inverse_or_damped(x64, spectrum, p):
    rotated, values = spectrum
    a, largest = spectra.symmetric(*spectrum), values.max(initial=0)
    powers = np.where(values > 0, np.where(values > 0, values, 1) ** (-1 / p), 0)
    limit = 100 * EPS * len(a) * powers.max(initial=0)
    assert (
        np.abs(linalg.inverse_root(a, p, damping=0.0) - spectra.symmetric(rotated, powers)).max(
            initial=0
        )
        <= limit
    )
    damping = 1e-3 * largest + 1e-5 * (largest == 0)
    expected = spectra.symmetric(rotated, (values + damping) ** (-1 / p))
    found = linalg.inverse_root(a, p, damping=damping)
    np.testing.assert_allclose(found, expected, atol=1e-11 * np.abs(expected).max(initial=0))


def test_negative_eigenvalues_count_as_zero_before_the_damping(x64):
    root = linalg.inverse_root(jnp.diag(jnp.array([4.0, -1e-3])), 2, damping=0.25)
    np.testing.assert_allclose(root, np.diag([4.25**-0.5, 2.0]), rtol=1e-14)
    np.testing.assert_array_equal(
        linalg.inverse_root(-jnp.eye(2), 2, damping=0.0), np.zeros((2, 2))
    )


def test_each_matrix_of_a_batch_has_its_own_damping_order_and_fault(x64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 3))
    a = x @ x.swapaxes(1, 2)
    a[1, 0, 1] = np.nan
    a[2] = 0
    damping, p = np.array([0.1, 0.2, 0.0, 0.4]), np.array([1.0, 2, 3, 4])
    found = linalg.inverse_root(a, p, damping=damping)
    np.testing.assert_array_equal(np.isnan(found).all(axis=(1, 2)), [False, True, False, False])
    np.testing.assert_array_equal(found[2], np.zeros((3, 3)))
    root = jax.jit(jax.vmap(lambda a, p, damping: linalg.inverse_root(a, p, damping=damping)))
    np.testing.assert_allclose(root(a, p, damping), found, rtol=1e-12)
    np.testing.assert_allclose(linalg.inverse_root(a[3], 4, damping=0.4), found[3], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_root_is_finite_and_right_at_any_scale_of_float32(scale):
    a = (np.float32([[2, 1], [1, 2]]) * np.float32(scale)).astype(np.float32)
    root = np.asarray(linalg.inverse_root(a, 2, damping=0.0), np.float64)
    np.testing.assert_allclose(root @ a @ root, np.eye(2), atol=FLOAT32_TOLERANCE)


def test_hermitian_matrices_have_hermitian_roots(x64):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4))
    a = x @ x.conj().T
    root = linalg.inverse_root(a, 2, damping=0.5)
    np.testing.assert_allclose(root @ (a + 0.5 * np.eye(4)) @ root, np.eye(4), atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_narrow_types_are_rooted_in_float32(dtype):
    root = linalg.inverse_root(4 * jnp.eye(2, dtype=dtype), 2, damping=0)
    assert root.dtype == jnp.float32
    np.testing.assert_allclose(root, np.eye(2) / 2, rtol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3), (1, 1), (2, 1, 4, 4)])
def test_empty_and_batched_shapes(shape):
    assert linalg.inverse_root(jnp.ones(shape), 2, damping=1.0).shape == shape


@pytest.mark.parametrize("a", [np.diag([1.0, 2.0, 5.0]), np.eye(3), np.diag([1.0, 1.0, 4.0])])
def test_gradients_agree_with_differences_also_where_eigenvalues_coincide(x64, a):
    check_grads(
        lambda a, p, damping: linalg.inverse_root(a, p, damping=damping), (a, 2.5, 0.1), order=1
    )


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"expected square matrices .* shape \(2, 3\)"):
        linalg.inverse_root(jnp.ones((2, 3)), 2, damping=0.1)
    with pytest.raises(ValueError, match=r"damping of shape \(3,\) does not fit the batch \(2,\)"):
        linalg.inverse_root(jnp.ones((2, 3, 3)), 2, damping=jnp.ones(3))
    with pytest.raises(ValueError, match="expected p > 0, got p=-2"):
        linalg.inverse_root(jnp.eye(2), -2, damping=0.1)


NEWTON_TOLERANCE = 100 * EPS  # times the condition, for each of n rows


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_newton_agrees_with_eigh(x64, p, condition):
    rotated = spectra.rotation(np.random.default_rng(p), 6)
    a = spectra.symmetric(rotated, np.geomspace(1, 1 / condition, 6))
    expected = linalg.inverse_root(a, p, damping=0.0)
    found = linalg.inverse_root(a, p, damping=0.0, method="newton")
    limit = NEWTON_TOLERANCE * len(a) * condition * np.abs(expected).max()
    assert np.abs(found - expected).max() <= limit


QR_TOLERANCE = 1e-2  # of the norm, see `inverse_root`


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("p", [1, 2, 2.5, 4])
@pytest.mark.parametrize("n", [6, 60])
def test_orthogonal_iteration_agrees_with_eigh(x64, n, p, condition):
    rotated = spectra.rotation(np.random.default_rng(n), n)
    a = spectra.symmetric(rotated, np.geomspace(1, 1 / condition, n))
    expected = linalg.inverse_root(a, p, damping=0.0)
    found = linalg.inverse_root(a, p, damping=0.0, method="qr")
    assert np.linalg.norm(found - expected, 2) <= QR_TOLERANCE * np.linalg.norm(expected, 2)
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("method", ["eigh", "newton", "qr"])
def test_relative_damping_is_in_units_of_the_largest_eigenvalue(x64, method):
    a = np.stack([np.diag([4.0, 1.0, 0.0]), np.zeros((3, 3))])
    found = linalg.inverse_root(a, 2, damping=0.25, relative=True, method=method)
    np.testing.assert_allclose(
        found[0], np.diag([5.0, 2.0, 1.0]) ** np.where(np.eye(3), -0.5, 1), rtol=1e-3
    )
    np.testing.assert_array_equal(found[1], np.zeros((3, 3)))


def test_methods_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="unknown method='svd'"):
        linalg.inverse_root(jnp.eye(2), 2, damping=0.1, method="svd")
    with pytest.raises(ValueError, match=r"needs a whole number p, got p=2.5"):
        linalg.inverse_root(jnp.eye(2), 2.5, damping=0.1, method="newton")


def test_newton_of_a_matrix_with_a_negative_eigenvalue_stays_finite():
    a = spectra.symmetric(
        spectra.rotation(np.random.default_rng(0), 6), np.array([1, 0.5, 0.1, 1e-2, 1e-3, -1e-2])
    )
    found = linalg.inverse_root(np.float32(a), 2, damping=1e-5, relative=True, method="newton")
    assert np.isfinite(found).all() and np.linalg.norm(found, 2) < 1e3


def test_eigenvectors_are_in_order_and_where_there_are_none_the_basis_stays(x64):
    rng = np.random.default_rng(0)
    q, values = spectra.rotation(rng, 5), np.array([1, 5, 2, 4, 3.0])
    a = np.stack([spectra.symmetric(q, values), np.full((5, 5), np.nan)])
    vectors = roots.eigenvectors(a, np.stack([q, q]))
    np.testing.assert_allclose(np.abs(vectors[0].T @ q), np.eye(5)[np.argsort(-values)], atol=1e-12)
    np.testing.assert_array_equal(vectors[1], q)
