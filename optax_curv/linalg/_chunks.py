"""Chunks: a long stack is worked through in parts, which bounds what a step holds at a time."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.linalg._compiler import apart

# Entries that are worked on at once: 32 MiB of float32. What a step holds beside its state and its
# gradients is some arrays of this size, or of one tensor where that is larger.
ENTRIES = 2**23


def rows_at_once(trees: Any, entries: int = ENTRIES) -> int:
    """How many rows of arrays [N, ...] have at most so many entries; it divides N."""
    arrays = jax.tree.leaves(trees)
    count, size = len(arrays[0]), sum(math.prod(x.shape[1:]) for x in arrays)
    limit = max(1, min(count, entries // max(1, size)))
    return next((n for n in range(limit, 0, -1) if count % n == 0), 1)


def in_chunks(function: Callable[..., Any], *trees: Any) -> Any:
    """Returns `function(*trees)` of arrays that share one leading axis, part by part of it.

    Args:
      function: of arrays [n, ...]; what it returns for an entry does not depend on the others.
      *trees: arrays [N, ...].

    Returns:
      What the function returns, [N, ...], from parts of `rows_at_once(trees)` rows.
    """
    return moved_in_chunks(lambda nothing, *parts: (nothing, function(*parts)), (), *trees)[1]


def moved_in_chunks(
    function: Callable[..., Any],
    moved: Any,
    *trees: Any,
    entries: int = ENTRIES,
    read_once: bool = False,
) -> tuple[Any, Any]:
    """Returns `function(moved, *trees)`, a pair whose first part takes the place of `moved`.

    As `in_chunks`, but what is moved is written where it was, and not held twice.

    Args:
      function: of a tree like `moved` and of others, all of arrays [n, ...].
      moved: arrays [N, ...].
      *trees: arrays [N, ...].
      entries: of a part, of all arrays together.
      read_once: whether XLA needs the hint `apart` to see that it may write where it has read, as
        it does where results besides `moved` are made of what is moved.

    Returns:
      (a tree like `moved`, what else the function returns).
    """
    given = moved, *trees
    count = len(jax.tree.leaves(given)[0])
    rows = rows_at_once(given, entries)
    if rows >= count:
        return function(*given)
    of_part = functools.partial(apart, function) if read_once else function

    def body(moved, place):
        def part(x):
            return jax.lax.dynamic_slice_in_dim(x, place, rows)

        def put(x, y):
            return jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), place, 0)

        new, result = of_part(*jax.tree.map(part, (moved, *trees)))
        return jax.tree.map(put, moved, new), result

    moved, results = jax.lax.scan(body, moved, jnp.arange(0, count, rows))
    return moved, jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), results)


def each_in_chunks(
    function: Callable[..., Any], moved: Mapping[Any, Any], *trees: Mapping[Any, Any]
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Returns `function(moved, *trees)` of stacks by name, small ones together, large in parts.

    Args:
      function: of dicts by name, to (a dict like `moved`, another dict by name).
      moved: by name arrays [N, ...], of any N for each name.
      *trees: by name arrays [N, ...].

    Returns:
      What the function returns of all names.
    """

    def of(names):
        return [{name: x[name] for name in names} for x in (moved, *trees)]

    def is_large(name):
        return sum(x.size for x in jax.tree.leaves(of([name]))) > ENTRIES

    large = list(filter(is_large, moved))
    new, results = {}, {}
    if small := [name for name in moved if name not in large]:
        new, results = function(*of(small))
    for name in large:
        of_name = moved_in_chunks(function, *of([name]))
        new, results = {**new, **of_name[0]}, {**results, **of_name[1]}
    return new, results
