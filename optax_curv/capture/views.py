"""Operations that only rearrange: another view of the same leaf, or of the same layer's output.

A rule takes the walk, the equation and its operands' marks. It returns those of the results (without `batch`, which is
followed elsewhere), or None where the leaves are used in another way.
"""

from optax_curv.capture import layouts
from optax_curv.capture.jaxpr import SAME_PLACES, shape_of
from optax_curv.capture.layouts import View
from optax_curv.capture.marks import Mark


def is_plain(view: View) -> bool:
    """Whether the view has no coefficients, and no entry twice."""
    return not view.coefficients and all(stride for axis in view.axes for stride, _ in axis)


def moved(eqn, view: View) -> View | None:
    """The view after one layout operation; None if that is not a view."""
    name, params = eqn.primitive.name, eqn.params
    if name in SAME_PLACES:
        return view
    if name == "reshape":
        if params.get("dimensions") is not None:
            view = layouts.transpose(view, params["dimensions"])
        return layouts.reshape(view, params["new_sizes"])
    if name == "transpose":
        return layouts.transpose(view, params["permutation"])
    if name == "squeeze":
        return _without(view, params["dimensions"])
    if name in ("broadcast_in_dim", "expand_dims"):
        return layouts.broadcast(view, params["shape"], params["broadcast_dimensions"])
    if name == "tile":
        return layouts.tile(view, params["reps"])
    if name == "rev":
        return layouts.reverse(view, params["dimensions"])
    if name == "slice" and all(step == 1 for step in params["strides"] or (1,)):
        after: View | None = view
        for axis, (start, stop) in enumerate(zip(params["start_indices"], params["limit_indices"], strict=True)):
            after = after and layouts.cut(after, axis, start, stop - start)
        return after
    return None


def layout(walk, eqn, marks):
    """Another view of the same leaf or of the same layer's output."""
    if len(marks) > 1:  # a barrier, which only passes its operands on
        return [mark._replace(output=None, batch=None) for mark in marks] if len(marks) == len(eqn.outvars) else None
    mark = marks[0]
    output = mark.output and walk.once(eqn.invars[0]) and moved(eqn, mark.output)
    if len(mark.leaves) > 1:
        after = _moved_parts(eqn, mark)
    else:
        leaves = tuple(moved(eqn, view) for view in mark.leaves)
        after = None if None in leaves else Mark(leaves=leaves)
    return after and [after._replace(output=output if output and not output.slots else None)]


def _moved_parts(eqn, mark):
    """A concatenation of leaves after a layout operation that keeps the joined axis whole."""
    if eqn.primitive.name in SAME_PLACES:
        return Mark(leaves=mark.leaves, joined=mark.joined)
    whole = layouts.whole(0, shape_of(eqn.invars[0]))
    after = moved(eqn, whole)
    joined = whole.axes[mark.joined]
    if after is None or after.axes.count(joined) != 1 or after.slots:
        return None
    axis, parts = after.axes.index(joined), []
    for view in mark.leaves:
        inner = list(after.shape)
        inner[axis] = view.shape[mark.joined]
        if eqn.primitive.name == "broadcast_in_dim":
            parts.append(layouts.broadcast(view, inner, eqn.params["broadcast_dimensions"]))
        else:
            parts.append(moved(eqn, view) if eqn.primitive.name == "transpose" else layouts.reshape(view, inner))
    return None if None in parts else Mark(leaves=tuple(parts), joined=axis)


def split(walk, eqn, marks):
    """Pieces of one leaf along an axis."""
    return _pieces(marks[0], eqn.params["axis"], map(int, eqn.params["sizes"]))


def _pieces(mark, axis, sizes):
    if len(mark.leaves) != 1:
        return None
    start, results = 0, []
    for size in sizes:
        piece = layouts.cut(mark.leaves[0], axis, start, size)
        if piece is None:
            return None
        results.append(Mark(leaves=(piece,)))
        start += size
    return results


def unstack(walk, eqn, marks):
    """The slices of one leaf along an axis."""
    axis = eqn.params["axis"]
    pieces = _pieces(marks[0], axis, [1] * len(eqn.outvars))
    return pieces and [Mark(leaves=(_without(mark.leaves[0], [axis]),)) for mark in pieces]


def _without(view: View, axes) -> View:
    return layouts.transpose(view, [axis for axis in range(len(view.axes)) if axis not in axes])


def _with_axis(view: View, axis: int) -> View:
    return view._replace(axes=(*view.axes[:axis], (), *view.axes[axis:]))


def dynamic_slice(walk, eqn, marks):
    """One slice of a leaf at each step of a scan, picked by the number of the step."""
    sizes, shape = eqn.params["slice_sizes"], shape_of(eqn.invars[0])
    cut = [axis for axis in range(len(shape)) if sizes[axis] != shape[axis]]
    if len(marks[0].leaves) != 1 or len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    (axis,), depth = cut, marks[1 + cut[0]].counter
    if depth is None or walk.loops[depth] != shape[axis]:
        return None
    view = layouts.transpose(marks[0].leaves[0], [axis, *(k for k in range(len(shape)) if k != axis)])
    view = layouts.enter_loop(view, depth)
    return view and [Mark(leaves=(_with_axis(view, axis),))]


def stack(walk, eqn, marks):
    """Several whole leaves one behind the other, along a new axis."""
    if not all(len(mark.leaves) == 1 and is_plain(mark.leaves[0]) for mark in marks):
        return None
    axis = eqn.params["axis"]
    return [Mark(leaves=tuple(_with_axis(mark.leaves[0], axis) for mark in marks), joined=axis)]
