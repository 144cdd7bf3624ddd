"""Factors by stack, as a tree like the parameters and back."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.preconditioners._psgd.flat import WHOLE_TREE
from optax_curv.preconditioners._psgd.geometries import array_of
from optax_curv.preconditioners._psgd.rule import ScaleByKronPsgdState
from optax_curv.preconditioners._stacks.names import leaf_name, members_of, split_name
from optax_curv.preconditioners._transformation.trees import path_of


def state_within(method: str, state: Any) -> ScaleByKronPsgdState:
    """The only `ScaleByKronPsgdState` in a state of a chain or an alias."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            f"{method}: expected a state that holds one ScaleByKronPsgdState, found {len(found)} "
            f"in {type(state).__name__}; pass that of kron_psgd, dense_psgd or their scale_by_*."
        )
    return found[0]


def with_state(state: Any, change: Callable[[ScaleByKronPsgdState], ScaleByKronPsgdState]) -> Any:
    """The state with its `ScaleByKronPsgdState` changed."""
    return jax.tree.map(lambda x: change(x) if _is_ours(x) else x, state, is_leaf=_is_ours)


def _is_ours(x: Any) -> bool:
    return isinstance(x, ScaleByKronPsgdState)


class _Rows(NamedTuple):
    """Where one block of a leaf lies: rows `start` to `stop` of a stack."""

    stack: str
    start: int
    stop: int


