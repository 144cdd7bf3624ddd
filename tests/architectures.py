"""Small losses of many architectures: name -> builder of (loss, params, *arrays)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from optax_curv.capture._graph.trace import as_pure

N, T, D = 3, 4, 6  # examples, positions, width
KEY = jax.random.key(0)
ARCHITECTURES = {}
UNCOVERED = {}  # name -> parameters that no layer covers
FLOAT32_INSIDE = {"nnx_attention"}  # Flax's own softmax


def architecture(build):
    ARCHITECTURES[build.__name__] = build
    return build


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def tokens(seed, *shape, vocabulary=7):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, shape), jnp.int32)


def filled(shapes):
    """Numbers for the shapes of parameters, so that no initialiser needs to be compiled."""
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [0.5 * normal(k, *leaf.shape) for k, leaf in enumerate(leaves)])


def mean_square(outputs):
    """A mean over examples of something that is not linear in the outputs."""
    return jnp.mean(jnp.sum(jnp.sin(outputs + 1.0) ** 2, axis=tuple(range(1, outputs.ndim))))


def linen(module, *inputs):
    params = filled(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    return (
        lambda params, *inputs: mean_square(module.apply({"params": params}, *inputs)),
        params,
        *inputs,
    )


def pure(build, *inputs):
    graph, shapes, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    params = filled(as_pure(shapes))
    # what is left are random keys and counters that nothing here draws from
    rest = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if x.dtype == jnp.uint32 else KEY, as_pure(rest)
    )
    return (
        lambda params, *inputs: mean_square(nnx.merge(graph, params, rest)(*inputs)),
        params,
        *inputs,
    )


@architecture
def linen_dense():
    return linen(
        nn.Sequential([nn.Dense(5), jnp.tanh, nn.Dense(4, use_bias=False)]), normal(0, N, D)
    )


@architecture
def linen_dense_general():
    return linen(
        nn.Sequential([nn.DenseGeneral((2, 3)), jnp.tanh, nn.DenseGeneral(4, axis=(-2, -1))]),
        normal(0, N, T, D),
    )


@architecture
def kernel_for_each_position():
    def loss(p, x):
        return mean_square(jnp.einsum("nti,tio->nto", x, p["kernel"]) + p["bias"])

    return loss, {"kernel": normal(1, T, D, 5), "bias": normal(2, T, 5)}, normal(0, N, T, D)


@architecture
def linen_conv_1d():
    return linen(
        nn.Sequential([nn.Conv(4, (3,), strides=2), jnp.tanh, nn.Conv(2, (2,), padding="VALID")]),
        normal(0, N, 8, 3),
    )


@architecture
def linen_conv_2d():
    return linen(
        nn.Sequential([nn.Conv(4, (3, 2)), jnp.tanh, nn.Conv(2, (2, 2), strides=(2, 1))]),
        normal(0, N, 5, 6, 3),
    )


@architecture
def linen_conv_depthwise():
    return linen(
        nn.Sequential([nn.Conv(6, (3, 3), feature_group_count=3), jnp.tanh, nn.Conv(4, (1, 1))]),
        normal(0, N, 4, 4, 3),
    )


@architecture
def linen_conv_grouped_1d():
    return linen(nn.Conv(6, (3,), feature_group_count=2), normal(0, N, 5, 4))


@architecture
def linen_conv_dilated():
    return linen(
        nn.Conv(2, (2, 3), kernel_dilation=(2, 1), strides=(1, 2), padding="SAME"),
        normal(0, N, 6, 7, 3),
    )


@architecture
def linen_conv_3d():
    return linen(nn.Conv(2, (2, 2, 2)), normal(0, N, 3, 3, 3, 2))


@architecture
def linen_conv_transposed():
    return linen(nn.ConvTranspose(2, (3, 3), strides=(2, 2)), normal(0, N, 3, 3, 2))


@architecture
def linen_conv_transposed_flipped():
    return linen(
        nn.ConvTranspose(2, (3, 2), strides=(2, 1), transpose_kernel=True), normal(0, N, 3, 3, 2)
    )


@architecture
def linen_attention():
    return linen(
        nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5), normal(0, N, T, D)
    )


@architecture
def linen_lstm():
    return linen(nn.RNN(nn.LSTMCell(5, param_dtype=jnp.result_type(float))), normal(0, N, T, D))


@architecture
def linen_optimized_lstm():
    return linen(
        nn.RNN(nn.OptimizedLSTMCell(5, param_dtype=jnp.result_type(float))), normal(0, N, T, D)
    )


@architecture
def linen_gru():
    return linen(nn.RNN(nn.GRUCell(5, param_dtype=jnp.result_type(float))), normal(0, N, T, D))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h)
        h = nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.RMSNorm()(x))))
        return x + h, None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, D)(ids)
        block = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = block()(x, None)
        return nn.Dense(3)(nn.LayerNorm()(x))


@architecture
def linen_scanned_remat_transformer():
    return linen(Stack(), tokens(0, N, T))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, D)
        return embed.attend(nn.Dense(D)(jnp.tanh(embed(ids))))


@architecture
def linen_tied_embedding():
    return linen(Tied(), tokens(0, N, T))


@architecture
def linen_norms():
    module = nn.Sequential(
        [nn.LayerNorm(), nn.Dense(6), nn.RMSNorm(), jnp.tanh, nn.GroupNorm(2), nn.Dense(2)]
    )
    return linen(module, normal(0, N, T, D))


@architecture
def nnx_dense():
    return pure(
        lambda: nnx.Sequential(
            nnx.Linear(D, 5, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(5, 2, rngs=nnx.Rngs(1))
        ),
        normal(0, N, D),
    )


@architecture
def nnx_linear_general():
    return pure(
        lambda: nnx.LinearGeneral((T, D), (2, 3), axis=(-2, -1), rngs=nnx.Rngs(0)),
        normal(0, N, T, D),
    )


@architecture
def nnx_conv():
    return pure(lambda: nnx.Conv(3, 4, (3, 3), strides=2, rngs=nnx.Rngs(0)), normal(0, N, 5, 5, 3))


@architecture
def nnx_attention():
    return pure(
        lambda: nnx.MultiHeadAttention(
            2, D, decode=False, dtype=jnp.result_type(float), rngs=nnx.Rngs(0)
        ),
        normal(0, N, T, D),
    )


@architecture
def nnx_lstm():
    return pure(
        lambda: nnx.RNN(nnx.LSTMCell(D, 5, param_dtype=jnp.result_type(float), rngs=nnx.Rngs(0))),
        normal(0, N, T, D),
    )


@architecture
def nnx_gru():
    return pure(
        lambda: nnx.RNN(nnx.GRUCell(D, 5, param_dtype=jnp.result_type(float), rngs=nnx.Rngs(0))),
        normal(0, N, T, D),
    )


@architecture
def nnx_optimized_lstm():
    return pure(
        lambda: nnx.RNN(
            nnx.OptimizedLSTMCell(D, 5, param_dtype=jnp.result_type(float), rngs=nnx.Rngs(0))
        ),
        normal(0, N, T, D),
    )


@architecture
def nnx_embed_norm():
    def build():
        rngs = nnx.Rngs(0)
        embed = nnx.Embed(7, D, param_dtype=jnp.result_type(float), rngs=rngs)
        return nnx.Sequential(embed, nnx.LayerNorm(D, rngs=rngs), nnx.Linear(D, 2, rngs=rngs))

    return pure(build, tokens(0, N, T))


@architecture
def transposed_kernel():
    return (
        lambda p, x: mean_square(x @ p["w"].T + p["b"]),
        {"w": normal(1, 5, D), "b": normal(2, 5)},
        normal(0, N, D),
    )


@architecture
def vmapped_example():
    def loss(p, x):
        return mean_square(jax.vmap(lambda x: p["v"] @ jnp.tanh(p["w"] @ x + p["b"]))(x))

    return loss, {"w": normal(1, 5, D), "b": normal(2, 5), "v": normal(3, 2, 5)}, normal(0, N, D)


@architecture
def vmapped_ensemble():
    def member(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]

    params = {"w": normal(1, 2, D, 5), "b": normal(2, 2, 5), "v": normal(3, 2, 5, 3)}
    return (
        lambda p, x: mean_square(jnp.moveaxis(jax.vmap(member, (0, None))(p, x), 0, 1)),
        params,
        normal(0, N, D),
    )


@architecture
def vmapped_convolutions():
    def member(w, x):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    params = {"w": normal(1, 2, 3, D, 5)}
    return (
        lambda p, x: mean_square(jnp.moveaxis(jax.vmap(member, (0, None))(p["w"], x), 0, 1)),
        params,
        normal(0, N, T, D),
    )


@architecture
def mixture_of_experts():
    def loss(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        dispatched = jnp.einsum("nte,ntd->ntde", gates, x)
        hidden = jax.nn.relu(jnp.einsum("ntde,edh->nteh", dispatched, p["up"]) + p["bias"])
        return mean_square(jnp.einsum("nteh,ehd->ntd", hidden, p["down"]))

    params = {
        "gate": normal(1, D, 3),
        "up": normal(2, 3, D, 5),
        "bias": normal(3, 3, 5),
        "down": normal(4, 3, 5, D),
    }
    return loss, params, normal(0, N, T, D)


@architecture
def jitted_layers():
    @jax.jit
    def dense(p, x):
        return jax.nn.gelu(x @ p["w"] + p["b"])

    params = [{"w": normal(k, D, D), "b": normal(k + 5, D)} for k in range(2)]
    return lambda p, x: mean_square(dense(p[1], dense(p[0], x))), params, normal(0, N, D)


@architecture
def custom_vjp_activation():
    @jax.custom_vjp
    def activation(x):
        return jnp.clip(x, -1, 1)

    activation.defvjp(lambda x: (jnp.clip(x, -1, 1), None), lambda _, g: (g,))
    params = {"w": normal(1, D, 5), "v": normal(2, 5, 2)}
    return lambda p, x: mean_square(activation(x @ p["w"]) @ p["v"]), params, normal(0, N, D)


@architecture
def weight_normalised():
    params = {"w": normal(1, D, 5), "g": normal(2, 5), "v": normal(3, 5, 2)}
    UNCOVERED["weight_normalised"] = ["['g']"]
    return (
        lambda p, x: mean_square(jnp.tanh(x @ (p["g"] * p["w"])) @ p["v"]),
        params,
        normal(0, N, D),
    )


def pinn(p, t):
    def u(t):
        return jnp.squeeze(jnp.tanh(t[None] * p["w"] + p["b"]) @ p["v"])

    return u(t), jax.grad(u)(t), jax.grad(jax.grad(u))(t)


@architecture
def derivatives_inside():
    def loss(p, t):
        u, du, ddu = jax.vmap(lambda t: pinn(p, t))(t)
        return jnp.mean((ddu + jnp.sin(u) * du) ** 2)

    return loss, {"w": normal(1, 5), "b": normal(2, 5), "v": normal(3, 5, 1)}, normal(0, N)


@architecture
def deep_derivatives_inside():
    def net(p, x):
        h = jnp.tanh(p["a"] @ x + p["b"])
        return (p["v"] @ jnp.tanh(p["c"] @ h + p["d"]))[0]

    def loss(p, x):
        gradient = jax.vmap(jax.grad(net, argnums=1), (None, 0))(p, x)
        laplacian = jax.vmap(lambda x: jnp.trace(jax.hessian(net, argnums=1)(p, x)))(x)
        return jnp.mean(
            (laplacian + jnp.sum(gradient**2, -1) - jax.vmap(net, (None, 0))(p, x)) ** 2
        )

    params = {
        "a": normal(1, 5, 2),
        "b": normal(2, 5),
        "c": normal(3, 4, 5),
        "d": normal(4, 4),
        "v": normal(5, 1, 4),
    }
    return loss, params, normal(0, N, 2)


@architecture
def recurrent_scan():
    def loss(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["wx"] + h @ p["wh"] + p["b"])
            return h, h @ p["out"]

        return mean_square(
            jnp.swapaxes(lax.scan(step, jnp.zeros((x.shape[0], 5)), jnp.swapaxes(x, 0, 1))[1], 0, 1)
        )

    params = {
        "wx": normal(1, D, 5),
        "wh": normal(2, 5, 5),
        "b": normal(3, 5),
        "out": normal(4, 5, 2),
    }
    return loss, params, normal(0, N, T, D)


@architecture
def vmapped_scan():
    def loss(p, x):
        def step(h, x):
            h = jnp.tanh(p["wx"] @ x + p["wh"] @ h + p["b"])
            return h, p["out"] @ h

        return mean_square(jax.vmap(lambda x: lax.scan(step, jnp.zeros(5), x)[1])(x))

    params = {
        "wx": normal(1, 5, D),
        "wh": normal(2, 5, 5),
        "b": normal(3, 5),
        "out": normal(4, 2, 5),
    }
    return loss, params, normal(0, N, T, D)


@architecture
def looped_parameters_in_carry():
    def loss(p, x):
        def body(_, carry):
            p, h = carry
            return p, jnp.tanh(h @ p["w"] + p["b"])

        return mean_square(lax.fori_loop(0, 3, body, (p, x))[1])

    return loss, {"w": normal(1, D, D), "b": normal(2, D)}, normal(0, N, D)


@architecture
def stacked_slices():
    def loss(p, x):
        for k in range(3):
            x = jnp.tanh(x @ p["w"][k] + p["b"][k])
        return mean_square(x)

    return loss, {"w": normal(1, 3, D, D), "b": normal(2, 3, D)}, normal(0, N, D)


@architecture
def split_projection():
    def loss(p, x):
        q, k, v = jnp.split(x @ p["qkv"] + p["b"], 3, axis=-1)
        kernels = jnp.split(p["out"], 3, axis=1)
        y = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v
        return mean_square(jnp.concatenate([y @ w for w in kernels], -1))

    return (
        loss,
        {"qkv": normal(1, D, 3 * D), "b": normal(2, 3 * D), "out": normal(3, D, 6)},
        normal(0, N, T, D),
    )


@architecture
def conditional_layer():
    def loss(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        h = lax.cond(jnp.sum(x) > -100, lambda h: jnp.tanh(h @ p["u"]), lambda h: h, h)
        return mean_square(h @ p["v"])

    return (
        loss,
        {"w": normal(1, D, 5), "b": normal(2, 5), "u": normal(4, 5, 5), "v": normal(3, 5, 2)},
        normal(0, N, D),
    )


@architecture
def remat_layers():
    @jax.checkpoint
    def block(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    params = [{"w": normal(k, D, D), "b": normal(k + 5, D)} for k in range(2)]
    return lambda p, x: mean_square(block(p[1], block(p[0], x))), params, normal(0, N, D)


@architecture
def shared_layer():
    def loss(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return mean_square(jnp.tanh(h @ p["w"] + p["b"]) @ p["v"])

    return loss, {"w": normal(1, D, D), "b": normal(2, D), "v": normal(3, D, 2)}, normal(0, N, D)


@architecture
def positions_and_class_token():
    def loss(p, x):
        x = x @ p["patch"] + p["b"]
        x = jnp.concatenate([jnp.broadcast_to(p["class"], (x.shape[0], 1, D)), x], axis=1)
        return mean_square(jnp.tanh(x + p["position"][: x.shape[1]]) @ p["out"])

    params = {
        "patch": normal(1, 5, D),
        "b": normal(2, D),
        "class": normal(3, D),
        "position": normal(4, T + 3, D),
    }
    return loss, params | {"out": normal(5, D, 2)}, normal(0, N, T, 5)


@architecture
def embedded_positions():
    def loss(p, ids):
        x = p["table"][ids] + jnp.take(p["position"], jnp.arange(ids.shape[1]), axis=0)
        return mean_square(jnp.tanh(x) @ p["out"])

    return (
        loss,
        {"table": normal(1, 7, D), "position": normal(2, T, D), "out": normal(3, D, 2)},
        tokens(0, N, T),
    )


@architecture
def flattened_rows():
    def loss(p, x):
        h = jnp.tanh(x.reshape(-1, D) @ p["w"] + p["b"]) * p["s"]
        return mean_square((h @ p["v"]).reshape(x.shape[0], -1))

    params = {"w": normal(1, D, 5), "b": normal(2, 5), "s": normal(4, 5), "v": normal(3, 5, 2)}
    return loss, params, normal(0, N, T, D)


@architecture
def gains():
    def loss(p, x):
        h = jnp.tanh(x @ (p["w"] / 2.0) + p["b"]) * (1 + p["s"])
        return mean_square(h @ p["v"] * 0.5)

    params = {"w": normal(1, D, 5), "b": normal(2, 5), "s": normal(4, 5), "v": normal(3, 5, 2)}
    return loss, params, normal(0, N, D)
