"""Parameters that meet activations entry by entry: biases, scales and shifts. Rules as in `views`."""

import math

from optax_curv.capture import layouts
from optax_curv.capture.jaxpr import Literal, shape_of
from optax_curv.capture.layouts import View
from optax_curv.capture.marks import Found, Mark
from optax_curv.capture.views import is_plain


def multiply(walk, eqn, marks):
    """A scale where a leaf meets the examples; before that, coefficients of the leaf."""
    side = next((side for side in (0, 1) if marks[side].leaves), None)
    if side is None:
        return None
    if marks[1 - side].leaves or marks[1 - side].derived or len(marks[side].leaves) != 1:
        return None
    view, other = _spread(marks[side].leaves[0], eqn), eqn.invars[1 - side]
    if isinstance(other, Literal) and math.prod(shape_of(other)) == 1:
        return [Mark(leaves=(view._replace(gain=view.gain * float(other.val)),))]
    if marks[1 - side].batch is None:
        return [Mark(leaves=(view._replace(coefficients=(*view.coefficients, other)),))]
    walk.add_uses([_elementwise_use(walk, marks, view, "scale", (other, *view.coefficients))], eqn)
    return [Mark()]


def divide(walk, eqn, marks):
    """A leaf divided by a number."""
    if len(marks[0].leaves) != 1 or not isinstance(eqn.invars[1], Literal):
        return None
    view = marks[0].leaves[0]
    return [Mark(leaves=(view._replace(gain=view.gain / float(eqn.invars[1].val)),))]


def negate(walk, eqn, marks):
    """A leaf with the other sign."""
    if len(marks[0].leaves) != 1:
        return None
    view = marks[0].leaves[0]
    return [Mark(leaves=(view._replace(gain=-view.gain),))]


def add(walk, eqn, marks):
    """A bias where a leaf meets its layer's output, a shift where it meets other arrays that depend on the examples."""
    side = next((side for side in (1, 0) if marks[side].leaves), None)
    if side is None:
        return [Mark()] if not any(mark.derived for mark in marks) else None
    if marks[1 - side].leaves:
        return None
    mark, other = marks[side], marks[1 - side]
    subtracted = eqn.primitive.name == "sub"
    if other.batch is None and other.output is None:
        if len(mark.leaves) > 1 or (subtracted and side == 1):
            return None
        return [Mark(leaves=(_spread(mark.leaves[0], eqn),), derived=other.derived)]
    if len(mark.leaves) > 1:
        return _joined_bias(walk, eqn, mark, marks, side)
    view = _spread(mark.leaves[0], eqn)
    found = _elementwise_use(walk, marks, view, "shift", view.coefficients)
    found.sign = -1.0 if subtracted and side == 1 else 1.0
    group = walk.groups[other.output.source] if other.output and walk.once(eqn.invars[1 - side]) else []
    if len(group) == 1 and not subtracted and not view.coefficients and view.gain == 1.0:
        seen = _spread(other.output, eqn)
        found.partner = group[0] if walk.is_bias(group[0], seen, found) else None
    walk.add_uses([found], eqn)
    return [Mark()]


def select(walk, eqn, marks):
    """A leaf in the place of some activations, as the token of a masked autoencoder: a shift where it is chosen."""
    cases = [number for number, mark in enumerate(marks[1:]) if mark.leaves]
    if len(cases) != 1 or len(marks[1 + cases[0]].leaves) > 1 or all(mark.batch is None for mark in marks):
        return None
    view = _spread(marks[1 + cases[0]].leaves[0], eqn)
    found = _elementwise_use(walk, marks, view, "shift", (eqn.invars[0], *view.coefficients))
    found.choice = cases[0]
    walk.add_uses([found], eqn)
    return [Mark()]


def _joined_bias(walk, eqn, mark, marks, side):
    """Concatenated biases that meet the output of equally concatenated kernels."""
    output = marks[1 - side].output
    group = walk.groups[output.source] if output else []
    if len(group) != len(mark.leaves) or output.axes != layouts.whole(0, output.shape).axes:
        return None
    first, uses = 0, []
    for number, view in zip(group, mark.leaves, strict=True):
        size = view.shape[mark.joined]
        window = walk.uses[number].windows[1]
        if window != (mark.joined, first, size):
            return None
        first += size
        sizes = list(shape_of(eqn.outvars[0]))
        sizes[mark.joined] = size
        view = layouts.broadcast(view, sizes, range(len(sizes)))
        found = _elementwise_use(walk, marks, view, "shift", ())
        found.windows = (None, window)
        if not walk.is_bias(number, layouts.whole(0, tuple(sizes)), found):
            return None
        found.partner = number
        uses.append(found)
    walk.add_uses(uses, eqn)
    return [Mark()]


def _spread(view: View, eqn) -> View:
    """The view broadcast to the shape of an element-wise result; a scalar has no axes to keep."""
    out = shape_of(eqn.outvars[0])
    return layouts.broadcast(view, out, range(len(view.axes)))


def _elementwise_use(walk, marks, view, kind, operands):
    segments = []
    for axis, (size, pieces) in enumerate(zip(view.shape, view.axes, strict=True)):
        if not pieces or all(stride == 0 for stride, _ in pieces):
            segments.append(("row", ((float(axis), size),)))
        else:
            for number, (stride, length) in enumerate(pieces):
                row = ("row", ((axis + number / (len(pieces) + 1), length),))
                segments.append(("feature", ((stride, length),)) if stride else row)
    feature = tuple(piece for role, pieces in segments if role == "feature" for piece in pieces)
    batches = [mark.batch for mark in marks if mark.batch is not None]
    batch = next((b for b in batches if b.axis is not None), batches[0] if batches else None)
    return Found(
        kind=kind,
        view=view,
        operands=tuple(operands),
        stack=(),
        inputs=(),
        outputs=feature,
        input_segments=(),
        output_segments=tuple(segments),
        examples=walk.examples(batch, segments),
    )


def concatenate(walk, eqn, marks):
    """Several whole leaves side by side, as in a fused recurrent cell."""
    leaves = [k for k, mark in enumerate(marks) if mark.leaves]
    if len(leaves) == 1 and any(mark.batch is not None for mark in marks):
        return _beside_examples(walk, eqn, marks, leaves[0])
    if not all(len(mark.leaves) == 1 and is_plain(mark.leaves[0]) for mark in marks):
        return None
    return [Mark(leaves=tuple(mark.leaves[0] for mark in marks), joined=eqn.params["dimension"])]


def _beside_examples(walk, eqn, marks, place):
    """A leaf repeated for every example and put beside its activations, as a class token: a shift of its part."""
    view, axis = marks[place].leaves[0], eqn.params["dimension"]
    if len(marks[place].leaves) > 1 or view.coefficients:
        return None
    found = _elementwise_use(walk, marks, view, "shift", ())
    first = sum(shape_of(variable)[axis] for variable in eqn.invars[:place])
    found.windows = (None, (axis, first, view.shape[axis]))
    walk.add_uses([found], eqn)
    return [Mark()]
