"""Networks and cores of dm-haiku."""

import jax
import jax.numpy as jnp
from zoo.catalogue import (
    SINGLE,
    D,
    N,
    T,
    V,
    filled,
    mean_square,
    network,
    next_word,
    normal,
    tokens,
)

SOURCE = "haiku"


def haiku(function, *inputs, measure=mean_square):
    import haiku as hk

    made = hk.transform_with_state(function)
    key = jax.random.key(0)
    params, state = jax.eval_shape(lambda *x: made.init(key, *x), *inputs)
    params, state = filled(params), filled(state)
    return (lambda p, *x: measure(made.apply(p, state, key, *x)[0])), params, *inputs


@network(SOURCE)
def mlp():
    import haiku as hk

    return haiku(lambda x: hk.nets.MLP([8, 8, 3])(x), normal(1, N, D))


@network(SOURCE, mixes=True, tolerance=SINGLE)
def resnet():
    import haiku as hk

    def forward(x):
        net = hk.nets.ResNet((1, 1, 1, 1), 3, channels_per_group=(4, 4, 8, 8), bottleneck=False)
        return net(x, is_training=True)

    return haiku(forward, normal(1, N, 16, 16, 3))


def recurrent(core):
    def forward(x):
        import haiku as hk

        unit = core(hk)
        outputs, _ = hk.dynamic_unroll(unit, jnp.swapaxes(x, 0, 1), unit.initial_state(len(x)))
        return jnp.swapaxes(outputs, 0, 1)

    return haiku(forward, normal(1, N, T, D))


@network(SOURCE)
def lstm():
    return recurrent(lambda hk: hk.LSTM(5))


@network(SOURCE)
def gru():
    return recurrent(lambda hk: hk.GRU(5))


@network(SOURCE)
def deep_rnn():
    return recurrent(
        lambda hk: hk.DeepRNN([hk.VanillaRNN(5), jax.nn.relu, hk.GRU(4), hk.Linear(3)])
    )


@network(SOURCE, tolerance=SINGLE)
def transformer():
    import haiku as hk

    def forward(ids):
        x = hk.Embed(V, D)(ids) + hk.get_parameter("positions", (T, D), init=jnp.zeros)
        h = hk.LayerNorm(-1, True, True)(x)
        attention = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())
        x = x + attention(h, h, h, jnp.tril(jnp.ones((1, 1, T, T))))
        h = jax.nn.gelu(hk.Linear(12)(hk.RMSNorm(-1)(x)))
        return hk.Linear(V)(x + hk.Linear(D)(h)), ids

    return haiku(forward, tokens(1, N, T), measure=lambda out: next_word(*out))


@network(SOURCE)
def convolutions():
    import haiku as hk

    def forward(x):
        x = jax.nn.relu(hk.DepthwiseConv2D(1, 3)(hk.Conv2D(6, 3, stride=2)(x)))
        x = hk.GroupNorm(2)(hk.Conv2DTranspose(4, 3, stride=2)(x))
        return hk.Linear(3)(hk.Flatten()(hk.avg_pool(x, 2, 2, "SAME")))

    return haiku(forward, normal(1, N, 6, 6, 2))
