"""More architectures: where examples, kernels and scalars lie in unusual places."""

import jax
import jax.numpy as jnp
from architectures import ARCHITECTURES, D, N, T, architecture, mean_square, normal
from jax import lax


@architecture
def scalar_parameters():
    def loss(p, x):
        h = x @ p["w"] + p["shift"]
        return mean_square(h + p["gate"] * jnp.where(h > 0, h, p["slope"] * h) @ p["v"])

    return (
        loss,
        {
            "w": normal(1, D, 5),
            "v": normal(2, 5, 5),
            "shift": normal(3),
            "gate": normal(4),
            "slope": normal(5),
        },
        normal(0, N, D),
    )


@architecture
def vector_kernel():
    return (
        lambda p, x: jnp.mean(jnp.sin(x @ -p["w"] + p["b"]) ** 2),
        {"w": normal(1, D), "b": normal(2)},
        normal(0, N, D),
    )


@architecture
def tiled_class_token():
    def loss(p, x):
        tokens = jnp.tile(p["class"], (x.shape[0], 1, 1))
        return mean_square(jnp.tanh(jnp.concatenate([tokens, x], axis=1) @ p["w"])[:, 0] @ p["v"])

    return (
        loss,
        {"class": normal(1, 1, 1, D), "w": normal(2, D, 5), "v": normal(3, 5, 2)},
        normal(0, N, T, D),
    )


@architecture
def stacked_and_unstacked():
    def loss(p, x):
        h = jnp.stack([jnp.tanh(x @ w) for w in jnp.unstack(p["w"])]) * p["s"]
        q, k = jnp.einsum("knd,pde->pnke", h, jnp.stack([p["q"], p["k"]]))
        return mean_square(q * jnp.tanh(k))

    params = {
        "w": normal(1, 3, D, 5),
        "s": normal(2, 5),
        "q": normal(3, 5, 4),
        "k": normal(4, 5, 4),
    }
    return loss, params, normal(0, N, D)


@architecture
def example_after_example():
    def loss(p, x):
        def layer(h, p):
            return jnp.tanh(p["w"] @ h + p["b"]) * p["s"], None

        return mean_square(lax.map(lambda x: lax.scan(layer, x, p)[0], x))

    return (
        loss,
        {"w": normal(1, 2, D, D), "b": normal(2, 2, D), "s": normal(3, 2, D)},
        normal(0, N, D),
    )


@architecture
def losses_summed_in_a_scan():
    def loss(p, x):
        def step(total, x):
            h = jnp.tanh(p["w"] @ x + p["b"]) * p["s"]
            return total + jnp.sum(jnp.sin(h @ p["v"]) ** 2), None

        return lax.scan(step, jnp.zeros([], x.dtype), x)[0] / x.shape[0]

    params = {"w": normal(1, 5, D), "b": normal(2, 5), "s": normal(3, 5), "v": normal(4, 5, 2)}
    return loss, params, normal(0, N, D)


@architecture
def learned_initial_state():
    def loss(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["wx"] + h @ p["wh"])
            return h, h

        start = jnp.broadcast_to(p["start"], (x.shape[0], 5))
        return mean_square(jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1))

    return (
        loss,
        {"wx": normal(1, D, 5), "wh": normal(2, 5, 5), "start": normal(3, 5)},
        normal(0, N, T, D),
    )


@architecture
def gradient_inside():
    def net(p, x):
        h = jnp.tanh(p["c"] @ jnp.tanh(p["a"] @ x + p["b"]) + p["d"])
        return (p["v"] @ h)[0]

    def loss(p, x):
        gradient = jax.vmap(jax.grad(net, argnums=1), (None, 0))(p, x)
        return jnp.mean(jnp.sum(gradient**2, -1) + jax.vmap(net, (None, 0))(p, x) ** 2)

    params = {
        "a": normal(1, 5, 2),
        "b": normal(2, 5),
        "c": normal(3, 4, 5),
        "d": normal(4, 4),
        "v": normal(5, 1, 4),
    }
    return loss, params, normal(0, N, 2)


