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


def size(init) -> int:
    """How many numbers the parameters have; `optax.tree.size` warns of shapes without arrays."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, 0)))


def transformer_block(width: int, heads: int, rngs: Any, dtype: Any = None) -> Any:
    """A transformer's block, before whose parts norms stand."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self):
            given = {"dtype": dtype, "rngs": rngs}
            self.norm_1 = nnx.LayerNorm(width, **given)
            self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **given)
            self.norm_2 = nnx.LayerNorm(width, **given)
            self.up = nnx.Linear(width, 4 * width, **given)
            self.down = nnx.Linear(4 * width, width, **given)

        def __call__(self, x, mask=None):
            x = x + self.attention(self.norm_1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm_2(x))))

    return Block()


def adam_for(path, leaf) -> bool:
    """Biases, scales, positions and tables: all that is no kernel."""
    return leaf.ndim < 2 or any(
        name in jax.tree_util.keystr(path) for name in ("bias", "positions", "table")
    )
