"""Where gradients flow: uses whose output reaches the results through `stop_gradient` alone."""

import jax.numpy as jnp

from optax_curv.capture._graph.jaxpr import is_literal, scan_sizes
from optax_curv.capture._graph.marks import Node


def without_gradient(node: Node) -> set[int]:
    """Finds the uses in a walked jaxpr from whose output no gradient comes back."""
    with_gradient: set[int] = set()
    live = _back(node, [True] * len(node.jaxpr.jaxpr.outvars), with_gradient)
    entered = {use for place, use in node.entries.items() if not live[place]}
    return entered | set(node.uses()) - with_gradient


def _back(node: Node, live: list[bool], uses: set[int]) -> list[bool]:
    """Goes back through a jaxpr, from the results that are live to the operands that are.

    Args:
      node: the jaxpr.
      live: which results have a gradient.
      uses: takes the numbers of uses with a gradient.

    Returns:
      Which operands have one.
    """
    jaxpr = node.jaxpr.jaxpr
    flowing = {v for v, on in zip(jaxpr.outvars, live, strict=True) if on and not is_literal(v)}
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        results = [v in flowing and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars]
        if not any(results) or eqn.primitive.name == "stop_gradient":
            continue
        uses.update(node.taps.get(index, ()))
        operands = _operands(node, index, results, uses)
        pairs = zip(eqn.invars, operands, strict=True)
        flowing |= {v for v, on in pairs if on and not is_literal(v)}
    return [v in flowing for v in jaxpr.invars]


def _operands(node: Node, index: int, results: list[bool], uses: set[int]) -> list[bool]:
    """Which operands of an equation have a gradient, if these results do."""
    eqn, children = node.jaxpr.jaxpr.eqns[index], node.children.get(index, ())
    if not children:
        return [True] * len(eqn.invars)
    if eqn.primitive.name == "cond":
        branches = [_back(child, results, uses) for child in children]
        return [False, *(any(on) for on in zip(*branches, strict=True))]
    (body,) = children
    if eqn.primitive.name != "scan":
        return _back(body, results, uses)
    consts, carry = scan_sizes(eqn)
    while True:  # what is carried on has a gradient if a later step gives it one
        operands = _back(body, results, uses)
        state = [a or b for a, b in zip(results, operands[consts : consts + carry], strict=False)]
        if state == results[:carry]:
            return operands
        results = state[:carry] + results[carry:]
