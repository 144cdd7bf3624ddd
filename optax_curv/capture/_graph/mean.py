"""The mean over examples at the end of a loss, by which the number of examples is checked.

From the loss we go back through equations that are linear in what comes before them: sums,
products with constants, changes of shape. The examples of a batch must lie along an axis that is
summed there; an array that is not the batch (a schedule, class weights, the parameters of a target
network) ends in equations that are not linear, or is not summed.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from optax_curv.capture._graph.jaxpr import CALLS, is_literal, maker, number, product, reduced
from optax_curv.capture._graph.marks import NOTHING, Node

ALONE = {"neg", "convert_element_type", "copy", "reshape", "squeeze", "broadcast_in_dim"}
ALONE |= {"transpose", "reduce_precision", "slice", "rev", "sharding_constraint", "expand_dims"}
SEVERAL = {"add", "sub", "add_any", "concatenate"}


class Sum(NamedTuple):
    """A sum at the end of a loss.

    Attributes:
      over_examples: whether it runs over the axis of the examples.
      divisor: the product of the numbers that divide it.
    """

    over_examples: bool
    divisor: float


def final_sums(node: Node, variable) -> list[Sum]:
    """Finds the sums by which a variable of a walked jaxpr is made of others, the last first."""
    return list(_sums(node, variable, 1.0, set()))


def _sums(node: Node, variable, divisor: float, seen: set) -> Iterator[Sum]:
    """Yields the sums behind a variable that numbers with this product divide."""
    jaxpr = node.jaxpr.jaxpr
    eqn = maker(jaxpr, variable)
    if eqn is None or variable in seen:  # residual connections lead to one variable many times
        return
    seen.add(variable)
    name = eqn.primitive.name

    def on(variables, by: float = 1.0) -> Iterator[Sum]:
        for v in variables:
            if not is_literal(v):
                yield from _sums(node, v, divisor * by, seen)

    def batch_axis(v) -> int | None:
        mark = node.marks.get(v, NOTHING) if not is_literal(v) else NOTHING
        return None if mark.batch is None else mark.batch.axis

    if name == "reduce_sum":
        (operand,) = eqn.invars
        yield Sum(batch_axis(operand) in (reduced(eqn) or ()), divisor)
        yield from on(eqn.invars)
    elif name == "dot_general":  # a mean with weights; other products end the search
        contracted = product(eqn).contracted
        axes = [(batch_axis(v), own) for v, own in zip(eqn.invars, contracted, strict=True)]
        if any(axis in own for axis, own in axes):
            yield Sum(True, divisor)
    elif name == "div":
        yield from on(eqn.invars[:1], number(eqn.invars[1]) or math.nan)
    elif name == "mul":
        factors = [number(v) for v in eqn.invars]
        factor = next((x for x in factors if x), math.nan)
        yield from on(eqn.invars, 1 / factor)
    elif name in ALONE or name in SEVERAL:
        yield from on(eqn.invars)
    elif name == "select_n":
        yield from on(eqn.invars[1:])
    elif name in CALLS:
        yield from _in_call(node, eqn, variable, divisor)


def _in_call(node: Node, eqn, variable, divisor: float) -> Iterator[Sum]:
    """Yields the sums inside a call."""
    index = node.jaxpr.jaxpr.eqns.index(eqn)
    for body in node.children.get(index, ()):
        result = body.jaxpr.jaxpr.outvars[eqn.outvars.index(variable)]
        if not is_literal(result):
            yield from _sums(body, result, divisor, set())


def shows_examples(sums: list[Sum]) -> bool:
    """Whether one of the sums runs over the examples."""
    return any(one.over_examples for one in sums)


def divisors(sums: list[Sum]) -> set[int]:
    """The whole numbers above 1 that divide the sums; empty where one is not known."""
    found = {one.divisor for one in sums}
    if not all(math.isfinite(x) and abs(x - round(x)) < 1e-3 * abs(x) for x in found):
        return set()
    return {abs(round(x)) for x in found if abs(x) > 1.5}
