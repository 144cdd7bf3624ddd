"""Each primitive's meaning for parameters that enter it: another view, a layer, or neither.

A rule takes the place of the walk, the equation, and its operands' marks. It returns the marks of
the results (without `batch`, which `examples` follows), or None where the leaves are used in
another way; `why_not` then says why.
"""

import jax.numpy as jnp

from optax_curv.capture._graph import elementwise, products, views
from optax_curv.capture._graph.jaxpr import (
    KEEP_ENTRIES,
    SAME_PLACES,
    axis_of,
    broadcast,
    hidden_bodies,
    is_entrywise,
    name_of,
    pieces_of,
    shape_of,
    window_of,
)
from optax_curv.capture._graph.marks import Mark, Place, changes, is_activation
from optax_curv.capture._graph.views import View

Results = list[Mark] | None


def view(place: Place, eqn, marks: list[Mark]) -> Results:
    """Another view of the same leaf or of the same layer's output."""
    if len(marks) > 1:  # a barrier, which only passes its operands on
        passed = [mark._replace(output=None, batch=None) for mark in marks]
        return passed if len(marks) == len(eqn.outvars) else None
    mark = marks[0]
    seen = mark.output if mark.output and place.once(eqn.invars[0]) else None
    output = seen and views.moved(eqn, seen)
    if len(mark.leaves) > 1:
        after = _moved_parts(eqn, mark)
    else:
        leaves = [views.moved(eqn, leaf) for leaf in mark.leaves]
        after = None if None in leaves else Mark(leaves=tuple(filter(None, leaves)))
    return after and [after._replace(output=output if output and not output.slots else None)]


def _moved_parts(eqn, mark: Mark) -> Mark | None:
    """A concatenation of leaves after an operation that keeps the joined axis whole."""
    if eqn.primitive.name in SAME_PLACES:
        return Mark(leaves=mark.leaves, joined=mark.joined)
    whole = views.whole(0, shape_of(eqn.invars[0]))
    after = views.moved(eqn, whole)
    joined = whole.axes[mark.joined]
    if after is None or after.axes.count(joined) != 1 or after.slots:
        return None
    axis, parts = after.axes.index(joined), []
    for view in mark.leaves:
        inner = list(after.shape)
        inner[axis] = view.shape[mark.joined]
        if eqn.primitive.name == "broadcast_in_dim":
            parts.append(views.broadcast(view, inner, broadcast(eqn).dimensions))
        elif eqn.primitive.name == "transpose":
            parts.append(views.moved(eqn, view))
        else:
            parts.append(views.reshape(view, inner))
    return None if None in parts else Mark(leaves=tuple(parts), joined=axis)


def split(place: Place, eqn, marks: list[Mark]) -> Results:
    """Pieces of one leaf along an axis."""
    return _pieces(marks[0], axis_of(eqn), pieces_of(eqn))


def _pieces(mark: Mark, axis: int, sizes) -> Results:
    if len(mark.leaves) != 1:
        return None
    start, results = 0, []
    for size in sizes:
        piece = views.cut(mark.leaves[0], axis, start, size)
        if piece is None:
            return None
        results.append(Mark(leaves=(piece,)))
        start += size
    return results


def unstack(place: Place, eqn, marks: list[Mark]) -> Results:
    """The slices of one leaf along an axis."""
    axis = axis_of(eqn)
    pieces = _pieces(marks[0], axis, [1] * len(eqn.outvars))
    if pieces is None:
        return None
    return [Mark(leaves=(views.without(mark.leaves[0], [axis]),)) for mark in pieces]


def _with_axis(view: View, axis: int) -> View:
    return view._replace(axes=(*view.axes[:axis], (), *view.axes[axis:]))


def dynamic_slice(place: Place, eqn, marks: list[Mark]) -> Results:
    """One slice of a leaf at each step of a scan, picked by its number or by an example."""
    sizes, shape = window_of(eqn), shape_of(eqn.invars[0])
    cut = [axis for axis in range(len(shape)) if sizes[axis] != shape[axis]]
    if len(marks[0].leaves) != 1 or len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    (axis,), depth = cut, marks[1 + cut[0]].counter
    if marks[1 + axis].batch is not None:
        return products.one_row(place, eqn, marks, axis)
    if depth is None or place.loops[depth] != shape[axis]:
        return None
    view = views.transpose(marks[0].leaves[0], sorted(range(len(shape)), key=lambda k: k != axis))
    view = views.enter_loop(view, depth)
    return view and [Mark(leaves=(_with_axis(view, axis),))]


def stack(place: Place, eqn, marks: list[Mark]) -> Results:
    """Several whole leaves one behind the other, along a new axis."""
    if not all(len(mark.leaves) == 1 and views.has_each_once(mark.leaves[0]) for mark in marks):
        return None
    axis = axis_of(eqn)
    return [Mark(leaves=tuple(_with_axis(mark.leaves[0], axis) for mark in marks), joined=axis)]