@architecture
def tangent_inside():
    def loss(p, x):
        value, tangent = jax.jvp(
            lambda x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], (x,), (jnp.ones_like(x),)
        )
        return mean_square(value + tangent)

    return loss, {"w": normal(1, D, 5), "b": normal(2, 5), "v": normal(3, 5, 2)}, normal(0, N, D)


@architecture
def bilinear():
    def loss(p, x, y):
        return mean_square(jnp.einsum("ni,kij,nj->nk", x, p["w"], y) + p["b"])

    return loss, {"w": normal(1, 3, D, 5), "b": normal(2, 3)}, normal(0, N, D), normal(9, N, 5)


@architecture
def associative_recurrence():
    def loss(p, x):
        decays, inputs = jax.nn.sigmoid(x @ p["decay"] + p["b"]), x @ p["in"]
        states = lax.associative_scan(
            lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1]), (decays, inputs), axis=1
        )[1]
        return mean_square(states @ p["out"])

    params = {
        "decay": normal(1, D, 5),
        "b": normal(2, 5),
        "in": normal(3, D, 5),
        "out": normal(4, 5, 2),
    }
    return loss, params, normal(0, N, T, D)


@architecture
def vmapped_grouped_convolution():
    def one(w, x):
        return lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )[0]

    params = {"w": normal(1, 3, 3, 4), "b": normal(2, 4)}
    return (
        lambda p, x: mean_square(jax.vmap(lambda x: one(p["w"], x) + p["b"])(x)),
        params,
        normal(0, N, 5, 6),
    )


@architecture
def low_rank_adapter():
    frozen = normal(5, D, 5)
    params = {"a": normal(1, D, 2), "b": normal(2, 2, 5), "v": normal(3, 5, 2)}
    return (
        lambda p, x: mean_square(jnp.tanh(x @ frozen + 0.5 * (x @ p["a"]) @ p["b"]) @ p["v"]),
        params,
        normal(0, N, D),
    )


def residual_net(p, x):
    """A scalar; directions pass its first two kernels before they meet an activation."""
    h = p["a"] @ x + p["b"]
    h = h + jax.nn.silu(p["c"] @ h + p["d"]) * p["s"]
    return (p["v"] @ jnp.tanh(h))[0]


def residual_params(width):
    return {
        "a": normal(1, 5, width),
        "b": normal(2, 5),
        "c": normal(3, 5, 5),
        "d": normal(4, 5),
        "s": normal(5, 5),
        "v": normal(6, 1, 5),
    }


def along(f, x, direction):
    return jax.jvp(f, (x,), (direction,))[1]


SECOND_DERIVATIVES = {
    "hessian": lambda f, x: jnp.trace(jax.hessian(f)(x)),
    "forward_over_reverse": lambda f, x: jnp.sum(jax.jacfwd(jax.jacrev(f))(x) ** 2),
    "reverse_over_forward": lambda f, x: jnp.trace(jax.jacrev(jax.jacfwd(f))(x)),
    "tangents_of_tangents": lambda f, x: sum(
        along(lambda y, e=e: along(f, y, e), x, e) for e in jnp.eye(len(x))
    ),
    "vmapped_tangents": lambda f, x: jnp.sum(
        jax.vmap(lambda e: along(lambda y: along(f, y, e), x, e))(jnp.eye(len(x)))
    ),
    "gradient_of_gradient": lambda f, x: jax.grad(lambda y: jax.grad(f)(y)[0])(x)[1],
    "linearized_gradient": lambda f, x: jnp.sum(
        jax.vmap(jax.linearize(jax.grad(f), x)[1])(jnp.eye(len(x)))
    ),
}


def second_derivatives(name, width):
    def loss(p, x):
        return jnp.mean(
            jax.vmap(
                lambda x: jnp.sin(SECOND_DERIVATIVES[name](lambda y: residual_net(p, y), x)) ** 2
            )(x)
        )

    return lambda: (loss, residual_params(width), normal(0, N, width))


for name in SECOND_DERIVATIVES:
    ARCHITECTURES[name] = second_derivatives(name, 2)
