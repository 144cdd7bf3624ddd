"""A finite outlier of the gradient moves no alias further than a few ordinary steps."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_curv
from optax_curv.preconditioners.chain_pieces import BoundByRunningNormState

WORST, LAST = 3.0, 3.0  # loss to the first one, and to the undisturbed run's last one
STRUCK, STEPS = 60, 200
SCALES = jnp.logspace(0, -1.5, 12).reshape(4, 3)

ALIASES = {
    "shampoo": functools.partial(optax_curv.shampoo, rms=1.0),
    "soap": optax_curv.soap,
    "kron_psgd": optax_curv.kron_psgd,
    "dense_psgd": optax_curv.dense_psgd,
    "lra_psgd": functools.partial(optax_curv.lra_psgd, rank=2),
}


def losses(tx):
    """A function of the outlier's size: (losses of a noisy quadratic, how often it was held)."""

    def run(outlier):
        def step(carry, i):
            w, state = carry
            g = SCALES * w + 1e-3 * jax.random.normal(jax.random.key(i), w.shape)
            updates, state = tx.update(g * jnp.where(i == STRUCK, outlier, 1), state, w)
            return (w + updates, state), 0.5 * jnp.sum(SCALES * w**2)

        w = jnp.ones((4, 3))
        (_, state), values = jax.lax.scan(step, (w, tx.init(w)), jnp.arange(STEPS))
        is_bound = lambda x: isinstance(x, BoundByRunningNormState)  # noqa: E731
        (bound,) = [x for x in jax.tree.leaves(state, is_leaf=is_bound) if is_bound(x)]
        return values, bound.held

    return jax.jit(run)


@pytest.mark.parametrize("name", ALIASES)
def test_an_outlier_costs_a_few_steps_whatever_its_size(name):
    run = losses(ALIASES[name](0.02))
    plain, never = run(1.0)
    assert plain[-1] < 0.4 * plain[0]
    for outlier in (1e1, 1e4, 1e8):
        struck, held = run(outlier)
        assert struck.max() < WORST * plain[0]
        assert struck[-1] < LAST * plain[-1] + 1e-4 * plain[0]
        assert held >= never + 1
    np.testing.assert_array_equal(struck[:STRUCK], plain[:STRUCK])


def test_every_alias_has_the_bound_by_default():
    for name, maker in vars(optax_curv).items():
        if hasattr(optax_curv, f"scale_by_{name}"):
            parameter = inspect.signature(maker).parameters["gradient_bound"]
            assert parameter.default == 3.0, name


def test_the_bound_can_be_left_out_and_must_not_be_below_one():
    state = optax_curv.shampoo(0.1, gradient_bound=None).init({"w": jnp.ones((3, 2))})
    assert not any(isinstance(x, BoundByRunningNormState) for x in state)
    with pytest.raises(ValueError, match=r"kron_psgd: expected gradient_bound >= 1, got .*=0.5"):
        optax_curv.kron_psgd(0.1, gradient_bound=0.5)
