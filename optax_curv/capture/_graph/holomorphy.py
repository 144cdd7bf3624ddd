"""Whether a function is holomorphic in its complex arguments, read off its program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.capture._graph.jaxpr import CALLS, bodies, is_literal

# Primitives that are holomorphic in every complex operand. Whatever is not listed counts as none
# that is, which costs time and never accuracy: the derivatives are then taken twice.
HOLOMORPHIC = {
    *("add", "add_any", "sub", "mul", "div", "neg", "integer_pow", "pow", "square", "sqrt"),
    *("rsqrt", "exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "sinh", "cosh"),
    *("tanh", "logistic", "dot_general", "conv_general_dilated", "reduce_sum", "reduce_prod"),
    *("cumsum", "cumprod", "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims"),
    *("concatenate", "split", "slice", "dynamic_slice", "gather", "pad", "rev", "copy"),
    *("convert_element_type", "select_n"),
}


def is_holomorphic(fn: Callable, params: Any, *args: Any) -> bool:
    """Whether outputs are complex and depend on every complex leaf of `params` holomorphically.

    True is certain; False may be said of a holomorphic function whose program hides it.
    """
    jaxpr = jax.make_jaxpr(fn)(params, *args)
    leaves = jax.tree.leaves(params)
    complex_leaves = [jnp.iscomplexobj(x) for x in leaves]
    seeds = complex_leaves + [False] * (len(jaxpr.jaxpr.invars) - len(leaves))
    found = _followed(jaxpr.jaxpr, seeds)
    return found is not None and all(map(_is_complex, jaxpr.jaxpr.outvars))


def _is_complex(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.complexfloating)


def _followed(jaxpr: Any, seeds: list[bool]) -> list[bool] | None:
    """Which outputs depend on the inputs `seeds`; None where one does not holomorphically."""
    depends = {v for v, seed in zip(jaxpr.invars, seeds, strict=True) if seed}
    for eqn in jaxpr.eqns:
        given = [not is_literal(v) and v in depends for v in eqn.invars]
        if not any(given):
            continue
        if eqn.primitive.name in CALLS:
            outputs = _followed(bodies(eqn)[0].jaxpr, given)
            if outputs is None:
                return None
        elif eqn.primitive.name in HOLOMORPHIC and all(map(_is_complex, eqn.outvars)):
            outputs = [True] * len(eqn.outvars)
        else:
            return None
        depends |= {v for v, found in zip(eqn.outvars, outputs, strict=True) if found}
    return [not is_literal(v) and v in depends for v in jaxpr.outvars]
