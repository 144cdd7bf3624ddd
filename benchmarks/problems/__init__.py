"""What is trained: one small file a problem, each with a function ``problem() -> Problem``.

A problem of your own is a Python file with such a function; give its path in the place of a name. A
file that sets ``X64 = True`` runs in float64."""

import importlib
import importlib.util
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

NAMES = (
    "autoencoder",
    "mlp",
    "transformer",
    "language_model",
    "vision_conv",
    "vision_vit",
    "xor",
    "poisson2d",
    "poisson5d",
)


def is_vector(path, leaf) -> bool:
    """What the methods for matrices leave to Adam where a problem does not say otherwise."""
    del path
    return leaf.ndim != 2


class Problem(NamedTuple):
    """A training problem.

    Attributes:
      definition: one line for the report: data, network, loss, batch.
      init: seed -> parameters.
      loss: (params, *batch) -> the mean loss of a batch, [].
      batches: (seed, steps) -> an iterator over batches, each a tuple of arrays.
      metrics: name -> function of the parameters. The first decides: learning rates are tuned for
        its last value, and the steps and seconds until it falls to tuned Adam's last value are
        compared.
      steps: how many, by default.
      evaluate_every: steps between evaluations; also the length of a timed block.
      objective: the loss as an `optax_curv.Objective` whose batches are (inputs, targets), if it is
        one.
      residuals: one function (params, points [N, d]) -> residuals [N] for each array of a batch, if
        the loss is half the sum of their mean squares.
      adam_for: (path, leaf) -> whether methods for matrices leave this leaf to Adam.
      goal: a value of the first metric that replaces tuned Adam's last one as the target.
      share_of_steps: method -> share of `steps` it gets, for methods whose steps cost far more or
        less than Adam's.
      full_batch: whether all batches are the same, so that line searches may keep their last
        evaluation.
    """

    definition: str
    init: Callable[[int], Any]
    loss: Callable[..., Any]
    batches: Callable[[int, int], Iterator[tuple]]
    metrics: dict[str, Callable[[Any], Any]]
    steps: int
    evaluate_every: int
    objective: Any = None
    residuals: tuple[Callable, ...] = ()
    adam_for: Callable[[Any, Any], bool] = is_vector
    goal: float | None = None
    share_of_steps: Mapping[str, float] = types.MappingProxyType({})
    full_batch: bool = False


def load(name: str) -> tuple[str, Problem]:
    """A problem by name, or from the path of a Python file; ValueError in one line if there is
    none."""
    if name in NAMES:
        title, module = name, importlib.import_module(f"benchmarks.problems.{name}")
    else:
        path = pathlib.Path(name)
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(
                f"unknown problem {name!r}; expected one of {', '.join(NAMES)} or the path of a "
                f".py file"
            )
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        title, module = path.stem, importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, "problem", None)):
            raise ValueError(
                f"{name} has no function problem() that returns a benchmarks.problems.Problem"
            )
    if getattr(module, "X64", False):
        import jax

        jax.config.update("jax_enable_x64", True)
    return title, module.problem()
