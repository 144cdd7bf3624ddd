"""Second moments along every axis of a leaf, and the roots of them that precondition it."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optax_curv.linalg import kron_matvec, symmetric_pairs
from optax_curv.linalg._checks import widen
from optax_curv.preconditioners._psgd import kron_layout
from optax_curv.preconditioners._transformation import contracts

HIGHEST = jax.lax.Precision.HIGHEST
# Between refreshes of the roots lie 1 + count / EARLY steps, as far as the period allows: the
# gradients change most at the start.
EARLY = 4
SMALL = 64


def layout_of(method: str, tree, *, max_dim, block_size, stacked, dtype) -> kron_layout.Layout:
    """Each leaf's pieces: an axis is dense but where its length is 1 or above `max_dim`."""
    for name, value in (("max_dim", max_dim), ("block_size", block_size), ("stacked", stacked)):
        contracts.structural(method, name, value)

    def with_kinds(piece):
        return piece._replace(diagonal=tuple(bool(d == 1 or d > max_dim) for d in piece.shape))

    leaves = zip(jax.tree.leaves(tree), kron_layout.stack_ndims(method, stacked, tree), strict=True)
    by_leaf = [
        [
            with_kinds(piece)
            for piece in kron_layout.pieces_of(position, leaf, stack, block_size, dtype)
        ]
        for position, (leaf, stack) in enumerate(leaves)
    ]
    return kron_layout.Layout(jax.tree.structure(tree), by_leaf)


def identities(piece) -> tuple[jax.Array, ...]:
    """A basis to begin with for every axis: identities, or ones where the factor is diagonal."""

    def start(struct, diagonal):
        one = (
            jnp.ones([], struct.dtype)
            if diagonal
            else jnp.eye(struct.shape[-1], dtype=struct.dtype)
        )
        return jnp.broadcast_to(one, struct.shape)

    return tuple(map(start, piece.factors, piece.diagonal))


def running_weight(decay, count) -> jax.Array:
    """Weight w of the newest of count + 1 values in m ← m + w (new - m), which keeps m free of the bias of its start.

    It is (1 - decay) / (1 - decay^(count + 1)); for decay 1, a plain mean, 1 / (count + 1).
    """
    steps = jnp.asarray(count + 1, decay.dtype)
    plain = decay >= 1
    kept = jnp.where(plain, 0, decay)
    return jnp.where(plain, 1 / steps, (1 - kept) / (1 - kept**steps))


def opened(method: str, layout_of, likes, updates, state, params, sound):
    """What every update begins with: it refuses trees of other shapes, and sees whether the gradients are sound.

    Args:
      method: name for error messages.
      layout_of: function of a tree that returns its `Layout`.
      likes: names of the state's trees like the factors; the momentum, if not one of them, is like
        the gradients.
      updates: the gradients.
      state: has momentum and total_notfinite.
      params: to compare with; or None.
      sound: see `soundness`.

    Returns:
      (state with tuples in those trees, layout, whether to take the step, total_notfinite).
    """
    if params is not None:
        contracts.require_same_leaves(method, "the gradients", updates, "the parameters", params)
    state = state._replace(
        **{name: contracts.tuples_at_leaves(getattr(state, name), updates) for name in likes}
    )
    layout, found = layout_of(updates), updates
    if "momentum" in likes:
        found = layout.build(
            lambda piece: jax.ShapeDtypeStruct((*piece.stack, *piece.shape), piece.dtype)
        )
    contracts.require_same_leaves(
        method, "the gradients", found, "the state's momentum", state.momentum
    )
    good, total_notfinite = soundness(updates, sound, state.total_notfinite)
    return state, layout, good, total_notfinite


def soundness(grads, sound, total_notfinite):
    """(whether to take the step, the counter of those not taken): where every gradient has a finite square.

    Args:
      grads: a tree.
      sound: bool [] to go by instead; or None.
      total_notfinite: the counter, int32 [].
    """
    if sound is not None:
        return sound, jnp.where(sound, total_notfinite, total_notfinite + 1)
    squares = [square_norms(g, 0) for g in _with_few_vectors(jax.tree.leaves(grads))]
    sound = jnp.all(jnp.isfinite(jnp.stack(squares))) if squares else jnp.bool_(True)
    # By way of a conditional, behind which the compiler does not derive it anew for every use.
    total = jax.lax.cond(sound, lambda n: n, lambda n: n + 1, total_notfinite)
    return total == total_notfinite, total


