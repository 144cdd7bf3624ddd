"""Models of Keras 3 on its JAX backend."""

import os

import jax
import jax.numpy as jnp
from zoo.catalogue import SINGLE, D, N, T, V, filled, mean_square, network, normal, tokens

os.environ.setdefault("KERAS_BACKEND", "jax")
SOURCE = "keras"


def keras(build, x, training=False):
    import keras

    with jax.enable_x64(False):
        model = build(keras)
        params = {v.path: jnp.asarray(v.value) for v in model.trainable_variables}
        state = [jnp.asarray(v.value) for v in model.non_trainable_variables]

    def loss(params, x):
        values = [params[v.path] for v in model.trainable_variables]
        return mean_square(model.stateless_call(values, state, x, training)[0])

    return loss, filled(params), x


@network(SOURCE, tolerance=SINGLE)
def dense():
    def build(keras):
        layers = keras.layers
        return keras.Sequential(
            [layers.Input((D,)), layers.Dense(8, "tanh"), layers.Dropout(0.0), layers.Dense(3)]
        )

    return keras(build, normal(1, N, D))


@network(SOURCE, mixes=True, tolerance=SINGLE)
def convolutions_and_batch_norm():
    def build(keras):
        layers = keras.layers
        x = inputs = layers.Input((8, 8, 3))
        for width in (4, 6):
            x = layers.Conv2D(width, 3, padding="same")(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.SeparableConv2D(5, 3)(x)
        x = layers.GlobalAveragePooling2D()(layers.LayerNormalization()(x))
        return keras.Model(inputs, layers.Dense(3)(x))

    return keras(build, normal(1, N, 8, 8, 3), training=True)


@network(SOURCE, tolerance=SINGLE)
def lstm():
    def build(keras):
        layers = keras.layers
        return keras.Sequential(
            [layers.Input((T, D)), layers.LSTM(5, return_sequences=True), layers.GRU(4)]
        )

    return keras(build, normal(1, N, T, D))


@network(SOURCE, tolerance=SINGLE)
def transformer():
    def build(keras):
        layers = keras.layers
        inputs = layers.Input((T,), dtype="int32")
        x = layers.Embedding(V, D)(inputs)
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 4)(h, h, use_causal_mask=True)
        h = layers.RMSNormalization()(x)
        return keras.Model(inputs, x + layers.Dense(D)(layers.Dense(12, "gelu")(h)))

    return keras(build, tokens(1, N, T))


@network(SOURCE, tolerance=SINGLE)
def bidirectional():
    def build(keras):
        layers = keras.layers
        return keras.Sequential(
            [layers.Input((T, D)), layers.Bidirectional(layers.GRU(4)), layers.Dense(3)]
        )

    return keras(build, normal(1, N, T, D))
