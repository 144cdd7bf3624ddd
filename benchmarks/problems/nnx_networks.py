"""Networks of Flax's nnx as functions of their parameters."""

from collections.abc import Callable
from typing import Any

import jax


def functions(network: Callable[..., Any]) -> tuple[Callable, Callable]:
    """`init(seed)` -> parameters and `predict(params, inputs)` of a `network(rngs)`."""
    from flax import nnx

    def made(seed):
        return network(nnx.Rngs(jax.random.key(seed)))

    graph, like = nnx.split(nnx.eval_shape(lambda: made(0)), nnx.Param)

    def init(seed):
        return nnx.to_pure_dict(nnx.state(made(seed), nnx.Param))

    def predict(params, inputs):
        state = jax.tree.map(lambda x: x, like)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(inputs)

    return init, predict


def adam_for(path, leaf) -> bool:
    """Biases, scales and positions: all that is no kernel."""
    return leaf.ndim < 2 or any(
        name in jax.tree_util.keystr(path) for name in ("bias", "positions")
    )
