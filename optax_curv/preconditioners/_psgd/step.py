"""One step of a group of pieces: their factors move, and the new P is applied to their tensors.

A step of one piece touches some dozen arrays of its size. On a CPU a group therefore goes through
in chunks that fit the cache; on an accelerator it is one batch. With `factor_sharding` each device
does so with its part of the group.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import kron_matvec
from optax_curv.preconditioners._psgd import geometries as kron_geometries
from optax_curv.preconditioners._psgd.kron_layout import Group, rounded
from optax_curv.preconditioners._psgd.options import Options
from optax_curv.preconditioners._stacks.owners import as_kept, divided, equally_varying
from optax_curv.preconditioners._transformation import contracts

BALANCE_PROBABILITY = 0.01  # as in psgd_torch: the factors' scales drift slowly apart
CHUNK = 2**17  # entries: 0.5 MiB of float32; a step holds several such arrays in a core's cache
WORD = 32  # bits


class Numbers(NamedTuple):
    """The scalars of one step."""

    moves: jax.Array
    balances: jax.Array
    sound: jax.Array
    correction: Any
    rate: jax.Array
    damping: jax.Array


class Given(NamedTuple):
    """What a step reads: the signal to whiten (None: the tensor itself), the probe or None, random bits or None."""

    signal: jax.Array | None
    probe: jax.Array | None
    bits: jax.Array | None


def averaged(b1, grads, momentum, sound):
    """The new momentum m + (1 - b1)(g - m), the old one where not `sound`, None where there is none."""
    if momentum is None:
        return None
    b1 = jnp.asarray(b1)
    return jax.tree.map(
        lambda m, g: (m + jnp.where(sound, (1 - b1) * (g - m), 0)).astype(m.dtype), momentum, grads
    )


def bias_correction(b1, state):
    """By which to divide the momentum after this step."""
    return 1.0 if state.momentum is None else 1 - jnp.asarray(b1) ** (state.count + 1)


def numbers(options: Options, count, sound, correction, key) -> Numbers:
    """The scalars of the step `count`."""
    update_key, balance_key = jax.random.split(key)
    moves = jnp.bool_(True)
    if not options.always_updates:
        moves = jax.random.uniform(update_key) < contracts.value_at(
            options.update_probability, count
        )
    return Numbers(
        moves=moves,
        balances=jax.random.bernoulli(balance_key, BALANCE_PROBABILITY),
        sound=sound,
        correction=correction,
        rate=contracts.value_at(options.precond_lr, count),
        damping=contracts.value_at(options.damping, count),
    )


def random_bits(options: Options, tensors, key) -> list:
    """Bits for `_signs` of each group, uint32 [n, words], all of one draw: each draw costs compile time."""
    if options.geometry == "right_triangular":
        return [None] * len(tensors)
    shapes = [(len(x), -(-_parts(options, x) * math.prod(x.shape[1:]) // WORD)) for x in tensors]
    draw = as_kept(
        jax.random.bits(key, (sum(map(math.prod, shapes)),), jnp.uint32), options.factor_sharding
    )
    bits, start = [], 0
    for shape in shapes:
        bits.append(draw[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)
    return bits


def _parts(options, x):
    """How many real numbers are drawn for an entry: noise, the probe of "eq", and imaginary parts of both."""
    return (1 + (options.geometry == "eq")) * (1 + jnp.iscomplexobj(x))


def _signs(options, bits, x):
    """Noise, and a probe, of unit variance like x [n, ...]: signs, ± 1/√2 ± i/√2 where complex.

    Everything here sees second moments only, and of independent signs they are those of a normal:
    E[n nᴴ] = I. A sign costs one bit, a normal a hash and an inverse error function.
    """
    size, real = _parts(options, x) * math.prod(x.shape[1:]), jnp.finfo(x.dtype).dtype
    spread = (bits[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & jnp.uint32(1)
    signs = 1 - 2 * spread.reshape(len(x), -1)[:, :size].astype(real)
    signs = signs.reshape(len(x), -1, 1 + jnp.iscomplexobj(x), *x.shape[1:])
    signs = (
        (signs[:, :, 0] + 1j * signs[:, :, 1]) / math.sqrt(2)
        if jnp.iscomplexobj(x)
        else signs[:, :, 0]
    )
    return signs[:, 0], signs[:, -1]


def first_entries(factors):
    """Of each piece, [n]: zero in factors that have not been set, and not in those that have."""
    return factors[0].reshape(len(factors[0]), -1)[:, 0]


def _with_scale(options, now: Numbers, factors, signal, probe):
    """The factors, of the right scale where they were not set."""
    if options.geometry == "right_triangular":
        return factors
    damping = now.damping.astype(jnp.finfo(signal.dtype).dtype)
    of_one = functools.partial(kron_geometries.set_scale, options.geometry, damping=damping)
    unset = jnp.any(first_entries(factors) == 0)
    return jax.lax.cond(unset, lambda q: jax.vmap(of_one)(q, signal, probe), lambda q: q, factors)


def _moved(options, now: Numbers, factors, applied, lipschitz, signal, given: Given):
    """(factors, lipschitz) after one step of every factor."""
    rate = now.rate.astype(lipschitz.dtype)
    if options.geometry == "right_triangular":
        eps = jnp.asarray(options.eps, lipschitz.dtype)
        move = functools.partial(kron_geometries.move_right_triangular, rate=rate, eps=eps)
        return jax.vmap(move)(factors, signal), lipschitz
    noise, random_probe = _signs(options, given.bits, signal)
    eps = jnp.finfo(lipschitz.dtype).eps
    signal = signal + (now.damping.astype(lipschitz.dtype) + eps * jnp.abs(signal)) * noise
    probe = random_probe if given.probe is None and options.geometry == "eq" else given.probe
    decay = jnp.asarray(options.lipschitz_decay, lipschitz.dtype)
    move = functools.partial(
        kron_geometries.move_factors, options.geometry, rate=rate, lipschitz_decay=decay
    )
    moved = jax.vmap(move)(factors, applied, lipschitz, signal, probe)
    # The steps of "qep" see the factors' scales.
    balance = jax.vmap(functools.partial(kron_geometries.balance, options.geometry))
    if options.geometry == "qep":
        return balance(*moved)
    return jax.lax.cond(now.balances, balance, lambda *kept: kept, *moved)


def _fingerprint(factors):
    """Of each piece a sum of bits weighted by position, exact in any order of summation: uint32 [n].

    The bits are those of diagonal factors, and of the diagonal, first row and first column of dense
    ones: whatever scales, replaces, transposes or masks a factor changes some of them, and to read
    all costs as much as to apply P.
    """
    total = jnp.uint32(0)
    for q in factors:
        lines = q
        if q.ndim > 2:
            lines = jnp.concatenate(
                [jnp.diagonal(q, axis1=1, axis2=2), q[:, 0], q[:, :, 0]], axis=1
            )
        for part in [lines.real, lines.imag] if jnp.iscomplexobj(q) else [lines]:
            unsigned = jnp.dtype(f"uint{8 * min(4, part.dtype.itemsize)}")
            bits = (
                jax.lax.bitcast_convert_type(part, unsigned).reshape(len(q), -1).astype(jnp.uint32)
            )
            weights = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1
            total = 31 * total + jnp.sum(bits * weights, axis=1, dtype=jnp.uint32)
    return total


def by_piece() -> bool:
    """Whether what only reads factors takes the pieces one by one: a CPU need not join them, a GPU waits for calls."""
    return jax.default_backend() == "cpu"


def kept_is_usable(layout, state):
    """Whether every factor has been set, and the P that is kept, if it is, is that of the factors: bool []."""
    if by_piece():
        factors = [
            tuple(q.reshape(-1, *q.shape[len(piece.stack) :]) for q in of_piece)
            for piece, of_piece in zip(layout.pieces, layout.by_piece(state.factors), strict=True)
        ]
        factors = layout.in_order_of_groups(factors)
    else:
        factors = layout.join(state.factors)
    usable = jnp.all(jnp.concatenate([jnp.ones([0]), *map(first_entries, factors)]) != 0)
    if state.fingerprint is None:
        return usable
    return usable & jnp.all(
        jnp.concatenate([state.fingerprint[:0], *map(_fingerprint, factors)]) == state.fingerprint
    )


def _step(options, now: Numbers, kept, group: Group, given: Given):
    """(group after the step, whether all that the batch saw and made is sound: bool [n])."""
    tensor = group.tensor / jnp.asarray(now.correction, jnp.finfo(group.tensor.dtype).dtype)
    signal = tensor if given.signal is None else given.signal
    preconditioners = jax.vmap(functools.partial(kron_geometries.preconditioners, options.geometry))
    factors = _with_scale(options, now, group.factors, signal, given.probe)

    def moved(factors, applied, lipschitz, _):
        factors, lipschitz = _moved(options, now, factors, applied, lipschitz, signal, given)
        factors = rounded(factors, kept)
        applied = preconditioners(factors)
        if not options.caches:
            return factors, applied, lipschitz, None
        return factors, rounded(applied, kept), lipschitz, _fingerprint(factors)

    fingerprint = None
    if options.caches:
        fingerprint = _fingerprint(factors)
        fresh = jnp.all(fingerprint == group.fingerprint)
        computed = lambda q: rounded(preconditioners(q), kept)  # noqa: E731
        applied = jax.lax.cond(fresh, lambda _: group.preconditioners, computed, factors)
    else:
        applied = preconditioners(factors)
    old = (factors, applied, group.lipschitz, fingerprint)
    if options.always_updates:
        factors, applied, lipschitz, fingerprint = moved(*old)
    else:
        factors, applied, lipschitz, fingerprint = jax.lax.cond(
            now.moves, moved, lambda *kept: kept, *old
        )
    product = jax.vmap(kron_matvec)(applied, tensor)
    # A bound is not finite wherever a second moment is not, so the factors need not be read.
    good = now.sound & contracts.is_finite(lipschitz, product)
    new = Group(factors, lipschitz, applied if options.caches else None, fingerprint, product)
    new = jax.tree.map(lambda x, old: jnp.where(good, x, old), new, group)
    return new._replace(tensor=product), jnp.broadcast_to(good, len(tensor))


def _in_chunks(step, group: Group, given: Given):
    """`step(group, given)`, on a CPU of as many pieces at a time as fit the cache."""
    count, size = len(group.tensor), math.prod(group.tensor.shape[1:])
    limit = max(1, CHUNK // size) if jax.default_backend() == "cpu" else count
    chunk = max(n for n in range(1, min(limit, count) + 1) if count % n == 0)
    if chunk == count:
        return step(group, given)

    def body(i, carry):
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        return jax.tree.map(
            put, carry, step(jax.tree.map(part, carry[0]), jax.tree.map(part, given))
        )

    return jax.lax.fori_loop(0, count // chunk, body, (group, group.lipschitz[:, 0] < 0))


def step_of_group(options: Options, now: Numbers, kept, group: Group, given: Given):
    """(group after the step, whether all that it saw and made is sound); `kept` are the dtypes of kept factors.

    Where what is given cannot be squared, `now.sound`, nothing moves. What turns out not to be
    finite on the way, in products of numbers that all are, leaves the factors of its own chunk
    where they were: to choose in the end between all new and all old factors would read them once
    more.
    """
    step = functools.partial(_in_chunks, functools.partial(_step, options, now, kept))
    group, good = divided(step, options.factor_sharding)(*equally_varying((group, given)))
    return group, jnp.all(good)
