"""scikit-learn's digits, and classifiers of them."""

import jax
import jax.numpy as jnp

import optax_curv
from benchmarks.problems import Problem
from benchmarks.problems.dense import epochs


def digits() -> tuple[jax.Array, ...]:
    """Images [n, 64] in [0, 1] and their labels [n], those to train on and those held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.astype("float32") / 16, labels.astype("int32"), random_state=0, stratify=labels
    )
    images, test_images, labels, test_labels = map(jnp.asarray, parts)
    return images, labels, test_images, test_labels


def classifier(network: str, init, predict, steps: int, batch: int, **fields) -> Problem:
    """The problem of a network: `init(seed)`, `predict(params, images [n, 64])` -> logits."""
    images, labels, test_images, test_labels = digits()
    loss = optax_curv.Objective(predict, "categorical")

    def test_error(params):
        return jnp.mean(predict(params, test_images).argmax(-1) != test_labels)

    return Problem(
        definition=f"{len(labels)} digits ({len(test_labels)} for the test), {network}, softmax "
        f"cross-entropy, batch {batch}",
        init=init,
        loss=loss,
        batches=lambda seed, steps: epochs((images, labels), batch, seed, steps),
        metrics={
            "training loss": lambda params: loss(params, images, labels),
            "test loss": lambda params: loss(params, test_images, test_labels),
            "test error": test_error,
        },
        steps=steps,
        objective=loss,
        **fields,
    )