def _places(state: ScaleByKronPsgdState, params: Any) -> dict[str, list[_Rows]]:
    """The path of every leaf with factors -> where its blocks lie, in order."""
    shapes = {
        leaf_name(path_of(path)): jnp.shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, factors in state.spectra().items():
        blocks.setdefault(split_name(name)[0], {})[name] = tuple(x.size for x in factors)
    found: dict[str, list[_Rows]] = {}
    for whole, sizes in blocks.items():
        members = members_of(whole)
        rows = sum(count for _, count in members)
        counts = {name: split_name(name)[1] or 1 for name in sizes}
        start = 0
        for path, count in members:
            found[path] = [
                _Rows(name, block * rows + start, block * rows + start + count)
                for name, block in _in_order(sizes, counts, shapes.get(path, ()))
            ]
            start += count
    return found


def _in_order(
    sizes: dict[str, tuple[int, ...]], counts: dict[str, int], shape: tuple[int, ...]
) -> list[tuple[str, int]]:
    """(stack, number in it) of the blocks of a leaf, neighbours along its last axis first.

    `blocks_of` cuts an axis of length d into c runs, from d i // c to d (i + 1) // c, so that the
    mean length of all blocks on the axis is d / c.
    """
    as_kept = [(name, block) for name, count in counts.items() for block in range(count)]
    axes, total = len(next(iter(sizes.values()))), sum(counts.values())
    runs = []
    for axis, length in enumerate(shape[len(shape) - axes :] or (1,)):
        summed = sum(sizes[name][axis] * count for name, count in counts.items())
        count = length * total // max(1, summed)
        edges = [length * i // max(1, count) for i in range(count + 1)]
        runs.append([stop - start for start, stop in itertools.pairwise(edges)])
    names = {size: name for name, size in sizes.items()}
    following = dict.fromkeys(sizes, 0)
    order = []
    for size in itertools.product(*runs):
        if size not in names:
            return as_kept  # a kernel of other axes than its layer's matrix
        order.append((names[size], following[names[size]]))
        following[names[size]] += 1
    return order if sorted(order) == sorted(as_kept) else as_kept


def _factors_by_path(state: ScaleByKronPsgdState, params: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The path of every leaf with factors -> of each of its blocks the factors of its axes.

    Each factor is an array [rows, d, d] or [rows, d], the rows being those of the leaf.
    """
    arrays = {name: tuple(map(array_of, x)) for name, x in state.spectra().items()}
    return {
        path: [tuple(x[at.start : at.stop] for x in arrays[at.stack]) for at in places]
        for path, places in _places(state, params).items()
    }


def shown(state: ScaleByKronPsgdState, params: Any) -> Any:
    """The factors as a tree like the parameters; `axis_factors` documents it."""
    places = _factors_by_path(state, params)
    if list(places) == [WHOLE_TREE]:
        return tuple(x[0] for x in places[WHOLE_TREE][0])

    def of_leaf(path, leaf):
        blocks = places.get(leaf_name(path_of(path)), [])
        stacked = [tuple(_with_stack(x, jnp.shape(leaf), len(b)) for x in b) for b in blocks]
        return stacked[0] if len(stacked) == 1 else tuple(stacked)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _with_stack(x: jax.Array, shape: tuple[int, ...], axes: int) -> jax.Array:
    """[rows, ...] as [*stack, ...] of a leaf of this shape with factors for so many axes."""
    likely = max(0, len(shape) - axes)
    for own in (likely, *range(len(shape) + 1)):
        if len(x) == math.prod(shape[:own]):
            return x.reshape(*shape[:own], *x.shape[1:])
    return x  # of a kernel whose stack is not its first axes


def replaced(
    method: str, state: ScaleByKronPsgdState, params: Any, tree: Any
) -> ScaleByKronPsgdState:
    """The state with these factors, and without any P that was kept."""
    given = _by_path(method, state, params, tree)
    everything = _factors_by_path(state, params)
    rows: dict[str, dict[int, tuple[Any, ...]]] = {}
    for path, places in _places(state, params).items():
        blocks = [given[path]] if len(places) == 1 else list(given[path])
        expected = everything[path]
        found = [[jnp.shape(x) for x in block] for block in blocks]
        flat = [
            tuple(jnp.reshape(x, (-1, *y.shape[1:])) for x, y in zip(b, e, strict=False))
            if _fits(b, e)
            else None
            for b, e in zip(blocks, expected, strict=False)
        ]
        if None in flat or [len(b) for b in blocks] != [len(e) for e in expected]:
            raise ValueError(
                f"{method}: the factors at {path} have shapes {found}, expected "
                f"{[[x.shape for x in e] for e in expected]} (the first axis counting the tensors "
                "of a stacked leaf)."
            )
        for (name, start, _), block in zip(places, flat, strict=True):
            if block is not None:
                rows.setdefault(name, {})[start] = block

    def joined(name, kinds):
        parts = [rows[name][start] for start in sorted(rows[name])]
        arrays = [jnp.concatenate(axis) for axis in zip(*parts, strict=True)]
        kept = [
            jax.tree.map(lambda old, x=x: old.at[: len(x)].set(x.astype(old.dtype)), factor)
            for factor, x in zip(*kinds.values(), arrays, strict=True)
        ]
        return dict.fromkeys(kinds, tuple(kept))

    factors = {name: joined(name, kinds) for name, kinds in state.factors.items()}
    dropped = jax.tree.map(jnp.zeros_like, state.preconditioners)
    return state._replace(factors=factors, preconditioners=dropped)


def _by_path(method: str, state: ScaleByKronPsgdState, params: Any, tree: Any) -> dict[str, Any]:
    """The entries of a tree of factors, by the path of the leaf in whose place they stand."""
    if list(_places(state, params)) == [WHOLE_TREE]:
        return {WHOLE_TREE: tree}
    paths = [leaf_name(path_of(path)) for path, _ in jax.tree.leaves_with_path(params)]
    try:
        entries = jax.tree.structure(params).flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{method}: expected factors in the place of each leaf of the parameters, as "
            f"axis_factors shows them: {error}"
        ) from None
    return dict(zip(paths, entries, strict=True))


def _fits(block: Any, expected: tuple[Any, ...]) -> bool:
    """Whether factors have the shapes of these but for the stack's, and as many rows."""
    if len(block) != len(expected):
        return False
    return all(
        jnp.size(x) == y.size and jnp.shape(x)[-(y.ndim - 1) :] == y.shape[1:]
        for x, y in zip(block, expected, strict=True)
    )
