"""Where parameters meet activations: in products, convolutions, look-ups of rows, or entry by entry; see `rules`."""

import math
from typing import Any

from optax_curv.capture._graph import views as layouts
from optax_curv.capture._graph.jaxpr import is_literal, shape_of
from optax_curv.capture._graph.marks import Found, Mark, known_batch
from optax_curv.capture._graph.views import View, is_plain, size_of


def _kernel_side(marks):
    """Which operand is the kernel, or None."""
    sides = [side for side, mark in enumerate(marks[:2]) if mark.leaves]
    if len(sides) != 1 or marks[1 - sides[0]].derived:
        return None
    return None if any(view.coefficients for view in marks[sides[0]].leaves) else sides[0]


def _own_stack(found: Found) -> Found:
    """Takes free axes on the far side of the inputs as a stack, as in [members, in, out] of a vmapped ensemble."""
    inputs = [abs(stride) for stride, _ in found.inputs]
    outputs = [abs(stride) for stride, _ in found.outputs]
    if not inputs or not outputs or not min(outputs) < min(inputs) <= max(inputs) < max(outputs):
        return found
    far = tuple(piece for piece in found.outputs if abs(piece[0]) > max(inputs))
    segments = []
    for role, pieces in found.output_segments:
        parts = [("stack" if piece in far else role, (piece,)) for piece in pieces]
        segments += parts if role == "feature" else [(role, pieces)]
    found.output_segments = tuple(segments)
    found.stack = (*found.stack, *far)
    found.outputs, found.far = tuple(piece for piece in found.outputs if piece not in far), far
    return found


def without_own_stack(found: Found) -> Found:
    """The use with those axes as outputs."""
    segments = [
        ("feature" if set(pieces) & set(found.far) else role, pieces)
        for role, pieces in found.output_segments
    ]
    found.output_segments, found.outputs = tuple(segments), (*found.far, *found.outputs)
    found.stack, found.far = tuple(piece for piece in found.stack if piece not in found.far), ()
    return found


def dot_general(walk, eqn, marks):
    """A dense layer: contracted kernel axes are inputs, free ones outputs, batched ones a stack of kernels."""
    side = _kernel_side(marks)
    if side is None:
        return None
    groups, first = [], 0
    for view in marks[side].leaves:
        found, windows = (
            _dense_use(walk, eqn, marks, side, view),
            _dense_windows(eqn, marks[side], view, first, side),
        )
        if found is None or windows is None:
            return None
        found.windows = windows
        first += view.shape[marks[side].joined]
        groups.append(_own_stack(found))
    return [Mark(output=walk.add_uses(groups, eqn))]


def _dense_use(walk, eqn, marks, side, view):
    contracting, together = eqn.params["dimension_numbers"]
    kc, xc, kb, xb = contracting[side], contracting[1 - side], together[side], together[1 - side]
    shape = shape_of(eqn.invars[1 - side])
    if any(
        stride == 0
        for axis, pieces in enumerate(view.axes)
        if axis not in kb
        for stride, _ in pieces
    ):
        return None
    kernel_free = [axis for axis in range(len(view.axes)) if axis not in (*kc, *kb)]
    input_free = [axis for axis in range(len(shape)) if axis not in (*xc, *xb)]
    rows = {axis: ("row", ((float(axis), shape[axis]),)) for axis in input_free}
    inputs: list[Any] = [rows.get(axis) for axis in range(len(shape))]
    batched = []
    for axis, other in zip(kb, xb, strict=True):
        pieces = view.axes[axis]
        repeated = not pieces or all(stride == 0 for stride, _ in pieces)
        if not repeated and any(stride == 0 for stride, _ in pieces):
            return None
        inputs[other] = ("row", ((float(other), shape[other]),)) if repeated else ("stack", pieces)
        batched.append(inputs[other])
    for axis, other in zip(kc, xc, strict=True):
        inputs[other] = ("feature", view.axes[axis])
    free = [
        [rows[axis] for axis in input_free],
        [("feature", view.axes[axis]) for axis in kernel_free],
    ]
    outputs = [*batched, *(free[0] + free[1] if side == 1 else free[1] + free[0])]
    return _found(
        walk, "dense", view, (eqn.invars[1 - side],), inputs, outputs, marks[1 - side].batch
    )


def _dense_windows(eqn, mark, view, first, side):
    """The part of input and output that belongs to one of several concatenated kernels."""
    if len(mark.leaves) == 1:
        return (None, None)
    contracting, together = eqn.params["dimension_numbers"]
    joined, size = mark.joined, view.shape[mark.joined]
    if joined in contracting[side]:
        return ((contracting[1 - side][contracting[side].index(joined)], first, size), None)
    if joined in together[side]:
        return None
    before = sum(axis not in (*contracting[side], *together[side]) for axis in range(joined))
    axis = len(together[side]) + before
    if side == 1:
        axis += len(shape_of(eqn.invars[0])) - len(contracting[0]) - len(together[0])
    return (None, (axis, first, size))


