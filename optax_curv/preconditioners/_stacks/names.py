"""Names of stacks. A name lists the members in order, so that a state tells what lies where."""

import re
from collections.abc import Iterable, Iterator

import jax

SEPARATOR = " | "
BLOCKS = " in blocks of "


def member_name(path: str, rows: int) -> str:
    """The name of a member; one of several rows carries their number.

    A variable of Flax NNX ends its path in `.value`, but `nnx.Optimizer` hands over pure arrays.
    """
    path = path.removesuffix(".value")
    return path if rows == 1 else f"{path} ×{rows}"


def stack_name(members: Iterable[str]) -> str:
    """The name of a stack of these members."""
    return SEPARATOR.join(members)


def block_name(stack: str, shape: tuple[int, ...]) -> str:
    """The name of a stack's blocks of one shape."""
    return f"{stack}{BLOCKS}{' by '.join(map(str, shape))}"


def members_of(name: str) -> list[tuple[str, int]]:
    """(path, rows) of every member of a stack, or of the stack whose blocks this is."""
    members = []
    for member in name.split(BLOCKS)[0].split(SEPARATOR):
        found = re.fullmatch(r"(.*) ×(\d+)", member)
        members.append((found[1], int(found[2])) if found else (member, 1))
    return members


def parts_of(name: str, array: jax.Array) -> Iterator[tuple[str, int | None, jax.Array]]:
    """(path, number of the block or None, [rows, ...]) of everything in an array of a stack."""
    members = members_of(name)
    total = sum(rows for _, rows in members)
    blocks = len(array) // max(1, total)
    start = 0
    for block in range(blocks):
        for path, rows in members:
            yield path, block if BLOCKS in name else None, array[start : start + rows]
            start += rows
