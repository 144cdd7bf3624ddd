"""Which axis factors a leaf has, and how leaves of one shape share a batched kernel call."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.linalg._checks import widen
from optax_curv.linalg._compiler import cut_out

LIKE_FACTORS = (
    "factors",
    "lipschitz",
    "preconditioners",
)  # the state's trees with one entry a piece


class Piece(NamedTuple):
    """One leaf, or one block of it, seen as a stack of tensors with a factor on every axis.

    Attributes:
      leaf: position of the leaf in flattening order.
      slices: where the block lies on the leaf's own axes, behind its stack; () for a whole leaf.
      stack: shape of the leading slices, each with factors of its own.
      shape: shape of one slice of the block; a scalar is seen as [1].
      diagonal: whether each axis has a diagonal factor.
      dtype: of the arithmetic: float32 at least, complex for complex leaves.
      factor_dtype: in which dense factors are kept; diagonal ones are kept in that of its real
        part.
    """

    leaf: int
    slices: tuple[slice, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    diagonal: tuple[bool, ...]
    dtype: np.dtype
    factor_dtype: np.dtype

    @property
    def real_dtype(self) -> np.dtype:
        """Of the arithmetic's real numbers."""
        return jnp.finfo(self.dtype).dtype

    @property
    def factors(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The factors' shapes and dtypes."""
        return tuple(
            jax.ShapeDtypeStruct((*self.stack, d), jnp.finfo(self.factor_dtype).dtype)
            if diagonal
            else jax.ShapeDtypeStruct((*self.stack, d, d), self.factor_dtype)
            for d, diagonal in zip(self.shape, self.diagonal, strict=True)
        )


class Group(NamedTuple):
    """What a step changes, of pieces counted by the first axis of every array.

    Attributes:
      factors: of each axis.
      lipschitz: running bounds [n, axes].
      preconditioners: P of each axis for the factors of this fingerprint; None where it is not
        kept.
      fingerprint: uint32 [n], or None.
      tensor: what P is applied to, but for the bias correction; afterwards the product.
    """

    factors: tuple[jax.Array, ...]
    lipschitz: jax.Array
    preconditioners: Any
    fingerprint: jax.Array | None
    tensor: jax.Array


def cut(length: int, block_size: int | None) -> list[slice]:
    """The fewest runs of at most `block_size`, of nearly equal lengths: nothing is padded."""
    count = 1 if block_size is None else max(1, -(-length // int(block_size)))
    edges = [length * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def dtypes_of(leaf_dtype, precond_dtype) -> tuple[np.dtype, np.dtype]:
    """(dtype of the arithmetic, dtype in which dense factors are kept) of a leaf.

    Neither is below the leaf's own precision, but that real leaves of at most float32 may keep
    shorter factors.
    """
    leaf_dtype, kept = jnp.promote_types(leaf_dtype, jnp.float32), jnp.dtype(precond_dtype)
    dtype = jnp.promote_types(leaf_dtype, kept)
    return dtype, kept if leaf_dtype == jnp.float32 else dtype


def pieces_of(
    position: int, leaf, stack_ndim: int, block_size: int | None, precond_dtype
) -> list[Piece]:
    """The blocks of one leaf, their axes not yet declared dense or diagonal; none for an empty leaf."""
    stack, own = leaf.shape[:stack_ndim], leaf.shape[stack_ndim:]
    if 0 in leaf.shape:
        return []
    dtype, factor_dtype = dtypes_of(leaf.dtype, precond_dtype)
    blocks = list(itertools.product(*(cut(d, block_size) for d in own)))
    return [
        Piece(
            leaf=position,
            slices=slices if len(blocks) > 1 else (),
            stack=stack,
            shape=tuple(s.stop - s.start for s in slices) or (1,),
            diagonal=(),
            dtype=dtype,
            factor_dtype=factor_dtype,
        )
        for slices in blocks
    ]


def stack_ndims(method: str, stacked, tree) -> list[int]:
    """How many leading axes of each leaf are a stack."""
    stacked = stacked(tree) if callable(stacked) else stacked
    try:
        counts = [
            int(count) for count in jax.tree.leaves(jax.tree.broadcast(stacked or False, tree))
        ]
    except ValueError as error:
        raise ValueError(
            f"{method}: stacked must be a prefix of the parameters' tree: {error}"
        ) from None
    for (path, leaf), count in zip(jax.tree.leaves_with_path(tree), counts, strict=True):
        if not 0 <= count <= len(leaf.shape):
            raise ValueError(
                f"{method}: stacked={count} leading axes at {jax.tree_util.keystr(path) or 'the root'}, but its shape "
                f"is {leaf.shape}; expected at most {len(leaf.shape)}."
            )
    return counts


class Layout:
    """The leaves of a tree as pieces, joined into one batch for each shape, kinds of axes and dtypes.

    A tree "like the factors" has, in place of each leaf, what belongs to its only piece, or the
    tuple of what belongs to its several or no pieces. "By group" is a list of one tree a group, the
    batch being the first axis of every array.

    Args:
      treedef: of the tree.
      pieces_by_leaf: the pieces of each leaf.
    """

    def __init__(self, treedef, pieces_by_leaf: list[list[Piece]]):
        self._treedef, self._by_leaf = treedef, pieces_by_leaf
        self.pieces = list(itertools.chain.from_iterable(pieces_by_leaf))
        groups = {}
        for position, piece in enumerate(self.pieces):
            groups.setdefault(
                (piece.shape, piece.diagonal, piece.dtype, piece.factor_dtype), []
            ).append(position)
        self._groups = list(groups.values())

    def build(self, of_piece):
        """A tree like the factors, of one value a piece."""
        return self._nest(iter([of_piece(piece) for piece in self.pieces]))

    def blocks(self, tree) -> list[jax.Array]:
        """The pieces of a tree of leaves, in the dtype of the arithmetic."""
        leaves = jax.tree.leaves(tree)

        def block(p):
            leaf = jnp.asarray(leaves[p.leaf])[(slice(None),) * len(p.stack) + p.slices]
            return leaf.reshape(*p.stack, *p.shape).astype(p.dtype)

        return [block(p) for p in self.pieces]

    def tensors(self, tree) -> list[jax.Array]:
        """The blocks of a tree of leaves, by group."""
        return self._join(self.blocks(tree))

    def leaves(self, by_group, rest: list, like):
        """Undoes `tensors` and `without_pieces`, in the shapes and dtypes of `like`."""
        return self.leaves_of_blocks(self._split(by_group), rest, like)

    def leaves_of_blocks(self, blocks: list, rest: list, like):
        """Undoes `blocks` and `without_pieces`, in the shapes and dtypes of `like`."""
        by_piece, rest_of_leaves = iter(blocks), iter(rest)

        def leaf(pieces, like):
            if not pieces:
                return next(rest_of_leaves).astype(like.dtype)
            blocks = [next(by_piece) for _ in pieces]
            if len(blocks) == 1:
                return blocks[0].reshape(like.shape).astype(like.dtype)
            for axis in reversed(
                range(len(pieces[0].slices))
            ):  # neighbours along the last axis come first
                runs = len({p.slices[axis].start for p in pieces})
                rows = [blocks[i : i + runs] for i in range(0, len(blocks), runs)]
                blocks = [jnp.concatenate(row, axis=len(pieces[0].stack) + axis) for row in rows]
            return blocks[0].astype(like.dtype)

        leaves = zip(self._by_leaf, map(jnp.asarray, jax.tree.leaves(like)), strict=True)
        return self._treedef.unflatten([leaf(*of_leaf) for of_leaf in leaves])

    def without_pieces(self, tree) -> list:
        """The leaves of a tree that have no pieces."""
        return [
            leaf
            for leaf, pieces in zip(jax.tree.leaves(tree), self._by_leaf, strict=True)
            if not pieces
        ]

    def by_piece(self, tree) -> list:
        """What belongs to each piece in a tree like the factors, what is kept in less than float32 widened to it."""
        return jax.tree.map(widen, self._by_piece(tree))

    def like_factors(self, by_piece: list, like):
        """Undoes `by_piece`, in the dtypes of `like`."""
        return jax.tree.map(lambda x, y: x.astype(y.dtype), self._nest(iter(by_piece)), like)

    def join(self, tree) -> list:
        """A tree like the factors by group; what is kept in less than float32 is widened to it."""
        return self._join(self._by_piece(tree))

    def split(self, by_group: list, like):
        """Undoes `join`, in the dtypes of `like`."""
        return self.like_factors(self._split(by_group), like)

    def groups(self, state, tensors: list) -> list:
        """The state by group, what is kept in less than float32 widened to it, and the tensors."""
        trees = [getattr(state, name) for name in LIKE_FACTORS]
        trees = [[None] * len(tensors) if tree is None else self.join(tree) for tree in trees]
        prints, start = [], 0
        for tensor in tensors:
            prints.append(
                None
                if state.fingerprint is None
                else state.fingerprint[start : start + len(tensor)]
            )
            start += len(tensor)
        return [Group(*of_group) for of_group in zip(*trees, prints, tensors, strict=True)]

    def with_groups(self, state, groups: list):
        """The state with its factors and what belongs to them from the groups after a step, in the state's dtypes."""

        def tree(name):
            like = getattr(state, name)
            return (
                None
                if like is None
                else self.split([getattr(group, name) for group in groups], like)
            )

        prints = [group.fingerprint for group in groups]
        if state.fingerprint is not None:
            state = state._replace(fingerprint=jnp.concatenate([state.fingerprint[:0], *prints]))
        return state._replace(**{name: tree(name) for name in LIKE_FACTORS})

    def in_order_of_groups(self, by_piece: list) -> list:
        """The same by piece in the order in which `groups` counts them."""
        return [by_piece[i] for positions in self._groups for i in positions]

    def rounded(self, by_group: list) -> list:
        """Factors of the values that they have once kept."""
        return [rounded(*of_group) for of_group in zip(by_group, self.kept_dtypes, strict=True)]

    @property
    def kept_dtypes(self) -> list:
        """Of each group the dtypes in which its factors are kept."""
        return [
            tuple(q.dtype for q in self.pieces[positions[0]].factors) for positions in self._groups
        ]

    @property
    def count(self) -> int:
        """How many tensors have factors."""
        return sum(math.prod(piece.stack) for piece in self.pieces)

    def as_kept(self, factors):
        """The factors as arrays of the dtypes in which they are kept."""
        return jax.tree.map(
            lambda struct, q: jnp.asarray(q, struct.dtype), self.build(lambda p: p.factors), factors
        )

    def _by_piece(self, tree) -> list:
        by_leaf = zip(self._by_leaf, self._treedef.flatten_up_to(tree), strict=True)
        return list(itertools.chain.from_iterable(blocks_of(*of_leaf) for of_leaf in by_leaf))

    def _nest(self, by_piece):
        """Consumes the iterator of what belongs to each piece."""
        blocks = [[next(by_piece) for _ in pieces] for pieces in self._by_leaf]
        return self._treedef.unflatten(
            [of_leaf[0] if len(of_leaf) == 1 else tuple(of_leaf) for of_leaf in blocks]
        )

    def _join(self, by_piece: list) -> list:
        def joined(positions):
            def concatenate(*arrays):
                stacks = [len(self.pieces[i].stack) for i in positions]
                arrays = [a.reshape(-1, *a.shape[n:]) for n, a in zip(stacks, arrays, strict=True)]
                batch = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
                return batch.astype(jnp.promote_types(batch.dtype, jnp.float32))

            return jax.tree.map(concatenate, *[by_piece[i] for i in positions])

        return [joined(positions) for positions in self._groups]

    def _split(self, by_group: list) -> list:
        by_piece = [None] * len(self.pieces)
        for positions, tree in zip(self._groups, by_group, strict=True):
            start = 0
            for i in positions:
                stack = self.pieces[i].stack
                by_piece[i] = jax.tree.map(
                    functools.partial(cut_out, start=start, stack=stack), tree
                )
                start += math.prod(stack)
        return by_piece


def rounded(arrays, kept) -> tuple:
    """The arrays of the values that they have once kept in these dtypes."""

    def of_one(x, dtype):
        if x.dtype == dtype:
            return x
        limits = jnp.finfo(dtype)
        return jax.lax.reduce_precision(x, limits.nexp, limits.nmant)

    return tuple(map(of_one, arrays, kept))


def blocks_of(pieces: list[Piece], tree) -> tuple:
    """What belongs to each piece of a leaf, out of the leaf's place in a tree like the factors."""
    return (tree,) if len(pieces) == 1 else tree
