"""Stacks: tensors of one shape that go to one rule, as one array [N, *shape].

Which leaf goes to which stack follows from paths and shapes alone, at every call anew, so that a
transformation remembers nothing. A stack's name lists its members, whose rows lie in that order.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg._compiler import slice_of_stack
from optax_curv.preconditioners._stacks.names import member_name, stack_name
from optax_curv.preconditioners._stacks.owners import evenly_divided
from optax_curv.preconditioners._transformation.trees import path_of, wide_dtype


class Member(NamedTuple):
    """A part of a stack: a leaf, or the leaves of a layer seen as one matrix.

    Attributes:
      name: the leaf's key path or the layer's name, see `names.member_name`.
      rows: how many tensors of the stack it is.
      shape: of each of them.
      dtype: of arithmetic, float32 at least.
      take: the leaves of a tree -> [rows, *shape].
      give: ([rows, *shape], leaves) -> the leaves that it covers, by place, in their own dtypes.
    """

    name: str
    rows: int
    shape: tuple[int, ...]
    dtype: Any
    take: Callable[[Sequence[Any]], jax.Array]
    give: Callable[[jax.Array, Sequence[Any]], dict[int, jax.Array]]


class Stack(NamedTuple):
    """One stack.

    Attributes:
      members: what lies in it, in order.
      kind: what its members have in common besides shape and dtype, such as the rule they go to.
    """

    members: tuple[Member, ...]
    kind: Hashable

    @property
    def rows(self) -> int:
        """N, the number of tensors."""
        return sum(member.rows for member in self.members)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.members[0].shape

    @property
    def dtype(self) -> Any:
        """Dtype of arithmetic, float32 at least."""
        return self.members[0].dtype

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the stack, [N, *shape]."""
        return jax.ShapeDtypeStruct((self.rows, *self.shape), self.dtype)


class Stacks(Mapping[str, Stack]):
    """The stacks of a tree, by name.

    Args:
      tree: whose leaves the members take.
      members: pairs (member, kind); members of equal kind, shape and dtype share a stack.
    """

    def __init__(self, tree: Any, members: Iterable[tuple[Member, Hashable]]):
        self._treedef = jax.tree.structure(tree)
        groups: dict[tuple, list[Member]] = {}
        for member, kind in members:
            key = (kind, member.shape, jnp.dtype(member.dtype))
            groups.setdefault(key, []).append(member)
        self._stacks = {
            stack_name(member.name for member in group): Stack(tuple(group), key[0])
            for key, group in groups.items()
        }

    def __getitem__(self, name: str) -> Stack:
        return self._stacks[name]

    def __iter__(self):
        return iter(self._stacks)

    def __len__(self) -> int:
        return len(self._stacks)

    def of_kind(self, wanted: Callable[[Any], bool]) -> dict[str, Stack]:
        """The stacks of some kinds."""
        return {name: stack for name, stack in self.items() if wanted(stack.kind)}

    def take(self, tree: Any, wanted: Callable[[Any], bool] = bool) -> dict[str, jax.Array]:
        """The leaves of `tree` as stacks [N, *shape], those of `wanted` kinds, float32 at least."""
        leaves = self._treedef.flatten_up_to(tree)

        def joined(stack: Stack, leaves: Sequence[Any]) -> jax.Array:
            parts = [member.take(leaves).astype(stack.dtype) for member in stack.members]
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

        def of_leaves(leaves: Sequence[Any]) -> dict[str, jax.Array]:
            chosen = self.of_kind(wanted).items()
            return {name: joined(stack, leaves) for name, stack in chosen}

        return evenly_divided(of_leaves, leaves)

    def give(self, stacks: Mapping[str, jax.Array], like: Any) -> Any:
        """The tree of these stacks' tensors, in the dtypes of `like`, whose other leaves stay."""
        like_leaves = self._treedef.flatten_up_to(like)
        leaves = list(like_leaves)
        for name, array in stacks.items():
            start = 0
            for member in self[name].members:
                part = slice_of_stack(array, start, (member.rows,))
                for place, leaf in member.give(part, like_leaves).items():
                    leaves[place] = leaf
                start += member.rows
        return self._treedef.unflatten(leaves)

    def alone(self, stacks: Mapping[str, jax.Array]) -> Any:
        """The tree of these stacks' leaves, in the stacks' dtypes, with `MaskedNode` elsewhere.

        It is what `optax.masked` shows to a transformation that is given for some leaves.
        """
        leaves: list[Any] = [optax.MaskedNode()] * self._treedef.num_leaves
        return self.give(stacks, self._treedef.unflatten(leaves))


def leaf_member(place: int, path: Any, leaf: Any, stack_ndim: int = 0) -> Member:
    """A leaf [*stack, *shape] as rows; its first `stack_ndim` axes count tensors."""
    shape = jnp.shape(leaf)
    own = shape[stack_ndim:]
    rows = math.prod(shape[:stack_ndim])

    def take(leaves):
        return jnp.reshape(leaves[place], (rows, *own))

    def give(array, leaves):
        like = leaves[place]
        dtype = array.dtype if isinstance(like, optax.MaskedNode) else jnp.result_type(like)
        return {place: array.reshape(shape).astype(dtype)}

    name = member_name(path_of(path), rows)
    return Member(name, rows, own, wide_dtype(jnp.result_type(leaf)), take, give)


def permuted_member(
    place: int,
    path: Any,
    leaf: Any,
    split: Sequence[int],
    axes: Sequence[int],
    matrix_shape: tuple[int, int, int],
) -> Member:
    """A leaf as matrices: reshaped to `split`, its axes put in this order, then [rows, m, n]."""
    shape, (rows, *own) = jnp.shape(leaf), matrix_shape
    order, sizes = tuple(axes), [split[axis] for axis in axes]
    back = sorted(range(len(order)), key=order.__getitem__)

    def take(leaves):
        return jnp.reshape(leaves[place], split).transpose(order).reshape(rows, *own)

    def give(array, leaves):
        like = leaves[place]
        dtype = array.dtype if isinstance(like, optax.MaskedNode) else jnp.result_type(like)
        return {place: array.reshape(sizes).transpose(back).reshape(shape).astype(dtype)}

    name = member_name(path_of(path), rows)
    return Member(name, rows, tuple(own), wide_dtype(jnp.result_type(leaf)), take, give)
