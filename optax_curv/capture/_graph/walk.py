"""The walk over a loss that finds the uses of its parameters.

`Walk.node` goes through the equations of a jaxpr in order and gives every variable a `Mark`. It
enters calls, branches and scans; the body of a scan is walked until the marks of its carry no
longer change.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from optax_curv.capture._graph import views
from optax_curv.capture._graph.borders import (
    after_step,
    any_varies,
    at_boundary,
    carried,
    either,
    slice_of,
    unsliced,
)
from optax_curv.capture._graph.examples import propagate
from optax_curv.capture._graph.jaxpr import (
    bodies,
    counters_carried,
    is_literal,
    is_range,
    same_integers,
    scan_length,
    scan_sizes,
    shape_of,
    while_loop,
)
from optax_curv.capture._graph.marks import (
    LOST,
    NOTHING,
    Batch,
    Found,
    Mark,
    Node,
    Seed,
    Segments,
)
from optax_curv.capture._graph.primitives import described, is_complex, why_not
from optax_curv.capture._graph.seeds import Seeds, repeated_axes
from optax_curv.capture._graph.views import View


@dataclasses.dataclass(frozen=True)
class Around:
    """The surroundings of the jaxpr that is walked.

    Attributes:
      loops: lengths of the scans, outermost first.
      example_loop: depth of the scan that walks from example to example, or None.
      branch: (number of the cond, number of the branch), or None.
    """

    loops: tuple[int, ...] = ()
    example_loop: int | None = None
    branch: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class _At:
    """The equation where the walk stands; see `marks.Place`."""

    walk: "Walk"
    around: Around
    node: Node
    index: int
    counts: collections.Counter

    @property
    def eqn(self) -> Any:
        return self.node.jaxpr.jaxpr.eqns[self.index]

    @property
    def loops(self) -> tuple[int, ...]:
        return self.around.loops

    @property
    def found(self) -> list[Found]:
        return self.walk.found

    def once(self, variable: Any) -> bool:
        return self.counts[variable] == 1

    def group(self, output: View) -> list[int]:
        return self.walk.groups[output.source]

    def examples(self, batch: Batch | None, segments: Segments) -> Batch | None:
        loop, count = self.around.example_loop, self.walk.batch
        if batch is None:
            return None if loop is None else Batch(None, loop=loop)
        if batch.loop is not None or batch == LOST:
            return batch
        rows = {
            number: size for role, pieces in segments if role == "row" for number, size in pieces
        }
        if batch.axis is not None:
            fits = batch.axis in rows and rows[batch.axis] % (count * batch.inner) == 0
            return batch if fits else LOST
        row = next((row for row, size in rows.items() if size == count), next(iter(rows), None))
        if row is None or rows[row] % count:
            return LOST
        return Batch(row, rows[row] // count)

    def add(self, uses: list[Found]) -> View:
        walk, group = self.walk, []
        for use in uses:
            stacked = {slot.loop for slot in use.view.slots}
            use.loops = tuple((length, depth in stacked) for depth, length in enumerate(self.loops))
            use.branch = self.around.branch
            group.append(len(walk.found))
            self.node.taps.setdefault(self.index, []).append(len(walk.found))
            walk.found.append(use)
        walk.groups.append(group)
        return views.whole(len(walk.groups) - 1, shape_of(self.eqn.outvars[0]))


class Walk:
    """Collects the uses of parameter leaves.

    Args:
      paths: key paths of the leaves, for messages.
      batch: number of examples.

    Attributes:
      found: the uses, in order.
      groups: numbers of the uses that one equation makes.
      refused: why leaves met the examples in a way no layer describes.
      seeds: uses whose input all examples share.
      kernels: leaves that enter a product or convolution with the examples, also as a part.
      made: those of them that only enter as a part.
      queries: leaves, repeated or with many axes, that meet a kernel before the examples.
      stopped: leaves that enter `stop_gradient`, also as a part.
    """

    def __init__(self, paths: list[str], batch: int):
        self.paths, self.batch = paths, batch
        self.found: list[Found] = []
        self.groups: list[list[int]] = []
        self.refused: dict[int, str] = {}
        self.seeds = Seeds(batch)
        self.kernels: set[int] = set()
        self.made: set[int] = set()
        self.queries: set[int] = set()
        self.stopped: set[int] = set()

    def leaf_of(self, number: int) -> int:
        """The leaf of a use."""
        return self.found[number].view.source

    def enter(self, node: Node, leaf: int, shape: tuple[int, ...]) -> Mark:
        """Takes a whole leaf as a use of its own, whose output is the leaf; returns its mark.

        What is made of the leaf is then followed, and widened, as what is made of any output that
        all examples share. So every function of a leaf that is not a kernel has exact gradients of
        single examples.
        """
        view, number = views.whole(leaf, shape), len(self.found)
        segments = tuple(("feature", axis) for axis in view.axes)
        outputs = tuple(piece for axis in view.axes for piece in axis)
        self.found.append(Found("shift", view, (), (), (), outputs, (), segments, examples=None))
        self.groups.append([number])
        node.entries[leaf] = number
        self.seeds.before[number] = set()
        self.seeds.entries.add(number)
        return Mark(seeds=(Seed(number, view),))

    def node(
        self,
        node: Node,
        marks: list[Mark],
        constants: list[Mark] | tuple[()] = (),
        around: Around = Around(),
    ) -> list[Mark]:
        """Returns marks of the results of a node's jaxpr, given those of operands and constants."""
        jaxpr = node.jaxpr.jaxpr
        counts = collections.Counter(
            v for eqn in jaxpr.eqns for v in eqn.invars if not is_literal(v)
        )
        counts.update(v for v in jaxpr.outvars if not is_literal(v))
        env: dict[Any, Mark] = dict(zip(jaxpr.invars, marks, strict=True))
        env.update(zip(jaxpr.constvars, constants, strict=False))

        def read(variable):
            return NOTHING if is_literal(variable) else env.get(variable, NOTHING)

        for index, eqn in enumerate(jaxpr.eqns):
            given = [read(v) for v in eqn.invars]
            if any(mark is not NOTHING for mark in given):
                at = _At(self, around, node, index, counts)
                env.update(zip(eqn.outvars, self._equation(at, given), strict=True))
        node.marks = env
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, at: _At, given: list[Mark]) -> list[Mark]:
        eqn = at.eqn
        if eqn.primitive.name == "stop_gradient" or not eqn.outvars:
            self.stopped |= _leaves(given)
            return [Mark(batch=given[0].batch) for _ in eqn.outvars]
        nodes = tuple(map(Node, bodies(eqn)))
        if nodes:
            given = [at_boundary(mark) for mark in given]
            enter = {"scan": self._scan, "cond": self._cond}.get(eqn.primitive.name, self._call)
            results = enter(at, given, nodes)
            at.node.children[at.index] = nodes
            return results
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            if all(mark.leaves for mark in given):
                self.queries |= {view.source for view in given[0].leaves if _is_query(view)}
            elif any(mark.leaves for mark in given) and all(mark.batch is None for mark in given):
                self.queries |= _made_queries(eqn, given)
            elif any(mark.batch is not None for mark in given):
                self.kernels |= _leaves(given)
                self.made |= {leaf for mark in given for leaf, _ in mark.derived}
        batches = propagate(eqn, [mark.batch for mark in given], self.batch)
        results, before = None, len(self.found)
        if any(mark.leaves or mark.output for mark in given) and not is_complex(eqn.outvars):
            results = described(at, eqn, given)
        if results is None:
            self._refuse_while(at, given)
            results = [Mark(derived=_derived(eqn, given))] * len(eqn.outvars)
        elif any(mark.derived for mark in [*given, *results]):
            derived = tuple({entry for mark in [*given, *results] for entry in mark.derived})
            results = [mark._replace(derived=derived) for mark in results]
            for use in self.found[before:]:  # of a leaf that also meets the examples another way
                if use.view.source in dict(derived):
                    self.refused.setdefault(use.view.source, dict(derived)[use.view.source])
        new = range(before, len(self.found))
        followed = self.seeds.follow(at.node, at.index, given, batches[0], self.found, new)
        if followed.meeting is not None:
            at.node.meetings[at.index] = followed.meeting
        counting = same_integers(at.node.jaxpr.jaxpr, eqn)
        counter = None if counting is None else given[counting].counter
        adds = _adds_penalty(at, given)
        return [
            self._met(
                adds,
                mark._replace(
                    batch=batch, seeds=followed.seeds, counter=counter, varies=any_varies(given)
                ),
            )
            for mark, batch in zip(results, batches, strict=True)
        ]

    def _met(self, adds_penalty: bool, mark: Mark) -> Mark:
        """Refuses the leaves of a result that depends on the examples too, but for a penalty."""
        if mark.batch is None or adds_penalty:
            return mark
        for leaf, reason in mark.derived:
            self.refused.setdefault(leaf, reason)
        return mark._replace(derived=())

    def _call(self, at: _At, given: list[Mark], nodes) -> list[Mark]:
        return [at_boundary(mark) for mark in self.node(nodes[0], given, (), at.around)]

    def _cond(self, at: _At, given: list[Mark], nodes) -> list[Mark]:
        number, columns = len(self.found), []
        operands = self.seeds.lose(given)[1:]
        for k, node in enumerate(nodes):
            around = dataclasses.replace(at.around, branch=at.around.branch or (number, k))
            results = self.seeds.lose(self.node(node, operands, (), around))
            columns.append([at_boundary(mark) for mark in results])
        return [either(marks) for marks in zip(*columns, strict=True)]

    def _scan(self, at: _At, given: list[Mark], nodes) -> list[Mark]:
        eqn, body, depth = at.eqn, nodes[0], len(at.loops)
        consts, carry = scan_sizes(eqn)
        counted, unchanged = counters_carried(eqn), _unchanged(body.jaxpr.jaxpr, consts, carry)
        counting = Mark(counter=depth)
        state = [
            counting if k in counted else mark if k in unchanged else carried(mark)
            for k, mark in enumerate(given[consts : consts + carry])
        ]
        slices = self._slices(at, given, consts + carry)
        by_example = any(mark.batch is not None and mark.batch.loop == depth for mark in slices)
        around = dataclasses.replace(
            at.around,
            loops=(*at.loops, scan_length(eqn)),
            example_loop=depth if by_example else at.around.example_loop,
        )

        def step(state):
            return self.node(body, [*given[:consts], *state, *slices], (), around)

        state, results = self._until_stable(state, counted | unchanged, body, step, depth)
        self._note_carry(at, given[consts : consts + carry], state, results)
        state = [NOTHING if k in counted else mark for k, mark in enumerate(state)]
        return state + [unsliced(mark, depth) for mark in results[carry:]]

    def _slices(self, at: _At, given: list[Mark], first: int) -> list[Mark]:
        """Marks of what a scan slices, in one step."""
        depth, jaxpr = len(at.loops), at.node.jaxpr.jaxpr
        return [
            Mark(counter=depth)
            if is_range(jaxpr, variable)
            else slice_of(mark, depth, by_example=scan_length(at.eqn) == self.batch)
            for variable, mark in zip(at.eqn.invars[first:], given[first:], strict=True)
        ]

    def _until_stable(
        self, state: list[Mark], fixed: set[int], body: Node, step: Callable, depth: int
    ) -> tuple[list[Mark], list[Mark]]:
        """Walks a scan's body until the marks of its carry, which only grow, no longer change."""
        found, groups, refused = len(self.found), len(self.groups), dict(self.refused)
        seeds = self.seeds.copy()
        met: dict[int, str] = {}
        while True:
            body.clear()
            results = step(state)
            grown = [
                old if k in fixed else either((old, after_step(new, depth)))
                for k, (old, new) in enumerate(zip(state, results, strict=False))
            ]
            for mark in grown:
                met |= dict(mark.derived) if mark.batch is not None else {}
            grown = [
                mark if mark.batch is None else mark._replace(derived=(), seeds=())
                for mark in grown
            ]
            if grown == state:
                self.refused = met | self.refused
                return state, results
            state = grown
            del self.found[found:], self.groups[groups:]
            self.seeds = seeds.copy()
            self.refused = dict(refused)

    def _note_carry(
        self, at: _At, started: list[Mark], state: list[Mark], results: list[Mark]
    ) -> None:
        """Notes what a scan carries that all examples share, at its start or at every step.

        Args:
          at: the scan.
          started: marks of what the carry starts with.
          state: marks of the carry, which hold at every step.
          results: marks of what a step makes, the next carry first.
        """
        variables, count = at.eqn.outvars, self.batch
        held, axes = at.node.carried, at.node.started
        held[at.index] = [frozenset(seed.use for seed in mark.seeds) for mark in state]
        axes[at.index] = {}
        for k, (first, mark, after) in enumerate(zip(started, state, results, strict=False)):
            if mark.batch is None:
                continue
            self.seeds.lose([after])
            axis, shape = mark.batch.axis, shape_of(variables[k])
            if axis is None or mark.batch.inner != 1 or shape[axis] != count:
                self.seeds.lose([first])
            elif first.seeds:
                axes[at.index][k] = axis
                self.seeds.meet(first, axis, self.found)

    def _refuse_while(self, at: _At, given: list[Mark]):
        """Raises where a while loop surrounds a layer."""
        if at.eqn.primitive.name != "while" or not any(mark.leaves for mark in given):
            return
        loop, before = while_loop(at.eqn), len(self.found)
        self.seeds.lose(given)
        given = given[loop.condition_consts :]
        state = [mark._replace(output=None) for mark in given[loop.body_consts :]]
        self.node(Node(loop.body), given[: loop.body_consts] + state, (), at.around)
        if len(self.found) > before:
            raise ValueError(
                "value_grad_and_curvature: a while_loop around the layer that uses "
                f"{self.paths[self.found[before].view.source]}: reverse-mode differentiation does "
                "not pass through it; use jax.lax.scan, or fori_loop with a number of steps known "
                "at trace time."
            )


