"""The loss run again, with a tap at each use and with widened arrays where examples share an input.

A widened array has an axis of examples before those of its variable: one copy for each example.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.capture._graph.jaxpr import (
    is_literal,
    run,
    run_call,
    run_scan,
    scan_sizes,
    shape_of,
)
from optax_curv.capture._graph.marks import REPEATED, Batch, Node
from optax_curv.capture._graph.uses import Use


@dataclasses.dataclass(frozen=True)
class Tap:
    """The measurement at a use when the loss is run again.

    Attributes:
      use: the use.
      key: which probe it reads and writes.
      apply: `(output, operands, probe) -> output`, an identity whose derivative writes the probe.
      loops: for each scan around it, whether the probe is sliced along it.
      on_kernel: whether it is at the made kernel instead, `(kernel) -> kernel`, without a probe.
    """

    use: Use
    key: str
    apply: Callable
    loops: tuple[bool, ...]
    on_kernel: bool = False


def run_with_taps(node: Node, operands, taps: dict[int, Tap], probes: dict, depth: int = 0) -> list:
    """Runs a node's jaxpr, `depth` scans deep, with taps of uses, by number, and their probes."""
    jaxpr = node.jaxpr
    env = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, operands, strict=True))
    for place, number in node.entries.items():
        if number in taps:
            variable, tap = jaxpr.jaxpr.invars[place], taps[number]
            whole = env[variable]
            whole = _widen(whole, tap.use.batch) if _is_repeated(tap) else whole
            env[variable] = tap.apply(whole, (), probes[tap.key])

    def read(variable):
        return variable.val if is_literal(variable) else env[variable]

    for index, eqn in enumerate(jaxpr.eqns):
        here = [taps[number] for number in node.taps.get(index, ()) if number in taps]
        given = [read(v) for v in eqn.invars]
        for tap in (tap for tap in here if tap.on_kernel):
            made = tap.use.found.made
            given = [
                tap.apply(x) if v is made else x for v, x in zip(eqn.invars, given, strict=True)
            ]
        results = _run_equation(node, index, given, taps, probes, depth)
        for tap in (tap for tap in here if not tap.on_kernel):
            if _is_repeated(tap) and not _is_widened(eqn.outvars[0], results[0]):
                results[0] = _widen(results[0], tap.use.batch)
            shown = tuple(_one_copy(v, read(v)) for v in tap.use.found.operands)
            results[0] = tap.apply(results[0], shown, probes[tap.key])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _run_equation(node: Node, index: int, given: list, taps, probes, depth: int) -> list:
    """Runs one equation; enters it if there are taps inside, or if widened arrays go in."""
    eqn, nodes = node.jaxpr.jaxpr.eqns[index], node.children.get(index, ())
    widened = any(map(_is_widened, eqn.invars, given))
    if widened and not nodes:
        return _run_widened(node, index, given)
    inside = [taps[use] for node in nodes for use in node.uses() if use in taps]
    if not widened and not inside:
        return run(eqn, given)
    if eqn.primitive.name == "scan":
        return _run_scan(node, index, given, taps, probes, depth)

    def body_of(node):
        return lambda *operands: run_with_taps(node, operands, taps, probes, depth)

    functions = [body_of(node) for node in nodes]
    if eqn.primitive.name == "cond":
        return list(lax.switch(given[0], functions, *given[1:]))
    return list(run_call(eqn, given, functions[0]))


def _run_scan(node: Node, index: int, given: list, taps, probes, depth: int) -> list:
    """Runs a scan with taps inside; what it slices and stacks has the axis of steps first."""
    eqn, (body,) = node.jaxpr.jaxpr.eqns[index], node.children[index]
    consts, carry = scan_sizes(eqn)
    repeated = {use: tap.use.batch for use, tap in taps.items() if _is_repeated(tap)}
    counts = [
        next((repeated[use] for use in uses if use in repeated), None)
        for uses in node.carried[index]
    ]
    operands = list(given)
    for k, (variable, x) in enumerate(zip(eqn.invars, given, strict=True)):
        place, wide = k - consts, _is_widened(variable, x)
        if place in node.started[index] and wide:
            operands[k] = _own_entries(x, node.started[index][place])
        elif 0 <= place < carry and not wide:
            operands[k] = x if counts[place] is None else _widen(x, counts[place])
        elif place >= carry and wide:
            operands[k] = jnp.moveaxis(x, 0, 1)
    inside = [taps[use] for use in body.uses() if use in taps]
    sliced = {tap.key: probes[tap.key] for tap in inside if tap.loops[depth]}

    def step(operands, probe):
        results = run_with_taps(body, operands, taps, {**probes, **probe}, depth + 1)
        for k, (variable, count) in enumerate(zip(eqn.outvars, counts, strict=False)):
            if count is not None and not _is_widened(variable, results[k]):
                results[k] = _widen(results[k], count)
        return results

    results = run_scan(eqn, operands, sliced, step)
    return results[:carry] + [
        jnp.moveaxis(x, 1, 0) if _is_widened(v, x) else x
        for v, x in zip(eqn.outvars[carry:], results[carry:], strict=True)
    ]


def _is_repeated(tap: Tap) -> bool:
    """Whether the tap wants one copy of the output for each example."""
    return tap.use.found.examples == Batch(REPEATED)


def _is_widened(variable, value) -> bool:
    return not is_literal(variable) and jnp.ndim(value) > len(shape_of(variable))


def _widen(x, count: int | None):
    return jnp.broadcast_to(x, (count, *x.shape))


def _one_copy(variable, value):
    """The first of the copies of a widened value, which are equal."""
    return value[0] if _is_widened(variable, value) else value


def _own_entries(x, axis: int, repeats: bool = False):
    """Each example's entry along an axis of the variable, from its own copy.

    Where all entries along the axis are equal, the first stands for them, which XLA takes out of a
    broadcast without making it.
    """
    if repeats:
        return jnp.moveaxis(lax.index_in_dim(x, 0, axis + 1, keepdims=False), 0, axis)
    return jnp.moveaxis(jnp.diagonal(x, axis1=0, axis2=axis + 1), -1, axis)


def _run_widened(node: Node, index: int, given: list) -> list:
    """Runs an equation on widened operands; its results are widened before they meet examples."""
    eqn, meeting = node.jaxpr.jaxpr.eqns[index], node.meetings.get(index)
    wide = [_is_widened(v, x) for v, x in zip(eqn.invars, given, strict=True)]
    if eqn.primitive.name == "stop_gradient" or not eqn.outvars:
        return run(eqn, list(map(_one_copy, eqn.invars, given)))
    if meeting is None:
        axes = [0 if w else None for w in wide]
        return jax.vmap(lambda *operands: run(eqn, operands), axes)(*given)
    given = [
        _own_entries(x, axis, repeats) if w and axis is not None else x
        for x, w, axis, repeats in zip(given, wide, meeting.axes, meeting.repeats, strict=True)
    ]
    if not any(w and axis is None for w, axis in zip(wide, meeting.axes, strict=True)):
        return run(eqn, given)

    def one(*operands):  # one example, which keeps its axis, of size 1
        kept = [
            x if axis is None else jnp.expand_dims(x, axis)
            for x, axis in zip(operands, meeting.axes, strict=True)
        ]
        return [jnp.squeeze(x, meeting.axis) for x in run(eqn, kept)]

    axes = [0 if w and k is None else k for w, k in zip(wide, meeting.axes, strict=True)]
    return jax.vmap(one, axes, meeting.axis)(*given)
