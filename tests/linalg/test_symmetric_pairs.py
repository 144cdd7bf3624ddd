import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.linalg import symmetric_pairs as pairs


@pytest.mark.parametrize("d", [1, 2, 3, 7])
@pytest.mark.parametrize("stack", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_what_is_put_in_comes_out_whatever_the_order(d, stack, dtype):
    x = jax.random.normal(jax.random.key(0), (2, *stack, d, d), dtype)
    a, b = x + x.mT.conj()
    pair = jnp.zeros((*stack, d, d + 1), dtype)
    for made in (
        pairs.with_second(pairs.with_first(pair, a), b),
        pairs.with_first(pairs.with_second(pairs.with_first(pair, b), b), a),
    ):
        np.testing.assert_array_equal(pairs.first(made), a)
        np.testing.assert_array_equal(pairs.second(made), b)
