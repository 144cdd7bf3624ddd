"""What capture assumes about JAX: this file fails where a new release changed it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

from optax_curv.capture._graph import jaxpr as internals

W, X = jnp.arange(6.0).reshape(2, 3), jnp.ones((4, 2))


def equations(function, *args):
    return jax.make_jaxpr(function)(*args).jaxpr.eqns


def only(function, *args):
    (eqn,) = equations(function, *args)
    return eqn


def scanned(w, x):
    return lax.scan(lambda h, x: (jnp.tanh(h @ w @ w.T + x), h), x, jnp.stack([x, x]))


def branched(p, w, x):
    return lax.switch(p, [lambda w, x: x @ w, lambda w, x: x @ w + 1.0], w, x)


CALLS = {
    "jit": (jax.jit(lambda w, x: jnp.sin(x @ w) + 1.0), (W, X), 1),
    "remat2": (jax.checkpoint(lambda w, x: jnp.sin(x @ w)), (W, X), 1),
    "scan": (scanned, (W, X), 1),
    "cond": (lambda w, x: branched(1, w, x), (W, X), 2),
    "custom_jvp_call": (jax.nn.relu, (W,), 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_names_and_bodies_of_calls(name):
    function, args, count = CALLS[name]
    found = [eqn for eqn in equations(function, *args) if eqn.primitive.name == name]
    assert len(found) == 1 and len(internals.bodies(found[0])) == count
    assert bool(internals.hidden_bodies(found[0])) == (count == 0)


@pytest.mark.parametrize("name", CALLS)
def test_equations_run_as_they_are(name):
    function, args, _ = CALLS[name]
    traced = jax.make_jaxpr(function)(*args)
    env = dict(zip(traced.jaxpr.invars, args, strict=True)) | dict(
        zip(traced.jaxpr.constvars, traced.consts, strict=True)
    )
    for eqn in traced.eqns:
        operands = [v.val if internals.is_literal(v) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, internals.run(eqn, operands), strict=True))
    results = [env[v] for v in traced.jaxpr.outvars]
    jax.tree.map(np.testing.assert_array_equal, results, jax.tree.leaves(function(*args)))


def test_parameters_of_layer_primitives():
    product = only(lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ()))), W, X)
    assert product.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    image, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 1, 4))
    convolution = only(
        lambda k, x: lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        ),
        kernel,
        image,
    )
    assert convolution.params["dimension_numbers"].rhs_spec == (3, 2, 0, 1)
    assert (
        convolution.params["feature_group_count"] == 2
        and convolution.params["batch_group_count"] == 1
    )
    gather = next(
        e
        for e in equations(lambda w, i: w[i], W, jnp.array([1, 0]))
        if e.primitive.name == "gather"
    )
    assert gather.params["slice_sizes"] == (1, 3)
    assert gather.params["dimension_numbers"].start_index_map == (0,)
    assert gather.params["dimension_numbers"].collapsed_slice_dims == (0,)


def test_parameters_of_layout_primitives():
    def moved(w):
        w = jnp.transpose(w)[1:, :].astype(jnp.bfloat16).reshape(2, 1, 2)
        return lax.rev(jnp.broadcast_to(jnp.squeeze(w, 1)[None], (3, 2, 2)), (0,))

    names = [eqn.primitive.name for eqn in equations(moved, W)]
    assert set(names) <= internals.KEEP_ENTRIES, names
    assert {
        "transpose",
        "slice",
        "convert_element_type",
        "reshape",
        "squeeze",
        "broadcast_in_dim",
        "rev",
    } <= set(names)


def test_thin_calls_are_inlined_and_others_are_not():
    def names(function, *args):
        return [
            eqn.primitive.name for eqn in internals.inlined(jax.make_jaxpr(function)(*args)).eqns
        ]

    assert "gather" in names(lambda w: jnp.take(w, jnp.arange(2), axis=0), W)
    assert "dot_general" in names(lambda w, x: jnp.einsum("ij,jk->ik", x, w), W, X)
    assert names(jax.jit(lambda w, x: jnp.sin(x @ w)), W, X) == ["jit"]


def test_one_call_inlined_twice_keeps_its_variables_apart():
    def function(w, i, j):
        return jnp.take(w, i, axis=0) - 2.0 * jnp.take(w, j, axis=0)

    args = W, jnp.array([0, 1]), jnp.array([1, 1])
    thin = internals.inlined(jax.make_jaxpr(function)(*args))
    assert len({v for eqn in thin.eqns for v in eqn.outvars}) == sum(
        len(eqn.outvars) for eqn in thin.eqns
    )
    np.testing.assert_array_equal(jaxpr_as_fun(thin)(*args)[0], function(*args))


def test_axes_are_pythons_integers_where_vmap_writes_numpys():
    """`jax.vmap` refuses NumPy's integers as the axes that capture hands to it."""

    def sums(row):
        return jnp.sum(jnp.broadcast_to(row, (2, 3)), axis=1)

    eqns = {eqn.primitive.name: eqn for eqn in equations(jax.vmap(sums), jnp.ones((4, 3)))}
    broadcast = internals.broadcast(eqns["broadcast_in_dim"]).dimensions
    assert (broadcast, internals.axes_of(eqns["reduce_sum"])) == ((0, 2), (2,))
    assert {type(axis) for axis in (*broadcast, *internals.axes_of(eqns["reduce_sum"]))} == {int}
