"""Why a parameter is in no layer, and what to do about it."""

import jax.numpy as jnp

from optax_curv.capture.jaxpr import hidden_bodies
from optax_curv.capture.layouts import View

WHILE = (
    "a while_loop around the layer that uses {path}: reverse-mode differentiation does not pass through it; use "
    "jax.lax.scan, or fori_loop with a number of steps known at trace time."
)
TOGETHER = {
    "mul": "it is multiplied by another parameter before it meets the data",
    "dot_general": "it is multiplied by another parameter before it meets the data; for a low-rank kernel write "
    "(x @ a) @ b",
    "add": "it is added to another parameter before it meets the data",
    "sub": "it is added to another parameter before it meets the data",
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
    """The reason why a leaf is used in a way no layer describes.

    Args:
      eqn: the equation it enters.
      view: the leaf as the equation sees it.
      several: whether other parameters enter it too.

    Returns:
      The reason.
    """
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
