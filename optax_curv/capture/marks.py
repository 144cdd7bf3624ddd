"""What the walk over a loss remembers: marks on variables, uses of parameters, and where in the loss they are."""

import dataclasses
from typing import NamedTuple

from jax.extend import core

from optax_curv.capture.layouts import Piece, View

Segments = tuple[tuple[str, tuple[Piece, ...]], ...]  # see layouts.arrangement


class Batch(NamedTuple):
    """Where the examples lie in an array computed from them.

    Attributes:
      axis: axis that holds the examples; None where there is none.
      inner: how many neighbouring entries of that axis belong to one example; 0 where nobody knows and the size of an
        axis has to tell.
      loop: depth of the scan that walks from example to example, or None; with neither, the examples are lost.
    """

    axis: int | None
    inner: int = 1
    loop: int | None = None


REPEATED = -1.0  # number of the row of an output that is repeated for every example


class Seed(NamedTuple):
    """A use whose input is the same for all examples, as a variable linear in its output remembers it.

    Attributes:
      use: its number.
      view: the variable as a view of its output; None where it is none.
    """

    use: int
    view: View | None


class Examples(NamedTuple):
    """What tells the examples apart in the rows of a layer; with neither row nor loop, nothing does.

    Attributes:
      row: number of the row that holds the examples.
      inner: how many of its neighbouring entries belong to one example.
      loop: depth of the scan that walks from example to example.
    """

    row: float | None = None
    inner: int = 1
    loop: int | None = None


class Mark(NamedTuple):
    """What is known of one variable.

    Attributes:
      leaves: views of parameter leaves, concatenated along `joined`; () if the variable is none.
      joined: axis of the concatenation.
      output: the variable as a view of a layer's output (its source numbers a group of uses), to find the bias.
      batch: where the examples lie, None for what does not depend on single examples.
      derived: (leaf, reason) for leaves that entered the variable in a way no layer describes.
      seeds: uses that all examples share, and that the variable comes from.
      counter: depth of the scan whose steps the variable counts, or None.
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
    """A jaxpr inside the loss: which equations have taps, and the nodes of those that are entered.

    Attributes:
      jaxpr: the jaxpr.
      taps: numbers of uses by the index of the equation whose result they tap.
      meetings: axis of the examples by the index of the equation where what they share meets them.
      children: nodes of the bodies by the index of the equation.
    """

    def __init__(self, jaxpr: core.ClosedJaxpr):
        self.jaxpr = jaxpr
        self.taps: dict[int, list[int]] = {}
        self.meetings: dict[int, int] = {}
        self.children: dict[int, tuple[Node, ...]] = {}

    def uses(self) -> list[int]:
        """Numbers of all uses in and below."""
        below = [use for nodes in self.children.values() for node in nodes for use in node.uses()]
        return [use for uses in self.taps.values() for use in uses] + below


@dataclasses.dataclass
class Found:
    """One use of a parameter leaf as the walk finds it.

    Attributes:
      kind: kind of layer, see `Layer`.
      view: the leaf as the equation sees it.
      operands: variables the tap needs: the layer's input, then coefficients.
      stack, inputs, outputs: pieces of the leaf by their role in this equation.
      input_segments, output_segments: roles of the axes of input and output.
      examples: what tells the examples apart; None for a layer whose input is the same for all of them.
      windows: (axis, start, size) of the part of the input and of the output that belongs to this leaf, or None.
      conv: what `conv_general_dilated_patches` needs, or None.
      loops: (length, whether the leaf is sliced along it) of each scan around the use, outermost first.
      branch: (number of the cond, number of the branch) around the use, or None.
      partner: number of the use whose bias this shift is.
      sign: -1 for a subtracted shift.
      choice: number of the case that the shift is of a `select_n`, whose condition is the first operand; None: of none.
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
