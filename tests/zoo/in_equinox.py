"""Layers and models of Equinox, and neural differential equations of diffrax."""

import jax
import jax.numpy as jnp
from zoo.catalogue import D, N, T, V, filled, mean_square, network, next_word, normal, tokens

SOURCE = "equinox"
KEY = jax.random.key(0)


def module(build, call, *inputs, measure=mean_square):
    """A module of one example, under vmap; `call(model, *example)`."""
    import equinox as eqx

    model = build(eqx)
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, *inputs):
        model = eqx.combine(params, rest)
        return measure(jax.vmap(lambda *x: call(model, *x))(*inputs))

    return loss, filled(params), *inputs


@network(SOURCE)
def mlp():
    return module(lambda eqx: eqx.nn.MLP(D, 3, 8, 2, key=KEY), lambda m, x: m(x), normal(1, N, D))


@network(SOURCE)
def cnn():
    def build(eqx):
        layers = [eqx.nn.Conv2d(2, 4, 3, key=KEY), eqx.nn.Lambda(jax.nn.relu)]
        layers += [eqx.nn.MaxPool2d(2, 2), eqx.nn.GroupNorm(2, 4)]
        layers += [eqx.nn.ConvTranspose2d(4, 3, 3, key=KEY), eqx.nn.Lambda(jnp.ravel)]
        return eqx.nn.Sequential([*layers, eqx.nn.Linear(48, 3, key=KEY)])

    return module(build, lambda m, x: m(x), normal(1, N, 2, 6, 6))


def recurrent(cell):
    def call(model, x):
        size = model.hidden_size
        start = (jnp.zeros(size), jnp.zeros(size)) if cell == "LSTMCell" else jnp.zeros(size)
        state, _ = jax.lax.scan(lambda h, x: (model(x, h), None), start, x)
        return state[0] if cell == "LSTMCell" else state

    return module(lambda eqx: getattr(eqx.nn, cell)(D, 5, key=KEY), call, normal(1, N, T, D))


@network(SOURCE)
def lstm():
    return recurrent("LSTMCell")


@network(SOURCE)
def gru():
    return recurrent("GRUCell")


@network(SOURCE)
def transformer():
    def build(eqx):
        return {
            "words": eqx.nn.Embedding(V, D, key=KEY),
            "attention": eqx.nn.MultiheadAttention(2, D, key=KEY),
            "norms": [eqx.nn.LayerNorm(D), eqx.nn.RMSNorm(D)],
            "mlp": eqx.nn.MLP(D, D, 12, 1, jax.nn.gelu, key=KEY),
            "head": eqx.nn.Linear(D, V, key=KEY),
        }

    def call(model, ids):
        x = jax.vmap(model["words"])(ids)
        h = jax.vmap(model["norms"][0])(x)
        x = x + model["attention"](h, h, h, mask=jnp.tril(jnp.ones((T, T), bool)))
        x = x + jax.vmap(lambda x: model["mlp"](model["norms"][1](x)))(x)
        return jax.vmap(model["head"])(x)

    ids = tokens(1, N, T)
    loss, params, _ = module(build, call, ids, measure=lambda logits: logits)
    return lambda p, ids: next_word(loss(p, ids), ids), params, ids


def ode(call, build, *inputs):
    return module(build, call, *inputs)


def solved(field, start, args=None, controller=None):
    import diffrax

    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        0.0,
        1.0,
        0.25,
        start,
        args,
        adjoint=diffrax.DirectAdjoint(),
        max_steps=8,
        stepsize_controller=controller or diffrax.ConstantStepSize(),
    ).ys[-1]


@network(SOURCE)
def neural_ode():
    def call(model, x):
        return solved(lambda t, y, _: model(jnp.append(y, t)), x)

    return ode(call, lambda eqx: eqx.nn.MLP(5, 4, 6, 1, jnp.tanh, key=KEY), normal(1, N, 4))


@network(SOURCE)
def latent_ode():
    def build(eqx):
        return {
            "encoder": eqx.nn.GRUCell(3, 6, key=KEY),
            "field": eqx.nn.MLP(6, 6, 8, 1, jnp.tanh, key=KEY),
            "decoder": eqx.nn.Linear(6, 3, key=KEY),
        }

    def call(model, x):
        start, _ = jax.lax.scan(lambda h, x: (model["encoder"](x, h), None), jnp.zeros(6), x)
        return model["decoder"](solved(lambda t, y, _: model["field"](y), start))

    return ode(call, build, normal(1, N, T, 3))
