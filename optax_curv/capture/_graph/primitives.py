"""What each primitive means for the parameters that enter it: another view of a leaf, a layer, or neither, and why.

A rule takes the walk, the equation and its operands' marks. It returns those of the results
(without `batch`, which is followed elsewhere), or None where the leaves are used in another way.
"""

import jax.numpy as jnp

from optax_curv.capture._graph import products
from optax_curv.capture._graph import views as layouts
from optax_curv.capture._graph.jaxpr import KEEP_ENTRIES, SAME_PLACES, hidden_bodies, shape_of
from optax_curv.capture._graph.marks import Mark
from optax_curv.capture._graph.views import View


def layout(walk, eqn, marks):
    """Another view of the same leaf or of the same layer's output."""
    if len(marks) > 1:  # a barrier, which only passes its operands on
        return (
            [mark._replace(output=None, batch=None) for mark in marks]
            if len(marks) == len(eqn.outvars)
            else None
        )
    mark = marks[0]
    output = mark.output and walk.once(eqn.invars[0]) and layouts.moved(eqn, mark.output)
    if len(mark.leaves) > 1:
        after = _moved_parts(eqn, mark)
    else:
        leaves = [layouts.moved(eqn, view) for view in mark.leaves]
        after = None if None in leaves else Mark(leaves=tuple(filter(None, leaves)))
    return after and [after._replace(output=output if output and not output.slots else None)]


def _moved_parts(eqn, mark):
    """A concatenation of leaves after a layout operation that keeps the joined axis whole."""
    if eqn.primitive.name in SAME_PLACES:
        return Mark(leaves=mark.leaves, joined=mark.joined)
    whole = layouts.whole(0, shape_of(eqn.invars[0]))
    after = layouts.moved(eqn, whole)
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
            parts.append(
                layouts.moved(eqn, view)
                if eqn.primitive.name == "transpose"
                else layouts.reshape(view, inner)
            )
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
    return pieces and [Mark(leaves=(layouts.without(mark.leaves[0], [axis]),)) for mark in pieces]


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
    view = layouts.transpose(marks[0].leaves[0], sorted(range(len(shape)), key=lambda k: k != axis))
    view = layouts.enter_loop(view, depth)
    return view and [Mark(leaves=(_with_axis(view, axis),))]


def stack(walk, eqn, marks):
    """Several whole leaves one behind the other, along a new axis."""
    if not all(len(mark.leaves) == 1 and layouts.is_plain(mark.leaves[0]) for mark in marks):
        return None
    axis = eqn.params["axis"]
    return [Mark(leaves=tuple(_with_axis(mark.leaves[0], axis) for mark in marks), joined=axis)]


RULES = {
    **dict.fromkeys(KEEP_ENTRIES, layout),
    "split": split,
    "unstack": unstack,
    "dynamic_slice": dynamic_slice,
    "stack": stack,
    "dot_general": products.dot_general,
    "conv_general_dilated": products.convolution,
    "gather": products.gather,
    "mul": products.multiply,
    "div": products.divide,
    "neg": products.negate,
    "add": products.add,
    "add_any": products.add,
    "sub": products.add,
    "select_n": products.select,
    "concatenate": products.concatenate,
}
TOGETHER = {
    "mul": "it is multiplied by another parameter before it meets the data",
    "dot_general": "it is multiplied by another parameter before it meets the data; for a low-rank kernel write "
    "(x @ a) @ b",
    "add": "it is added to another parameter before it meets the data",
    "sub": "it is added to another parameter before it meets the data",
}
ALONE = {
    "dynamic_slice": "it is sliced at an index known only when the loss runs; take its slices one by one with "
    "jax.lax.scan(f, init, xs), the parameter in xs",
    "shard_map": "it enters `shard_map` inside the loss; call value_grad_and_curvature inside shard_map instead",
}


def is_complex(variables) -> bool:
    """Whether one of several variables is complex."""
    return any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in variables)


def why_not(eqn, view: View, several: bool) -> str:
    """Why the use of a leaf, alone or with `several` parameters, is none that a layer describes."""
    name = eqn.primitive.name
    if is_complex(eqn.outvars):
        return "it is or becomes complex, and factors are for real layers; multiply its real and imaginary parts apart"
    if several and name in TOGETHER:
        return TOGETHER[name]
    if view.coefficients:
        return f"it is multiplied element-wise before it enters `{name}`"
    if not view.aligned:
        return f"it is cut into unequal slices before it enters `{name}`"
    if name in ALONE:
        return ALONE[name]
    if hidden_bodies(eqn):
        return f"it enters `{name}`, whose own derivative rule hides what is inside"
    return f"it enters `{name}`, which is no layer"
