"""Uses whose input all examples share, and where their output meets the examples.

A layer may act on what is the same for the whole batch: learned queries, common points of a grid, a
table of positions, or the direction of a derivative by the network's input. The gradient at its
output is then a sum over examples, of which no statistic of single examples can be made. We follow
the output to every equation that combines it with values of single examples. If the examples lie
along one of the output's own axes at all of them, that axis is the batch axis. Otherwise the
equations in between run again with one copy of the output for each example; such arrays are called
*widened* (see `replay`). The copies are equal, and so are all values made of them; only the
gradients differ, and each is that of one example. Where an equation does not show how the examples
meet the output, nothing can be told, and the leaf is in no layer.
"""

from typing import NamedTuple

from optax_curv.capture._graph import views
from optax_curv.capture._graph.jaxpr import (
    CUSTOM_RULES,
    axis_of,
    broadcast,
    convolution,
    is_entrywise,
    is_literal,
    look_up,
    maker,
    product,
    repetitions,
    shape_of,
)
from optax_curv.capture._graph.marks import REPEATED, Batch, Found, Mark, Meeting, Node, Seed

UNTOLD = (
    "all examples share its input, and where its output meets them they cannot be told apart; pass "
    "a copy of that input for every example as an argument of the loss"
)
UNMET = "all examples share its input, and its output reaches the loss without meeting them"
# Equations that run in no other way than they are.
FIXED = {"shard_map", "pure_callback", "io_callback", "custom_lin"}


class Followed(NamedTuple):
    """Seeds of an equation's results, and the meeting of its operands, or None."""

    seeds: tuple[Seed, ...]
    meeting: Meeting | None = None


class Seeds:
    """The uses whose input is the same for all examples, and what becomes of them."""

    def __init__(self, batch: int):
        self.batch = batch
        self.met: dict[int, set[float | None]] = {}  # rows of the output that hold the examples
        self.lost: set[int] = set()  # uses of which nothing can be told
        self.before: dict[int, set[int]] = {}  # of each use, those whose output it acts on
        self.entries: set[int] = set()  # leaves that are uses themselves, see `Walk.enter`

    def lose(self, marks) -> list[Mark]:
        """Returns marks of variables that are followed no further."""
        self.lost |= {seed.use for mark in marks for seed in mark.seeds}
        return [mark._replace(seeds=()) for mark in marks]

    def copy(self) -> "Seeds":
        """Returns a copy, which later equations do not change."""
        other = Seeds(self.batch)
        other.met = {use: set(rows) for use, rows in self.met.items()}
        other.lost, other.before = set(self.lost), dict(self.before)
        other.entries = set(self.entries)
        return other

    def follow(
        self,
        node: Node,
        index: int,
        given: list[Mark],
        batch: Batch | None,
        found: list[Found],
        new: range,
    ) -> Followed:
        """Follows an equation's operands to its results; notes where seeds meet examples.

        Args:
          node: the jaxpr of the equation.
          index: its number.
          given: marks of its operands.
          batch: where the examples lie in its first result.
          found: all uses.
          new: numbers of those that the equation makes.

        Returns:
          The seeds of all its results.
        """
        eqn = node.jaxpr.jaxpr.eqns[index]
        own = [use for use in new if found[use].examples is None]
        for use in own:
            self.before[use] = {seed.use for mark in given for seed in mark.seeds}
        if all(mark.batch is None for mark in given):
            if eqn.primitive.name in FIXED:
                given = self.lose(given)
            whole = views.whole(0, shape_of(eqn.outvars[0]))
            return Followed(self._through(eqn, given) + tuple(Seed(use, whole) for use in own))
        self.lost |= set(own)
        if not any(mark.seeds for mark in given):
            return Followed(())
        meeting = _meeting(node, eqn, given, batch, self.batch)
        if meeting is None or any(mark.seeds and mark.batch is not None for mark in given):
            self.lose(given)
            return Followed(())
        beside = is_entrywise(eqn) or eqn.primitive.name == "concatenate"
        for axis, mark in zip(meeting.axes, given, strict=True):
            self.meet(mark, axis, found)
            if axis is None and not beside:  # a kernel made of a leaf: too large to have copies
                self.lost |= self.entries.intersection(seed.use for seed in mark.seeds)
        return Followed((), meeting)

    def _through(self, eqn, given: list[Mark]) -> tuple[Seed, ...]:
        """The seeds of what is made of operands that all examples share."""
        alone = len(eqn.invars) == 1
        seen: dict[int, views.View | None] = {}
        for seed in (seed for mark in given for seed in mark.seeds):
            view = views.moved(eqn, seed.view) if alone and seed.view else None
            seen[seed.use] = None if seed.use in seen else view
        return tuple(Seed(use, view) for use, view in seen.items())

    def meet(self, mark: Mark, axis: int | None, found: list[Found]):
        """Notes that the examples lie along this axis of a variable, None: along none of it."""
        for use, view in mark.seeds:
            row = None
            pieces = view.axes[axis] if view is not None and axis is not None else ()
            if len(pieces) == 1 and pieces[0][0] > 0:
                role, number = views.role_at(found[use].output_segments, pieces[0][0])
                row = number if role == "row" else None
            self.met.setdefault(use, set()).add(row)

    def settle(self, found: list[Found], results: list[Mark]):
        """Gives the uses their examples, once the marks of the loss's results are known."""
        if self.batch == 1:
            return
        unmet = {seed.use for mark in results for seed in mark.seeds}
        for use, before in self.before.items():
            rows, one = self.met.get(use, set()), found[use]
            if use in self.lost:
                one.untold = UNTOLD
            elif use in unmet:
                one.untold = UNMET
            elif any(found[other].examples == Batch(REPEATED) for other in before):
                rows = {None}  # it acts on an array that is widened already
            elif not rows:
                one.untold = UNMET
            if one.untold is not None:
                continue
            (row,) = rows if len(rows) == 1 else (None,)
            if row is not None:
                one.examples = Batch(row)
            else:
                one.output_segments = (("row", ((REPEATED, self.batch),)), *one.output_segments)
                one.examples = Batch(REPEATED)
                inputs, outputs = one.windows
                one.windows = (inputs, outputs and (outputs[0] + 1, *outputs[1:]))


