"""A vision transformer on patches of digits, attention as Flax writes it."""

import jax

from benchmarks.problems import Problem
from benchmarks.problems.digits import classifier
from benchmarks.problems.nnx_networks import adam_for, functions, size, transformer_block

WIDTH, HEADS, DEPTH, SIDE = 32, 4, 2, 2
PATCHES = (8 // SIDE) ** 2


def network(rngs):
    """Linear patches with learned positions, blocks before whose parts norms stand, their mean."""
    from flax import nnx

    class VisionTransformer(nnx.Module):
        def __init__(self):
            normal = jax.nn.initializers.normal(0.02)
            self.patches = nnx.Linear(SIDE * SIDE, WIDTH, rngs=rngs)
            self.positions = nnx.Param(normal(rngs.params(), (PATCHES, WIDTH)))
            self.blocks = nnx.List(transformer_block(WIDTH, HEADS, rngs) for _ in range(DEPTH))
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
    return classifier(
        f"nnx vision transformer with MultiHeadAttention ({SIDE} × {SIDE} patches, {DEPTH} blocks, "
        f"width {WIDTH}, {HEADS} heads, learned positions, mean of the patches; {size(init)} "
        "parameters)",
        init,
        predict,
        steps=150,
        batch=64,
        evaluate_every=5,
        adam_for=adam_for,
    )
