"""Strided views: which entry of a leaf, or of a layer's output, an array holds at each index.

An array that is reshaped, transposed, cast or sliced out of a leaf stays a strided view of it, and
the strides tell which axes of the leaf the array's axes are.
"""

import math
from typing import Any, NamedTuple

from optax_curv.capture._graph.jaxpr import (
    SAME_PLACES,
    axes_of,
    permutation,
    repetitions,
    reshaped,
    sliced,
)
from optax_curv.capture._graph.jaxpr import broadcast as broadcast_of

# A stride and a size; an axis has several, outermost first. Stride 0 repeats the same entries, a
# negative stride reverses them.
Piece = tuple[Any, int]


class Slot(NamedTuple):
    """A part of an axis of the leaf: a scan at depth `loop` walks it, or a slice fixes `index`."""

    stride: int
    size: int
    index: int | None  # type: ignore[override]
    loop: int | None = None


class Cut(NamedTuple):
    """A part of an axis of the leaf that is none of several equal ones: `kept` from `start` on."""

    stride: int
    size: int
    start: int
    kept: int


class View(NamedTuple):
    """A view of a parameter leaf, or of the output of a group of uses."""

    source: int
    axes: tuple[tuple[Piece, ...], ...]  # without pieces of size 1
    offset: int = 0
    slots: tuple[Slot, ...] = ()  # what scans and slices took away, in the order it went
    cuts: tuple[Cut, ...] = ()  # the unequal slices
    gain: float = 1.0  # a number, and variables, that multiply the entries
    coefficients: tuple = ()
    divisors: tuple = ()  # variables, numbers, that divide the entries
    made: bool = False  # whether entries are functions of the leaf's, each of its own alone

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(size_of(axis) for axis in self.axes)


def whole(source: int, shape: tuple[int, ...]) -> View:
    """The view of a whole array of this shape."""
    axes = (
        ((math.prod(shape[axis + 1 :]), size),) if size != 1 else ()
        for axis, size in enumerate(shape)
    )
    return View(source, tuple(axes))


def size_of(pieces) -> int:
    """Number of entries along the pieces."""
    return math.prod(size for _, size in pieces)


def regroup(pieces, shape) -> tuple[tuple[Piece, ...], ...] | None:
    """Cuts consecutive pieces into axes of the given sizes; None if they do not fit."""
    left, axes = [piece for piece in pieces if piece[1] != 1], []
    for size in shape:
        axis = []
        while size > 1:
            if not left:
                return None
            taken = math.gcd(size, left[0][1])
            if taken == 1 or taken not in (size, left[0][1]):
                return None
            axis.append(_take(left, taken))
            size //= taken
        axes.append(tuple(axis))
    return tuple(axes)


