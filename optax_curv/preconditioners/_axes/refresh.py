"""When the roots of dense factors are taken anew, and how those of one width share a call."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.preconditioners._axes.moments import Axes, rounded
from optax_curv.preconditioners._transformation.averages import averaged

# Between refreshes of the roots lie 1 + steps / EARLY steps, as far as the period allows, because
# the gradients change most at the start.
EARLY = 4
SMALL = 64  # elsewhere than on CPU a root of this width costs less than one more call

Place = tuple[str, int]  # name of a stack, axis


class Refresh(NamedTuple):
    """What a refresh reads, by place; all dense factors only.

    Attributes:
      factors: the old factors, in float32 at least.
      moments: the second moments of this step.
      roots: the old roots.
      bases: the old bases, or None.
      squares: square norms of the gradients [N] by stack.
    """

    factors: dict[Place, jax.Array]
    moments: dict[Place, jax.Array]
    roots: dict[Place, jax.Array]
    bases: dict[Place, Any]
    squares: dict[str, jax.Array]


def dense_places(axes: Mapping[str, Axes]) -> list[list[Place]]:
    """The dense factors, one list for each batch of roots: those of about one width and dtype."""
    batches: dict[Any, list[Place]] = {}
    for name, of_stack in axes.items():
        for axis, diagonal in enumerate(of_stack.diagonal):
            if not diagonal:
                width = max(of_stack.struct.shape[axis + 1], SMALL)
                batches.setdefault((width, of_stack.struct.dtype), []).append((name, axis))
    return list(batches.values())


def zero_energies(axes: Mapping[str, Axes]) -> jax.Array:
    """Zeros [2, n] for tr(F R) of n dense factors: the running one, and that when R was taken."""
    count = sum(axes[name].struct.shape[0] for batch in dense_places(axes) for name, _ in batch)
    dtypes = (jnp.finfo(x.struct.dtype).dtype for x in axes.values())
    return jnp.zeros([2, count], jnp.result_type(jnp.float32, *dtypes))


def is_scheduled(count: jax.Array, since: jax.Array, period: jax.Array) -> jax.Array:
    """Whether `since` steps after the last refresh the schedule asks for another one."""
    gap = jnp.minimum(jnp.maximum(period, 1), 1 + count // EARLY)
    return (count == 0) | (since >= gap)


@jax.jit
def _energy(factor: jax.Array, root: jax.Array) -> jax.Array:
    """tr(F R) of dense factors and roots [N, d, d], [N]."""
    return jnp.sum((factor * root.conj()).real, axis=(-2, -1))


def refreshed(
    axes: Mapping[str, Axes],
    given: Refresh,
    weight: jax.Array,
    energies: jax.Array,
    due: jax.Array,
    limit: Any,
    take_roots: Callable,
) -> tuple[dict[Place, jax.Array], dict[Place, Any], jax.Array]:
    """(roots, bases, energies), with roots taken anew where they are due or a factor has moved.

    A factor has moved when tr(F R) has grown by more than `limit` since the root R was taken, which
    happens when gradients grow, or turn to where there were none and R is large, or come for the
    first time. As F is an average of moments M, so is tr(F R) one of tr(M R) while R stays. All
    factors of one batch are refreshed together.

    Args:
      axes: the stacks.
      given: see `Refresh`.
      weight: of the moments in the averages, [].
      energies: see `zero_energies`.
      due: bool [].
      limit: see above.
      take_roots: (factors, bases) -> a list of (root R, tr(F R), basis) for each.
    """
    roots: dict[Place, jax.Array] = {}
    bases: dict[Place, Any] = {}
    of_batches, start = [], 0
    for batch in dense_places(axes):
        count = sum(axes[name].struct.shape[0] for name, _ in batch)
        old = energies[:, start : start + count]
        found, new_bases, new = _batch(axes, given, batch, weight, old, due, limit, take_roots)
        roots |= dict(zip(batch, found, strict=True))
        bases |= dict(zip(batch, new_bases, strict=True))
        of_batches.append(new)
        start += count
    return roots, bases, jnp.concatenate([energies[:, :0], *of_batches], axis=1)


def _batch(axes, given, batch, weight, energies, due, limit, take_roots):
    """`refreshed` of one batch: (roots, bases, energies)."""
    dtypes = [axes[name].factor_dtype for name, _ in batch]
    factors, moments, roots, bases = (
        [tree[place] for place in batch]
        for tree in (given.factors, given.moments, given.roots, given.bases)
    )

    def flat(arrays):
        return jnp.concatenate([x.reshape(-1) for x in arrays]).astype(energies.dtype)

    running, reference = energies
    running = averaged(running, weight, flat(map(_energy, moments, roots)))
    wakes = (weight > 0) & (reference == 0) & (flat(given.squares[name] for name, _ in batch) > 0)
    lost = ~jnp.isfinite(reference)  # where LAPACK has found no root
    moved = jnp.any(wakes | lost | (running > limit * reference))
    old = roots, bases, jnp.stack([running, reference])

    def fresh():
        new = [averaged(f, weight, m) for f, m in zip(factors, moments, strict=True)]
        new = list(map(rounded, new, dtypes))
        taken, now, found = zip(*take_roots(new, bases), strict=True)
        found = [q if q is None else rounded(q, d) for q, d in zip(found, dtypes, strict=True)]
        return list(map(rounded, taken, dtypes)), found, jnp.stack([flat(now)] * 2)

    return jax.lax.cond(due | moved, fresh, lambda: old)


def by_place(axes: Mapping[str, Axes], tree: Mapping[str, Any]) -> dict[Place, Any]:
    """The entries of dense axes in a tree by stack and axis."""
    return {
        (name, axis): tree[name][axis]
        for name, of_stack in axes.items()
        for axis, diagonal in enumerate(of_stack.diagonal)
        if not diagonal
    }


def with_places(tree: Mapping[str, Any], entries: Mapping[Place, Any]) -> dict[str, Any]:
    """A tree by stack and axis with other entries at these places, in the dtypes that it has."""
    return {
        name: tuple(entries.get((name, axis), x).astype(x.dtype) for axis, x in enumerate(of_stack))
        for name, of_stack in tree.items()
    }
