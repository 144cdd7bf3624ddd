"""The walk over a loss that finds uses of parameters, and the run of it with a tap at each."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from optax_curv.capture._graph import views as layouts
from optax_curv.capture._graph.jaxpr import (
    bodies,
    counters_carried,
    inlined,
    is_literal,
    is_range,
    run,
    run_call,
    run_scan,
    same_integers,
    scan_sizes,
    shape_of,
)
from optax_curv.capture._graph.marks import (
    LOST,
    NOTHING,
    REPEATED,
    Batch,
    Found,
    Mark,
    Node,
    Seeds,
    is_widened,
    known_batch,
    propagate,
    run_widened,
)
from optax_curv.capture._graph.primitives import RULES, is_complex, why_not
from optax_curv.capture._graph.uses import Use


class Walk:
    """Collects the uses of parameter leaves."""

    def __init__(self, paths: list[str], batch: int):
        self.paths, self.batch = paths, batch
        self.uses: list[Found] = []
        self.groups: list[list[int]] = []  # numbers of the uses that one equation makes
        self.refused: dict[int, str] = {}  # why leaves met the examples in a way no layer describes
        self.loops: tuple[int, ...] = ()  # lengths of the scans around the current equation
        self._example_loop: int | None = None
        self._branch: tuple[int, int] | None = None
        self._counts: collections.Counter = collections.Counter()
        self._node: Any = None
        self._index = 0
        self.seeds = Seeds(batch)

    def once(self, variable) -> bool:
        """Whether a variable is read only once."""
        return self._counts[variable] == 1

    def examples(self, batch: Batch | None, segments) -> Batch | None:
        """Where they lie in the rows of a layer whose input has them there."""
        if batch is None:
            return None if self._example_loop is None else Batch(None, loop=self._example_loop)
        if batch.loop is not None or batch == LOST:
            return batch
        rows = {
            number: size for role, pieces in segments if role == "row" for number, size in pieces
        }
        if batch.axis is not None:
            fits = batch.axis in rows and rows[batch.axis] % (self.batch * batch.inner) == 0
            return batch if fits else LOST
        row = next(
            (row for row, size in rows.items() if size == self.batch), next(iter(rows), None)
        )
        if row is None or rows[row] % self.batch:
            return LOST
        return Batch(row, rows[row] // self.batch)

    def add_uses(self, uses: list[Found], eqn) -> layouts.View:
        """Records the uses one equation makes; its result is viewed as their output."""
        self.groups.append([])
        for found in uses:
            stacked = {slot.loop for slot in found.view.slots}
            found.loops = tuple(
                (length, depth in stacked) for depth, length in enumerate(self.loops)
            )
            found.branch = self._branch
            self.groups[-1].append(len(self.uses))
            self._node.taps.setdefault(self._index, []).append(len(self.uses))
            self.uses.append(found)
        return layouts.whole(len(self.groups) - 1, shape_of(eqn.outvars[0]))

    def is_bias(self, number: int, output: layouts.View, shift: Found) -> bool:
        """Whether a shift lies along the outputs and the stack of a use; notes the order of its pieces."""
        kernel = self.uses[number]
        slots = [
            [(s.size, s.index, s.loop) for s in view.slots] for view in (kernel.view, shift.view)
        ]
        pairs = layouts.matched(output, shift.view)
        if slots[0] != slots[1] or kernel.kind == "embedding" or pairs is None:
            return False
        order = {}
        for (stride, size), (bias_stride, _) in pairs:
            role, kernel_stride = layouts.role_at(kernel.output_segments, stride)
            if stride == 0 or bias_stride < 0 or (role == "row") != (bias_stride == 0):
                return False
            if role != "row":
                if kernel_stride < 0:
                    return False
                order[role != "stack", -kernel_stride] = bias_stride, size
        if layouts.size_of(order.values()) != layouts.size_of((*kernel.stack, *kernel.outputs)):
            return False
        shift.stack, shift.outputs = (
            tuple(order[key] for key in sorted(order) if key[0] == below) for below in (False, True)
        )
        return True

    def node(self, node: Node, marks: list[Mark], constants=()) -> list[Mark]:
        """Marks of the results of a node's jaxpr, given those of its operands and constants."""
        outer, jaxpr = (self._counts, self._node, self._index), node.jaxpr.jaxpr
        counts = collections.Counter(
            v for eqn in jaxpr.eqns for v in eqn.invars if not is_literal(v)
        )
        counts.update(v for v in jaxpr.outvars if not is_literal(v))
        env: dict[Any, Mark] = dict(zip(jaxpr.invars, marks, strict=True))
        env.update(zip(jaxpr.constvars, constants, strict=False))

        def read(variable):
            return NOTHING if is_literal(variable) else env.get(variable, NOTHING)

        for index, eqn in enumerate(jaxpr.eqns):
            self._counts, self._node, self._index = counts, node, index
            given = [read(v) for v in eqn.invars]
            if any(mark is not NOTHING for mark in given):
                env.update(zip(eqn.outvars, self._equation(eqn, given, node, index), strict=True))
        self._counts, self._node, self._index = outer
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn, given, node, index):
        name = eqn.primitive.name
        if name == "stop_gradient" or not eqn.outvars:
            self.seeds.lose(given)
            return [Mark(batch=given[0].batch) for _ in eqn.outvars]
        nodes = tuple(map(Node, bodies(eqn)))
        if nodes:
            given = [self._at_boundary(mark) for mark in given]
            enter = {"scan": self._scan, "cond": self._cond}.get(name, self._call)
            results = enter(eqn, given, nodes)
            node.children[index] = nodes
            return results
        batches = propagate(eqn, [mark.batch for mark in given], self.batch)
        results, before = None, len(self.uses)
        if (
            any(mark.leaves or mark.output for mark in given)
            and name in RULES
            and not is_complex(eqn.outvars)
        ):
            results = RULES[name](self, eqn, given)
        if results is None:
            self._hidden(eqn, given)
            results = [Mark(derived=self._derived(eqn, given))] * len(eqn.outvars)
        elif any(mark.derived for mark in given):
            derived = tuple({entry for mark in given for entry in mark.derived})
            results = [mark if mark.leaves else mark._replace(derived=derived) for mark in results]
        seeds = self.seeds.follow(
            node, index, given, batches[0], self.uses, range(before, len(self.uses))
        )
        counting = same_integers(node.jaxpr.jaxpr, eqn)
        counter = None if counting is None else given[counting].counter
        return [
            self._met(eqn, mark._replace(batch=batch, seeds=seeds, counter=counter))
            for mark, batch in zip(results, batches, strict=True)
        ]

    def _derived(self, eqn, given):
        """Leaves that are now used in a way no layer describes."""
        entries = dict(entry for mark in given for entry in mark.derived)
        several = sum(bool(mark.leaves or mark.derived) for mark in given) > 1
        for mark in given:
            entries = {view.source: why_not(eqn, view, several) for view in mark.leaves} | entries
        return tuple(entries.items())

    def _met(self, eqn, mark):
        """Refuses the leaves of a result that depends on the examples too, but for an added penalty."""
        if mark.batch is None or eqn.primitive.name in ("add", "sub", "add_any"):
            return mark
        for leaf, reason in mark.derived:
            self.refused.setdefault(leaf, reason)
        return mark._replace(derived=())

    def _at_boundary(self, mark):
        """What a variable keeps when it enters a body: coefficients are variables of the outer jaxpr."""
        if any(view.coefficients for view in mark.leaves):
            mark = _as_derived(
                mark, "it is multiplied element-wise before it enters a function call"
            )
        return mark._replace(output=None)

    def _call(self, eqn, given, nodes):
        return [self._at_boundary(mark) for mark in self.node(nodes[0], given)]

    def _cond(self, eqn, given, nodes):
        outer, number = self._branch, len(self.uses)
        columns, given = [], self.seeds.lose(given)
        for k, node in enumerate(nodes):
            self._branch = outer or (number, k)
            columns.append(
                [self._at_boundary(mark) for mark in self.seeds.lose(self.node(node, given[1:]))]
            )
        self._branch = outer
        return [_either(marks) for marks in zip(*columns, strict=True)]

    def _scan(self, eqn, given, nodes):
        params, body, given = eqn.params, nodes[0].jaxpr.jaxpr, self.seeds.lose(given)
        consts, carry = scan_sizes(eqn)
        unchanged = {k for k in range(carry) if body.invars[consts + k] is body.outvars[k]}
        counted = counters_carried(eqn)
        outer, depth, counting = self._example_loop, len(self.loops), Mark(counter=len(self.loops))
        state = [
            counting if k in counted else mark if k in unchanged else _carried(mark)
            for k, mark in enumerate(given[consts : consts + carry])
        ]
        slices = [
            counting
            if is_range(self._node.jaxpr.jaxpr, variable)
            else self._slice(mark, params["length"])
            for variable, mark in zip(
                eqn.invars[consts + carry :], given[consts + carry :], strict=True
            )
        ]
        if any(mark.batch is not None and mark.batch.loop == depth for mark in slices):
            self._example_loop = depth
        self.loops = (*self.loops, params["length"])
        saved, met = (len(self.uses), len(self.groups), dict(self.refused)), {}
        while (
            True
        ):  # until the marks of the carry no longer change: `batch` and `derived` only grow
            for noted in (nodes[0].taps, nodes[0].meetings, nodes[0].children):
                noted.clear()
            results = self.seeds.lose(self.node(nodes[0], [*given[:consts], *state, *slices]))
            grown = [
                old if k in unchanged or old is counting else _either((old, self._after_step(new)))
                for k, (old, new) in enumerate(zip(state, results[:carry], strict=True))
            ]
            met |= {
                leaf: reason
                for mark in grown
                if mark.batch is not None
                for leaf, reason in mark.derived
            }
            grown = [mark if mark.batch is None else mark._replace(derived=()) for mark in grown]
            if grown == state:
                break
            state = grown
            del self.uses[saved[0] :], self.groups[saved[1] :]
            self.seeds.forget(saved[0])
            self.refused = dict(saved[2])
        self.refused = met | self.refused
        self.loops, self._example_loop = self.loops[:-1], outer
        state = [NOTHING if mark is counting else mark for mark in state]
        return state + [self._unsliced(mark) for mark in results[carry:]]

    def _after_step(self, mark):
        """The mark of a state after a step; one that runs from example to example mixes them."""
        mixed = mark.batch is not None and mark.batch.loop == len(self.loops) - 1
        return mark._replace(leaves=(), output=None, batch=LOST if mixed else mark.batch)

    def _slice(self, mark, length):
        """The mark of one slice of the leading axis."""
        sliced = [layouts.enter_loop(view, len(self.loops)) for view in mark.leaves]
        leaves = tuple(view for view in sliced if view is not None)
        batch = mark.batch
        if batch is not None and batch.axis is not None:
            one = batch.inner == 1 and length == self.batch
            first = Batch(None, loop=len(self.loops)) if one else LOST
            batch = first if batch.axis == 0 else batch._replace(axis=batch.axis - 1)
        if len(leaves) != len(mark.leaves) or len(leaves) > 1:
            return Mark(batch=batch, derived=_carried(mark).derived)
        return Mark(leaves=leaves, batch=batch, derived=mark.derived)

    def _unsliced(self, mark):
        """The mark of the slices stacked again."""
        batch = mark.batch
        if batch is not None and batch.axis is not None:
            batch = batch._replace(axis=batch.axis + 1)
        elif batch is not None and batch.loop == len(self.loops):
            batch = Batch(0)
        return Mark(batch=batch, derived=_carried(mark).derived)

    def _hidden(self, eqn, given):
        """Refuses a while loop around a layer."""
        if eqn.primitive.name != "while" or not any(mark.leaves for mark in given):
            return
        before, consts = len(self.uses), eqn.params["body_nconsts"]
        self.seeds.lose(given)
        given = given[eqn.params["cond_nconsts"] :]
        state = [mark._replace(output=None) for mark in given[consts:]]
        self.node(Node(inlined(eqn.params["body_jaxpr"])), given[:consts] + state)
        if len(self.uses) > before:
            raise ValueError(
                "value_grad_and_curvature: a while_loop around the layer that uses "
                f"{self.paths[self.uses[before].view.source]}: reverse-mode differentiation does not pass through it; "
                "use jax.lax.scan, or fori_loop with a number of steps known at trace time."
            )


