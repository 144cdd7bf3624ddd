"""What each primitive means for the parameters that enter it: another view of a leaf, a layer, or neither, and why."""

import jax.numpy as jnp

from optax_curv.capture import elementwise, products, views
from optax_curv.capture.jaxpr import KEEP_ENTRIES, hidden_bodies
from optax_curv.capture.layouts import View

RULES = {
    **dict.fromkeys(KEEP_ENTRIES, views.layout),
    "split": views.split,
    "unstack": views.unstack,
    "dynamic_slice": views.dynamic_slice,
    "stack": views.stack,
    "dot_general": products.dot_general,
    "conv_general_dilated": products.convolution,
    "gather": products.gather,
    "mul": elementwise.multiply,
    "div": elementwise.divide,
    "neg": elementwise.negate,
    "add": elementwise.add,
    "add_any": elementwise.add,
    "sub": elementwise.add,
    "select_n": elementwise.select,
    "concatenate": elementwise.concatenate,
}
MULTIPLIED = "it is multiplied by another parameter before it meets the data"
ADDED = "it is added to another parameter before it meets the data"
TOGETHER = {
    "mul": MULTIPLIED,
    "dot_general": MULTIPLIED + "; for a low-rank kernel write (x @ a) @ b",
    "add": ADDED,
    "sub": ADDED,
}
ALONE = {
    "dynamic_slice": "it is sliced at an index known only when the loss runs; take its slices one by one with "
    "jax.lax.scan(f, init, xs), the parameter in xs",
    "shard_map": "it enters `shard_map` inside the loss; call value_grad_and_curvature inside shard_map instead",
}


def is_complex(variables) -> bool:
    """Whether one of several variables is complex."""
    return any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in variables)


def why_not(eqn, view: View, several: bool) -> str:
    """Why the use of a leaf, alone or with `several` parameters, is none that a layer describes."""
    name = eqn.primitive.name
    if is_complex(eqn.outvars):
        return "it is or becomes complex, and factors are for real layers; multiply its real and imaginary parts apart"
    if several and name in TOGETHER:
        return TOGETHER[name]
    if view.coefficients:
        return f"it is multiplied element-wise before it enters `{name}`"
    if not view.aligned:
        return f"it is cut into unequal slices before it enters `{name}`"
    if name in ALONE:
        return ALONE[name]
    if hidden_bodies(eqn):
        return f"it enters `{name}`, whose own derivative rule hides what is inside"
    return f"it enters `{name}`, which is no layer"
