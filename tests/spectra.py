"""Matrices of every spectrum that a curvature matrix can have, as hypothesis strategies."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Few sizes, so that every kernel is compiled a few times only.
SIZES = (0, 1, 5)
KINDS = ("condition", "clustered", "rank_deficient", "zero", "indefinite")
PROPERTY = settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def rotation(rng, n):
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def symmetric(rotated, eigenvalues):
    """The symmetric matrix of these eigenvectors and eigenvalues, symmetric to the last digit."""
    a = (rotated * eigenvalues) @ rotated.T
    return (a + a.T) / 2


@st.composite
def spectra(draw, kinds=KINDS, sizes=SIZES):
    """Eigenvectors [n, n] and eigenvalues [n] up to a drawn scale, of condition 1 to 1e12 or
    singular or indefinite."""
    n, kind = draw(st.sampled_from(sizes)), draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smallest = 10.0 ** -draw(st.floats(0, 12))
    values = {
        "condition": np.geomspace(1, smallest, n) if n else np.ones(0),
        "clustered": np.where(np.arange(n) < n // 2, 1.0, smallest),
        "rank_deficient": np.where(np.arange(n) < n // 2, rng.uniform(0.5, 1, n), 0.0),
        "zero": np.zeros(n),
        "indefinite": rng.uniform(-1, 1, n),
    }[kind]
    return rotation(rng, n), values * 10.0 ** draw(st.integers(-8, 8))