def _as_derived(mark, reason: str):
    """The mark of what is made of its leaves in a way no layer describes."""
    return mark._replace(
        leaves=(), derived=mark.derived + tuple((view.source, reason) for view in mark.leaves)
    )


def _carried(mark):
    return _as_derived(mark, "it is carried through a scan that changes it")


def _either(marks):
    """What holds for a variable that is one of several."""
    leaves = marks[0].leaves if all(mark.leaves == marks[0].leaves for mark in marks) else ()
    derived = dict(entry for mark in marks for entry in mark.derived)
    if not leaves:
        derived |= {
            view.source: "it is one of several results of a cond"
            for mark in marks
            for view in mark.leaves
        }
    return Mark(
        leaves=leaves,
        joined=marks[0].joined,
        batch=known_batch(marks),
        derived=tuple(derived.items()),
    )


@dataclasses.dataclass(frozen=True)
class Tap:
    """What happens at a use when the loss is run again.

    Attributes:
      key: which probe it reads and writes.
      apply: `(output, operands, probe) -> output`, an identity whose derivative writes the probe.
      loops: for each scan around it, whether the probe is sliced along it.
    """

    use: Use
    key: str
    apply: Callable
    loops: tuple[bool, ...]


def run_with_taps(node: Node, operands, taps: dict[int, Tap], probes: dict, depth: int = 0) -> list:
    """Runs a node's jaxpr, `depth` scans deep, with the taps of uses, which read the probes of their keys."""
    jaxpr = node.jaxpr
    env = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, operands, strict=True))

    def read(variable):
        return variable.val if is_literal(variable) else env[variable]

    for index, eqn in enumerate(jaxpr.eqns):
        results = _run_equation(node, index, [read(v) for v in eqn.invars], taps, probes, depth)
        for tap in [taps[number] for number in node.taps.get(index, ()) if number in taps]:
            found = tap.use.found
            if found.examples == Batch(REPEATED) and not is_widened(eqn.outvars[0], results[0]):
                results[0] = jnp.broadcast_to(results[0], (tap.use.batch, *results[0].shape))
            shown = tuple(read(v)[0] if is_widened(v, read(v)) else read(v) for v in found.operands)
            results[0] = tap.apply(results[0], shown, probes[tap.key])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _run_equation(node, index, given, taps, probes, depth):
    """One equation, entered if there are taps inside or it meets widened arrays there."""
    eqn, nodes = node.jaxpr.jaxpr.eqns[index], node.children.get(index, ())
    widened = any(map(is_widened, eqn.invars, given))
    if widened and not nodes:
        return run_widened(node, index, given)
    inside = [taps[use] for node in nodes for use in node.uses() if use in taps]
    if not widened and not inside:
        return run(eqn, given)
    if eqn.primitive.name == "scan":
        sliced = {tap.key: probes[tap.key] for tap in inside if tap.loops[depth]}

        def step(operands, probe):
            return run_with_taps(nodes[0], operands, taps, {**probes, **probe}, depth + 1)

        return run_scan(eqn, given, sliced, step)

    def body_of(node):
        return lambda *operands: run_with_taps(node, operands, taps, probes, depth)

    functions = [body_of(node) for node in nodes]
    if eqn.primitive.name == "cond":
        return list(lax.switch(given[0], functions, *given[1:]))
    return list(run_call(eqn, given, functions[0]))
