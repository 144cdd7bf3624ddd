"""Losses composed at random of constants, tables, scans, calls and non-linearities.

A seed is the same program for a batch of any size. It keeps an array that all examples share,
[T, D], and one of the examples, [N, T, D], and changes one or the other at every step, until they
have met.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T, D, V = 3, 4, 5
EXAMPLE = (T, D)
SHAPES = {
    **{f"w{k}": (D, D) for k in range(5)},
    **{f"b{k}": (D,) for k in range(5)},
    "stack": (2, D, D),
    "shifts": (2, D),
    "pos": (T, D),
    "table": (V, D),
    "wide": (D, 3 * D),
    "gate": (),
    "token": (1, D),
}


def parameters(seed):
    rng = np.random.default_rng([seed, 1])
    return {name: jnp.asarray(rng.normal(size=shape) * 0.7) for name, shape in SHAPES.items()}


def constant(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


class Drawn:
    """The choices of one program."""

    def __init__(self, seed):
        self.rng = np.random.default_rng([seed, 2])
        self.free = {kind: list(self.rng.permutation(5)) for kind in "wb"}

    def one(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def name(self, kind):
        """A leaf of a kind, seldom one that was used before."""
        names = self.free[kind]
        again = len(names) < 2 or self.rng.random() < 0.15
        return f"{kind}{self.rng.integers(5) if again else names.pop()}"


def kernel(draw, p):
    """A kernel, as it is or made of a leaf."""
    w = p[draw.name("w")]
    number = 1.0 + jnp.sum(constant(draw.rng, 3) ** 2)
    return draw.one(
        lambda: w,
        lambda: w,
        lambda: w.T,
        lambda: w / jnp.sqrt(number),
        lambda: w * jnp.tril(jnp.ones((D, D))),
        lambda: jax.nn.softplus(w),
        lambda: w / jnp.linalg.norm(w, axis=0),
        lambda: w @ constant(draw.rng, D, D),
        lambda: p["wide"][:, :D],
        lambda: p["wide"][:, D:] @ constant(draw.rng, 2 * D, D),
    )()


def vector(draw, p):
    """A vector of parameters, as it is or a function of it."""
    b = p[draw.name("b")]
    return draw.one(
        lambda: b,
        lambda: b,
        lambda: b - jnp.mean(b),
        lambda: jax.nn.log_softmax(b),
        lambda: jax.nn.softplus(b),
        lambda: b * constant(draw.rng, D),
        lambda: p["gate"] * constant(draw.rng, D),
        lambda: p["token"][0],
        lambda: lax.stop_gradient(b),
    )()


def shared(draw, p):
    """An array [T, D] that all examples share: constants, or parameters that stand for rows."""
    numbers = constant(draw.rng, T, D)
    return draw.one(
        lambda: numbers,
        lambda: p["pos"],
        lambda: jnp.tanh(p["pos"]),
        lambda: p["table"][draw.rng.integers(0, V, T)],
        lambda: jnp.take(
            p["table"], draw.rng.integers(-2, V + 2, T), axis=0, mode=draw.one("clip", "wrap")
        ),
        lambda: jnp.concatenate([p["token"], numbers[1:]]),
        lambda: (p["pos"][:, None] * constant(draw.rng, 2, D)).sum(1),
    )()


def on(draw, p, h):
    """Goes on with an array [..., T, D], whoever shares it."""
    w, b, v = kernel(draw, p), vector(draw, p), kernel(draw, p)
    c = constant(draw.rng, D, D)
    return draw.one(
        lambda: h @ w,
        lambda: h @ w + b,
        lambda: jnp.tanh(h @ w + b),
        lambda: h + b,
        lambda: h * b + h,
        lambda: jnp.sin(h),
        lambda: jax.nn.softmax(h @ c),
        lambda: jax.nn.relu6(h) + jax.nn.logsumexp(h, axis=-1, keepdims=True),
        lambda: (h - h.mean(-1, keepdims=True)) * (b / jnp.sqrt(h.var(-1, keepdims=True) + 1)),
        lambda: jax.jit(lambda h: jnp.sin(h @ w) * h + jnp.cos(h))(h),
        lambda: jax.checkpoint(lambda h: jnp.tanh(h @ w) + b)(h),
        lambda: lax.scan(lambda h, _: (jnp.tanh(h @ w + b), h), h, None, length=2)[0],
        lambda: lax.scan(
            lambda h, x: (jnp.tanh(h @ x[0] + x[1]), None), h, (p["stack"], p["shifts"])
        )[0],
        lambda: jnp.sum(lax.scan(lambda h, k: (jnp.sin(h) + k, h @ w), h, jnp.arange(2.0))[1], 0),
        lambda: lax.fori_loop(0, 2, lambda k, h: jnp.tanh(h @ p["stack"][k] + b), h),
        lambda: jnp.swapaxes(jnp.swapaxes(h, -1, -2) @ constant(draw.rng, T, T), -1, -2),
        lambda: jnp.where(h > 0, h, h * b),
        lambda: jnp.concatenate([h @ w, h @ v], -1) @ jnp.concatenate([v, w]),
        lambda: jnp.einsum("...td,dhk->...thk", h, w.reshape(D, 2, 2)).reshape(h.shape),
        lambda: jnp.sort(h, axis=-1) + 0.5 * jnp.cumsum(h, axis=-2),
        lambda: lax.cond(True, lambda h: jnp.tanh(h @ w), lambda h: h * b, h),
        lambda: jax.vmap(lambda h: jnp.tanh(h @ w + b), -2, -2)(h),
        lambda: jnp.stack([h, h @ w]).sum(0),
        lambda: lax.associative_scan(jnp.add, h @ w, axis=h.ndim - 2),
    )()


def met(draw, p, s, x):
    """Arrays of examples [N, T, D], of one that they share and one of theirs."""
    w = kernel(draw, p)
    return draw.one(
        lambda: x + s,
        lambda: x * s,
        lambda: jnp.tanh(x @ s.T) @ s,
        lambda: jax.nn.softmax((s @ w) @ jnp.swapaxes(x, -1, -2)) @ x,
        lambda: jax.vmap(lambda x: jnp.tanh(s @ x.T) @ x)(x),
        lambda: lax.map(lambda x: jnp.sin(x + s) @ w, x),
        lambda: jnp.where(x > 0, s, x),
        lambda: jnp.concatenate([x, jnp.broadcast_to(s, x.shape)], 1)[:, 1 : T + 1],
        lambda: jnp.concatenate([x, jnp.broadcast_to(s, x.shape)], -1) @ jnp.concatenate([w, w.T]),
        lambda: s[jnp.argmax(x, axis=1) % T].mean(1, keepdims=True) + x,
        lambda: p["table"][jnp.argmax(x @ s.T, axis=-1)] + x,
        lambda: jax.vmap(jax.vmap(lambda k: p["table"][k]))(jnp.argmax(x, axis=-1)) * s + x,
        lambda: lax.scan(lambda h, y: (jnp.tanh(h @ w + y), h), x, jnp.stack([s, s]))[0],
        lambda: jnp.maximum(x, jnp.tile(s, (len(x), 1, 1)) + 0 * x),
        lambda: jnp.einsum("td,nsd->nts", s, x) @ x,
    )()


def outputs_of(seed):
    """The program of a seed, a function of parameters and examples [N, T, D]."""

    def predict(p, x):
        draw = Drawn(seed)
        s = shared(draw, p)
        for _ in range(draw.rng.integers(0, 4)):
            s = on(draw, p, s)
        for _ in range(draw.rng.integers(0, 2)):
            x = on(draw, p, x)
        x = met(draw, p, s, x)
        for _ in range(draw.rng.integers(0, 3)):
            x = on(draw, p, x)
        if draw.rng.random() < 0.3:
            x = met(draw, p, shared(draw, p), x)
        return x

    return predict


def loss_of(seed):
    """A mean over the examples of the program's outputs."""
    predict = outputs_of(seed)
    return lambda p, x: jnp.mean(jnp.sum(jnp.sin(predict(p, x)) ** 2, axis=(1, 2)))
