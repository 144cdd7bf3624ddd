"""Blocks: stacks cut along their axes into smaller tensors, each with factors of its own."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.linalg._compiler import slice_of_stack
from optax_curv.preconditioners._stacks.names import block_name


class Blocks(NamedTuple):
    """How stacks [N, *shape] are cut; blocks of one shape and stack lie one after the other.

    Attributes:
      structs: shape and dtype of every stack that is cut.
      places: name of a stack of blocks -> (name of the cut stack, slices of each of its blocks).
    """

    structs: dict[str, jax.ShapeDtypeStruct]
    places: dict[str, tuple[str, list[tuple[slice, ...]]]]

    def take(self, stacks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The blocks [blocks · N, *block] of the stacks [N, *shape]."""

        def joined(name, blocks):
            if len(blocks) == 1 and self._is_whole(name, blocks[0]):
                return stacks[name].reshape(len(stacks[name]), *_shape(self.structs[name]))
            return jnp.concatenate([stacks[name][(slice(None), *block)] for block in blocks])

        return {own: joined(*place) for own, place in self.places.items()}

    def give(self, blocks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The stacks of these blocks."""
        found: dict[str, dict] = {}
        for own, (name, slices) in self.places.items():
            rows = self.structs[name].shape[0]
            for i, place in enumerate(slices):
                part = (
                    blocks[own]
                    if len(slices) == 1
                    else slice_of_stack(blocks[own], i * rows, (rows,))
                )
                found.setdefault(name, {})[tuple(s.start for s in place)] = part
        return {name: self._whole(name, parts) for name, parts in found.items()}

    def _whole(self, name: str, parts: dict[tuple[int, ...], jax.Array]) -> jax.Array:
        ordered = [parts[start] for start in sorted(parts)]  # the last axis' neighbours first
        starts = list(zip(*sorted(parts), strict=True))
        for axis in reversed(range(len(starts))):
            count = len(set(starts[axis]))
            runs = [ordered[i : i + count] for i in range(0, len(ordered), count)]
            ordered = [jnp.concatenate(run, axis=1 + axis) if count > 1 else run[0] for run in runs]
        return ordered[0].reshape(self.structs[name].shape)

    def _is_whole(self, name: str, block: tuple[slice, ...]) -> bool:
        sizes = _shape(self.structs[name])
        return all(s.stop - s.start == size for s, size in zip(block, sizes, strict=True))

    def struct(self, own: str) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a stack of blocks."""
        name, slices = self.places[own]
        sizes = (s.stop - s.start for s in slices[0])
        struct = self.structs[name]
        return jax.ShapeDtypeStruct((len(slices) * struct.shape[0], *sizes), struct.dtype)


def _shape(struct: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of one tensor; a scalar is seen as [1]."""
    return struct.shape[1:] or (1,)


def _cut(length: int, block_size: Any) -> list[slice]:
    """The fewest runs of at most `block_size`, of nearly equal lengths: nothing is padded."""
    count = 1 if block_size is None else max(1, -(-length // int(block_size)))
    edges = [length * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def blocks_of(structs: Mapping[str, jax.ShapeDtypeStruct], block_size: Any) -> Blocks:
    """Blocks of at most `block_size` on every axis; None leaves the stacks whole."""
    places: dict[str, tuple[str, list]] = {}
    for name, struct in structs.items():
        by_shape: dict[tuple[int, ...], list] = {}
        for block in itertools.product(*(_cut(d, block_size) for d in _shape(struct))):
            by_shape.setdefault(tuple(s.stop - s.start for s in block), []).append(block)
        for shape, blocks in by_shape.items():
            whole = len(by_shape) == 1 and len(blocks) == 1
            own = name if whole else block_name(name, len(blocks), shape)
            places[own] = (name, blocks)
    return Blocks(dict(structs), places)


def factor_structs(
    struct: jax.ShapeDtypeStruct, diagonal: tuple[bool, ...], dtype: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the factors of a stack [N, *shape]: [N, d, d] in `dtype` or [N, d]."""
    real = jnp.finfo(dtype).dtype
    count, *sizes = struct.shape
    return tuple(
        jax.ShapeDtypeStruct((count, d), real)
        if is_diagonal
        else jax.ShapeDtypeStruct((count, d, d), np.dtype(dtype))
        for d, is_diagonal in zip(sizes, diagonal, strict=True)
    )
