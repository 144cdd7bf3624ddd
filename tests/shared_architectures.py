"""Architectures with layers whose input all examples share, until their output meets the data."""

import jax
import jax.numpy as jnp
from architectures import D, N, T, architecture, mean_square, normal
from jax import lax


@architecture
def operator_network():
    """A DeepONet, whose trunk sees the same points for every function."""

    def loss(p, x):
        points = jnp.linspace(-1, 1, 2 * T).reshape(T, 2)
        hidden = jnp.tanh(points @ p["t1"] + p["b1"])
        mean, scale = hidden.mean(-1, keepdims=True), p["gain"]
        trunk = jnp.tanh((hidden - mean) * scale + p["offset"]) @ p["t2"]
        return mean_square((x @ p["branch"]) @ trunk.T)

    shapes = {"t1": (2, 5), "b1": (5,), "gain": (5,), "offset": (5,), "t2": (5, 3)}
    params = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return loss, params | {"branch": normal(9, D, 3)}, normal(0, N, D)


@architecture
def frozen_rotation():
    def loss(p, x):
        rotation = jnp.linalg.qr(normal(3, 5, 5))[0]
        return mean_square(jnp.sin(x @ (p["w"] @ rotation)) @ p["v"])

    return loss, {"w": normal(1, D, 5), "v": normal(2, 5, 2)}, normal(0, N, D)


def attend(p, queries, x):
    scores = jax.nn.softmax(queries @ jnp.swapaxes(x @ p["key"], 1, 2))
    return scores @ (x @ p["value"])


@architecture
def slots_through_layers():
    """Queries looked up from a table, normalised, projected, and carried through a scan."""

    def loss(p, x):
        def layer(h, w):
            h = jnp.tanh(h @ w)
            return h, jnp.sum(h)

        slots = p["slots"][jnp.arange(3)]
        slots = (slots - slots.mean(-1, keepdims=True)) / slots.std(-1, keepdims=True)
        queries, sums = lax.scan(layer, slots, p["layers"])
        return mean_square(attend(p, queries @ p["query"], x) + jnp.sum(sums))

    shapes = {"slots": (3, D), "layers": (2, D, D), "query": (D, D), "key": (D, D), "value": (D, 3)}
    params = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return loss, params, normal(0, N, T, D)


@architecture
def latents_meet_the_data_in_a_scan():
    """Perceiver's latents are shared before the first cross-attention, and not after it."""

    def loss(p, x):
        @jax.checkpoint
        def block(h, w):
            scores = jax.nn.softmax(h @ jnp.swapaxes(x @ p["key"], 1, 2))
            return jnp.tanh((h + scores @ x) @ w), None

        start = jnp.tanh(p["latents"][jnp.arange(3)]) @ p["start"]
        repeated = jnp.broadcast_to(start, (len(x), 3, D))
        return mean_square(lax.scan(block, repeated, p["layers"])[0])

    shapes = {"latents": (3, D), "start": (D, D), "layers": (2, D, D), "key": (D, D)}
    params = {name: 0.5 * normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return loss, params, normal(0, N, T, D)


@architecture
def position_biases_of_a_scanned_stack():
    def loss(p, x):
        distance = jnp.arange(T)[:, None] - jnp.arange(T) + T - 1
        bias = jnp.tanh(p["bias"][distance]).transpose(2, 0, 1)[None]
        mask = jnp.where(jnp.ones(x.shape[:2]) > 0, 0.0, -1e9)[:, None, None]

        def block(h, w):
            heads = h.reshape(*h.shape[:2], 2, -1)
            scores = jnp.einsum("nqhd,nkhd->nhqk", heads, heads) + bias + mask
            mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), heads)
            return h + mixed.reshape(h.shape) @ w, None

        return mean_square(lax.scan(block, x, p["layers"])[0])

    return loss, {"bias": normal(1, 2 * T - 1, 2), "layers": normal(2, 2, D, D)}, normal(0, N, T, D)


@architecture
def queries_beside_the_data():
    """Shared tokens go through a layer, beside the data into the next one, and pick from it."""

    def loss(p, x):
        tokens = jnp.tanh(p["tokens"][jnp.arange(2)] @ p["first"])
        joined = jnp.concatenate([jnp.broadcast_to(tokens, (len(x), 2, D)), x], axis=1)
        kernel = jnp.maximum(tokens, 0.1)
        return mean_square(jnp.tanh(joined @ p["next"]) @ kernel.T)

    shapes = {"tokens": (5, D), "first": (D, D), "next": (D, D)}
    params = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return loss, params, normal(0, N, T, D)


@architecture
def functions_of_leaves():
    """Leaves that meet the data through functions of themselves, or added to each other."""

    def loss(p, x):
        h = x @ p["w"] * jax.nn.softplus(p["positive"]) - jnp.exp(p["log"])
        h = h + (p["rows"] + p["columns"]).reshape(1, T, 5)
        h = jnp.sin(h) + jax.nn.log_softmax(p["logits"])
        scale = jax.lax.rsqrt(jnp.linspace(0.5, 2.0, 5) + 1e-3) * p["gamma"]
        h = h * scale + (p["beta"] - 0.3 * scale)  # as Keras normalises
        return mean_square(h @ p["v"])

    shapes = {"w": (D, 5), "positive": (5,), "log": (5,), "rows": (2, 1, 5), "columns": (1, 2, 5)}
    shapes |= {"logits": (5,), "gamma": (5,), "beta": (5,), "v": (5, 2)}
    params = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return loss, params, normal(0, N, T, D)


@architecture
def tokens_and_a_probe():
    """Two tokens in one concatenate, and a pooling head whose probe meets a kernel first."""

    def loss(p, x):
        first, last = (jnp.broadcast_to(p[k], (len(x), *p[k].shape[1:])) for k in ("cls", "last"))
        h = jnp.tanh(jnp.concatenate([first, x, last], axis=1) @ p["w"])
        queries = jnp.tile(p["probe"], (len(x), 1, 1)) @ p["query"] + p["bias"]
        return mean_square(jax.nn.softmax(queries @ jnp.swapaxes(h @ p["key"], 1, 2)) @ h)

    shapes = {"cls": (1, 1, D), "last": (1, 2, D), "w": (D, 5), "probe": (1, 2, 5)}
    shapes |= {"query": (5, 4), "bias": (4,), "key": (5, 4)}
    params = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return loss, params, normal(0, N, T, D)
