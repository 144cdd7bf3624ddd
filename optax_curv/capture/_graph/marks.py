"""What the walk over a loss remembers of its variables and equations, and where the examples of the batch lie.

Statistics of single examples (a scale's gradient, "reduce" sharing) must know which rows belong to
one. So the leading axis of the inputs is followed through the equations: by a rule for each
primitive that moves axes, elsewhere if it keeps its place and size.

A derivative by a network's input starts from a direction that all examples share, which the kernel
meets once for the whole batch, and the gradient at its output is a sum over examples. So the output
is followed to where it meets them. If they lie along one of its own axes, that axis holds them; if
not, the loss runs with the output repeated for every example (`widened`), through equations that
are linear, as those of a derivative are.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.capture._graph import views as layouts
from optax_curv.capture._graph.jaxpr import KEEP_ENTRIES, is_literal, run, shape_of
from optax_curv.capture._graph.views import Piece, View

Segments = tuple[tuple[str, tuple[Piece, ...]], ...]  # see layouts.arrangement


class Batch(NamedTuple):
    """Where the examples lie in an array, or in the rows of a layer: along an axis, a scan, or nobody knows."""

    axis: Any  # its number, or that of the row; None: none
    inner: int = 1  # of its entries that are one example's; 0: the size of an axis has to tell
    loop: int | None = None  # depth of the scan that walks from example to example


REPEATED = -1.0  # number of the row of an output repeated for every example


class Seed(NamedTuple):
    """A use whose input is the same for all examples, as a variable linear in its output remembers it."""

    use: int
    view: View | None  # the variable as a view of that output


class Mark(NamedTuple):
    """What is known of one variable.

    Attributes:
      leaves: views of parameter leaves, concatenated along `joined`.
      output: the variable as a view of a layer's output (its source numbers a group of uses), to
        find the bias.
      batch: where the examples lie, None for what does not depend on single examples.
      derived: (leaf, reason) for leaves that entered the variable in a way no layer describes.
      seeds: uses that all examples share, and that the variable comes from.
      counter: depth of the scan whose steps the variable counts.
    """

    leaves: tuple[View, ...] = ()
    joined: int = 0
    output: View | None = None
    batch: Batch | None = None
    derived: tuple[tuple[int, str], ...] = ()
    seeds: tuple[Seed, ...] = ()
    counter: int | None = None


NOTHING = Mark()


def known_batch(marks) -> Batch | None:
    """Where the examples lie in one of several variables of one shape."""
    batches = [mark.batch for mark in marks if mark.batch is not None]
    return next(
        (batch for batch in batches if batch.axis is not None), batches[0] if batches else None
    )


class Node:
    """A jaxpr inside the loss, and by the index of its equations what is to be done there."""

    def __init__(self, jaxpr):
        self.jaxpr = jaxpr
        self.taps: dict[int, list[int]] = {}  # uses whose output is the result
        self.meetings: dict[int, int] = {}  # axis of the examples where seeds meet them
        self.children: dict[int, tuple[Node, ...]] = {}  # the bodies

    def uses(self) -> list[int]:
        """Numbers of all uses in and below."""
        below = [use for nodes in self.children.values() for node in nodes for use in node.uses()]
        return [use for uses in self.taps.values() for use in uses] + below


@dataclasses.dataclass
class Found:
    """One use of a parameter leaf as the walk finds it.

    Attributes:
      view: the leaf as the equation sees it.
      operands: variables the tap needs: the layer's input, then coefficients.
      stack, inputs, outputs: pieces of the leaf by their role in this equation.
      input_segments, output_segments: roles of the axes of input and output.
      examples: what tells them apart; None: the input is the same for all of them.
      windows: (axis, start, size) of the part of the input and of the output that belongs to this
        leaf, or None.
      conv: what `conv_general_dilated_patches` needs.
      loops: (length, whether the leaf is sliced along it) of each scan around the use, outermost
        first.
      branch: (number of the cond, number of the branch) around the use.
      partner: number of the use whose bias this shift is.
      sign: -1 for a subtracted shift.
      choice: which case of a `select_n`, whose condition is the first operand, the shift is.
      far: pieces of the stack that lie among the outputs of the equation.
    """

    kind: str
    view: View
    operands: tuple
    stack: tuple[Piece, ...]
    inputs: tuple[Piece, ...]
    outputs: tuple[Piece, ...]
    input_segments: Segments
    output_segments: Segments
    examples: Batch | None
    windows: tuple = (None, None)
    conv: tuple | None = None
    loops: tuple[tuple[int, bool], ...] = ()
    branch: tuple[int, int] | None = None
    partner: int | None = None
    sign: float = 1.0
    choice: int | None = None
    far: tuple[Piece, ...] = ()


LOST, UNKNOWN = Batch(None), Batch(None, 0)


def propagate(eqn, batches: list[Batch | None], batch: int) -> list[Batch | None]:
    """Where `batch` examples lie in each result of an equation; None: the same for, or summed over, all examples."""
    shapes, outs = ([shape_of(v) for v in variables] for variables in (eqn.invars, eqn.outvars))
    given = [(b, s) for b, s in zip(batches, shapes, strict=True) if b is not None]
    if not given:
        return [None] * len(outs)
    name = eqn.primitive.name
    if all(b.axis is None for b, _ in given):
        return [
            LOST
            if any(b == LOST for b, _ in given)
            else min(given, key=lambda x: x[0].inner == 0)[0]
        ] * len(outs)
    if name in MOVES:
        return [MOVES[name](eqn.params, batches, shapes, outs[0], batch)] * len(outs)
    if (name.startswith("reduce_") and "axes" in eqn.params) or name in ("argmax", "argmin"):
        return [_reduce(eqn.params["axes"], given[0][0])] * len(outs)
    return [_same_place(given, out) for out in outs]


def _same_place(given, out):
    """The axis of the first operand where it keeps place and size; else, for linear algebra, its leading axes."""
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
        b, shape = (
            b._replace(axis=params["dimensions"].index(b.axis)),
            [shape[k] for k in params["dimensions"]],
        )
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
    return _whole_batches(
        b, axis, (params["start_indices"][axis], params["limit_indices"][axis]), batch
    )


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
        return (
            Batch(rows[ids.axis], ids.inner)
            if ids.axis is not None and ids.axis < len(rows)
            else LOST
        )
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


ENTRYWISE = {"mul", "add", "sub", "add_any", "select_n"}
LINEAR = (
    ENTRYWISE
    | KEEP_ENTRIES
    | {"dot_general", "conv_general_dilated", "gather", "neg", "div", "reduce_sum"}
)
LINEAR |= {"split", "stack", "unstack", "concatenate", "pad"}


class Seeds:
    """The uses whose input is the same for all examples, and what becomes of them."""

    def __init__(self, batch: int):
        self.batch = batch
        self.rows: dict[int, float] = {}  # number of the row that turned out to hold the examples
        self.lost: set[int] = set()  # uses of which nothing can be told
        self.together: list[set[int]] = []  # groups that are widened together or not at all

    def lose(self, marks) -> list[Mark]:
        """Marks of variables that are followed no further."""
        self.lost |= {seed.use for mark in marks for seed in mark.seeds}
        return [mark._replace(seeds=()) for mark in marks]

    def forget(self, first: int):
        """Drops all uses from this number on."""
        self.rows = {use: row for use, row in self.rows.items() if use < first}
        self.lost = {use for use in self.lost if use < first}
        self.together = [
            kept for group in self.together if (kept := {use for use in group if use < first})
        ]

    def follow(
        self, node, index: int, given: list[Mark], batch: Batch | None, uses, new: range
    ) -> tuple[Seed, ...]:
        """The seeds of an equation's results, which has the uses `new`; notes where seeds meet examples."""
        eqn = node.jaxpr.jaxpr.eqns[index]
        seeds = [seed for mark in given for seed in mark.seeds]
        shape = shape_of(eqn.outvars[0])
        if all(mark.batch is None for mark in given):
            if eqn.primitive.name not in LINEAR:
                self.lose(given)
                seeds = []
            alone = len(eqn.invars) == 1
            views = {
                seed.use: layouts.moved(eqn, seed.view) if alone and seed.view else None
                for seed in seeds
            }
            views |= {use: layouts.whole(0, shape) for use in new if uses[use].examples is None}
            if views:
                self.together.append(set(views))
            return tuple(Seed(use, view) for use, view in views.items())
        axis = batch.axis if seeds and batch is not None and batch.inner == 1 else None
        if axis is None or eqn.primitive.name not in ENTRYWISE or shape[axis] != self.batch:
            self.lose(given)
            return ()
        node.meetings[index] = axis
        for variable, mark in zip(eqn.invars, given, strict=True):
            if len(shape_of(variable)) != len(shape):
                self.lose([mark])
            elif shape_of(variable)[axis] != 1 and axis not in _repeats(node, variable):
                self._along(axis, mark, uses)
        return ()

    def _along(self, axis: int, mark: Mark, uses):
        """The examples lie along this axis of a variable."""
        for use, view in mark.seeds:
            pieces = view.axes[axis] if view is not None else ()
            if len(pieces) == 1 and pieces[0][0] > 0:
                role, row = layouts.role_at(uses[use].output_segments, pieces[0][0])
                if role == "row":
                    self.rows[use] = row
        self.lose([mark])

    def settle(self, uses, results: list[Mark]):
        """Gives the uses their examples, once the marks of the loss's results are known."""
        self.lose(results)
        size = -1
        while size != len(self.lost):
            size = len(self.lost)
            self.lost |= set().union(*(group for group in self.together if group & self.lost))
        for use in set().union(*self.together):
            found = uses[use]
            if use not in self.lost:
                found.output_segments = (("row", ((REPEATED, self.batch),)), *found.output_segments)
                found.examples = Batch(REPEATED)
                inputs, outputs = found.windows
                found.windows = (inputs, outputs and (outputs[0] + 1, *outputs[1:]))
            elif use in self.rows:
                found.examples = Batch(self.rows[use])


