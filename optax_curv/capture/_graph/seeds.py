"""Uses whose input all examples share, and how far their output is followed.

A derivative by a network's input starts from a direction that all examples share, which the kernel
meets once for the whole batch, and the gradient at its output is a sum over examples. We follow the
layer's output to the first equation that combines it with values of single examples. If the
examples lie along one of the output's own axes there, that axis is the batch axis. Otherwise the
equations in between, which are linear, run again with one copy of the output for each example; such
arrays are called *widened* (see `replay`).
"""

from optax_curv.capture._graph import views
from optax_curv.capture._graph.jaxpr import KEEP_ENTRIES, broadcast, maker, shape_of
from optax_curv.capture._graph.marks import REPEATED, Batch, Found, Mark, Node, Seed

ENTRYWISE = {"mul", "add", "sub", "add_any", "select_n"}
LINEAR = (
    ENTRYWISE
    | KEEP_ENTRIES
    | {"dot_general", "conv_general_dilated", "gather", "neg", "div", "reduce_sum"}
    | {"split", "stack", "unstack", "concatenate", "pad"}
)


class Seeds:
    """The uses whose input is the same for all examples, and what becomes of them."""

    def __init__(self, batch: int):
        self.batch = batch
        self.rows: dict[int, float] = {}  # number of the row that turned out to hold the examples
        self.lost: set[int] = set()  # uses of which nothing can be told
        self.together: list[set[int]] = []  # groups that are widened together or not at all

    def lose(self, marks) -> list[Mark]:
        """Returns marks of variables that are followed no further."""
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
        self,
        node: Node,
        index: int,
        given: list[Mark],
        batch: Batch | None,
        found: list[Found],
        new: range,
    ) -> tuple[Seed, ...]:
        """Returns the seeds of an equation's results; notes where seeds meet examples.

        Args:
          node: the jaxpr of the equation.
          index: its number.
          given: marks of its operands.
          batch: where the examples lie in its first result.
          found: all uses.
          new: numbers of those that the equation makes.
        """
        eqn = node.jaxpr.jaxpr.eqns[index]
        seeds = [seed for mark in given for seed in mark.seeds]
        shape = shape_of(eqn.outvars[0])
        if all(mark.batch is None for mark in given):
            if eqn.primitive.name not in LINEAR:
                self.lose(given)
                seeds = []
            alone = len(eqn.invars) == 1
            seen = {
                seed.use: views.moved(eqn, seed.view) if alone and seed.view else None
                for seed in seeds
            }
            seen |= {use: views.whole(0, shape) for use in new if found[use].examples is None}
            if seen:
                self.together.append(set(seen))
            return tuple(Seed(use, view) for use, view in seen.items())
        axis = batch.axis if seeds and batch is not None and batch.inner == 1 else None
        if axis is None or eqn.primitive.name not in ENTRYWISE or shape[axis] != self.batch:
            self.lose(given)
            return ()
        node.meetings[index] = axis
        for variable, mark in zip(eqn.invars, given, strict=True):
            if len(shape_of(variable)) != len(shape):
                self.lose([mark])
            elif shape_of(variable)[axis] != 1 and axis not in _repeats(node, variable):
                self._along(axis, mark, found)
        return ()

    def _along(self, axis: int, mark: Mark, found: list[Found]):
        """Notes that the examples lie along this axis of a variable."""
        for use, view in mark.seeds:
            pieces = view.axes[axis] if view is not None else ()
            if len(pieces) == 1 and pieces[0][0] > 0:
                role, row = views.role_at(found[use].output_segments, pieces[0][0])
                if role == "row":
                    self.rows[use] = row
        self.lose([mark])

    def settle(self, found: list[Found], results: list[Mark]):
        """Gives the uses their examples, once the marks of the loss's results are known."""
        self.lose(results)
        size = -1
        while size != len(self.lost):
            size = len(self.lost)
            self.lost |= set().union(*(group for group in self.together if group & self.lost))
        for use in set().union(*self.together):
            one = found[use]
            if use not in self.lost:
                one.output_segments = (("row", ((REPEATED, self.batch),)), *one.output_segments)
                one.examples = Batch(REPEATED)
                inputs, outputs = one.windows
                one.windows = (inputs, outputs and (outputs[0] + 1, *outputs[1:]))
            elif use in self.rows:
                one.examples = Batch(self.rows[use])


def _repeats(node: Node, variable) -> set[int]:
    """Axes along which a `broadcast_in_dim` made this variable repeat itself."""
    eqn = maker(node.jaxpr.jaxpr, variable)
    if eqn is None or eqn.primitive.name != "broadcast_in_dim":
        return set()
    return set(range(len(broadcast(eqn).shape))) - set(broadcast(eqn).dimensions)
