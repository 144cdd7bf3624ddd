"""Strided views: which entry of a parameter leaf (or of a layer's output) an array holds at each of its indices.

Inside a loss a kernel is reshaped, transposed, cast and sliced before it meets its input. Each of these keeps an array
a strided view of the leaf, and a view says which of its axes are which axes of the leaf.
"""

import math
from typing import Any, NamedTuple

# One stride and size; an axis is several, outermost first. Stride 0 repeats the same entries; a negative one reverses.
Piece = tuple[Any, int]


class Slot(NamedTuple):
    """A part of an axis of the leaf that a scan walks along, or that a slice has fixed at `index`.

    Attributes:
      stride, size: the part.
      index: where a slice fixed it; None for a scan.
      loop: depth of that scan; None for a slice.
    """

    stride: int
    size: int
    index: int | None  # type: ignore[override]
    loop: int | None = None


class View(NamedTuple):
    """A strided view of a source.

    Attributes:
      source: number of the parameter leaf, or of the layer use whose output this is.
      axes: the pieces of each axis; an axis of size 1 has none.
      offset: entry of the source at index 0.
      slots: axes that a scan or a slice took away, in the order they went.
      aligned: whether every slice so far is one of several equal ones.
      gain: a number that multiplies the entries.
      coefficients: variables that multiply the entries (a scale on its way to the data).
    """

    source: int
    axes: tuple[tuple[Piece, ...], ...]
    offset: int = 0
    slots: tuple[Slot, ...] = ()
    aligned: bool = True
    gain: float = 1.0
    coefficients: tuple = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(size_of(axis) for axis in self.axes)


