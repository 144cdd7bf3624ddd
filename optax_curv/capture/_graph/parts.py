"""Uses of a part of a kernel: unequal slices, each with its place in the matrix of the whole leaf.

The rows of such a use are those of the whole kernel that are zero outside of the part: inputs
beside rows of the kernel that it lacks, output gradients beside columns. So they still sum to the
gradient of the leaf, and factors and directions are those of one matrix.
"""

import dataclasses

import numpy as np

from optax_curv.capture._graph import views
from optax_curv.capture._graph.marks import Found
from optax_curv.capture._graph.views import Cut, Piece, Slot


def of_whole_leaf(found: Found) -> list[Found]:
    """The use with slices as parts of the whole leaf's inputs and outputs, in every way that fits.

    One row or column alone does not tell which of the two it is: other uses of the leaf do.
    """
    if any(stride < 0 for stride, _ in (*found.inputs, *found.outputs)):
        return []
    ways = [(found.inputs, found.outputs, found.view.cuts)]
    for slot in (slot for slot in found.view.slots if slot.loop is None):
        ways = [way for before in ways for way in _without_slot(slot, *before)]
    kept = tuple(slot for slot in found.view.slots if slot.loop is not None)
    results = []
    for inputs, outputs, cuts in ways:
        inputs, left = _extended(tuple(inputs), cuts)
        outputs, left = _extended(tuple(outputs), left)
        if not left:
            view = found.view._replace(slots=kept)
            results.append(
                dataclasses.replace(found, view=view, inputs=inputs, outputs=outputs, cuts=cuts)
            )
    return results


Way = tuple[tuple[Piece, ...], tuple[Piece, ...], tuple[Cut, ...]]  # inputs, outputs, cuts


def _without_slot(slot: Slot, inputs, outputs, cuts) -> list[Way]:
    """The ways to see one of several equal slices as a part of an axis."""
    first = slot.index or 0

    def cut(stride: int, start: int, size: int, kept: int) -> Cut:
        return Cut(stride, size * slot.size, start + first * size, kept)

    inner = next((c for c in cuts if c.stride * c.size == slot.stride), None)
    if inner is not None:
        others = tuple(c for c in cuts if c is not inner)
        grown = cut(inner.stride, inner.start, inner.size, inner.kept)
        return [(inputs, outputs, (*others, grown))]
    alone = (slot.stride, 1)
    new = (*cuts, cut(slot.stride, 0, 1, 1))
    ways: list[Way] = [((*inputs, alone), outputs, new), (inputs, (*outputs, alone), new)]
    for stride, size in (*views.in_order(inputs), *views.in_order(outputs)):
        if stride * size == slot.stride:
            ways.append((inputs, outputs, (*cuts, cut(stride, 0, size, size))))
    return ways


def _extended(pieces: tuple[Piece, ...], cuts) -> tuple[tuple[Piece, ...], tuple[Cut, ...]]:
    """The pieces of the whole leaf along one side, and the cuts that are not of this side."""
    left: list[Cut] = []
    for cut in cuts:
        given = next(
            (p for p in (pieces, views.in_order(pieces)) if (cut.stride, cut.kept) in p), None
        )
        if given is None:
            left.append(cut)
        else:
            place = given.index((cut.stride, cut.kept))
            pieces = (*given[:place], (cut.stride, cut.size), *given[place + 1 :])
    return pieces, tuple(left)


def places(whole: tuple[Piece, ...], cuts: tuple[Cut, ...]) -> np.ndarray | None:
    """Where the entries of a part lie among those of one side of the whole; None: they are all."""
    own = {(cut.stride, cut.size): cut for cut in cuts if (cut.stride, cut.size) in whole}
    if not own:
        return None
    place = np.zeros((), np.int32)
    for piece in sorted(whole, reverse=True):
        cut = own.get(piece)
        start, size = (0, piece[1]) if cut is None else (cut.start, cut.kept)
        place = place[..., None] * piece[1] + np.arange(start, start + size, dtype=np.int32)
    return place.ravel()
