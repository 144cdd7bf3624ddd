"""Where the examples of the batch lie in each variable: a rule for each primitive that moves axes.

Statistics of single examples (a scale's gradient, "reduce" sharing) must know which rows belong to
one example. So the leading axis of the inputs is followed through the equations: by a rule for each
primitive that moves axes, and elsewhere if it keeps its place and size.

A rule takes the equation, the places of the examples in its operands, and their number; it returns
their place in the result. None stands for arrays that all examples share, or that are sums over
them.
"""

import math

from optax_curv.capture._graph.jaxpr import (
    axes_of,
    axis_of,
    broadcast,
    convolution,
    look_up,
    permutation,
    pieces_of,
    product,
    reduced,
    reshaped,
    shape_of,
    sliced,
)
from optax_curv.capture._graph.marks import LOST, Batch

Batches = list[Batch | None]


def propagate(eqn, batches: Batches, batch: int) -> Batches:
    """Where `batch` examples lie in each result of an equation."""
    count = len(eqn.outvars)
    given = [(b, shape_of(v)) for b, v in zip(batches, eqn.invars, strict=True) if b is not None]
    if not given:
        return [None] * count
    if all(b.axis is None for b, _ in given):
        lost = any(b == LOST for b, _ in given)
        return [LOST if lost else min(given, key=lambda x: x[0].inner == 0)[0]] * count
    if eqn.primitive.name in RULES:
        return [RULES[eqn.primitive.name](eqn, batches, batch)] * count
    axes = reduced(eqn)
    if axes is not None:
        return [_reduce(axes, given[0][0])] * count
    return [_same_place(given, shape_of(out)) for out in eqn.outvars]


def _same_place(given, out) -> Batch:
    """The axis of the first operand that keeps place and size; for linear algebra a leading one."""
    placed = [(b, shape) for b, shape in given if b.axis is not None]
    for b, shape in placed:
        if len(out) == len(shape) and out[b.axis] == shape[b.axis]:
            return b
    for b, shape in placed:
        if len(out) > b.axis and out[: b.axis + 1] == shape[: b.axis + 1]:
            return b
    return LOST


def _without(axes, b: Batch) -> Batch:
    """The place after some other axes went."""
    return Batch(b.axis - sum(axis < b.axis for axis in axes), b.inner)


def _reduce(axes, b: Batch) -> Batch | None:
    if b.axis is None:
        return LOST
    return None if b.axis in axes else _without(axes, b)


def _reshape(eqn, batches: Batches, batch: int) -> Batch:
    b, shape, (out, order) = batches[0], shape_of(eqn.invars[0]), reshaped(eqn)
    if b is None or b.axis is None:
        return LOST
    if order is not None:
        b, shape = b._replace(axis=order.index(b.axis)), tuple(shape[k] for k in order)
    inner = b.inner * math.prod(shape[b.axis + 1 :])
    for axis, size in enumerate(out):
        after = math.prod(out[axis + 1 :])
        if inner % after == 0 and (size * after) % (inner * batch) == 0:
            return Batch(axis, inner // after)
    return LOST


def _transpose(eqn, batches: Batches, batch: int) -> Batch:
    b = batches[0]
    if b is None or b.axis is None:
        return LOST
    return Batch(permutation(eqn).index(b.axis), b.inner)


def _broadcast(eqn, batches: Batches, batch: int) -> Batch | None:
    b = batches[0]
    if b is None or b.axis is None:
        return b
    return Batch(broadcast(eqn).dimensions[b.axis], b.inner)


def _squeeze(eqn, batches: Batches, batch: int) -> Batch | None:
    b, axes = batches[0], axes_of(eqn)
    if b is None or b.axis is None or b.axis in axes:
        return b and LOST
    return _without(axes, b)


def _tile(eqn, batches: Batches, batch: int) -> Batch | None:
    return batches[0]


def _stack(eqn, batches: Batches, batch: int) -> Batch:
    b = next(b for b in batches if b is not None and b.axis is not None)
    return Batch(b.axis + (b.axis >= axis_of(eqn)), b.inner)


def _unstack(eqn, batches: Batches, batch: int) -> Batch:
    b, axis = batches[0], axis_of(eqn)
    return LOST if b is None or b.axis in (None, axis) else _without((axis,), b)


def _whole_batches(b: Batch, axis: int, sizes, batch: int) -> Batch:
    """The place of the examples in parts of these sizes along an axis."""
    whole = b.axis != axis or all(size % (batch * b.inner) == 0 for size in sizes)
    return b if b.axis is not None and whole else LOST


def _concatenate(eqn, batches: Batches, batch: int) -> Batch:
    axis, known = axis_of(eqn), {b for b in batches if b is not None}
    beside = next((b for b in known if b.axis is not None and b.axis != axis), None)
    if beside is not None or len(known) > 1 or batches[0] is None or None in batches:
        return beside or LOST
    return _whole_batches(batches[0], axis, [shape_of(v)[axis] for v in eqn.invars], batch)


def _split(eqn, batches: Batches, batch: int) -> Batch:
    return _whole_batches(batches[0] or LOST, axis_of(eqn), pieces_of(eqn), batch)


def _slice(eqn, batches: Batches, batch: int) -> Batch | None:
    b, taken = batches[0], sliced(eqn)
    if b is None or b.axis is None:
        return b
    if shape_of(eqn.outvars[0])[b.axis] == shape_of(eqn.invars[0])[b.axis]:
        return b
    if taken.steps[b.axis] != 1:
        return LOST
    return _whole_batches(b, b.axis, (taken.starts[b.axis], taken.limits[b.axis]), batch)


def _dot_general(eqn, batches: Batches, batch: int) -> Batch | None:
    numbers, before, found = product(eqn), [], None
    for side, (b, variable) in enumerate(zip(batches, eqn.invars, strict=True)):
        own = numbers.batched[side]
        axes = [*own, *before, *numbers.free(side, len(shape_of(variable)))]
        if b is not None and b.axis in axes:
            return Batch(axes.index(b.axis), b.inner)
        if b is not None and b.axis is None:
            found = LOST
        before = [-1] * (len(axes) - len(own))
    return found


def _convolution(eqn, batches: Batches, batch: int) -> Batch | None:
    b, numbers = batches[0], convolution(eqn)
    if b is None or b.axis != numbers.input_spec[0]:
        return b and LOST
    return Batch(numbers.output_spec[0], b.inner)


def _gather(eqn, batches: Batches, batch: int) -> Batch:
    numbers, rank = look_up(eqn), len(shape_of(eqn.outvars[0]))
    rows = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    b, ids = batches
    if ids is not None:
        if ids.axis is None or ids.axis >= len(rows):
            return LOST
        return Batch(rows[ids.axis], ids.inner)
    shape = shape_of(eqn.invars[0])
    gone = (*numbers.collapsed, *numbers.operand_batching)
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    if b is not None and b.axis in kept and numbers.sizes[b.axis] == shape[b.axis]:
        return Batch(numbers.offset_dims[kept.index(b.axis)], b.inner)
    return LOST


RULES = {
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "tile": _tile,
    "stack": _stack,
    "unstack": _unstack,
    "concatenate": _concatenate,
    "split": _split,
    "slice": _slice,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
