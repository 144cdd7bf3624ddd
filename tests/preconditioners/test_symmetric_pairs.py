import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.preconditioners import symmetric_pairs as pairs


@pytest.mark.parametrize("d", [1, 2, 3, 7])
@pytest.mark.parametrize("full", [True, False])
def test_what_is_put_in_comes_out_whatever_the_order(d, full):
    a, b = jax.random.normal(jax.random.key(0), (2, 4, d, d) if full else (2, 4, d))
    if full:
        a, b = a + a.mT, b + b.mT
    pair = pairs.zeros_like(a)
    assert pair.size <= a.size + b.size and (not full or pair.size == 4 * d * (d + 1))
    for made in (
        pairs.with_second(pairs.with_first(pair, a), b),
        pairs.with_first(pairs.with_second(pairs.with_first(pair, b), b), a),
    ):
        np.testing.assert_array_equal(pairs.first(made), a)
        np.testing.assert_array_equal(pairs.second(made), b)
    assert not jnp.any(pairs.first(pair)) and pairs.second(pair).shape == b.shape
