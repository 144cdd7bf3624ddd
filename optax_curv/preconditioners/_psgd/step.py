"""One step of a stack: its factors move, and the new P is applied to its tensors.

A step of one tensor touches some dozen arrays of its size. On a CPU a stack therefore goes through
in chunks that fit the cache; on an accelerator it is one batch.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import kron_matvec
from optax_curv.linalg._chunks import moved_in_chunks, rows_at_once
from optax_curv.linalg._compiler import compiled_once, per_platform
from optax_curv.preconditioners._psgd import geometries
from optax_curv.preconditioners._psgd.geometries import Factors, array_of
from optax_curv.preconditioners._psgd.options import PsgdOptions
from optax_curv.preconditioners._transformation.numbers import value_at
from optax_curv.preconditioners._transformation.soundness import is_finite, kept_unless
from optax_curv.typing import Geometry, Number

BALANCE_PROBABILITY = 0.01  # as in psgd_torch: the factors' scales drift slowly apart
CHUNK = 2**19  # entries of all arrays of a part: 2 MiB of float32, what a core's cache holds
WORD = 32  # bits
REPEATS = 64  # of a step at most; each takes three quarters of the P that is too large


class Numbers(NamedTuple):
    """The scalars of one step.

    Attributes:
      moves: whether Q moves, bool [].
      balances: whether factors are balanced, bool [].
      sound: whether what is given is sound, bool []; nothing moves where it is not.
      rate: μ.
      damping: P stays below 1/damping.
      lipschitz_decay: β.
      eps: of the geometry "right_triangular".
    """

    moves: jax.Array
    balances: jax.Array
    sound: jax.Array
    rate: jax.Array
    damping: jax.Array
    lipschitz_decay: Number
    eps: Number


class Kind(NamedTuple):
    """Everything that decides how a step is traced; equal kinds of equal shapes share a trace.

    Attributes:
      geometry: of the options, and so are the next three.
      always_updates: whether the factors move at every step.
      keeps_preconditioners: whether P is kept.
      updates_last: whether P is applied before the factors move.
      dtypes: in which the factor of each axis is kept.
    """

    geometry: Geometry
    always_updates: bool
    keeps_preconditioners: bool
    updates_last: bool
    dtypes: tuple[Any, ...]


class Group(NamedTuple):
    """A stack of n tensors, as far as a step changes it.

    Attributes:
      factors: of each axis.
      lipschitz: running bounds [n, axes].
      preconditioners: P of each axis, zero where there is none of these factors yet; None where P
        is not kept.
      tensor: what P is applied to; afterwards the product.
    """

    factors: Factors
    lipschitz: jax.Array
    preconditioners: Factors | None
    tensor: jax.Array


class Given(NamedTuple):
    """A stack, as far as a step only reads it.

    Attributes:
      signal: what is whitened; None: the tensor itself.
      probe: of the Hessian-vector product that is the signal; None for whitening.
      bits: random bits of a probe, see `random_bits`; None where the geometry draws none.
    """

    signal: jax.Array | None
    probe: jax.Array | None
    bits: jax.Array | None


def numbers(options: PsgdOptions, count: jax.Array, sound: jax.Array, key: jax.Array) -> Numbers:
    """The scalars of the step `count`."""
    update_key, balance_key = jax.random.split(key)
    moves = jnp.bool_(True)
    if not options.always_updates:
        chance = value_at(options.update_probability, count)
        moves = jax.random.uniform(update_key) < chance
    return Numbers(
        moves=moves,
        balances=jax.random.bernoulli(balance_key, BALANCE_PROBABILITY),
        sound=sound,
        rate=value_at(options.precond_lr, count),
        damping=value_at(options.damping, count),
        lipschitz_decay=options.lipschitz_decay,
        eps=options.eps,
    )


def random_bits(
    options: PsgdOptions, tensors: Mapping[str, Any], key: jax.Array
) -> dict[str, jax.Array | None]:
    """Bits for the probes of "eq" of each stack, uint32 [n, words], all of one draw.

    Each draw costs compile time.
    """
    if options.geometry != "eq" or options.criterion == "newton":
        return dict.fromkeys(tensors)
    shapes = {
        name: (x.shape[0], -(-_parts(x) * math.prod(x.shape[1:]) // WORD))
        for name, x in tensors.items()
    }
    count = sum(map(math.prod, shapes.values()))
    draw = jax.random.bits(key, (count,), jnp.uint32)
    bits, start = {}, 0
    for name, shape in shapes.items():
        bits[name] = draw[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return bits


def _parts(x: Any) -> int:
    """How many real numbers are drawn for an entry."""
    return 1 + jnp.issubdtype(x.dtype, jnp.complexfloating)


def _signs(bits: jax.Array, x: jax.Array) -> jax.Array:
    """A probe of unit variance like x [n, ...]: signs, ± 1/√2 ± i/√2 where complex.

    Everything here sees second moments only, and of independent signs they are those of a normal:
    E[v vᴴ] = I. A sign costs one bit, a normal a hash and an inverse error function.
    """
    parts, real = _parts(x), jnp.finfo(x.dtype).dtype
    spread = (bits[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & jnp.uint32(1)
    signs = 1 - 2 * spread.reshape(len(x), -1)[:, : parts * math.prod(x.shape[1:])].astype(real)
    signs = signs.reshape(len(x), parts, *x.shape[1:])
    if parts == 1:
        return signs[:, 0]
    return (signs[:, 0] + 1j * signs[:, 1]) / math.sqrt(2)


def first_entries(factors: Factors) -> jax.Array:
    """The first entry of each tensor's first factor, [n]: zero only where it has not been set."""
    array = array_of(factors[0])
    return array.reshape(len(array), -1)[:, 0]


