"""Every alias inside `nnx.Optimizer`: loops, checkpoints, and one compilation.

The state's structure is that of `init` for ever, whatever a framework does to its leaves. Where
values do not matter, a loop is only traced: what keeps no structure fails there.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conformance import cases, problems
from flax import nnx, serialization

NAMES = list(cases.ALIASES)
every = pytest.mark.parametrize("name", NAMES)
# The losses of a scan are compared with those of a plain loop for what is recommended first.
VALUES = ("shampoo", "soap", "kron_psgd")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs run for microseconds: compile them without most optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def batch(name):
    """Inputs, targets, and the method's extra arguments."""
    rng = np.random.default_rng(3)
    with jax.ensure_compile_time_eval():  # it is asked for while a step is traced
        arrays = cases.CASES[name].extras(rng)
        return problems.array(rng, 6, 4), problems.array(rng, 6, 2), arrays


def fresh(name, wrapped=lambda tx: tx):
    """A model and its optimizer."""
    model = problems.model()
    tx = wrapped(cases.CASES[name].transformation(problems.NNX))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def step(name, model, optimizer):
    """One training step, which returns the loss."""
    x, y, arrays = batch(name)
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(jnp.square(model(x) - y)))(model)
    optimizer.update(model, grads, **arrays, **cases.CASES[name].static(problems.NNX))
    return loss


@functools.cache
def trained(name):
    """(model, optimizer, jitted step, losses, how often the step was traced) after three steps."""
    model, optimizer = fresh(name)
    traces = []

    @nnx.jit
    def jitted(model, optimizer):
        traces.append(1)
        return step(name, model, optimizer)

    losses = [float(jitted(model, optimizer)) for _ in range(3)]
    return model, optimizer, jitted, losses, len(traces)


@every
def test_a_jitted_loop_compiles_once_and_keeps_the_structure(name):
    _, optimizer, _, losses, traces = trained(name)
    assert traces == 1
    assert np.isfinite(losses).all() and losses[-1] != losses[0]
    ours = jax.tree.structure(nnx.state(optimizer))
    assert ours == jax.tree.structure(nnx.state(fresh(name)[1]))


def by_nnx_scan(name, pair):
    def body(pair, _):
        return pair, step(name, *pair)

    loop = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return loop(pair, jnp.arange(3))[1]


def by_lax_scan(name, pair):
    graph, state = nnx.split(pair)

    def body(state, _):
        pair = nnx.merge(graph, state)
        loss = step(name, *pair)
        return nnx.state(pair), loss

    return jax.lax.scan(body, state, None, length=3)[1]


def by_fori_loop(name, pair):
    def body(_, pair):
        step(name, *pair)
        return pair

    return nnx.fori_loop(0, 3, body, pair)[0].kernel[...]


def by_cond(name, pair):
    def taken(model, optimizer):
        return step(name, model, optimizer)

    return nnx.cond(jnp.bool_(True), taken, lambda model, optimizer: jnp.float32(0), *pair)


LOOPS = {
    "nnx.scan": by_nnx_scan,
    "lax.scan": by_lax_scan,
    "nnx.fori_loop": by_fori_loop,
    "nnx.cond": by_cond,
}


def through(name, loop, wrapped=lambda tx: tx):
    """The loop over a model and an optimizer, as a function of their state."""
    graph, state = nnx.split(fresh(name, wrapped))
    return (lambda state: loop(name, nnx.merge(graph, state))), state


@every
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_keeps_the_structure(name, loop):
    jax.eval_shape(*through(name, LOOPS[loop]))


@every
def test_accumulation_keeps_the_structure_within_a_scan(name):
    def accumulated(tx):
        return optax.MultiSteps(tx, 2).gradient_transformation()

    jax.eval_shape(*through(name, by_nnx_scan, accumulated))


@pytest.mark.parametrize("name", VALUES)
def test_a_scan_gives_the_losses_of_a_plain_loop(name):
    losses = jax.jit(through(name, by_nnx_scan)[0])(through(name, by_nnx_scan)[1])
    np.testing.assert_allclose(losses, trained(name)[3], rtol=1e-4)


@every
def test_orbax_restores_into_a_fresh_and_an_abstract_optimizer(name, tmp_path):
    model, optimizer, jitted, _, _ = trained(name)
    pair = model, optimizer
    saved = jax.tree.map(jnp.copy, nnx.state(pair))
    abstract = nnx.eval_shape(lambda: fresh(name))
    targets = {
        "fresh": jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(fresh(name))),
        "abstract": nnx.state(abstract),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = {
            kind: checkpointer.restore(tmp_path / "state", target)
            for kind, target in targets.items()
        }
    for state in restored.values():
        chex.assert_trees_all_equal(nnx.to_pure_dict(state), nnx.to_pure_dict(saved))
    resumed = fresh(name)
    nnx.update(resumed, restored["abstract"])
    went_on = nnx.clone(pair)
    assert float(jitted(*resumed)) == float(jitted(*went_on))
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(resumed)), nnx.to_pure_dict(nnx.state(went_on))
    )


@every
def test_msgpack_restores_into_a_fresh_state(name):
    """`flax.serialization` of the optimizer's state, of NNX and of a plain tree of parameters."""
    case, params = cases.CASES[name], cases.tree(0)
    tx = case.transformation()
    arrays = case.extras(np.random.default_rng(0))
    state = jax.eval_shape(
        lambda state: tx.update(params, state, params, **arrays, **case.static())[1],
        tx.init(params),
    )
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 9, x.shape), x.dtype), state)
    back = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    chex.assert_trees_all_equal(back, state)

    pair = trained(name)[:2]
    written = nnx.to_pure_dict(nnx.state(pair[1]))
    empty = nnx.to_pure_dict(nnx.state(fresh(name)[1]))
    back = serialization.from_bytes(empty, serialization.to_bytes(written))
    chex.assert_trees_all_equal(back, written)
