"""Operations that only rearrange: another view of the same leaf, or of the same layer's output.

A rule takes the walk, the equation and the marks of its operands, and returns the marks of its results (without
`batch`, which is followed elsewhere), or None where it has nothing to say: then the leaves are used in another way.
"""

from optax_curv.capture import layouts
from optax_curv.capture.jaxpr import SAME_PLACES
from optax_curv.capture.layouts import View
from optax_curv.capture.marks import Mark


def shape_of(variable) -> tuple[int, ...]:
    """Shape of a variable or literal."""
    return tuple(getattr(variable.aval, "shape", ()))


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
        kept = [axis for axis in range(len(view.axes)) if axis not in params["dimensions"]]
        return layouts.transpose(view, kept)
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
    output = output if output and not output.slots else None
    leaves = [moved(eqn, view) for view in mark.leaves]
    if len(leaves) > 1:
        leaves = _moved_parts(eqn, mark)
        return leaves and [Mark(leaves=leaves[0], joined=leaves[1], output=output)]
    return None if None in leaves else [Mark(leaves=tuple(v for v in leaves if v), output=output)]


def _moved_parts(eqn, mark):
    """A concatenation of leaves after a layout operation that keeps the joined axis whole."""
    if eqn.primitive.name in SAME_PLACES:
        return mark.leaves, mark.joined
    whole = layouts.whole(0, shape_of(eqn.invars[0]))
    after = moved(eqn, whole)
    joined = whole.axes[mark.joined]
    if after is None or after.axes.count(joined) != 1 or after.slots:
        return None
    axis, parts = after.axes.index(joined), []
    for view in mark.leaves:
        inner = list(after.shape)
        inner[axis] = view.shape[mark.joined]
        if eqn.primitive.name == "transpose":
            parts.append(layouts.transpose(view, eqn.params["permutation"]))
        elif eqn.primitive.name == "broadcast_in_dim":
            parts.append(layouts.broadcast(view, inner, eqn.params["broadcast_dimensions"]))
        else:
            parts.append(layouts.reshape(view, inner))
    return None if None in parts else (tuple(parts), axis)


def split(walk, eqn, marks):
    """Equal pieces of one leaf along an axis."""
    if len(marks[0].leaves) != 1:
        return None
    axis, start, results = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        piece = layouts.cut(marks[0].leaves[0], axis, start, int(size))
        if piece is None:
            return None
        results.append(Mark(leaves=(piece,)))
        start += int(size)
    return results


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
    return view and [Mark(leaves=(view._replace(axes=(*view.axes[:axis], (), *view.axes[axis:])),))]


def unstack(walk, eqn, marks):
    """The slices of one leaf along an axis."""
    axis, results = eqn.params["axis"], []
    if len(marks[0].leaves) != 1:
        return None
    for index in range(len(eqn.outvars)):
        piece = layouts.cut(marks[0].leaves[0], axis, index, 1)
        if piece is None:
            return None
        kept = [k for k in range(len(piece.axes)) if k != axis]
        results.append(Mark(leaves=(layouts.transpose(piece, kept),)))
    return results


def stack(walk, eqn, marks):
    """Several whole leaves one behind the other, along a new axis."""
    if not all(len(mark.leaves) == 1 and is_plain(mark.leaves[0]) for mark in marks):
        return None
    axis, views = eqn.params["axis"], []
    for mark in marks:
        (view,) = mark.leaves
        views.append(view._replace(axes=(*view.axes[:axis], (), *view.axes[axis:])))
    return [Mark(leaves=tuple(views), joined=axis)]