def _with_few_vectors(leaves):
    """The leaves, those of one axis and dtype as one: a sum of its own for each would take longer to compile."""
    vectors = {}
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:  # whose types differ
        for x in leaves:
            if jnp.ndim(x) == 1:
                vectors.setdefault(x.dtype, []).append(x)
    others = [x for x in leaves if not (jnp.ndim(x) == 1 and vectors)]
    return [*others, *map(jnp.concatenate, vectors.values())]


@functools.partial(jax.jit, static_argnums=1)
def square_norms(x, stack: int) -> jax.Array:
    """Sums of squares of each of a stack of tensors, [*stack]."""
    return jnp.sum(jnp.square(jnp.abs(widen(x))), axis=tuple(range(stack, jnp.ndim(x))))


@jax.jit
def averaged(old, weight, new) -> jax.Array:
    """The average with a new value: old + weight (new - old), and old where the weight is zero, whatever `new` is."""
    weight = weight.astype(jnp.finfo(old.dtype).dtype)
    return jnp.where(weight > 0, old + weight * (new - old), old)


def momentum_and_direction(b1, nesterov: bool, count, momentum, grads, good):
    """(new momentum, what is to be preconditioned), both free of the bias of their start; the old one unless good."""
    b1 = contracts.value_at(b1, count, jnp.result_type(float))
    weight = jnp.where(good, running_weight(b1, count), 0)
    new = jax.tree.map(lambda m, g: averaged(m, weight, g.astype(m.dtype)), momentum, grads)
    if not nesterov:
        return new, new
    ahead = running_weight(b1, count + 1)  # one more step with the same gradient
    return new, jax.tree.map(lambda m, g: averaged(m, ahead, g.astype(m.dtype)), new, grads)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def axis_moment(x, axis: int, diagonal: bool, stack: int) -> jax.Array:
    """Mode moments X₍ᵢ₎X₍ᵢ₎ᴴ of tensors [*stack, ...], [*stack, d, d], or their diagonals [*stack, d]."""
    axis += stack
    axes = list(range(x.ndim))
    if diagonal:
        return jnp.sum(jnp.square(jnp.abs(x)), axis=tuple(i for i in axes[stack:] if i != axis))
    others = [x.ndim if i == axis else i for i in axes]
    return jnp.einsum(x, axes, x.conj(), others, [*axes[:stack], axis, x.ndim], precision=HIGHEST)


def root_or_identity(root, diagonal: bool, stack: int) -> jax.Array:
    """The root to whiten by; the identity before there is one."""
    sizes = jnp.sum(jnp.abs(root), axis=tuple(range(stack, root.ndim)), keepdims=True)
    eye = jnp.ones([], root.dtype) if diagonal else jnp.eye(root.shape[-1], dtype=root.dtype)
    return jnp.where((sizes > 0) & jnp.isfinite(sizes), root, eye)


def whitened_moment(x, roots, axis: int, diagonal: bool, stack: int) -> jax.Array:
    """The mean mode moments of x multiplied by the roots of all other axes."""
    one = jnp.ones(x.shape[: stack + axis + 1][-1:], jnp.finfo(x.dtype).dtype)
    others = list(roots)
    others[axis] = jnp.broadcast_to(one, (*x.shape[:stack], len(one)))
    rest = math.prod(x.shape[stack:]) // len(one)
    return axis_moment(kron_matvec(others, x), axis, diagonal, stack) / rest


@jax.jit
def repacked(packed, weight, moment, root) -> jax.Array:
    """The same with a moment averaged into the factor, and another root."""
    factor = averaged(
        packed[..., :-1], weight, moment
    )  # of which one triangle is the factor's, and no other is read
    return symmetric_pairs.with_first(symmetric_pairs.with_second(packed, root), factor)


@jax.jit
def factor_with(packed, weight, moment) -> jax.Array:
    """The factor with a moment averaged in."""
    return averaged(symmetric_pairs.first(packed), weight, moment)


@jax.jit
def energy(factor, root) -> jax.Array:
    """tr(F R) of each of a stack of dense factors and roots, [*stack]."""
    return jnp.sum((factor * root.conj()).real, axis=(-2, -1))


def batches(pieces) -> list[list[tuple[int, int]]]:
    """Where the dense factors of one batch of roots stand, (piece, axis): those of one width and dtype.

    Widths up to `SMALL` go with the largest of them: elsewhere than on CPU a larger root costs less
    than one more call.
    """
    places = {}
    for position, piece in enumerate(pieces):
        for axis, (width, diagonal) in enumerate(zip(piece.shape, piece.diagonal, strict=True)):
            if not diagonal:
                places.setdefault((max(width, SMALL), piece.dtype), []).append((position, axis))
    return list(places.values())


