"""Flax nnx modules as the first argument of a loss, as `nnx.value_and_grad` takes them."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Model(NamedTuple):
    """A module taken apart."""

    params: Any  # pure arrays
    grads_like: Any  # an `nnx.State`, the structure of its gradients
    wrap: (
        Callable  # makes a function of the module, -> result, one of `params`, -> (result, other state after the call)
    )
    update: Callable  # writes that other state (batch statistics, random counters) back into the module


def as_pure(tree):
    """A tree with the arrays of its `nnx.Variable`s in their places."""
    nnx = sys.modules["flax.nnx"]
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)  # before Flax 0.12.7


def take_apart(params) -> Model | None:
    """The module's parts, or None if `params` is no nnx module."""
    nnx = sys.modules.get("flax.nnx")  # which is not imported for others
    if nnx is None or not isinstance(params, nnx.Module):
        return None
    graph, state, rest = nnx.split(params, nnx.Param, ...)
    others = as_pure(rest)

    def wrap(function):
        def of_arrays(arrays, *args, **kwargs):
            model = nnx.merge(graph, arrays, others)
            result = function(model, *args, **kwargs)
            return result, as_pure(nnx.state(model, nnx.Not(nnx.Param)))

        return of_arrays

    return Model(as_pure(state), state, wrap, lambda after: nnx.update(params, after))
