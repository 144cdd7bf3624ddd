"""A probe's Hessian-vector product equals the dense Hessian's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_curv

EXACT = 1e-12
DIFFERENCE = 1e-6  # √eps of float64 is 1.5e-8; the loss below has third derivatives near 10


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


@pytest.mark.parametrize(("finite_difference", "tolerance"), [(False, EXACT), (True, DIFFERENCE)])
def test_product_equals_the_dense_hessians(finite_difference, tolerance, x64):
    params = {"w": jnp.arange(6.0).reshape(3, 2) / 7, "b": jnp.ones(2)}
    x = jnp.linspace(-1, 1, 12).reshape(4, 3)
    value, grads, probe, hvp = jax.jit(
        lambda p, k: optax_curv.hessian_probe(
            loss, p, x, key=k, finite_difference=finite_difference
        )
    )(params, jax.random.key(3))
    flat, restore = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda f: loss(restore(f), x))(flat)
    np.testing.assert_allclose(value, loss(params, x), rtol=EXACT)
    jax.tree.map(np.testing.assert_array_equal, grads, jax.jit(jax.grad(loss))(params, x))
    product = hessian @ jax.flatten_util.ravel_pytree(probe)[0]
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(hvp)[0], product, rtol=tolerance, atol=tolerance
    )


def test_a_loss_without_second_derivative_has_finite_differences():
    @jax.custom_vjp
    def square(w):
        return jnp.sum(w**2)

    square.defvjp(lambda w: (square(w), w), lambda w, c: (2 * w * c,))
    w = jnp.array([1.0, -2.0])
    _, _, probe, hvp = optax_curv.hessian_probe(
        square, w, key=jax.random.key(0), finite_difference=True
    )
    np.testing.assert_allclose(hvp, 2 * probe, rtol=1e-2)
    with pytest.raises(TypeError, match="custom_vjp"):
        optax_curv.hessian_probe(square, w, key=jax.random.key(0))


def test_auxiliary_output_and_shapes_pass():
    params = (jnp.ones(()), {"x": jnp.ones((2, 3), jnp.bfloat16)})
    with_aux = lambda p, scale: (scale * p[0] ** 2 + jnp.sum(p[1]["x"]).astype(jnp.float32), "aux")  # noqa: E731
    (value, aux), *trees = optax_curv.hessian_probe(
        with_aux, params, 3.0, key=jax.random.key(0), has_aux=True
    )
    assert (float(value), aux) == (9.0, "aux")
    for tree in trees:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
            lambda x: (x.shape, x.dtype), params
        )
