import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spectra

from optax_curv import linalg

LOWEST, HIGHEST = 0.8, 1 + 1e-5
SIZES = {2: 100, 3: 100, 8: 200, 40: 150, 120: 40, 300: 10}  # and how many of each


def spd(rng, n):
    """A matrix of one of the families of positive semi-definite spectra."""
    family = rng.integers(5)
    if family == 0:
        x = rng.standard_normal((n, rng.choice([n, 4 * n, n // 2 + 1])))
        return x @ x.T / n
    if family == 1:  # the hardest: the largest eigenvector hides evenly among all rows
        return np.eye(n) + rng.uniform(0.2, 2) * np.ones((n, n)) / n
    values = {
        2: rng.uniform(0, 1, n),
        3: np.geomspace(1, 1e-12, n),
        4: 1 + (np.arange(n) == 0) * rng.uniform(),
    }
    return spectra.symmetric(spectra.rotation(rng, n), values[int(family)])


def test_bound_is_between_four_fifths_of_the_norm_and_the_norm():
    rng, ratios = np.random.default_rng(0), []
    for n, count in SIZES.items():
        a = np.stack([spd(rng, n) for _ in range(count)])
        ratios.append(
            linalg.spectral_norm_bound(a.astype(np.float32)) / np.linalg.eigvalsh(a)[:, -1]
        )
    ratios = np.concatenate(ratios)
    assert len(ratios) == 600
    assert ratios.min() >= LOWEST and ratios.max() <= HIGHEST


@pytest.mark.parametrize("shape", [(6, 6), (2, 7), (7, 1)])
def test_any_matrix_is_bounded_from_below(x64, shape):
    rng = np.random.default_rng(1)
    a = rng.standard_normal((20, *shape)) + 1j * rng.standard_normal((20, *shape))
    for matrices in (a, np.triu(a.real)):
        ratio = linalg.spectral_norm_bound(matrices) / np.linalg.norm(matrices, 2, axis=(-2, -1))
        assert ratio.min() >= LOWEST and ratio.max() <= HIGHEST


def test_one_iteration_is_enough_for_a_skew_matrix():
    rng = np.random.default_rng(2)
    for n in (2, 5, 30, 300):
        a = rng.standard_normal((20, n, n))
        a = (a - a.swapaxes(1, 2)).astype(np.float32)
        ratio = linalg.spectral_norm_bound(a, iterations=1) / np.linalg.norm(a, 2, axis=(-2, -1))
        assert ratio.min() >= LOWEST and ratio.max() <= HIGHEST


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 1e38])
def test_bound_scales_with_the_matrix(scale):
    a = np.diag(np.float32([1, -3, 2])) * np.float32(scale)
    np.testing.assert_allclose(linalg.spectral_norm_bound(a), 3 * np.float32(scale), rtol=1e-6)


def test_zero_and_empty_matrices_have_the_bound_zero():
    for shape in ((3, 3), (1, 1), (0, 0), (0, 4), (4, 0), (2, 0, 0)):
        np.testing.assert_array_equal(
            linalg.spectral_norm_bound(jnp.zeros(shape)), np.zeros(shape[:-2])
        )
    assert linalg.spectral_norm_bound(jnp.ones((0, 3, 3))).shape == (0,)


def test_only_a_matrix_that_is_not_finite_has_the_bound_nan():
    a = jnp.stack([jnp.eye(3)] * 3).at[1, 0, 2].set(jnp.nan)
    for bound in (linalg.spectral_norm_bound, jax.vmap(linalg.spectral_norm_bound)):
        np.testing.assert_array_equal(bound(a), [1, np.nan, 1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_narrow_types_are_bounded_in_float32(dtype):
    bound = linalg.spectral_norm_bound(3 * jnp.eye(4, dtype=dtype))
    assert bound.dtype == jnp.float32 and bound == 3


def test_a_vector_is_refused():
    with pytest.raises(
        ValueError, match=r"expected matrices \[..., m, n\], got an array of shape \(3,\)"
    ):
        linalg.spectral_norm_bound(jnp.ones(3))
