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


def final_sums(node: Node, variable, divisor: float = 1.0) -> Iterator[Sum]:
    """Finds the sums by which a variable of a walked jaxpr is made of others, the last first."""
    jaxpr = node.jaxpr.jaxpr
    eqn = maker(jaxpr, variable)
    if eqn is None:
        return
    name, index = eqn.primitive.name, jaxpr.eqns.index(eqn)

    def on(variables, by: float = 1.0) -> Iterator[Sum]:
        for v in variables:
            if not is_literal(v):
                yield from final_sums(node, v, divisor * by)

    def batch_axis(v) -> int | None:
        mark = node.marks.get(v, NOTHING)
        return None if is_literal(v) or mark.batch is None else mark.batch.axis

    if name == "reduce_sum":
        (operand,) = eqn.invars
        yield Sum(batch_axis(operand) in (reduced(eqn) or ()), divisor)
        yield from on(eqn.invars)
    elif name == "dot_general":
        contracted = product(eqn).contracted
        axes = [(batch_axis(v), own) for v, own in zip(eqn.invars, contracted, strict=True)]
        yield Sum(any(axis in own for axis, own in axes), divisor)
        yield from on(eqn.invars)
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
    elif name in CALLS and index in node.children:
        (body,) = node.children[index]
        inner = body.jaxpr.jaxpr
        result = inner.outvars[eqn.outvars.index(variable)]
        if is_literal(result):
            return
        yield from final_sums(body, result, divisor)


def shows_examples(sums: list[Sum]) -> bool:
    """Whether one of the sums runs over the examples."""
    return any(one.over_examples for one in sums)


def divisors(sums: list[Sum]) -> set[int]:
    """The whole numbers above 1 that divide the sums; empty where one is not known."""
    found = {one.divisor for one in sums}
    if not all(math.isfinite(x) and abs(x - round(x)) < 1e-3 * abs(x) for x in found):
        return set()
    return {abs(round(x)) for x in found if abs(x) > 1.5}