def are_usable(kept: dict[str, Factors]) -> jax.Array:
    """Whether every tensor has a P to apply: bool []."""
    entries = [jnp.zeros([0], bool), *(first_entries(x) != 0 for x in kept.values())]
    return jnp.all(jnp.concatenate(entries))


def rounded(factors: Factors, dtypes: tuple[Any, ...]) -> Factors:
    """The factors of the values that they have once kept in these dtypes."""

    def of_one(x, dtype):
        if x.dtype == dtype:
            return x
        limits = jnp.finfo(dtype)
        return jax.lax.reduce_precision(x, limits.nexp, limits.nmant)

    pairs = zip(factors, dtypes, strict=True)
    return tuple(jax.tree.map(lambda x, d=d: of_one(x, d), q) for q, d in pairs)


def _with_scale(
    kind: Kind,
    now: Numbers,
    factors: Factors,
    signal: jax.Array,
    probe: jax.Array | None,
) -> Factors:
    """The factors, of the right scale where they were not set."""
    if kind.geometry == "right_triangular":
        return factors
    damping = now.damping.astype(jnp.finfo(signal.dtype).dtype)
    of_one = functools.partial(geometries.set_scale, kind.geometry, damping=damping)
    unset = jnp.any(first_entries(factors) == 0)
    return jax.lax.cond(unset, lambda q: jax.vmap(of_one)(q, signal, probe), lambda q: q, factors)


def _moved(kind: Kind, now: Numbers, group: Group, given: Given, applied_of: Any) -> Group:
    """The group after a step of its factors, whose preconditioners `applied_of` computes.

    A tensor whose signal has grown beyond what its P has followed repeats the step.
    """
    signal = group.tensor if given.signal is None else given.signal
    dtype = group.lipschitz.dtype
    rate = now.rate.astype(dtype)
    if kind.geometry == "right_triangular":
        eps = jnp.asarray(now.eps, dtype)
        move = functools.partial(geometries.move_right_triangular, rate=rate, eps=eps)
        return applied_of(group._replace(factors=jax.vmap(move)(group.factors, signal)))
    probe = given.probe if given.bits is None else _signs(given.bits, signal)
    of_one: Any = functools.partial(
        geometries.seen, kind.geometry, damping=now.damping.astype(dtype)
    )
    move: Any = functools.partial(
        geometries.move_factors,
        kind.geometry,
        rate=rate,
        lipschitz_decay=jnp.asarray(now.lipschitz_decay, dtype),
    )
    # The steps of "qep" see the factors' scales.
    balance = jax.vmap(functools.partial(geometries.balance, kind.geometry))
    always = kind.geometry == "qep"

    def moved(carry):
        count, again, old = carry
        applied = applied_by(old)
        what = jax.vmap(of_one)(old.factors, applied, old.lipschitz, signal, probe)
        jumped = again & what.exists & (what.excess > 1)
        axes = jax.lax.cond(
            jnp.any(jumped),
            jax.vmap(geometries.blamed),
            lambda *_: jnp.zeros_like(jumped, int),
            *(what.moments, applied),
        )
        # What has been too large for P moves no factor otherwise, and no bound.
        usual = again & what.exists & ~jumped & (count == 0)
        kept = jax.vmap(move)(old.factors, old.lipschitz, what, axes, jumped, usual)
        kept = balance(*kept) if always else jax.lax.cond(now.balances, balance, _as_is, *kept)
        factors, lipschitz = kept
        group = applied_of(old._replace(factors=factors, lipschitz=lipschitz))
        return count + 1, jumped, group

    def unfinished(carry):
        return (carry[0] < REPEATS) & jnp.any(carry[1])

    start = jnp.int32(0), ~(group.lipschitz[:, 0] < 0), group  # all of them
    return jax.lax.while_loop(unfinished, moved, start)[-1]