def _made(place: Place, eqn, marks: list[Mark]) -> Results:
    """Another kernel, of which each entry is a function of the leaf's own: masks, softplus, ….

    What else enters is the same for all examples, and at all steps of scans that share the leaf.
    """
    shape = shape_of(eqn.outvars[0])
    if not is_entrywise(eqn) or len(eqn.outvars) != 1 or any(map(is_activation, marks)):
        return None
    if any(len(mark.leaves) > 1 for mark in marks):
        return None
    seen = [view for mark in marks for view in mark.leaves]
    whole = {views.as_made(v) for v in seen if v.shape == shape and views.has_each_once(v)}
    if len(whole) != 1:
        return None
    (view,) = whole
    others = [mark for mark in marks if not any(v.source == view.source for v in mark.leaves)]
    parts = [v for v in seen if v.source == view.source]
    if any(views.as_made(v) != view for v in parts) or changes(place, view, others):
        return None
    derived = dict(entry for mark in marks for entry in mark.derived)
    reason = TOGETHER.get(eqn.primitive.name, f"it enters `{name_of(eqn)}`, which is no layer")
    derived |= {v.source: reason for mark in others for v in mark.leaves}
    return (
        None if view.source in derived else [Mark(leaves=(view,), derived=tuple(derived.items()))]
    )


def described(place: Place, eqn, marks: list[Mark]) -> Results:
    """Returns what becomes of the leaves: by the primitive's rule, else kernels made of them."""
    name = eqn.primitive.name
    rule, results = RULES.get(name), None
    if name in MOVES:
        marks = [_settled(mark, name in ("concatenate", "stack")) for mark in marks]
    made = any(view.made for mark in marks for view in mark.leaves)
    if rule is not None and not (made and name in BY_ENTRIES):
        results = rule(place, eqn, marks)
    if results is None and any(mark.leaves for mark in marks):
        results = _made(place, eqn, marks)
    return results


def _settled(mark: Mark, numbers: bool) -> Mark:
    """The mark before its variable moves: arrays that multiply a leaf do not move with it."""
    leaves = (
        views.as_made(view)
        if any(map(shape_of, view.coefficients)) or (numbers and view.coefficients + view.divisors)
        else view
        for view in mark.leaves
    )
    return mark._replace(leaves=tuple(leaves))


MOVES = {*KEEP_ENTRIES.difference(SAME_PLACES), "split", "unstack", "dynamic_slice", "stack"}
MOVES |= {"concatenate"}
# Rules for leaves that act on others entry by entry, which are not for kernels made of leaves.
BY_ENTRIES = {"mul", "div", "add", "add_any", "sub", "select_n"}
RULES = {
    **dict.fromkeys(KEEP_ENTRIES, view),
    "split": split,
    "unstack": unstack,
    "dynamic_slice": dynamic_slice,
    "stack": stack,
    "dot_general": products.dot_general,
    "conv_general_dilated": products.convolution,
    "gather": products.gather,
    "mul": elementwise.multiply,
    "div": elementwise.divide,
    "neg": elementwise.negate,
    "add": elementwise.add,
    "add_any": elementwise.add,
    "sub": elementwise.add,
    "select_n": elementwise.select,
    "concatenate": elementwise.concatenate,
}
TOGETHER = {
    "mul": "it is multiplied by another parameter before it meets the data",
    "dot_general": "it is multiplied by another parameter before it meets the data; for a low-rank "
    "kernel write (x @ a) @ b, and repeat a learned query for every example, "
    "jnp.broadcast_to(query, (N, *query.shape))",
    "add": "it is added to another parameter before it meets the data",
    "sub": "it is added to another parameter before it meets the data",
}
ALONE = {
    "dynamic_slice": "it is sliced at an index known only when the loss runs; take its slices one "
    "by one with jax.lax.scan(f, init, xs), the parameter in xs",
    "shard_map": "it enters `shard_map` inside the loss; call value_grad_and_curvature inside "
    "shard_map instead",
}


def is_complex(variables) -> bool:
    """Whether one of several variables is complex."""
    return any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in variables)


def why_not(eqn, view: View, several: bool) -> str:
    """Says why no layer describes the use of a leaf in this equation.

    Args:
      eqn: the equation.
      view: the leaf as it enters.
      several: whether other parameters enter, too.
    """
    name = eqn.primitive.name
    if is_complex(eqn.outvars):
        return (
            "it is or becomes complex, and factors are for real layers; multiply its real and "
            "imaginary parts apart"
        )
    if several and name in TOGETHER:
        return TOGETHER[name]
    if view.coefficients + view.divisors or view.made:
        return f"a function of it, made entry by entry, enters `{name}`"
    if view.cuts:
        return f"it is cut into unequal slices before it enters `{name}`"
    if name in ALONE:
        return ALONE[name]
    if hidden_bodies(eqn):
        return f"it enters `{name_of(eqn)}`, whose own derivative rule hides what is inside"
    return f"it enters `{name}`, which is no layer"
