"""Where gradients flow: uses whose output reaches the results through `stop_gradient` alone."""

import jax.numpy as jnp

from optax_curv.capture._graph.jaxpr import is_literal, scan_sizes
from optax_curv.capture._graph.marks import Node


def without_gradient(node: Node) -> tuple[set[int], set[int]]:
    """Finds the uses to whose output the loss sends no gradient, and those that do not reach it."""
    everything = set(node.uses()) | set(node.entries.values())
    return everything - _reached(node, False), everything - _reached(node, True)


def _reached(node: Node, through_stops: bool) -> set[int]:
    """The uses in a walked jaxpr that reach the loss, its first result, perhaps through stops."""
    uses: set[int] = set()
    loss = [place == 0 for place in range(len(node.jaxpr.jaxpr.outvars))]
    live = _back(node, loss, uses, through_stops)
    return uses | {use for place, use in node.entries.items() if live[place]}


def _back(node: Node, live: list[bool], uses: set[int], through_stops: bool) -> list[bool]:
    """Goes back through a jaxpr, from the results that are live to the operands that are.

    Args:
      node: the jaxpr.
      live: which results have a gradient.
      uses: takes the numbers of uses with a gradient.
      through_stops: whether `stop_gradient` passes it on.

    Returns:
      Which operands have one.
    """
    jaxpr = node.jaxpr.jaxpr
    flowing = {v for v, on in zip(jaxpr.outvars, live, strict=True) if on and not is_literal(v)}
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        results = [v in flowing and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars]
        if not any(results) or (eqn.primitive.name == "stop_gradient" and not through_stops):
            continue
        uses.update(node.taps.get(index, ()))
        operands = _operands(node, index, results, uses, through_stops)
        pairs = zip(eqn.invars, operands, strict=True)
        flowing |= {v for v, on in pairs if on and not is_literal(v)}
    return [v in flowing for v in jaxpr.invars]


def _operands(
    node: Node, index: int, results: list[bool], uses: set[int], through_stops: bool
) -> list[bool]:
    """Which operands of an equation have a gradient, if these results do."""
    eqn, children = node.jaxpr.jaxpr.eqns[index], node.children.get(index, ())
    if not children:
        return [True] * len(eqn.invars)
    if eqn.primitive.name == "cond":
        branches = [_back(child, results, uses, through_stops) for child in children]
        return [False, *(any(on) for on in zip(*branches, strict=True))]
    (body,) = children
    if eqn.primitive.name != "scan":
        return _back(body, results, uses, through_stops)
    consts, carry = scan_sizes(eqn)
    while True:  # what is carried on has a gradient if a later step gives it one
        operands = _back(body, results, uses, through_stops)
        state = [a or b for a, b in zip(results, operands[consts : consts + carry], strict=False)]
        if state == results[:carry]:
            return operands
        results = state[:carry] + results[carry:]
