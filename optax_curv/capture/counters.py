"""Integers that count the steps of a scan, by which a loop such as `fori_loop` picks slices of a stack of kernels."""

import numpy as np

from optax_curv.capture.jaxpr import Literal


def carried(eqn) -> set[int]:
    """Places of a scan's carry that hold the number of the step, 0, 1, …."""
    body, consts = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"]
    return {
        k
        for k in range(eqn.params["num_carry"])
        if not eqn.params["reverse"]
        and _is_number(eqn.invars[consts + k], 0)
        and _is_next(_maker(body, body.outvars[k]), body.invars[consts + k])
    }


def is_range(jaxpr, variable) -> bool:
    """Whether a variable is 0, 1, … along its only axis."""
    maker = _maker(jaxpr, variable)
    return maker is not None and maker.primitive.name == "iota" and len(maker.params["shape"]) == 1


def followed(jaxpr, eqn, given) -> int | None:
    """Depth of the scan that a result counts the steps of, as one of the operands does; None if it does not."""
    name, operands = eqn.primitive.name, eqn.invars
    if name == "convert_element_type":
        return given[0].counter
    if name == "select_n" and given[1].counter is not None:  # as in x[i], which adds the size to a negative index
        test = _maker(jaxpr, operands[0])
        if test is not None and test.primitive.name == "lt" and test.invars[0] is operands[1]:
            return given[1].counter if _is_number(test.invars[1], 0) else None
    return None


def _maker(jaxpr, variable):
    return next((eqn for eqn in jaxpr.eqns if variable in eqn.outvars), None)


def _is_number(variable, number) -> bool:
    return isinstance(variable, Literal) and np.ndim(variable.val) == 0 and variable.val == number


def _is_next(eqn, variable) -> bool:
    return (
        eqn is not None and eqn.primitive.name == "add" and eqn.invars[0] is variable and _is_number(eqn.invars[1], 1)
    )
