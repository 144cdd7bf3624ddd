"""Layers with a kernel: matrix products, convolutions, embeddings. Rules as in `views`."""

from typing import Any

from optax_curv.capture import layouts
from optax_curv.capture.jaxpr import shape_of
from optax_curv.capture.layouts import size_of
from optax_curv.capture.marks import Found, Mark
from optax_curv.capture.views import is_plain


def _kernel_side(marks):
    """Which operand is the kernel, or None."""
    sides = [side for side, mark in enumerate(marks[:2]) if mark.leaves]
    if len(sides) != 1 or marks[1 - sides[0]].derived:
        return None
    return None if any(view.coefficients for view in marks[sides[0]].leaves) else sides[0]


def _own_stack(found: Found) -> Found:
    """Takes free axes on the far side of the inputs as a stack: [members, in, out] is not [in, members, out].

    So lies the first kernel of a vmapped ensemble, whose input is the same for all members.
    """
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
    """The use with those axes as outputs, as another use of the kernel has them."""
    segments = [("feature" if set(pieces) & set(found.far) else role, pieces) for role, pieces in found.output_segments]
    found.output_segments, found.outputs = tuple(segments), (*found.far, *found.outputs)
    found.stack, found.far = tuple(piece for piece in found.stack if piece not in found.far), ()
    return found


def dot_general(walk, eqn, marks):
    """A dense layer: contracted kernel axes are inputs, free ones outputs, batched ones a stack of kernels."""
    side = _kernel_side(marks)
    if side is None:
        return None
    contracting, together = eqn.params["dimension_numbers"]
    shape = shape_of(eqn.invars[1 - side])
    groups, first = [], 0
    for view in marks[side].leaves:
        found = _dense_use(walk, eqn, marks, side, view, shape, contracting, together)
        if found is None:
            return None
        windows = _dense_windows(eqn, marks[side], view, first, side, contracting, together)
        if windows is None:
            return None
        found.windows = windows
        first += view.shape[marks[side].joined]
        groups.append(_own_stack(found))
    return [Mark(output=walk.add_uses(groups, eqn))]


def _dense_use(walk, eqn, marks, side, view, shape, contracting, together):
    kc, xc, kb, xb = contracting[side], contracting[1 - side], together[side], together[1 - side]
    if any(stride == 0 for axis, pieces in enumerate(view.axes) if axis not in kb for stride, _ in pieces):
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
    free = [[rows[axis] for axis in input_free], [("feature", view.axes[axis]) for axis in kernel_free]]
    outputs = [*batched, *(free[0] + free[1] if side == 1 else free[1] + free[0])]
    return Found(
        kind="dense",
        view=view,
        operands=(eqn.invars[1 - side],),
        stack=tuple(piece for role, pieces in batched if role == "stack" for piece in pieces),
        inputs=tuple(piece for axis in kc for piece in view.axes[axis]),
        outputs=tuple(piece for axis in kernel_free for piece in view.axes[axis]),
        input_segments=tuple(inputs),
        output_segments=tuple(outputs),
        examples=walk.examples(marks[1 - side].batch, outputs),
    )


def _dense_windows(eqn, mark, view, first, side, contracting, together):
    """The part of input and output that belongs to one of several concatenated kernels."""
    if len(mark.leaves) == 1:
        return (None, None)
    size = view.shape[mark.joined]
    if mark.joined in contracting[side]:
        return ((contracting[1 - side][contracting[side].index(mark.joined)], first, size), None)
    if mark.joined in together[side]:
        return None
    free = [axis for axis in range(len(view.axes)) if axis not in (*contracting[side], *together[side])]
    axis = len(together[side]) + free.index(mark.joined)
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
    patch = [("stack", grouped[0]), ("feature", view.axes[spec.rhs_spec[1]]), *(("feature", axis) for axis in spatial)]
    inputs, outputs = [], []
    for axis, size in enumerate(out):
        row = [("row", ((float(axis), size),))]
        inputs += patch if axis == spec.out_spec[1] else row
        outputs += [("stack", grouped[0]), ("feature", grouped[1])] if axis == spec.out_spec[1] else row
    batch = marks[0].batch
    if batch is not None and batch.axis is not None:
        batch = batch._replace(axis=spec.out_spec[0]) if batch.axis == spec.lhs_spec[0] else batch._replace(axis=None)
    found = Found(
        kind="conv",
        view=view,
        operands=(eqn.invars[0],),
        stack=grouped[0],
        inputs=tuple(piece for _, pieces in patch[1:] for piece in pieces),
        outputs=grouped[1],
        input_segments=tuple(inputs),
        output_segments=tuple(outputs),
        examples=walk.examples(batch, outputs),
        conv=(
            tuple(shape_of(eqn.invars[1])[axis] for axis in spec.rhs_spec[2:]),
            tuple(params["window_strides"]),
            tuple(params["padding"]),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            spec,
        ),
    )
    return [Mark(output=walk.add_uses([_own_stack(found)], eqn))]


def gather(walk, eqn, marks):
    """An embedding: rows of a table picked by number."""
    numbers, ids = eqn.params["dimension_numbers"], eqn.invars[1]
    if len(marks[0].leaves) != 1 or not is_plain(marks[0].leaves[0]) or len(numbers.start_index_map) != 1:
        return None
    view, axis = marks[0].leaves[0], numbers.start_index_map[0]
    stacked = tuple(numbers.operand_batching_dims)
    sizes = [1 if k in (axis, *stacked) else size for k, size in enumerate(view.shape)]
    table = layouts.merged(view.axes[axis])
    if list(eqn.params["slice_sizes"]) != sizes or tuple(numbers.collapsed_slice_dims) != (axis,):
        return None
    if len(table) != 1 or table[0][0] < 0:
        return None
    shape, out = shape_of(ids)[:-1], shape_of(eqn.outvars[0])
    kept = [k for k in range(len(view.axes)) if k not in (axis, *stacked)]
    picked = iter(range(len(shape)))
    inputs = []
    for k, size in enumerate(shape):
        if k in numbers.start_indices_batching_dims:
            inputs.append(("stack", view.axes[stacked[numbers.start_indices_batching_dims.index(k)]]))
        else:
            inputs.append(("row", ((float(k), size),)))
    offsets = iter(kept)
    outputs = [
        ("feature", view.axes[next(offsets)]) if k in numbers.offset_dims else inputs[next(picked)]
        for k in range(len(out))
    ]
    found = Found(
        kind="embedding",
        view=view,
        operands=(ids,),
        stack=tuple(piece for role, pieces in inputs if role == "stack" for piece in pieces),
        inputs=table,
        outputs=tuple(piece for k in kept for piece in view.axes[k]),
        input_segments=tuple(inputs),
        output_segments=tuple(outputs),
        examples=walk.examples(marks[1].batch, outputs),
    )
    return [Mark(output=walk.add_uses([found], eqn))]
