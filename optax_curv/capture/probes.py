"""A loss with the product of its Hessian and a random probe."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.linalg._checks import widen
from optax_curv.typing import Key, Tree


def hessian_probe(
    loss_fn: Callable,
    params: Tree,
    *args: Any,
    key: Key,
    has_aux: bool = False,
    finite_difference: bool = False,
    **kwargs: Any,
) -> tuple[Any, Tree, Tree, Tree]:
    """Computes value, gradient, a random probe v ~ N(0, I) and Hv in one linearisation.

    H is the Hessian of the loss. As E[v vᵀ] = I, E[Hv (Hv)ᵀ] = H², to which Newton-type
    preconditioners are fitted. Forward-over-reverse differentiation costs about three gradients.
    `finite_difference=True` is for losses without a second derivative (custom rules, integer
    tables): Hv ≈ (∇f(θ + εv) - ∇f(θ)) / ε with ε = √eps(dtype) · max(1, rms(θ)) costs two gradients
    and has a relative error of about √eps.

    Args:
      loss_fn: scalar function of (params, *args, **kwargs).
      params: pytree of floating-point leaves.
      *args: further arguments of the loss.
      key: PRNG key of the probe, or a seed.
      has_aux: whether the loss returns (value, aux).
      finite_difference: whether Hv is a difference of gradients.
      **kwargs: further arguments of the loss by name.

    Returns:
      (value, grads, probe, hvp), or ((value, aux), grads, probe, hvp); the last three are like the
      parameters. Of complex leaves hvp is the derivative of jax.grad's gradient, the conjugate of
      the steepest ascent.

    Raises:
      ValueError: for a flag that is no boolean.
      TypeError: from jax.grad, for integer parameters or a loss that is not scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> loss = lambda w, scale: 0.5 * jnp.sum(scale * w**2)
      >>> w, scale = jnp.array([1.0, 2.0]), jnp.array([1.0, 10.0])
      >>> value, grads, probe, hvp = optax_curv.hessian_probe(loss, w, scale, key=jax.random.key(0))
      >>> float(value), grads.tolist(), bool(jnp.allclose(hvp, scale * probe))
      (20.5, [1.0, 20.0], True)

    References:
      Pearlmutter, *Fast exact multiplication by the Hessian*, Neural Computation 6, 1994.
    """
    for name, given in (("has_aux", has_aux), ("finite_difference", finite_difference)):
        if not isinstance(given, bool):
            raise ValueError(f"hessian_probe: expected True or False as {name}, got {given!r}.")
    key = jax.random.key(key) if isinstance(key, int) else key
    leaves, treedef = jax.tree.flatten(params)
    probes = [
        jax.random.normal(jax.random.fold_in(key, i), jnp.shape(leaf), jnp.result_type(leaf))
        for i, leaf in enumerate(leaves)
    ]

    def grads_and_value(leaves):
        value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(
            treedef.unflatten(leaves), *args, **kwargs
        )
        return jax.tree.leaves(grads), value

    if not finite_difference:
        grads, products, value = jax.jvp(grads_and_value, (leaves,), (probes,), has_aux=True)
    else:
        step = _difference_step(leaves)
        grads, value = grads_and_value(leaves)
        ahead, _ = grads_and_value(
            [x + (step * v).astype(v.dtype) for x, v in zip(leaves, probes, strict=True)]
        )
        products = [((b - a) / step).astype(a.dtype) for a, b in zip(grads, ahead, strict=True)]
    return value, treedef.unflatten(grads), treedef.unflatten(probes), treedef.unflatten(products)


def _difference_step(leaves: list) -> jax.Array:
    """The step √eps · max(1, rms of all parameters), which balances rounding and curvature."""
    size = max(1, sum(map(jnp.size, leaves)))
    rms = jnp.sqrt(sum(jnp.sum(jnp.square(jnp.abs(widen(x)))) for x in leaves) / size)
    coarsest = max([float(jnp.finfo(jnp.result_type(x)).eps) for x in leaves], default=1.0)
    return coarsest**0.5 * jnp.maximum(1, rms)
