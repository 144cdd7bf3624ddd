"""Directions without a gradient: they do not move, and when they wake they take ordinary steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv

STILL = 1e-3  # of the living ones' usual step
KEPT, THROWN = 0.5, 10.0  # least step of the living to their usual one, largest woken to living
DEAD, AWAKE = 400, 60
SHAPE = (12, 6)

# Small matrices take longer to compile than to run.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def sizes(tx, grads, seen=lambda u: u):
    """Root mean squares of what is `seen` of every update, an array [steps, parts]."""

    def step(state, g):
        updates, state = tx.update(g, state, g)
        return state, jnp.stack([jnp.sqrt(jnp.mean(x**2)) for x in seen(updates)])

    first = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
    return np.asarray(quick_jit(lambda g: jax.lax.scan(step, tx.init(first), g)[1])(grads))


def waking(seed=0, quiet=0.0, scale=1.0):
    """Noise whose first half of the columns is multiplied by `quiet` before it wakes."""
    g = jax.random.normal(jax.random.key(seed), (DEAD + AWAKE, *SHAPE))
    return scale * g.at[:DEAD, :, :3].multiply(quiet)


def halves(u):
    """(the columns that were dead, the living ones)."""
    return u[:, :3], u[:, 3:]


ALIASES = {
    "shampoo": optax_curv.shampoo,
    "soap": optax_curv.soap,
    "kron_psgd": optax_curv.kron_psgd,
    "kron_psgd_eq": functools.partial(optax_curv.kron_psgd, geometry="eq"),
    "kron_psgd_quad4p": functools.partial(optax_curv.kron_psgd, geometry="quad4p"),
    "dense_psgd": optax_curv.dense_psgd,
    "lra_psgd": functools.partial(optax_curv.lra_psgd, rank=3),
}


@pytest.mark.parametrize("name", ALIASES)
def test_dead_columns_are_still_and_wake_without_a_throw(name):
    dead, living = sizes(ALIASES[name](1.0), waking(), halves).T
    usual = np.median(living[DEAD // 2 : DEAD])
    assert dead[:DEAD].max() < STILL * usual
    # Shampoo's update has the size of the whole leaf: of so few columns that were never dead a half
    # falls to 0.36 of what it would be alone within a thousand steps, too.
    assert living[DEAD:].min() > (KEPT / 2 if name == "shampoo" else KEPT) * usual
    assert (dead[DEAD:] / living[DEAD:]).max() < THROWN


def test_shampoo_takes_woken_columns_for_what_they_would_be_had_they_never_been_dead():
    """Of many columns, whose sizes vary little; as many rows are too few for a dense moment."""
    g = jax.random.normal(jax.random.key(0), (DEAD + AWAKE, 16, 64))
    parts = lambda u: (u[:, :32], u[:, 32:])  # noqa: E731
    grads = {"woken": g.at[:DEAD, :, :32].set(0), "always": g}
    for name, usual in {"woken": 0.2 * 2**0.5, "always": 0.2}.items():
        woken, living = sizes(optax_curv.shampoo(1.0), grads[name], parts)[DEAD:].T
        assert living.min() > 0.6 * usual and (woken / living).max() < 1.3


@pytest.mark.parametrize("gradients", ["turned", "quiet", "tiny"])
def test_kron_psgd_follows_whatever_wakes_and_keeps_the_rest(gradients):
    """Directions that are no columns, those that had a small gradient, and gradients of 1e-6."""
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (6, 6)))[0]
    turn = turn if gradients == "turned" else jnp.eye(6)
    scale, quiet = 1e-6 if gradients == "tiny" else 1.0, 1e-3 if gradients == "quiet" else 0.0
    grads = waking(quiet=quiet, scale=scale) @ turn.T
    woken, living = sizes(optax_curv.kron_psgd(1.0), grads, lambda u: halves(u @ turn)).T
    usual = np.median(living[DEAD // 2 : DEAD])
    assert living[DEAD:].min() > KEPT * usual
    assert (woken[DEAD:] / living[DEAD:]).max() < THROWN
    if gradients == "tiny":
        assert woken[:DEAD].max() < STILL * usual


@pytest.mark.parametrize(
    "make",
    [
        optax_curv.dense_psgd,
        functools.partial(optax_curv.lra_psgd, rank=3),
        lambda rate: optax.chain(
            optax_curv.scale_by_kron_psgd(b1=0.9), optax.scale_by_learning_rate(rate)
        ),
    ],
    ids=["dense", "lra", "kron"],
)
def test_an_idle_leaf_wakes_with_an_ordinary_step(make):
    live, idle = 1e-2 * jax.random.normal(jax.random.key(2), (2, 100 + DEAD + AWAKE, 4, 3))
    grads = {"idle": idle.at[100:-AWAKE].set(0), "live": live}
    woken, living = sizes(make(1.0), grads, lambda u: (u["idle"], u["live"]))[-AWAKE:].T
    assert woken.max() < THROWN * living.max()
    assert woken[:20].max() > living.max() / THROWN


@pytest.mark.parametrize("make", [optax_curv.soap, optax_curv.scale_by_adam_in_basis])
def test_rounding_is_no_direction_to_walk_in(make):
    """All gradients lie in the span of three inputs; nothing moves outside of it."""
    inputs = jax.random.normal(jax.random.key(3), (3, 12))
    errors = jax.random.normal(jax.random.key(4), (100, 3, 8))
    layer = optax_curv.Layer("layer", "dense", "['w']", None, 12, 8)
    captured = make is not optax_curv.soap
    tx = make(optax_curv.Layers([layer])) if captured else make(1.0)

    def step(state, error):
        g = inputs.T @ error
        factors = optax_curv.KroneckerFactors(inputs.T @ inputs, error.T @ error, jnp.int32(1))
        extra = {"curvature": {"layer": factors}} if captured else {}
        updates, state = tx.update({"w": g}, state, {"w": g}, **extra)
        return state, updates["w"]

    start = tx.init({"w": jnp.zeros((12, 8))})
    moved = quick_jit(lambda e: jax.lax.scan(step, start, e)[1])(errors).sum(0)
    span = jnp.linalg.qr(inputs.T)[0]
    outside = jnp.linalg.norm(moved - span @ (span.T @ moved)) / jnp.linalg.norm(moved)
    assert outside < 1e-3


def test_dense_psgd_stays_where_a_full_batch_has_brought_it():
    """Its gradients keep few directions, and turn when the loss is small."""
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 12), "c": (12,), "b": (12, 3)}
    x, y = (jnp.asarray(rng.normal(size=(40, n)), jnp.float32) for n in (8, 3))
    params = {n: jnp.asarray(rng.normal(size=s) * 0.3, jnp.float32) for n, s in shapes.items()}

    def loss(p):
        return jnp.mean(jnp.sum((jnp.tanh(x @ p["a"] + p["c"]) @ p["b"] - y) ** 2, -1))

    tx = optax_curv.dense_psgd(0.05)

    def step(carry, _):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), value

    start = params, tx.init(params)
    values = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 400)[1])(start)
    assert values[100:200].min() < values[0] / 10
    assert values[200:].max() < values[0]


@pytest.mark.parametrize("small", [1e-16, 1e-6])
def test_the_kl_variant_follows_gradients_of_any_size(small):
    """Of four axes each moment has whitened gradients of order |g|⁻²."""
    shape = (2, 3, 2, 3)
    noise = jax.random.normal(jax.random.key(5), (60, *shape))
    scales = jnp.where(jnp.arange(60) < 20, small, 1.0).reshape(-1, 1, 1, 1, 1)
    tx = optax_curv.scale_by_shampoo(kl=True)
    found = sizes(tx, noise * scales, lambda u: (u,))
    usual = sizes(tx, noise, lambda u: (u,))
    assert np.isfinite(found).all()
    assert usual[-1] / 10 < found[-1] < 10 * usual[-1]
