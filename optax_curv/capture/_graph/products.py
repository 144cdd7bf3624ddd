"""Uses of a leaf as a kernel: in matrix products, convolutions, and look-ups of rows."""

import dataclasses
from typing import Any

from optax_curv.capture._graph import views
from optax_curv.capture._graph.jaxpr import convolution as convolution_of
from optax_curv.capture._graph.jaxpr import look_up, product, shape_of
from optax_curv.capture._graph.marks import Batch, Found, Mark, Place, Segments, is_activation
from optax_curv.capture._graph.views import Piece, View, size_of

Segment = tuple[str, tuple[Piece, ...]]


def _kernel_side(marks: list[Mark]) -> int | None:
    """The operand that is the kernel, or None."""
    sides = [side for side, mark in enumerate(marks[:2]) if mark.leaves]
    if len(sides) != 1:
        return None
    other = marks[1 - sides[0]]
    return None if other.derived and not is_activation(other) else sides[0]


def _made(view: View, variable: Any) -> Any:
    """The kernel as it meets its input, if it is more than a number times the leaf."""
    return variable if view.made or any(map(shape_of, view.coefficients)) else None


def _row(axis: int, size: int) -> Segment:
    return ("row", ((float(axis), size),))


def _with_own_stack(use: Found) -> Found:
    """Takes free axes beyond the inputs as a stack, as in [members, in, out] of an ensemble."""
    inputs = [abs(stride) for stride, _ in use.inputs]
    outputs = [abs(stride) for stride, _ in use.outputs]
    if not inputs or not outputs or not min(outputs) < min(inputs) <= max(inputs) < max(outputs):
        return use
    far = tuple(piece for piece in use.outputs if abs(piece[0]) > max(inputs))
    segments: list[Segment] = []
    for role, pieces in use.output_segments:
        parts = [("stack" if piece in far else role, (piece,)) for piece in pieces]
        segments += parts if role == "feature" else [(role, pieces)]
    return dataclasses.replace(
        use,
        output_segments=tuple(segments),
        stack=(*use.stack, *far),
        outputs=tuple(piece for piece in use.outputs if piece not in far),
        far=far,
    )


def without_own_stack(use: Found) -> Found:
    """The use with the axes that `far` names as outputs again, where they make no stack."""
    segments = [
        ("feature" if set(pieces) & set(use.far) else role, pieces)
        for role, pieces in use.output_segments
    ]
    return dataclasses.replace(
        use,
        output_segments=tuple(segments),
        stack=tuple(piece for piece in use.stack if piece not in use.far),
        outputs=(*use.far, *use.outputs),
        far=(),
    )