def _step(kind: Kind, now: Numbers, group: Group, given: Given) -> tuple[Group, jax.Array]:
    """(group after the step, whether all that the batch saw and made is sound: bool [n])."""
    signal = group.tensor if given.signal is None else given.signal
    of_factors: Any = jax.vmap(functools.partial(geometries.preconditioners, kind.geometry))
    factors = _with_scale(kind, now, group.factors, signal, given.probe)

    def computed(factors):
        applied = of_factors(factors)
        return rounded(applied, kind.dtypes) if kind.keeps_preconditioners else applied

    if group.preconditioners is None:
        applied = computed(factors)
    else:
        kept = group.preconditioners
        fresh = jnp.all((first_entries(kept) != 0) | (first_entries(factors) == 0))
        applied = jax.lax.cond(fresh, lambda _: kept, computed, factors)

    def with_applied(group):
        factors = rounded(group.factors, kind.dtypes)
        return group._replace(factors=factors, preconditioners=computed(factors))

    def moved(group):
        return _moved(kind, now, group, given, with_applied)

    new = group._replace(factors=factors, preconditioners=applied)
    new = moved(new) if kind.always_updates else jax.lax.cond(now.moves, moved, lambda x: x, new)
    used = applied if kind.updates_last else applied_by(new)
    product = kron_matvec(used, group.tensor)
    # A bound is not finite wherever a second moment is not, so the factors need not be read.
    sound = now.sound & is_finite(new.lipschitz, product)
    if not kind.keeps_preconditioners:
        new = new._replace(preconditioners=None)
    return kept_unless(sound, new, group)._replace(tensor=product), jnp.broadcast_to(
        sound, len(product)
    )


def applied_by(group: Group) -> Factors:
    """The preconditioners of a group that has them."""
    assert group.preconditioners is not None
    return group.preconditioners


def _as_is(*kept: Any) -> Any:
    return kept


def _in_chunks(step: Any, group: Group, given: Given) -> tuple[Group, jax.Array]:
    """`step(group, given)`, on a CPU of as many tensors at a time as fit the cache."""
    if rows_at_once((group, given), CHUNK) >= len(group.tensor):
        return step(group, given)
    in_cache = functools.partial(moved_in_chunks, step, entries=CHUNK)
    in_memory = functools.partial(moved_in_chunks, step)
    return per_platform(group, given, cpu=in_cache, other=in_memory)


@functools.partial(compiled_once, static_argnums=0)
def step_of_stack(kind: Kind, now: Numbers, group: Group, given: Given) -> tuple[Group, jax.Array]:
    """(group after the step, whether all that it saw and made is sound: bool []).

    Where what is given cannot be squared, `now.sound`, nothing moves. If a product of sound numbers
    overflows inside a chunk, only that chunk keeps its old factors: a single choice between all old
    and all new factors at the end would cost one more pass over memory.

    Args:
      kind: of step.
      now: the scalars of the step.
      group: what changes.
      given: what is read.
    """
    group, sound = _in_chunks(functools.partial(_step, kind, now), group, given)
    return group, jnp.all(sound)
