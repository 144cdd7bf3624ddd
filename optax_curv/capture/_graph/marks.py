"""The types in which the walk over a loss remembers its variables, equations and uses of leaves."""

import dataclasses
from typing import Any, NamedTuple, Protocol

from optax_curv.capture._graph.views import Cut, Piece, View

Segments = tuple[tuple[str, tuple[Piece, ...]], ...]  # see `views.arrangement`


class Batch(NamedTuple):
    """Where the examples lie in an array, or in the rows of a layer.

    Attributes:
      axis: number of the axis, or of the row, along which they lie; None: along none that is known.
      inner: how many consecutive entries of that axis belong to one example; 0: the size of an axis
        has to tell.
      loop: depth of the scan that walks from example to example, or None.
    """

    axis: Any
    inner: int = 1
    loop: int | None = None


REPEATED = -1.0  # number of the row of an output that is repeated for every example
LOST, UNKNOWN = Batch(None), Batch(None, 0)  # nothing tells; every array may depend on the examples


class Seed(NamedTuple):
    """A use with an input that all examples share, as remembered by a variable made of its output.

    Attributes:
      use: number of the use.
      view: the variable as a view of that output, or None.
    """

    use: int
    view: View | None


class Mark(NamedTuple):
    """The knowledge of one variable.

    Attributes:
      leaves: views of parameter leaves, concatenated along `joined`.
      output: the variable as a view of a layer's output (its source numbers a group of uses), by
        which the bias is found.
      batch: where the examples lie, None for what does not depend on single examples.
      derived: (leaf, reason) for leaves that entered the variable in a way no layer describes.
      seeds: uses with an input that all examples share, and that the variable comes from.
      counter: depth of the scan whose steps the variable counts.
      varies: whether it may be another one at each step of a scan around it.
    """

    leaves: tuple[View, ...] = ()
    joined: int = 0
    output: View | None = None
    batch: Batch | None = None
    derived: tuple[tuple[int, str], ...] = ()
    seeds: tuple[Seed, ...] = ()
    counter: int | None = None
    varies: bool = False


NOTHING = Mark()


def is_activation(mark: Mark) -> bool:
    """Whether a variable depends on the examples, or is made of a layer's output they share."""
    return mark.batch is not None or mark.output is not None or bool(mark.seeds)


def known_batch(marks) -> Batch | None:
    """Where the examples lie in one of several variables of one shape."""
    batches = [mark.batch for mark in marks if mark.batch is not None]
    placed = (batch for batch in batches if batch.axis is not None)
    return next(placed, batches[0] if batches else None)


class Meeting(NamedTuple):
    """How operands that all examples share meet those of single examples in an equation.

    Attributes:
      axis: the examples' axis in the result.
      axes: their axis in each operand, None for operands without one.
      repeats: whether all entries along that axis are equal.
    """

    axis: int
    axes: tuple[int | None, ...]
    repeats: tuple[bool, ...]


class Node:
    """A jaxpr inside the loss, and by the index of its equations what is to be done there.

    Attributes:
      jaxpr: the closed jaxpr.
      taps: numbers of the uses whose output is the equation's first result.
      meetings: where seeds meet the examples.
      children: the bodies of a call, a scan or a cond.
      carried: for each carry of a scan, the uses that it is made of and that all examples share.
      started: for each carry of a scan that starts with what all examples share, but does not stay
        so, the axis of the examples.
      marks: what is known of each variable.
      entries: by the place of an operand, the use that is the operand itself.
    """

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr
        self.taps: dict[int, list[int]] = {}
        self.meetings: dict[int, Meeting] = {}
        self.children: dict[int, tuple[Node, ...]] = {}
        self.carried: dict[int, list[frozenset[int]]] = {}
        self.started: dict[int, dict[int, int]] = {}
        self.marks: dict[Any, Mark] = {}
        self.entries: dict[int, int] = {}

    def uses(self) -> list[int]:
        """Numbers of all uses in and below."""
        below = [use for nodes in self.children.values() for node in nodes for use in node.uses()]
        return [use for uses in self.taps.values() for use in uses] + below

    def clear(self):
        """Forgets what is to be done."""
        for noted in (self.taps, self.meetings, self.children, self.carried, self.started):
            noted.clear()


@dataclasses.dataclass
class Found:
    """One use of a parameter leaf as the walk finds it.

    Attributes:
      kind: the kind of layer that this use alone would be, see `optax_curv.layers.KINDS`.
      view: the leaf as the equation sees it.
      operands: variables the tap needs: the layer's input, then coefficients.
      stack: pieces of the leaf that number the slices, each with a factor pair of its own.
      inputs: pieces of the leaf along its inputs.
      outputs: pieces of the leaf along its outputs.
      input_segments: roles of the axes of the input.
      output_segments: roles of the axes of the output.
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
      divisors: how many of the last operands divide.
      column: which entry of the index vectors of a look-up is the row number; None: it comes alone.
      clips: whether row numbers outside the table are moved to its border, as the look-up does.
      made: the kernel as it meets the input, a variable, where it is made of the leaf entry by
        entry.
      cuts: which parts of the leaf's inputs and outputs it uses, see `parts`.
      untold: why its gradients of single examples cannot be told apart, or None.
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
    divisors: int = 0
    column: int | None = 0
    clips: bool = False
    made: Any = None
    cuts: tuple[Cut, ...] = ()
    untold: str | None = None


class Place(Protocol):
    """The place of an equation in the walk, with what a primitive's rule may ask and tell there."""

    @property
    def loops(self) -> tuple[int, ...]:
        """Lengths of the scans around the equation, outermost first."""
        ...

    @property
    def found(self) -> list[Found]:
        """All uses found so far, by number."""
        ...

    def once(self, variable: Any) -> bool:
        """Whether a variable is read only once."""
        ...

    def group(self, output: View) -> list[int]:
        """Numbers of the uses that made the output which a view belongs to."""
        ...

    def examples(self, batch: Batch | None, segments: Segments) -> Batch | None:
        """Where the examples lie in the rows of a use, if in its output they lie at `batch`."""
        ...

    def add(self, uses: list[Found]) -> View:
        """Records the uses that the equation makes, and returns its result as their output."""
        ...


def changes(place: Place, view: View, others: list[Mark]) -> bool:
    """Whether what is made of a leaf and of others changes in a scan that shares the leaf."""
    shared = set(range(len(place.loops))).difference(slot.loop for slot in view.slots)
    return bool(shared) and any(mark.varies for mark in others)
