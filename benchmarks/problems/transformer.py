"""A character transformer on Shakespeare's plays."""

import jax
import jax.numpy as jnp
import numpy as np

import optax_curv
from benchmarks.cache import shakespeare_texts
from benchmarks.problems import Problem

WIDTH, HEADS, DEPTH, LENGTH, BATCH = 64, 4, 4, 64, 16
WINDOWS = 64  # of each evaluation


def problem() -> Problem:
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm(name="norm_1")(x)
            q, k, v = (
                nn.Dense(WIDTH, name=name)(h).reshape(*x.shape[:-1], HEADS, -1)
                for name in ("query", "key", "value")
            )
            h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
            x = x + nn.Dense(WIDTH, name="out")(h)
            h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="norm_2")(x)))
            return x + nn.Dense(WIDTH, name="down")(h)

    class Transformer(nn.Module):
        characters: int

        @nn.compact
        def __call__(self, tokens):
            positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
            x = nn.Embed(self.characters, WIDTH, name="embedding")(tokens) + positions
            for i in range(DEPTH):
                x = Block(name=f"block_{i}")(x)
            return nn.Dense(self.characters, name="head")(nn.LayerNorm(name="norm")(x))

    text = np.frombuffer(shakespeare_texts().encode("latin-1"), np.uint8)
    characters = np.flatnonzero(np.bincount(text))
    codes = np.searchsorted(characters, np.arange(256)).astype(np.int32)[text]
    train, held_out = np.split(codes, [len(codes) * 9 // 10])
    model = Transformer(len(characters))
    loss = optax_curv.Objective(model.apply, "categorical")

    def windows(part, rng, count):
        rows = part[rng.integers(0, len(part) - LENGTH, count)[:, None] + np.arange(LENGTH + 1)]
        return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])

    def batches(seed, steps):
        rng = np.random.default_rng(seed)
        return (windows(train, rng, BATCH) for _ in range(steps))

    seen, unseen = (windows(part, np.random.default_rng(0), WINDOWS) for part in (train, held_out))
    return Problem(
        definition=f"Shakespeare's plays and poems ({len(codes) / 1e6:.1f} million characters, "
        f"the last tenth held "
        f"out), transformer of {DEPTH} layers, width {WIDTH}, {HEADS} heads, {LENGTH} "
        f"characters, batch {BATCH}; "
        f"losses over {WINDOWS} fixed windows",
        init=lambda seed: model.init(jax.random.key(seed), jnp.zeros((1, LENGTH), jnp.int32)),
        loss=loss,
        batches=batches,
        metrics={
            "training loss": lambda params: loss(params, *seen),
            "validation loss": lambda params: loss(params, *unseen),
        },
        steps=200,
        evaluate_every=5,
        objective=loss,
        adam_for=lambda path, leaf: (
            leaf.ndim != 2
            or any(
                name in jax.tree_util.keystr(path) for name in ("embedding", "positions", "head")
            )
        ),
    )
