"""Where the examples of the batch lie in every array of a loss.

The leading axis of the inputs is followed through the equations, because statistics of single examples (a scale's
gradient, "reduce" sharing) must know which rows belong to one example. A rule for each primitive that moves axes; any
other keeps an axis that keeps its place and size, and else remembers only that the array depends on the examples.
"""

import math

from optax_curv.capture.marks import Batch

LOST, UNKNOWN = Batch(None), Batch(None, 0)


def propagate(eqn, batches: list[Batch | None], shapes: list[tuple[int, ...]], batch: int) -> list[Batch | None]:
    """Where the examples lie in each result of an equation.

    Args:
      eqn: the equation.
      batches: where they lie in its operands.
      shapes: the operands' shapes.
      batch: number of examples.

    Returns:
      One entry for each result; None for a result that is the same for, or summed over, all examples.
    """
    outs = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
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
    """The axis of the first operand whose axis keeps its place and size; else one that only later axes lie behind."""
    # The latter is for linear algebra, whose matrices lie on the last axes.
    placed = [(b, shape) for b, shape in given if b.axis is not None]
    for b, shape in placed:
        if len(out) == len(shape) and out[b.axis] == shape[b.axis]:
            return b
    for b, shape in placed:
        if len(out) > b.axis and out[: b.axis + 1] == shape[: b.axis + 1]:
            return b
    return LOST


def _reduce(axes, b):
    if b.axis is None:
        return LOST
    if b.axis in axes:
        return None
    return Batch(b.axis - sum(axis < b.axis for axis in axes), b.inner)


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
    return Batch(b.axis - sum(axis < b.axis for axis in params["dimensions"]), b.inner)


def _stack(params, batches, shapes, out, batch):
    b = next(b for b in batches if b is not None and b.axis is not None)
    return Batch(b.axis + (b.axis >= params["axis"]), b.inner)


def _unstack(params, batches, shapes, out, batch):
    b = batches[0]
    return LOST if b.axis == params["axis"] else Batch(b.axis - (b.axis > params["axis"]), b.inner)


def _whole_batches(b, axis, sizes, batch):
    """Where the examples lie in parts of these sizes along an axis."""
    whole = b.axis != axis or all(size % (batch * b.inner) == 0 for size in sizes)
    return b if b.axis is not None and whole else LOST


def _concatenate(params, batches, shapes, out, batch):
    axis, known = params["dimension"], {b for b in batches if b is not None}
    beside = next((b for b in known if b.axis is not None and b.axis != axis), None)
    if beside is not None or len(known) > 1 or None in batches:
        return beside or LOST
    return _whole_batches(next(iter(known)), axis, [shape[axis] for shape in shapes], batch)


def _split(params, batches, shapes, out, batch):
    return _whole_batches(batches[0], params["axis"], params["sizes"], batch)


def _slice(params, batches, shapes, out, batch):
    b, bounds = batches[0], zip(params["start_indices"], params["limit_indices"], strict=True)
    if b.axis is None or out[b.axis] == shapes[0][b.axis]:
        return b
    if params["strides"] is not None and params["strides"][b.axis] != 1:
        return LOST
    return _whole_batches(b, b.axis, list(bounds)[b.axis], batch)


def _dot_general(params, batches, shapes, out, batch):
    contracting, together = params["dimension_numbers"]
    first, found = 0, None
    for side, (b, shape) in enumerate(zip(batches, shapes, strict=True)):
        free = [axis for axis in range(len(shape)) if axis not in (*contracting[side], *together[side])]
        if b is not None and b.axis is None:
            found = found or LOST
        elif b is not None and b.axis in together[side]:
            return Batch(tuple(together[side]).index(b.axis), b.inner)
        elif b is not None and b.axis in free:
            return Batch(len(together[side]) + first + free.index(b.axis), b.inner)
        first += len(free)
    return found


def _convolution(params, batches, shapes, out, batch):
    spec, b = params["dimension_numbers"], batches[0]
    if b is None or b.axis != spec.lhs_spec[0]:
        return b and LOST
    return Batch(spec.out_spec[0], b.inner)


def _gather(params, batches, shapes, out, batch):
    numbers = params["dimension_numbers"]
    rows = [axis for axis in range(len(out)) if axis not in numbers.offset_dims]
    b = batches[1]
    if b is not None:
        return Batch(rows[b.axis], b.inner) if b.axis is not None and b.axis < len(rows) else LOST
    b = batches[0]
    kept = [
        k for k in range(len(shapes[0])) if k not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
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