def dot_general(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """A dense layer: contracted kernel axes are inputs, free ones outputs, batched ones a stack."""
    side = _kernel_side(marks)
    if side is None:
        return None
    group, first = [], 0
    for view in marks[side].leaves:
        use = _dense_use(place, eqn, marks, side, view)
        windows = _dense_windows(eqn, marks[side], view, first, side)
        if use is None or windows is None:
            return None
        first += view.shape[marks[side].joined]
        group.append(_with_own_stack(dataclasses.replace(use, windows=windows)))
    return [Mark(output=place.add(group))]


def _dense_use(place: Place, eqn, marks: list[Mark], side: int, view: View) -> Found | None:
    numbers, other = product(eqn), 1 - side
    shape, batched = (
        shape_of(eqn.invars[other]),
        dict(zip(numbers.batched[side], numbers.batched[other], strict=True)),
    )
    strides = {axis: [stride for stride, _ in pieces] for axis, pieces in enumerate(view.axes)}
    if any(0 in own for axis, own in strides.items() if axis not in batched):
        return None
    free = {axis: _row(axis, shape[axis]) for axis in numbers.free(other, len(shape))}
    inputs: dict[int, Segment] = dict(free)
    for axis, there in batched.items():
        repeated = not any(strides[axis])
        if not repeated and 0 in strides[axis]:
            return None
        inputs[there] = _row(there, shape[there]) if repeated else ("stack", view.axes[axis])
    for axis, there in zip(*_sides(numbers.contracted, side), strict=True):
        inputs[there] = ("feature", view.axes[axis])
    rows = list(free.values())
    features = [("feature", view.axes[axis]) for axis in numbers.free(side, len(view.axes))]
    outputs = [*(inputs[there] for there in batched.values())]
    outputs += rows + features if side == 1 else features + rows
    ordered = [inputs[axis] for axis in range(len(shape))]
    use = use_of(place, "dense", view, (eqn.invars[other],), ordered, outputs, marks[other].batch)
    return _scaled(use, eqn.invars[side])


def _scaled(use: Found, kernel: Any) -> Found:
    """The use with what multiplies its leaf: numbers, which scale the input, or a made kernel."""
    made = _made(use.view, kernel)
    if made is not None:
        return dataclasses.replace(use, made=made)
    operands = (*use.operands, *use.view.coefficients, *use.view.divisors)
    return dataclasses.replace(use, operands=operands, divisors=len(use.view.divisors))


def _sides(pair: tuple, side: int) -> tuple:
    """A pair (left, right) of axes as those of the kernel and those of its input."""
    return pair[side], pair[1 - side]


def _dense_windows(eqn, mark: Mark, view: View, first: int, side: int) -> tuple | None:
    """The part of input and output that belongs to one of several concatenated kernels."""
    if len(mark.leaves) == 1:
        return (None, None)
    numbers, joined, size = product(eqn), mark.joined, view.shape[mark.joined]
    contracted, inputs = _sides(numbers.contracted, side)
    if joined in contracted:
        return ((inputs[contracted.index(joined)], first, size), None)
    if joined in numbers.batched[side]:
        return None
    axis = len(numbers.batched[side]) + numbers.free(side, len(view.axes)).index(joined)
    if side == 1:
        axis += len(numbers.free(0, len(shape_of(eqn.invars[0]))))
    return (None, (axis, first, size))


def convolution(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """A convolution: its input is the patch under the kernel, one kernel a group."""
    numbers = convolution_of(eqn)
    if _kernel_side(marks) != 1 or len(marks[1].leaves) != 1 or numbers.batch_groups != 1:
        return None
    view, groups = marks[1].leaves[0], numbers.feature_groups
    channels = view.axes[numbers.kernel_spec[0]]
    grouped = views.regroup(channels, (groups, size_of(channels) // groups))
    if grouped is None or not views.has_each_once(view):
        return None
    spatial = numbers.kernel_spec[2:]
    patch = [("stack", grouped[0]), ("feature", view.axes[numbers.kernel_spec[1]])]
    patch += [("feature", view.axes[axis]) for axis in spatial]
    inputs, outputs = [], []
    for axis, size in enumerate(shape_of(eqn.outvars[0])):
        if axis == numbers.output_spec[1]:
            inputs += patch
            outputs += [("stack", grouped[0]), ("feature", grouped[1])]
        else:
            inputs.append(_row(axis, size))
            outputs.append(_row(axis, size))
    batch = marks[0].batch
    if batch is not None and batch.axis is not None:
        kept = batch.axis == numbers.input_spec[0]
        batch = batch._replace(axis=numbers.output_spec[0] if kept else None)
    use = use_of(place, "conv", view, (eqn.invars[0],), inputs, outputs, batch)
    window = tuple(shape_of(eqn.invars[1])[axis] for axis in spatial)
    conv = (window, *numbers.geometry, numbers.numbers)
    use = dataclasses.replace(_scaled(use, eqn.invars[1]), conv=conv)
    return [Mark(output=place.add([_with_own_stack(use)]))]


def gather(place: Place, eqn, marks: list[Mark]) -> list[Mark] | None:
    """An embedding: rows of a table picked by number."""
    numbers, ids = look_up(eqn), eqn.invars[1]
    if len(marks[0].leaves) != 1 or not views.has_each_once(marks[0].leaves[0]):
        return None
    view = marks[0].leaves[0]
    partial = [k for k in numbers.start_index_map if numbers.sizes[k] != view.shape[k]]
    (axis,) = partial if len(partial) == 1 else numbers.start_index_map[:1]
    clipped = numbers.clips or len(numbers.start_index_map) == 1
    if len(partial) > 1 or not clipped:  # an axis taken whole must not be moved outside
        return None
    stacked = dict(zip(numbers.indices_batching, numbers.operand_batching, strict=True))
    gone = (axis, *stacked.values())
    sizes = tuple(1 if k in gone else size for k, size in enumerate(view.shape))
    table = views.merged(view.axes[axis])
    if numbers.sizes != sizes or numbers.collapsed not in ((axis,), ()):
        return None
    if len(table) != 1 or table[0][0] < 0:
        return None
    inputs = [
        ("stack", view.axes[stacked[k]]) if k in stacked else _row(k, size)
        for k, size in enumerate(shape_of(ids)[:-1])
    ]
    picked = iter(inputs)
    taken = (*numbers.collapsed, *numbers.operand_batching)
    offsets = iter(
        [() if k == axis else axes for k, axes in enumerate(view.axes) if k not in taken]
    )
    outputs = [
        ("feature", next(offsets)) if k in numbers.offset_dims else next(picked)
        for k in range(len(shape_of(eqn.outvars[0])))
    ]
    use = use_of(place, "embedding", view, (ids,), inputs, outputs, marks[1].batch)
    column = numbers.start_index_map.index(axis)
    plain = views.is_plain(view) and view.gain == 1.0
    made = None if plain else eqn.invars[0]  # row numbers cannot be multiplied
    use = dataclasses.replace(use, inputs=table, clips=numbers.clips, column=column, made=made)
    return [Mark(output=place.add([use]))]


def one_row(place: Place, eqn, marks: list[Mark], axis: int) -> list[Mark] | None:
    """An embedding of which each step of a scan over examples picks one row along an axis."""
    view, index = marks[0].leaves[0], eqn.invars[1 + axis]
    table = views.merged(view.axes[axis])
    if len(table) != 1 or table[0][0] < 0 or not views.has_each_once(view):
        return None
    outputs = [("feature", () if k == axis else axes) for k, axes in enumerate(view.axes)]
    use = use_of(place, "embedding", view, (index,), (), outputs, marks[1 + axis].batch)
    plain = views.is_plain(view) and view.gain == 1.0
    made = None if plain else eqn.invars[0]
    use = dataclasses.replace(use, inputs=table, clips=True, column=None, made=made)
    return [Mark(output=place.add([use]))]


def use_of(
    place: Place, kind: str, view: View, operands, inputs, outputs, batch: Batch | None
) -> Found:
    """The use of a leaf whose input and output have these segments."""

    def of(role: str, segments: Segments) -> tuple[Piece, ...]:
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
        examples=place.examples(batch, outputs),
    )
