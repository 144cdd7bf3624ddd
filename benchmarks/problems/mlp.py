"""A classifier of digits, 64-64-64-10."""

import jax.numpy as jnp

import optax_curv
from benchmarks.problems import Problem
from benchmarks.problems.dense import epochs, init_dense, predict_dense


def problem() -> Problem:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.astype("float32") / 16, labels.astype("int32"), random_state=0, stratify=labels
    )
    images, test_images, labels, test_labels = map(jnp.asarray, parts)
    loss = optax_curv.Objective(predict_dense, "categorical")

    def test_error(params):
        return jnp.mean(predict_dense(params, test_images).argmax(-1) != test_labels)

    return Problem(
        definition="1347 digits (450 for the test), network 64-64-64-10 (tanh), softmax "
        "cross-entropy, batch 128",
        init=lambda seed: init_dense(seed, (64, 64, 64, 10)),
        loss=loss,
        batches=lambda seed, steps: epochs((images, labels), 128, seed, steps),
        metrics={
            "training loss": lambda params: loss(params, images, labels),
            "test loss": lambda params: loss(params, test_images, test_labels),
            "test error": test_error,
        },
        steps=300,
        evaluate_every=5,
        objective=loss,
    )
