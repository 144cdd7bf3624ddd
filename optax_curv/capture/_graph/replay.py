"""The loss run again, with a tap at each use and with widened arrays where examples share an input.

A widened array has an axis of examples before those of its variable: one copy for each example.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.capture._graph.jaxpr import is_literal, run, run_call, run_scan, shape_of
from optax_curv.capture._graph.marks import REPEATED, Batch, Node
from optax_curv.capture._graph.uses import Use


@dataclasses.dataclass(frozen=True)
class Tap:
    """What happens at a use when the loss is run again.

    Attributes:
      use: the use.
      key: which probe it reads and writes.
      apply: `(output, operands, probe) -> output`, an identity whose derivative writes the probe.
      loops: for each scan around it, whether the probe is sliced along it.
    """

    use: Use
    key: str
    apply: Callable
    loops: tuple[bool, ...]


def run_with_taps(node: Node, operands, taps: dict[int, Tap], probes: dict, depth: int = 0) -> list:
    """Runs a node's jaxpr, `depth` scans deep, with taps of uses, by number, and their probes."""
    jaxpr = node.jaxpr
    env = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, operands, strict=True))

    def read(variable):
        return variable.val if is_literal(variable) else env[variable]

    for index, eqn in enumerate(jaxpr.eqns):
        results = _run_equation(node, index, [read(v) for v in eqn.invars], taps, probes, depth)
        for tap in [taps[number] for number in node.taps.get(index, ()) if number in taps]:
            found = tap.use.found
            if found.examples == Batch(REPEATED) and not _is_widened(eqn.outvars[0], results[0]):
                results[0] = jnp.broadcast_to(results[0], (tap.use.batch, *results[0].shape))
            # A widened operand is the same in all its copies, or its use would not be shared.
            shown = tuple(
                read(v)[0] if _is_widened(v, read(v)) else read(v) for v in found.operands
            )
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


def _is_widened(variable, value) -> bool:
    return not is_literal(variable) and jnp.ndim(value) > len(shape_of(variable))


def _run_widened(node: Node, index: int, given: list) -> list:
    """Runs an equation on widened operands; its results are widened before they meet examples."""
    eqn = node.jaxpr.jaxpr.eqns[index]
    wide = [_is_widened(v, x) for v, x in zip(eqn.invars, given, strict=True)]
    axis = node.meetings.get(index)
    if axis is None:
        axes = [0 if w else None for w in wide]
        return jax.vmap(lambda *operands: run(eqn, operands), axes)(*given)

    def there(x):  # where it has one entry, or repeats it
        return jnp.moveaxis(lax.index_in_dim(x, 0, axis + 1, keepdims=False), 0, axis)

    return run(eqn, [there(x) if w else x for x, w in zip(given, wide, strict=True)])