def _take(pieces: list[Piece], size: int) -> Piece:
    """Takes a piece of `size` entries off the front of the list."""
    stride, length = pieces.pop(0)
    if length != size:
        pieces.insert(0, (stride, length // size))
    return stride * (length // size), size


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
    """Sorts the pieces as the leaf itself orders them, and merges them."""
    return merged(sorted(((abs(stride), size) for stride, size in pieces), reverse=True))


def reshape(view: View, shape) -> View | None:
    """The view after a reshape."""
    axes = regroup([piece for axis in view.axes for piece in axis], shape)
    return None if axes is None else view._replace(axes=axes)


def transpose(view: View, permutation) -> View:
    """The view after a transposition."""
    return view._replace(axes=tuple(view.axes[axis] for axis in permutation))


def without(view: View, axes) -> View:
    """The view without some axes of size 1."""
    return transpose(view, [axis for axis in range(len(view.axes)) if axis not in axes])


def broadcast(view: View, shape, dimensions) -> View:
    """The view after `broadcast_in_dim`."""
    axes = dict(zip(dimensions, view.axes, strict=True))
    return view._replace(
        axes=tuple(
            axes.get(k) or (((0, size),) if size != 1 else ()) for k, size in enumerate(shape)
        )
    )


def cut(view: View, dimension: int, start: int, size: int) -> View | None:
    """The view after taking `size` entries from `start` along one axis."""
    pieces = merged(view.axes[dimension])
    if size_of(pieces) == size:
        return view
    if len(pieces) != 1 or size == 0:
        return None
    axes = list(view.axes)
    axes[dimension] = ((pieces[0][0], size),) if size != 1 else ()
    view = view._replace(axes=tuple(axes), offset=view.offset + pieces[0][0] * start)
    return _with_cut(view, *pieces[0], start, size)


def _with_cut(view: View, stride: int, full: int, start: int, size: int) -> View:
    """Notes the slice of an axis of stride and size `full`, itself a slice perhaps."""
    if not stride:
        return view
    if any((cut.stride, cut.kept) == (stride, full) for cut in view.cuts):
        cuts = (
            Cut(stride, cut.size, cut.start + start, size)
            if (cut.stride, cut.kept) == (stride, full)
            else cut
            for cut in view.cuts
        )
        return view._replace(cuts=tuple(cuts))
    if stride > 0 and full % size == 0 and start % size == 0:
        return view._replace(slots=(*view.slots, Slot(stride * size, full // size, start // size)))
    return view._replace(cuts=(*view.cuts, Cut(stride, full, start, size)))


def enter_loop(view: View, depth: int) -> View | None:
    """The view of one slice of the leading axis, along which a scan at this depth walks."""
    if not view.axes:
        return None
    axis = merged(view.axes[0])
    if len(axis) > 1 or any(stride < 0 for stride, _ in axis):
        return None
    slots = tuple(Slot(stride, size, None, depth) for stride, size in axis if stride)
    return view._replace(axes=view.axes[1:], slots=view.slots + slots)


def is_plain(view: View) -> bool:
    """Whether the view has the leaf's own entries without coefficients, and none twice."""
    return not view.coefficients + view.divisors and not view.made and has_each_once(view)


def has_each_once(view: View) -> bool:
    """Whether the view has no entry twice."""
    return all(stride for axis in view.axes for stride, _ in axis)


def as_made(view: View) -> View:
    """The view as an array that is made of the leaf, whatever multiplies it forgotten."""
    return view._replace(made=True, gain=1.0, coefficients=(), divisors=())


def moved(eqn, view: View) -> View | None:
    """The view after one equation; None if the result is not a view."""
    name = eqn.primitive.name
    if name in SAME_PLACES:
        return view
    if name == "reshape":
        sizes, order = reshaped(eqn)
        return reshape(view if order is None else transpose(view, order), sizes)
    if name == "transpose":
        return transpose(view, permutation(eqn))
    if name == "squeeze":
        return without(view, axes_of(eqn))
    if name in ("broadcast_in_dim", "expand_dims"):
        return broadcast(view, *broadcast_of(eqn))
    if name == "tile":
        copies = zip(view.axes, repetitions(eqn), strict=True)
        return view._replace(
            axes=tuple(((0, count), *axis) if count != 1 else axis for axis, count in copies)
        )
    if name == "rev":
        return _reversed(view, axes_of(eqn))
    if name == "slice":
        return _sliced(view, *sliced(eqn))
    return None


def _reversed(view: View, reversed_axes) -> View:
    """The view with some axes from their end to their start."""
    axes, offset = list(view.axes), view.offset
    for axis in reversed_axes:
        offset += sum(stride * (size - 1) for stride, size in axes[axis])
        axes[axis] = tuple((-stride, size) for stride, size in axes[axis])
    return view._replace(axes=tuple(axes), offset=offset)


def _sliced(view: View, starts, limits, steps) -> View | None:
    """The view after a `slice`; None where it takes every other entry, or cuts across pieces."""
    if any(step != 1 for step in steps):
        return None
    after: View | None = view
    for axis, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        after = after and cut(after, axis, start, limit - start)
    return after


class Arrangement(NamedTuple):
    """An array's way to [*stack, examples, positions, features]: split, reverse, order, shape."""

    split: tuple[int, ...]
    reverse: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, array):
        """Returns the array so arranged."""
        array = array.reshape(self.split)
        if self.reverse:
            array = array[
                tuple(slice(None, None, -1 if k in self.reverse else 1) for k in range(array.ndim))
            ]
        return array.transpose(self.order).reshape(self.shape)


def arrangement(segments, stack, examples, batch: int) -> Arrangement:
    """Finds the arrangement of an array; without a row of examples it has one example.

    Args:
      segments: the array's axes, or parts of them, in order: pairs of a role ("stack", "row" or
        "feature") and pieces. The stride of a row's piece is its number among the rows: equal in a
        layer's input and in its output.
      stack: the stack's pieces in the order wanted; size 1 where the array lacks them.
      examples: the `Batch` whose row holds them, or None.
      batch: number of examples.
    """
    places = {stride: place for place, (stride, _) in enumerate(stack)}
    parts = []  # size, stride, sort key
    for role, pieces in segments:
        for stride, size in pieces:
            if role == "row" and examples is not None and examples.axis == stride:
                outer = size // (batch * examples.inner)
                parts += [
                    (outer, 1, (2, stride)),
                    (batch, 1, (1, 0)),
                    (examples.inner, 1, (2, stride + 0.5)),
                ]
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
        shape=(
            *(stacked.get(place, 1) for place in range(len(stack))),
            *(math.prod(sizes[k]) for k in (1, 2, 3)),
        ),
    )


def matched(view: View, other: View) -> list[tuple[Piece, Piece]] | None:
    """Pairs the pieces that run together through two views of one shape; None without a match."""
    pairs = []
    for axes in zip(view.axes, other.axes, strict=True):
        left, right = map(list, axes)
        while left and right:
            size = math.gcd(left[0][1], right[0][1])
            if size == 1:
                return None
            pairs.append((_take(left, size), _take(right, size)))
        if left or right:
            return None
    return pairs


def role_at(segments, stride: int) -> tuple[str, int]:
    """Finds the role of the piece that moves by `stride` entries, and its stride or row number."""
    inner = 1
    for role, pieces in reversed(segments):
        for leaf_stride, size in reversed(pieces):
            if inner <= stride < inner * size:
                return role, leaf_stride if role == "row" else leaf_stride * (stride // inner)
            inner *= size
    return "row", 0