def energies(pieces) -> jax.Array:
    """Zeros [2, n] for the tr(F R) of n dense factors: the running one, and that of when R was taken."""
    count = sum(math.prod(pieces[p].stack) for places in batches(pieces) for p, _ in places)
    return jnp.zeros(
        [2, count], jnp.result_type(jnp.float32, *(piece.real_dtype for piece in pieces))
    )


def is_due(count, refreshed, period) -> jax.Array:
    """Whether the schedule asks for new roots: dense early, every `period` steps later."""
    gap = jnp.minimum(jnp.maximum(period, 1), 1 + count // EARLY)
    return (count == 0) | (count - refreshed >= gap)


def power(values, exponent, damping) -> jax.Array:
    """(v + damping max v)^(-exponent) of non-negative numbers [*stack, d], zero where all are zero."""
    damped = values + damping * jnp.max(values, axis=-1, keepdims=True)
    return jnp.where(damped > 0, jnp.where(damped > 0, damped, 1) ** -exponent, 0)


def refresh(pieces, kept, moments, weight, roots, bases, energies, squares, due, limit, take_roots):
    """(roots, bases, energies) with the roots of dense factors taken anew where they are due or a factor has moved.

    A factor has moved when tr(F R) has grown by more than `limit` since the root R was taken: when
    gradients grow, or turn to where there were none and R is large, or come for the first time. As
    F is an average of moments M, so is tr(F R) of tr(M R) while R stays. All factors of one batch
    are refreshed together.

    Args:
      pieces: of the layout.
      kept: old factors and roots by piece and axis, see `symmetric_pairs`.
      moments: by piece and axis.
      weight: of the moments.
      roots: the old ones by piece and axis, unpacked.
      bases: by piece and axis, see `take_roots`.
      energies: [2, n], see there.
      squares: square norms of the gradients by piece, [*stack].
      due: bool [].
      limit: see above.
      take_roots: function of a list of factors [*stack, d, d] and one of bases that returns a root
        R, tr(F R) and a basis for each.
    """
    found, found_bases = ([list(of_piece) for of_piece in tree] for tree in (roots, bases))
    of_batches, start = [], 0
    for places in batches(pieces):

        def pick(tree, places=places):
            return [tree[p][axis] for p, axis in places]

        dtypes = [pieces[p].factor_dtype for p, _ in places]
        norms = [squares[p] for p, _ in places]
        count = sum(map(jnp.size, norms))
        of_batch = pick(roots), pick(bases), energies[:, start : start + count]
        of_batch = _refreshed(
            dtypes, pick(kept), pick(moments), weight, *of_batch, norms, due, limit, take_roots
        )
        start += count
        for (p, axis), root, basis in zip(places, *of_batch[:2], strict=True):
            found[p][axis], found_bases[p][axis] = root, basis
        of_batches.append(of_batch[2])
    energies = jnp.concatenate([energies[:, :0], *of_batches], axis=1)
    return list(map(tuple, found)), list(map(tuple, found_bases)), energies


def _refreshed(
    dtypes, kept, moments, weight, roots, bases, energies, squares, due, limit, take_roots
):
    """`refresh` of one batch; all but `weight`, `energies`, `due` and `limit` are lists of one entry a factor."""

    def flat(arrays):
        return jnp.concatenate([x.reshape(-1) for x in arrays]).astype(energies.dtype)

    running, reference = energies
    running = averaged(running, weight, flat(map(energy, moments, roots)))
    wakes = (weight > 0) & (reference == 0) & (flat(squares) > 0)
    lost = ~jnp.isfinite(reference)  # where LAPACK has found no root
    moved = jnp.any(wakes | lost | (running > limit * reference))
    old = roots, bases, jnp.stack([running, reference])

    def fresh():
        factors = [
            rounded(factor_with(p, weight, m), d)
            for p, m, d in zip(kept, moments, dtypes, strict=True)
        ]
        taken, now, new = zip(*take_roots(factors, bases), strict=True)
        new = [q if q is None else rounded(q, dtype) for q, dtype in zip(new, dtypes, strict=True)]
        return list(map(rounded, taken, dtypes)), new, jnp.stack([flat(now)] * 2)

    return jax.lax.cond(due | moved, fresh, lambda: old)


def rounded(x, dtype) -> jax.Array:
    """`x` of the values that `dtype` has."""
    limits = jnp.finfo(dtype)
    return x if x.dtype == dtype else jax.lax.reduce_precision(x, limits.nexp, limits.nmant)
