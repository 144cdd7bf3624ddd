"""Trains a Flax network with each method and shows what came of it: ``python -m optax_curv.demo``.

The problem is an autoencoder of scikit-learn's handwritten digits; ``--problem`` has two others.
Every method starts from the same weights and sees the same batches; learning rates fall to zero
along a cosine, but for `kfac(None)` and `levenberg_marquardt`, which have none. The error that is
followed is that of examples or points which no method has trained on.

Learning rates are those with the lowest error at the end from seed 100, on the grid 1, 2, 5, 10, …
for all methods alike: ``python -m benchmarks.demo_rates`` finds them. Seed 0, the default, had no
say.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

import jax

from optax_curv.demo import results, training
from optax_curv.demo.problems import PROBLEMS, STEPS
from optax_curv.demo.training import METHODS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _whole(numbers: range, named: str) -> Callable[[str], int]:
    def parse(text):
        if not text.isdecimal() or int(text) not in numbers:
            raise argparse.ArgumentTypeError(f"expected a whole number {named}, got {text!r}")
        return int(text)

    return parse


def _writable(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from error
    if not existed:
        path.unlink()
    return path


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains, prints the table and draws the picture."""
    parser = _Parser(
        prog="python -m optax_curv.demo",
        description="Trains a Flax network, once a method, and shows what came of it.",
    )
    steps, seeds = (
        _whole(range(1, sys.maxsize), "above zero"),
        _whole(range(2**32), "from 0 to 2**32 - 1"),
    )
    add = parser.add_argument
    add("--problem", choices=PROBLEMS, default="autoencoder", help="default: %(default)s")
    add(
        "--methods", nargs="+", action="extend", choices=METHODS, help="default: all of the problem"
    )
    add("--steps", type=steps, help=f"of each method (default: {STEPS})")
    add("--seed", type=seeds, default=0, help="of weights, batches, held-out digits (default: 0)")
    add("--out", type=_writable, default="optax_curv_demo.png", help="default: %(default)s")
    options = parser.parse_args(arguments)
    methods = [name for name in METHODS if options.problem in METHODS[name].rates]
    names = list(dict.fromkeys(options.methods or methods))
    if unfit := [name for name in names if name not in methods]:
        parser.error(f"{options.problem} is not trained by {', '.join(unfit)}")
    with jax.enable_x64(options.problem == "poisson"):
        _run(parser, options, names)


def _run(parser: _Parser, options: argparse.Namespace, names: list[str]):
    steps = options.steps or STEPS[options.problem]
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401

        problem = PROBLEMS[options.problem](options.seed)
    except ImportError as error:
        parser.error(f"{error}; install what the demo needs: pip install 'optax-curv[demo]'")
    runs = []
    try:
        for name in names:
            rate = METHODS[name].rates[options.problem]
            runs.append(training.train(name, problem, steps, options.seed, rate))
    except KeyboardInterrupt:
        if runs:
            print(results.table(runs, problem))
        parser.exit(130, f"interrupted: {len(runs)} of {len(names)} methods have finished\n")
    print(results.table(runs, problem))
    try:
        results.plot(runs, problem, options.out)
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: cannot write {options.out}: {error.strerror}\n")
    print(f"picture: {options.out}", file=sys.stderr)
    print(results.said(runs))