def convolution(walk, eqn, marks):
    """A convolution: its input is the patch under the kernel, one kernel a group."""
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    if _kernel_side(marks) != 1 or len(marks[1].leaves) != 1 or params["batch_group_count"] != 1:
        return None
    view, groups = marks[1].leaves[0], params["feature_group_count"]
    channels = view.axes[spec.rhs_spec[0]]
    grouped = layouts.regroup(channels, (groups, size_of(channels) // groups))
    if grouped is None or not is_plain(view):
        return None
    out = shape_of(eqn.outvars[0])
    spatial = [view.axes[axis] for axis in spec.rhs_spec[2:]]
    patch = [
        ("stack", grouped[0]),
        ("feature", view.axes[spec.rhs_spec[1]]),
        *(("feature", axis) for axis in spatial),
    ]
    inputs, outputs = [], []
    for axis, size in enumerate(out):
        row = [("row", ((float(axis), size),))]
        inputs += patch if axis == spec.out_spec[1] else row
        outputs += (
            [("stack", grouped[0]), ("feature", grouped[1])] if axis == spec.out_spec[1] else row
        )
    batch = marks[0].batch
    if batch is not None and batch.axis is not None:
        batch = (
            batch._replace(axis=spec.out_spec[0])
            if batch.axis == spec.lhs_spec[0]
            else batch._replace(axis=None)
        )
    found = _found(walk, "conv", view, (eqn.invars[0],), inputs, outputs, batch)
    found.conv = (
        tuple(shape_of(eqn.invars[1])[axis] for axis in spec.rhs_spec[2:]),
        *(
            tuple(params[name])
            for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        ),
        spec,
    )
    return [Mark(output=walk.add_uses([_own_stack(found)], eqn))]


def gather(walk, eqn, marks):
    """An embedding: rows of a table picked by number."""
    numbers, ids = eqn.params["dimension_numbers"], eqn.invars[1]
    if (
        len(marks[0].leaves) != 1
        or not is_plain(marks[0].leaves[0])
        or len(numbers.start_index_map) != 1
    ):
        return None
    view, axis = marks[0].leaves[0], numbers.start_index_map[0]
    stacked = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    gone = (axis, *stacked.values())
    sizes = [1 if k in gone else size for k, size in enumerate(view.shape)]
    table = layouts.merged(view.axes[axis])
    if list(eqn.params["slice_sizes"]) != sizes or tuple(numbers.collapsed_slice_dims) != (axis,):
        return None
    if len(table) != 1 or table[0][0] < 0:
        return None
    inputs = [
        ("stack", view.axes[stacked[k]]) if k in stacked else ("row", ((float(k), size),))
        for k, size in enumerate(shape_of(ids)[:-1])
    ]
    picked, offsets = (
        iter(inputs),
        iter(pieces for k, pieces in enumerate(view.axes) if k not in gone),
    )
    outputs = [
        ("feature", next(offsets)) if k in numbers.offset_dims else next(picked)
        for k in range(len(shape_of(eqn.outvars[0])))
    ]
    found = _found(walk, "embedding", view, (ids,), inputs, outputs, marks[1].batch)
    found.inputs = table
    return [Mark(output=walk.add_uses([found], eqn))]


def multiply(walk, eqn, marks):
    """A scale where a leaf meets the examples; before that, coefficients of the leaf."""
    side = 0 if marks[0].leaves else 1
    if marks[1 - side].leaves or marks[1 - side].derived or len(marks[side].leaves) != 1:
        return None
    view, other = _spread(marks[side].leaves[0], eqn), eqn.invars[1 - side]
    if is_literal(other) and math.prod(shape_of(other)) == 1:
        return [Mark(leaves=(view._replace(gain=view.gain * float(other.val)),))]
    if marks[1 - side].batch is None:
        return [Mark(leaves=(view._replace(coefficients=(*view.coefficients, other)),))]
    walk.add_uses([_elementwise_use(walk, marks, view, "scale", (other, *view.coefficients))], eqn)
    return [Mark()]


def divide(walk, eqn, marks):
    """A leaf divided by a number."""
    if len(marks[0].leaves) != 1 or not is_literal(eqn.invars[1]):
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
    """A bias where a leaf meets its layer's output, a shift where it meets others that depend on the examples."""
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
    group = (
        walk.groups[other.output.source] if other.output and walk.once(eqn.invars[1 - side]) else []
    )
    if len(group) == 1 and not subtracted and not view.coefficients and view.gain == 1.0:
        seen = _spread(other.output, eqn)
        found.partner = group[0] if walk.is_bias(group[0], seen, found) else None
    walk.add_uses([found], eqn)
    return [Mark()]


def select(walk, eqn, marks):
    """A shift where a leaf takes the place of activations, as the token of a masked autoencoder."""
    cases = [number for number, mark in enumerate(marks[1:]) if mark.leaves]
    if (
        len(cases) != 1
        or len(marks[1 + cases[0]].leaves) > 1
        or all(mark.batch is None for mark in marks)
    ):
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
    """The view in the shape of an element-wise result; a scalar has no axes to keep."""
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
    return _found(walk, kind, view, operands, (), segments, known_batch(marks))


def _found(walk, kind, view, operands, inputs, outputs, batch):
    """A use whose input and output have these segments."""

    def of(role, segments):
        return tuple(piece for own, pieces in segments if own == role for piece in pieces)

    return Found(
        kind=kind,
        view=view,
        operands=tuple(operands),
        stack=of("stack", outputs),
        inputs=of("feature", inputs),
        outputs=of("feature", outputs),
        input_segments=tuple(inputs),
        output_segments=tuple(outputs),
        examples=walk.examples(batch, outputs),
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
    """A shift of a part: a leaf repeated for every example and put beside its activations, as a class token."""
    view, axis = marks[place].leaves[0], eqn.params["dimension"]
    if len(marks[place].leaves) > 1 or view.coefficients:
        return None
    found = _elementwise_use(walk, marks, view, "shift", ())
    first = sum(shape_of(variable)[axis] for variable in eqn.invars[:place])
    found.windows = (None, (axis, first, view.shape[axis]))
    walk.add_uses([found], eqn)
    return [Mark()]
