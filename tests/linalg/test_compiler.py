"""The hints for XLA change no value, and each has a test that fails where it is not needed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.linalg import _compiler as compiler

MATRIX = jnp.arange(6.0).reshape(2, 3)
PLACES = [(0, 1), (1, 2), (3, 1), (0, 4)]
seen_on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA does on CPU")
seen_from_0_10 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="seen in the XLA of JAX 0.10"
)


def optimised(function, *arrays) -> str:
    return jax.jit(function).lower(*arrays).compile().as_text()


@pytest.mark.parametrize(("start", "size"), PLACES)
def test_a_slice_of_a_stack_is_a_slice(start, size):
    x = jnp.arange(12.0).reshape(4, 3)

    def cut(x):
        return compiler.slice_of_stack(x, start, (size,))

    for function in (cut, jax.jit(cut)):
        np.testing.assert_array_equal(function(x), x[start : start + size])
    batched = jax.vmap(cut, in_axes=2)(jnp.stack([x, -x], axis=2))
    np.testing.assert_array_equal(batched, jnp.stack([x, -x])[:, start : start + size])
    gradient = jax.grad(lambda x: jnp.sum(cut(x)))(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x).at[start : start + size].set(1))


def test_a_slice_takes_the_shape_of_its_stack():
    x = jnp.arange(24.0).reshape(6, 4)
    np.testing.assert_array_equal(compiler.slice_of_stack(x, 2, ()), x[2])
    np.testing.assert_array_equal(compiler.slice_of_stack(x, 2, (2, 2)), x[2:].reshape(2, 2, 4))


@seen_on_cpu
@seen_from_0_10
def test_one_kernel_serves_all_slices_of_a_stack():
    def kernels(cut):
        text = optimised(lambda x: [cut(x, i) * 2 for i in range(6)], jnp.zeros((6, 5)))
        bodies = re.findall(r"^%(\S*fused\S*) \([^\n]*\n(.*?)^}", text, re.MULTILINE | re.DOTALL)
        plain = (re.sub(r"%[\w.\-]+|, metadata=\{[^\n]*", "", body) for _, body in bodies)
        return len(set(plain)), len(bodies)

    assert kernels(lambda x, i: x[i : i + 1]) == (6, 6)  # else `slice_of_stack` may go
    assert kernels(lambda x, i: compiler.slice_of_stack(x, i, (1,))) == (1, 6)


def test_what_is_materialized_keeps_its_values():
    x = jnp.arange(12.0).reshape(4, 3)
    found = jax.jit(lambda x: compiler.materialize(x.T) + 1)(x)
    np.testing.assert_array_equal(found, x.T + 1)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(compiler.materialize(x)))(x), 1)
    np.testing.assert_array_equal(jax.vmap(compiler.materialize)(x), x)


@seen_on_cpu
def test_a_transposition_is_folded_into_a_product_unless_it_is_materialized():
    def transposes(prepare):
        def gram(x):
            x = prepare(x.mT)
            return compiler.full_matmul(x, x.mT)

        return len(re.findall(r" transpose\(", optimised(gram, jnp.zeros((4, 64, 32)))))

    assert transposes(lambda x: x) == 0  # else `materialize` may go
    assert transposes(compiler.materialize) > 0


@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_that_is_not_recomputed_keeps_its_value(flag):
    assert bool(compiler.not_recomputed(jnp.bool_(flag))) is flag
    assert bool(jax.jit(compiler.not_recomputed)(jnp.bool_(flag))) is flag
    flags = jnp.array([flag, not flag])
    np.testing.assert_array_equal(jax.vmap(compiler.not_recomputed)(flags), flags)


@seen_on_cpu
def test_a_flag_is_derived_in_every_kernel_that_uses_it_unless_it_is_kept():
    def size(keep):
        def guarded(grads):
            sound = keep(jnp.stack([jnp.all(jnp.isfinite(g)) for g in grads]).all())
            return [jnp.where(sound, 2 * g, 0) for g in grads]

        return len(optimised(guarded, [jnp.zeros((64, 64))] * 30))

    plain, kept = size(lambda flag: flag), size(compiler.not_recomputed)
    assert plain > 1.5 * kept  # else `not_recomputed` may go


def test_a_function_compiled_once_is_traced_once():
    traced = []

    def function(x):
        traced.append(x.shape)
        return 2 * x

    once = compiler.compiled_once(function)

    def program(x):
        return once(x) + once(2 * x) + once(3 * x)

    np.testing.assert_array_equal(jax.jit(program)(jnp.ones(3)), 12)
    assert traced == [(3,)]


def test_each_platform_has_its_own_function():
    def chosen(x):
        return compiler.per_platform(x, cpu=lambda x: x + 1, other=lambda x: x + 2)

    expected = 1 if jax.default_backend() == "cpu" else 2
    assert float(jax.jit(chosen)(jnp.float32(0))) == expected
    for platform, number in (("cpu", "1.0"), ("cuda", "2.0")):  # whatever this machine has
        exported = jax.export.export(jax.jit(chosen), platforms=[platform])(jnp.float32(0))
        assert re.findall(r"dense<(\d\.\d)", exported.mlir_module()) == [number]


def test_products_are_of_full_precision():
    jaxpr = str(jax.make_jaxpr(compiler.full_matmul)(jnp.ones((2, 2)), jnp.ones((2, 2))))
    assert "HIGHEST" in jaxpr


def test_what_is_apart_keeps_its_values():
    def function(x, y):
        return {"sum": x + y, "is": x > 1}

    x, y = jnp.arange(3.0), jnp.ones(3)
    for call in (jax.jit(function), jax.vmap(function)):
        found = jax.tree.map(np.asarray, compiler.apart(call, x, y))
        jax.tree.map(np.testing.assert_array_equal, found, function(x, y))


@seen_on_cpu
@seen_from_0_10
def test_a_loop_writes_where_it_has_read():
    """Moments enter factors [2, 256, 256], of which a product with the old ones is asked, too."""

    def copies(through):
        def of_part(factor, x):
            moment = x @ x.mT
            return jnp.tril(factor) + moment, jnp.sum(moment * (factor + factor.mT), (1, 2))

        def body(i, carry):
            part, x = (jax.lax.dynamic_slice_in_dim(y, i, 1) for y in carry[:2])
            new, size = through(of_part, part, x)
            put = jax.lax.dynamic_update_slice_in_dim
            return put(carry[0], new, i, 0), carry[1], put(carry[2], size, i, 0)

        def loop(factors, x):
            return jax.lax.fori_loop(0, 2, body, (factors, x, jnp.zeros(2)))[::2]

        given = jnp.zeros((2, 256, 256)), jnp.ones((2, 256, 64))
        step = jax.jit(loop, donate_argnums=0).lower(*given).compile()
        return len(re.findall(r"f32\[2,256,256\]\S* copy\(", step.as_text()))

    assert copies(lambda function, *arrays: function(*arrays)) > 0  # else `apart` may go
    assert copies(compiler.apart) == 0


def test_both_arrays_are_in_one_group_of_shardy():
    text = jax.jit(compiler._in_one_group).lower(MATRIX, MATRIX + 1).as_text()
    groups = [line.split("group_id=")[1] for line in text.splitlines() if "sharding_group" in line]
    assert len(groups) == 2 and groups[0] == groups[1]


def test_values_are_those_of_the_second_array_under_any_transformation(monkeypatch):
    monkeypatch.setattr(compiler, "_shard_alike", None)
    alike = compiler.sharded_alike
    many = jnp.stack([MATRIX, 2 * MATRIX, 3 * MATRIX])
    np.testing.assert_array_equal(alike(MATRIX, 2 * MATRIX), 2 * MATRIX)
    np.testing.assert_array_equal(jax.vmap(alike, (None, 0))(MATRIX, many), many)
    turned = jax.vmap(alike, (2, 1), 1)(many.transpose(1, 2, 0), many.transpose(1, 0, 2))
    np.testing.assert_array_equal(turned, many.transpose(1, 0, 2))
    gradient = jax.grad(lambda x: jnp.sum(alike(MATRIX, x) ** 2))
    np.testing.assert_array_equal(jax.jit(gradient)(MATRIX), 2 * MATRIX)