def _repeats(node, variable) -> set[int]:
    """Axes along which a `broadcast_in_dim` made this variable repeat itself."""
    for eqn in node.jaxpr.jaxpr.eqns:
        if variable in eqn.outvars and eqn.primitive.name == "broadcast_in_dim":
            return set(range(len(eqn.params["shape"]))) - set(eqn.params["broadcast_dimensions"])
    return set()


def is_widened(variable, value) -> bool:
    """Whether a value has an axis of examples before those of its variable."""
    return not is_literal(variable) and jnp.ndim(value) > len(shape_of(variable))


def run_widened(node, index: int, given: list) -> list:
    """Runs an equation with widened operands; the results are too, unless it is where they meet the examples."""
    eqn = node.jaxpr.jaxpr.eqns[index]
    wide = [is_widened(v, x) for v, x in zip(eqn.invars, given, strict=True)]
    axis = node.meetings.get(index)
    if axis is None:
        axes = [0 if w else None for w in wide]
        return jax.vmap(lambda *operands: run(eqn, operands), axes)(*given)

    def there(x):  # where it has one entry, or repeats it
        return jnp.moveaxis(lax.index_in_dim(x, 0, axis + 1, keepdims=False), 0, axis)

    return run(eqn, [there(x) if w else x for x, w in zip(given, wide, strict=True)])
