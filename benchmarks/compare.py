"""Compares optimizers on one problem: ``python -m benchmarks.compare PROBLEM``; see ``--help``.

All methods start from the same weights, see the same batches and take their steps in one
interleaved run, block by block in an order that rotates; a table, a JSON file and a plot say what
came of it. Adam always runs: it is the unit."""

import argparse
import contextlib
import functools
import io
import json
import pathlib
import sys
from collections.abc import Callable

from tqdm import tqdm

from benchmarks import methods, peers, problems, report, running

METHODS = {**methods.OPTAX, **methods.OURS, **peers.METHODS}
RESULTS = pathlib.Path(__file__).parent / "results"
TUNING_SEED = 100


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks.compare", description="Compares optimizers on one problem."
    )
    names = ", ".join(problems.NAMES)
    parser.add_argument(
        "problem", help=f"{names}, or the path of a Python file with a function problem()"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(METHODS)} (default: all)"
    )
    parser.add_argument(
        "--seeds",
        nargs="*",
        type=int,
        default=[0, 1, 2],
        help="of weights and batches (default: 0 1 2); none: tune only",
    )
    parser.add_argument("--steps", type=int, help="steps of each method (default: the problem's)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=RESULTS,
        help="folder of the results (default: %(default)s)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--tune",
        action="store_true",
        help=f"tune the settings first, from seed {TUNING_SEED}, and keep them",
    )
    how.add_argument(
        "--tuned",
        action="store_true",
        help="the kept settings (default: those each walk starts from)",
    )
    return parser


def _prepare(names, problem, steps, settle: Callable) -> tuple[dict, dict]:
    """Methods compiled and with settings by `settle(name, compiled)`, and the reason for each that
    is not."""
    ready, failures = {}, {}

    def attempt(name, function, *arguments):
        try:
            with contextlib.redirect_stdout(
                io.StringIO()
            ):  # some peers print while they are traced
                return function(*arguments)
        except methods.Absent as error:
            failures[name] = f"absent: {error}"
        except Exception as error:  # whatever a peer raises is a line in the table
            failures[name] = f"failed: {running.reason(error)}"

    made = {name: attempt(name, METHODS[name], problem, steps) for name in names}
    # Those that compile themselves come last: the others start by clearing what JAX has compiled so
    # far.
    for name, method in sorted(made.items(), key=lambda item: item[1] is not None and item[1].host):
        if method is not None:
            tqdm.write(f"compiling {name}", file=sys.stderr)
            compiled = attempt(name, running.compile_method, method, problem, method.settings)
            ready[name] = compiled and attempt(name, settle, name, compiled)
    return {name: ready[name] for name in names if ready.get(name)}, failures


class _Kept:
    """The settings that were tuned, by problem and method, in a JSON file."""

    def __init__(self, folder: pathlib.Path, title: str):
        self.path, self.title = folder / "tuned.json", title

    def read(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, name: str) -> dict | None:
        return self.read().get(self.title, {}).get(name)

    def keep(self, name: str, settings: dict):
        kept = self.read()
        kept.setdefault(self.title, {})[name] = settings
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None):
    """Parses the command line, tunes if asked to, trains, prints the table and writes the
    results."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        title, problem = problems.load(options.problem)
    except (ValueError, ImportError, RuntimeError) as error:
        parser.error(str(error))
    unknown = [name for name in options.methods or () if name not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; expected some of {', '.join(METHODS)}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: expected a whole number above zero, got {options.steps}")
    asked = options.methods or list(METHODS)
    names = list(dict.fromkeys([report.REFERENCE, *asked] if options.seeds else asked))
    steps = options.steps or problem.steps
    kept, evaluate, untuned = _Kept(options.out, title), running.evaluator(problem), []

    def settle(name, compiled):
        if options.tune and name in asked:
            note = functools.partial(tqdm.write, file=sys.stderr)
            kept.keep(
                name, running.tune(problem, compiled, name, TUNING_SEED, steps, evaluate, note)
            )
        settings = kept.get(name) if options.tune or options.tuned else None
        if settings is None and compiled.settings:
            untuned.append(name)
        return compiled._replace(settings=settings or compiled.settings)

    ready, failures = _prepare(names, problem, steps, settle)
    if not options.seeds:
        return
    if report.REFERENCE not in ready:
        parser.error(f"{report.REFERENCE}, the reference, {failures[report.REFERENCE]}")
    tuning = (
        f"tuned from seed {TUNING_SEED} on the grid 1, 2, 5, … (others: powers of ten) until the "
        "best is inside"
    )
    tuning += f", but for {', '.join(untuned)}" if untuned else ""
    with tqdm(total=steps * len(options.seeds), unit="step", desc=title, file=sys.stderr) as bar:
        runs, table = [], ""
        for seed in options.seeds:
            runs.append(running.train(problem, ready, seed, steps, evaluate, bar.update))
            # After every seed, so that an interrupted run leaves those that it finished.
            summary = report.summarize(problem, ready, runs, options.seeds[: len(runs)])
            summary["methods"] |= {name: {"failure": reason} for name, reason in failures.items()}
            summary |= {"machine": report.machine(), "tuning": tuning}
            table = report.save(title, summary, options.out)
    print(table)
    print(f"written: {options.out}/{title}.json, .md and .png", file=sys.stderr)


if __name__ == "__main__":
    main()
