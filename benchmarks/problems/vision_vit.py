"""A vision transformer on patches of digits, attention as Flax writes it."""

import jax
import optax

from benchmarks.problems import Problem
from benchmarks.problems.digits import classifier
from benchmarks.problems.nnx_networks import adam_for, functions

WIDTH, HEADS, DEPTH, SIDE = 32, 4, 2, 2
PATCHES = (8 // SIDE) ** 2


def network(rngs):
    """Linear patches with learned positions, blocks before whose parts norms stand, their mean."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self):
            self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm_1(x))
            return x + self.down(nnx.gelu(self.up(self.norm_2(x))))

    class VisionTransformer(nnx.Module):
        def __init__(self):
            normal = jax.nn.initializers.normal(0.02)
            self.patches = nnx.Linear(SIDE * SIDE, WIDTH, rngs=rngs)
            self.positions = nnx.Param(normal(rngs.params(), (PATCHES, WIDTH)))
            self.blocks = nnx.List(Block() for _ in range(DEPTH))
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

        def __call__(self, images):
            x = images.reshape(-1, 8 // SIDE, SIDE, 8 // SIDE, SIDE).swapaxes(2, 3)
            x = self.patches(x.reshape(-1, PATCHES, SIDE * SIDE)) + self.positions[...]
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    return VisionTransformer()


def problem() -> Problem:
    init, predict = functions(network)
    count = optax.tree.size(jax.eval_shape(init, 0))
    return classifier(
        f"nnx vision transformer with MultiHeadAttention ({SIDE} × {SIDE} patches, {DEPTH} blocks, "
        f"width {WIDTH}, {HEADS} heads, learned positions, mean of the patches; {count} "
        "parameters)",
        init,
        predict,
        steps=150,
        batch=64,
        evaluate_every=5,
        adam_for=adam_for,
    )