def _is_query(view: View) -> bool:
    """Whether a leaf that meets a kernel is no kernel itself, as in x @ (a @ b)."""
    return len(view.axes) > 2 or any(stride == 0 for axis in view.axes for stride, _ in axis)


def _made_queries(eqn, given: list[Mark]) -> set[int]:
    """Leaves of which rows with many axes are made that meet a kernel before the examples."""
    pairs = zip(eqn.invars, given, strict=True)
    rows = [mark for v, mark in pairs if not mark.leaves and len(shape_of(v)) > 2]
    return {leaf for mark in rows for leaf, _ in mark.derived}


def _leaves(marks: list[Mark]) -> set[int]:
    """All leaves that variables are views of, or made of."""
    seen = {view.source for mark in marks for view in mark.leaves}
    return seen | {leaf for mark in marks for leaf, _ in mark.derived}


def _adds_penalty(at: _At, given: list[Mark]) -> bool:
    """Whether an equation adds numbers that leaves make to losses of examples, the same to all."""
    if at.eqn.primitive.name not in ("add", "sub", "add_any"):
        return False
    jaxpr = at.node.jaxpr.jaxpr
    return all(
        len(repeated_axes(jaxpr, variable)) == len(shape_of(variable))
        for variable, mark in zip(at.eqn.invars, given, strict=True)
        if (mark.derived or mark.leaves) and mark.batch is None
    )


def _derived(eqn, given: list[Mark]) -> tuple[tuple[int, str], ...]:
    """Leaves that are now used in a way no layer describes, with the reason."""
    entries = dict(entry for mark in given for entry in mark.derived)
    several = sum(bool(mark.leaves or mark.derived) for mark in given) > 1
    for mark in given:
        entries = {view.source: why_not(eqn, view, several) for view in mark.leaves} | entries
    return tuple(entries.items())


def _unchanged(body, consts: int, carry: int) -> set[int]:
    """Places of a scan's carry that every step hands on as they are."""
    return {k for k in range(carry) if body.invars[consts + k] is body.outvars[k]}
