"""What the walk over a loss remembers: marks on variables, uses of parameters, and where in the loss they are."""

import dataclasses
from typing import NamedTuple

from jax.extend import core

from optax_curv.capture.layouts import Piece, View

Segments = tuple[tuple[str, tuple[Piece, ...]], ...]  # see layouts.arrangement


class Batch(NamedTuple):
    """Where the examples lie in an array computed from them: along an axis, a scan, or nobody knows."""

    axis: int | None
    inner: int = 1  # neighbouring entries of the axis that are one example's; 0: unknown, the size of an axis must tell
    loop: int | None = None  # depth of the scan that walks from example to example


REPEATED = -1.0  # number of the row of an output that is repeated for every example


class Seed(NamedTuple):
    """A use whose input is the same for all examples, as a variable linear in its output remembers it."""

    use: int
    view: View | None  # the variable as a view of that output


class Examples(NamedTuple):
    """What tells the examples apart in the rows of a layer, if anything: a row (by number), or a scan."""

    row: float | None = None
    inner: int = 1
    loop: int | None = None


class Mark(NamedTuple):
    """What is known of one variable.

    Attributes:
      leaves: views of parameter leaves, concatenated along `joined`.
      output: the variable as a view of a layer's output (its source numbers a group of uses), to find the bias.
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


class Node:
    """A jaxpr inside the loss, and by the index of its equations what is to be done there."""

    def __init__(self, jaxpr: core.ClosedJaxpr):
        self.jaxpr = jaxpr
        self.taps: dict[int, list[int]] = {}  # uses whose output is the result
        self.meetings: dict[int, int] = {}  # axis of the examples where what they share meets them
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
      windows: (axis, start, size) of the part of the input and of the output that belongs to this leaf, or None.
      conv: what `conv_general_dilated_patches` needs.
      loops: (length, whether the leaf is sliced along it) of each scan around the use, outermost first.
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
    examples: Examples | None
    windows: tuple = (None, None)
    conv: tuple | None = None
    loops: tuple[tuple[int, bool], ...] = ()
    branch: tuple[int, int] | None = None
    partner: int | None = None
    sign: float = 1.0
    choice: int | None = None
    far: tuple[Piece, ...] = ()