def whole(source: int, shape: tuple[int, ...]) -> View:
    """The view of a whole array of this shape."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return View(source, tuple(((t, n),) if n != 1 else () for t, n in zip(strides, shape, strict=True)))


def size_of(pieces) -> int:
    """Number of entries along the pieces."""
    return math.prod(size for _, size in pieces)


def regroup(pieces, shape) -> tuple[tuple[Piece, ...], ...] | None:
    """Cuts consecutive pieces into axes of the given sizes, splitting a piece where needed; None if they do not fit."""
    left, axes = [piece for piece in pieces if piece[1] != 1], []
    for size in shape:
        axis = []
        while size > 1:
            if not left:
                return None
            stride, length = left.pop(0)
            taken = math.gcd(size, length)
            if taken == 1 or (taken != length and taken != size):
                return None
            if taken != length:
                left.insert(0, (stride, length // taken))
            axis.append((stride * (length // taken), taken))
            size //= taken
        axes.append(tuple(axis))
    return tuple(axes)


def merged(pieces) -> tuple[Piece, ...]:
    """Joins neighbouring pieces that together are one longer piece."""
    joined: list[Piece] = []
    for stride, size in pieces:
        if joined and joined[-1][0] == stride * size:
            joined[-1] = (stride, joined[-1][1] * size)
        else:
            joined.append((stride, size))
    return tuple(joined)


def in_order(pieces) -> tuple[Piece, ...]:
    """The pieces as the leaf itself orders them, merged."""
    return merged(sorted(((abs(stride), size) for stride, size in pieces), reverse=True))


def reshape(view: View, shape) -> View | None:
    """The view after a reshape."""
    axes = regroup([piece for axis in view.axes for piece in axis], shape)
    return None if axes is None else view._replace(axes=axes)


def transpose(view: View, permutation) -> View:
    """The view after a transposition."""
    return view._replace(axes=tuple(view.axes[axis] for axis in permutation))


def broadcast(view: View, shape, dimensions) -> View:
    """The view after `broadcast_in_dim`."""
    axes: list[tuple[Piece, ...]] = [((0, size),) if size != 1 else () for size in shape]
    for axis, dimension in zip(view.axes, dimensions, strict=True):
        if axis:
            axes[dimension] = axis
    return view._replace(axes=tuple(axes))


def tile(view: View, reps) -> View:
    """The view after `tile`, whose copies of an axis lie one after the other."""
    axes = [((0, count), *axis) if count != 1 else axis for axis, count in zip(view.axes, reps, strict=True)]
    return view._replace(axes=tuple(axes))


def reverse(view: View, dimensions) -> View:
    """The view after `rev`."""
    axes, offset = list(view.axes), view.offset
    for dimension in dimensions:
        offset += sum(stride * (size - 1) for stride, size in axes[dimension])
        axes[dimension] = tuple((-stride, size) for stride, size in axes[dimension])
    return view._replace(axes=tuple(axes), offset=offset)


def cut(view: View, dimension: int, start: int, size: int) -> View | None:
    """The view after taking `size` entries from `start` along one axis."""
    axis = merged(view.axes[dimension])
    if size_of(axis) == size:
        return view
    if len(axis) != 1:
        return None
    stride, full = axis[0]
    aligned = full % size == 0 and start % size == 0 and stride > 0
    slots = (*view.slots, Slot(stride * size, full // size, start // size)) if stride else view.slots
    axes = list(view.axes)
    axes[dimension] = ((stride, size),) if size != 1 else ()
    return view._replace(
        axes=tuple(axes), offset=view.offset + stride * start, slots=slots, aligned=view.aligned and aligned
    )


def enter_loop(view: View, depth: int) -> View | None:
    """The view of one slice of the leading axis, which a scan at this depth walks along."""
    if not view.axes:
        return None
    axis = merged(view.axes[0])
    if len(axis) > 1 or any(stride < 0 for stride, _ in axis):
        return None
    slots = tuple(Slot(stride, size, None, depth) for stride, size in axis if stride)
    return view._replace(axes=view.axes[1:], slots=view.slots + slots)


class Arrangement(NamedTuple):
    """How an array becomes [*stack, examples, positions, features]: reshape, reverse, transpose, reshape."""

    split: tuple[int, ...]
    reverse: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, array):
        """Applies it."""
        array = array.reshape(self.split)
        if self.reverse:
            array = array[tuple(slice(None, None, -1 if k in self.reverse else 1) for k in range(array.ndim))]
        return array.transpose(self.order).reshape(self.shape)


def arrangement(segments, stack, examples: tuple[int, int] | None, batch: int) -> Arrangement:
    """Builds the arrangement of an array.

    Args:
      segments: the array's axes, or parts of them, in order: pairs of a role ("stack", "row" or "feature") and pieces.
        The stride of a row's piece is its number among the rows: equal in a layer's input and in its output.
      stack: the stack's pieces in the order wanted.
      examples: number of the row that holds the examples, and how many of its entries follow for each; None: no row
        does.
      batch: number of examples.

    Returns:
      The arrangement; without a row of examples it has one example with all positions, and size 1 along the pieces of
      the stack that the array lacks.
    """
    places = {stride: place for place, (stride, _) in enumerate(stack)}
    parts = []  # size, stride, sort key
    for role, pieces in segments:
        for stride, size in pieces:
            if role == "row" and examples is not None and examples[0] == stride:
                outer = size // (batch * examples[1])
                parts += [(outer, 1, (2, stride)), (batch, 1, (1, 0)), (examples[1], 1, (2, stride + 0.5))]
            elif role == "row":
                parts.append((size, 1, (2, stride)))
            elif role == "stack":
                parts.append((size, stride, (0, places[abs(stride)])))
            else:
                parts.append((size, stride, (3, -abs(stride))))
    order = sorted(range(len(parts)), key=lambda k: parts[k][2])
    sizes = {group: [parts[k][0] for k in order if parts[k][2][0] == group] for group in (1, 2, 3)}
    stacked = {key[1]: size for size, _, key in parts if key[0] == 0}
    return Arrangement(
        split=tuple(size for size, _, _ in parts),
        reverse=tuple(k for k, (_, stride, _) in enumerate(parts) if stride < 0),
        order=tuple(order),
        shape=(*(stacked.get(place, 1) for place in range(len(stack))), *(math.prod(sizes[k]) for k in (1, 2, 3))),
    )


def matched(view: View, other: View) -> list[tuple[Piece, Piece]] | None:
    """Pairs of pieces of equal size that run together through two views of one shape; None if they do not match."""
    pairs = []
    for axis, across in zip(view.axes, other.axes, strict=True):
        left = [list(axis), list(across)]
        while left[0] and left[1]:
            size = math.gcd(left[0][0][1], left[1][0][1])
            if size == 1:
                return None
            pair = []
            for pieces in left:
                stride, length = pieces.pop(0)
                if length != size:
                    pieces.insert(0, (stride, length // size))
                pair.append((stride * (length // size), size))
            pairs.append(tuple(pair))
        if left[0] or left[1]:
            return None
    return pairs


def role_at(segments, stride: int) -> tuple[str, int]:
    """Role of the piece of an array (given by segments) that moves by `stride` entries.

    Also its stride in the leaf, or for a row its number.
    """
    inner = 1
    for role, pieces in reversed(segments):
        for leaf_stride, size in reversed(pieces):
            if inner <= stride < inner * size:
                return role, leaf_stride if role == "row" else leaf_stride * (stride // inner)
            inner *= size
    return "row", 0
