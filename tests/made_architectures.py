"""Architectures with kernels that are parts of a leaf, or made of it entry by entry."""

import jax
import jax.numpy as jnp
from architectures import UNCOVERED, D, N, T, architecture, mean_square, normal, tokens
from jax import lax


@architecture
def gates_and_candidate_of_one_kernel():
    def loss(p, x):
        gates, candidate = jnp.split(p["w"], [2 * 5], axis=1)

        def step(h, x):
            z, r = jnp.split(jax.nn.sigmoid(x @ p["v"][:, :10] + h @ gates + p["b"][:10]), 2, -1)
            new = jnp.tanh(x @ p["v"][:, 10:] + (r * h) @ candidate + p["b"][10:])
            return (1 - z) * h + z * new, None

        return mean_square(lax.scan(step, jnp.zeros((len(x), 5)), jnp.swapaxes(x, 0, 1))[0])

    params = {"w": normal(1, 5, 15), "v": normal(2, D, 15), "b": normal(3, 15)}
    return loss, params, normal(0, N, T, D)


@architecture
def heads_of_unequal_parts():
    def loss(p, x):
        inner = p["qkv"][1:]  # the first row meets a feature of its own
        q = jnp.einsum("ntd,dhk->nhtk", x, inner[:, :8].reshape(D, 4, 2))
        k, v = (x @ inner[:, at : at + 2] for at in (8, 10))
        mixed = jax.nn.softmax(jnp.einsum("nhtk,nsk->nhts", q, k)) @ v[:, None]
        own = jnp.sum(x, -1, keepdims=True) @ p["qkv"][:1]
        return mean_square(mixed) + mean_square(own) + mean_square(x @ p["half"][:, 1:3])

    params = {"qkv": normal(1, D + 1, 12), "half": normal(2, D, 5)}
    return loss, params, normal(0, N, T, D)


@architecture
def parts_of_convolutions_and_tables():
    def loss(p, ids):
        x = p["table"][1:6][ids]
        first = lax.conv_general_dilated(x, p["conv"][..., :3], (1,), "SAME", dimension_numbers=HIO)
        both = first @ p["mixed"][:3] + jnp.sin(x) @ p["mixed"][3:]
        return mean_square(jnp.tanh(both) @ p["table"][1:6].T)

    params = {"table": normal(1, 7, D), "conv": normal(2, 3, D, 5), "mixed": normal(3, 3 + D, D)}
    return loss, params, tokens(0, N, T, vocabulary=5)


HIO = ("NHC", "HIO", "NHC")


def triangle(*shape):
    return jnp.tril(jnp.ones(shape))


@architecture
def masked_kernels():
    def loss(p, x):
        h = jnp.tanh(x @ (p["w"] * triangle(D, 5)) + p["b"])
        h = jnp.tanh(h @ jnp.where(triangle(5, 5) > 0, p["v"], 0.0).T + jax.nn.softplus(p["c"]))
        h = jax.checkpoint(lambda h: jnp.tanh(h @ (p["u"] * 0.5 * triangle(5, 5))))(h)
        return mean_square(h @ jax.nn.softplus(p["positive"]))

    shapes = {"w": (D, 5), "b": (5,), "v": (5, 5), "c": (5,), "u": (5, 5), "positive": (5, 2)}
    params = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return loss, params, normal(0, N, D)


@architecture
def masked_in_scans():
    def loss(p, x):
        stack, shared = p["stack"] * triangle(5, 5), p["shared"] * triangle(5, 5)

        def step(h, layer):
            w, v = layer
            return jnp.tanh(h @ w + h @ shared + h @ jnp.exp(v) + h @ (p["inside"] ** 2)), None

        h = lax.scan(step, jnp.tanh(x @ p["in"]), (stack, p["exp"]))[0]
        return mean_square(h)

    params = {"in": normal(1, D, 5), "stack": normal(2, 2, 5, 5), "exp": normal(3, 2, 5, 5) - 2}
    params |= {"shared": normal(4, 5, 5), "inside": 0.3 * normal(5, 5, 5)}
    return loss, params, normal(0, N, D)


@architecture
def scaled_kernels():
    """Equalised convolutions, scaled tables, gains of columns that are parameters themselves."""

    def loss(p, ids):
        x = (p["table"] * 3.0)[ids] * 2.0
        kernel = p["conv"] / jnp.sqrt(jnp.mean(p["size"] ** 2 * 0 + 5.0))
        h = jnp.tanh(lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=HIO))
        return mean_square(jnp.tanh(h @ (p["w"] * p["gain"])) @ (p["v"] - 0.1 * p["v"] ** 3))

    params = {"table": normal(1, 5, D), "conv": normal(2, 3, D, 5), "w": normal(3, 5, 4)}
    params |= {"gain": normal(4, 4), "v": normal(5, 4, 2)}
    return loss, params | {"size": jnp.ones(3)}, tokens(0, N, T, vocabulary=5)


UNCOVERED["scaled_kernels"] = ["['gain']", "['size']"]


@architecture
def fake_quantised():
    """Rounded kernels whose gradient passes straight through."""

    def loss(p, x):
        def rounded(w):
            scale = jnp.max(jnp.abs(w)) / 7
            return w + lax.stop_gradient(jnp.round(w / scale) * scale - w)

        return mean_square(jnp.tanh(x @ rounded(p["w"])) @ jnp.clip(p["v"], -1, 1))

    return loss, {"w": normal(1, D, 5), "v": normal(2, 5, 2)}, normal(0, N, D)
