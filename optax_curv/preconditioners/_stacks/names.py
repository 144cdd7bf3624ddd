"""Names of stacks. A name lists the members in order, so that a state tells what lies where."""

import math
import re
from collections.abc import Iterable, Iterator

import jax

from optax_curv.preconditioners._stacks.owners import without_types

SEPARATOR = " | "
IN_BLOCKS = re.compile(r" in (\d+) blocks? of ")


# What marks a stack's name, where it stands in a path: a key may be any string.
_MARKS = r"[|×]|in(?= \d+ blocks? of )"


def _escaped(path: str) -> str:
    return re.sub(_MARKS, r"\\\g<0>", path)


def _unescaped(path: str) -> str:
    return re.sub(rf"\\({_MARKS})", r"\1", path)


def leaf_name(path: str) -> str:
    """A leaf's path, the same for a module's and for an optimizer's parameters.

    A variable of Flax NNX ends its path in `.value`, but `nnx.Optimizer` hands over pure arrays.
    """
    return path.removesuffix(".value")


def member_name(path: str, rows: int) -> str:
    """The name of a member; one of several rows carries their number."""
    name = _escaped(leaf_name(path))
    return name if rows == 1 else f"{name} ×{rows}"


def layer_member_name(name: str, stack: tuple[int, ...]) -> str:
    """The name of a layer with slices of this shape, which a state alone is to tell."""
    return _escaped(name) + "".join(f" ×{size}" for size in stack)


def stack_name(members: Iterable[str]) -> str:
    """The name of a stack of these members."""
    return SEPARATOR.join(members)


def block_name(stack: str, count: int, shape: tuple[int, ...]) -> str:
    """The name of a stack's blocks of one shape, of which each of its tensors has `count`."""
    return f"{stack} in {count} block{'s' * (count > 1)} of {' by '.join(map(str, shape))}"


def split_name(name: str) -> tuple[str, int | None]:
    """(name of the stack, how many blocks of each of its tensors this name stands for or None)."""
    stack, *rest = IN_BLOCKS.split(name)
    return stack, int(rest[0]) if rest else None


def layers_of(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape of the slices) of every member of a stack, or of the stack it is blocks of."""
    members = []
    for member in split_name(name)[0].split(SEPARATOR):
        found = re.fullmatch(r"(.*?)((?: ×\d+)*)", member, re.DOTALL)
        own, sizes = found.groups() if found else (member, "")
        members.append((_unescaped(own), tuple(int(size) for size in re.findall(r"\d+", sizes))))
    return members


def members_of(name: str) -> list[tuple[str, int]]:
    """(path, rows) of every member of a stack, or of the stack whose blocks this is."""
    return [(path, math.prod(stack)) for path, stack in layers_of(name)]


def parts_of(name: str, array: jax.Array) -> Iterator[tuple[str, int | None, jax.Array]]:
    """(path, number of the block or None, [rows, ...]) of everything in an array of a stack.

    What is filled up for the sake of equal parts on all devices lies behind and is left out.
    """
    array = without_types(array)
    count = split_name(name)[1]
    start = 0
    for block in range(count or 1):
        for path, rows in members_of(name):
            yield path, None if count is None else block, array[start : start + rows]
            start += rows
