"""Where the examples of the batch lie in every array of a loss.

Statistics of single examples (a scale's gradient, "reduce" sharing) must know which rows belong to one example. So the
leading axis of the inputs is followed through the equations, by a rule for each primitive that moves axes. Any other
keeps an axis that keeps its place and size; else all that is known is that the array depends on the examples.
"""

import math

from optax_curv.capture.jaxpr import shape_of
from optax_curv.capture.marks import Batch

LOST, UNKNOWN = Batch(None), Batch(None, 0)


def propagate(eqn, batches: list[Batch | None], batch: int) -> list[Batch | None]:
    """Where `batch` examples lie in each result of an equation; None: the same for, or summed over, all examples."""
    shapes, outs = ([shape_of(v) for v in variables] for variables in (eqn.invars, eqn.outvars))
    given = [(b, s) for b, s in zip(batches, shapes, strict=True) if b is not None]
    if not given:
        return [None] * len(outs)
    name = eqn.primitive.name
    if all(b.axis is None for b, _ in given):
        return [LOST if any(b == LOST for b, _ in given) else min(given, key=lambda x: x[0].inner == 0)[0]] * len(outs)
    if name in MOVES:
        return [MOVES[name](eqn.params, batches, shapes, outs[0], batch)] * len(outs)
    if (name.startswith("reduce_") and "axes" in eqn.params) or name in ("argmax", "argmin"):
        return [_reduce(eqn.params["axes"], given[0][0])] * len(outs)
    return [_same_place(given, out) for out in outs]


def _same_place(given, out):
    """The axis of the first operand whose axis keeps its place and size; else, for linear algebra, its leading axes."""
    placed = [(b, shape) for b, shape in given if b.axis is not None]
    for b, shape in placed:
        if len(out) == len(shape) and out[b.axis] == shape[b.axis]:
            return b
    for b, shape in placed:
        if len(out) > b.axis and out[: b.axis + 1] == shape[: b.axis + 1]:
            return b
    return LOST


def _without(axes, b):
    return Batch(b.axis - sum(axis < b.axis for axis in axes), b.inner)


def _reduce(axes, b):
    return LOST if b.axis is None else None if b.axis in axes else _without(axes, b)


def _reshape(params, batches, shapes, out, batch):
    b, shape = batches[0], shapes[0]
    if b.axis is None:
        return LOST
    if params.get("dimensions") is not None:
        b, shape = b._replace(axis=params["dimensions"].index(b.axis)), [shape[k] for k in params["dimensions"]]
    inner = b.inner * math.prod(shape[b.axis + 1 :])
    for axis, size in enumerate(out):
        after = math.prod(out[axis + 1 :])
        if inner % after == 0 and (size * after) % (inner * batch) == 0:
            return Batch(axis, inner // after)
    return LOST


def _transpose(params, batches, shapes, out, batch):
    b = batches[0]
    return LOST if b.axis is None else Batch(params["permutation"].index(b.axis), b.inner)


def _broadcast(params, batches, shapes, out, batch):
    b = batches[0]
    if b is None or b.axis is None:
        return b
    return Batch(params["broadcast_dimensions"][b.axis], b.inner)


def _squeeze(params, batches, shapes, out, batch):
    b = batches[0]
    if b is None or b.axis is None or b.axis in params["dimensions"]:
        return b and LOST
    return _without(params["dimensions"], b)


def _stack(params, batches, shapes, out, batch):
    b = next(b for b in batches if b is not None and b.axis is not None)
    return Batch(b.axis + (b.axis >= params["axis"]), b.inner)


def _unstack(params, batches, shapes, out, batch):
    b = batches[0]
    return LOST if b.axis == params["axis"] else _without((params["axis"],), b)


def _whole_batches(b, axis, sizes, batch):
    """Where the examples lie in parts of these sizes along an axis."""
    whole = b.axis != axis or all(size % (batch * b.inner) == 0 for size in sizes)
    return b if b.axis is not None and whole else LOST


def _concatenate(params, batches, shapes, out, batch):
    axis, known = params["dimension"], {b for b in batches if b is not None}
    beside = next((b for b in known if b.axis is not None and b.axis != axis), None)
    if beside is not None or len(known) > 1 or None in batches:
        return beside or LOST
    return _whole_batches(batches[0], axis, [shape[axis] for shape in shapes], batch)


def _split(params, batches, shapes, out, batch):
    return _whole_batches(batches[0], params["axis"], params["sizes"], batch)


def _slice(params, batches, shapes, out, batch):
    b, axis = batches[0], batches[0].axis
    if axis is None or out[axis] == shapes[0][axis]:
        return b
    if params["strides"] is not None and params["strides"][axis] != 1:
        return LOST
    return _whole_batches(b, axis, (params["start_indices"][axis], params["limit_indices"][axis]), batch)


def _dot_general(params, batches, shapes, out, batch):
    contracting, together = params["dimension_numbers"]
    before, found = [], None
    for b, shape, summed, own in zip(batches, shapes, contracting, together, strict=True):
        axes = [*own, *before, *(axis for axis in range(len(shape)) if axis not in (*summed, *own))]
        if b is not None and b.axis in axes:
            return Batch(axes.index(b.axis), b.inner)
        if b is not None and b.axis is None:
            found = LOST
        before = [-1] * (len(axes) - len(own))
    return found


def _convolution(params, batches, shapes, out, batch):
    spec, b = params["dimension_numbers"], batches[0]
    if b is None or b.axis != spec.lhs_spec[0]:
        return b and LOST
    return Batch(spec.out_spec[0], b.inner)


def _gather(params, batches, shapes, out, batch):
    numbers = params["dimension_numbers"]
    rows = [axis for axis in range(len(out)) if axis not in numbers.offset_dims]
    b, ids = batches
    if ids is not None:
        return Batch(rows[ids.axis], ids.inner) if ids.axis is not None and ids.axis < len(rows) else LOST
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(shapes[0])) if axis not in gone]
    if b.axis in kept and params["slice_sizes"][b.axis] == shapes[0][b.axis]:
        return Batch(numbers.offset_dims[kept.index(b.axis)], b.inner)
    return LOST


MOVES = {
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "tile": lambda params, batches, *_: batches[0],
    "stack": _stack,
    "unstack": _unstack,
    "concatenate": _concatenate,
    "split": _split,
    "slice": _slice,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
