"""A classifier of digits, 64-64-64-10."""

from benchmarks.problems import Problem
from benchmarks.problems.dense import init_dense, predict_dense
from benchmarks.problems.digits import classifier


def problem() -> Problem:
    return classifier(
        "network 64-64-64-10 (tanh)",
        init=lambda seed: init_dense(seed, (64, 64, 64, 10)),
        predict=predict_dense,
        steps=300,
        batch=128,
        evaluate_every=5,
    )
