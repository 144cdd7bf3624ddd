"""Layers whose input is the same for all examples: the seeds of derivatives inside a loss, tables of positions.

A derivative by a network's input starts from a direction that all examples share, so that the kernel meets it once for
the whole batch, and only the product with an activation tells the examples apart. The gradient at the kernel's output
is then a sum over examples, of which no statistic of single ones can be made. So the output is followed to where it
meets the examples. Where they lie along one of its own axes, that axis holds them. Where not, the loss runs with the
output repeated for every example (`widened`); that is for linear equations only, as those of a derivative are.
"""

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.capture import layouts
from optax_curv.capture.jaxpr import KEEP_ENTRIES, Literal, run, shape_of
from optax_curv.capture.marks import REPEATED, Batch, Examples, Mark, Seed
from optax_curv.capture.views import moved

ENTRYWISE = {"mul", "add", "sub", "add_any", "select_n"}
LINEAR = ENTRYWISE | KEEP_ENTRIES | {"dot_general", "conv_general_dilated", "gather", "neg", "div", "reduce_sum"}
LINEAR |= {"split", "stack", "unstack", "concatenate", "pad"}


class Seeds:
    """The uses whose input is the same for all examples, and what becomes of them.

    Attributes:
      batch: number of examples.
      rows: number of the row of a use that turned out to hold the examples.
      lost: uses of which nothing can be told.
      together: groups of uses that enter one variable, which are widened together or not at all.
    """

    def __init__(self, batch: int):
        self.batch = batch
        self.rows: dict[int, float] = {}
        self.lost: set[int] = set()
        self.together: list[set[int]] = []

    def lose(self, marks) -> list[Mark]:
        """Marks of variables that are followed no further."""
        self.lost |= {seed.use for mark in marks for seed in mark.seeds}
        return [mark._replace(seeds=()) for mark in marks]

    def forget(self, first: int):
        """Drops all uses from this number on."""
        self.rows = {use: row for use, row in self.rows.items() if use < first}
        self.lost = {use for use in self.lost if use < first}
        self.together = [kept for group in self.together if (kept := {use for use in group if use < first})]

    def follow(self, node, index: int, given: list[Mark], batch: Batch | None, uses, new: range) -> tuple[Seed, ...]:
        """The seeds of an equation's results, of which the uses `new` are its own; notes where they meet examples."""
        eqn = node.jaxpr.jaxpr.eqns[index]
        seeds = [seed for mark in given for seed in mark.seeds]
        shape = shape_of(eqn.outvars[0])
        if all(mark.batch is None for mark in given):
            if seeds and eqn.primitive.name not in LINEAR:
                self.lose(given)
                seeds = []
            alone = len(eqn.invars) == 1
            views = {seed.use: moved(eqn, seed.view) if alone and seed.view else None for seed in seeds}
            views |= {use: layouts.whole(0, shape) for use in new if uses[use].examples is None}
            if views:
                self.together.append(set(views))
            return tuple(Seed(use, view) for use, view in views.items())
        axis = batch.axis if batch is not None and batch.inner == 1 else None
        if not seeds or axis is None or eqn.primitive.name not in ENTRYWISE or shape[axis] != self.batch:
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
            self.lost |= {use for group in self.together if group & self.lost for use in group}
        for use in {use for group in self.together for use in group}:
            if use not in self.lost:
                uses[use].output_segments = (("row", ((REPEATED, self.batch),)), *uses[use].output_segments)
                uses[use].examples = Examples(REPEATED)
                inputs, outputs = uses[use].windows
                uses[use].windows = (inputs, outputs and (outputs[0] + 1, *outputs[1:]))
            elif use in self.rows:
                uses[use].examples = Examples(self.rows[use])


def _repeats(node, variable) -> set[int]:
    """Axes along which a `broadcast_in_dim` made this variable repeat itself."""
    for eqn in node.jaxpr.jaxpr.eqns:
        if variable in eqn.outvars and eqn.primitive.name == "broadcast_in_dim":
            return set(range(len(eqn.params["shape"]))) - set(eqn.params["broadcast_dimensions"])
    return set()


def is_widened(variable, value) -> bool:
    """Whether a value has an axis of examples before those of its variable."""
    return not isinstance(variable, Literal) and jnp.ndim(value) > len(shape_of(variable))


def run_widened(node, index: int, given: list) -> list:
    """Runs an equation of which some operands are widened; the results are too, unless it is where they meet."""
    eqn = node.jaxpr.jaxpr.eqns[index]
    wide = [is_widened(v, x) for v, x in zip(eqn.invars, given, strict=True)]
    axis = node.meetings.get(index)
    if axis is None:
        axes = [0 if w else None for w in wide]
        return jax.vmap(lambda *operands: run(eqn, operands), axes)(*given)
    # there the widened operand has one entry, or repeats it
    return run(
        eqn,
        [
            jnp.moveaxis(lax.index_in_dim(x, 0, axis + 1, keepdims=False), 0, axis) if w else x
            for x, w in zip(given, wide, strict=True)
        ],
    )
