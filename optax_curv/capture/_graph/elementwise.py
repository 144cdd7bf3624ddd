"""Uses of a leaf entry by entry: biases, scales, shifts, and their parts in a concatenation."""

import dataclasses
import math

from optax_curv.capture._graph import views
from optax_curv.capture._graph.jaxpr import axis_of, is_literal, shape_of
from optax_curv.capture._graph.marks import Found, Mark, Place, changes, is_activation, known_batch
from optax_curv.capture._graph.products import use_of
from optax_curv.capture._graph.views import View, has_each_once, size_of
from optax_curv.layers import KINDS


def multiply(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """A scale where a leaf meets the examples; before that, coefficients of the leaf."""
    side = 0 if marks[0].leaves else 1
    if marks[1 - side].leaves or marks[1 - side].derived or len(marks[side].leaves) != 1:
        return None
    view, other = _spread(marks[side].leaves[0], eqn), eqn.invars[1 - side]
    if is_literal(other) and math.prod(shape_of(other)) == 1:
        return [Mark(leaves=(view._replace(gain=view.gain * float(other.val)),))]
    if not is_activation(marks[1 - side]):
        if shape_of(other) and changes(place, view, [marks[1 - side]]):
            return None
        return [Mark(leaves=(view._replace(coefficients=(*view.coefficients, other)),))]
    place.add([_use(place, marks, view, "scale", (other, *view.coefficients))])
    return [Mark()]


def divide(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """A leaf divided by a number."""
    number = eqn.invars[1]
    if len(marks[0].leaves) != 1 or shape_of(number):
        return None
    view = marks[0].leaves[0]
    if is_literal(number):
        return [Mark(leaves=(view._replace(gain=view.gain / float(number.val)),))]
    if is_activation(marks[1]) or marks[1].leaves or marks[1].derived:
        return None
    return [Mark(leaves=(view._replace(divisors=(*view.divisors, number)),))]


def negate(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """A leaf with the other sign."""
    if len(marks[0].leaves) != 1:
        return None
    view = marks[0].leaves[0]
    return [Mark(leaves=(view._replace(gain=-view.gain),))]


def add(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """A bias where a leaf meets its layer's output, a shift where it meets other activations."""
    side = next((side for side in (1, 0) if marks[side].leaves), None)
    if side is None:
        return [Mark()] if not any(mark.derived for mark in marks) else None
    if marks[1 - side].leaves:
        return None
    mark, other = marks[side], marks[1 - side]
    (leaf, *more) = mark.leaves
    subtracted = eqn.primitive.name == "sub"
    if not is_activation(other):
        if more or (subtracted and side == 1):
            return None
        return [Mark(leaves=(_spread(leaf, eqn),), derived=other.derived)]
    if more:
        return _joined_bias(place, eqn, mark, marks, side)
    view = _spread(leaf, eqn)
    shift = _use(place, marks, view, "shift", view.coefficients)
    shift.sign = -1.0 if subtracted and side == 1 else 1.0
    output = other.output if place.once(eqn.invars[1 - side]) else None
    plain = not subtracted and not view.coefficients + view.divisors and view.gain == 1.0
    if output is not None and plain and len(place.group(output)) == 1:
        (kernel,) = place.group(output)
        seen = _spread(output, eqn)
        shift = _as_bias(shift, kernel, place.found[kernel], seen) or shift
    place.add([shift])
    return [Mark()]


def _as_bias(shift: Found, number: int, kernel: Found, output: View) -> Found | None:
    """The shift as the bias of use `number`; None if it does not lie along its outputs and stack.

    Args:
      shift: a use added to a view of the kernel's output.
      number: the kernel's number.
      kernel: the kernel's use.
      output: that view.
    """
    slots = [[(s.size, s.index, s.loop) for s in view.slots] for view in (kernel.view, shift.view)]
    pairs = views.matched(output, shift.view)
    if slots[0] != slots[1] or KINDS[kernel.kind].one_hot or pairs is None:
        return None
    order = {}
    for (stride, size), (bias_stride, _) in pairs:
        role, kernel_stride = views.role_at(kernel.output_segments, stride)
        if stride == 0 or bias_stride < 0 or (role == "row") != (bias_stride == 0):
            return None
        if role != "row":
            if kernel_stride < 0:
                return None
            order[role != "stack", -kernel_stride] = bias_stride, size
    if size_of(order.values()) != size_of((*kernel.stack, *kernel.outputs)):
        return None
    stack, outputs = (
        tuple(order[key] for key in sorted(order) if key[0] == below) for below in (False, True)
    )
    return dataclasses.replace(shift, stack=stack, outputs=outputs, partner=number)


def select(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """A shift where a leaf takes the place of activations, as the token of a masked autoencoder."""
    cases = [number for number, mark in enumerate(marks[1:]) if mark.leaves]
    if len(cases) != 1 or not any(map(is_activation, marks)):
        return None
    (leaf, *more) = marks[1 + cases[0]].leaves
    if more:
        return None
    view = _spread(leaf, eqn)
    shift = _use(place, marks, view, "shift", (eqn.invars[0], *view.coefficients))
    place.add([dataclasses.replace(shift, choice=cases[0])])
    return [Mark()]


def _joined_bias(place: Place, eqn, mark: Mark, marks: list[Mark], side: int) -> list[Mark] | None:
    """Concatenated biases that meet the output of equally concatenated kernels."""
    output = marks[1 - side].output
    group = place.group(output) if output else []
    if output is None or len(group) != len(mark.leaves):
        return None
    if output.axes != views.whole(0, output.shape).axes:
        return None
    first, shifts = 0, []
    for number, leaf in zip(group, mark.leaves, strict=True):
        size, kernel = leaf.shape[mark.joined], place.found[number]
        window = kernel.windows[1]
        if window != (mark.joined, first, size):
            return None
        first += size
        sizes = list(shape_of(eqn.outvars[0]))
        sizes[mark.joined] = size
        view = views.broadcast(leaf, sizes, range(len(sizes)))
        shift = _use(place, marks, view, "shift", ())
        shift.windows = (None, window)
        bias = _as_bias(shift, number, kernel, views.whole(0, tuple(sizes)))
        if bias is None:
            return None
        shifts.append(bias)
    place.add(shifts)
    return [Mark()]


def _spread(view: View, eqn) -> View:
    """The view in the shape of an element-wise result; a scalar has no axes to keep."""
    out = shape_of(eqn.outvars[0])
    return views.broadcast(view, out, range(len(view.axes)))


def _use(place: Place, marks: list[Mark], view: View, kind: str, operands) -> Found:
    segments = []
    for axis, (size, pieces) in enumerate(zip(view.shape, view.axes, strict=True)):
        if not pieces or all(stride == 0 for stride, _ in pieces):
            segments.append(("row", ((float(axis), size),)))
            continue
        for number, (stride, length) in enumerate(pieces):
            row = ("row", ((axis + number / (len(pieces) + 1), length),))
            segments.append(("feature", ((stride, length),)) if stride else row)
    given = (*operands, *view.divisors)
    use = use_of(place, kind, view, given, (), segments, known_batch(marks))
    return dataclasses.replace(use, divisors=len(view.divisors))


def concatenate(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """Several whole leaves side by side, as in a fused recurrent cell."""
    leaves = [k for k, mark in enumerate(marks) if mark.leaves]
    if len(leaves) == 1 and any(map(is_activation, marks)):
        return _beside_examples(place, eqn, marks, leaves[0])
    if not all(len(mark.leaves) == 1 and has_each_once(mark.leaves[0]) for mark in marks):
        return None
    return [Mark(leaves=tuple(mark.leaves[0] for mark in marks), joined=axis_of(eqn))]


def _beside_examples(place: Place, eqn, marks: list[Mark], number: int) -> list[Mark] | None:
    """A shift of a part: a leaf beside the activations of every example, as a class token."""
    view, axis = marks[number].leaves[0], axis_of(eqn)
    if len(marks[number].leaves) > 1 or view.coefficients or view.made:
        return None
    first = sum(shape_of(variable)[axis] for variable in eqn.invars[:number])
    shift = _use(place, marks, view, "shift", ())
    place.add([dataclasses.replace(shift, windows=(None, (axis, first, view.shape[axis])))])
    return [Mark()]