ARCHITECTURES["laplacian_in_five_dimensions"] = second_derivatives("hessian", 5)
ARCHITECTURES["as_many_examples_as_directions"] = second_derivatives("hessian", N)


@architecture
def tangents_of_the_whole_batch():
    def net(p, x):
        h = jnp.tanh(x @ p["a"] + p["b"])
        return jax.nn.silu(h @ p["c"]) @ p["v"]

    def loss(p, x):
        f, ones = lambda x: net(p, x), jnp.ones_like(x)
        gradient = jax.grad(lambda x: jnp.sum(f(x)))(x)
        return mean_square(f(x) + along(lambda y: along(f, y, ones), x, ones)) + mean_square(
            gradient
        )

    return (
        loss,
        {"a": normal(1, 2, 5), "b": normal(2, 5), "c": normal(3, 5, 5), "v": normal(4, 5, 2)},
        normal(0, N, 2),
    )


@architecture
def point_after_point():
    def loss(p, x):
        laplacian = lax.map(
            lambda x: SECOND_DERIVATIVES["hessian"](lambda y: residual_net(p, y), x), x
        )
        return jnp.mean(jnp.sin(laplacian) ** 2)

    return loss, residual_params(2), normal(0, N, 2)


@architecture
def slices_picked_by_a_loop_counter():
    def loss(p, x):
        def layer(i, h):
            w = jax.tree.map(lambda leaf: leaf[i], p["layers"])
            return jnp.tanh(h @ w["w"] + w["b"]) * w["s"]

        def mix(h, i):
            return jnp.tanh(
                jax.vmap(lambda h: lax.dynamic_index_in_dim(p["mix"], i, 1, keepdims=False) @ h)(h)
            ), None

        return mean_square(lax.scan(mix, lax.fori_loop(0, 2, layer, x), jnp.arange(3))[0])

    layers = {"w": normal(1, 2, D, D), "b": normal(2, 2, D), "s": normal(3, 2, D)}
    return loss, {"layers": layers, "mix": normal(4, D, 3, D)}, normal(0, N, D)


@architecture
def both_views_in_one_batch():
    def loss(p, x, y):
        both = jnp.concatenate([x, y])
        h = jnp.tanh(both @ p["w"] + p["b"]) * p["s"]
        first, second = jnp.split(h @ p["v"], 2)
        return mean_square(first - second) + jnp.mean(jnp.sum(h[: len(x)], -1) ** 2)

    params = {"w": normal(1, D, 5), "b": normal(2, 5), "s": normal(3, 5), "v": normal(4, 5, 2)}
    return loss, params, normal(0, N, D), normal(9, N, D)


@architecture
def determinant_of_orbitals():
    def log_amplitude(p, r):
        h = jnp.tanh(
            jnp.concatenate([r, jnp.broadcast_to(r.mean(0), r.shape)], -1) @ p["w"] + p["b"]
        )
        orbitals = jnp.einsum("eh,kho->keo", h, p["orbitals"]) * p["envelope"]
        sign, log = jnp.linalg.slogdet(orbitals)
        return jnp.log(jnp.abs(jnp.sum(sign * jnp.exp(log))))

    def loss(p, r):
        gradient = jax.vmap(jax.grad(log_amplitude, argnums=1), (None, 0))(p, r)
        return mean_square(jnp.tanh(gradient))

    params = {
        "w": normal(1, 4, 5),
        "b": normal(2, 5),
        "orbitals": normal(3, 2, 5, 3),
        "envelope": normal(4, 3),
    }
    return loss, params, normal(0, N, 3, 2)


@architecture
def masked_tokens():
    def loss(p, x, noise):
        h = jnp.where(noise[..., None] > 0, p["mask"], x @ p["w"] + p["b"])
        h = jnp.where(jnp.roll(noise, 1, axis=1)[..., None] > 0, jnp.tanh(h), 0.5 * p["other"])
        return mean_square(h @ p["v"])

    params = {"w": normal(1, D, 5), "b": normal(2, 5), "mask": normal(3, 5), "other": normal(4, 5)}
    return loss, params | {"v": normal(5, 5, 2)}, normal(0, N, T, D), normal(9, N, T)
