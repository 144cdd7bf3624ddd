"""One step of all factors of a tree, by group, and the preconditioners that they give."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from optax_curv.preconditioners import contracts, kron_geometries
from optax_curv.preconditioners.distribution import as_kept, divided
from optax_curv.preconditioners.kron_options import Options

BALANCE_PROBABILITY = 0.01  # as in psgd_torch: the factors' scales drift slowly apart


def momentum_and_direction(b1, grads, state):
    """(new momentum, bias-corrected momentum), or (None, the gradients)."""
    if state.momentum is None:
        return None, grads
    b1 = jnp.asarray(b1)
    momentum = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(m.dtype), state.momentum, grads)
    correction = 1 - b1 ** (state.count + 1)
    return momentum, jax.tree.map(lambda m: (m / correction).astype(m.dtype), momentum)


def _set_scale(options, count, factors, lipschitz, signal, probe):
    """The factors of a group, of the right scale where they were not set."""
    damping = contracts.value_at(options.damping, count, lipschitz.dtype)
    of_one = functools.partial(kron_geometries.set_scale, options.geometry, damping=damping)
    return divided(jax.vmap(of_one), options.factor_sharding)(factors, signal, probe)


def _move(options, count, factors, lipschitz, signal, probe, noise):
    """(factors, lipschitz) of a group after one step of every factor."""
    real = lipschitz.dtype
    rate = contracts.value_at(options.precond_lr, count, real)
    if options.geometry == "right_triangular":
        move = functools.partial(kron_geometries.move_right_triangular, rate=rate, eps=jnp.asarray(options.eps, real))
        return divided(jax.vmap(move), options.factor_sharding)(factors, signal), lipschitz
    noise, normal_probe = noise
    damping = contracts.value_at(options.damping, count, real)
    signal = signal + (damping + jnp.finfo(real).eps * jnp.abs(signal)) * noise
    if probe is None and options.geometry == "eq":
        probe = normal_probe
    decay = jnp.asarray(options.lipschitz_decay, real)
    move = functools.partial(kron_geometries.move_factors, options.geometry, rate=rate, lipschitz_decay=decay)
    return divided(jax.vmap(move), options.factor_sharding)(factors, lipschitz, signal, probe)


def _noises(options, signals, key):
    """For each group (noise, probe), N(0, I) like its signal, all of one draw: each draw costs compile time."""
    if options.geometry == "right_triangular":
        return [None] * len(signals)
    shapes = [(1 + (options.geometry == "eq"), 1 + jnp.iscomplexobj(signal), *signal.shape) for signal in signals]
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    draw = as_kept(jax.random.normal(key, (ends[-1] if ends else 0,), jnp.float32), options.factor_sharding)

    def noise(signal, shape, end):
        parts = draw[end - math.prod(shape) : end].reshape(shape).astype(jnp.finfo(signal.dtype).dtype)
        parts = (parts[:, 0] + 1j * parts[:, 1]) / math.sqrt(2) if shape[1] == 2 else parts[:, 0]
        return parts[0], parts[-1]

    return [noise(*of_group) for of_group in zip(signals, shapes, ends, strict=True)]


def _balance(options, factors, lipschitz, key):
    """All groups balanced now and then, for "qep", whose steps see the factors' scales, always."""

    def balanced(factors, lipschitz):
        balance = functools.partial(kron_geometries.balance, options.geometry)
        balance = divided(jax.vmap(balance), options.factor_sharding)
        groups = [balance(*of_group) for of_group in zip(factors, lipschitz, strict=True)]
        return [q for q, _ in groups], [bounds for _, bounds in groups]

    if options.geometry == "right_triangular":
        return factors, lipschitz
    if options.geometry == "qep":
        return balanced(factors, lipschitz)
    now = jax.random.bernoulli(key, BALANCE_PROBABILITY)
    return jax.lax.cond(now, balanced, lambda *kept: kept, factors, lipschitz)


def learn(options: Options, state, factors, lipschitz, signals, probes):
    """(factors, lipschitz, key) of all groups, moved with the probability `update_probability`."""
    key, update_key, balance_key, noise_key = jax.random.split(jax.random.wrap_key_data(state.key), 4)
    if options.geometry != "right_triangular":
        groups = zip(factors, lipschitz, signals, probes, strict=True)
        factors = [_set_scale(options, state.count, *of_group) for of_group in groups]

    def moved(factors, lipschitz):
        noises = _noises(options, signals, noise_key)
        groups = zip(factors, lipschitz, signals, probes, noises, strict=True)
        steps = [_move(options, state.count, *of_group) for of_group in groups]
        return _balance(options, [q for q, _ in steps], [bounds for _, bounds in steps], balance_key)

    if options.always_updates:
        factors, lipschitz = moved(factors, lipschitz)
    else:
        probability = contracts.value_at(options.update_probability, state.count)
        moves = jax.random.uniform(update_key) < probability
        factors, lipschitz = jax.lax.cond(moves, moved, lambda *kept: kept, factors, lipschitz)
    return factors, lipschitz, jax.random.key_data(key)


def _fingerprint(factors):
    """A sum of the factors' bits weighted by position, exact in any order of summation: uint32 []."""
    total = jnp.uint32(0)
    for q in jax.tree.leaves(factors):
        parts = [q.real, q.imag] if jnp.iscomplexobj(q) else [q]
        for part in parts:
            unsigned = jnp.dtype(f"uint{8 * min(4, part.dtype.itemsize)}")
            bits = jax.lax.bitcast_convert_type(part, unsigned).reshape(-1).astype(jnp.uint32)
            weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
            total = 31 * total + jnp.sum(bits * weights, dtype=jnp.uint32)
    return total


def applied_factors(options: Options, factors, cached, fingerprint):
    """(P of each group, fingerprint of the factors): what is cached serves until a bit of the factors changes."""

    def computed(factors):
        of_one = functools.partial(kron_geometries.preconditioners, options.geometry)
        return [divided(jax.vmap(of_one), options.factor_sharding)(q) for q in factors]

    if not options.caches:
        return computed(factors), None
    now = _fingerprint(factors)
    return jax.lax.cond(now != fingerprint, computed, lambda _: cached, factors), now