def _meeting(node: Node, eqn, given: list[Mark], batch: Batch | None, count: int) -> Meeting | None:
    """How the operands of an equation meet, if `count` examples lie at `batch` in its result."""
    shape = shape_of(eqn.outvars[0])
    if batch is None or batch.axis is None or batch.inner != 1 or shape[batch.axis] != count:
        return None
    axes = _axes(eqn, batch.axis)
    if axes is None:
        return None
    jaxpr = node.jaxpr.jaxpr
    repeats = tuple(
        axis is not None
        and bool(mark.seeds)
        and (shape_of(v)[axis] == 1 or axis in repeated_axes(jaxpr, v))
        for axis, v, mark in zip(axes, eqn.invars, given, strict=True)
    )
    return Meeting(batch.axis, axes, repeats)


def _axes(eqn, axis: int) -> tuple[int | None, ...] | None:
    """The axis of each operand that becomes this one of the result; None where it has none.

    The equation must take the examples along that axis apart: None where that is not known.
    """
    ranks, name = [len(shape_of(v)) for v in eqn.invars], eqn.primitive.name
    if is_entrywise(eqn):
        one = any(
            rank and shape_of(v)[axis] == 1 for v, rank in zip(eqn.invars, ranks, strict=True)
        )
        if one and name in CUSTOM_RULES:  # whose rule is made for just these shapes
            return None
        return tuple(axis if rank else None for rank in ranks)
    if name == "concatenate":
        return None if axis == axis_of(eqn) else (axis,) * len(ranks)
    if name == "dot_general":
        numbers = product(eqn)
        count = len(numbers.batched[0])
        if axis < count:
            return numbers.batched[0][axis], numbers.batched[1][axis]
        left, right = (numbers.free(side, ranks[side]) for side in (0, 1))
        place = axis - count
        return (left[place], None) if place < len(left) else (None, right[place - len(left)])
    if name == "conv_general_dilated":
        numbers = convolution(eqn)
        alone = axis == numbers.output_spec[0] and numbers.batch_groups == 1
        return (numbers.input_spec[0], None) if alone else None
    if name == "gather":
        numbers = look_up(eqn)
        rank = len(shape_of(eqn.outvars[0]))
        rows = [k for k in range(rank) if k not in numbers.offset_dims]
        if axis not in rows:
            return None
        ids = rows.index(axis)
        together = dict(zip(numbers.indices_batching, numbers.operand_batching, strict=True))
        return together.get(ids), ids
    return None


def repeated_axes(jaxpr, variable, known: dict | None = None) -> set[int]:
    """Axes along which all entries of a variable are equal, as far as its makers show.

    Args:
      jaxpr: where the variable is made.
      variable: the variable.
      known: the answers found so far, as one variable may be met on many ways.

    Returns:
      The axes.
    """
    known = {} if known is None else known
    if not shape_of(variable) or is_literal(variable):
        return set()
    if variable not in known:
        known[variable] = _repeated(jaxpr, variable, known)
    return known[variable]


def _repeated(jaxpr, variable, known: dict) -> set[int]:
    rank, eqn = len(shape_of(variable)), maker(jaxpr, variable)
    if eqn is None:
        return set()
    if eqn.primitive.name == "broadcast_in_dim":
        numbers, (operand, *_) = broadcast(eqn), eqn.invars
        inner, sizes = repeated_axes(jaxpr, operand, known), shape_of(operand)
        kept = {
            place
            for axis, place in enumerate(numbers.dimensions)
            if axis not in inner and sizes[axis] == numbers.shape[place]
        }
        return set(range(rank)) - kept
    if eqn.primitive.name == "tile":
        sizes, counts = shape_of(eqn.invars[0]), repetitions(eqn)
        return {axis for axis in range(rank) if sizes[axis] == 1 and counts[axis] > 1}
    if eqn.primitive.name == "dot_general":
        numbers, left = product(eqn), eqn.invars[0]
        places = numbers.free(0, len(shape_of(left)))
        inner, first = repeated_axes(jaxpr, left, known), len(numbers.batched[0])
        return {first + k for k, axis in enumerate(places) if axis in inner}
    axes = set(range(rank)) if is_entrywise(eqn) else set()
    for operand in eqn.invars:
        if axes and shape_of(operand):
            axes &= repeated_axes(jaxpr, operand, known)
    return axes
