"""When the roots of dense factors are taken anew, and how those of one width share a call."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.linalg._checks import widen
from optax_curv.linalg._chunks import each_in_chunks
from optax_curv.preconditioners._axes.kept import Kept, Measured
from optax_curv.preconditioners._axes.moments import Axes, axis_moment, rounded
from optax_curv.preconditioners._transformation.averages import averaged, is_silent

# Between refreshes of the roots lie 1 + steps / EARLY steps, as far as the period allows, because
# the gradients change most at the start.
EARLY = 4
SMALL = 64  # elsewhere than on CPU a root of this width costs less than one more call

Place = tuple[str, int]  # name of a stack, axis
Refreshed = tuple[Any, Any, Any]  # a pair, its basis or None, its column of the energies


def dense_places(axes: Mapping[str, Axes]) -> list[list[Place]]:
    """The dense factors, one list for each batch of roots: those of about one width and dtype."""
    batches: dict[Any, list[Place]] = {}
    for name, of_stack in axes.items():
        for axis, diagonal in enumerate(of_stack.diagonal):
            if not diagonal:
                width = max(of_stack.struct.shape[axis + 1], SMALL)
                batches.setdefault((width, of_stack.struct.dtype), []).append((name, axis))
    return list(batches.values())


def zero_energies(axes: Mapping[str, Axes]) -> dict[str, jax.Array]:
    """Zeros [N, axes, 2] by stack: tr(F R) of every axis, and what it was when R was taken."""
    return {
        name: jnp.zeros((x.struct.shape[0], len(x.diagonal), 2), jnp.finfo(x.struct.dtype).dtype)
        for name, x in axes.items()
    }


def is_scheduled(count: jax.Array, since: jax.Array, period: jax.Array) -> jax.Array:
    """Whether `since` steps after the last refresh the schedule asks for another one."""
    gap = jnp.minimum(jnp.maximum(period, 1), 1 + count // EARLY)
    return (count == 0) | (since >= gap)


def refreshed(
    axes: Mapping[str, Axes],
    measured: Mapping[str, Measured],
    bases: Mapping[str, tuple[jax.Array, ...]],
    energies: Mapping[str, jax.Array],
    multiplied: Mapping[str, jax.Array],
    *,
    weight: jax.Array,
    due: jax.Array,
    limit: Any,
    anywhere: Callable[[jax.Array], jax.Array],
    take_roots: Callable,
) -> tuple[dict[str, Kept], dict[str, tuple[jax.Array, ...]], dict[str, jax.Array]]:
    """(what is kept, bases, energies), with roots taken anew where due or where a factor has moved.

    A factor has moved when tr(F R) has grown by more than `limit` since the root R was taken, which
    happens when gradients grow, or turn to where there were none and R is large, or come for the
    first time. As F is an average of moments M, so is tr(F R) one of tr(M R) while R stays. All
    factors of one batch are refreshed together.

    Args:
      axes: the stacks.
      measured: of every stack.
      bases: by stack the basis of every axis, or an empty dict.
      energies: see `zero_energies`.
      multiplied: by stack the tensors that the roots are to multiply.
      weight: of this step's moments in the averages, [].
      due: bool [].
      limit: see above.
      anywhere: whether a bool [] is true on any device that owns some of the rows.
      take_roots: (factors, bases) -> a list of (root R, tr(F R), basis) for each.
    """
    kept = {name: list(x.kept) for name, x in measured.items()}
    new_bases = {name: list(of_stack) for name, of_stack in bases.items()}
    columns = {name: [x[:, i] for i in range(x.shape[1])] for name, x in energies.items()}
    for batch in dense_places(axes):
        own = {place: _energy_of(axes, measured, place) for place in batch}
        old = [
            jnp.stack([averaged(column[:, 0], weight, own[name, axis]), column[:, 1]], -1)
            for name, axis in batch
            for column in [columns[name][axis]]
        ]
        moved = [
            _has_moved(x, measured[name].squares, weight, limit)
            for x, (name, _) in zip(old, batch, strict=True)
        ]
        again = due | anywhere(jnp.any(jnp.concatenate(moved)))
        olds = {
            (name, axis): (kept[name][axis], new_bases[name][axis] if bases else None, energy)
            for (name, axis), energy in zip(batch, old, strict=True)
        }
        new = _refreshed_batch(again, olds, multiplied, take_roots)
        for (name, axis), of_place in new.items():
            kept[name][axis], basis, columns[name][axis] = of_place
            if bases:
                new_bases[name][axis] = basis
    return (
        {name: tuple(x) for name, x in kept.items()},
        {name: tuple(x) for name, x in new_bases.items()},
        {name: jnp.stack(x, axis=1) for name, x in columns.items()},
    )


def _refreshed_batch(
    again: jax.Array,
    batch: Mapping[Place, Refreshed],
    multiplied: Mapping[str, jax.Array],
    take_roots: Callable,
) -> dict[Place, Refreshed]:
    """A batch after its refresh: what is longer than a chunk part by part, where it is kept."""

    def refresh(moved, tensors):
        def fresh(moved, tensors):
            silent = [is_silent(axis_moment(x, axis, True)) for (_, axis), x in tensors.items()]
            new = _fresh(list(moved.values()), silent, take_roots)
            return dict(zip(moved, new, strict=True))

        return jax.lax.cond(again, fresh, lambda moved, _: moved, moved, tensors), {}

    tensors = {place: multiplied[place[0]] for place in batch}
    return each_in_chunks(refresh, batch, tensors)[0]


def _energy_of(axes: Mapping[str, Axes], measured: Mapping[str, Measured], place: Place) -> Any:
    """tr(M R) of one dense axis, [N]."""
    name, axis = place
    dense = [i for i, diagonal in enumerate(axes[name].diagonal) if not diagonal]
    return measured[name].energies[dense.index(axis)]


def _has_moved(energy: jax.Array, squares: jax.Array, weight: jax.Array, limit: Any) -> jax.Array:
    """Whether each factor of a stack needs another root, [N]."""
    running, reference = energy[:, 0], energy[:, 1]
    wakes = (weight > 0) & (reference == 0) & (squares > 0)
    lost = ~jnp.isfinite(reference)  # where LAPACK has found no root
    return wakes | lost | (running > limit * reference)


def _as_others(root: jax.Array, silent: jax.Array) -> jax.Array:
    """Roots R [N, d, d], for silent rows the mean that they have for the others.

    While a row has no gradient its root matters to nothing, and is larger than all others. When it
    wakes its step would drown theirs until the next refresh.
    """
    diagonal = jnp.diagonal(root, axis1=1, axis2=2).real
    usual = jnp.mean(diagonal, axis=1, where=~silent)[:, None]
    silent &= jnp.isfinite(usual)  # there are others
    among = ~(silent[:, None] | silent[:, :, None])
    fill = jnp.where(silent, usual, 0)[:, None] * jnp.eye(root.shape[-1], dtype=root.dtype)
    return jnp.where(among, root, fill)


def _fresh(batch: Any, silent: Any, take_roots: Callable) -> list[Refreshed]:
    """A batch with new roots."""
    factors = [widen(pair.factor) for pair, *_ in batch]
    bases = [None if q is None else widen(q) for _, q, _ in batch]
    taken, now, found = zip(*take_roots(factors, bases), strict=True)
    taken = map(_as_others, taken, silent)

    def of_one(old, root, trace, basis):
        pair, old_basis, energy = old
        kept = old_basis if old_basis is None else basis.astype(old_basis.dtype)
        return (
            pair.replace(root=rounded(root, pair.dtype)),
            kept,
            jnp.stack([trace, trace], -1).astype(energy.dtype),
        )

    return list(map(of_one, batch, taken, now, found))
