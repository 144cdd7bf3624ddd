"""The hints for XLA on CPU change no value, and one kernel cuts out of all places of a stack."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.linalg._compiler import cut_out, laid_out

PLACES = [(0, 1), (1, 2), (3, 1), (0, 4)]


@pytest.mark.parametrize(("start", "size"), PLACES)
def test_a_cut_is_a_slice(start, size):
    x = jnp.arange(12.0).reshape(4, 3)
    for cut in (
        lambda x: cut_out(x, start, (size,)),
        jax.jit(lambda x: cut_out(x, start, (size,))),
    ):
        np.testing.assert_array_equal(cut(x), x[start : start + size])
    batched = jax.vmap(lambda x: cut_out(x, start, (size,)), in_axes=2)(jnp.stack([x, -x], axis=2))
    np.testing.assert_array_equal(batched, jnp.stack([x, -x])[:, start : start + size])
    gradient = jax.grad(lambda x: jnp.sum(cut_out(x, start, (size,))))(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x).at[start : start + size].set(1))


def test_what_is_laid_out_keeps_its_values():
    x = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(jax.jit(lambda x: laid_out(x.T) + 1)(x), x.T + 1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a cut is a plain slice")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="seen in the XLA of JAX 0.10")
def test_one_kernel_serves_all_places():
    def kernels(cut):
        text = (
            jax.jit(lambda x: [cut(x, i) * 2 for i in range(6)])
            .lower(jnp.zeros((6, 5)))
            .compile()
            .as_text()
        )
        bodies = re.findall(r"^%(\S*fused\S*) \([^\n]*\n(.*?)^}", text, re.MULTILINE | re.DOTALL)
        plain = (re.sub(r"%[\w.\-]+|, metadata=\{[^\n]*", "", body) for _, body in bodies)
        return len(set(plain)), len(bodies)

    assert kernels(lambda x, i: x[i : i + 1]) == (6, 6)
    assert kernels(lambda x, i: cut_out(x, i, (1,))) == (1, 6)
